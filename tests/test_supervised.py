"""
attg/finetuning.py, by the two programs that train with it: eval_linear.py --protocol mae
and eval_finetune.py.
"""

import json
from functools import partial

import pytest
import torch
from torch import nn

import attg_mae
import eval_finetune
import eval_linear
from attg.datasets import open_data
from attg.features import FEATURES
from attg.loader import make_loader
from tests.helpers import after_step, same

COMMON = ["--device", "cpu", "--seed", "1"]


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        (eval_linear, ["--protocol", "mae", "--blr", "20"]),
        (eval_finetune, ["--blr", "0.05"]),
    ],
    ids=["mae", "finetune"],
)
def test_training_on_pictures(program, flags, encoder, labelled, tmp_path, capsys):
    flags = [
        encoder,
        "--data",
        labelled["data"],
        *COMMON,
        *flags,
        *"--epochs 8 --batch_size 8".split(),
    ]
    rows = program.main([*flags, "--save", str(tmp_path / "weights.pt")])
    printed = capsys.readouterr().out.splitlines()
    report = json.loads(printed[-1])
    assert [r["feature"] for r in rows] == (
        ["patch_mean"] if program is eval_finetune else [*FEATURES]
    )
    assert (
        report["settings"]["protocol"]
        == rows[0]["protocol"]
        == ("finetune" if program is eval_finetune else "mae")
    )
    losses_ = [float(line.split()[3]) for line in printed if line.startswith("epoch")]
    assert len(losses_) == 8 and losses_[-1] < losses_[0]
    settings = report["settings"]
    assert (
        settings["batch_size"],
        settings["precision"],
        settings["warmup_epochs"],
    ) == (8, "fp32", 1.6)
    assert program.main(flags) == rows  # deterministic, and --save changes nothing
    assert program.main([*flags, "--workers", "2"]) == rows
    # Finished: scored again
    assert program.main([*flags, "--save", str(tmp_path / "weights.pt")]) == rows
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert weights["step"] == 8 * 3
    if program is eval_finetune:
        models = pytest.importorskip("timm.models")
        peer = models.VisionTransformer(
            img_size=32,
            patch_size=16,
            embed_dim=16,
            depth=1,
            num_heads=2,
            num_classes=3,
            global_pool="avg",
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        models.load_checkpoint(peer.eval(), tmp_path / "weights.pt")
        tests = make_loader(open_data(labelled["data"], "test", 32))
        with torch.no_grad():
            right = [
                peer(attg_mae.normalize(x.image, attg_mae.Config())).argmax(1)
                == x.label
                for x in tests
            ]
        assert 100 * torch.cat(right).double().mean().item() == pytest.approx(
            rows[0]["top-1"]
        )


@pytest.mark.parametrize(
    ("program", "flags"),
    [(eval_linear, ["--protocol", "mae"]), (eval_finetune, [])],
    ids=["mae", "finetune"],
)
def test_training_goes_on(program, flags, encoder, labelled, tmp_path):
    flags = [
        encoder,
        "--data",
        labelled["data"],
        *COMMON,
        *flags,
        *"--epochs 4 --batch_size 8".split(),
    ]
    want = program.main([*flags, "--save", str(tmp_path / "whole.pt")])

    def stop():
        raise KeyboardInterrupt

    with after_step(8, stop), pytest.raises(KeyboardInterrupt):  # in the third epoch
        program.main([*flags, "--save", str(tmp_path / "cut.pt")])
    assert torch.load(tmp_path / "cut.pt")["step"] == 6
    before = (tmp_path / "cut.pt").read_bytes()
    with pytest.raises(
        ValueError,
        match=r"--save .*cut.pt: of a run without weight_decay 0.3; name another file",
    ):
        program.main(
            [*flags, "--save", str(tmp_path / "cut.pt"), "--weight_decay", "0.3"]
        )
    weights = attg_mae.load_checkpoint(encoder)
    weights["model"]["cls_token"] += 1
    torch.save(weights, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"--save .*cut.pt: of a run without sha256"):
        program.main(
            [str(tmp_path / "other.pt"), *flags[1:], "--save", str(tmp_path / "cut.pt")]
        )
    assert (tmp_path / "cut.pt").read_bytes() == before
    assert program.main([*flags, "--save", str(tmp_path / "cut.pt")]) == want
    whole, cut = (
        torch.load(tmp_path / name, weights_only=True)
        for name in ("whole.pt", "cut.pt")
    )
    assert all(same(whole[k], cut[k]) for k in ("model", "optimizer", "step"))


def test_accumulation_gives_the_same_gradients(
    encoder, labelled, tmp_path, monkeypatch
):
    # Mixes within a micro-batch
    monkeypatch.setattr(
        eval_finetune, "mix", lambda imgs, labels, classes: (imgs, labels)
    )
    flags = [
        encoder,
        "--data",
        labelled["data"],
        *COMMON,
        *"--epochs 2 --batch_size 8".split(),
    ]
    weights = []
    for accum in ("1", "4"):
        eval_finetune.main(
            [
                *flags,
                "--accum",
                accum,
                *"--drop_path 0".split(),
                "--save",
                str(tmp_path / accum),
            ]
        )
        weights.append(torch.load(tmp_path / accum)["model"])
    start = attg_mae.load_encoder(encoder).state_dict()
    for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "pos_embed"):
        moved = weights[0][name] - start[name]
        assert moved.norm() > 0
        assert (weights[1][name] - weights[0][name]).norm() < 0.02 * moved.norm()


def test_a_loss_that_is_not_finite_stops(encoder, labelled, tmp_path):
    flags = [
        encoder,
        "--data",
        labelled["data"],
        *COMMON,
        *"--epochs 3 --batch_size 8".split(),
    ]
    with pytest.raises(
        ValueError, match="loss not finite in epoch 1; try a lower --blr"
    ):
        eval_finetune.main([*flags, "--blr", "1e30", "--save", str(tmp_path / "w.pt")])
    assert not (tmp_path / "w.pt").exists()


def test_a_model_that_is_not_finite_is_not_scored(encoder, labelled, tmp_path):
    """After the last step no loss tells."""
    flags = [encoder, "--data", labelled["data"], *COMMON, "--out", str(tmp_path / "o")]
    flags += "--epochs 1 --batch_size 25 --warmup_epochs 0 --blr 1e38".split()
    with pytest.raises(ValueError, match="what the model says is not finite.* --blr"):
        eval_finetune.main(flags)
    assert not (tmp_path / "o").exists()
