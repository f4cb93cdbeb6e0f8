"""
study.py: variants, paired differences and their intervals, a whole study that is resumed.
"""

import hashlib
import importlib
import itertools
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import study
from attg import figures
from attg.cli import parse
from attg.datasets import open_data
from attg.features import FEATURES
from attg.maps import load_maps
from docs import study_data
from tests.helpers import make_images, make_maps, noise, refused, write


def test_intervals_have_the_quantiles_of_printed_tables():
    random = np.random.default_rng(0)
    table = {(3, 0.95): 4.303, (5, 0.95): 2.776, (5, 0.975): 3.495, (10, 0.975): 2.685}
    for (n, level), quantile in table.items():
        values = random.normal(1, 2, n)
        mean, low, high, p = study.interval(values.tolist(), level)
        half = quantile * values.std(ddof=1) / n**0.5
        assert np.allclose(
            [mean, high - mean, mean - low], [values.mean(), half, half], 1e-3
        )
        # An interval of level 1 - p ends at 0.
        ends = study.interval(values.tolist(), 1 - p)[1:3]
        assert min(map(abs, ends)) < 1e-9 * half
    assert study.interval([0.0, 0.0]) == (0, 0, 0, 1)
    assert study.interval([4.0])[0] == 4 and math.isnan(study.interval([4.0])[1])


