"""
study.py: variants, paired differences and their intervals, a whole study that is resumed.
"""

import importlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import study
from attg.datasets import open_data
from attg.features import FEATURES
from attg.maps import load_maps
from tests.helpers import make_images, make_maps


def test_intervals_equal_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom, quantile in enumerate(study.T_975, start=1):
        assert abs(quantile - stats.t.ppf(0.975, freedom)) < 1e-4
    random = np.random.default_rng(0)
    for n in (2, 3, 5, 17):
        values = random.normal(3, 2, n)
        want = stats.ttest_1samp(values, 0).confidence_interval(0.95)
        mean, low, high = study.interval(values.tolist())
        assert math.isclose(mean, values.mean())
        assert abs(low - want.low) < 1e-4 * (high - low)
        assert abs(high - want.high) < 1e-4 * (high - low)
        # The normal distribution's 1.96 would be too narrow for so few.
        normal = mean - 1.96 * values.std(ddof=1) / math.sqrt(n)
        assert abs(low - normal) > 0.01
    assert study.interval([4.0])[0] == 4 and math.isnan(study.interval([4.0])[1])


def saved(folder, variant, seed, top1):
    """Write a run's folder as the evaluations leave it; the last line counts."""
    row = {"feature": "class_token", "protocol": "k-NN", "k": 20, "top-5": 90.0}
    other = row | {"test": "gray", "top-1": 7.0}
    lines = [{"results": [row | {"top-1": x}, other]} for x in (1.0, top1)]
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
    assert (gray["metric"], gray["mean"]) == ("k-NN, k = 20, gray", 7)
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
    assert "| none | 4 | 40.00 ± 21.60 |" in text
    assert text.endswith(
        "\n| cut+tau=0.7 | 3 | +2.00 [-0.48, +4.48] | +0.00 [+0.00, +0.00] |\n"
    )


def test_a_study_is_resumed(tmp_path, monkeypatch, capsys):
    """What has been done is not done again; the runs differ as the variants say."""
    data, out, ran = tmp_path / "data", tmp_path / "out", []
    for name in "abc":
        # Classes that are hard to tell apart.
        make_images(data / "train" / name, 12)
        make_images(data / "test" / name, 9)
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
    variants = {"none": "none", "bright+tau=0.6": "attg"}
    for seed in (0, 1):
        for variant, guidance in variants.items():
            run = out / f"{variant}-seed{seed}"
            config = json.loads((run / "config.json").read_text())
            assert (config["seed"], config["guidance"]) == (seed, guidance)
            assert config["tau"] == (0.6 if "tau" in variant else 0.75)
            # The last step's k-NN is that of the evaluation.
            last = study.read_lines(run / "log.jsonl")[-1]
            for feature in FEATURES:
                evaluated = study.read_metrics(run)["k-NN, k = 20", feature]
                assert math.isclose(evaluated, last["knn"][feature], rel_tol=1e-6)
    assert len(rows) == 2 * 8 and all(row["n"] == 2 for row in rows)
    assert any(abs(row.get("difference", 0)) > 0.1 for row in rows)

    capsys.readouterr()
    runs = [str(out / name) for name in ("none-seed0", "bright+tau=0.6-seed0")]
    study.main(["--compare", *runs])
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    assert ["guidance", "none", "attg"] in lines and ["tau", "0.75", "0.6"] in lines
    assert "epochs" not in text and "val_mse" in text
    sheets = [Image.open(Path(run, "reconstructions.png")) for run in runs]
    both = Image.open(out / "compare.png")
    assert both.width >= sum(sheet.width for sheet in sheets)
    assert both.height > sheets[0].height + 400


def test_gaussian_maps_are_centered(plain, tmp_path):
    study.gaussian_maps(tmp_path / "gaussian.npy", plain)
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
    with pytest.raises(ValueError) as error:
        study.main(flags.split())
    assert [x for x in named.split() if x not in str(error.value)] == []
    with pytest.raises(SystemExit):
        study.main(["--variants", "masks+upside=1"])
    assert list(tmp_path.iterdir()) == []
