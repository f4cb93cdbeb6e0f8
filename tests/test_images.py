"""
Decoding, conversion to 8 bits and crops: against torchvision, numpy and by hand.
"""

import struct
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

import attg_mae
from attg.datasets import open_data
from attg.images import Jpeg, eval_view, load_image, to_8_bits, train_view
from eval_finetune import rand_augment
from tests.fuzz import RANDOM, damage, largest_memory, png, within
from tests.helpers import LUMA, noise, ramp, write

BICUBIC = v2.InterpolationMode.BICUBIC
SEEDS = st.integers(0, 2**64 - 1)
MODES = {
    "png": ("RGB", "L", "1", "RGBA", "LA", "P", "I;16"),
    "tif": ("RGB", "L", "1", "P", "CMYK", "I;16", "I", "F"),
    "pgm": ("L", "I;16"),
}
ALL_MODES = sorted({*MODES["png"], *MODES["tif"]})


# -- Modes -----------------------------------------------------------------------------


def image_of(mode, random, shape=None):
    """An image of a mode, and the gray (h, w, 1) or RGB (h, w, 3) that it must become."""
    shape = random.integers(1, 12, 2) if shape is None else shape
    values = random.integers(0, 256, (*shape, 4), dtype=np.uint8)
    rgb, gray = values[..., :3], values[..., 3]
    if mode == "RGB":
        return Image.fromarray(rgb), rgb
    if mode == "RGBA":
        return Image.fromarray(values), rgb
    if mode == "P":
        palette = random.integers(0, 256, (256, 3), dtype=np.uint8)
        image = Image.fromarray(gray)
        image.putpalette(palette.ravel().tolist())
        return image, palette[gray]
    if mode == "CMYK":
        # Full ink or none, where no rounding matters.
        ink = values // 128 * 255
        full = np.maximum(ink[..., :3], ink[..., 3:])
        return Image.fromarray(ink, "CMYK"), 255 - full
    image = Image.fromarray(gray)
    if mode == "LA":
        image.putalpha(Image.fromarray(values[..., 0]))
    elif mode == "1":
        image, gray = Image.fromarray(gray > 127), (gray > 127) * 255
    elif mode == "F":
        wide = random.random(shape, dtype=np.float32)
        image, gray = Image.fromarray(wide), np.floor(wide * 255 + 0.5)
    elif mode == "I":
        image = Image.fromarray(gray.astype(np.int32))
    elif mode == "I;16":
        wide = random.integers(0, 65536, shape)
        wide.flat[0] = 65535  # without it a dark one could warn
        image = Image.fromarray(wide.astype(np.uint16))
        gray = np.floor(wide / 257 + 0.5)
    return image, gray[..., None]


