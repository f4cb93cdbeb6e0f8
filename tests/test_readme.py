"""
Every command and every piece of code that README.md and docs/ show is run, on small
models and pictures.
"""

import pickle
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F

import attg.datasets
import attg.evaluation
import attg_mae
import eval_finetune
import eval_knn
import eval_linear
import eval_retrieval
import object_discovery
from attg.datasets import open_data, open_labelled
from attg.maps import load_maps, save_maps
from docs import idea, walkthrough
from tests.helpers import (
    ROOT,
    SMALL,
    check_grad,
    close,
    encoder_only,
    hf_model,
    kernel,
    make_data,
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

PAGES = {path.name: path.read_text() for path in sorted(ROOT.glob("docs/*.md"))}
PAGES["README.md"] = (ROOT / "README.md").read_text()
SCRIPTS = "attg_mae|object_discovery|eval_knn|eval_linear|eval_finetune|eval_retrieval"
# Of a line, or code in a table
START = r"(?:^|(?:\| |and )`)(?:pip .* && )?(?:python|torchrun \S+)"
COMMANDS, SNIPPETS = [], []
for page in PAGES.values():
    COMMANDS += re.findall(rf"{START} ({SCRIPTS})\.py([^#`\n]*)", page, re.M)
    SNIPPETS += re.findall(r"```python\n(.*?)```", page, re.S)
COMMANDS = sorted({(script, command.strip()) for script, command in COMMANDS})
SNIPPETS = sorted(set(SNIPPETS))
CHANGES = re.findall(r"```diff\n(.*?)```", PAGES["kernel.md"], re.S)
DIFFS = dict(zip(("mae", "hf", "lightly"), CHANGES, strict=True))


def dropped_in(name, parameters, **names):
    """[(loss, gradients)] of the README's code before and after the change, the latter
    with a flat and a random map.
    """
    B, L = names.pop("shape")
    names |= dict(
        attg_loss=kernel.attg_loss, normalize_map=kernel.normalize_map, tau=0.9
    )
    for sign, attn in (
        ("-", None),
        ("+", torch.full((B, L), 0.3)),
        ("+", rand(B, L, seed=9) * 40 - 7),
    ):
        torch.manual_seed(3)  # Hugging Face draws its mask
        scope = names | {"attn": attn}
        exec(
            "\n".join(
                x[1:].strip() for x in DIFFS[name].splitlines() if x[0] in " " + sign
            ),
            scope,
        )
        yield (
            scope["loss"],
            torch.autograd.grad(
                scope["loss"], parameters, retain_graph=True, allow_unused=True
            ),
            scope,
        )


def compare_drop_in(runs, pred, target, mask, norm_pix):
    """Before = after with a flat map, loss and every gradient; the weighted loss is the
    loop's.
    """
    (before, want, _), (after, got, _), (weighted, other, scope) = runs
    assert close(after, before, 1e-5)
    pairs = [
        x
        for x in zip(got, want, other, strict=True)
        if x[1] is not None and x[1].abs().max() > 1e-6
    ]
    assert len(pairs) > 5
    for a, b, c in pairs:
        assert close(a, b, 1e-4) and not close(c, b, 1e-2) and not close(0 * a, b, 1e-4)
    rows, _, count = oracle(
        pred,
        target,
        mask,
        rand(*mask.shape, seed=9) * 40 - 7,
        tau=0.9,
        norm_pix=norm_pix,
    )
    assert close(weighted, rows.sum() / count, 1e-5)
    assert not close(weighted, before, 1e-2)


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_dropped_into_hugging_face(norm_pix):
    model = hf_model(
        "ViTMAEForPreTraining",
        num_hidden_layers=1,
        decoder_num_hidden_layers=1,
        norm_pix_loss=norm_pix,
    )
    imgs = randn(2, 3, 32, 32)
    parameters = [p for p in shake(model).parameters() if p.requires_grad]
    runs = list(
        dropped_in("hf", parameters, shape=(2, 64), model=model, pixel_values=imgs)
    )
    out = runs[2][2]["out"]
    compare_drop_in(runs, out.logits, kernel._patchify(imgs, 4), out.mask, norm_pix)


def test_loss_dropped_into_lightly(monkeypatch):
    # It asks its server otherwise
    monkeypatch.setenv("LIGHTLY_DID_VERSION_CHECK", "True")
    pytest.importorskip("lightly")
    from lightly.models import utils
    from lightly.models.modules import MaskedVisionTransformerTIMM

    imgs = randn(2, 3, 32, 32)
    encoder = MaskedVisionTransformerTIMM(timm_model(width=32, depth=1, heads=2))
    keep, hidden = utils.random_token_mask((2, 17), 0.75)
    decoder = nn.Linear(32, 192)
    pred = decoder(utils.get_at_index(encoder.encode(imgs, idx_mask=hidden), hidden))
    names = dict(
        patches=utils.patchify(imgs, 8),
        idx_mask=hidden,
        x_pred=pred,
        utils=utils,
        criterion=nn.MSELoss(),
    )
    parameters = [
        p for m in (encoder, decoder) for p in m.parameters() if p.requires_grad
    ]
    runs = list(dropped_in("lightly", parameters, shape=(2, 16), **names))
    place = (hidden - 1)[..., None].expand_as(pred)
    full = torch.zeros(2, 16, 192).scatter(1, place, pred.detach())
    compare_drop_in(
        runs,
        full,
        names["patches"],
        torch.zeros(2, 16).scatter(1, hidden - 1, 1.0),
        False,
    )


def test_loss_dropped_into_mae():
    imgs = randn(2, 3, 8, 12)
    mask = rand(2, 6, seed=2) < 0.7
    pred = randn(2, 6, 48, seed=3).requires_grad_()
    assert mask.any() and not mask.all()

    def forward_loss(imgs, pred, mask):  # as MAE defines it
        return (
            F.mse_loss(pred, normalized, reduction="none").mean(-1) * mask
        ).sum() / mask.sum()

    x = kernel._patchify(imgs, 4)
    normalized = (x - x.mean(-1, keepdim=True)) / (
        x.var(-1, keepdim=True) + 1e-6
    ) ** 0.5
    embed = SimpleNamespace(patch_size=(4, 4))
    model = SimpleNamespace(
        forward_loss=forward_loss, patch_embed=embed, norm_pix_loss=True
    )
    runs = dropped_in(
        "mae", [pred], shape=(2, 6), self=model, imgs=imgs, pred=pred, mask=mask
    )
    (before, want, _), (after, got, _), (weighted, _, _) = runs
    assert close(after, before, 1e-6)
    check_grad(got[0], want[0], 1e-5)
    rows, _, count = oracle(pred, x, mask, rand(2, 6, seed=9) * 40 - 7, tau=0.9)
    assert close(weighted, rows.sum() / count, 1e-5)
    assert not close(weighted, before, 1e-2)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with the pictures, maps and weights that the README's
    commands name.
    """
    for i in range(16):
        for c in "rgbc":
            write(
                tmp_path / "path/to/imagenet/train" / c / f"{i}.png", noise(40, 40, i)
            )
        write(tmp_path / "path/to/images" / f"{i}.png", noise(40, 40, i))
        mask = Image.fromarray(np.eye(40, dtype=np.uint8))
        write(tmp_path / "pairs/masks" / f"{i}.png", mask)
    (tmp_path / "imagenet100.txt").write_text("r\nb\n")
    monkeypatch.chdir(tmp_path)
    large = attg_mae.build_model(attg_mae.Config("vit_large", **SMALL))
    for name in ("visualize_vit_large", "pretrain_vit_large_full"):
        torch.save({"model": large.state_dict()}, f"mae_{name}.pth")
    return tmp_path


def test_the_pages_show_commands_and_code():
    assert len(COMMANDS) >= 30 and len(SNIPPETS) >= 4
    assert {script for script, _ in COMMANDS} == set(SCRIPTS.split("|"))


def test_readme_names_what_is_there():
    """Every file that its list names, and every link, within the repository."""
    readme = PAGES["README.md"]
    named = re.findall(r"^\| `([^`]+)`", readme, re.M)
    first = ["attg_mae.py", "kernels/", "eval_knn.py", "eval_linear.py"]
    assert named[:6] == [*first, "test_attg.py", "requirements.txt"]
    for name, page in PAGES.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page):
            assert link.startswith("https:") or (folder / link).exists(), (name, link)
    assert all((ROOT / name).exists() for name in named)


@pytest.mark.parametrize(("script", "command"), COMMANDS)
def test_command(script, command, place, monkeypatch, tmp_path_factory):
    argv = [*command.split(), "--device=cpu"]
    if script.startswith("eval"):
        run_evaluation(script, argv, monkeypatch, tmp_path_factory.mktemp("few"))
    elif script == "object_discovery":
        run_discovery(argv, monkeypatch)
    else:
        if command:
            # The whole toy set once is enough: in the command without a flag.
            whole = attg.datasets.toy
            monkeypatch.setattr(
                attg.datasets, "toy", lambda split: [x[:1000] for x in whole(split)]
            )
        run_training(argv)


PROGRAMS = {
    "eval_knn": eval_knn,
    "eval_linear": eval_linear,
    "eval_finetune": eval_finetune,
    "eval_retrieval": eval_retrieval,
}


def run_evaluation(script, argv, monkeypatch, folder):
    """On a small model, with 50 images of a class, as many as --shots wants."""
    save_small(Path(argv[0]))
    if script == "eval_retrieval":
        truth = {"bbx": [0, 0, 20, 20], "easy": [0], "hard": [1], "junk": []}
        gnd = {"imlist": ["a", "b"], "qimlist": ["q"], "gnd": [truth]}
        Path(argv[argv.index("--gnd") + 1]).write_bytes(pickle.dumps(gnd))
        for name in ("a", "b", "q"):
            write(Path("path/to/jpg") / f"{name}.jpg", noise(40, 40))
    labelled = make_data(folder)["data"]
    for part in ("train", "test"):
        for c in Path(labelled, part).iterdir():
            for i in range(50):
                write(c / f"more{i}.png", noise(32, 32, i))

    def opened(_, tests, *args, **options):
        train_set, sets = open_labelled(labelled, ["test"], *args, **options)
        return train_set, {name: sets["test"] for name in tests}

    def untrained(x, labels, lrs, num_classes, **_):
        return torch.zeros(len(lrs), x.shape[1], num_classes)

    monkeypatch.setattr(attg.evaluation, "open_labelled", opened)
    monkeypatch.setattr(eval_linear, "train_heads", untrained)
    if script in ("eval_linear", "eval_finetune"):
        argv += ["--epochs=1", "--batch_size=3"]  # 1 % is an image a class
    if script == "eval_finetune" or "mae" in argv:
        argv += ["--accum=1"]
    rows = PROGRAMS[script].main(argv)
    assert len(rows) >= 1
    assert "--val" not in argv or {row["test"] for row in rows} <= set(argv)


def run_discovery(argv, monkeypatch):
    """With the weights of a shallow model for those that the command names."""
    weights = "dino.pth"
    if "--backbone" in argv and argv[argv.index("--backbone") + 1].endswith(".pt"):
        weights = argv[argv.index("--backbone") + 1]
    model = attg_mae.build_model(attg_mae.Config("vit_small", img_size=32, depth=1))
    Path(weights).parent.mkdir(parents=True, exist_ok=True)
    torch.save(encoder_only(model.state_dict()), weights)
    pictures = open_data("path/to/images")
    if "gradcam" in argv:
        torch.save(torchvision.models.resnet50().state_dict(), "dino.pth")
        pictures = pictures.subset(torch.arange(2))
    monkeypatch.setattr(object_discovery, "download", lambda *_: Path("dino.pth"))
    monkeypatch.setattr(object_discovery, "open_data", lambda *_, **__: pictures)
    made = object_discovery.main(argv)["maps"]
    assert load_maps(made, pictures)[0].any()
    assert Path(made).with_suffix(".png").is_file() == ("--show" in argv)


def run_training(argv):
    """Of a small model, with maps made up."""
    small = [f"--{name}={value}" for name, value in SMALL.items()]
    own = "--data" in argv
    data = argv[argv.index("--data") + 1] if own else "toy"
    size = 16 if own else len(attg.datasets.toy("train")[0]) // 2
    if "--classes" in argv:
        size = 4  # two of four classes
    small += ["--epochs=1", "--workers=0", f"--batch_size={size}"]
    if "--maps" in argv:
        classes = argv[argv.index("--classes") + 1] if "--classes" in argv else None
        dataset = open_data(data, classes=classes)
        maps = np.random.default_rng(0).random((len(dataset), 4, 4))
        save_maps(argv[argv.index("--maps") + 1], maps, dataset, "random")
    without_epochs = []
    skip = False
    for word in argv:
        # --epochs 0 stays: pictures only; hundreds become one
        if skip and word != "0":
            without_epochs.pop()
        else:
            without_epochs.append(word)
        skip = word == "--epochs"
    result = attg_mae.main(small + without_epochs)
    assert Path(result["out"], "reconstructions.png").is_file()
    # Only toy has labels and a test split here
    assert ("class_token" in result["knn"]) == (not own)


def test_snippets(place):
    """In an order in which each finds its names: those of the maps, then the others."""
    small = attg_mae.Config(**SMALL)
    models = {"toy-vit_micro-attg": small}
    models["images-vit_small-attg"] = attg_mae.Config("vit_small")
    for name, cfg in models.items():
        encoder = encoder_only(attg_mae.build_model(cfg).state_dict())
        path = Path("out", name, "encoder.pt")
        path.parent.mkdir(parents=True)
        attg_mae.save_checkpoint(path, model=encoder, config=asdict(cfg))
    made = {}
    for code in SNIPPETS:
        names = {"my_maps": np.random.default_rng(0).random((16, 4, 4))}
        exec(code, names)
        made |= names
    assert made["class_tokens"].shape == made["patch_means"].shape == (16, 16)
    assert load_maps("maps.npy", open_data("path/to/images"))[0].shape == (16, 4, 4)
    assert made["pred"].grad.any()


def test_encoder_of_the_timm_snippet(place):
    """timm takes the weights, not only the file."""
    cfg = attg_mae.Config("vit_small")
    encoder = encoder_only(attg_mae.build_model(cfg).state_dict())
    encoder["norm.weight"] += 1
    path = Path("out/images-vit_small-attg/encoder.pt")
    path.parent.mkdir(parents=True)
    attg_mae.save_checkpoint(path, model=encoder, config=asdict(cfg))
    (code,) = [code for code in SNIPPETS if "import timm" in code]
    names = {}
    exec(code, names)
    assert torch.equal(names["model"].norm.weight, encoder["norm.weight"])


def test_the_walkthrough_is_drawn_and_adds_up(tmp_path, capsys):
    """It stops by itself where its sums are not those of MAE.forward."""
    walkthrough.main(["--out", str(tmp_path / "w.png")])
    words = capsys.readouterr().out
    assert "sum(mask)" in words
    with Image.open(tmp_path / "w.png") as sheet:
        assert min(sheet.size) > 600


def test_the_walkthrough_quotes_lines_that_are_there():
    source = {line.strip() for line in (ROOT / "attg_mae.py").read_text().splitlines()}
    quoted = re.findall(r"```text\n(.*?)```", PAGES["walkthrough.md"], re.S)
    lines = [line.strip() for block in quoted for line in block.splitlines()]
    assert len(lines) > 15
    assert [line for line in lines if line != "..." and line not in source] == []


def test_the_figure_of_the_idea_is_drawn(labelled, whole, tmp_path):
    guided = whole()
    vanilla = tmp_path / "vanilla"
    train(vanilla, **labelled | {"maps": None, "guidance": "none"}, epochs=1)
    runs = ["--vanilla", f"{vanilla}/last.pt", "--guided", f"{guided}/last.pt"]
    pictures = ["--maps", labelled["maps"], "--split", "train", "--count", "2"]
    idea.main([*runs, *pictures, "--out", str(tmp_path / "idea.png")])
    with Image.open(tmp_path / "idea.png") as sheet:
        assert sheet.width > 6 * 128 and sheet.height > 2 * 128
    with pytest.raises(ValueError, match="encoder.pt: give the last.pt of a run"):
        idea.main(["--vanilla", f"{guided}/encoder.pt", "--guided", "x"])
