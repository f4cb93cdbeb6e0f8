"""
Tests of what can go wrong in a run: signals, kill -9, a full disk, damaged files, several processes. The runs are those
of the command line. Importing torch takes seconds, so `python test_faults.py` imports it once and forks them off.
"""
# ruff: noqa: E402

import os

import torch

if (
    not torch.cuda.is_available()
):  # for test_attg.py, should it come second: chosen before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import contextlib
import faulthandler
import json
import math
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

import attg_mae as A
from common.data import TrainBatches, open_data, save_maps

SCRIPT = A.__file__
TINY = dict(
    img_size=16,
    patch_size=4,
    width=32,
    depth=1,
    heads=2,
    decoder_width=16,
    decoder_depth=1,
    decoder_heads=2,
)
TINY |= dict(
    epochs=4,
    batch_size=4,
    lr=1e-3,
    warmup_epochs=1.0,
    log_every=1,
    workers=0,
    device="cpu",
)


# ---------------------------------------------------------------------------------------------------------------------
# Helpers, also those of test_attg.py


def make_pictures(folder, count, hue=0, size=(48, 40), suffix=".png"):
    """Coloured noise with a bright spot at a random place."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[: size[1], : size[0]]
    for i in range(count):
        rng = np.random.default_rng([hue, i, *folder.name.encode()])
        spot = np.exp(
            -((x - rng.uniform(0, size[0])) ** 2 + (y - rng.uniform(0, size[1])) ** 2)
            / 128
        )
        colour = np.roll([0.8, 0.3, 0.3], hue) * rng.uniform(0.6, 1)
        pixels = (
            0.55 * colour + 0.25 * rng.random((*y.shape, 3)) + 0.2 * spot[..., None]
        )
        Image.fromarray(np.uint8(255 * pixels)).save(folder / f"{i:03d}{suffix}")


def make_maps(path, data, flat=False):
    """The maps of a data set: the brightness of its pictures."""
    dataset = open_data(str(data))
    maps = np.stack(
        [
            np.asarray(dataset.read(i)[0].convert("L"), dtype=np.float32)
            for i in range(len(dataset))
        ]
    )
    save_maps(path, 0 * maps if flat else maps, dataset, "brightness")
    return str(path)


def make_data(root):
    """Settings of a data set with labels and maps: 25 pictures and 15 test pictures of 3 classes, 6 steps an epoch."""
    for part, count in (("train", 8), ("test", 5)):
        for hue in range(3):
            make_pictures(
                root / "data" / part / "rgb"[hue], count, hue + 3 * (part == "test")
            )
    make_pictures(root / "data" / "train" / "r", 9)
    return {
        "data": str(root / "data"),
        "maps": make_maps(root / "maps.npy", root / "data"),
    }


def train(out, **settings):
    return A.train(A.Config(**TINY | {"out": str(out)} | settings))


def records(out, key="loss"):
    return [
        r
        for r in map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
        if key in r
    ]


def losses(out):
    """What must be the same in two equal runs, a tuple for each line."""
    return [
        tuple(r[k] for k in ("step", "epoch", "loss", "mse", "grad_norm", "lr", "tau"))
        for r in records(out)
    ]


def last(out):
    return torch.load(Path(out) / "last.pt", weights_only=True)


def same(a, b):
    """The same bits."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b


def assert_same_run(out, reference):
    """Weights, optimiser, scaler, steps and losses; config differs in the folder only."""
    (a, b), parts = (
        (last(out), last(reference)),
        ("model", "optimizer", "scaler", "step"),
    )
    assert {k: v for k, v in a["config"].items() if b["config"][k] != v}.keys() <= {
        "out",
        "resume",
    }
    assert [k for k in parts if not same(a[k], b[k])] == []
    assert losses(out) == losses(reference)


@contextlib.contextmanager
def after_step(number, action):
    """Calls action() when an optimiser has made its step of this number, counted from 1."""
    steps = iter(range(1, 10**9))
    hook = register_optimizer_step_post_hook(
        lambda *_: action() if next(steps) == number else None
    )
    try:
        yield
    finally:
        hook.remove()


# ---------------------------------------------------------------------------------------------------------------------
# Processes


def serve():
    """Forks a process for each line [folder, environment, argv], as `python argv`, and answers its pid; for a line that
    is a pid it waits, and answers the exit code."""
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
            faulthandler.register(
                signal.SIGALRM, chain=True
            )  # none hangs for ever: it says where, and dies
            signal.alarm(120)
            os.environ.update(environment)
            runpy.run_path(sys.argv[0], run_name="__main__")
            return


def command(settings):
    return [
        word
        for k, v in settings.items()
        if v is not None
        for word in (f"--{k}", str(v))
    ]


