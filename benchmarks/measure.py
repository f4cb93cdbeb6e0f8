"""
Timing, peak memory and tables of all benchmarks.
"""

import json
import platform
import statistics
import time
from importlib.metadata import version
from importlib.util import find_spec

import torch

# -- Timing ----------------------------------------------------------------------------


def nothing():
    """Prepare nothing."""
    return None


def percentiles(times):
    """Median, 20th and 80th percentile, in ms, of times in seconds."""
    times = torch.tensor(times, dtype=torch.float64) * 1e3
    return [times.quantile(q).item() for q in (0.5, 0.2, 0.8)]


def quiet_clock():
    """CPU time if PyTorch has one thread, which other programs disturb less."""
    if torch.get_num_threads() == 1:
        return time.process_time
    return time.perf_counter


def clock_name(device):
    """The clock of a table's timings."""
    if device.type == "cuda":
        return "GPU time"
    return "CPU time of one thread" if torch.get_num_threads() == 1 else "wall time"


def take_turns(calls, device, repeats, clock=time.perf_counter):
    """Time several calls alternately, so that all meet the same conditions.

    calls: {name: (prepare, call)}; call takes the result of prepare(). Returns {name:
    seconds of each call}, without prepare() and without the first round, which warms up
    caches and compiles.
    """
    if device.type == "cuda":
        times = take_turns_on_gpu(calls, device, repeats)
    else:
        times = {name: [] for name in calls}
        for _ in range(repeats + 1):
            for name, (prepare, call) in calls.items():
                x = prepare()
                start = clock()
                call(x)
                times[name].append(clock() - start)
    return {name: seconds[1:] for name, seconds in times.items()}


def take_turns_on_gpu(calls, device, repeats):
    """take_turns by CUDA events, with the first round."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    cache = torch.empty(2**27, device=device)
    events = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, (prepare, call) in calls.items():
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            x = prepare()
            # A matrix product keeps the GPU busy while the host queues the call, so only
            # the GPU's time counts. Writing 512 MB empties its cache.
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
    """Seconds of each call of one (prepare, call)."""
    return take_turns({"alone": call}, device, repeats)["alone"]


def copy_bandwidth(device, repeats=20):
    """Bytes read and written per second by a copy larger than any cache."""
    # 1 GiB on a GPU, 256 MiB on a CPU.
    x = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)
    y = torch.empty_like(x)
    seconds = time_alone((lambda: x, y.copy_), device, repeats)
    return 2 * x.nbytes / statistics.median(seconds)


# -- Memory ----------------------------------------------------------------------------


def peak_memory(call, device):
    """{"peak MiB": of a call beyond what was allocated before}; {} if not on a GPU."""
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return {"peak MiB": (torch.cuda.max_memory_allocated() - before) / 2**20}


# -- Tables ----------------------------------------------------------------------------


def machine(device):
    """Device, threads and versions, the title of a table."""
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


def formatted(value):
    """A table cell; floats with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_row(row):
    """Print a row as progress: text and integers alone, floats after their names."""
    cells = []
    for name, value in row.items():
        label = f"{name} " if isinstance(value, float) else ""
        cells.append(label + formatted(value))
    print(" ".join(cells), flush=True)


def markdown(rows):
    """Lines of a Markdown table of dicts, with a column for every key."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys]
    for row in rows:
        cells.append([formatted(row.get(key, "")) for key in keys])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(map(str.rjust, line, widths))} |" for line in cells]


def table(rows, out, name, title):
    """Print dicts as a Markdown table; write it to out/name.md and out/name.jsonl."""
    lines = markdown(rows)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text("\n".join([title, "", *lines, ""]))
    with open(out / f"{name}.jsonl", "w") as file:
        for row in [{"on": title}, *rows]:
            file.write(json.dumps(row) + "\n")
    print("\n".join(lines), f"\nwritten: {out}/{name}.md, {name}.jsonl", flush=True)
