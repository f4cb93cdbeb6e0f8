#!/usr/bin/env bash
# cleanvision: of palette PNGs and GIFs it compares and measures indices, not colors; different
# pictures are exact duplicates, bright ones are dark.
#
# Versions: cleanvision 0.3.7, Pillow 13.0.0, numpy 2.4.6, pandas 3.1.1, ImageHash 4.3.2.
# Expected: images are brought to one mode before they are judged, as every loader does with
# convert("RGB"). A picture has the same brightness as PNG in colors, as PNG with a palette
# and as GIF, and exact duplicates show the same.
# Behavior: the hash of exact duplicates and the brightness are taken from np.asarray(image),
# which in mode P are indices. One drawing in three colors (charts, maps, flags, logos, plates
# of one template) is a set of exact duplicates: whoever keeps one of each set loses the
# others. Brightness is the number of colors: with up to about 80 of them every picture is a
# dark issue, with 256 none is, however dark. A picture and its own palette copy are not
# duplicates. Web collections hold many such files. No warning.
# Workaround: convert to RGB first, e.g. from_dataset with a Hugging Face dataset of RGB images.
#
# Output seen (dark score, dark issue):
#   bright RGB      0.986 False
#   bright 8 colors 0.027 True
#   bright GIF      0.992 False
#   dark RGB        0.042 True
#   dark 8 colors   0.027 True
#   dark GIF        0.988 False
#   exact duplicates: [['square blue', 'square red', 'square white']]
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q numpy==2.4.6 pillow==13.0.0 pandas==3.1.1 imagehash==4.3.2 \
    cleanvision==0.3.7
mkdir "$dir/images" && cd "$dir/images"
"$dir/venv/bin/python" -W ignore - 2>../log.txt <<'EOF' || { cat ../log.txt; exit 1; }
import contextlib
import io
from pathlib import Path

import numpy as np
from cleanvision import Imagelab
from PIL import Image

random = np.random.default_rng(0)
for name, low, high in (("bright", 200, 256), ("dark", 0, 12)):
    colors = random.integers(low, high, (8, 8, 3)).astype(np.uint8)
    picture = Image.fromarray(colors).resize((128, 128), Image.Resampling.BICUBIC)
    picture.save(f"{name} RGB.png")
    picture.quantize(8).save(f"{name} 8 colors.png")
    picture.save(f"{name} GIF.gif")
drawing = np.zeros((128, 128), np.uint8)
drawing[30:90, 40:100] = 1
for name, color in (("red", (220, 20, 20)), ("blue", (20, 20, 220)), ("white", (255, 255, 255))):
    picture = Image.fromarray(drawing).convert("P")
    picture.putpalette([90, 90, 90, *color])
    picture.save(f"square {name}.png")
    picture.convert("RGB").save(f"square {name} RGB.png")

with contextlib.redirect_stdout(io.StringIO()):
    lab = Imagelab(data_path=".")
    lab.find_issues({"dark": {}, "exact_duplicates": {}}, n_jobs=1, verbose=False)
issues = lab.issues.rename(index=lambda path: Path(path).stem)
names = [f"{light} {kind}" for light in ("bright", "dark") for kind in ("RGB", "8 colors", "GIF")]
for name in names:
    print(f"{name:15} {issues.dark_score[name]:.3f} {issues.is_dark_issue[name]}")
    assert issues.is_dark_issue[name] == ("8" in name or name == "dark RGB")
sets = [sorted(Path(path).stem for path in paths) for paths in lab.info["exact_duplicates"]["sets"]]
print("exact duplicates:", sets)
assert sets == [["square blue", "square red", "square white"]]
EOF
