"""attg/finetuning.py, by both of its programs: MAE's probe and fine-tuning."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import attg_mae
import eval_finetune
import eval_linear
from attg import finetuning
from attg.datasets import open_data, shot_indices
from attg.features import FEATURES
from attg.finetuning import identity, open_training, to_device
from attg.images import Sample
from attg.loader import make_loader
from tests.helpers import ROOT, SMALL, after_step, same
from tests.processes import ranks

PROGRAMS = {
    "mae": (eval_linear, ["--protocol", "mae", "--blr", "20"], FEATURES),
    "finetune": (eval_finetune, ["--blr", "0.05"], ("patch_mean",)),
}


@pytest.fixture
def flags(encoder, labelled):
    """Of an encoder and a data set of 25 images, 3 steps an epoch."""
    flags = [encoder, "--data", labelled["data"], "--device", "cpu", "--seed", "1"]
    return [*flags, "--batch_size", "8"]


def stop():
    raise KeyboardInterrupt


def top1_of_timm(weights, data):
    """Top-1 in percent of the fine-tuned file in timm's ViT."""
    timm, content = pytest.importorskip("timm"), torch.load(weights)
    peer = timm.create_model(**content["timm"], checkpoint_path=weights).eval()
    assert content["class_names"] == ["b", "g", "r"]
    (batch,) = make_loader(open_data(data, "test", 32))
    logits = peer(attg_mae.normalize(batch.image, attg_mae.Config()))
    return 100 * (logits.argmax(1) == batch.label).double().mean().item()


@pytest.mark.parametrize("protocol", PROGRAMS)
def test_training_on_images(protocol, flags, labelled, tmp_path, capsys):
    """Loss and accuracy; resumed training equals uninterrupted."""
    program, more, features = PROGRAMS[protocol]
    flags += [*more, "--epochs", "8"]
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    results = program.main([*flags, "--save", str(whole)])
    printed = capsys.readouterr().out.splitlines()
    file = Path(flags[0]).with_name(f"{program.__name__}.jsonl")
    settings = json.loads(file.read_text())["settings"]
    cases = [(row["feature"], row["protocol"]) for row in results]
    assert cases == [(feature, protocol) for feature in features]
    losses = [float(x.split()[3]) for x in printed if x.startswith("epoch")]
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert settings["warmup_epochs"] == 1.6 and len(settings["sha256"]) == 64
    if program is eval_finetune:
        want = top1_of_timm(whole, labelled["data"])
        assert results[0]["top-1"] == pytest.approx(want)
        # Without --data other programs take the data that it was fine-tuned on.
        assert torch.load(whole)["config"]["data"] == labelled["data"]

    # In the third epoch, with loader workers.
    with after_step(8, stop), pytest.raises(KeyboardInterrupt):
        program.main([*flags, "--workers", "1", "--save", str(cut)])
    before = cut.read_bytes()
    assert torch.load(cut)["step"] == 6
    # Another setting and another encoder are refused, and named.
    other = attg_mae.load_checkpoint(flags[0])
    other["model"]["cls_token"] += 1
    torch.save(other, tmp_path / "other.pt")
    for changed, name in (
        ([*flags, "--weight_decay", "0.3"], "weight_decay 0.* -> 0.3"),
        ([str(tmp_path / "other.pt"), *flags[1:]], "sha256 "),
    ):
        with pytest.raises(ValueError, match=f"--save .*cut.pt: .*{name}.*file"):
            program.main([*changed, "--save", str(cut)])
    assert cut.read_bytes() == before
    for _ in range(2):  # the second time it is finished, and only scored again
        assert program.main([*flags, "--save", str(cut)]) == results
    one, two = torch.load(whole), torch.load(cut)
    assert all(same(one[k], two[k]) for k in ("model", "optimizer", "step"))
    assert capsys.readouterr().out.count("epoch 8/8") == 1


def test_accumulation_gives_the_same_gradients(flags, encoder, tmp_path, monkeypatch):
    """Biases of the probe's heads show their scale, which AdamW and LARS undo."""
    # Micro-batches would be mixed differently.
    monkeypatch.setattr(eval_finetune, "mix", lambda imgs, labels, _: (imgs, labels))
    tuned, probed = [], []
    for accum in ("1", "4"):
        files = [str(tmp_path / f"{name}{accum}.pt") for name in "ab"]
        more = [*flags, "--epochs", "2", "--accum", accum, "--save"]
        eval_finetune.main([*more, files[0], "--drop_path", "0"])
        eval_linear.main([*more, files[1], "--protocol", "mae"])
        tuned.append(torch.load(files[0])["model"]["patch_embed.proj.weight"])
        probed.append(torch.load(files[1])["model"]["heads.0.bias"])
    start = attg_mae.load_encoder(encoder).patch_embed.proj.weight
    assert 0 < (tuned[1] - tuned[0]).norm() < 0.02 * (tuned[0] - start).norm()
    # BatchNorm's statistics are those of a micro-batch.
    assert 0 < (probed[1] - probed[0]).norm() < 0.1 * probed[0].norm()


