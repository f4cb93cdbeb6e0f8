#!/usr/bin/env bash
# shap: the inpainting maskers cut images to whole numbers; an image in 0..1 is black, also where
# nothing is masked, and its explanation is of the black image.
#
# Versions: shap 0.51.0, opencv-python-headless 5.0.0.93, numpy 2.4.6.
# Expected: maskers.Image(mask_value, shape) replaces the hidden pixels and returns the others as
# they are, in any range of values, as it does for "blur(...)" and for a constant. The values add
# up to the model's output: expected value + sum of the SHAP values = f(image).
# Behavior: for "inpaint_telea" and "inpaint_ns" the whole image passes through uint8. In 0..1 all
# pixels become 0 (a pixel of exactly 1 stays), normalized ones 0, 1, 2 or 254, 255. Only the image
# with everything hidden gets its true mean color. All other images given to the model are black,
# the unmasked one too, so the values explain f(black) - f(mean color), and no pixel differs from
# its neighbor. The values do not add up to f(image), which is not checked. The documentation's
# example uses 0..255; no range is named.
# Workaround: images in 0..255, scaled within the model function, or "blur(...)".
#
# Output seen (f: brightness of the object, 6 % of the image; f(image), sum of expected value and
# SHAP values, share of absolute SHAP values on the object):
#   blur(16,16)   0..255: f 0.843, sum 0.843, on the object 1.00, visible pixels kept
#   blur(16,16)   0..  1: f 0.843, sum 0.843, on the object 1.00, visible pixels kept
#   inpaint_telea 0..255: f 0.843, sum 0.842, on the object 0.95, visible pixels kept
#   inpaint_telea 0..  1: f 0.843, sum 0.000, on the object 0.06, visible pixels lost
#   inpaint_ns    0..255: f 0.843, sum 0.842, on the object 0.93, visible pixels kept
#   inpaint_ns    0..  1: f 0.843, sum 0.000, on the object 0.06, visible pixels lost
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q shap==0.51.0 opencv-python-headless==5.0.0.93 numpy==2.4.6
"$dir/venv/bin/python" -W ignore - <<'EOF'
import numpy as np
import shap

random = np.random.default_rng(0)
image = random.uniform(30, 90, (32, 32, 3)).astype("float32")
image[8:16, 8:16] = random.uniform(180, 250, (8, 8, 3))  # a bright object
on_object = np.zeros((32, 32), bool)
on_object[8:16, 8:16] = True


def explain(mask_value, scale):
    """Return f(image), what the SHAP values add up to, and the share of them on the object."""

    def brightness(images):
        return (images * scale)[:, on_object].mean((1, 2))[:, None] / 255

    masker = shap.maskers.Image(mask_value, image.shape)
    explainer = shap.Explainer(brightness, masker)
    explained = explainer(image[None] / scale, max_evals=400, batch_size=50, silent=True)
    values = explained.values[0, ..., 0]
    total = explained.base_values.sum() + values.sum()
    share = np.abs(values)[on_object].sum() / np.abs(values).sum()
    half = np.zeros(image.shape, bool)
    half[:, 16:] = True
    visible = masker(half.ravel(), image / scale)[0][0][half]
    kept = np.abs(visible - (image / scale)[half]).max() * scale < 1
    output = brightness(image[None] / scale).item()
    print(f"{mask_value:13} 0..{255 // scale:3}: f {output:.3f}, sum {total:.3f},",
          f"on the object {share:.2f}, visible pixels", "kept" if kept else "lost")  # fmt: skip
    return output, total, share, kept


for mask_value in ("blur(16,16)", "inpaint_telea", "inpaint_ns"):
    for scale in (1, 255):
        output, total, share, kept = explain(mask_value, scale)
        if scale == 255 and mask_value.startswith("inpaint"):
            assert total < 0.01 < 0.5 < output and share < 0.1 and not kept
        else:
            assert abs(total - output) < 0.01 and share > 0.9 and kept
EOF
