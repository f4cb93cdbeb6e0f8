#!/usr/bin/env bash
# safetensors 0.8.0 silently saves a transposed NumPy array with its values permuted.
#
# Versions: safetensors 0.8.0 and 0.7.0, numpy 2.4.6.
# Expected: save() copies a non-contiguous array, as np.save does, or refuses it, as
# safetensors.torch does. Version 0.7.0 copies.
# Behavior: 0.8.0 writes the raw memory next to the logical shape. Anything in Fortran
# order (x.T, np.asfortranarray, np.moveaxis, the transposed factor of an SVD) loads with
# the right shape, dtype and size, but with its values permuted: weights converted with
# w.T are scrambled. The docstring asks for contiguous arrays, but nothing checks it.
# Workaround: np.ascontiguousarray before saving.
#
# Output seen:
#   0.7.0 transposed ok, fortran ok, moveaxis ok, svd ok
#   0.8.0 transposed WRONG, fortran WRONG, moveaxis WRONG, svd WRONG
#   0.8.0 [[0, 3], [1, 4], [2, 5]] came back as [[0, 1], [2, 3], [4, 5]]
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
cat >"$dir/check.py" <<'EOF'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load, save

garbled = sys.argv[1] == "garbled"
x = np.arange(6, dtype=np.float32).reshape(2, 3)
symmetric = np.random.default_rng(0).normal(size=(8, 8))
arrays = {
    "transposed": x.T,
    "fortran": np.asfortranarray(x),
    "moveaxis": np.moveaxis(np.arange(24.0).reshape(2, 3, 4), 0, -1),
    "svd": np.linalg.svd(symmetric + symmetric.T)[2].T,
}
report = []
for name, array in arrays.items():
    loaded = load(save({name: array}))[name]
    assert loaded.shape == array.shape and loaded.dtype == array.dtype
    assert np.array_equal(np.sort(loaded.ravel()), np.sort(array.ravel()))
    same = np.array_equal(loaded, array)
    assert same != garbled, name
    copied = load(save({name: np.ascontiguousarray(array)}))[name]
    assert np.array_equal(copied, array)
    report.append(f"{name} {'ok' if same else 'WRONG'}")
print(safetensors.__version__, ", ".join(report))
if garbled:
    back = load(save({"x": x.T}))["x"].astype(int).tolist()
    assert back == [[0, 1], [2, 3], [4, 5]]
    print(safetensors.__version__, x.T.astype(int).tolist(), "came back as", back)
EOF
"$dir/venv/bin/pip" install -q numpy==2.4.6 safetensors==0.7.0
"$dir/venv/bin/python" "$dir/check.py" intact
"$dir/venv/bin/pip" install -q safetensors==0.8.0
"$dir/venv/bin/python" "$dir/check.py" garbled
