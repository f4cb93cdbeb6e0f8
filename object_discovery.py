"""
Attention maps for a whole data set, once, ahead of training (Sick et al., arXiv 2402.15172): TokenCut, DINO, Grad-CAM.

    python object_discovery.py --method tokencut --backbone dino_vits16 --data PATH_OR_NAME --out maps.npy
    python object_discovery.py --method dino --backbone mae_pretrain_vit_base.pth --data PATH --out maps.npy
    python object_discovery.py --method gradcam --backbone resnet50 --data PATH --out maps.npy
    python object_discovery.py --method masks --masks DIR --data PATH --out maps.npy          # your own PNG masks
    torchrun --nproc_per_node=8 object_discovery.py --method tokencut --data PATH --out maps.npy

Maps are made of the whole picture squashed to the input size; attg_mae.py --maps pools them over each crop. The
backbone of tokencut and dino may be any checkpoint of this project or of MAE, so that no outside weights are needed. An
interrupted job goes on with the same command. --show N draws a sheet, --masks DIR (or the toy set) tells the quality.

Shapes: B images, H heads, L patches of a grid (h, w), d or D channels.
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL.Image import Resampling
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from attg_mae import IMAGENET_MEAN, IMAGENET_STD, load_encoder, normalize
from common.data import make_loader, open_data, to_rgb
from common.files import replacing, save_sheet, sha256
from common.maps import chunks, load_maps, quality, read_mask, save_maps, true_masks
from common.run import load_checkpoint, processes, wait
from kernels import normalize_map

# ---------------------------------------------------------------------------------------------------------------------
# The methods


@torch.no_grad()
def tokencut(features, tau=0.2, eps=1e-5):
    """TokenCut's map: the second-smallest generalised eigenvector of (D - A) y = lambda D y of each image.

    features (B, L, d): a vector for each patch, any float type, any device. Returns (B, L) on that device, float64 for
    float64 features, else float32. A_ij = 1 where the cosine of features i and j is above tau, else eps; a zero vector
    has cosine 0 to all. D = diag(A 1). y^T D y = 1 as in scipy.linalg.eigh(D - A, D), the entry of largest magnitude is
    positive. The vector of an image does not depend on its batch, up to rounding. One patch alone has none: zeros.
    ValueError names the images whose features are not finite. Wang et al., TokenCut, arXiv 2202.11539.
    """
    B, L, _ = features.shape
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    x = (features.cpu() if features.device.type == "mps" else features).to(
        dtype
    )  # MPS has no float64
    norm = x.norm(dim=-1, keepdim=True)
    bad = (~norm.isfinite()).any(1).flatten().nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the features of image {', '.join(map(str, bad))} of the batch hold NaN or inf"
        )
    if L < 2 or B == 0:
        return features.new_zeros(B, L, dtype=dtype)
    x = x / norm.clamp_min(1e-12)
    start = torch.randn(
        L, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).to(x.device)
    steps, out = min(L - 1, 96), []
    for part in x.split(
        max(1, 2 ** (19 if x.device.type == "cpu" else 27) // L**2)
    ):  # A of 4 MB (cache) or 1 GB
        with torch.autocast(x.device.type, enabled=False):
            A = part @ part.mT > tau
        S = (
            (A | A.mT).double().clamp_(min=eps)
        )  # | because rounding need not be symmetric
        d = S.sum(-1)
        r = torch.where(d > 0, d.rsqrt(), 0)  # d is 0 for a zero vector if eps is 0
        S.mul_(r[:, :, None]).mul_(
            r[:, None]
        )  # D^-1/2 A D^-1/2: we want its second largest eigenvalue, >= 0
        # Lanczos: Q is an orthonormal basis, SQ its image. Row 0 is the known eigenvector of eigenvalue 1, there
        # for the others to stay orthogonal to: what they find is the largest eigenvalue of the rest.
        Q, SQ = S.new_empty(2, len(part), steps + 1, L)
        Q[:, 0] = (d / d.sum(1, keepdim=True)).sqrt()
        w = start.expand(len(part), 1, L)
        for j in range(1, steps + 1):
            P, last = Q[:, :j], Q[:, max(0, j - 3) : j]
            w = w - w @ last.mT @ last  # enough in exact arithmetic
            beta = w.norm(dim=-1, keepdim=True)
            w = torch.where(
                beta < 1e-10, start.roll(j), w / beta
            )  # few distinct eigenvalues: a new start
            w = w - w @ P.mT @ P
            Q[:, j : j + 1] = w / w.norm(dim=-1, keepdim=True)
            w = SQ[:, j : j + 1] = Q[:, j : j + 1] @ S
            if j in (16, 24, 32, 40, 52, 64, 80, steps):
                q, sq = Q[:, 1 : j + 1], SQ[:, 1 : j + 1]
                theta, s = torch.linalg.eigh(q @ sq.mT)
                s = s[:, :, -1:].mT
                v, Sv = s @ q, s @ sq
                # v is off by residual / gap; two close eigenvalues look like one at first: so no bound by theta's gap
                found = (Sv - theta[:, -1:, None] * v).norm(dim=-1).flatten() <= 1e-12
                if found.all():
                    break
        v = v[:, 0]
        if not found.all():
            u = Q[~found, 0]  # its eigenvalue: 1 -> -1, out of the way
            v[~found] = torch.linalg.eigh(
                S[~found] - 2 * u[:, :, None] * u[:, None]
            ).eigenvectors[:, :, -1]
        y = r * v
        size = y.abs()
        first = (
            (size >= (1 - 1e-6) * size.amax(1, keepdim=True))
            .int()
            .argmax(1, keepdim=True)
        )
        out.append(y * y.gather(1, first).sign())
    return torch.cat(out).to(dtype).to(features.device)


@torch.no_grad()
def class_attention(q, k):
    """DINO's map: what the class token looks at, mean of the heads. q, k (B, H, 1 + L, d) -> (B, L)."""
    scores = q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5  # (B, H, 1, 1 + L)
    return scores.softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)


