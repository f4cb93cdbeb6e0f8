#!/usr/bin/env bash
# Deep Lake: queries calculate in the type of the column: sum(mask == 1) is 1 for an object of any
# size, and the neighbors of an image by 8-bit features are random ones.
#
# Versions: deeplake 4.7.4, numpy 2.4.6.
# Expected: the documentation has "Sum of all elements", and cosine_similarity or l2_norm with
# data(column, row) for what is most similar to one of the rows. NumPy and SQL sum small integers
# in wider ones, and distances are floats.
# Behavior: the sum of a comparison is a truth value, so no image has more than 200 pixels of
# class 1; the sum of an 8-bit mask is taken modulo 256, so it finds none of the larger ones
# either. cosine_similarity, and the difference of two values of an 8-bit column, wrap around in
# the same way: an image is not the nearest to itself, and the classes of its neighbors are at
# chance. No message. The same functions are right if the features of the query are written out as
# ARRAY[...], as are avg, float32 columns, and small masks, as in a test. (The differences in int8
# happen to fit.)
# Workaround: avg(mask == 1) * height * width, or sum((mask == 1) * 1); ARRAY[...] for distances.
#
# Output seen (squares of side 4 to 32; share of the 11 nearest that have the class of the query,
# 20 classes):
#   sum(mask == 1)             1     1     1     1     1     1     1     1   above 200: 0
#   sum(mask)                 16    64   144     0   144    64    16     0   above 200: 0
#   sum((mask == 1) * 1)      16    64   144   256   400   576   784  1024   above 200: 5
#   avg(mask == 1) * 4096     16    64   144   256   400   576   784  1024   above 200: 5
#                      float32            int8               uint8
#                      data()  ARRAY[]    data()  ARRAY[]    data()  ARRAY[]
#   cosine_similarity    1.00     1.00      0.04     1.00      0.05     1.00
#   l2_norm              1.00     1.00      1.00     1.00      0.10     1.00
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 deeplake==4.7.4
cd "$dir"
venv/bin/python - <<'EOF'
import deeplake
import numpy as np
from deeplake import types

sides = np.arange(4, 36, 4)
masks = deeplake.create("masks")
masks.add_column("mask", types.SegmentMask("uint8", "lz4"))
for side in sides:
    mask = np.zeros((64, 64), np.uint8)
    mask[:side, :side] = 1
    masks.append([{"mask": mask}])
masks.commit()

for area, expected in {
    "sum(mask == 1)": sides**0,
    "sum(mask)": sides**2 % 256,
    "sum((mask == 1) * 1)": sides**2,
    "avg(mask == 1) * 4096": sides**2,
}.items():
    values = np.asarray(masks.query(f"SELECT {area} AS area")["area"][:]).astype(int)
    found = len(masks.query(f"SELECT * WHERE {area} > 200"))
    print(f"{area:22}", *(f"{value:5}" for value in values), f"  above 200: {found}")
    assert np.array_equal(values, expected) and found == (expected > 200).sum(), area

# Features of 500 images, 25 of each of 20 classes, also quantized to 8 bits.
random = np.random.default_rng(0)
labels = np.arange(500) // 25
centers = random.normal(size=(20, 64))
features = centers[labels] + 0.7 * random.normal(size=(500, 64))
quantized = np.clip(np.round(40 * features), -127, 127)
columns = {"float": features.astype(np.float32), "signed": quantized.astype(np.int8)}
columns["unsigned"] = (quantized + 128).astype(np.uint8)

bank = deeplake.create("bank")
bank.add_column("id", "int32")
for name, values in columns.items():
    bank.add_column(f"{name}_features", types.Array(str(values.dtype), 1))
for row in range(500):
    values = {f"{name}_features": columns[name][row] for name in columns}
    bank.append([{"id": row} | values])
bank.commit()


def same_class(order, name, row, literal):
    column = f"{name}_features"
    array = f"ARRAY[{','.join(map(str, columns[name][row]))}]"
    query = array if literal else f"data({column}, {row})"
    ids = bank.query(f"SELECT id ORDER BY {order.format(column, query)} LIMIT 11")["id"][:]
    return (labels[np.asarray(ids)] == labels[row]).mean()


print(" " * 18, *(f"{str(values.dtype):18}" for values in columns.values()))
print(" " * 18, *["data()  ARRAY[]   "] * 3)
for order, wrong in {
    "cosine_similarity({}, {}) DESC": ["signed", "unsigned"],
    "l2_norm({} - {}) ASC": ["unsigned"],
}.items():
    print(f"{order.split('(')[0]:17}", end="")
    for name in columns:
        rows = range(0, 500, 25)
        by_row = np.mean([same_class(order, name, row, False) for row in rows])
        by_array = np.mean([same_class(order, name, row, True) for row in rows])
        print(f"{by_row:8.2f}{by_array:9.2f}", end="  ")
        assert by_array > 0.95, (order, name)
        assert by_row < 0.2 if name in wrong else by_row > 0.95, (order, name, by_row)
    print()
EOF
