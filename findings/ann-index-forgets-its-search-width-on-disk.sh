#!/usr/bin/env bash
# hnswlib, voyager, usearch: an index that is saved and loaded finds fewer neighbors.
#
# Versions: hnswlib 0.8.0, voyager 2.2.3, usearch 2.26.6, numpy 2.4.6.
# Expected: the search width tuned for an index (ef, expansion_search) is saved with it, so
# that the loaded index gives the answers of the saved one.
# Behavior: save_index/load_index (hnswlib), save/load (voyager) and save/restore
# (usearch) keep vectors and graph but reset the width to 10, 10 and 64. On 3,000 random
# vectors of 32 values, recall@10 drops from 1.00 to 0.73, 0.67 and 0.99 without a
# message, so k-NN accuracy changes after a reload. What keeps the width differs: pickle
# does in hnswlib; in usearch, load() uses the width of the object it is called on.
# Workaround: set the width after every load.
#
# Output seen:
#   hnswlib  width 400 -> 10, recall 1.00 -> 0.73; by pickle 400, 1.00
#   voyager  width 400 -> 10, recall 1.00 -> 0.67
#   usearch  width 400 -> 64, recall 1.00 -> 0.99; by load() into an index with 400: 400
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 hnswlib==0.8.0 voyager==2.2.3 usearch==2.26.6
cd "$dir"
venv/bin/python - <<'EOF'
import pickle

import hnswlib
import numpy as np
import voyager
from usearch.index import Index

rng = np.random.default_rng(0)
bank = rng.normal(size=(3000, 32)).astype(np.float32)
queries = rng.normal(size=(200, 32)).astype(np.float32)
distances = ((queries[:, None] - bank) ** 2).sum(-1)
truth = distances.argsort(axis=1)[:, :10]


def recall(found):
    return np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, truth)])


h = hnswlib.Index("l2", 32)
h.init_index(3000, M=16, ef_construction=200, random_seed=0)
h.add_items(bank, num_threads=1)
h.set_ef(400)
h.save_index("hnswlib.bin")
loaded = hnswlib.Index("l2", 32)
loaded.load_index("hnswlib.bin")
pickled = pickle.loads(pickle.dumps(h))
before, after, kept = [recall(i.knn_query(queries, 10)[0]) for i in (h, loaded, pickled)]
print(f"hnswlib  width {h.ef} -> {loaded.ef}, recall {before:.2f} -> {after:.2f}; ", end="")
print(f"by pickle {pickled.ef}, {kept:.2f}")
assert (h.ef, loaded.ef, pickled.ef) == (400, 10, 400)
assert before == kept and after < before - 0.1

v = voyager.Index(voyager.Space.Euclidean, 32, random_seed=0)
v.add_items(bank, num_threads=1)
v.ef = 400
v.save("voyager.bin")
loaded = voyager.Index.load("voyager.bin")
before, after = [recall(i.query(queries, 10)[0]) for i in (v, loaded)]
print(f"voyager  width {v.ef} -> {loaded.ef}, recall {before:.2f} -> {after:.2f}")
assert (v.ef, loaded.ef) == (400, 10) and after < before - 0.1

u = Index(ndim=32, metric="l2sq", dtype="f32", expansion_search=400)
u.add(np.arange(3000), bank, threads=1)
u.save("usearch.bin")
restored = Index.restore("usearch.bin")
into = Index(ndim=32, metric="l2sq", dtype="f32", expansion_search=400)
into.load("usearch.bin")
before, after = [recall(i.search(queries, 10).keys) for i in (u, restored)]
widths = [i.expansion_search for i in (u, restored, into)]
print(f"usearch  width {widths[0]} -> {widths[1]}, recall {before:.2f} -> {after:.2f}; ", end="")
print(f"by load() into an index with 400: {widths[2]}")
assert widths == [400, 64, 400] and after <= before
EOF
