#!/usr/bin/env bash
# empatches, tiler: maps merged from overlapping patches. The average depends on their order, the
# maximum is never negative; labels on which all tiles agree come back as other classes.
#
# Versions: empatches 0.2.3, tiler 0.6.0, numpy 2.4.6.
# Expected: mode="avg" is the mean of the patches that cover a pixel and mode="max" their maximum,
# in any order of the patches; weighted by a window, tiles that agree give what they agree on.
# Behavior: empatches halves the sum of the map so far and the next patch, so of four patches the
# last has half of the weight, the first an eighth. A 0 counts as "nothing written yet": if one of
# four patches sees the object, its share is 0.125 to 1, depending on which one it is. "max" starts
# from a map of zeros, so logits and log-probabilities below 0 all become 0. tiler divides by the
# sum of weights in float32 and cuts the result to merge(dtype=np.uint8): 6.999999 is class 6. Its
# windows "hann", "bartlett" and "barthann" are 0 at their ends, so that the frame of the whole map
# is 0, whatever the tiles hold.
# Workaround: sums and counts of one's own; tiler: Tiler.calculate_padding, and np.rint before
# the type.
#
# Output seen (four patches of 64 x 64 on 96 x 96 pixels):
#   empatches, four patches:
#     (1, 0, 0, 0)      mean  0.250, avg  0.125; maximum  1, max  1
#     (0, 1, 0, 0)      mean  0.250, avg  0.250; maximum  1, max  1
#     (0, 0, 1, 0)      mean  0.250, avg  0.500; maximum  1, max  1
#     (0, 0, 0, 1)      mean  0.250, avg  1.000; maximum  1, max  1
#     (4, 4, 4, 8)      mean  5.000, avg  6.000; maximum  8, max  8
#     (-4, -4, -4, -2)  mean -3.500, avg -3.000; maximum -2, max  0
#   tiler, tiles of class 7 only, as 8 bits:
#     boxcar    class 7: 1.000, 6: 0.000, 0: 0.000
#     triang    class 7: 1.000, 6: 0.000, 0: 0.000
#     hamming   class 7: 0.813, 6: 0.187, 0: 0.000
#     hann      class 7: 0.802, 6: 0.157, 0: 0.041
#     bartlett  class 7: 0.846, 6: 0.113, 0: 0.041
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 empatches==0.2.3 tiler==0.6.0
"$dir/venv/bin/python" - <<'EOF'
import numpy as np
from empatches import EMPatches
from tiler import Merger, Tiler

empatches = EMPatches()
_, corners = empatches.extract_patches(np.zeros((96, 96)), patchsize=64, overlap=0.5)
assert len(corners) == 4


def merged(values, mode):
    """The pixel that all four patches cover; each patch has one value."""
    patches = [np.full((64, 64), value, np.float32) for value in values]
    return empatches.merge_patches(patches, corners, mode)[48, 48].item()


print("empatches, four patches:")
for values, average, maximum in (
    ((1, 0, 0, 0), 0.125, 1), ((0, 1, 0, 0), 0.25, 1), ((0, 0, 1, 0), 0.5, 1),
    ((0, 0, 0, 1), 1, 1), ((4, 4, 4, 8), 6, 8), ((-4, -4, -4, -2), -3, 0),
):
    got = merged(values, "avg"), merged(values, "max")
    print(f"  {str(values):17} mean {np.mean(values):6.3f}, avg {got[0]:6.3f};"
          f" maximum {max(values):2}, max {got[1]:2.0f}")
    assert np.allclose(got, (average, maximum)), got

print("tiler, tiles of class 7 only, as 8 bits:")
tiler = Tiler(data_shape=(96, 96), tile_shape=(64, 64), overlap=0.5)
for window in ("boxcar", "triang", "hamming", "hann", "bartlett"):
    merger = Merger(tiler, window)
    for number, tile in tiler(np.full((96, 96), 7, np.uint8)):
        merger.add(number, tile)
    labels = merger.merge(dtype=np.uint8)
    shares = [(labels == label).mean() for label in (7, 6, 0)]
    frame = set(np.r_[labels[0], labels[-1], labels[:, 0], labels[:, -1]].tolist())
    print(f"  {window:9} class 7: {shares[0]:.3f}, 6: {shares[1]:.3f}, 0: {shares[2]:.3f}")
    assert np.isclose(sum(shares), 1)
    assert (shares[1] > 0.1) == (window not in ("boxcar", "triang"))
    assert (frame == {0}) == (window in ("hann", "bartlett"))
EOF
