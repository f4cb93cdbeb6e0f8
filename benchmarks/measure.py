"""
Time, memory and tables, for all benchmarks.
"""

import ctypes
import json
import platform
import re
import statistics
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

# -- Timing ----------------------------------------------------------------------------


def nothing():
    """The preparation of a call that needs none."""
    return None


def percentiles(times):
    """Seconds -> median, 20th and 80th percentile in ms."""
    times = torch.tensor(times, dtype=torch.float64) * 1e3
    return [times.quantile(q).item() for q in (0.5, 0.2, 0.8)]


def quiet_clock():
    """Of calls in this process alone: its CPU time, where it has one thread.

    On a machine that others use as well that is steadier than the time on the wall.
    """
    if torch.get_num_threads() == 1:
        return time.process_time
    return time.perf_counter


def clock_words(device):
    """For a table's title."""
    on_gpu = device.type == "cuda"
    if not on_gpu and quiet_clock() is time.process_time:
        return "CPU time of one thread"
    return "the GPU's time" if on_gpu else "wall time"


def take_turns(calls, device, repeats, clock=time.perf_counter):
    """Times several calls, one of each a round, so that all meet the same conditions.

    calls is {name: (prepare, call)}; call gets what prepare() returned. Returns {name:
    seconds of each call}. The first round and prepare() are not counted.
    """
    if device.type == "cuda":
        times = take_turns_on_gpu(calls, device, repeats)
    else:
        times = {name: [] for name in calls}
        # The first round warms caches up and compiles.
        for _ in range(repeats + 1):
            for name, (prepare, call) in calls.items():
                x = prepare()
                start = clock()
                call(x)
                times[name].append(clock() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def take_turns_on_gpu(calls, device, repeats):
    """`take_turns` by the GPU's own clock, the first round included."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    cache = torch.empty(2**27, device=device)
    events = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, (prepare, call) in calls.items():
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            x = prepare()
            # A matrix product keeps the device busy while the host queues the call, so
            # that the time is the device's alone. A write of 512 MB empties its cache.
            a @ a
            cache.zero_()
            start.record()
            call(x)
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()

    times = {}
    for name, pairs in events.items():
        times[name] = [start.elapsed_time(end) / 1e3 for start, end in pairs]
    return times


def time_alone(call, device, repeats):
    """`take_turns` for one (prepare, call): the seconds of each call."""
    return take_turns({"alone": call}, device, repeats)["alone"]


def copy_bandwidth(device, repeats=20):
    """Bytes read and written in a second by a copy that is larger than any cache."""
    # 1 GiB on a GPU, 256 MiB on a CPU.
    x = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    y = torch.empty_like(x)
    seconds = time_alone((lambda: x, y.copy_), device, repeats)
    return 2 * x.nbytes / statistics.median(seconds)


# -- Memory ----------------------------------------------------------------------------


def peak_memory(call, device):
    """MiB that the call needs at most, beyond what there was before.

    "not measured" on a CPU whose system is not Linux.
    """
    if device.type == "cuda":
        return peak_memory_on_gpu(call)
    try:
        # glibc gives free memory back to the system; else the call would use it unseen.
        ctypes.CDLL(None).malloc_trim(0)
        # Linux counts the peak from here.
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_of_process()
        call()
        return (peak_of_process() - before) / 2**10
    except (AttributeError, OSError):
        return "not measured"


def peak_memory_on_gpu(call):
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_of_process():
    """KiB, as Linux counts them."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1])


# -- Tables ----------------------------------------------------------------------------


def machine(device):
    """The title of a table: device, threads and versions."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
    packages = [package for package in ("torch", "triton") if find_spec(package)]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return (
        f"{name}, {torch.get_num_threads()} CPU threads, "
        f"Python {platform.python_version()}, {versions}"
    )


def shown(value):
    """Floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_row(row):
    """One line of progress: the texts and integers alone, floats after their names."""
    words = []
    for name, value in row.items():
        if isinstance(value, float):
            words.append(f"{name} {shown(value)}")
        else:
            words.append(str(value))
    print(" ".join(words), flush=True)


def markdown(rows):
    """Rows, dicts, as the lines of a Markdown table with a column for every key."""
    keys = {}
    for row in rows:
        # A dict keeps the order of first occurrence, which a set does not.
        keys |= dict.fromkeys(row)
    cells = [list(keys)]
    for row in rows:
        cells.append([shown(row.get(key, "")) for key in keys])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = []
    for line in cells:
        padded = map(str.rjust, line, widths)
        lines.append("| " + " | ".join(padded) + " |")
    return lines


def table(rows, out, name, title):
    """Prints rows, dicts, as a Markdown table.

    Writes the table to out/name.md, and title and rows as JSON lines to out/name.jsonl.
    """
    lines = markdown(rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text("\n".join([title, "", *lines, ""]))
    with open(out / f"{name}.jsonl", "w") as file:
        for row in [{"on": title}, *rows]:
            file.write(json.dumps(row) + "\n")
    print("\n".join(lines), f"\nwritten: {out}/{name}.md, {name}.jsonl", flush=True)