def grad_cam(features, classify, grid, size):
    """Grad-CAM of the highest-scoring class (Selvaraju et al., arXiv 1610.02391).

    features (B, C, h, w): the last convolutional stage; classify: features -> scores (B, classes). The map is upsampled
    to the input size and averaged over the cells of the grid: (B, *grid). Gradients reach the features only.
    """
    with torch.enable_grad():
        features = features.detach().requires_grad_()
        scores = classify(features).amax(dim=1)
        (gradient,) = torch.autograd.grad(scores.sum(), features)
    cam = (
        (gradient.mean(dim=(2, 3), keepdim=True) * features.detach())
        .sum(dim=1, keepdim=True)
        .relu()
    )
    cam = F.interpolate(
        cam, size, mode="bilinear", align_corners=False
    )  # (B, 1, *size)
    return F.adaptive_avg_pool2d(cam, grid)[:, 0]


def patch_statistics(imgs, p):
    """Features without any weights: mean and deviation of each channel in a patch, standardised over the image.

    imgs (B, 3, H, W) -> (B, L, 6). It sees colour and contrast only: objects that differ from their background in
    neither are not found.
    """
    x = F.unfold(imgs, p, stride=p).unflatten(1, (imgs.shape[1], -1))  # (B, 3, p*p, L)
    x = torch.cat([x.mean(dim=2), x.std(dim=2)], dim=1).mT  # (B, L, 6)
    return (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True).clamp_min(
        1e-6
    )


# ---------------------------------------------------------------------------------------------------------------------
# Backbones: each gives (imgs uint8 (B, 3, H, W) -> maps (B, *grid), input size, grid, what the manifest says of it)

DINO = {  # facebookresearch/dino's released weights
    "dino_vits16": "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    "dino_vits8": "dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
    "dino_vitb16": "dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    "dino_vitb8": "dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
}
CNNS = {  # the convolutional stages of torchvision's classifiers, and what follows them
    "resnet50": lambda m: (
        torch.nn.Sequential(
            m.conv1, m.bn1, m.relu, m.maxpool, m.layer1, m.layer2, m.layer3, m.layer4
        ),
        torch.nn.Sequential(m.avgpool, torch.nn.Flatten(), m.fc),
    ),
    "mobilenet_v2": lambda m: (
        m.features,
        torch.nn.Sequential(
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), m.classifier
        ),
    ),
}


