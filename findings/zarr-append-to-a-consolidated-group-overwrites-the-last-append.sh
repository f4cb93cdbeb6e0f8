#!/usr/bin/env bash
# zarr: rows appended to a group with consolidated metadata cannot be read back, and the next
# append overwrites them.
#
# Versions: zarr 3.1.6 (the latest for Python 3.11; the source of 3.4.2 reads alike), numcodecs
# 0.16.6, numpy 2.4.6; formats 2 and 3.
# Expected: append makes an array longer for whoever opens its group next. Consolidated metadata, a
# copy of all shapes in the root that makes opening quick, is kept up to date, or append refuses.
# Behavior: append and resize write the array's own metadata and leave the copy as it is, while
# open_group takes the copy, by default and also for writing. So the next session finds the
# array as long as on the day of consolidate_metadata and begins its rows there, on top of those
# of the session before. Each append reports a length that fits its own rows, and nothing warns.
# Maps and features that are made in sessions or by resumed jobs lose all parts but the first and
# the last; read by the group, the last is missing, too. Data sets written by xarray have such a
# copy by default. The manual says that readers may see a past state, not that rows get lost.
# Workaround: open_group(use_consolidated=False) for writing, then consolidate_metadata again.
#
# Output seen (rows of sessions 1 to 4, of 100 each; length seen by each append; both formats):
#   not consolidated        2: 200, 3: 300, 4: 400
#     by the group          {1: 100, 2: 100, 3: 100, 4: 100}
#     by the array's path   {1: 100, 2: 100, 3: 100, 4: 100}
#   consolidated            2: 200, 3: 200, 4: 200
#     by the group          {1: 100}
#     by the array's path   {1: 100, 4: 100}
#   use_consolidated=False  2: 200, 3: 300, 4: 400
#     by the group          {1: 100, 2: 100, 3: 100, 4: 100}
#     by the array's path   {1: 100, 2: 100, 3: 100, 4: 100}
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 zarr==3.1.6 numcodecs==0.16.6
"$dir/venv/bin/python" -W ignore - "$dir" <<'EOF'
import sys

import numpy as np
import zarr

SHAPE = (100, 14, 14)
WHOLE = {1: 100, 2: 100, 3: 100, 4: 100}


def count(maps):
    sessions, rows = np.unique(maps[:, 0, 0], return_counts=True)
    return dict(zip(sessions.tolist(), rows.tolist()))


def run(name, zarr_format, consolidate, **options):
    """Write maps in four sessions, whose numbers are their values, and count what is there."""
    path = f"{sys.argv[1]}/{name}-{zarr_format}"
    group = zarr.create_group(path, zarr_format=zarr_format)
    maps = group.create_array("maps", shape=SHAPE, chunks=(50, 14, 14), dtype="uint8")
    maps[:] = 1
    if consolidate:
        zarr.consolidate_metadata(path)
    lengths = {}
    for session in (2, 3, 4):
        maps = zarr.open_group(path, mode="a", **options)["maps"]
        maps.append(np.full(SHAPE, session, np.uint8))
        lengths[session] = maps.shape[0]
    by_group = count(zarr.open_group(path, mode="r", **options)["maps"])
    by_path = count(zarr.open_array(f"{path}/maps", mode="r"))
    print(f"{name:23}", ", ".join(f"{session}: {rows}" for session, rows in lengths.items()))
    print("  by the group         ", by_group)
    print("  by the array's path  ", by_path)
    return by_group, by_path


for zarr_format in (2, 3):
    assert run("not consolidated", zarr_format, False) == (WHOLE, WHOLE)
    assert run("consolidated", zarr_format, True) == ({1: 100}, {1: 100, 4: 100})
    cured = run("use_consolidated=False", zarr_format, True, use_consolidated=False)
    assert cured == (WHOLE, WHOLE)
EOF
