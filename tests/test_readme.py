"""
README.md and docs/: every command parses, the short ones are run, and so is every piece of
Python, on small models and images.
"""

import importlib
import re
import shlex
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import attg_mae
from attg.cli import parse
from attg.datasets import open_data
from attg.maps import load_maps
from docs import idea, walkthrough
from tests.helpers import (
    ROOT,
    SMALL,
    close,
    hf_model,
    kernel,
    noise,
    oracle,
    rand,
    randn,
    shake,
    transformers,
    write,
)
from tests.test_cli import settings_class

PAGES = {path.name: path.read_text() for path in sorted(ROOT.glob("docs/*.md"))}
PAGES["README.md"] = (ROOT / "README.md").read_text()
PROGRAMS = "attg_mae|object_discovery|eval_knn|eval_retrieval|eval_linear|eval_finetune"
PROGRAMS += "|study|bench"
# At the start of a line, or code in a table.
START = r"(?:^ *`?|(?:\| |and )`)(?:pip .* && )?(?:python|torchrun (?:--\S+ )*)"
COMMANDS, SNIPPETS = set(), set()
for page in PAGES.values():
    joined = re.sub(r"\\\n *", "", page)
    for command in re.finditer(rf"{START} ?({PROGRAMS})\.py([^#`\n]*)", joined, re.M):
        COMMANDS.add((command[1], command[2].strip()))
    SNIPPETS |= set(re.findall(r"```python\n(.*?)```", page, re.S))
COMMANDS, SNIPPETS = sorted(COMMANDS), sorted(SNIPPETS)
CHANGES = re.findall(r"```diff\n(.*?)```", PAGES["kernel.md"], re.S)
DIFFS = dict(zip(("mae", "hf", "hiera", "lightly"), CHANGES, strict=True))


