"""
Timing in turns, and the table of a benchmark.
"""

import math
import statistics
import time
from itertools import accumulate

import torch


def time_call(call, device):
    """Seconds of a call: the GPU's, or CPU time, which other programs disturb less."""
    if device.type == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    # Writing 1 GiB empties the GPU's cache, and keeps the GPU busy while the host queues
    # the call, so that only the GPU's time counts.
    torch.empty(2**30, dtype=torch.uint8, device=device).zero_()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def take_turns(calls, device, repeats):
    """Time calls in rounds of one call each, so that all meet the same conditions.

    calls: {name: call}. Returns {name: seconds of each call}, without the first round, which
    warms up caches and compiles.
    """
    times = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            times[name].append(time_call(call, device))
    return {name: seconds[1:] for name, seconds in times.items()}


def compare(times, count=1):
    """{name: columns of a table} of the times of take_turns.

    ms: the median, with the 20th and 80th percentile, per image if a call takes `count`
    images. x NAME: speed relative to the first one, the median of the ratios of all
    rounds; low and high: its 95 % interval, which decides nothing if it includes 1.
    """
    (first, base), *_ = times.items()
    columns = {}
    for name, seconds in times.items():
        ms = 1e3 / count * torch.tensor(seconds, dtype=torch.float64)
        p20, median, p80 = ms.quantile(ms.new_tensor([0.2, 0.5, 0.8])).tolist()
        ratios = [x / y for x, y in zip(base, seconds, strict=True)]
        low, high = median_interval(ratios)
        speed = {f"x {first}": statistics.median(ratios), "low": low, "high": high}
        columns[name] = {"ms": median, "p20": p20, "p80": p80} | speed
    return columns


def median_interval(values):
    """95 % confidence interval of the median by order statistics.

    (0, inf) for fewer than 6 positive values, which are too few.
    """
    x, n = sorted(values), len(values)
    # The true median is below the k-th smallest value if fewer than k lie below it.
    chances = accumulate(math.comb(n, i) / 2**n for i in range(n))
    k = sum(chance <= 0.025 for chance in chances)
    return (x[k - 1], x[n - k]) if k else (0.0, math.inf)


def peak_memory(call, device):
    """{"peak MiB": of a call beyond what was allocated before}; {} if not on a GPU."""
    if device.type == "cpu":
        return {}
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return {"peak MiB": (torch.cuda.max_memory_allocated() - before) / 2**20}


def print_table(rows):
    """Print dicts with the same keys as a Markdown table, each row as soon as it is there."""
    for number, row in enumerate(rows):
        if number == 0:
            print("|", " | ".join(row), "|\n|", " | ".join("-" * len(row)), "|")
        cells = [f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()]
        print("|", " | ".join(cells), "|", flush=True)