class Process:
    def __init__(self, ask, out, settings, environment=None, script=(SCRIPT,)):
        self.ask, self.out, self.logs = ask, Path(out), Path(f"{out}.logs")
        self.logs.mkdir(exist_ok=True)
        self.pid = ask(
            [
                str(self.logs),
                environment or {},
                [*script, *command({"out": str(out)} | settings)],
            ]
        )

    def steps(self):
        log = self.out / "log.jsonl"
        return log.read_text().count('"loss"') if log.exists() else 0

    def until(self, condition):
        """Waits for condition(); False if the process has ended before."""
        while not condition():
            if (
                Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
                == "Z"
            ):
                return False
            time.sleep(0.001)
        return True

    def wait(self):
        """Exit code, stdout, stderr."""
        code = self.ask(self.pid)
        return code, *((self.logs / name).read_text() for name in ("stdout", "stderr"))


def members(session):
    """The living processes of a session."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, sid = stat.read_text().rsplit(")", 1)[1].split()[:4]
            alive += (
                [int(stat.parent.name)]
                if int(sid) == session and state not in "ZX"
                else []
            )
    return alive


@pytest.fixture(scope="module")
def ask():
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(
        [sys.executable, __file__], text=True, env=environment, **pipes
    ) as server:

        def ask(request):
            server.stdin.write(json.dumps(request) + "\n")
            server.stdin.flush()
            return int(server.stdout.readline())

        server.stdout.readline()
        yield ask
        server.stdin.close()


def ranks(ask, out, settings, script=(SCRIPT,)):
    """The two processes of a launch, with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        common = {"WORLD_SIZE": "2", "MASTER_PORT": str(free.getsockname()[1])}
    names = ((out, "0"), (f"{out}.rank1", "1"))  # each its own stdout
    settings = settings | {"out": str(out)}
    return [
        Process(ask, name, settings, common | {"RANK": r, "LOCAL_RANK": r}, script)
        for name, r in names
    ]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="module")
def long(data):
    """Settings of a run of 96 steps that writes 5 MB every 6."""
    return TINY | data | {"width": 192, "epochs": 16}


@pytest.fixture(scope="module")
def finished(ask, long, tmp_path_factory):
    """`long`, uninterrupted."""
    run = Process(ask, tmp_path_factory.mktemp("long") / "out", long)
    assert run.wait()[0] == 0
    return run.out


# ---------------------------------------------------------------------------------------------------------------------
# Signals and kill -9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_the_same_command_continues(
    number, ask, long, finished, tmp_path
):
    settings = long | {"workers": 2}
    run = Process(ask, tmp_path / "out", settings)
    assert run.until(lambda: run.steps() >= 8)
    if number == signal.SIGINT:
        os.killpg(run.pid, number)  # Ctrl-C reaches the workers as well
    else:
        os.kill(run.pid, number)
    code, words, errors = run.wait()
    step = last(run.out)["step"]
    assert code == 128 + number and "Traceback" not in errors
    assert f"stopped by a signal after step {step}; the same command continues" in words
    assert 8 <= step < 96 and [r["step"] for r in records(run.out)] == list(
        range(1, step + 1)
    )
    assert not members(run.pid) and not (run.out / "encoder.pt").exists()
    run = Process(ask, tmp_path / "out", settings)
    code, words, _ = run.wait()
    assert code == 0 and f"after step {step}" in words
    ours, reference = last(run.out)["config"], last(finished)["config"]
    assert ours.pop("workers") == 2 and reference.pop("workers") == 0
    parts = {k: v for k, v in last(run.out).items() if k != "config"}
    assert same(parts, {k: v for k, v in last(finished).items() if k != "config"})
    assert losses(run.out) == losses(finished) and records(run.out, "knn") == records(
        finished, "knn"
    )


def test_kill_9_at_any_moment(ask, long, finished, tmp_path):
    """In the steps, and while a checkpoint is being written: its temporary file is left behind."""
    out, temporary, sessions, torn, chance = (
        tmp_path / "out",
        tmp_path / "out" / "last.pt.tmp",
        [],
        0,
        random.Random(0),
    )
    for kill in range(6):
        temporary.unlink(missing_ok=True)
        run = Process(ask, out, long | {"workers": 2 * (kill == 0)})
        sessions.append(run.pid)
        before, pause = run.steps(), chance.uniform(0, 0.1)
        if kill % 2:
            run.until(temporary.exists)
        elif run.until(lambda: run.steps() > before):  # noqa: B023
            time.sleep(pause)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        torn += temporary.exists()
        assert not (out / "last.pt").exists() or last(out)["step"] % 6 == 0
    assert torn, "no kill has hit the writing of a checkpoint"
    assert not (out / "encoder.pt").exists(), "there was nothing left to continue"
    code, words, _ = Process(ask, out, long).wait()
    assert code == 0 and "continuing" in words
    assert_same_run(out, finished)
    assert records(out, "knn") == records(finished, "knn") and not temporary.exists()
    for _ in range(300):  # workers look for their parent every 5 s
        time.sleep(0.1 * any(map(members, sessions)))
    assert not any(map(members, sessions))