def check_drop_in(name, parameters, names, shape, outputs, norm_pix=False):
    """The docs' change to `name`: with a flat map loss and gradients stay as they were.

    With a random map the loss is the oracle's. names: those of the code. outputs: of its
    names after it has run -> pred, patches and mask.
    """
    flat, random = torch.full(shape, 0.3), rand(*shape, seed=9) * 40 - 7
    losses, grads = [], []
    for sign, attn in (("-", None), ("+", flat), ("+", random)):
        torch.manual_seed(3)  # Hugging Face draws its mask
        lines = [x[1:].strip() for x in DIFFS[name].splitlines() if x[0] in " " + sign]
        scope = names | {"attn": attn, "tau": 0.9}
        scope |= {"attg_loss": kernel.attg_loss, "normalize_map": kernel.normalize_map}
        exec("\n".join(lines), scope)
        losses.append(scope["loss"])
        options = {"retain_graph": True, "allow_unused": True}
        grads.append(torch.autograd.grad(scope["loss"], parameters, **options))
    before, after, weighted = losses
    assert close(after, before, 1e-5) and not close(weighted, before, 1e-2)
    trained = [x for x in zip(*grads, strict=True) if x[0] is not None]
    trained = [x for x in trained if x[0].abs().max() > 1e-6]
    assert trained
    for want, got, other in trained:
        assert close(got, want, 1e-4) and not close(other, want, 1e-2)
    rows, _, count = oracle(*outputs(scope), random, tau=0.9, norm_pix=norm_pix)
    assert close(weighted, rows.sum() / count, 1e-5)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_dropped_into_hugging_face_and_mae(norm_pix):
    sizes = {"num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
    model = hf_model("ViTMAEForPreTraining", norm_pix_loss=norm_pix, **sizes)
    imgs = randn(2, 3, 32, 32)
    parameters = [p for p in shake(model).parameters() if p.requires_grad]

    def outputs(scope):
        return scope["out"].logits, attg_mae.patchify(imgs, 4), scope["out"].mask

    names = {"model": model, "pixel_values": imgs}
    check_drop_in("hf", parameters, names, (2, 64), outputs, norm_pix)

    out = model(imgs)
    mae = SimpleNamespace(patch_embed=SimpleNamespace(patch_size=(4, 4)))
    mae.forward_loss, mae.norm_pix_loss = lambda *_: out.loss, norm_pix
    names = {"self": mae, "imgs": imgs, "pred": out.logits}
    names |= {"mask": out.mask, "out": out}
    check_drop_in("mae", [out.logits], names, (2, 64), outputs, norm_pix)


def test_loss_dropped_into_hiera():
    """Its patches in order (C, p, p) by a loop, and the visible ones where it says masked."""
    sizes = {"depths": [1] * 4, "num_heads": [1] * 4, "decoder_depth": 1}
    sizes |= {"embed_dim": 16, "decoder_hidden_size": 16, "decoder_num_heads": 2}
    config = transformers().HieraConfig(image_size=[64, 96], **sizes)
    model = shake(transformers().HieraForPreTraining(config))
    imgs = randn(2, 3, 64, 96)
    blocks = [imgs[:, :, y : y + 32, x : x + 32] for y in (0, 32) for x in (0, 32, 64)]
    patches = torch.stack([block.flatten(1) for block in blocks], dim=1)

    def outputs(scope):
        return scope["out"].logits, patches, ~scope["out"].bool_masked_pos

    names = {"model": model, "pixel_values": imgs, "F": F}
    parameters = [p for p in model.parameters() if p.requires_grad]
    check_drop_in("hiera", parameters, names, (2, 6), outputs, norm_pix=True)


def test_loss_dropped_into_lightly(monkeypatch):
    # Otherwise it asks its server for a newer version.
    monkeypatch.setenv("LIGHTLY_DID_VERSION_CHECK", "True")
    pytest.importorskip("lightly")
    from lightly.models import utils

    _, hidden = utils.random_token_mask((2, 17), 0.75)
    pred = randn(*hidden.shape, 192, seed=3).requires_grad_()
    patches = utils.patchify(randn(2, 3, 32, 32), 8)
    names = {"patches": patches, "idx_mask": hidden, "x_pred": pred}
    names |= {"utils": utils, "criterion": nn.MSELoss()}
    # The oracle takes all patches.
    full = utils.set_at_index(torch.zeros(2, 17, 192), hidden, pred.detach())[:, 1:]
    mask = torch.zeros(2, 17).scatter(1, hidden, 1.0)[:, 1:]
    outputs = full, patches, mask
    check_drop_in("lightly", [pred], names, (2, 16), lambda _: outputs)


@pytest.mark.parametrize("program", PROGRAMS.split("|"))
def test_commands_parse(program):
    """Every flag of every command exists and takes the value that is shown."""
    commands = [flags for name, flags in COMMANDS if name == program]
    assert commands and len(COMMANDS) >= 40
    for flags in commands:
        # Flags after -- are attg_mae.py's, and an ellipsis stands for more flags.
        argv, _, more = flags.replace("...", "").partition(" -- ")
        parse(settings_class(program), "", shlex.split(argv))
        parse(attg_mae.Config, "", shlex.split(more))


def test_commands_and_snippets_run(tmp_path, monkeypatch):
    """From maps to weights, then each piece of Python in a scope of its own."""
    monkeypatch.chdir(tmp_path)
    for i in range(16):
        write(tmp_path / "path/to/images" / f"{i}.png", noise(40, 40, i))
    data = ["--data", "path/to/images"]
    discovery = importlib.import_module("object_discovery")
    flags = ["--method", "tokencut", "--backbone", "pixels", *data, "--show", "8"]
    discovery.main([*flags, "--out", "maps.npy"])
    assert Image.open("maps.png").width > 100
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    few = ["--epochs=1", "--batch_size=8", "--maps=maps.npy"]
    attg_mae.main([*small, *few, *data, "--out=out/toy-vit_micro-attg"])

    made = {}
    for code in SNIPPETS:
        names = {"my_maps": np.random.default_rng(0).random((16, 4, 4))}
        exec(code, names)
        made |= names
        if "import timm" in code:
            encoder = attg_mae.load_encoder(names["file"])
            imgs = randn(2, 3, *encoder.cfg.size)
            want = encoder.forward_features(imgs)
            theirs = names["peer"].eval()(imgs).last_hidden_state
            for tokens in (names["model"].eval().forward_features(imgs), theirs):
                assert close(tokens, want, 1e-5)
    assert made["class_tokens"].shape == made["patch_means"].shape == (16, 16)
    assert load_maps("maps.npy", open_data("path/to/images"))[0].shape == (16, 4, 4)
    assert made["pred"].grad.any()


def test_files_and_links_exist():
    cells = " ".join(re.findall(r"^\| (`[^|]+)", PAGES["README.md"], re.M))
    files = re.findall(r"`([^` ]+(?:\.py|/))`", cells)
    assert len(files) >= 8 and all((ROOT / name).exists() for name in files)
    for name, page in PAGES.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page):
            assert link.startswith("https:") or (folder / link).exists(), (name, link)
    assert len(PAGES["README.md"].splitlines()) <= 180


def test_walkthrough_adds_up_and_quotes_the_code(tmp_path, capsys):
    """It raises an error if its sums are not those of MAE.forward."""
    walkthrough.main(out=tmp_path / "w.png")
    assert "sum(mask)" in capsys.readouterr().out
    assert min(Image.open(tmp_path / "w.png").size) > 600
    source = {line.strip() for line in (ROOT / "attg_mae.py").read_text().splitlines()}
    quoted = re.findall(r"```text\n(.*?)```", PAGES["walkthrough.md"], re.S)
    lines = [line.strip() for block in quoted for line in block.splitlines()]
    assert len(lines) > 15
    assert [line for line in lines if line != "..." and line not in source] == []


def test_figure_of_the_idea_is_drawn(monkeypatch, tmp_path):
    paths = [tmp_path / f"{name}.pt" for name in ("vanilla", "guided")]
    cfg = attg_mae.Config(**SMALL)
    for path in paths:
        model = attg_mae.MAE(cfg).state_dict()
        attg_mae.save_checkpoint(path, model=model, config=asdict(cfg))
    monkeypatch.chdir(ROOT)  # reads results/
    idea.main(*paths, tmp_path / "idea.png")
    assert Image.open(tmp_path / "idea.png").width > 6 * 96
