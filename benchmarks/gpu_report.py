"""
gpu.md: the records of `bench.py gpu` as tables, what was wanted first.
"""

from benchmarks.gpu import REPORT, results
from benchmarks.measure import markdown
from benchmarks.step import guidance_cost


def rows_of(ended, group):
    """Rows of the items GROUP or GROUP/..., in the order of their records."""
    rows = []
    for name, record in ended.items():
        if name.split("/")[0] == group:
            rows += record.get("rows", [])
    return rows


def claim(words, wanted, measured, met):
    return {"claim": words, "wanted": wanted, "measured": measured, "met": met}


def kernel_claims(rows):
    """Of the case that the budget names: 256 images, bf16 predictions, fp32 images."""
    speed = {}
    for row in rows:
        case = (row["shape"], row["pred"], row["images"], row["pass"])
        if case == ("ViT-B/L 16", "bfloat16", "float32", "both"):
            if row["batch"] == 256:
                speed[row["loss"]] = row
    if "triton" not in speed:
        return []
    ours = speed["triton"]
    share, eager = ours["% of copy"], ours["x eager"]
    claims = [
        claim("kernel, % of the copy rate", "at least 80", share, share >= 80),
        claim("kernel, times as fast as eager", "at least 8", eager, eager >= 8),
    ]
    if "compile" in speed:
        ratio = speed["compile"]["ms"] / ours["ms"]
        words = "kernel, times as fast as torch.compile"
        claims.append(claim(words, "at least 1.5", ratio, ratio >= 1.5))
    return claims


def step_claims(rows):
    claims = []
    models = {}
    for row in rows:
        # A step that was measured twice counts as it was beside the compiled ones.
        models.setdefault((row["model"], row["type"]), {})[row["step"]] = row
    for (model, dtype), steps in models.items():
        for mode, cost in guidance_cost(steps.values()).items():
            words = f"{model}, {dtype}{mode}: guidance, % of a step"
            claims.append(claim(words, "below 1", cost, cost < 1))
        for name, row in steps.items():
            if name.startswith(("HF", "mae")):
                ratio = 1 / row["x ours"]
                words = f"{model}, {dtype}: ours, times as fast as {name}"
                claims.append(claim(words, "at least 1.5", ratio, ratio >= 1.5))
    return claims


def other_claims(ended):
    """The checks, the comparison of losses, the cut."""
    claims = []
    for group in ("checks", "losses"):
        for row in rows_of(ended, group):
            words = f"{group}: {row['check']}"
            claims.append(claim(words, row["allowed"], row["error"], row["ok"]))
    slowest = {}
    for row in rows_of(ended, "maps"):
        L, share = row["L"], row["% of backbone"]
        slowest[L] = max(share, slowest.get(L, 0))
    for L, share in slowest.items():
        words = f"cut of {L} patches, % of the backbone's time, slowest graphs"
        claims.append(claim(words, "below 100", share, share < 100))
    return claims


def write_report(out, records, items):
    """Writes gpu.md; items: all names in order."""
    ended = results(records)
    machines = []
    for record in ended.values():
        if record.get("on") and record["on"] not in machines:
            machines.append(record["on"])
    lines = ["# What the GPU shows", "", *machines, ""]

    claims = kernel_claims(rows_of(ended, "kernel"))
    claims += step_claims(rows_of(ended, "step"))
    claims += other_claims(ended)
    if claims:
        lines += ["## Wanted and measured", "", *markdown(claims), ""]

    groups = dict.fromkeys(name.split("/")[0] for name in items)
    for group in groups:
        rows = rows_of(ended, group)
        # All that the checks tell stands above.
        if rows and group != "checks":
            lines += [f"## {group}", "", *markdown(rows), ""]

    remarks = []
    for name in items:
        record = ended.get(name)
        if record is None:
            remarks.append(f"- {name}: not measured yet")
            continue
        if "failed" in record:
            remarks.append(f"- {name}: failed, {record['failed']}")
        for note in record.get("notes", []):
            remarks.append(f"- {name}: {note}")
    if remarks:
        lines += ["## Remarks", "", *remarks, ""]
    (out / REPORT).write_text("\n".join(lines))