def saved(folder, variant, seed, *top1):
    """Write a run's folder as the evaluations leave it; the last line counts.

    top1: for one or both of FEATURES.
    """
    rows = []
    for feature, value in zip(FEATURES, top1, strict=False):
        row = {"feature": feature, "protocol": "k-NN", "k": 20, "top-5": 90.0}
        rows += [row | {"top-1": value}, row | {"test": "gray", "top-1": 7.0}]
    lines = [{"results": [row | {"top-1": 1.0} for row in rows]}, {"results": rows}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    file = folder / f"{variant}-seed{seed}" / "knn.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(text)


def test_differences_are_those_of_the_same_seed(tmp_path):
    stats = pytest.importorskip("scipy.stats")
    vanilla = {0: 40.0, 1: 50.0, 2: 60.0, 7: 10.0}
    guided = {0: 41.0, 1: 52.0, 2: 63.0, 5: 99.0}
    for seed in vanilla:
        saved(tmp_path, "none", seed, vanilla[seed])
    for seed in guided:
        saved(tmp_path, "cut+tau=0.7", seed, guided[seed])
    (tmp_path / "cut+tau=0.7-seed9").mkdir()  # not evaluated yet
    first, gray, second, _ = study.main(["--table", str(tmp_path)])
    assert (gray["metric"], gray["mean"]) == ("gray: k-NN, k = 20", 7)
    assert (first["variant"], first["n"], first["mean"]) == ("none", 4, 40)
    assert math.isclose(first["sd"], np.std([40, 50, 60, 10], ddof=1))
    # Seed 5 has no partner: it counts for the mean, not for the difference.
    assert (second["n"], second["mean"]) == (4, 63.75)
    assert (second["pairs"], second["difference"]) == (3, 2)
    want = stats.ttest_1samp([1, 2, 3], 0).confidence_interval(0.95)
    assert math.isclose(second["low"], want.low, rel_tol=1e-4)
    # Unpaired, three seeds that far apart would hide a difference of 2.
    unpaired = stats.ttest_ind([41, 52, 63], [40, 50, 60])
    assert unpaired.confidence_interval(0.95).low < -10 < second["low"]
    text = (tmp_path / "table.md").read_text()
    assert "| metric | feature | none, n = 4 | cut+tau=0.7, n = 4 |" in text
    assert "| k-NN, k = 20 | class token | 40.00 ± 21.60 | 63.75 ± 25.16 |" in text
    assert text.endswith(
        "| cut+tau=0.7, n = 3 |\n| --- | --- | --- |\n"
        "| k-NN, k = 20 | class token | +2.00 [-0.48, +4.48] |\n"
        "| gray: k-NN, k = 20 | class token | +0.00 [+0.00, +0.00] |\n"
    )


def test_table_of_one_seed_has_no_nan(tmp_path):
    for variant in ("none", "box"):
        saved(tmp_path, variant, 3, 40.0)
    study.main(["--table", str(tmp_path)])
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert "| k-NN, k = 20 | class token | 40.00 | 40.00 |" in lines
    assert "| k-NN, k = 20 | class token | +0.00 |" in lines


# Names, differences of the seeds 0, 1, ... and numbers of seeds of the looks.
CONTRASTS = {
    "first": ([3.0, 3.5, 2.5, 3.2, 2.9, -90.0], [5, 6]),
    "second": ([-1.0, -2.5, 0.5, -1.2, -0.9, -1.1, -1.0, -1.3], [4, 8]),
    "between": ([0.1, 0.9, 0.7], [3]),
    "opposite": ([-0.1, -0.9, -0.7], [3]),  # the same p
    "neither": ([0.4, -0.3, 0.2, 0.1], [2, 4]),
    "missing": ([0.4, -0.3, 0.2], [2, 4]),
    "early": ([3.0], [2]),
}


def test_contrasts_are_answered_by_complete_looks(tmp_path):
    stats = pytest.importorskip("scipy.stats")
    entries = []
    for name, (differences, looks) in CONTRASTS.items():
        for seed, difference in enumerate(differences):
            saved(tmp_path / name, "none", seed, 50.0 + seed, 60.0)
            # On the average of both features.
            guided = 50.0 + seed + difference - 4, 60.0 + difference + 4
            saved(tmp_path / name, "box", seed, *guided)
        entry = {"question": name, "study": name, "variant": "box", "control": "none"}
        entry |= {"metric": "k-NN, k = 20", "features": list(FEATURES)}
        entries.append(entry | {"looks": [list(range(n)) for n in looks]})
    saved(tmp_path / "missing", "none", 3, 53.0, 60.0)
    (tmp_path / "contrasts.json").write_text(json.dumps(entries))
    rows = study.main(["--table", str(tmp_path)])
    rows = {row["question"]: row for row in rows}
    answers = ["above 0", "below 0", *["undecided"] * 3]
    answers += ["open, 7 of 8 runs", "open, 2 of 4 runs"]
    assert [row["answer"] for row in rows.values()] == answers
    p_values = {}
    ends = {"first": 5, "second": 8, "between": 3, "opposite": 3, "neither": 4}
    for name, n in ends.items():
        differences, looks = CONTRASTS[name]
        test = stats.ttest_1samp(differences[:n], 0)
        low, high = test.confidence_interval(1 - 0.05 / len(looks))
        mean = np.mean(differences[:n])
        assert rows[name]["n"] == n
        assert rows[name]["difference"] == f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
        p_values[name] = min(1, len(looks) * test.pvalue)
        assert rows[name]["p"] == f"{p_values[name]:.2g}"
    # Holm's method is the closure of Bonferroni's.
    all_p = p_values | dict.fromkeys(("early", "missing"), 1)
    subsets = [x for k in range(1, 8) for x in itertools.combinations(all_p, k)]
    for name, p in p_values.items():
        bounds = [
            min(1, len(subset) * min(all_p[x] for x in subset))
            for subset in subsets
            if name in subset
        ]
        assert rows[name]["p, Holm"] == f"{max(bounds):.2g}"
        assert max(bounds) > p or p == 1 or p == max(p_values.values())
    # The first look, which is not the answer, is shown; nothing is if it is incomplete.
    assert rows["missing"]["n"] == 2 and "p" not in rows["missing"]
    assert "n" not in rows["early"]
    text = (tmp_path / "contrasts.md").read_text()
    assert (
        "| early | early | k-NN, k = 20 | class token, patch mean | box - none | open"
        in text
    )


def test_a_study_is_resumed(tmp_path, monkeypatch, capsys):
    """What has been done is not done again; the runs differ as the variants say."""
    data, out, ran = tmp_path / "data", tmp_path / "out", []
    for name in "abc":
        # Classes that are hard to tell apart; hue 3 is the color of hue 0.
        make_images(data / "train" / name, 12)
        make_images(data / "test" / name, 9, hue=3)
    maps = make_maps(tmp_path / "maps.npy", data)
    flags = f"--data {data} --maps bright={maps} --variants bright+tau=0.6 --seeds 0 1 "
    flags += f"--out {out} -- --epochs 4 --batch_size 8 --lr 0.01 --width 32 --depth 1"

    def call(argv, stdout, stderr):
        if len(ran) == 5:
            raise KeyboardInterrupt
        ran.append(argv[1].name)
        importlib.import_module(argv[1].stem).main(argv[2:])
        return 0

    monkeypatch.setattr(study.subprocess, "call", call)
    with pytest.raises(KeyboardInterrupt):
        study.main(flags.split())
    one_run = ["attg_mae.py", "eval_knn.py", "eval_knn.py", "eval_linear.py"]
    assert ran == [*one_run, "attg_mae.py"]
    # Room for the rest, then no program should run.
    ran.insert(0, None)
    rows = study.main(flags.split())
    assert len(ran) == 1 + 4 * 4
    assert study.main(flags.split()) == rows and len(ran) == 17
    # All seeds of a variant have the same maps.
    make_maps(maps, data, flat=True)
    with refused("bright+tau=0.6-seed0/last.pt --maps content"):
        study.main(flags.split())
    make_maps(maps, data)
    with pytest.raises(ValueError, match="encoder.pt was not made by .* 5.*--out"):
        study.main(flags.replace("--epochs 4", "--epochs 5").split())
    variants = {"none": "none", "bright+tau=0.6": "attg"}
    for seed in (0, 1):
        for variant, guidance in variants.items():
            run = out / f"{variant}-seed{seed}"
            config = json.loads((run / "config.json").read_text())
            assert (config["seed"], config["guidance"]) == (seed, guidance)
            assert config["tau"] == (0.6 if "tau" in variant else 0.75)
            # The evaluation is that of the run's own encoder.
            last = study.read_lines(run / "log.jsonl")[-1]["knn"]["patch_mean"]
            evaluated = study.read_metrics(run)["k-NN, k = 20", "patch_mean"]
            assert math.isclose(evaluated, last, rel_tol=1e-6)
    assert len(rows) == 2 * 8 and all(row["n"] == 2 for row in rows)
    assert any(abs(row.get("difference", 0)) > 0.1 for row in rows)

    capsys.readouterr()
    runs = [str(out / name) for name in ("none-seed0", "bright+tau=0.6-seed0")]
    study.main(["--compare", *runs])
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    assert ["guidance", "none", "attg"] in lines and ["tau", "0.75", "0.6"] in lines
    assert "epochs" not in text and "val_mse" in text
    sheet, both = Image.open(f"{runs[0]}/reconstructions.png"), out / "compare.png"
    width, height = Image.open(both).size
    assert width >= 2 * sheet.width and height > sheet.height + 400
    # Without matplotlib and reconstructions.
    for path in (both, *out.glob("*/reconstructions.png")):
        path.unlink()
    monkeypatch.setattr(figures, "find_spec", lambda _: None)
    study.main(["--compare", *runs])
    text = capsys.readouterr().out
    assert "pip install matplotlib" in text and "figure:" not in text


@given(st.integers(2, 40), st.integers(0, 2**32))
def test_shuffled_maps_are_those_of_other_images(n, seed):
    maps = np.arange(n)
    shuffled = study.shuffle(maps, seed)
    assert sorted(shuffled) == list(maps) and (shuffled != maps).all()
    assert n < 9 or (shuffled != study.shuffle(maps, seed + 1)).any()


def test_maps_of_the_own_encoder(plain, tmp_path, monkeypatch):
    """none, then self, whose maps self-shuffled takes."""
    ran = []

    def run_program(output, log, program, *flags):
        ran.append((output.parent.name, program))
        if program == "object_discovery.py":
            make_maps(output.with_suffix(".npy"), plain)
        elif "self" in output.parent.name:
            assert (flags[-4], flags[-3]) == ("--maps", output.with_name("maps.npy"))

    monkeypatch.setattr(study, "run_program", run_program)
    monkeypatch.setattr(study, "evaluate", lambda settings, folder: None)
    monkeypatch.setattr(study, "write_table", lambda folder: None)
    flags = f"--data {plain} --variants self-shuffled --seeds 4 --out {tmp_path}"
    study.run_study(parse(study.Settings, "", flags.split()))
    variants = ["none", "self", "self", "self-shuffled"]
    programs = ["attg_mae.py", "object_discovery.py", "attg_mae.py", "attg_mae.py"]
    names = [f"{variant}-seed4" for variant in variants]
    assert ran == list(zip(names, programs, strict=True))
    own, shuffled = (np.load(tmp_path / name / "maps.npy") for name in names[2:])
    assert np.array_equal(shuffled, study.shuffle(own, 4))


def test_all_programs_of_a_study_keep_the_same_classes(tmp_path, monkeypatch):
    ran = {}
    for name in "abc":
        make_images(tmp_path / "data" / "train" / name, 3)
    (tmp_path / "two.txt").write_text("a\nc\n")

    def record(output, log, program, *flags):
        ran[program] = flags

    monkeypatch.setattr(study, "run_program", record)
    monkeypatch.setattr(study, "write_table", lambda folder: None)
    flags = f"--data {tmp_path}/data --variants self gaussian --out {tmp_path}"
    settings = parse(study.Settings, "", flags.split())
    settings.train = ("--classes", f"{tmp_path}/two.txt")
    study.run_study(settings)
    manifest = json.loads((tmp_path / "gaussian.json").read_text())
    assert manifest["shape"] == [6, 14, 14]
    # Without --data these take data and classes of the encoder.
    for program in ("object_discovery.py", "eval_knn.py", "eval_linear.py"):
        assert "--data" not in ran[program]


def test_gaussian_maps_are_centered(plain, tmp_path):
    study.gaussian_maps(tmp_path / "gaussian.npy", open_data(plain))
    maps, manifest = load_maps(tmp_path / "gaussian.npy", open_data(plain))
    m = np.float64(maps[0])
    assert manifest["method"] == "gaussian" and (maps == maps[0]).all()
    # Min-max normalized: at a quarter of the side from the center exp(-1/2) of the top.
    distance = (np.arange(14) - 6.5) / 14
    raw = np.exp(-(distance**2) / (2 * 0.25**2))
    raw = np.outer(raw, raw)
    want = (raw - raw.min()) / (raw.max() - raw.min())
    assert np.abs(m - want).max() < 1e-3


def test_a_program_that_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    (tmp_path / "x.py").write_text("print('wrong'); exit(3)")
    log = tmp_path / "log.txt"
    with pytest.raises(ChildProcessError, match=f"x.py --k 0: exit code 3; .*{log}"):
        study.run_program(tmp_path / "output", log, "x.py", "--k", 0)
    assert re.match(r"\$ python x.py --k 0    # \S+\nwrong", log.read_text())


def test_photographs_on_other_backgrounds(tmp_path, monkeypatch):
    monkeypatch.setattr(study_data, "SUBSETS", {"small": ((0.125, 0.5), "n2 n1")})
    tiny, out = tmp_path / "tiny", tmp_path / "small"
    # A box of exactly the smallest size and one row less; the largest and one row more.
    boxes = [(0, 0, 7, 63), (3, 9, 10, 62), (0, 32, 63, 63), (0, 31, 63, 63)]
    photos = [(f"n{c}_{i}", f"n{c}", boxes[i]) for c in (1, 2, 3) for i in range(4)]
    # Validation images; the boxes of two are too large and too small for a background.
    boxes = [(i, 2 * i, i + 30, 2 * i + 20) for i in range(12)]
    boxes[9:11] = (0, 0, 63, 50), (0, 0, 20, 18)
    photos += [(f"val_{i}", f"n{1 + i % 3}", boxes[i]) for i in range(12)]
    images = {}
    for seed, (name, wnid, box) in enumerate(photos):
        folder, wnids = tiny / "train" / wnid, []
        file = folder / f"{wnid}_boxes.txt"
        if name.startswith("val"):
            folder, wnids = tiny / "val", [wnid]
            file = folder / "val_annotations.txt"
        images[name] = np.array(noise(64, 64, seed))
        photo = Image.fromarray(images[name])
        write(folder / "images" / f"{name}.JPEG", photo, format="PNG")
        with open(file, "a") as text:
            print(f"{name}.JPEG", *wnids, *box, sep="\t", file=text)
    study_data.main(tiny, out)

    digest, numbers = hashlib.sha256(), Counter()
    for file in sorted(out.glob("*/*/*")):
        numbers[file.parts[-3]] += 1
        digest.update(bytes(file.relative_to(out)))
        digest.update(np.asarray(Image.open(file)).tobytes())
    tests = dict.fromkeys(("original", "grey", "same_class", "other_class"), 6)
    assert numbers == tests | {"train": 4, "val": 6 + 6}
    # As by the program that made the data of the published runs, which drew the others.
    assert digest.hexdigest()[:16] == "07c8069da2bcfec5"
    grey, one = (
        np.array(Image.open(out / f"{x}/n1/val_0.png")) for x in list(tests)[1:3]
    )
    inside = slice(0, 21), slice(0, 31)
    for pasted, around in (
        (grey, np.full_like(grey, 128)),
        (one, images["val_6"].copy()),
    ):
        around[inside] = images["val_0"][inside]
        assert np.array_equal(pasted, around)
    maps, _ = load_maps(out / "box.npy", open_data(out))
    assert maps.sum(axis=(1, 2), dtype=int).tolist() == [512, 2048] * 2
    assert maps[::2, :, :8].all() and maps[1::2, 32:].all()
    shuffled, _ = load_maps(out / "shuffled.npy", open_data(out))
    assert np.array_equal(shuffled, study.shuffle(maps, 0))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--variants cut", "--variants cut --maps cut=FILE.npy"),
        ("--maps a=none.npy --variants a", "--maps a=none.npy file"),
        ("--table nowhere", "nowhere no results"),
        ("-- --seed 3", "--seed study"),
    ],
)
def test_study_errors(flags, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with refused(named):
        study.main(flags.split())
    with pytest.raises(SystemExit):
        study.main(["--variants", "masks+upside=1"])
    assert list(tmp_path.iterdir()) == []
