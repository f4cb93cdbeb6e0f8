"""What the evaluation programs have in common: attg/evaluation.py, errors, data sets."""

import itertools
import json
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import attg.log
import eval_finetune
import eval_knn
import eval_linear
from attg.datasets import open_data
from attg.evaluation import describe
from tests.fuzz import within
from tests.helpers import content, refused, save_encoder

PROGRAMS = [eval_knn, eval_linear, eval_finetune]


@pytest.fixture(params=PROGRAMS, ids=[program.__name__ for program in PROGRAMS])
def evaluate(request, encoder, tmp_path, monkeypatch):
    """evaluate(*flags, data=None) of one of the programs, with little training."""
    program = request.param
    if program is eval_linear:
        quick = partial(eval_linear.train_heads, min_steps=30)
        monkeypatch.setattr(eval_linear, "train_heads", quick)

    def evaluate(*flags, data=None, checkpoint=encoder):
        argv = [checkpoint, "--device", "cpu", "--out", str(tmp_path / "o.jsonl")]
        argv += [] if program is eval_knn else ["--epochs", "1"]
        return program.main([*argv, *flags], data)

    return evaluate


# -- Errors ----------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["out", "save_features"])
def test_outputs_are_tried_before_the_work(flag, wrong, labelled):
    flags = ["missing.pt", "--data", labelled["data"], "--device", "cpu"]
    Path("folder").mkdir()
    before = sorted(Path().rglob("*"))
    # The weights are missing as well, which is not noticed yet.
    for path in ("text.pt/x", "folder"):
        with pytest.raises(OSError, match=f"--{flag} {path}: .*choose"):
            eval_knn.main([*flags, f"--{flag}", path])
    assert sorted(Path().rglob("*")) == before
    with pytest.raises((ValueError, OSError), match="missing.pt"):
        eval_knn.main([*flags, f"--{flag}", "deep/new"])
    assert not Path("deep/new").exists()


def test_results_are_printed_before_the_disk_is_full(encoder, labelled, capsys):
    flags = ["--data", labelled["data"], "--device", "cpu", "--out", "/dev/full"]
    with pytest.raises(OSError, match="space .*/dev/full"):
        eval_knn.main([encoder, *flags])
    assert re.search(r"\npatch_mean +test .* \d+\.\d\d", capsys.readouterr().out)


# Flags, and what the message names: the flag, its value and the remedy.
ERRORS = [
    (eval_knn, "", "checkpoint: encoder"),
    (eval_knn, "--features encoder.pt", "--features encoder.pt --save_features"),
    (eval_knn, "x --features y", "checkpoint --features leave it out"),
    (eval_knn, "--features y --precision bf16", "--precision leave it out"),
    (eval_knn, "encoder.pt --val train", "--val train test"),
    (eval_knn, "encoder.pt --val other/test", "other/test another_class --classes"),
    (eval_knn, "encoder.pt --max_pixels 1919", "none of the 25 --max_pixels 1919"),
    (eval_linear, "encoder.pt --shots 5 1", "--shots 1 2 or more"),
    (eval_linear, "encoder.pt --save w.pt", "--save --protocol leave it out"),
    (eval_linear, "encoder.pt --protocol mae --shots 2", "--shots --protocol leave"),
    (eval_finetune, "encoder.pt --batch_size 999", "--batch_size 999 25"),
    (eval_finetune, "encoder.pt --save encoder.pt", "--save encoder.pt another file"),
    (eval_finetune, "encoder.pt --save text.pt/x", "--save text.pt choose"),
]


@pytest.mark.parametrize(("program", "flags", "named"), ERRORS)
def test_errors(program, flags, named, wrong, labelled):
    shutil.copytree(labelled["data"], "other")
    Path("other/test/r").rename("other/test/another_class")
    files = content(".")
    argv = [*flags.split(), "--device", "cpu"]
    if "--features" not in argv:
        argv += ["--data", labelled["data"]]
    with refused(named):
        program.main(argv)
    assert content(".") == files
    assert not list(Path().rglob("*.jsonl"))


