"""
README.md and docs/: every command parses, the short ones are run, and so is every piece of
Python, on small models and images.
"""

import importlib
import pickle
import re
import shlex
from dataclasses import asdict
from pathlib import Path
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
    check_grad,
    close,
    encoder_only,
    hf_model,
    kernel,
    noise,
    oracle,
    rand,
    randn,
    save_small,
    shake,
    timm_model,
    train,
    write,
)
from tests.test_cli import settings_class

PAGES = {path.name: path.read_text() for path in sorted(ROOT.glob("docs/*.md"))}
PAGES["README.md"] = (ROOT / "README.md").read_text()
PROGRAMS = "attg_mae|object_discovery|eval_knn|eval_retrieval|eval_linear|eval_finetune"
PROGRAMS += "|study|bench"
# At the start of a line, or code in a table.
START = r"(?:^ *|(?:\| |and )`)(?:pip .* && )?(?:python|torchrun (?:--\S+ )*)"
COMMANDS, SNIPPETS = set(), set()
for page in PAGES.values():
    joined = re.sub(r"\\\n *", "", page)
    for program, flags in re.findall(
        rf"{START} ?({PROGRAMS})\.py([^#`\n]*)", joined, re.M
    ):
        COMMANDS.add((program, flags.strip()))
    SNIPPETS |= set(re.findall(r"```python\n(.*?)```", page, re.S))
COMMANDS, SNIPPETS = sorted(COMMANDS), sorted(SNIPPETS)
CHANGES = re.findall(r"```diff\n(.*?)```", PAGES["kernel.md"], re.S)
DIFFS = dict(zip(("mae", "hf", "lightly"), CHANGES, strict=True))


# -- The loss in other code bases ------------------------------------------------------


def dropped_in(name, parameters, **names):
    """[(loss, gradients, names)] of the docs' code before the change, and after it with a
    flat and with a random map.
    """
    B, L = names.pop("shape")
    names |= {"attg_loss": kernel.attg_loss, "normalize_map": kernel.normalize_map}
    flat, random = torch.full((B, L), 0.3), rand(B, L, seed=9) * 40 - 7
    for sign, attn in (("-", None), ("+", flat), ("+", random)):
        torch.manual_seed(3)  # Hugging Face draws its mask
        lines = [x[1:].strip() for x in DIFFS[name].splitlines() if x[0] in " " + sign]
        scope = names | {"attn": attn, "tau": 0.9}
        exec("\n".join(lines), scope)
        options = {"retain_graph": True, "allow_unused": True}
        yield (
            scope["loss"],
            torch.autograd.grad(scope["loss"], parameters, **options),
            scope,
        )


def compare_drop_in(runs, pred, target, mask, norm_pix):
    """Before = after with a flat map, loss and every gradient; else the loop's loss."""
    (before, want, _), (after, got, _), (weighted, other, _) = runs
    assert close(after, before, 1e-5)
    pairs = zip(got, want, other, strict=True)
    pairs = [x for x in pairs if x[1] is not None and x[1].abs().max() > 1e-6]
    assert pairs
    for a, b, c in pairs:
        assert close(a, b, 1e-4) and not close(c, b, 1e-2) and not close(0 * a, b, 1e-4)
    attn = rand(*mask.shape, seed=9) * 40 - 7
    rows, _, count = oracle(pred, target, mask, attn, tau=0.9, norm_pix=norm_pix)
    assert close(weighted, rows.sum() / count, 1e-5)
    assert not close(weighted, before, 1e-2)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_dropped_into_hugging_face(norm_pix):
    sizes = {"num_hidden_layers": 1, "decoder_num_hidden_layers": 1}
    model = hf_model("ViTMAEForPreTraining", norm_pix_loss=norm_pix, **sizes)
    imgs = randn(2, 3, 32, 32)
    parameters = [p for p in shake(model).parameters() if p.requires_grad]
    names = {"model": model, "pixel_values": imgs}
    runs = list(dropped_in("hf", parameters, shape=(2, 64), **names))
    out = runs[2][2]["out"]
    compare_drop_in(runs, out.logits, attg_mae.patchify(imgs, 4), out.mask, norm_pix)