@pytest.mark.parametrize("cut", ["", '{"step": 8, "epo'])
def test_kill_while_the_log_is_written(cut, data, tmp_path):
    """Its last line may be cut."""
    train(tmp_path / "reference", **data)
    with after_step(7, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        train(tmp_path / "out", **data)
    with open(tmp_path / "out" / "log.jsonl", "a") as log:
        log.write(cut)
    train(tmp_path / "out", **data)
    assert_same_run(tmp_path / "out", tmp_path / "reference")


# ---------------------------------------------------------------------------------------------------------------------
# Maps of a data set

DISCOVERY = (str(Path(SCRIPT).with_name("object_discovery.py")),)


@pytest.fixture(scope="module")
def maps_job(tmp_path_factory):
    """Settings of a job of 40 blocks, and what an uninterrupted one of one process writes."""
    folder = tmp_path_factory.mktemp("pictures")
    make_pictures(folder / "data", 120)
    settings = {
        "data": str(folder / "data"),
        "backbone": "pixels",
        "img_size": 224,
        "batch_size": 3,
        "device": "cpu",
    }
    import object_discovery

    object_discovery.main(command(settings | {"out": folder / "maps.npy"}))
    return settings, [
        (folder / name).read_bytes() for name in ("maps.npy", "maps.json")
    ]


def files_of(out):
    return [out.with_suffix(suffix).read_bytes() for suffix in (".npy", ".json")]


def test_maps_job_killed_at_any_moment(ask, maps_job, tmp_path):
    settings, want = maps_job
    out, chance, seen = tmp_path / "maps.npy", random.Random(1), []

    def blocks():
        return sum(file.read_text().count(";") for file in tmp_path.glob("maps.done.*"))

    for _ in range(3):
        run, before = Process(ask, out, settings, script=DISCOVERY), blocks()
        assert run.until(lambda: blocks() > before + 3)  # noqa: B023
        time.sleep(chance.uniform(0, 0.02))
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        seen.append(blocks())
    assert not out.exists() and seen == sorted(set(seen)) and seen[-1] < 40
    code, words, _ = Process(ask, out, settings, script=DISCOVERY).wait()
    assert code == 0 and f"going on: {seen[-1]} of 40 blocks are there" in words
    assert (
        files_of(out) == want
        and not list(tmp_path.glob("maps.done*"))
        and not list(tmp_path.glob("*part*"))
    )


def test_maps_job_on_a_full_disk(ask, maps_job, tmp_path):
    settings, want = maps_job
    run = Process(ask, tmp_path / "maps.npy", settings, script=DISCOVERY)
    assert run.until(
        lambda: (
            (tmp_path / "maps.done.0").exists()
            and ";" in (tmp_path / "maps.done.0").read_text()
        )
    )
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (8000, 8000))
    code, _, errors = run.wait()
    assert (
        code == 1 and "Traceback" not in errors and not (tmp_path / "maps.npy").exists()
    )
    assert re.search(
        r"^object_discovery.py: error: --out \S+maps.npy: cannot be written .* run it again",
        errors,
        re.M,
    )
    code, words, _ = Process(
        ask, tmp_path / "maps.npy", settings, script=DISCOVERY
    ).wait()
    assert code == 0 and "going on" in words and files_of(tmp_path / "maps.npy") == want


@pytest.mark.parametrize("killed", [False, True])
def test_maps_by_two_processes(killed, ask, maps_job, tmp_path):
    settings, want = maps_job
    out = tmp_path / "maps.npy"
    pair = ranks(ask, out, settings, DISCOVERY)
    if killed:  # both die, and one process finishes what two have begun
        logs = [tmp_path / f"maps.done.{r}" for r in (0, 1)]
        assert pair[0].until(
            lambda: all(log.exists() and ";" in log.read_text() for log in logs)
        )
        for run in pair:
            os.kill(run.pid, signal.SIGKILL)
        assert {run.wait()[0] for run in pair} == {-9} and not out.exists()
        code, words, _ = Process(ask, out, settings, script=DISCOVERY).wait()
        assert code == 0 and "going on" in words
    else:
        assert [run.wait()[0] for run in pair] == [0, 0]
    assert files_of(out) == want
    assert not list(tmp_path.glob("maps.done*")) and not list(tmp_path.glob("*part*"))


# ---------------------------------------------------------------------------------------------------------------------
# Full disk, damaged and foreign checkpoints