@pytest.mark.parametrize("suffix, mode", [(s, m) for s in MODES for m in MODES[s]])
@given(seed=SEEDS)
def test_every_mode_becomes_8_bits(tmp_path, suffix, mode, seed):
    image, expected = image_of(mode, np.random.default_rng(seed))
    if suffix == "pgm" and mode == "I;16":
        image = image.convert("I")  # the mode in which Pillow 10 writes them
    clear = {"transparency": bytes([0, 128])} if (suffix, mode) == ("png", "P") else {}
    stored = load_image(write(tmp_path / f"0.{suffix}", image, **clear))
    # Pillow 10 opens 16-bit PNGs in the mode I.
    assert stored.mode == mode or (stored.mode, mode) == ("I", "I;16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rgb, gray = np.array(to_8_bits(stored)), np.array(to_8_bits(stored, "L"))
    assert rgb.shape[2] == 3 and rgb.dtype == gray.dtype == np.uint8
    np.testing.assert_array_equal(rgb, np.broadcast_to(expected, rgb.shape))
    assert abs(gray - rgb @ LUMA).max() <= 1


def test_white_is_decided_by_the_type_or_the_flag(tmp_path):
    wide = Image.fromarray(np.float32([[np.nan, np.inf], [-0.009, 1.001]]))
    assert np.array(to_8_bits(wide, "L")).tolist() == [[0, 0], [0, 255]]
    for values, white in (
        (np.int32([[2, 300]]), 255),
        (np.float32([[2, 300]]), 1),
        (np.int32([[-3, 255]]), 255),
        (np.float32([[-0.02, 1]]), 1),
    ):
        low, high = values.flatten().tolist()
        with pytest.raises(
            ValueError, match=f"from {low:g} to {high:g} .* is {white}; set --white"
        ):
            to_8_bits(Image.fromarray(values))
    assert np.array(to_8_bits(Image.fromarray(values), "L", 1)).tolist() == [[0, 255]]
    # Of a whole data set, not of one image.
    for i, level in enumerate((4095, 1000, 16384)):
        values = np.full((40, 40), level, dtype=np.uint16)
        write(tmp_path / f"{i}.png", Image.fromarray(values))
    data = open_data(tmp_path, white=4095)
    assert [int(data[i].image.max()) for i in range(2)] == [255, 62]
    data = open_data(tmp_path)
    with warnings.catch_warnings(action="error"):
        assert data[2].image.max() == 64
    # Such as reflectance, in which 10,000 is white.
    write(tmp_path / "0.png", Image.fromarray(np.full((40, 40), 10_000, np.uint16)))
    for i in range(2):
        with pytest.warns(UserWarning, match="16-bit .* dark: .* --white 4095"):
            assert data[i].image.max() <= 39
    for color, channels in ((2, 3), (6, 4)):
        row = struct.pack(f">{8 * channels}H", *[16383] * 8 * channels)
        (tmp_path / "0.png").write_bytes(png(8, 8, 16, color, row))
        with pytest.warns(UserWarning, match="16-bit RGB .* dark"):
            load_image(tmp_path / "0.png")
    row = struct.pack(">24H", *[16384] * 24)
    (tmp_path / "0.png").write_bytes(png(8, 8, 16, 2, row))
    with warnings.catch_warnings(action="error"):
        load_image(tmp_path / "0.png")


def test_exif_rotation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write(tmp_path / "0.png", noise(6, 4), exif=exif)
    np.testing.assert_array_equal(load_image(path), noise(6, 4))


# -- Views -----------------------------------------------------------------------------


def pixels(view):
    """uint8 (h, w) or (h, w, 3) as int."""
    return view.permute(1, 2, 0).squeeze(-1).numpy().astype(int)


@given(SEEDS, *[st.integers(8, 300)] * 2, *[st.integers(8, 64)] * 2)
def test_training_crop_is_torchvisions(seed, width, height, h, w):
    image = noise(width, height)
    state = torch.get_rng_state()
    crop, box, flip = train_view(image, (h, w), seed)
    assert torch.get_rng_state().equal(state)
    ratio = (3 / 4 * w / h, 4 / 3 * w / h)
    peer = v2.RandomResizedCrop((h, w), (0.2, 1), ratio, interpolation=BICUBIC)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.testing.assert_array_equal(pixels(crop), peer(image))
        assert flip == (torch.rand(()).item() < 0.5)
    region = np.array(box) * (width, height, width, height)
    assert abs(region - region.round()).max() < 1e-9
    cut = image.crop(region.round().astype(int).tolist())
    resized = cut.resize((w, h), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels(crop), resized)


@given(*[st.integers(33, 300)] * 2, st.integers(8, 112))
def test_evaluation_is_torchvisions_resize_and_center_crop(width, height, size):
    image = noise(width, height)
    crop, box, flip = eval_view(image, (size, size))
    resized = v2.Resize(round(size * 256 / 224), BICUBIC)(image)
    np.testing.assert_array_equal(pixels(crop), v2.CenterCrop(size)(resized))
    region = np.array(box) * (*resized.size, *resized.size)
    assert abs(region - region.round()).max() < 1e-9 and not flip
    cut = resized.crop(region.round().astype(int).tolist())
    np.testing.assert_array_equal(pixels(crop), cut)


def test_evaluation_box_by_hand():
    # 128 x 64 must be covered: 128 x 85, center 112 x 56.
    box = (8 / 128, 14 / 85, 120 / 128, 70 / 85)
    assert eval_view(noise(300, 200), (56, 112))[1:] == (pytest.approx(box), False)


@given(*[st.integers(28, 99)] * 2)
def test_tiny_images_are_only_resized(width, height):
    crop, box, _ = eval_view(noise(width, height), (28, 28))
    resized = noise(width, height).resize((28, 28), Image.Resampling.BICUBIC)
    whole = min(width, height) <= 32
    assert (box == (0, 0, 1, 1)) is whole is np.array_equal(pixels(crop), resized)


@pytest.mark.parametrize("axis", [0, 1])
def test_middle_of_strips(axis):
    """Resizing only the middle changes nothing but the rounding."""
    y, x = np.mgrid[:40, :1200]
    waves = np.uint8(127 + 60 * np.sin(x / 8) + 60 * np.sin(y / 5))
    image = Image.fromarray(waves.T if axis else waves)
    crop, box, _ = eval_view(image, (28, 28))
    expected = v2.CenterCrop(28)(v2.Resize(32, BICUBIC)(image))
    got, want = pixels(crop), np.array(expected)
    assert abs(got - want).max() <= 1 and (got != want).mean() < 0.05
    # A region one pixel aside is not taken for it.
    assert abs(got[1:-1, 2:] - want[1:-1, 1:-1]).max() > 5
    assert abs(got[2:, 1:-1] - want[1:-1, 1:-1]).max() > 5
    sides = np.subtract(box[2:], box[:2])
    assert np.allclose(sides[:: -1 if axis else 1], [28 / 960, 28 / 32])


def test_rand_augment_is_a_function_of_the_seed():
    view = partial(train_view, scale=(0.08, 1.0))
    augmented = partial(view, after=rand_augment((0.5, 0.5, 0.5)))
    changed, areas = [], []
    for seed in range(60):
        (crop, box, _), again = (augmented(ramp(48, 40), (32, 32), seed) for _ in "ab")
        plain, same_box, _ = view(ramp(48, 40), (32, 32), seed)
        assert crop.equal(again[0]) and box == same_box
        changed.append(not crop.equal(plain))
        areas.append((box[2] - box[0]) * (box[3] - box[1]))
    assert min(areas) < 0.15 and max(areas) > 0.8
    # Neither of two operations has a probability of 0.25; some have no effect.
    assert 0.5 < np.mean(changed) < 0.85


# -- JPEG ------------------------------------------------------------------------------


def jpeg(path, image, **options):
    image.save(path, quality=95, **options)
    return Jpeg.open(path)


KINDS = {"444": {"subsampling": 0}, "420": {"subsampling": 2}}
KINDS |= {"progressive": {"progressive": True}, "comment": {"comment": bytes(70)}}


@pytest.mark.parametrize("kind", KINDS)
@given(*[st.integers(33, 380)] * 2, st.integers(96, 128), SEEDS)
def test_jpegs_are_decoded_and_resized_as_by_pillow(
    tmp_path, kind, width, height, size, seed
):
    # Without black and white, where each of the two passes would clip.
    image = noise(width, height).point(lambda x: 64 + x // 2)
    fast = jpeg(tmp_path / "0.jpg", image, **KINDS[kind])
    slow = load_image(tmp_path / "0.jpg")
    assert fast.size == slow.size == (width, height)
    for view in (eval_view, partial(train_view, seed=seed)):
        (a, *box), (b, *other) = (view(x, (size, size)) for x in (fast, slow))
        assert box == other
        # Most of it is the order of the two passes.
        error = abs(pixels(a) - pixels(b))
        assert error.mean() < 0.5 and error.max() <= 2


def test_only_plain_jpegs_are_fast(tmp_path):
    """CMYK, gray and other files are Pillow's."""
    for name, mode in (("0.jpg", "CMYK"), ("1.jpg", "L"), ("2.png", "RGB")):
        noise(60, 50).convert(mode).save(tmp_path / name)
        assert Jpeg.open(tmp_path / name) is None
    for content in (b"", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8\xff\xc0\0\x11"):
        (tmp_path / "3.jpg").write_bytes(content)
        data = open_data(tmp_path, size=32, augment=True)
        assert [data[0, i].index for i in range(4)] == [0, 1, 2, 0]


@given(RANDOM)
def test_damaged_jpegs_are_those_of_pillow(tmp_path, rng):
    noise(60, 50).save(tmp_path / "0.jpg", progressive=rng.random() < 0.5)
    content = (tmp_path / "0.jpg").read_bytes()
    path = tmp_path / "1.jpg"
    path.write_bytes(damage(content, rng))
    try:
        image = to_8_bits(load_image(path))
    except Exception:
        image = None
    data = open_data(path, size=32)
    if image is None:
        with pytest.raises(ValueError, match="none of the 1"):
            data[0]
    else:
        assert data[0].box.tolist() == pytest.approx(eval_view(image, (32, 32))[1])


@pytest.mark.parametrize("size", [(5, 5), (32, 24)])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_views_and_maps_are_aligned(tmp_path, suffix, size):
    """To 1/100 pixel: a map that is painted into its image has the mean of the view."""
    # Without noise, all means of neighbors would be rounded up.
    random = np.random.default_rng(0).integers(-3, 4, (96, 128))
    x, y = (np.uint8(side + random) for side in np.mgrid[40:136, 40:168][::-1])
    for i, gray in enumerate((x, y, 255 - x, 255 - y)):
        image = Image.fromarray(gray).convert("RGB")
        write(tmp_path / f"{i}.{suffix}", image, quality=100)
    data = open_data(tmp_path)
    images = [data.read(i, 3)[0] for i in range(4)]
    maps = np.stack([data.read(i)[0].convert("L") for i in range(4)])
    offsets, moved = [], []
    # The smallest views are decoded at 1/2 to 1/8.
    pixel = 4 if size == (5, 5) else 1
    for seed in range(200):
        views, boxes, _ = zip(*[train_view(x, size, seed) for x in images], strict=True)
        means = torch.stack(views).double().mean(dim=(1, 2, 3))
        for shift, values in ((0, offsets), (0.03 * pixel / 96, moved)):
            boxes_4 = torch.tensor(boxes) + shift
            no = torch.zeros(4, dtype=torch.bool)
            m = attg_mae.pool_maps(torch.from_numpy(maps), boxes_4, no, size)
            error = means - m.mean(dim=1)
            # A pixel is one gray level. Decoders round negatives alike.
            values.append((error[:2] - error[2:]) / 2)
    to_right_and_down, shifted = (torch.stack(x).mean(dim=0) for x in (offsets, moved))
    assert abs(to_right_and_down).max() < 0.01 * pixel < abs(shifted).min()


def test_large_jpegs_are_decoded_at_reduced_size(tmp_path, monkeypatch):
    y, x = np.mgrid[:1201, :1603]
    waves = [np.sin(x / 9) + np.sin(y / 7), np.sin((x + y) / 15), np.sin(x / 40)]
    image = Image.fromarray(np.uint8(127 + 50 * np.stack(waves, -1)))
    fast = jpeg(tmp_path / "0.jpg", image)
    scales, load = set(), Jpeg.load
    spy = lambda self, scale=1: scales.add(scale) or load(self, scale)  # noqa: E731
    monkeypatch.setattr(Jpeg, "load", spy)
    for seed in range(24):
        size = (48, 64) if seed % 2 else (96, 128)
        a, b = (
            train_view(x, size, seed)[0] for x in (fast, load_image(tmp_path / "0.jpg"))
        )
        error = abs(pixels(a) - pixels(b))
        assert error.mean() < 1
        # One pixel aside the difference is larger.
        assert abs(pixels(a)[:, 1:] - pixels(b)[:, :-1]).mean() > 1.5
    assert scales == {2, 4, 8}


# -- Damaged and odd files -------------------------------------------------------------


SIDES = (1, 2, 31, 33, 70, 300)


def odd_image(folder, rng):
    """Write an image. Returns its path, (w, h), and whether it is sound."""
    width, height = rng.choice(SIDES), rng.choice(SIDES)
    if rng.random() < 0.15:
        # A header that promises more, or less, than there is.
        height = rng.choice((*SIDES, 10**6, 2**31 - 1))
        path = folder / "0.png"
        path.write_bytes(png(width, height, row=bytes(30), rows=3))
        return path, (width, height), False
    random = np.random.default_rng(rng.randrange(2**32))
    image, _ = image_of(rng.choice(ALL_MODES), random, (height, width))
    path = folder / f"0{rng.choice(('.png', '.jpg', '.tif', '.bmp', '.webp', '.ppm'))}"
    try:
        image.save(path)
    # This format has no such mode.
    except (OSError, KeyError):
        image.convert("RGB").save(path)
    sound = rng.random() < 0.3
    if not sound:
        path.write_bytes(damage(path.read_bytes(), rng))
    return path, (width, height), sound


def test_odd_images(tmp_path, capsys):
    """Each is seen, or replaced by the sound one beside it, and nothing else happens."""
    limit = 50_000
    base = largest_memory(reset=True)

    @given(RANDOM, st.sampled_from([1, 3]), SEEDS)
    def check(rng, channels, seed):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        write(folder / "1.bmp", noise(9, 9))
        path, (width, height), sound = odd_image(folder, rng)
        options = {"augment": True, "channels": channels, "max_pixels": limit}
        data = open_data(folder, size=16, seed=seed, **options)
        with within(20):
            samples = data[0], data[seed, 0], data[0, 1]
        for sample in samples:
            assert sample.image.shape == (channels, 16, 16)
            assert 0 <= sample.box.min() and sample.box.max() <= 1.00001
        replaced = samples[0].index
        assert replaced == samples[1].index
        if sound:
            assert replaced == int(width * height > limit)
        # Reported once, by its full path.
        assert capsys.readouterr().err.count(f"replaces it: {path} (") == replaced

    check()
    assert largest_memory() - base < 200e6


def test_decompression_bombs(tmp_path):
    """Small files of many pixels take bounded memory and time."""
    (tmp_path / "0.png").write_bytes(png(500_000, 33))
    (tmp_path / "1.png").write_bytes(png(33, 500_000))
    (tmp_path / "2.png").write_bytes(png(13_000, 13_000, 16, 0, bytes(2 * 13_000)))
    write(tmp_path / "3.png", noise(9, 9))
    data = open_data(tmp_path, size=224, augment=True)
    base, began = largest_memory(reset=True), time.process_time()
    with warnings.catch_warnings():
        # Pillow's own, about the third.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        rows = [[data[i].index, data[0, i].index] for i in range(3)]
    assert rows == [[0, 0], [1, 1], [3, 3]] and time.process_time() - began < 12
    # Resized as a whole, the strips would take 4.5 GB.
    assert largest_memory() - base < 400e6


def test_pixels_are_counted_before_decoding(tmp_path):
    path = write(tmp_path / "0.png", noise(60, 50))
    # Cut off after the header: decoding would fail with another error.
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="60 x 50 pixels, above --max_pixels 2999"):
        load_image(path, 2999)
    with pytest.raises(OSError, match="truncated"):
        load_image(path, 3000)