def test_a_rank_that_never_starts(tmp_path, monkeypatch):
    """The other one stops waiting after --timeout, and names the flag."""
    monkeypatch.chdir(tmp_path)
    ranks = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for key, value in ranks.items():
        monkeypatch.setenv(key, str(value))
    with within(60), pytest.raises(ConnectionError, match="of 2 ranks .*--timeout"):
        eval_knn.main(["none.pt", "--device", "cpu", "--timeout", "0.01"])
    assert not torch.distributed.is_initialized() and not list(tmp_path.iterdir())


def test_progress_without_a_terminal(encoder, labelled, monkeypatch, capsys):
    """The clock is six seconds on whenever it is read."""
    monkeypatch.setattr(attg.log.time, "monotonic", itertools.count(0, 6).__next__)
    flags = ["--data", labelled["data"], "--device", "cpu", "--batch_size", "5"]
    eval_knn.main([encoder, *flags])
    printed = capsys.readouterr().out
    assert "\nfeatures: 1 of 5, " in printed and "\nfeatures: 1 of 3, " in printed


# -- Data sets -------------------------------------------------------------------------


def test_unreadable_images(evaluate, labelled, tmp_path, capsys):
    """One is replaced and named; more than 1 % are an error."""
    data = shutil.copytree(labelled["data"], tmp_path / "data")
    for bad, count in (("000.png", 1), ("001.png", 2)):
        path = data / "test" / "g" / bad
        path.write_bytes(b"not an image")
        if count == 1:
            assert len(evaluate("--data", str(data))) >= 1
        else:
            with pytest.raises(ValueError, match="2 of 15 .* unreadable"):
                evaluate("--data", str(data))
        assert capsys.readouterr().err.count(f"replaces it: {path} (") == 1


def test_data_sets_in_python(evaluate, labelled, tmp_path):
    """They give the results of their files; images without label do not count."""
    files = {split: open_data(labelled["data"], split) for split in ("train", "test")}
    data = {split: [x.read(i) for i in range(len(x))] for split, x in files.items()}
    none = [(image, None) for image, _ in data["train"]]
    signs = {x: [(im, -1 if y else 1) for im, y in data[x]] for x in data}
    more = {split: [*none[:5], *pairs, *none[5:9]] for split, pairs in data.items()}
    want = evaluate("--data", labelled["data"])
    assert evaluate("--data", "mine", data=data) == want
    assert evaluate("--data", "mine", data=more) == want
    names = [json.loads(x)["settings"]["data"] for x in (tmp_path / "o.jsonl").open()]
    assert names == [labelled["data"], "mine", "mine"]
    for flags, wrong, message in (
        ([], data, "--data NAME"),
        (["--data", "mine"], data["train"], "--data .*: needs"),
        (["--data", "mine"], data | {"test": none}, "--data .*labels in test"),
        (["--data", "mine"], signs, "--data mine: all .* label 1; below 0"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(*flags, data=wrong)
    # A subset has some of the classes.
    settings = SimpleNamespace(data="mine")
    describe(settings, {"train": 3}, 4, [1, 3, 3])
    assert "2 classes, chance 50 %, the largest has 66.7 %" in settings.header


def test_the_default_is_the_data_set_of_the_checkpoint(evaluate, labelled, tmp_path):
    """That of a gray encoder, on two of its three classes; other files have none."""
    (tmp_path / "two.txt").write_text("g\nb\n")
    data = {"data": labelled["data"], "classes": str(tmp_path / "two.txt")}
    data |= {"in_chans": 1, "mean": (0.5,), "std": (0.25,), "white": 300.0}
    file = str(tmp_path / "gray.pt")
    save_encoder(file, width=192, heads=3, **data)
    results = evaluate(checkpoint=file)
    flags = ["--data", data["data"], "--classes", data["classes"]]
    assert evaluate(*flags, checkpoint=file) == results
    one, two = (json.loads(x)["settings"] for x in (tmp_path / "o.jsonl").open())
    assert [[x["data"], x["classes"]] for x in (one, two)] == [flags[1::2]] * 2
    assert one["white"] == two["white"] == 300
    assert "train 16, test 10; 2 classes, chance 50 %, the" in one["header"]
    torch.save(torch.load(file)["model"], tmp_path / "bare.pt")
    message = "--data: missing, .*bare.pt .*name a data set"
    with pytest.raises(ValueError, match=message):
        evaluate(checkpoint=str(tmp_path / "bare.pt"))