def download(url, remedy):
    """The file of the url in torch.hub's folder, downloaded once. Its sha256 is noted then, and checked each time."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    note = Path(f"{path}.sha256")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        except Exception as error:  # urllib has many
            where = f"get {url} elsewhere and put it at {path}, or {remedy}"
            raise ValueError(
                f"{path.name} could not be downloaded ({error}); {where}"
            ) from error
        with replacing(note) as temporary:
            temporary.write_text(sha256(path))
    known = (
        [note.read_text().strip()]
        if note.is_file()
        else re.findall(r"-([0-9a-f]{8})\.pth$", path.name)
    )
    if known and not sha256(path).startswith(known[0]):
        raise ValueError(
            f"{path} is damaged: its sha256 is not {known[0]}; delete it and {note.name}"
        )
    return path


def vit(args, device):
    path = Path(args.backbone)
    if args.backbone in DINO:
        remedy = (
            "pass --backbone CHECKPOINT, or --backbone pixels, which needs no weights"
        )
        path = download(
            f"https://dl.fbaipublicfiles.com/dino/{DINO[args.backbone]}", remedy
        )
    if not path.is_file():
        names = f"{', '.join(DINO)}, pixels, or a checkpoint of this project, MAE, DINO, timm or Hugging Face"
        raise ValueError(
            f"--backbone {args.backbone}: no such file; choose from {names}"
        )
    model = load_encoder(str(path), img_size=args.img_size).to(device)
    model.cfg.mean, model.cfg.std = (
        tuple(args.mean or model.cfg.mean),
        tuple(args.std or model.cfg.std),
    )

    @torch.no_grad()
    def maps(imgs):
        q, k, _ = model.last_qkv(normalize(imgs, model.cfg))  # (B, H, 1 + L, d)
        if args.method == "dino":
            return class_attention(q, k).unflatten(1, model.cfg.grid)
        return cut(k[:, :, 1:].transpose(1, 2).flatten(2), args).unflatten(
            1, model.cfg.grid
        )

    about = {"sha256": sha256(path), "mean": model.cfg.mean, "std": model.cfg.std}
    return maps, model.cfg.size, model.cfg.grid, about


def pixels(args, device):
    size, p = args.img_size or 224, 16
    if size < 2 * p or size % p:
        raise ValueError(
            f"--img_size {size}: --backbone pixels takes multiples of {p}, from {2 * p} on"
        )

    def maps(imgs):
        return cut(patch_statistics(imgs / 255, p), args).unflatten(
            1, (size // p, size // p)
        )

    return maps, (size, size), (size // p, size // p), {}


def cut(features, args):
    """TokenCut's map or bipartition. Flat where all patches are alike, or none: any vector solves that. NaN where the
    features are not finite."""
    finite, L = features.isfinite().all(dim=(1, 2)), features.shape[1]
    features = features.where(finite[:, None, None], 0.0).float()
    y = tokencut(features, args.cut)
    y = (y > y.mean(dim=1, keepdim=True)).float() if args.binary else y
    edges = torch.stack(
        [(x @ x.mT > args.cut).sum() for x in F.normalize(features, dim=-1)]
    )  # (B,)
    y = y.masked_fill(((edges == L * L) | (edges <= L))[:, None], 0.0)
    return y.masked_fill(~finite[:, None], torch.nan)


def cnn(args, device):
    model, path = torchvision.models.get_model(args.backbone), args.weights
    if not path:
        url = torchvision.models.get_model_weights(args.backbone).IMAGENET1K_V1.url
        path = download(url, "name a file of its weights: --weights FILE")
    try:
        model.load_state_dict(load_checkpoint(path))
    except RuntimeError as error:
        raise ValueError(
            f"--weights {path}: not torchvision's {args.backbone} ({error})"
        ) from error
    features, classify = CNNS[args.backbone](
        model.to(device).eval().requires_grad_(False)
    )
    size, grid = (args.img_size or 224,) * 2, (args.grid or 14,) * 2
    cfg = SimpleNamespace(
        mean=tuple(args.mean or IMAGENET_MEAN), std=tuple(args.std or IMAGENET_STD)
    )
    if size[0] < 32:
        raise ValueError(
            f"--img_size {size[0]}: {args.backbone} needs 32 pixels or more, and was trained on 224"
        )

    def maps(imgs):
        with torch.no_grad():
            x = features(normalize(imgs, cfg))  # (B, C, h, w)
        return grad_cam(x, classify, grid, size)

    return maps, size, grid, {"sha256": sha256(path), "mean": cfg.mean, "std": cfg.std}


def masks(args, device):
    """The pictures of --masks are the maps."""
    grid = (args.grid or 56,) * 2
    return lambda imgs: imgs[:, 0].float(), grid, grid, {"masks": str(Path(args.masks))}


# ---------------------------------------------------------------------------------------------------------------------
# The job


class Whole(Dataset):
    """Whole pictures squashed to (h, w): [i] -> (uint8 (C, h, w), could it be read). Unreadable ones are black."""

    def __init__(self, dataset, size, folder=None):
        self.dataset, self.size, self.folder = dataset, size, folder

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        h, w = self.size
        try:
            if self.folder:
                return pil_to_tensor(
                    read_mask(self.folder, self.dataset.names[i]).resize(
                        (w, h), Resampling.BOX
                    )
                ), True
            return pil_to_tensor(
                to_rgb(self.dataset.read(i)[0]).resize((w, h), Resampling.BICUBIC)
            ), True
        except Exception:  # decoders raise OSError, SyntaxError, ValueError ...
            return torch.zeros(1 if self.folder else 3, h, w, dtype=torch.uint8), False


def job_files(path):
    """NAME.npy.part, NAME.npy.part.json and the NAME.done.RANK there are, of an unfinished job."""
    done = re.compile(re.escape(path.stem) + r"\.done\.\d+")
    logs = [file for file in path.parent.glob("*.done.*") if done.fullmatch(file.name)]
    return Path(f"{path}.part"), Path(f"{path}.part.json"), logs


def discover(
    maps, whole, grid, path, settings, batch_size, workers, device, rank, world
):
    """Runs maps over all pictures, into NAME.npy and its manifest; an interrupted job goes on where it was.

    The unit of work is a block of batch_size consecutive pictures. Rows go to NAME.npy.part, numbers of finished blocks
    to NAME.done.RANK after them, settings to NAME.npy.part.json: a job of other settings does not continue this one.
    """
    part, about, _ = job_files(path)
    shape, job = (
        (len(whole), *grid),
        settings | {"fingerprint": whole.dataset.fingerprint, "batch_size": batch_size},
    )
    blocks = [
        range(i, min(i + batch_size, len(whole)))
        for i in range(0, len(whole), batch_size)
    ]

    def finished():
        text = "\n".join(file.read_text() for file in job_files(path)[2])
        return {
            int(number) for number in re.findall(r"(\d+);", text)
        }  # without ; it was killed while it wrote

    def clean():
        for file in (about, part, *job_files(path)[2]):
            file.unlink(missing_ok=True)

    if rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (
            about.is_file()
            and part.is_file()
            and part.stat().st_size == 2 * math.prod(shape)
            and finished()
        ):
            clean()
            with open(part, "wb") as file:
                file.truncate(2 * math.prod(shape))
            with replacing(about) as temporary:
                temporary.write_text(json.dumps(job))
        differ = differences(job, json.loads(about.read_text()))
        if differ:
            remedy = f"give another name, or delete {part.name}, {about.name} and {path.stem}.done.* to start anew"
            raise ValueError(
                f"--out {path}: an unfinished job is there that was begun with {differ}; {remedy}"
            )
    wait(world)
    done = finished()
    wait(world)  # before anybody adds to it
    mine = [i for i in range(len(blocks)) if i not in done][rank::world]
    if rank == 0 and done:
        print(f"going on: {len(done)} of {len(blocks)} blocks are there")
    loader = make_loader(
        whole, batch_sampler=[blocks[i] for i in mine], workers=workers
    )
    count = sum(len(blocks[i]) for i in mine)  # of this process
    seconds = (
        0.1 if sys.stderr.isatty() else 60
    )  # between two states of the bar; a line each in a log file
    bar = tqdm(
        total=count, unit="img", desc="maps", mininterval=seconds, disable=rank > 0
    )
    with (
        bar,
        open(part, "r+b") as rows,
        open(path.with_suffix(f".done.{rank}"), "a") as log,
    ):
        for i, (imgs, readable) in zip(mine, loader, strict=True):
            m = normalize_map(maps(imgs.to(device)).float().flatten(1)).cpu()  # (B, L)
            m[~readable] = torch.nan  # failed, which zeros would not tell
            rows.seek(2 * blocks[i].start * math.prod(grid))
            rows.write(m.half().numpy().astype("<f2").tobytes())
            rows.flush()
            log.write(f"\n{i};")
            log.flush()
            bar.update(len(imgs))
    wait(world)
    if rank == 0:
        missing = set(range(len(blocks))) - finished()
        if missing:
            raise ValueError(
                f"--out {path}: {len(missing)} blocks are missing; run the same command again"
            )
        rows = np.memmap(part, "<f2", "r", shape=shape)
        if all(np.isnan(m).all() for _, m in chunks(rows)):
            clean()
            first = whole.dataset.names[
                0
            ] + f" in --masks {whole.folder}, as .png" * bool(whole.folder)
            reasons = (
                "no picture could be read, or --backbone, --mean or --std are wrong"
            )
            raise ValueError(
                f"not one of {len(whole)} maps is finite: {reasons}; the first picture is {first}"
            )
        large = [
            int(first + i)
            for first, m in chunks(rows)
            for i in np.flatnonzero((m > 0.5).mean((1, 2)) > 0.9)
        ]
        save_maps(path, rows, whole.dataset, large=large, **settings)
        del rows
        clean()
    wait(world)


def differences(new, old):
    """In words; a backbone's weights count, not the name of their file."""
    keys = [
        k
        for k in new
        if old.get(k) != new[k] and not (k == "backbone" and "sha256" in new)
    ]
    return ", ".join(f"{k} {old.get(k)}, not {new[k]}" for k in keys)


