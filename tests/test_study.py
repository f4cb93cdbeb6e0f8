"""
study.py: variants, paired differences and their intervals, a whole study that is resumed.
"""

import importlib
import json
import math
import os
import signal
import threading

import numpy as np
import pytest
from PIL import Image

import study
from attg.datasets import open_data
from attg.maps import load_maps, save_maps
from attg.toy import TOY_CLASSES, toy
from tests.helpers import write


def test_variants_are_flags_of_the_training():
    assert study.variant_flags("none") == ("none", ["--guidance", "none"])
    assert study.variant_flags("cut") == ("cut", [])
    assert study.variant_flags("masks+inverted")[1] == ["--guidance", "inverted"]
    changed = ["--tau", "0.7", "--tau_schedule", "constant"]
    assert study.variant_flags("cut+tau0.7+constant") == ("cut", changed)


def test_quantiles_and_intervals_equal_scipy():
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
        saved(tmp_path, "cut+tau0.7", seed, guided[seed])
    (tmp_path / "cut+tau0.7-seed9").mkdir()  # not evaluated yet
    first, gray, second, _ = study.table_rows(study.read_study(tmp_path))
    assert (gray["metric"], gray["mean"]) == ("k-NN, k = 20, gray", 7)
    assert (first["variant"], first["n"], first["mean"]) == ("none", 4, 40)
    assert math.isclose(first["sd"], np.std([40, 50, 60, 10], ddof=1))
    assert "difference" not in first
    # Seed 5 has no partner: it counts for the mean, not for the difference.
    assert (second["n"], second["mean"]) == (4, 63.75)
    assert (second["pairs"], second["difference"]) == (3, 2)
    want = stats.ttest_1samp([1, 2, 3], 0).confidence_interval(0.95)
    assert math.isclose(second["low"], want.low, rel_tol=1e-4)
    # Unpaired, three seeds that far apart would hide a difference of 2.
    unpaired = stats.ttest_ind([41, 52, 63], [40, 50, 60])
    assert unpaired.confidence_interval(0.95).low < -10 < second["low"]

    study.main(["--table", str(tmp_path)])
    text = (tmp_path / "table.md").read_text()
    assert "| none | 4 | 40.00 ± 21.60 |" in text
    assert "| cut+tau0.7 | 3 | +2.00 [-0.48, +4.48] |" in text
    rows = [json.loads(x) for x in (tmp_path / "table.jsonl").read_text().splitlines()]
    assert rows[2]["values"] == {"0": 41, "1": 52, "2": 63, "5": 99}
    assert not (tmp_path / "curves.png").exists()


@pytest.fixture(scope="module")
def images_with_maps(tmp_path_factory):
    """A folder of 256 and 64 toy images, and their exact masks as exact.npy."""
    folder = tmp_path_factory.mktemp("study")
    for split, number in (("train", 256), ("test", 64)):
        images, _, labels = toy(split)
        for i in range(number):
            name = TOY_CLASSES[labels[i]]
            path = folder / "data" / split / name / f"{i:04d}.png"
            write(path, Image.fromarray(images[i]))
    dataset = open_data(str(folder / "data"), "train")
    rows = [int(name.rpartition("/")[2].removesuffix(".png")) for name in dataset.names]
    save_maps(folder / "exact.npy", toy("train")[1][rows], dataset, method="masks")
    return folder


def test_gaussian_maps_are_centered(images_with_maps):
    path = images_with_maps / "gaussian.npy"
    study.gaussian_maps(path, str(images_with_maps / "data"))
    maps, manifest = load_maps(path, open_data(str(images_with_maps / "data"), "train"))
    m = np.float64(maps[0])
    assert manifest["method"] == "gaussian" and (maps == maps[0]).all()
    assert (m == m[::-1]).all() and (m == m.T).all()
    assert m.max() == m[6, 6] == 1 and m.min() == m[0, 0] == 0
    # Min-max normalized: at a quarter of the side from the center exp(-1/2) of the top.
    distance = (np.arange(14) - 6.5) / 14
    raw = np.exp(-(distance**2) / (2 * 0.25**2))
    raw = np.outer(raw, raw)
    want = (raw - raw.min()) / (raw.max() - raw.min())
    assert np.abs(m - want).max() < 1e-3


@pytest.fixture
def in_process(monkeypatch):
    """Run the programs in this process; a list of those that ran."""
    ran = []

    def run(log, program, *flags):
        ran.append(program)
        log.open("a").write(f"$ {program}\n")
        module = importlib.import_module(program.removesuffix(".py"))
        module.main([str(flag) for flag in flags])

    monkeypatch.setattr(study, "run_program", run)
    return ran


