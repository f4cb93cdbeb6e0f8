"""
Commands in processes of their own. Importing torch takes seconds, so `python -m
tests.processes` imports it once and forks them.
"""

import contextlib
import faulthandler
import json
import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path

import attg_mae
from attg import trainer

SCRIPT = attg_mae.__file__


def serve():
    """Fork a process for each line [folder, environment, argv], as `python argv`.

    Answers its pid; for a line that is a pid, waits and answers the exit code.
    """
    # As in the fixture few_drawings: drawing imports matplotlib first.
    trainer.plot_panels = lambda *_: None
    print(0, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            print(os.waitstatus_to_exitcode(os.waitpid(request, 0)[1]), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            folder, environment, sys.argv = request
            os.setsid()
            for fd, name in enumerate((os.devnull, "stdout", "stderr")):
                path = os.path.join(folder, name)  # folder is ignored before /dev/null
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), fd)
            # A process that hangs prints where, and exits.
            faulthandler.register(signal.SIGALRM, chain=True)
            signal.alarm(120)
            os.environ.update(environment)
            runpy.run_path(sys.argv[0], run_name="__main__")
            return


def command(settings):
    """Flags of the command line."""
    given = [(key, value) for key, value in settings.items() if value is not None]
    return [word for key, value in given for word in (f"--{key}", str(value))]


class Process:
    """A running command; `ask` is the fixture of that name."""

    def __init__(self, ask, out, settings, environment=None, script=(SCRIPT,)):
        self.ask, self.out, self.logs = ask, Path(out), Path(f"{out}.logs")
        self.logs.mkdir(exist_ok=True)
        argv = [*script, *command({"out": str(out)} | settings)]
        self.pid = ask([str(self.logs), environment or {}, argv])

    def steps(self):
        log = self.out / "log.jsonl"
        return log.read_text().count('"loss"') if log.exists() else 0

    def until(self, condition):
        """Wait for condition(); False if the process ends before."""
        while not condition():
            if state_and_session(f"/proc/{self.pid}/stat")[0] == "Z":
                return False
            time.sleep(0.001)
        return True

    def wait(self):
        """Exit code, stdout, stderr."""
        code = self.ask(self.pid)
        return code, *((self.logs / name).read_text() for name in ("stdout", "stderr"))


def state_and_session(stat):
    """Of a process, from its file in /proc."""
    state, _, _, session = Path(stat).read_text().rsplit(")", 1)[1].split()[:4]
    return state, int(session)


def members(session):
    """Pids of the processes of a session that are alive."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, its_session = state_and_session(stat)
            if its_session == session and state not in "ZX":
                alive.append(int(stat.parent.name))
    return alive


def ranks(ask, out, settings, script=(SCRIPT,), elsewhere=None):
    """Two Processes with the environment that torchrun gives to its ranks.

    elsewhere: flags of rank 1, as on a machine that does not share the folders.
    """
    # Below the range from which the system takes ports of connections.
    port = random.SystemRandom().randrange(20_000, 32_000)
    common = {"WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    runs = []
    for r, other in (("0", {}), ("1", elsewhere or {})):
        environment = common | {"RANK": r, "LOCAL_RANK": r}
        name = out if r == "0" else f"{out}.rank1"  # each its own stdout
        flags = settings | {"out": str(out)} | other
        runs.append(Process(ask, name, flags, environment, script))
    return runs


if __name__ == "__main__":
    serve()