@pytest.mark.parametrize("first", [True, False])
def test_disk_full(first, ask, long, finished, tmp_path):
    """A limit on the size of files makes torch.save fail as a full disk does; the log is smaller."""
    run = Process(ask, tmp_path / "out", long)
    assert run.until(
        lambda: (run.steps() > 0) if first else (run.out / "last.pt").exists()
    )
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (10**6, 10**6))
    code, _, errors = run.wait()
    assert code == 1 and "Traceback" not in errors
    assert re.search(
        rf"^attg_mae.py: error: .*{re.escape(str(run.out))}/last\.pt .*disk",
        errors,
        re.M,
    )
    assert not list(run.out.glob("*.tmp"))
    if first:
        assert not list(run.out.glob("*.pt"))
    else:
        assert last(run.out)["step"] % 6 == 0
    assert Process(ask, run.out, long).wait()[0] == 0
    assert_same_run(run.out, finished)


class Evil:
    def __reduce__(self):
        return (open, (os.environ["EVIL"], "w"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A finished run of 6 steps; to be copied."""
    out = tmp_path_factory.mktemp("trained") / "out"
    train(out, **data, epochs=1)
    return out


@pytest.fixture
def copy(trained, data, tmp_path):
    """Its copy, and settings that continue it."""
    return shutil.copytree(trained, tmp_path / "out"), data | {
        "out": str(tmp_path / "out"),
        "epochs": 2,
    }


BAD = [
    "empty",
    "truncated",
    "flipped",
    "text",
    "tensor",
    "foreign",
    "encoder",
    "evil",
    "folder",
]


@pytest.mark.parametrize("kind", BAD)
def test_bad_checkpoint_is_named_and_kept(kind, copy, tmp_path, monkeypatch):
    (out, settings), trap = copy, tmp_path / "trap"
    monkeypatch.setenv("EVIL", str(trap))
    path, content = out / "last.pt", (out / "last.pt").read_bytes()
    if kind in ("empty", "truncated", "text"):
        path.write_bytes(
            {
                "empty": b"",
                "truncated": content[: len(content) // 2],
                "text": b"not a checkpoint",
            }[kind]
        )
    elif kind == "flipped":
        path.write_bytes(content.replace(b"optimizer", b"optimizex"))
    elif kind == "encoder":
        shutil.copy(out / "encoder.pt", path)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        things = {
            "tensor": torch.zeros(3),
            "foreign": {"state_dict": {}},
            "evil": {"model": Evil(), "step": 3},
        }
        torch.save(things[kind], path)
        trap.unlink(missing_ok=True)
    files = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    for resume in ("auto", str(path)):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            train(**settings, resume=resume)
    assert {
        p.name: p.read_bytes() for p in out.iterdir() if p.is_file()
    } == files and not trap.exists()
    if kind in ("truncated", "foreign"):
        assert train(**settings, resume="none")["step"] == 12  # starts anew
        assert [r["step"] for r in records(out)] == [*range(1, 13)]
        fresh = tmp_path / "fresh"
        train(**settings | {"out": fresh})
        assert_same_run(out, fresh)


def test_evil_pickles_run_where_nothing_stops_them(tmp_path, monkeypatch):
    """Or the test above would show nothing."""
    monkeypatch.setenv("EVIL", str(tmp_path / "trap"))
    torch.save({"model": Evil()}, tmp_path / "last.pt")
    torch.load(tmp_path / "last.pt", weights_only=False)
    assert (tmp_path / "trap").exists()


OTHERS = [
    {"width": 16},
    {"depth": 2},
    {"heads": 4},
    {"decoder_depth": 2},
    {"img_size": 32},
    {"patch_size": 8},
]
OTHERS += [{"batch_size": 5}, {"seed": 1}, {"model": "vit_tiny"}]


@pytest.mark.parametrize("change", OTHERS, ids=lambda change: next(iter(change)))
def test_checkpoint_of_another_run(change, copy):
    out, settings = copy
    files = {p.name: p.read_bytes() for p in out.iterdir()}
    if "model" in change:
        change |= {
            k: None
            for k in (
                "width",
                "depth",
                "heads",
                "decoder_depth",
                "decoder_width",
                "decoder_heads",
            )
        }
    with pytest.raises(ValueError) as error:
        train(**settings | change)
    key = "width" if "model" in change else next(iter(change))
    assert all(
        word in str(error.value)
        for word in (str(out / "last.pt"), f"--{key}", "--resume none")
    )
    assert "--epochs" not in str(error.value)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == files


def test_checkpoint_of_other_data(copy, tmp_path):
    with pytest.raises(ValueError, match="last.pt.*--data.*--resume none"):
        train(**copy[1] | make_data(tmp_path))


CHANGES = [
    ("lr", 5e-4),
    ("epochs", 3),
    ("weight_decay", 0.3),
    ("precision", "fp16"),
    ("precision", "bf16"),
]
CHANGES += [
    ("tau_end", 2.0),
    ("accum", 2),
    ("clip_grad", 0.1),
    ("guidance", "inverted"),
]


@pytest.mark.parametrize("key, value", CHANGES)
def test_changed_settings_are_named_and_used(key, value, copy, capsys):
    """What is changed shows in the steps after the checkpoint; what is not, keeps the run as it was."""
    out, settings = copy
    before = last(out)["config"][key]
    capsys.readouterr()
    train(**settings | {key: value})
    words = next(
        line for line in capsys.readouterr().out.splitlines() if "continuing" in line
    )
    assert (
        f"--{key} {1 if key == 'epochs' else before} -> {value}" in words
        and "--width" not in words
    )
    after = last(out)
    assert (
        after["config"][key]
        == value
        == json.loads((out / "config.json").read_text())[key]
    )
    rows = records(out)
    assert [r["step"] for r in rows] == [*range(1, after["step"] + 1)]
    total, epochs = after["step"], after["step"] // 6
    assert epochs == (value if key == "epochs" else 2)
    lr = [
        A.lr_at(step, total, 6.0, value if key == "lr" else 1e-3)
        for step in range(6, total)
    ]
    assert [r["lr"] for r in rows[6:]] == lr
    tau = [
        A.tau_at(step, total, A.Config(**{key: value} if key == "tau_end" else {}))
        for step in range(6, total)
    ]
    assert [r["tau"] for r in rows[6:]] == pytest.approx(tau, rel=1e-6)
    decays = [group["weight_decay"] for group in after["optimizer"]["param_groups"]]
    assert decays == [value if key == "weight_decay" else 0.05, 0.0]
    assert bool(after["scaler"]) == (value == "fp16")


def test_fewer_epochs_than_the_checkpoint_has(copy):
    out, settings = copy
    train(**settings)
    assert train(**settings | {"epochs": 1})["stopped"] is None
    assert last(out)["step"] == 12


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite


@pytest.mark.parametrize("log_every", [1, 20])
@pytest.mark.parametrize(
    "change, step, part",
    [
        ({"lr": 1e30}, 8, "prediction or input"),
        ({"gradient": math.inf}, 8, "gradient"),
        ({"tau": 1e-3, "tau_end": 1e-3}, 7, "weight"),
        ({"std": (0.0, 0.0, 0.0)}, 7, "prediction or input"),
    ],
    ids=["huge lr", "gradient", "small tau", "no deviation"],
)
def test_not_finite(change, step, part, log_every, copy, monkeypatch):
    """Stops; the checkpoint of the first epoch stays. The step is named, wherever the log line is."""
    (out, settings), content = copy, (copy[0] / "last.pt").read_bytes()

    def build(cfg):
        model, bad = A.MAE(cfg), iter([1.0, change["gradient"], 1.0, 1.0, 1.0, 1.0])
        model.decoder_pred.bias.register_hook(lambda grad: grad * next(bad))
        return model

    with monkeypatch.context() as patch, pytest.raises(ValueError) as error:
        if "gradient" in change:
            patch.setattr(A, "build_model", build)
        train(
            **settings | {k: v for k, v in change.items() if k != "gradient"},
            log_every=log_every,
        )
    at = records(out, "not_finite")
    ids = TrainBatches(25, 4, 0, 12, seed=0).indices(at[0]["step"] - 1).tolist()
    assert at == [{"step": step, "not_finite": part, "indices": ids}]
    assert str(error.value).startswith(f"step {step}: {part}") and str(ids) in str(
        error.value
    )
    assert (out / "last.pt").read_bytes() == content and last(out)["step"] == 6
    assert [r["step"] for r in records(out)] == (
        [*range(1, step)] if log_every == 1 else [*range(1, 7)]
    )
    train(**settings)
    assert not records(out, "not_finite") and [r["step"] for r in records(out)] == [
        *range(1, 13)
    ]


def test_fp16_counts_skipped_steps(data, tmp_path, capsys):
    """Gradients of large targets overflow until the scaler has found its scale."""
    train(
        tmp_path,
        **data,
        precision="fp16",
        norm_pix=False,
        std=(1e-3,) * 3,
        mean=(0.5,) * 3,
    )
    rows, scaler = records(tmp_path), last(tmp_path)["scaler"]
    skipped = sum(r["skipped"] for r in rows)
    assert 0 < skipped < 20 and scaler["scale"] == 65536 / 2**skipped
    assert all(v.isfinite().all() for v in last(tmp_path)["model"].values())
    words = capsys.readouterr().out.splitlines()
    assert (
        sum("skipped 1" in line for line in words if line.startswith("step")) == skipped
    )
    made = {int(s["step"]) for s in last(tmp_path)["optimizer"]["state"].values()}
    assert made == {24 - skipped}


# ---------------------------------------------------------------------------------------------------------------------
# Pictures, data folders, map files


@pytest.mark.parametrize(
    "bad, kind, workers", [(1, "truncated", 0), (2, "text", 2), (3, "text", 0)]
)
def test_unreadable_pictures(bad, kind, workers, ask, tmp_path):
    """1 % of 200 goes on; more stops the run."""
    folder = tmp_path / "pictures"
    make_pictures(folder, 200, size=(12, 12))
    names = [f"{i:03d}.png" for i in (7, 70, 170)[:bad]]
    for name in names:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(
            content[: len(content) // 2] if kind == "truncated" else b"text"
        )
    settings = {
        "guidance": "none",
        "epochs": 1,
        "batch_size": 50,
        "workers": workers,
        "data": str(folder),
    }
    run = Process(ask, tmp_path / "out", TINY | settings)
    code, words, errors = run.wait()
    assert (
        set(re.findall(r"\d+\.png", errors)) == set(names) and "Traceback" not in errors
    )
    if bad > 2:
        assert code == 1 and not (run.out / "last.pt").exists()
        assert re.search("^attg_mae.py: error: --data.* 1 %.* 3 ", errors, re.M)
    else:
        assert code == 0 and records(run.out)[-1]["unreadable"] == bad
        assert (
            f"unreadable {bad}"
            in [line for line in words.splitlines() if line.startswith("step")][-1]
        )


def test_all_kinds_of_pictures_train(tmp_path, capsys):
    grey = np.random.default_rng(0).random((20, 20))
    pictures = {"grey.png": np.uint8(255 * grey), "wide.png": np.uint16(65535 * grey)}
    pictures = {name: Image.fromarray(pixels) for name, pixels in pictures.items()}
    for name, mode in (
        ("rgba.png", "RGBA"),
        ("cmyk.jpg", "CMYK"),
        ("palette.png", "P"),
        ("bits.png", "1"),
    ):
        pictures[name] = pictures["grey.png"].convert(mode)
    (tmp_path / "pictures").mkdir()
    for name, picture in pictures.items():
        picture.save(tmp_path / "pictures" / name)
    modes = {name: Image.open(tmp_path / "pictures" / name).mode for name in pictures}
    assert (
        modes["wide.png"].startswith("I")
        and modes["cmyk.jpg"] == "CMYK"
        and modes["grey.png"] == "L"
    )
    result = train(
        tmp_path / "out",
        data=str(tmp_path / "pictures"),
        guidance="none",
        batch_size=6,
        epochs=2,
    )
    assert result["step"] == 2 and [
        r["unreadable"] for r in records(tmp_path / "out")
    ] == [0, 0]


def damage(kind, data, folder):
    """Settings with a data set or a map file that is not in order, and the words that the error must hold."""
    empty, maps = folder / "empty", folder / "maps.npy"
    empty.mkdir()
    if kind == "missing folder":
        return {"data": str(folder / "absent")}, ["--data", "absent", "train/CLASS"]
    if kind == "empty folder":
        return {"data": str(empty)}, ["--data", "empty", "train/CLASS"]
    if kind == "empty train folder":
        (empty / "train").mkdir()
        return {"data": str(empty)}, ["--data", "empty", "train/CLASS"]
    if kind == "no maps":
        return {"maps": None}, [
            "--data",
            data["data"],
            "object_discovery.py",
            "--guidance none",
        ]
    if kind == "missing maps":
        return {"maps": str(maps)}, ["--maps", str(maps), "object_discovery.py"]
    for path in (Path(data["maps"]), Path(data["maps"]).with_suffix(".json")):
        shutil.copy(path, maps.with_suffix(path.suffix))
    if kind == "maps of other data":
        make_pictures(empty, 25)
        make_maps(maps, empty)
        return {"maps": str(maps)}, ["--maps", str(maps), "other data", "--data"]
    values = np.load(maps)
    np.save(
        maps,
        values[:-1]
        if kind == "short maps"
        else np.where(np.arange(25)[:, None, None] == 3, np.nan, values),
    )
    return {"maps": str(maps)}, [
        "--maps",
        str(maps),
        *(["24"] if kind == "short maps" else ["NaN", "number 3"]),
    ]


DAMAGES = [
    "missing folder",
    "empty folder",
    "empty train folder",
    "no maps",
    "missing maps",
    "maps of other data",
]


@pytest.mark.parametrize("kind", [*DAMAGES, "short maps", "maps with NaN"])
def test_errors_on_the_command_line(kind, data, tmp_path, monkeypatch, capsys):
    """One line that Python prints before it ends with exit code 1; no run folder."""
    change, words = damage(kind, data, tmp_path)
    monkeypatch.setattr(
        sys,
        "argv",
        [SCRIPT, *command(TINY | data | change | {"out": str(tmp_path / "out")})],
    )
    with pytest.raises(SystemExit) as error:
        runpy.run_path(SCRIPT, run_name="__main__")
    message = error.value.code
    assert message.startswith("attg_mae.py: error: ") and len(message.splitlines()) == 1
    assert not [word for word in words if word not in message]
    assert not (tmp_path / "out").exists() and capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------------------------------
# Several processes


def assert_close_run(out, reference, lr=1e-3):
    """Losses to 1e-5, weights to 1 % of lr * steps; the losses of consecutive steps are further apart."""
    a, b = ([[r["loss"], r["mse"]] for r in records(x)] for x in (out, reference))
    a, b = np.array(a), np.array(b)
    assert a.shape == b.shape and len(a) >= 20
    np.testing.assert_allclose(a, b, rtol=1e-5)
    assert not np.isclose(a[1:], b[:-1], rtol=1e-5).any()
    a, b = last(out), last(reference)
    assert a["step"] == b["step"] == len(records(out))
    for key, value in a["model"].items():
        if key.endswith(
            "qkv.bias"
        ):  # the gradient of the key's is zero, and what AdamW makes of its noise is anything
            value, b["model"][key] = (
                x.clone().view(3, -1)[::2] for x in (value, b["model"][key])
            )
        torch.testing.assert_close(
            value, b["model"][key], rtol=0, atol=1e-2 * lr * a["step"]
        )


@pytest.fixture(scope="module")
def distributed(ask, data, tmp_path_factory):
    """On 2 processes, uninterrupted."""
    runs = ranks(
        ask, tmp_path_factory.mktemp("ranks") / "out", TINY | data | {"knn_every": 2}
    )
    assert [run.wait()[0] for run in runs] == [0, 0]
    return runs[0].out


def test_two_processes_equal_one(ask, data, distributed, tmp_path):
    one = Process(ask, tmp_path / "one", TINY | data | {"knn_every": 2})
    assert one.wait()[0] == 0
    assert_close_run(distributed, one.out)
    ours, reference = records(distributed, "knn"), records(one.out, "knn")
    assert [r["step"] for r in ours] == [r["step"] for r in reference] == [12, 24]
    for a, b in zip(ours, reference, strict=True):
        for name, value in b["knn"].items():
            assert (
                abs(a["knn"][name] - value) <= 100 / 15 + 1e-3
            )  # one picture may turn over
            assert (
                value > 50
            )  # but features in another order would do no better than chance


EVALUATIONS = {
    "eval_knn": {"k": 5},
    "eval_linear": {"epochs": 20},
    "eval_linear mae": {"protocol": "mae", "epochs": 40, "batch_size": 8, "blr": 200},
    "eval_linear finetune": {"fraction": 1, "epochs": 16, "batch_size": 8, "blr": 0.05},
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_by_two_processes(name, ask, data, distributed, tmp_path):
    """Each scores its share of the 15 test images, none twice; one of them writes."""
    script = [
        str(Path(SCRIPT).with_name(f"{name.split()[0]}.py")),
        str(distributed / "encoder.pt"),
    ]
    script += ["--finetune"] * ("finetune" in name)
    settings = {"data": data["data"], "device": "cpu"} | EVALUATIONS[name]
    trained = " " in name
    save = [
        {"save": tmp_path / k} if trained else {"save_features": tmp_path / k}
        for k in ("one.pt", "two.pt")
    ]
    pair = ranks(ask, tmp_path / "two", settings | save[1], script)
    runs = [Process(ask, tmp_path / "one", settings | save[0], script=script), *pair]
    (code, one, _), (code0, two, errors), (code1, silent, _) = (
        run.wait() for run in runs
    )
    assert (code, code0, code1) == (0, 0, 0), errors
    one, two = (json.loads(words.splitlines()[-1])["results"] for words in (one, two))
    written = [json.loads(line) for line in (tmp_path / "two").read_text().splitlines()]
    assert len(written) == 1 and written[0]["results"] == two and not silent
    a, b = (torch.load(tmp_path / k, weights_only=True) for k in ("one.pt", "two.pt"))
    if trained:
        assert a["step"] == b["step"] and [r["test"] for r in one] == [
            r["test"] for r in two
        ]
        right = [r["top-1"] * 15 / 100 for r in one + two]  # images
        assert all(n > 7.5 and abs(n - round(n)) < 1e-6 for n in right), right
        pair = ranks(
            ask, tmp_path / "two", settings | save[1], script
        )  # finished: scored again
        assert [run.wait()[0] for run in pair] == [0, 0]
        first, again = (
            json.loads(line)["results"]
            for line in (tmp_path / "two").read_text().splitlines()
        )
        assert first == again
    else:
        assert one == two and (one[0]["top-1"] > 50 or one[1]["top-1"] > 50)
        for split in ("train", "test"):
            assert all(
                torch.allclose(a[split][k], b[split][k], atol=1e-5)
                for k in ("class_token", "patch_mean")
            )
            assert a[split]["labels"].equal(b[split]["labels"]) and len(
                a[split]["labels"]
            ) in (25, 15)


@pytest.mark.parametrize("guidance", ["none", "attg"])
def test_accumulation_on_two_processes_equals_one(guidance, ask, data, tmp_path):
    settings = TINY | data | {"guidance": guidance, "epochs": 4}
    runs = [
        *ranks(ask, tmp_path / "two", settings | {"accum": 2}),
        Process(ask, tmp_path / "one", settings),
    ]
    assert [run.wait()[0] for run in runs] == [0, 0, 0]
    assert_close_run(tmp_path / "two", tmp_path / "one")


def test_signal_to_one_of_two_processes(ask, data, long, tmp_path):
    """They agree, and the same processes continue."""
    runs = ranks(ask, tmp_path / "out", long)
    assert runs[0].until(lambda: runs[0].steps() >= 5)
    os.kill(runs[1].pid, signal.SIGTERM)
    assert [run.wait()[0] for run in runs] == [128 + signal.SIGTERM] * 2
    step = last(tmp_path / "out")["step"]
    assert 5 <= step < 96 and step == records(tmp_path / "out")[-1]["step"]


def test_torchrun_stops_and_continues(ask, data, distributed, tmp_path):
    """A launch by torchrun, stopped by SIGTERM and continued, equals the processes above bit for bit."""
    out, settings = tmp_path / "out", TINY | data | {"knn_every": 2}
    slow = (
        tmp_path / "slow.py"
    )  # the script with slower steps, to be stopped in the middle
    slow.write_text(
        f"import runpy, sys, time; sys.path.insert(0, {str(Path(SCRIPT).parent)!r})\n"
        "from torch.optim.optimizer import register_optimizer_step_post_hook\n"
        "register_optimizer_step_post_hook(lambda *_: time.sleep(0.2))\n"
        f"runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
    )
    argv = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        slow,
    ]
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "cwd": tmp_path,
    }
    options["env"] = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*argv, *command(settings | {"out": str(out)})], **options
    ) as launch:
        while launch.poll() is None and not (
            (out / "log.jsonl").exists() and len(records(out)) >= 3
        ):
            time.sleep(0.01)
        launch.send_signal(signal.SIGTERM)
        words, errors = launch.communicate()
    step = last(out)["step"]
    assert (
        launch.returncode
        and 3 <= step < 24
        and [r["step"] for r in records(out)] == [*range(1, step + 1)]
    ), errors
    assert words.count(f"stopped by a signal after step {step}") == 1
    runs = ranks(ask, out, settings)
    assert [run.wait()[0] for run in runs] == [0, 0]
    assert_same_run(out, distributed)


# ---------------------------------------------------------------------------------------------------------------------
# The command itself


def test_command_from_elsewhere_without_git_or_terminal(data, tmp_path):
    (tmp_path / "bin").mkdir()
    environment = os.environ | {"PATH": str(tmp_path / "bin")}  # no git in it
    argv, options = (
        command(TINY | data | {"epochs": 1}),
        {"cwd": tmp_path, "capture_output": True, "text": True},
    )
    done = subprocess.run([sys.executable, SCRIPT, *argv], env=environment, **options)
    assert done.returncode == 0, done.stderr
    assert "attg_mae unknown, python" in done.stdout and "img/s" in done.stdout
    assert (
        "\r" not in done.stdout and done.stderr == "attg_loss: PyTorch (cpu tensors)\n"
    )  # no progress bars
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["data-vit_micro-attg"]
    files = {"config.json", "log.jsonl", "last.pt", "encoder.pt", "reconstructions.png"}
    assert {
        p.name for p in (tmp_path / "out" / "data-vit_micro-attg").iterdir()
    } == files


def test_importing_has_no_effect(tmp_path):
    code = f"""
import signal, sys, torch
sys.path.insert(0, {str(Path(SCRIPT).parent)!r})
before = signal.getsignal(signal.SIGINT), torch.get_rng_state(), torch.get_num_threads()
def query(*_): raise AssertionError("CUDA query")
for name in ("is_available", "device_count", "current_device", "init", "_lazy_init"): setattr(torch.cuda, name, query)
import attg_mae, bench, common.data, eval_knn, kernels, object_discovery
after = signal.getsignal(signal.SIGINT), torch.get_rng_state(), torch.get_num_threads()
assert before[0] == after[0] and before[1].equal(after[1]) and before[2] == after[2]
assert not torch.distributed.is_initialized()
"""
    options = {"cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-B", "-c", code, "--not_a_flag"], **options)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    serve()