# ---------------------------------------------------------------------------------------------------------------------
# How good are they


def show(path, dataset, files, ids, tau=0.75, cell=112):
    """A sheet: image | for each map file its map | weights exp(M / tau) and overlay of the first."""
    whole = Whole(dataset, (cell, cell))
    imgs = torch.stack([whole[i][0] for i in ids]) / 255  # (n, 3, h, w)
    columns, grey = [("image", imgs)], lambda x: x.expand(-1, 3, -1, -1)
    for name, maps in files.items():
        m = torch.from_numpy(np.float32(maps[ids]))[:, None]
        columns.append((Path(name).stem[:18], grey(F.interpolate(m, (cell, cell)))))
        if name == next(iter(files)):
            w = torch.exp(F.interpolate(m, (cell, cell)) / tau)
            smooth = F.interpolate(
                m, (cell, cell), mode="bilinear", align_corners=False
            )
            columns += [
                (
                    f"exp(M / {tau}), 1 to {math.exp(1 / tau):.2f}",
                    grey((w - 1) / (math.exp(1 / tau) - 1)),
                )
            ]
            columns += [("overlay", imgs * (0.15 + 0.85 * smooth))]
    save_sheet(path, columns, cell=cell)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--method", choices=("tokencut", "dino", "gradcam", "masks"), default="tokencut"
    )
    add(
        "--backbone",
        help=f"{', '.join(DINO)}, a checkpoint, or pixels (tokencut); {', '.join(CNNS)} (gradcam)",
    )
    add(
        "--weights",
        help="file with the weights of gradcam's backbone [torchvision's, downloaded once]",
    )
    add(
        "--binary",
        action="store_true",
        help="TokenCut's bipartition at the mean instead of the eigenvector",
    )
    add(
        "--cut",
        type=float,
        default=0.2,
        help="cosine above which two patches belong together [%(default)s]",
    )
    add(
        "--masks",
        help="folder of PNG masks: the maps of --method masks, else the truth to compare the maps with",
    )
    add("--data", default="toy", help="as for attg_mae.py [%(default)s]")
    add("--classes", help="file with the class folders to keep, one a line")
    add("--out", default="maps.npy", type=Path, help="map file [%(default)s]")
    add(
        "--img_size",
        type=int,
        help="input size of the backbone in pixels [a checkpoint's own, else 224]",
    )
    add(
        "--grid",
        type=int,
        help="cells a side of the maps of gradcam [14] and masks [56]",
    )
    add(
        "--mean",
        type=float,
        nargs=3,
        help="channel means of the backbone's input [the checkpoint's, ImageNet's]",
    )
    add("--std", type=float, nargs=3, help="channel deviations")
    add(
        "--batch_size",
        type=int,
        default=64,
        help="pictures in a block of work [%(default)s]",
    )
    add("--device", help="cuda, mps or cpu [the first there is]")
    add("--workers", type=int, help="loader processes of each process [CPU 0, GPU 8]")
    add(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="write a sheet of N pictures beside the map file",
    )
    add(
        "--with",
        dest="others",
        nargs="+",
        default=[],
        type=Path,
        help="more map files to compare",
    )
    args = parser.parse_args(argv)
    method, gradcam = args.method, args.method == "gradcam"
    used = {
        "gradcam": "backbone weights img_size grid mean std",
        "masks": "grid",
        "dino": "backbone img_size mean std",
    }
    used = used.get(
        method, "backbone img_size binary" + " mean std" * (args.backbone != "pixels")
    ).split()
    names = ("backbone", "weights", "img_size", "grid", "mean", "std", "binary")
    unused = [
        f"--{k}"
        for k in names
        if getattr(args, k) not in (None, False) and k not in used
    ]
    args.backbone = args.backbone or {"gradcam": "resnet50", "masks": None}.get(
        method, "dino_vits16"
    )
    flat = (
        Path(args.data).is_dir()
        and args.out.resolve().parent == Path(args.data).resolve()
    )
    lost = [str(path) for path in args.others if not path.is_file()]
    low = [f"--{k} {v}: must be {least} or more" for k, least in (("batch_size", 1), ("img_size", 1), ("grid", 1),
           ("show", 0), ("workers", 0)) if (v := getattr(args, k)) is not None and v < least]  # fmt: skip
    wrong = (
        (args.out.suffix != ".npy", f"--out {args.out}: must end in .npy"),
        (
            flat,
            f"--out {args.out}: is among the pictures of --data; choose another folder",
        ),
        (
            gradcam and args.backbone not in CNNS,
            f"--backbone {args.backbone}: gradcam takes {' or '.join(CNNS)}",
        ),
        (
            not gradcam and args.backbone in CNNS,
            f"--backbone {args.backbone}: is for --method gradcam",
        ),
        (
            args.weights and not gradcam,
            "--weights: is for --method gradcam; name a checkpoint with --backbone",
        ),
        (
            method == "dino" and args.backbone == "pixels",
            "--backbone pixels: has no attention; use --method tokencut",
        ),
        (
            method == "masks" and not args.masks,
            "--method masks: name their folder, --masks DIR",
        ),
        (
            args.masks and not Path(args.masks).is_dir(),
            f"--masks {args.masks}: no such folder",
        ),
        (
            unused,
            f"{', '.join(unused)}: --method {method} --backbone {args.backbone} does not use it; leave it out",
        ),
        (
            lost,
            f"--with {', '.join(lost)}: no such .npy file; name map files that are finished",
        ),
        (low, ", ".join(low)),
        (not -1 < args.cut < 1, f"--cut {args.cut}: is a cosine, between -1 and 1"),
    )
    for condition, text in wrong:
        if condition:
            raise ValueError(text)
    return args