def test_a_study_is_resumed(images_with_maps, in_process, monkeypatch, capsys):
    folder = images_with_maps
    out, results = folder / "out", folder / "results"
    flags = f"--data {folder}/data --maps exact={folder}/exact.npy "
    flags += f"--variants none exact --seeds 0 1 --out {out} --results {results} "
    flags += "--evaluate knn -- --epochs 2 --batch_size 32 --eval_every 1 --width 32"
    flags += " --depth 1"
    run = study.run_program

    def interrupted(log, program, *flags):
        if len(in_process) == 3:
            raise KeyboardInterrupt
        run(log, program, *flags)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(study, "run_program", interrupted)
        study.main(flags.split())
    assert in_process == ["attg_mae.py", "eval_knn.py", "attg_mae.py"]
    rows = study.main(flags.split())
    # What had been done was not done again: 4 runs, 4 evaluations.
    assert len(in_process) == 8
    runs = ["exact-seed0", "exact-seed1", "none-seed0", "none-seed1"]
    assert sorted(p.name for p in results.iterdir() if p.is_dir()) == runs
    for name in runs:
        files = {"config.json", "eval.txt", "knn.jsonl", "log.jsonl", "log.txt"}
        assert {p.name for p in (results / name).iterdir()} == files
        config = json.loads((results / name / "config.json").read_text())
        assert f"seed{config['seed']}" in name
        assert config["guidance"] == ("none" if "none" in name else "attg")
        # The last step's k-NN is that of the evaluation.
        last = [json.loads(x) for x in (results / name / "log.jsonl").open()][-1]
        evaluated = study.read_metrics(results / name)
        for feature in study.FEATURES:
            assert evaluated["k-NN, k = 20", feature] == last["knn"][feature]
    assert len(rows) == 8 and all(row["n"] == 2 for row in rows)
    differences = [row["difference"] for row in rows if row["variant"] == "exact"]
    assert any(abs(x) > 0.1 for x in differences)
    assert "| exact | 2 |" in capsys.readouterr().out
    assert Image.open(results / "curves.png").width > 500


def test_a_failed_run_leaves_the_others(images_with_maps, monkeypatch, capsys):
    monkeypatch.chdir(images_with_maps)

    def run(log, program, *flags):
        if "exact.npy" in map(str, flags):
            raise ChildProcessError("python attg_mae.py: exit code 1")

    monkeypatch.setattr(study, "run_program", run)
    flags = "--name bad --data data --maps exact=exact.npy --variants none exact"
    with pytest.raises(ChildProcessError, match="2 runs failed.*exit code 1.*again"):
        study.main([*flags.split(), "--seeds", "0", "1"])
    assert capsys.readouterr().out.count("none-seed") == 4


def test_a_program_that_fails_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    log = tmp_path / "log.txt"
    log.write_text("x.py: error: of an earlier try\n")
    for code, message in (
        (
            "print('x.py: error: this'); print('see --help'); exit(2)",
            "x.py: error: this",
        ),
        ("print('last line'); exit(3)", "last line"),
        ("exit(1)", "no output"),
    ):
        (tmp_path / "x.py").write_text(code)
        with pytest.raises(ChildProcessError, match=f"x.py --k 0: .*, {message} "):
            study.run_program(log, "x.py", "--k", 0)
    assert "$ python x.py --k 0    # " in log.read_text()


def test_an_interrupted_program_may_save(monkeypatch, tmp_path):
    """A signal to the study ends the program by SIGTERM, and waits for its end."""
    monkeypatch.setattr(study, "ROOT", tmp_path)
    (tmp_path / "x.py").write_text(
        "import pathlib, signal, sys, time\n"
        "here = pathlib.Path(__file__).parent\n"
        "def save(*_): time.sleep(0.2); (here / 'saved').touch(); sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save); (here / 'ready').touch(); time.sleep(60)\n"
    )

    def interrupt():
        while not (tmp_path / "ready").exists():
            pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        study.run_program(tmp_path / "log.txt", "x.py")
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("--variants cut", "--variants cut --maps cut=FILE.npy"),
        ("--variants none+inverted", "--variants none+inverted vanilla"),
        ("--variants masks+upside", "--variants masks+upside +upside inverted"),
        ("--variants self", "--variants self none"),
        ("--maps a=none.npy --variants a", "--maps a=none.npy file"),
        ("--evaluate linear", "--evaluate knn"),
        ("--table nowhere", "nowhere no results"),
        ("-- --seed 3", "--seed study"),
    ],
)
def test_study_errors(flags, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        study.main(flags.split())
    assert [x for x in named.split() if x not in str(error.value)] == []
    assert list(tmp_path.iterdir()) == []