def test_loss_dropped_into_lightly(monkeypatch):
    # Otherwise it asks its server for a newer version.
    monkeypatch.setenv("LIGHTLY_DID_VERSION_CHECK", "True")
    pytest.importorskip("lightly")
    from lightly.models import utils
    from lightly.models.modules import MaskedVisionTransformerTIMM

    imgs = randn(2, 3, 32, 32)
    encoder = MaskedVisionTransformerTIMM(timm_model(width=32, depth=1, heads=2))
    keep, hidden = utils.random_token_mask((2, 17), 0.75)
    decoder = nn.Linear(32, 192)
    pred = decoder(utils.get_at_index(encoder.encode(imgs, idx_mask=hidden), hidden))
    names = {"patches": utils.patchify(imgs, 8), "idx_mask": hidden, "x_pred": pred}
    names |= {"utils": utils, "criterion": nn.MSELoss()}
    modules = nn.ModuleList([encoder, decoder])
    parameters = [p for p in modules.parameters() if p.requires_grad]
    runs = list(dropped_in("lightly", parameters, shape=(2, 16), **names))
    ids = hidden - 1
    full = torch.zeros(2, 16, 192)
    full = full.scatter(1, ids[..., None].expand_as(pred), pred.detach())
    mask = torch.zeros(2, 16).scatter(1, ids, 1.0)
    compare_drop_in(runs, full, names["patches"], mask, False)


def test_loss_dropped_into_mae():
    imgs, pred = randn(2, 3, 8, 12), randn(2, 6, 48, seed=3).requires_grad_()
    mask = rand(2, 6, seed=2) < 0.7
    x = attg_mae.patchify(imgs, 4)
    deviation = (x.var(-1, keepdim=True) + 1e-6) ** 0.5
    target = (x - x.mean(-1, keepdim=True)) / deviation

    def forward_loss(imgs, pred, mask):
        """MAE's definition."""
        error = F.mse_loss(pred, target, reduction="none").mean(-1)
        return (error * mask).sum() / mask.sum()

    embed = SimpleNamespace(patch_size=(4, 4))
    model = SimpleNamespace(
        forward_loss=forward_loss, patch_embed=embed, norm_pix_loss=True
    )
    names = {"self": model, "imgs": imgs, "pred": pred, "mask": mask}
    runs = list(dropped_in("mae", [pred], shape=(2, 6), **names))
    compare_drop_in(runs, pred, x, mask, True)
    check_grad(runs[1][1][0], runs[0][1][0], 1e-5)


# -- Commands and snippets -------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with the images and weights that the pages name."""
    for i in range(16):
        write(tmp_path / "path/to/images" / f"{i}.png", noise(40, 40, i))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("program", PROGRAMS.split("|"))
def test_commands_parse(program, tmp_path):
    """Every flag of every command exists and takes the value that is shown."""
    commands = [flags for name, flags in COMMANDS if name == program]
    assert commands and len(COMMANDS) >= 40
    for flags in commands:
        # Flags after -- are attg_mae.py's, and an ellipsis stands for more flags.
        argv, _, more = flags.partition(" -- ")
        argv = [x for x in shlex.split(argv) if x != "..."]
        maps = [
            x.partition("=")[2] for x in argv if re.fullmatch(r"[\w-]+=\S+\.npy", x)
        ]
        assert all(x.endswith(".npy") for x in maps)
        parse(settings_class(program), "", argv)
        parse(attg_mae.Config, "", [x for x in shlex.split(more) if x != "..."])


def test_short_commands_run(place, capsys):
    """From maps to features, each command as the pages show it but for sizes."""
    data, small = (
        "path/to/images",
        [f"--{name}={value}" for name, value in SMALL.items()],
    )
    few = ["--epochs=1", "--batch_size=8", "--workers=0", "--device=cpu"]
    attg_mae.demo()
    assert "loss" in capsys.readouterr().out

    def run(program, *flags):
        return importlib.import_module(program).main(list(map(str, flags)))

    flags = ["--method", "tokencut", "--backbone", "pixels", "--data", data]
    run("object_discovery", *flags, "--out", "maps.npy", "--show", 8)
    assert load_maps("maps.npy", open_data(data))[0].any()
    assert Image.open("maps.png").width > 100
    result = run("attg_mae", "--data", data, "--maps", "maps.npy", *small, *few)
    out = Path(result["out"])
    assert out == Path("out/images-vit_micro-attg")
    images = [
        "reconstructions.png",
        "encoder.pt",
        "last.pt",
        "log.jsonl",
        "config.json",
    ]
    assert all((out / name).is_file() for name in images)
    again = ["--init", out / "last.pt", "--data", data, *small, "--epochs=0"]
    assert run("attg_mae", *again, "--guidance=none")["step"] == 0
    Path("masks").mkdir()
    for i in range(16):
        Image.fromarray(np.eye(40, dtype=np.uint8)).save(f"masks/{i}.png")
    flags = ["--method", "masks", "--masks", "masks", "--data", data]
    run("object_discovery", *flags, "--out", "masks.npy")


