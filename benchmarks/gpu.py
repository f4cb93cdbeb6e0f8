"""
`bench.py gpu`: watches the process that measures (gpu_items.py), and keeps its records.

A fault on a GPU often spoils the process for all that follows, and some hang. So the
items are measured in a process of their own. If it dies, or an item takes far longer
than it should, the item is recorded as failed and another process goes on with the
next. When the time is up the process is ended; the item that was running counts as not
begun.

Files, all in --out: gpu.jsonl holds a record for each item, gpu.log what was printed,
gpu.md tables of all records.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PROGRAM = Path(__file__).parent.parent / "bench.py"
RECORDS, LOG, REPORT = "gpu.jsonl", "gpu.log", "gpu.md"


# -- Records ---------------------------------------------------------------------------


def add_record(out, **values):
    """Adds a line to the records, with the time."""
    line = json.dumps({"at": time.time()} | values)
    with open(out / RECORDS, "a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_records(out):
    """All records, the oldest first."""
    records = []
    path = out / RECORDS
    if not path.exists():
        return records
    for line in path.read_text().splitlines():
        # A process that was killed may have left half a line.
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def results(records, since=0.0):
    """{item: its last record} of the items that ended, well or not, after `since`."""
    ended = {}
    for record in records:
        if "item" in record and record["at"] >= since:
            ended[record["item"]] = record
    return ended


def count_ended(out):
    """How many records there are of items that ended, well or not."""
    return sum("item" in record for record in read_records(out))


def running(records):
    """The record of the item that began last, or None if it has ended."""
    last = None
    for record in records:
        if "begins" in record:
            last = record
        elif last and record.get("item") == last["begins"]:
            last = None
    return last


# -- The process that measures ---------------------------------------------------------


def end(process):
    """Ends the process and those that it started; torchrun's need a moment for theirs."""
    for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def watch(command, out, until, log, environment):
    """Runs the command; returns its exit code, or why it was ended: "time" or "limit"."""
    process = subprocess.Popen(
        command,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    try:
        # A character may be half written.
        with open(log.name, errors="replace") as printed:
            printed.seek(0, os.SEEK_END)
            while process.poll() is None:
                time.sleep(0.1)
                print(printed.read(), end="", flush=True)
                item = running(read_records(out))
                if time.time() > until:
                    return "time"
                if item and time.time() > item["at"] + item["limit"]:
                    return "limit"
            print(printed.read(), end="", flush=True)
        return process.returncode
    finally:
        end(process)


def leave(number, _):
    """So that a signal ends the other process as well."""
    sys.exit(128 + number)


def supervise(args, argv, program=PROGRAM):
    """Measures until all is done or --minutes are over; see the top of this file."""
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    now = time.time()
    until = now + 60 * args.minutes
    since = now if args.items else 0.0
    environment = dict(os.environ)
    if args.device == "cpu":
        # A trial: the kernels run in Triton's interpreter.
        environment["TRITON_INTERPRET"] = "1"
    before = signal.signal(signal.SIGTERM, leave)
    try:
        with tempfile.TemporaryDirectory() as scratch, open(out / LOG, "a") as log:
            command = [sys.executable, "-u", str(program), *argv]
            command += ["--until", str(until), "--since", str(since)]
            command += ["--scratch", scratch]
            while time.time() < until:
                number = count_ended(out)
                ended = watch(command, out, until, log, environment)
                if ended in (0, "time"):
                    break
                record_failure(out, ended)
                # An item that fails ends; if none did, the next try would not help.
                if count_ended(out) == number:
                    raise SystemExit(
                        f"bench.py gpu: exit code {ended}, see {out / LOG}"
                    )
    finally:
        signal.signal(signal.SIGTERM, before)
    print(f"records: {out / RECORDS}, report: {out / REPORT}, log: {out / LOG}")


def record_failure(out, ended):
    """Of the item that was running, if any, when the process ended."""
    item = running(read_records(out))
    if item is None:
        return
    words = f"ended the process, exit code {ended}"
    if ended == "limit":
        words = f"took longer than {item['limit']:.0f} s"
    add_record(out, item=item["begins"], failed=words)
    print(f"{item['begins']}: {words}", flush=True)
