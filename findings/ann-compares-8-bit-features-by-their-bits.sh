#!/usr/bin/env bash
# usearch, LanceDB: features in uint8 are compared bit by bit, in usearch also in an index of type
# u8 and metric l2sq, and then only an eighth of them; k-NN accuracy drops from 0.98 to 0.13.
#
# Versions: usearch 2.26.6, lancedb 0.40.0, pyarrow 25.0.1, numpy 2.4.6.
# Expected: quantized features of 0 to 255 are numbers, and nearest is what is nearest by the metric
# asked for, or by the default of the reference: "l2" in LanceDB.
# Behavior: usearch takes each uint8 array for packed bits, whatever the index holds. It unpacks as
# many bits as there are dimensions, so the first ndim / 8 features, and stores zeros and ones; the
# index is filled and searched in the same way and gives no message. Type u8 is in the list of the
# constructor, not that its own NumPy type is something else (reported as issue 595, open). int8
# is right, and so is float32 going into a u8 index. LanceDB compares a uint8 column by Hamming
# distance of its bits unless a metric is named (which is an error then). Columns become uint8 by
# themselves: Python integers, or int64 features, of which none is below 0 or above 255.
# Workaround: astype(np.float32), or minus 128 as int8 in usearch.
#
# Output seen (20 classes, 64 features; usearch adds in parallel, so the last digits vary):
#   exact neighbors by NumPy: 0.976
#   usearch, index of f32   float32 0.978   uint8 0.134
#   usearch, index of u8    float32 0.968   uint8 0.138
#   usearch, index of i8    int8    0.982
#   usearch.index.search     float32 0.976   uint8 0.038
#   kept of [146 135 129 131] in a u8 index of usearch: [1 0 0 1], bits of the first 8 features
#   LanceDB, default metric  float32 0.976   uint8 0.606
#   LanceDB, integers up to      256 0.976     255 0.606
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 usearch==2.26.6 lancedb==0.40.0 pyarrow==25.0.1
RUST_LOG=error "$dir/venv/bin/python" - <<'EOF'
import lancedb
import numpy as np
import pyarrow as pa
from usearch.index import Index, MetricKind, search

random = np.random.default_rng(0)
DIM, CLASSES, K = 64, 20, 20
centers = random.normal(size=(CLASSES, DIM))


def sample(count):
    label = random.integers(0, CLASSES, count)
    feature = centers[label] + random.normal(0, 1.6, (count, DIM))
    return np.clip(np.round(128 + 18 * feature), 0, 255).astype(np.uint8), label


bank, bank_label = sample(4000)
queries, label = sample(500)


def accuracy(neighbors):
    votes = [np.bincount(bank_label[row], minlength=CLASSES).argmax() for row in neighbors]
    return np.mean(votes == label)


def by_usearch(kind, convert):
    index = Index(ndim=DIM, dtype=kind, metric="l2sq")
    index.add(np.arange(4000), convert(bank))
    return accuracy(index.search(convert(queries), K).keys)


def by_lancedb(name, convert):
    rows = [{"vector": row, "id": i} for i, row in enumerate(convert(bank))]
    table = database.create_table(name, rows)
    found = [table.search(query).limit(K).to_arrow()["id"].to_numpy() for query in convert(queries)]
    return accuracy(found), table.schema.field("vector").type


def floats(x):
    return x.astype(np.float32)


def one_above(x):
    x = x.astype(np.int64)
    x[0, 0] = 256
    return x


difference = ((floats(queries)[:, None] - floats(bank)) ** 2).sum(2)
exact = accuracy(difference.argsort()[:, :K])
print(f"exact neighbors by NumPy: {exact:.3f}")
for kind in ("f32", "u8"):
    right, wrong = by_usearch(kind, floats), by_usearch(kind, np.copy)
    print(f"usearch, index of {kind:3}   float32 {right:.3f}   uint8 {wrong:.3f}")
    assert right > 0.9 and wrong < 0.4
signed = by_usearch("i8", lambda x: (x.astype(np.int16) - 128).astype(np.int8))
print(f"usearch, index of i8    int8    {signed:.3f}")
assert signed > 0.9
right, wrong = (accuracy(search(f(bank), f(queries), K, MetricKind.L2sq, exact=True).keys)
                for f in (floats, np.copy))
print(f"usearch.index.search     float32 {right:.3f}   uint8 {wrong:.3f}")
assert right > 0.9 and wrong < 0.4
index = Index(ndim=DIM, dtype="u8", metric="l2sq")
index.add(0, bank[0])
kept = index.get(0)
print(f"kept of {bank[0, :4]} in a u8 index of usearch: {kept[:4]}, bits of the first 8 features")
assert np.array_equal(kept, np.unpackbits(bank[0, : DIM // 8])), kept

database = lancedb.connect("memory:///")
(right, _), (wrong, kind) = by_lancedb("float32", floats), by_lancedb("uint8", np.copy)
print(f"LanceDB, default metric  float32 {right:.3f}   uint8 {wrong:.3f}")
assert right == exact and wrong < 0.85 and kind.value_type == pa.uint8()
wrong, kind = by_lancedb("to255", lambda x: x.astype(np.int64))
assert wrong < 0.85 and kind.value_type == pa.uint8(), (wrong, kind)

right, kind = by_lancedb("to256", one_above)
print(f"LanceDB, integers up to      256 {right:.3f}     255 {wrong:.3f}")
assert right > 0.95 and kind.value_type == pa.float32(), (right, kind)
EOF