def test_retrieval_command_runs(place):
    save_small(Path("mae_pretrain_vit_base.pth"))
    truth = {"bbx": [0, 0, 20, 20], "easy": [0], "hard": [1], "junk": []}
    gnd = {"imlist": ["a", "b"], "qimlist": ["q"], "gnd": [truth]}
    Path("gnd_roxford5k.pkl").write_bytes(pickle.dumps(gnd))
    for name in ("a", "b", "q"):
        write(Path("path/to/jpg") / f"{name}.jpg", noise(40, 40))
    found = [x for x in COMMANDS if x[0] == "eval_retrieval" and "oxford" in x[1]]
    flags = re.sub(r"^\S+", "mae_pretrain_vit_base.pth", found[0][1])
    module = importlib.import_module("eval_retrieval")
    assert module.main([*flags.split(), "--device=cpu"])


def test_snippets_run(place):
    """Each piece of Python in a scope of its own, the maps first."""
    small = attg_mae.Config(**SMALL)
    models = {"toy-vit_micro-attg": small}
    models["images-vit_small-attg"] = attg_mae.Config("vit_small")
    states = {}
    for name, cfg in models.items():
        states[name] = encoder_only(attg_mae.build_model(cfg).state_dict())
        states[name]["norm.weight"] += 1
        path = Path("out", name, "encoder.pt")
        path.parent.mkdir(parents=True)
        attg_mae.save_checkpoint(path, model=states[name], config=asdict(cfg))
    made = {}
    for code in SNIPPETS:
        names = {"my_maps": np.random.default_rng(0).random((16, 4, 4))}
        exec(code, names)
        made |= names
        if "import timm" in code:
            # timm takes the weights, not only the file.
            weight = states["images-vit_small-attg"]["norm.weight"]
            assert torch.equal(names["model"].norm.weight, weight)
    assert made["class_tokens"].shape == made["patch_means"].shape == (16, 16)
    assert load_maps("maps.npy", open_data("path/to/images"))[0].shape == (16, 4, 4)
    assert made["pred"].grad.any()


# -- Links and figures -----------------------------------------------------------------


def test_files_and_links_exist():
    named = re.findall(r"^\| `([^`]+)`", PAGES["README.md"], re.M)
    first = ["attg_mae.py", "kernels/", "eval_knn.py", "eval_linear.py"]
    assert [x for x in named if x in first] == first
    files = [x for x in named if re.search(r"\.(py|txt)$|/$", x)]
    assert len(files) >= 8 and all((ROOT / name).exists() for name in files)
    for name, page in PAGES.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page):
            assert link.startswith("https:") or (folder / link).exists(), (name, link)
    assert len(PAGES["README.md"].splitlines()) <= 180


def test_walkthrough_is_drawn_and_adds_up(tmp_path, capsys):
    """It raises an error if its sums are not those of MAE.forward."""
    walkthrough.main(["--out", str(tmp_path / "w.png")])
    assert "sum(mask)" in capsys.readouterr().out
    with Image.open(tmp_path / "w.png") as sheet:
        assert min(sheet.size) > 600


def test_walkthrough_quotes_lines_of_the_code():
    source = {line.strip() for line in (ROOT / "attg_mae.py").read_text().splitlines()}
    quoted = re.findall(r"```text\n(.*?)```", PAGES["walkthrough.md"], re.S)
    lines = [line.strip() for block in quoted for line in block.splitlines()]
    assert len(lines) > 15
    assert [line for line in lines if line != "..." and line not in source] == []


def test_figure_of_the_idea_is_drawn(labelled, whole, tmp_path):
    guided, vanilla = whole(), tmp_path / "vanilla"
    train(vanilla, **labelled | {"maps": None, "guidance": "none"}, epochs=1)
    runs = ["--vanilla", f"{vanilla}/last.pt", "--guided", f"{guided}/last.pt"]
    images = ["--maps", labelled["maps"], "--split", "train", "--count", "2"]
    idea.main([*runs, *images, "--out", str(tmp_path / "idea.png")])
    with Image.open(tmp_path / "idea.png") as sheet:
        assert sheet.width > 6 * 128 and sheet.height > 2 * 128
    with pytest.raises(ValueError, match="encoder.pt: not the last.pt of a run"):
        idea.main(["--vanilla", f"{guided}/encoder.pt", "--guided", "x"])