SPY = """
import os, sys
sys.path.insert(0, {root!r})
import torch
import eval_linear
from attg import finetuning

noise, backward, score = [], finetuning.backward, eval_linear.score

def record(*args):
    noise.append(torch.rand(()).item())
    return backward(*args)

def save(model, *args):
    torch.save([noise, model.state_dict()], __file__ + os.environ["RANK"])
    return score(model, *args)

finetuning.backward, eval_linear.score = record, save
eval_linear.main()
"""


def test_begun_on_one_process_and_continued_on_two(ask, flags, labelled, tmp_path):
    """Ranks draw their own noise and end with one model, its BatchNorm included.

    Rank 0 alone has the file of --save, as on machines that do not share the folder.
    """
    script, cut = tmp_path / "spy.py", tmp_path / "cut.pt"
    script.write_text(SPY.format(root=str(ROOT)))
    more = ["--protocol", "mae", "--epochs", "3", "--accum", "4", "--save", str(cut)]
    with after_step(8, stop), pytest.raises(KeyboardInterrupt):
        eval_linear.main([*flags, *more])
    settings = {"data": labelled["data"], "device": "cpu", "seed": 1, "batch_size": 8}
    settings |= {"protocol": "mae", "epochs": 3, "save": cut}
    other = {"save": tmp_path / "absent.pt"}
    runs = ranks(ask, tmp_path / "o", settings, [str(script), flags[0]], other)
    (code, printed, errors), (other, quiet, _) = (run.wait() for run in runs)
    assert (code, other, quiet) == (0, 0, ""), errors
    assert "after 6 of 9 steps" in printed and torch.load(cut)["step"] == 9
    (one, model), (two, twin) = (torch.load(f"{script}{rank}") for rank in (0, 1))
    assert len(set(one + two)) == 2 * len(one) == 6 and same(model, twin)


def test_more_processes_than_test_images(labelled, monkeypatch):
    """Each of them scores an image, which counts once."""
    model, counts = attg_mae.ViT(attg_mae.Config(**SMALL)), []
    model.forward = lambda imgs: imgs.mean(dim=(2, 3))[None]  # of 3 classes
    tests = {"test": open_data(labelled["data"], "test", 32).subset(torch.tensor([14]))}
    settings = eval_finetune.Settings(batch_size=3, accum=1, workers=0)
    monkeypatch.setattr(finetuning.dist, "all_reduce", counts.append)
    for rank in range(3):
        dist_info = (torch.device("cpu"), rank, 3)
        finetuning.score(model, tests, ("x",), "", settings, None, dist_info)
    assert torch.cat(counts)[:, 1].tolist() == [1, 0, 0]  # in the top-5


def test_images_are_flipped_and_normalized():
    imgs = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    sample = Sample(imgs, torch.arange(2), None, None, torch.tensor([True, False]))
    model = attg_mae.ViT(attg_mae.Config())
    got, labels = to_device(sample, model, torch.device("cpu"))
    want = torch.stack([imgs[0].flip(2), imgs[1]])
    assert got.equal(model.normalize(want)) and labels.tolist() == [0, 1]


def test_fraction_of_the_labels(labelled, tmp_path, capsys):
    """Half of each class of 9, 8 and 8 images, in the order of the data set."""
    data = tmp_path / "data"
    shutil.copytree(labelled["data"], data)
    (data / "test").rename(data / "val")
    whole, cfg = open_data(labelled["data"]), attg_mae.Config(**SMALL)
    settings = eval_finetune.Settings(data=str(data), label_fraction=0.5, seed=3)
    options = None, eval_finetune.VIT_BASE, 128, (torch.device("cpu"), 0, 1)
    train_set, tests = open_training(cfg, settings, *options)
    rows = shot_indices(whole.labels, 0.5, 3).sort().values.tolist()
    assert "images: train 12, test (val/) 15;" in settings.header
    assert "12 images: 100 epochs, batch size 1, peak lr 6.2" in capsys.readouterr().out
    assert len(rows) == len(train_set) == 12 and len(tests["test"]) == 15
    assert [train_set.names[i] for i in range(12)] == [whole.names[i] for i in rows]


def test_a_saved_run_belongs_to_its_images(labelled, tmp_path):
    """They may lie elsewhere, but not change."""
    settings, first = eval_finetune.Settings(checkpoint="x.pt"), Path(labelled["data"])
    copy, shared = shutil.copytree(first, tmp_path / "copy"), []
    for folder in (first, copy):
        settings.data = str(folder)
        shared.append(identity(settings, open_data(settings.data)))
    next(copy.glob("train/*/*.png")).unlink()
    shared.append(identity(settings, open_data(settings.data)))
    assert shared[0] == shared[1] != shared[2]


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ("--epochs 3 --blr 1e30", "loss not finite in epoch 1; .*--blr"),
        # After the last step no loss reveals it.
        ("--epochs 1 --batch_size 25 --warmup_epochs 0 --blr 1e38", "logits .*--blr"),
    ],
)
def test_divergence_is_an_error(rates, message, flags, tmp_path):
    with pytest.raises(ValueError, match=message):
        eval_finetune.main([*flags, *rates.split(), "--out", str(tmp_path / "o")])
    assert not Path(tmp_path / "o").exists()