def main(argv=None):
    """Returns {"maps": path, "manifest": dict, "quality": {file: figures}}, the last empty without true masks."""
    args = arguments(argv)
    with processes(args.device) as (device, rank, world):
        dataset = open_data(args.data, "train", classes=args.classes)
        if rank:
            wait(world)  # the first process downloads
        make = {"gradcam": cnn, "masks": masks}.get(
            args.method, pixels if args.backbone == "pixels" else vit
        )
        maps, size, grid, about = make(args, device)
        if rank == 0:
            wait(world)
        settings = {
            "method": args.method,
            "backbone": args.backbone,
            "input": size,
            "grid": grid,
        } | about
        if args.method == "tokencut":
            settings |= {"binary": args.binary, "cut": args.cut}
        settings = json.loads(json.dumps(settings))
        workers = (
            args.workers
            if args.workers is not None
            else 0
            if device.type == "cpu"
            else 8
        )
        whole = Whole(dataset, size, args.masks if args.method == "masks" else None)
        try:
            if (
                not (args.out.is_file() and args.out.with_suffix(".json").is_file())
                or job_files(args.out)[1].is_file()
            ):
                discover(
                    maps,
                    whole,
                    grid,
                    args.out,
                    settings,
                    args.batch_size,
                    workers,
                    device,
                    rank,
                    world,
                )
        except OSError as error:
            text = f"--out {args.out}: cannot be written ({error}); choose another place, or make room and run it again"
            raise OSError(text) from error
    result = {"maps": str(args.out), "manifest": None, "quality": {}}
    if rank:
        return result
    files = {}
    for path in (args.out, *args.others):
        try:
            files[str(path)], manifest = load_maps(path, dataset)
        except ValueError as error:
            flag = "--out" if path == args.out else "--with"
            raise ValueError(
                f"{flag} {path}: {error}; or delete it, or give another name"
            ) from error
        counts = [f"{len(manifest[k])} {k}" for k in ("flat", "failed")]
        counts.append(
            f"{len(manifest['settings'].get('large', []))} larger than 90 % of the picture"
        )
        print(
            f"{path}: {len(dataset)} maps of {manifest['shape'][1:]} by {manifest['method']}, {', '.join(counts)}"
        )
        if (
            manifest["method"] == "tokencut"
            and len(manifest["flat"]) > len(dataset) / 10
        ):
            print(
                "hint: flat maps weigh nothing. Patches that are all alike call for a higher --cut (0.5 to 0.9)"
            )
        if manifest["failed"]:
            names = ", ".join(dataset.names[i] for i in manifest["failed"][:10])
            print(
                f"failed, unreadable or not finite: {names} ... (all are in the manifest; delete it to try again)"
            )
        if path == args.out:
            differ = differences(
                settings, {"method": manifest["method"], **manifest["settings"]}
            )
            if differ:
                raise ValueError(
                    f"--out {path}: was made with {differ}; delete it or give another name"
                )
            result["manifest"] = manifest
    folder = None if args.method == "masks" else args.masks
    if folder or dataset.masks is not None:
        for name, rows in files.items():
            q = result["quality"][name] = quality(
                rows, true_masks(dataset, folder, range(len(dataset)))
            )
            print(
                "{}: IoU {IoU:.1f}, CorLoc {CorLoc:.1f}, AUROC {AUROC:.1f} on {images} images".format(
                    name, **q
                )
            )
    if args.show:
        ids = np.unique(np.linspace(0, len(dataset) - 1, args.show).round().astype(int))
        show(args.out.with_suffix(".png"), dataset, files, ids)
        print(f"sheet: {args.out.with_suffix('.png')}")
    return result


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"object_discovery.py: error: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(
            f"object_discovery.py: error: out of memory ({error}); use a smaller --batch_size"
        )
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on")
