"""
The study: arms, paired differences and their intervals, a whole one that is stopped.
"""

import json
import math
import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import study
from attg.datasets import open_data
from attg.maps import load_maps, save_maps
from attg.toy import TOY_CLASSES, toy
from tests.helpers import ROOT, write
from tests.processes import state_and_session


def test_arms_are_flags_of_the_training():
    none, plain, both = map(study.parse_arm, ("none", "cut", "cut+tau0.7+constant"))
    assert none.flags == ["--guidance", "none"]
    assert plain == ("cut", "cut", [])
    assert both.source == "cut"
    assert both.flags == ["--tau", "0.7", "--tau_schedule", "constant"]
    assert study.parse_arm("masks+inverted").flags == ["--guidance", "inverted"]


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


def canned(folder, arm, seed, top1):
    """A run's folder as the evaluations leave it; the last line of a file counts."""
    row = {"feature": "class_token", "protocol": "k-NN", "k": 20, "top-5": 90.0}
    lines = [{"results": [row | {"top-1": x}]} for x in (1.0, top1)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    file = folder / f"{arm}-seed{seed}" / "knn.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(text)


def test_differences_are_those_of_the_same_seed(tmp_path):
    stats = pytest.importorskip("scipy.stats")
    vanilla = {0: 40.0, 1: 50.0, 2: 60.0, 7: 10.0}
    guided = {0: 41.0, 1: 52.0, 2: 63.0, 5: 99.0}
    for seed in vanilla:
        canned(tmp_path, "none", seed, vanilla[seed])
    for seed in guided:
        canned(tmp_path, "cut+tau0.7", seed, guided[seed])
    (tmp_path / "cut+tau0.7-seed9").mkdir()  # has not come to its evaluations
    first, second = study.table_rows(study.read_study(tmp_path))
    assert (first["arm"], first["n"], first["mean"]) == ("none", 4, 40)
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
    assert rows[1]["values"] == {"0": 41, "1": 52, "2": 63, "5": 99}
    assert not (tmp_path / "curves.png").exists()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 256 and 64 toy pictures, and their exact masks as exact.npy."""
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


def server_of(ask, folder):
    """subprocess for study.py: the server of processes, which has imported torch."""
    server = threading.Lock()

    class Forked:
        def __init__(self, argv, env, stdout, stderr):
            self.out = stdout
            with server:
                self.logs = Path(tempfile.mkdtemp(dir=folder))
                self.pid = ask([str(self.logs), {}, [str(word) for word in argv[1:]]])

        def wait(self):
            # The server waits for one process at a time: for this one when it has ended.
            while state_and_session(f"/proc/{self.pid}/stat")[0] != "Z":
                time.sleep(0.01)
            with server:
                code = ask(self.pid)
            for name in ("stdout", "stderr"):
                self.out.write((self.logs / name).read_text())
            return code

    return SimpleNamespace(Popen=Forked, STDOUT=subprocess.STDOUT)


def test_a_stopped_study_goes_on(pictures, ask, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data, out, results = (pictures / name for name in ("data", "out", "results"))
    flags = f"--data {data} --maps exact={pictures}/exact.npy --arms none exact "
    flags += f"--seeds 0 1 --jobs 2 --evaluate knn --out {out} --results {results} "
    flags += "-- --epochs 2 --batch_size 32 --eval_every 1 --width 32 --depth 1"
    pid = ask([str(tmp_path), {}, [str(ROOT / "study.py"), *flags.split()]])
    while not list(out.glob("*/train.done")):
        assert state_and_session(f"/proc/{pid}/stat")[0] != "Z"
        time.sleep(0.05)
    os.kill(pid, signal.SIGTERM)
    assert ask(pid) != 0
    trained = {p: p.stat().st_mtime_ns for p in out.glob("*/train.done")}
    assert 0 < len(trained) < 4

    monkeypatch.setattr(study, "subprocess", server_of(ask, tmp_path))
    rows = study.main(flags.split())
    # What was done is not done again.
    for path, stamp in trained.items():
        assert path.stat().st_mtime_ns == stamp
    runs = ["exact-seed0", "exact-seed1", "none-seed0", "none-seed1"]
    assert sorted(p.name for p in results.iterdir() if p.is_dir()) == runs
    files = ["config.json", "eval.txt", "knn.jsonl", "log.jsonl", "log.txt"]
    for run in runs:
        assert sorted(p.name for p in (results / run).iterdir()) == files
        config = json.loads((results / run / "config.json").read_text())
        assert f"seed{config['seed']}" in run
        assert config["guidance"] == ("none" if "none" in run else "attg")
        log = (results / run / "log.txt").read_text()
        assert f"$ python attg_mae.py --data {data} --epochs 2" in log
        # The last step's k-NN is that of the evaluation.
        last = [json.loads(x) for x in (results / run / "log.jsonl").open()][-1]
        evaluated = study.figures_of_run(results / run)
        for feature in study.FEATURES:
            assert evaluated["k-NN, k = 20", feature] == last["knn"][feature]
    measures = {(row["measure"], row["feature"]) for row in rows}
    assert len(measures) == 4 and len(rows) == 8
    assert all(row["n"] == 2 for row in rows)
    differences = [row["difference"] for row in rows if row["arm"] == "exact"]
    assert any(abs(x) > 0.1 for x in differences)
    assert "| exact | 2 |" in capsys.readouterr().out
    assert Image.open(results / "curves.png").width > 500


def test_maps_of_the_control_are_alike_and_centred(pictures):
    path = pictures / "gaussian.npy"
    study.gaussian_maps(path, str(pictures / "data"))
    maps, manifest = load_maps(path, open_data(str(pictures / "data"), "train"))
    m = np.float64(maps[0])
    assert manifest["method"] == "gaussian" and (maps == maps[0]).all()
    assert (m == m[::-1]).all() and (m == m.T).all()
    assert m.max() == m[6, 6] == 1 and m.min() == m[0, 0] == 0
    # Min-max normalized: at a quarter of the side from the centre exp(-1/2) of the top.
    distance = (np.arange(14) - 6.5) / 14
    raw = np.exp(-(distance**2) / (2 * 0.25**2))
    raw = np.outer(raw, raw)
    want = (raw - raw.min()) / (raw.max() - raw.min())
    assert np.abs(m - want).max() < 1e-3


def test_a_failed_run_leaves_the_others(pictures, monkeypatch, capsys):
    monkeypatch.chdir(pictures)

    def run(self, log, program, *flags):
        if "exact.npy" in map(str, flags):
            raise RuntimeError("python attg_mae.py: exit code 1, out of luck")

    monkeypatch.setattr(study.Programs, "run", run)
    flags = (
        "--name bad --data data --maps exact=exact.npy --arms none exact --seeds 0 1"
    )
    with pytest.raises(ChildProcessError, match="2 runs failed.*out of luck.*again"):
        study.main(flags.split())
    assert capsys.readouterr().out.count("none-seed") == 4
    marks = sorted(
        str(p.parent.name) for p in pictures.glob("out/study/bad/*/train.done")
    )
    assert marks == ["none-seed0", "none-seed1"]


def test_a_program_that_fails_is_named(ask, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "subprocess", server_of(ask, tmp_path))
    programs = study.Programs(1)
    with pytest.raises(RuntimeError, match="eval_knn.py --k 0: exit code 1, .*needed"):
        programs.run(tmp_path / "log.txt", "eval_knn.py", "--k", 0)
    assert "$ python eval_knn.py --k 0    # " in (tmp_path / "log.txt").read_text()
    programs.stop()
    with pytest.raises(InterruptedError):
        programs.run(tmp_path / "log.txt", "eval_knn.py")


def test_last_words(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("x.py: error: of an earlier try\n")
    begin = log.stat().st_size
    assert study.last_words(log, begin) == "without a word"
    with open(log, "a") as file:
        file.write("x.py: error: this\npython x.py --help lists every flag\n")
    assert study.last_words(log, begin) == "x.py: error: this"
    begin = log.stat().st_size
    with open(log, "ab") as file:
        file.write(b"\xff\nKilled\n\n")
    assert study.last_words(log, begin) == "Killed"


@pytest.mark.parametrize("flag", ["--out", "--results"])
def test_folders_are_made_before_the_runs(flag, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(study.Programs, "run", None)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"{flag} file: this folder cannot be made"):
        study.main([flag, "file"])


def test_a_table_of_nothing_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="no figures of runs in it"):
        study.main(["--table", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


ERRORS = [  # flags, what the text names
    ("--arms cut", "--arms cut --maps cut=FILE.npy"),
    ("--arms none+inverted", "--arms none+inverted vanilla"),
    ("--arms masks+upside", "--arms masks+upside +upside inverted"),
    ("--arms self", "--arms self needs none"),
    ("--arms none none", "--arms --seeds once"),
    ("--maps a=none.npy --arms a", "--maps a=none.npy no such file"),
    ("--jobs 0", "--jobs 0 1"),
    ("--jobs 10000", "--jobs 10000 1024"),
    ("--seeds 0 -1", "--seeds -1 negative"),
    ("--shots 0", "--shots 0 least"),
    ("--evaluate linear", "--evaluate knn"),
    ("--table nowhere", "--table nowhere no such folder"),
    ("-- --seed 3", "--seed set by the study"),
]


@pytest.mark.parametrize(("flags", "words"), ERRORS, ids=[x[0] for x in ERRORS])
def test_study_errors(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        study.main(flags.split())
    assert [w for w in words.split() if w not in str(error.value)] == []
    assert list(tmp_path.iterdir()) == []
