"""
Attention maps for a whole data set, made once, ahead of training (Sick et al.,
arXiv 2402.15172), by TokenCut, by DINO's class attention or by Grad-CAM.

    python object_discovery.py --backbone pixels --out maps.npy --show 8
    python object_discovery.py --method tokencut --backbone dino_vits16 --data DATA --out maps.npy
    python object_discovery.py --method dino --backbone ENCODER.pt --data DATA --out maps.npy
    python object_discovery.py --method tokencut --backbone resnet50 --data DATA --out maps.npy
    python object_discovery.py --method gradcam --backbone resnet50 --data DATA --out maps.npy
    python object_discovery.py --method masks --masks DIR --data DATA --out maps.npy
    torchrun --nproc_per_node=8 object_discovery.py --method tokencut --data DATA --out maps.npy

The first needs no weights and no data: the embedded toy set takes about half a
minute on one CPU core. The backbone of tokencut and dino may be any checkpoint of
this project or of MAE; dino_vits16 is downloaded. resnet50 and mobilenet_v2 are
classifiers, trained with ImageNet's labels. --method masks takes PNG masks of your own
as the maps. DATA is a folder or a name, as for attg_mae.py.

Maps are made of the whole picture squashed to the input size; attg_mae.py --maps
pools them over each crop. An interrupted job goes on with the same command.
--show N draws a sheet beside the map file. --masks DIR (or the toy set, which has
masks) tells how good the maps are.

Shapes: B images, H heads, L patches of a grid (h, w), d or D channels.
"""

if __name__ == "__main__":
    from attg.cli import ignore_sigint_during_import

    ignore_sigint_during_import()

import json
import math
import re
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL.Image import Resampling
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from attg.checkpoint import load_checkpoint
from attg.cli import Parser, check_numbers, end, progress, say
from attg.datasets import LINES, open_data, resolve_dataset
from attg.distributed import (
    TIMEOUT,
    add_timeout,
    default_workers,
    exclusive_run,
    processes,
    wait,
)
from attg.figures import save_sheet
from attg.files import replacing, sha256
from attg.images import MAX_PIXELS, MODES, to_8_bits
from attg.kernels import normalize_map
from attg.loader import make_loader
from attg.map_quality import part_of_maximum, quality, read_mask, true_masks
from attg.maps import chunks, load_maps, save_maps
from attg_mae import IMAGENET_MEAN, IMAGENET_STD, load_encoder, normalize

# -- The methods: TokenCut -------------------------------------------------------------


def normalized_affinity(edges, eps):
    """The symmetric form of the cut's eigenproblem, of a graph edges: bool (B, L, L).

    (D - A) y = lambda D y becomes S v = (1 - lambda) v with S = D^-1/2 A D^-1/2 and
    y = D^-1/2 v: the second-smallest lambda is the second-largest eigenvalue of S.
    Returns S (B, L, L), the diagonal of D^-1/2 (B, L), and the largest eigenvector
    of S, which is known: D^1/2 1, of eigenvalue 1 (B, L). All float64.
    """
    A = edges.double().clamp_(min=eps)
    degree = A.sum(dim=-1)
    # With eps = 0 a zero vector has degree 0: it is left out of the graph.
    scale = torch.where(degree > 0, degree.rsqrt(), 0)
    # In place, because A is what fills the cache.
    S = A.mul_(scale[:, :, None]).mul_(scale[:, None])
    trivial = (degree / degree.sum(dim=1, keepdim=True)).sqrt()
    return S, scale, trivial


def positive_peak(y):
    """y (B, L) with the sign that makes its entry of largest magnitude positive."""
    size = y.abs()
    # Of entries that are equal but for rounding the first one decides.
    nearly_largest = size >= (1 - 1e-6) * size.amax(dim=1, keepdim=True)
    first = nearly_largest.int().argmax(dim=1, keepdim=True)
    return y * y.gather(1, first).sign()


def border_sign(maps):
    """Maps (B, h, w) in [0, 1], or 1 - M where the border of M is above its inside.

    Another rule for which end of the eigenvector is the object than TokenCut's largest
    magnitude: what reaches the edges of the picture is background. MaskCut has one of
    this kind, about the four corners (Wang et al., CutLER, arXiv 2301.11320). The border
    is the outermost cells; means are compared. Cells that are NaN do not count. Grids
    without a cell inside are left as they are.
    """
    border = torch.ones(maps.shape[1:], dtype=torch.bool, device=maps.device)
    border[1:-1, 1:-1] = False
    # Without a cell the mean is NaN, which is above nothing.
    outer, inner = maps[:, border].nanmean(dim=1), maps[:, ~border].nanmean(dim=1)
    return torch.where((outer > inner)[:, None, None], 1 - maps, maps)


def tokencut_dense(edges, eps):
    """TokenCut by the book: what `tokencut` computes, with a dense eigen-solver.

    edges: bool (B, L, L), symmetric. Returns y (B, L), float64. It takes O(L^3) an
    image, and serves those on which `lanczos` does not converge.
    """
    S, scale, trivial = normalized_affinity(edges, eps)
    # The trivial eigenvalue goes from 1 to -1, so the second largest comes out last.
    deflated = S - 2 * trivial[:, :, None] * trivial[:, None]
    v = torch.linalg.eigh(deflated).eigenvectors[:, :, -1]
    return positive_peak(scale * v)


# Numbers of Lanczos steps after which convergence is tested, and the most of them.
LANCZOS_TESTS = (16, 24, 32, 40, 52, 64, 80)
LANCZOS_STEPS = 96


def lanczos(S, trivial):
    """The second-largest eigenvector of each S (B, L, L), and whether it converged.

    trivial (B, L): the largest one. Returns v (B, L), float64, and bool (B,).
    """
    B, L, _ = S.shape
    steps = min(L - 1, LANCZOS_STEPS)
    # The same start for every image: a vector must not depend on its batch.
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(L, generator=generator, dtype=torch.float64).to(S.device)

    # Rows of `basis` are orthonormal, rows of `images` are S times them. Row 0 is the
    # trivial eigenvector. All others are orthogonal to it, so that the largest
    # eigenvalue they see is the second largest of S.
    basis, images = S.new_empty(2, B, steps + 1, L)
    basis[:, 0] = trivial
    w = start.expand(B, 1, L)
    for j in range(1, steps + 1):
        # In exact arithmetic w needs to be made orthogonal to the last few rows only.
        recent = basis[:, max(0, j - 3) : j]
        w = w - w @ recent.mT @ recent
        # Nothing is left where S has few distinct eigenvalues: start anew there, with
        # another vector, or rounding errors would be blown up to a basis vector.
        beta = w.norm(dim=-1, keepdim=True)
        w = torch.where(beta < 1e-10, start.roll(j), w / beta)
        # Rounding brings the earlier rows back, and the trivial one above all.
        earlier = basis[:, :j]
        w = w - w @ earlier.mT @ earlier
        basis[:, j : j + 1] = w / w.norm(dim=-1, keepdim=True)
        w = basis[:, j : j + 1] @ S
        images[:, j : j + 1] = w
        if j in LANCZOS_TESTS or j == steps:
            v, converged = largest_pair(basis[:, 1 : j + 1], images[:, 1 : j + 1])
            if converged.all():
                break
    return v, converged


def largest_pair(basis, images):
    """Rayleigh-Ritz: S's largest eigenvector in the span of `basis`, and is it one.

    basis, images (B, j, L): orthonormal rows q and the rows S q. Returns v (B, L) and
    bool (B,). A vector is accepted by its residual |S v - theta v| alone. Its error is
    residual / gap, but the gap of the Ritz values must not be used: two eigenvalues
    that lie close together look like one at first, and the next gap looks wide.
    """
    theta, coordinates = torch.linalg.eigh(basis @ images.mT)
    largest = coordinates[:, :, -1:].mT  # (B, 1, j)
    v = largest @ basis
    image = largest @ images
    residual = (image - theta[:, -1:, None] * v).norm(dim=-1).flatten()
    return v[:, 0], residual <= 1e-12


@torch.no_grad()
def tokencut(features, tau=0.2, eps=1e-5):
    """TokenCut's map: the second-smallest generalised eigenvector y of each image,
    (D - A) y = lambda D y. Wang et al., TokenCut, arXiv 2202.11539.

    features (B, L, d): a vector for each patch, any float type, any device. Returns
    (B, L) on that device, float64 for float64 features, else float32.

    A_ij = 1 where the cosine of features i and j is above tau, else eps; a zero vector
    has cosine 0 to all. D = diag(A 1). y^T D y = 1 as in scipy.linalg.eigh(D - A, D),
    and the entry of largest magnitude is positive. The vector of an image does not
    depend on its batch, up to rounding. One patch alone has none: zeros.
    ValueError names the images whose features are not finite.
    """
    B, L, _ = features.shape
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    # MPS has no float64.
    x = features.cpu() if features.device.type == "mps" else features
    x = x.to(dtype)
    norm = x.norm(dim=-1, keepdim=True)
    bad = (~norm.isfinite()).any(dim=1).flatten().nonzero().flatten().tolist()
    if bad:
        names = ", ".join(map(str, bad))
        raise ValueError(f"the features of image {names} of the batch hold NaN or inf")
    if L < 2 or B == 0:
        return features.new_zeros(B, L, dtype=dtype)
    x = x / norm.clamp_min(1e-12)

    # As many images at a time as fill 4 MB of a CPU's cache, or 1 GB of a GPU.
    values = 2**19 if x.device.type == "cpu" else 2**27
    vectors = []
    for part in x.split(max(1, values // L**2)):
        # Autocast would round the cosines to 16 bits.
        with torch.autocast(x.device.type, enabled=False):
            edges = part @ part.mT > tau
        # Rounding need not be symmetric.
        edges = edges | edges.mT
        S, scale, trivial = normalized_affinity(edges, eps)
        v, converged = lanczos(S, trivial)
        y = positive_peak(scale * v)
        if not converged.all():
            y[~converged] = tokencut_dense(edges[~converged], eps)
        vectors.append(y)
    return torch.cat(vectors).to(dtype).to(features.device)


# -- The methods: DINO, Grad-CAM, and features without weights -------------------------


@torch.no_grad()
def class_attention(q, k):
    """DINO's map: what the class token looks at, mean of the heads.

    q, k (B, H, 1 + L, d): queries and keys of a block, the class token first. Returns
    (B, L). Caron et al., arXiv 2104.14294.
    """
    scores = q[:, :, :1] @ k.mT / q.shape[-1] ** 0.5  # (B, H, 1, 1 + L)
    return scores.softmax(dim=-1)[:, :, 0, 1:].mean(dim=1)


def grad_cam(features, classify, grid, size):
    """Grad-CAM of the highest-scoring class (Selvaraju et al., arXiv 1610.02391).

    features (B, C, h, w): the last convolutional stage; classify: features -> scores
    (B, classes). The map is upsampled to the input size and averaged over the cells
    of the grid: (B, *grid). Gradients reach the features only.
    """
    with torch.enable_grad():
        features = features.detach().requires_grad_()
        scores = classify(features).amax(dim=1)
        (gradient,) = torch.autograd.grad(scores.sum(), features)
    weights = gradient.mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
    cam = (weights * features.detach()).sum(dim=1, keepdim=True).relu()
    cam = F.interpolate(cam, size, mode="bilinear", align_corners=False)
    return F.adaptive_avg_pool2d(cam, grid)[:, 0]


def patch_statistics(imgs, p):
    """Features without any weights: mean and deviation of each channel in a patch of
    p x p pixels, standardised over the image.

    imgs (B, 3, H, W) -> (B, L, 6). It sees colour and contrast only: objects that
    differ from their background in neither are not found.
    """
    x = F.unfold(imgs, p, stride=p)  # (B, 3 * p * p, L)
    x = x.unflatten(1, (imgs.shape[1], -1))  # (B, 3, p * p, L)
    x = torch.cat([x.mean(dim=2), x.std(dim=2)], dim=1).mT  # (B, L, 6)
    deviation = x.std(dim=1, keepdim=True).clamp_min(1e-6)
    return (x - x.mean(dim=1, keepdim=True)) / deviation


# -- Backbones: a function for each kind, (args, device) -> Backbone -------------------


class Backbone(NamedTuple):
    """What turns pictures into maps, and what is to be known of it."""

    # uint8 (B, C, H, W) of the input size -> float (B, *grid), NaN where it failed
    maps: Callable
    # (H, W) of the input, in pixels
    size: tuple
    # (h, w) of a map, in cells
    grid: tuple
    # What the manifest says of it beyond its name, plain types
    about: dict


class Channels(NamedTuple):
    """How the input is normalized, in the form that `normalize` takes."""

    mean: tuple
    std: tuple


def input_channels(args, mean, std):
    """The Channels of --mean and --std, or the mean and std of the backbone."""
    for name, usual in (("mean", mean), ("std", std)):
        given = getattr(args, name)
        if given and len(given) != len(usual):
            raise ValueError(
                f"--{name}: {len(given)} values, but --backbone {args.backbone} takes "
                f"pictures of {len(usual)} channels; give {len(usual)}"
            )
    return Channels(tuple(args.mean or mean), tuple(args.std or std))


# facebookresearch/dino's released weights, below this address
DINO_URL = "https://dl.fbaipublicfiles.com/dino/"
DINO = {
    "dino_vits16": "dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    "dino_vits8": "dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
    "dino_vitb16": "dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    "dino_vitb8": "dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
}


def download(url, remedy):
    """The path of the url's file in torch.hub's folder, downloaded once.

    Its sha256 is noted then, and checked each time; without a note, as when somebody
    put the file there, torchvision's file names hold its first digits. ValueError, with
    the remedy, if there is no network; ValueError if the file has changed.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    note = Path(f"{path}.sha256")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path))
        # urllib raises many kinds.
        except Exception as error:
            raise ValueError(
                f"{path.name} could not be downloaded ({error}); "
                f"get {url} elsewhere and put it at {path}, or {remedy}"
            ) from error
        with replacing(note) as temporary:
            temporary.write_text(sha256(path))
    if note.is_file():
        known = [note.read_text().strip()]
    else:
        known = re.findall(r"-([0-9a-f]{8})\.pth$", path.name)
    if known and not sha256(path).startswith(known[0]):
        raise ValueError(
            f"{path} is damaged: its sha256 is not {known[0]}; "
            f"delete it and {note.name}"
        )
    return path


def cut(features, grid, args):
    """Maps of TokenCut's kind, in [0, 1]: features (B, L, d) -> (B, *grid), L = h * w.

    With args.objects above 1 it is MaskCut (Wang et al., CutLER, arXiv 2301.11320): each
    further cut is made without the patches that were found before, and the maps are
    joined by their maximum. NaN where the features are not finite.
    """
    finite = features.isfinite().all(dim=(1, 2))
    features = features.where(finite[:, None, None], 0.0).float()
    taken = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
    joined = one_object(features, taken, grid, args)
    m = joined
    for _ in range(args.objects - 1):
        taken = taken | found(m, taken)
        m = one_object(features, taken, grid, args)
        joined = torch.maximum(joined, m)
    return joined.masked_fill(~finite[:, None, None], torch.nan)


def one_object(features, taken, grid, args):
    """Maps (B, *grid) in [0, 1] of one cut, without the patches taken: (B, L) bool.

    The eigenvector or, with args.binary, its bipartition; which end of it is the object
    by args.sign. 0 where a patch is taken. Flat where all patches are alike, or none:
    any vector solves that.
    """
    # Zero vectors have no edges, so this takes them out of the graph.
    features = features.masked_fill(taken[..., None], 0.0)
    y = tokencut(features, args.cut)
    # Its sign may be that of a patch which is taken.
    y = positive_peak(y.masked_fill(taken, 0.0))
    if args.binary:
        mean = y.masked_fill(taken, torch.nan).nanmean(dim=1, keepdim=True)
        y = (y > mean).float()

    lowest = y.masked_fill(taken, torch.inf).amin(dim=1, keepdim=True)
    m = normalize_map(torch.where(taken, lowest, y))
    directions = F.normalize(features, dim=-1)
    # One image at a time, for the memory. A patch is always alike to itself.
    edges = torch.stack([(x @ x.mT > args.cut).sum() for x in directions])  # (B,)
    left = (~taken).sum(dim=1)
    all_or_none = (edges == left * left) | (edges <= left)
    m = m.masked_fill(all_or_none[:, None], 0.0)

    if args.sign == "border":
        m = border_sign(m.masked_fill(taken, torch.nan).unflatten(1, grid)).flatten(1)
    return m.masked_fill(taken, 0.0).unflatten(1, grid)


def found(m, taken):
    """The patches, bool (B, L), of the object in the maps of one_object m (B, h, w).

    The connected part above the mean that holds the maximum, as in MaskCut; the mean is
    that of the patches that were not taken. Nothing of a flat map.
    """
    means = m.sum(dim=(1, 2)) / (~taken).sum(dim=1)
    parts = []
    for picture, mean in zip(m.cpu().numpy(), means.tolist(), strict=True):
        parts.append(torch.from_numpy(part_of_maximum(picture, mean)).flatten())
    return torch.stack(parts).to(taken.device)


def vit(args, device):
    """A Vision Transformer: its last keys for the cut, its last attention for dino."""
    path = Path(args.backbone)
    if args.backbone in DINO:
        remedy = (
            "pass --backbone CHECKPOINT, or --backbone pixels, which needs no weights"
        )
        path = download(DINO_URL + DINO[args.backbone], remedy)
    if not path.is_file():
        raise ValueError(
            f"--backbone {args.backbone}: no such file; choose from {', '.join(DINO)}, "
            "pixels, or a checkpoint of this project, MAE, DINO, timm or Hugging Face"
        )
    model = load_encoder(str(path), img_size=args.img_size).to(device)
    grid = model.cfg.grid
    channels = input_channels(args, model.cfg.mean, model.cfg.std)

    @torch.no_grad()
    def maps(imgs):
        q, k, _ = model.last_qkv(normalize(imgs, channels))  # (B, H, 1 + L, d)
        if args.method == "dino":
            return class_attention(q, k).unflatten(1, grid)
        # The heads are joined, the class token is left out.
        keys = k[:, :, 1:].transpose(1, 2).flatten(2)  # (B, L, H * d)
        return cut(keys, grid, args)

    about = {"sha256": sha256(path), **channels._asdict()}
    return Backbone(maps, model.cfg.size, grid, about)


def pixels(args, device):
    """No weights at all: the cut of patch_statistics."""
    size, p = args.img_size or 224, 16
    if size < 2 * p or size % p:
        raise ValueError(
            f"--img_size {size}: --backbone pixels takes multiples of {p}, "
            f"from {2 * p} on"
        )
    grid = (size // p, size // p)

    def maps(imgs):
        return cut(patch_statistics(imgs / 255, p), grid, args)

    return Backbone(maps, (size, size), grid, {})


class Classifier(NamedTuple):
    """A classifier of torchvision in three parts, one after the other."""

    # Pictures -> the last features of stride 16: 14 x 14 of 224 pixels
    to_stride_16: torch.nn.Module
    # -> those of the last convolutional stage, of stride 32
    to_stride_32: torch.nn.Module
    # -> scores (B, classes)
    classify: torch.nn.Module


def resnet50(model):
    """torchvision's ResNet-50 as a Classifier."""
    stem = [model.conv1, model.bn1, model.relu, model.maxpool]
    stages = [model.layer1, model.layer2, model.layer3]
    head = [model.avgpool, torch.nn.Flatten(), model.fc]
    return Classifier(
        torch.nn.Sequential(*stem, *stages), model.layer4, torch.nn.Sequential(*head)
    )


def mobilenet_v2(model):
    """torchvision's MobileNetV2 as a Classifier."""
    pool = torch.nn.AdaptiveAvgPool2d(1)
    head = torch.nn.Sequential(pool, torch.nn.Flatten(), model.classifier)
    # Block 14 halves the resolution for the last time.
    return Classifier(model.features[:14], model.features[14:], head)


CNNS = {"resnet50": resnet50, "mobilenet_v2": mobilenet_v2}


def cnn(args, device):
    """A classifier of torchvision: Grad-CAM of its last stage, or the cut at stride 16."""
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
    model = model.to(device).eval().requires_grad_(False)
    parts = CNNS[args.backbone](model)
    side, cells = args.img_size or 224, args.grid or 14
    if args.method == "tokencut":
        # Each of four halvings rounds up.
        cells = math.ceil(side / 16)
    if side < 32:
        raise ValueError(
            f"--img_size {side}: {args.backbone} needs 32 pixels or more, "
            "and was trained on 224"
        )
    size, grid = (side, side), (cells, cells)
    channels = input_channels(args, IMAGENET_MEAN, IMAGENET_STD)

    def maps(imgs):
        with torch.no_grad():
            x = parts.to_stride_16(normalize(imgs, channels))  # (B, C, h, w)
            if args.method == "tokencut":
                features = x.flatten(2).mT  # (B, L, C)
                # What all patches share would make them all alike.
                return cut(features - features.mean(dim=1, keepdim=True), grid, args)
            x = parts.to_stride_32(x)
        return grad_cam(x, parts.classify, grid, size)

    about = {"sha256": sha256(path), **channels._asdict()}
    return Backbone(maps, size, grid, about)


def masks(args, device):
    """The pictures of --masks are the maps: `Whole` reads them instead of the data."""
    cells = args.grid or 56
    grid = (cells, cells)

    def maps(imgs):
        return imgs[:, 0].float()

    return Backbone(maps, grid, grid, {"masks": str(Path(args.masks))})


def open_backbone(args, device):
    """The Backbone that the command line asks for."""
    if args.backbone in CNNS:
        return cnn(args, device)
    if args.method == "masks":
        return masks(args, device)
    if args.backbone == "pixels":
        return pixels(args, device)
    return vit(args, device)


# -- The job ---------------------------------------------------------------------------


class Whole(Dataset):
    """Whole pictures squashed to (h, w): [i] -> (uint8 (C, h, w), could it be read).

    C = channels, 3 or, for grey, 1. With a folder, the masks of the pictures in it,
    C = 1, instead of the pictures. Unreadable ones are black.
    """

    def __init__(self, dataset, size, folder=None, channels=3):
        self.dataset, self.size, self.folder = dataset, size, folder
        self.channels = 1 if folder else channels

    def __len__(self):
        return len(self.dataset)

    def read(self, i):
        h, w = self.size
        if self.folder:
            mask = read_mask(self.folder, self.dataset.names[i])
            return pil_to_tensor(mask.resize((w, h), Resampling.BOX))
        picture = to_8_bits(self.dataset.read(i)[0], MODES[self.channels])
        return pil_to_tensor(picture.resize((w, h), Resampling.BICUBIC))

    def __getitem__(self, i):
        try:
            return self.read(i), True
        # Decoders raise OSError, SyntaxError, ValueError ...
        except Exception:
            return torch.zeros(self.channels, *self.size, dtype=torch.uint8), False


class JobFiles:
    """The files of an unfinished job whose maps will be `path`, NAME.npy.

    NAME.npy.part       the rows so far, float16 (n, h, w), no header
    NAME.npy.part.json  the settings: a job of other settings does not continue this one
    NAME.done.RANK      number and checksum of each block that process RANK has written,
                        a line each
    """

    def __init__(self, path):
        self.path = path
        self.part = Path(f"{path}.part")
        self.about = Path(f"{path}.part.json")

    def log(self, rank):
        return self.path.with_suffix(f".done.{rank}")

    def logs(self):
        """Those there are, of any number of processes."""
        # The name may hold characters that mean something in a pattern.
        name = re.compile(re.escape(self.path.stem) + r"\.done\.\d+")
        files = self.path.parent.glob("*.done.*")
        return [file for file in files if name.fullmatch(file.name)]

    def finished(self):
        """{number: checksum} of the blocks that all processes together have written."""
        # Whatever a power cut has left there is no error.
        texts = [file.read_text(errors="replace") for file in self.logs()]
        # A line without its semicolon is of a process killed while it wrote it. Older
        # versions wrote no checksums: their blocks are made again.
        lines = re.findall(r"(\d{1,18}) ([0-9a-f]{8});", "\n".join(texts))
        return {int(number): checksum for number, checksum in lines}

    def keep_sound(self, blocks, grid):
        """Strikes from the logs what does not match the rows; blocks: a list of ranges.

        After a power cut the disk may hold the line of a block without its rows.
        """
        lines = []
        with open(self.part, "rb") as part:
            for number, checksum in self.finished().items():
                if number >= len(blocks):
                    continue
                size = 2 * math.prod(grid)
                part.seek(blocks[number].start * size)
                if checksum_of(part.read(len(blocks[number]) * size)) == checksum:
                    lines.append(f"{number} {checksum};\n")
        with replacing(self.log(0)) as temporary:
            temporary.write_text("".join(lines))
        for file in self.logs():
            if file != self.log(0):
                file.unlink()

    def remove(self):
        for file in (self.about, self.part, *self.logs()):
            file.unlink(missing_ok=True)


def checksum_of(content):
    return f"{zlib.crc32(content):08x}"


def discover(
    maps,
    whole,
    grid,
    path,
    settings,
    batch_size,
    workers,
    device,
    rank,
    world,
    timeout=TIMEOUT,
):
    """Runs maps over all pictures, into NAME.npy and its manifest.

    The unit of work is a block of batch_size consecutive pictures. An interrupted job
    goes on with the blocks that are left, with any number of processes. They wait for
    each other as long as one of them adds a block in `timeout` minutes.
    """
    files = JobFiles(path)
    shape = (len(whole), *grid)
    blocks = []
    for start in range(0, len(whole), batch_size):
        blocks.append(range(start, min(start + batch_size, len(whole))))
    if rank == 0:
        fingerprint = whole.dataset.fingerprint
        job = settings | {"fingerprint": fingerprint, "batch_size": batch_size}
        begin_or_continue(files, shape, job)
        files.keep_sound(blocks, grid)
    wait(world)
    done = files.finished()
    # All have read what is done before anybody adds to it.
    wait(world)
    if rank == 0 and done:
        say(f"going on: {len(done)} of {len(blocks)} blocks are there")
    left = [number for number in range(len(blocks)) if number not in done]
    mine = {number: blocks[number] for number in left[rank::world]}
    write_blocks(maps, whole, mine, files, grid, workers, device, rank)
    if world > 1:
        wait_for_blocks(files, len(blocks), 60 * timeout)
    wait(world)
    if rank == 0:
        finish(files, shape, len(blocks), whole, settings)
    wait(world)


def begin_or_continue(files, shape, job):
    """Lays out the files of a new job, unless one of the same settings has begun."""
    files.path.parent.mkdir(parents=True, exist_ok=True)
    size = 2 * math.prod(shape)
    begun = files.about.is_file() and files.part.is_file()
    if not (begun and files.part.stat().st_size == size and files.finished()):
        files.remove()
        with open(files.part, "wb") as file:
            file.truncate(size)
        with replacing(files.about) as temporary:
            temporary.write_text(json.dumps(job))
    try:
        differ = differences(job, dict(json.loads(files.about.read_text())))
    except (ValueError, TypeError, RecursionError):
        differ = f"a damaged {files.about.name}"
    if differ:
        raise ValueError(
            f"--out {files.path}: an unfinished job is there that was begun with "
            f"{differ}; give another name, or delete {files.part.name}, "
            f"{files.about.name} and {files.path.stem}.done.* to start anew"
        )


# Seconds between two lines that tell how far a job is.
LINE_EVERY = 60


def write_blocks(maps, whole, blocks, files, grid, workers, device, rank):
    """Maps of the blocks {number: rows} into the part file, each number into the log."""
    loader = make_loader(whole, batch_sampler=list(blocks.values()), workers=workers)
    total, done = sum(map(len, blocks.values())), 0
    last_line = began = time.perf_counter()
    steps = zip(blocks.items(), loader, strict=True)
    bar = {"total": len(blocks), "unit": "block", "desc": "maps"}
    if rank > 0:
        bar["disable"] = True
    with open(files.part, "r+b") as part, open(files.log(rank), "a") as log:
        for (number, rows), (imgs, readable) in progress(steps, **bar):
            m = maps(imgs.to(device)).float().flatten(1)  # (B, L)
            m = normalize_map(m).cpu()
            # NaN is what save_maps lists as failed; zeros would look like a flat map.
            m[~readable] = torch.nan
            content = m.half().numpy().astype("<f2").tobytes()
            part.seek(2 * rows.start * math.prod(grid))
            part.write(content)
            part.flush()
            # The line follows the rows, so that it never promises what is not there: the
            # checksum is for power cuts. It begins anew, as the one before may be torn.
            log.write(f"\n{number} {checksum_of(content)};")
            log.flush()
            done += len(imgs)
            now = time.perf_counter()
            if rank == 0 and now - last_line > LINE_EVERY:
                say(f"{done} of {total} maps, {done / (now - began):.1f} a second")
                last_line = now


def wait_for_blocks(files, count, seconds):
    """Until all processes have written theirs, or nobody has for so many seconds.

    wait() alone would give up a process that is so much slower than this one.
    """
    done, last = -1, time.monotonic()
    while done < count and time.monotonic() - last < seconds:
        before, done = done, len(files.finished())
        if done > before:
            last = time.monotonic()
        if done < count:
            time.sleep(0.2)


def finish(files, shape, count, whole, settings):
    """Writes NAME.npy and NAME.json of the part file, then removes the job's files."""
    path = files.path
    missing = set(range(count)) - set(files.finished())
    if missing:
        raise ValueError(
            f"--out {path}: {len(missing)} blocks are missing; run the same command again"
        )
    rows = np.memmap(files.part, "<f2", "r", shape=shape)
    if all(np.isnan(m).all() for _, m in chunks(rows)):
        files.remove()
        picture = whole.dataset.path(0)
        if whole.folder:
            picture = f"{whole.dataset.names[0]} in --masks {whole.folder}, as .png"
        raise ValueError(
            f"not one of {len(whole)} maps is finite: no picture could be read, or "
            "--backbone, --mean, --std or --max_pixels are wrong; the first picture is "
            f"{picture}"
        )
    large = []
    for first, m in chunks(rows):
        share = (m > 0.5).mean((1, 2))
        large += (first + np.flatnonzero(share > 0.9)).tolist()
    save_maps(path, rows, whole.dataset, large=large, **settings)
    # Unmapped before its file is removed.
    del rows
    files.remove()


# What map files that do not name these settings were made with.
OLDER = {"sign": "max", "objects": 1}


def differences(new, old):
    """Settings of `old` that are not those of `new`, in words, or nothing."""
    words = []
    for key in new:
        # A backbone's weights count, not the name of their file.
        if key == "backbone" and "sha256" in new:
            continue
        value = old.get(key, OLDER.get(key))
        if value != new[key]:
            words.append(f"{key} {value}, not {new[key]}")
    return ", ".join(words)


# -- The sheet -------------------------------------------------------------------------


def grey(x):
    """(n, 1, h, w) -> (n, 3, h, w)"""
    return x.expand(-1, 3, -1, -1)


def show(path, dataset, files, ids, tau=0.75, cell=112):
    """Draws a sheet of the pictures `ids` of a data set, files: {name: maps}.

    image | map, weights exp(M / tau) and overlay of the first file | maps of the others
    """
    whole = Whole(dataset, (cell, cell))
    imgs = torch.stack([whole[i][0] for i in ids]) / 255  # (n, 3, h, w)
    columns = [("image", imgs)]
    first = next(iter(files))
    for name, maps in files.items():
        m = torch.from_numpy(np.float32(maps[ids]))[:, None]  # (n, 1, *grid)
        cells = F.interpolate(m, (cell, cell))
        columns.append((Path(name).stem[:18], grey(cells)))
        if name != first:
            continue
        largest = math.exp(1 / tau)
        weights = (torch.exp(cells / tau) - 1) / (largest - 1)
        title = f"exp(M / {tau}), 1 to {largest:.2f}"
        columns.append((title, grey(weights)))
        smooth = F.interpolate(m, (cell, cell), mode="bilinear", align_corners=False)
        columns.append(("overlay", imgs * (0.15 + 0.85 * smooth)))
    save_sheet(path, columns, cell=cell)


# -- The command line ------------------------------------------------------------------


def command_line():
    """The parser of all flags."""
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    methods = ("tokencut", "dino", "gradcam", "masks")
    flag("--method", choices=methods, default="tokencut")
    vits, cnns = ", ".join(DINO), ", ".join(CNNS)
    text = f"{vits}, a checkpoint; {cnns} (tokencut, gradcam); pixels (tokencut)"
    flag("--backbone", help=text)
    text = f"file with the weights of {cnns} [torchvision's, downloaded once]"
    flag("--weights", help=text)
    text = "TokenCut's bipartition at the mean instead of the eigenvector"
    flag("--binary", action="store_true", help=text)
    text = "which end of the eigenvector is the object: that of the entry of largest "
    text += "magnitude, as in TokenCut, or that which is lower at the border of the "
    text += "picture [max for dino_*, else border]"
    flag("--sign", choices=("max", "border"), help=text)
    text = "cuts in a picture, each without the patches found before, as in MaskCut "
    text += "[1]"
    flag("--objects", type=int, metavar="N", help=text)
    text = "cosine above which two patches belong together [%(default)s]"
    flag("--cut", type=float, default=0.2, help=text)
    text = "folder of PNG masks: the maps of --method masks, else the truth "
    text += "to compare the maps with"
    flag("--masks", help=text)
    flag("--data", default="toy", help="as for attg_mae.py [%(default)s]")
    flag("--classes", help="file with the class folders to keep, one a line")
    text = "a picture with more is unreadable [%(default)s]"
    flag("--max_pixels", type=int, default=MAX_PIXELS, help=text)
    flag("--out", default="maps.npy", type=Path, help="map file [%(default)s]")
    text = "input size of the backbone in pixels [a checkpoint's own, else 224]"
    flag("--img_size", type=int, help=text)
    text = "cells a side of the maps of gradcam [14] and masks [56]"
    flag("--grid", type=int, help=text)
    text = "channel means of the backbone's input [the checkpoint's, ImageNet's]"
    flag("--mean", type=float, nargs="+", help=text)
    flag("--std", type=float, nargs="+", help="channel deviations")
    text = "pictures in a block of work [%(default)s]"
    flag("--batch_size", type=int, default=64, help=text)
    flag("--device", help="cuda, mps or cpu [the first there is]")
    add_timeout(flag)
    text = "loader processes of each process [CPU 0, GPU up to 16]"
    flag("--workers", type=int, help=text)
    text = "write a sheet of N pictures beside the map file"
    flag("--show", type=int, default=0, metavar="N", help=text)
    text = "more map files to compare"
    flag("--with", dest="others", nargs="+", default=[], type=Path, help=text)
    return parser


def arguments(argv):
    """The settings of a command line; ValueError names the flag that is wrong."""
    args = command_line().parse_args(argv)
    unused = unused_flags(args)
    if args.method == "gradcam":
        args.backbone = args.backbone or "resnet50"
    elif args.method == "masks":
        args.backbone = args.backbone or None
    else:
        args.backbone = args.backbone or "dino_vits16"
    if args.sign is None:
        # DINO's maps are the paper's. For the others it was chosen on the masks of the
        # toy set's training pictures (docs/maps.md).
        args.sign = "max" if args.backbone in DINO else "border"
    if args.objects is None:
        args.objects = 1
    check(args, unused)
    return args


def unused_flags(args):
    """Flags that are given although the method and its backbone have no use for them."""
    of_a_model = ["backbone", "img_size", "mean", "std"]
    of_the_cut = ["binary", "sign", "objects"]
    used = {
        "tokencut": of_a_model + of_the_cut,
        "dino": of_a_model,
        "gradcam": [*of_a_model, "weights", "grid"],
        "masks": ["grid"],
    }[args.method]
    if args.method == "tokencut" and args.backbone in CNNS:
        used = [*of_a_model, *of_the_cut, "weights"]
    if args.method == "tokencut" and args.backbone == "pixels":
        used = ["backbone", "img_size", *of_the_cut]
    unused = []
    for name in (*of_a_model, "weights", "grid", *of_the_cut):
        # 0 counts as not given, which is equal to False: it is refused as too low.
        given = getattr(args, name) not in (None, False)
        if given and name not in used:
            unused.append(f"--{name}")
    return unused


def check(args, unused):
    """Refuses what cannot work, ahead of any download; the first fault is named."""
    method, backbone, out = args.method, args.backbone, args.out
    check_numbers(vars(args))
    if out.suffix != ".npy":
        raise ValueError(f"--out {out}: must end in .npy")
    # In a flat folder the sheet would become one of the pictures.
    data = Path(args.data)
    if data.is_dir() and out.resolve().parent == data.resolve():
        text = "is among the pictures of --data; choose another folder"
        raise ValueError(f"--out {out}: {text}")
    if method == "gradcam" and backbone not in CNNS:
        raise ValueError(f"--backbone {backbone}: gradcam takes {' or '.join(CNNS)}")
    if method == "dino" and backbone in CNNS:
        raise ValueError(f"--backbone {backbone}: is for gradcam and tokencut")
    if args.weights and backbone not in CNNS:
        text = f"is for {' and '.join(CNNS)}; name a checkpoint with --backbone"
        raise ValueError(f"--weights: {text}")
    if method == "dino" and backbone == "pixels":
        text = "has no attention; use --method tokencut"
        raise ValueError(f"--backbone pixels: {text}")
    if method == "masks" and not args.masks:
        raise ValueError("--method masks: name their folder, --masks DIR")
    if args.masks and not Path(args.masks).is_dir():
        raise ValueError(f"--masks {args.masks}: no such folder")
    if unused:
        text = f"--method {method} --backbone {backbone} does not use it; leave it out"
        raise ValueError(f"{', '.join(unused)}: {text}")
    lost = []
    for path in args.others:
        if path.suffix != ".npy" or not path.is_file():
            lost.append(str(path))
    if lost:
        text = "no such .npy file; name map files that are finished"
        raise ValueError(f"--with {', '.join(lost)}: {text}")
    if args.objects > 1 and args.cut < 0:
        text = "needs a --cut of 0 or more: below, every patch stays in the graph"
        raise ValueError(f"--objects {args.objects}: {text}")


def make_maps(args, dataset, device, rank, world):
    """Makes the map file, unless it is there. Returns its settings, plain types."""
    # The first process downloads, the others find what it has downloaded.
    if rank:
        wait(world)
    backbone = open_backbone(args, device)
    if rank == 0:
        wait(world)
    settings = {
        "method": args.method,
        "backbone": args.backbone,
        "input": backbone.size,
        "grid": backbone.grid,
    }
    settings |= backbone.about
    if args.method == "tokencut":
        settings |= {"binary": args.binary, "cut": args.cut}
        settings |= {"sign": args.sign, "objects": args.objects}
    # Tuples become lists, as they are when a manifest is read.
    settings = json.loads(json.dumps(settings))
    workers = args.workers
    if workers is None:
        workers = default_workers(device)
    folder = args.masks if args.method == "masks" else None
    # A model of grey pictures has one mean.
    channels = len(backbone.about.get("mean", IMAGENET_MEAN))
    whole = Whole(dataset, backbone.size, folder, channels)
    try:
        complete = args.out.is_file() and args.out.with_suffix(".json").is_file()
        # Both are there, yet not sure to be whole, until the job's own files are gone.
        if not complete or JobFiles(args.out).about.is_file():
            discover(
                backbone.maps,
                whole,
                backbone.grid,
                args.out,
                settings,
                args.batch_size,
                workers,
                device,
                rank,
                world,
                args.timeout,
            )
    except OSError as error:
        raise OSError(
            f"--out {args.out}: cannot be written ({error}); "
            "choose another place, or make room and run it again"
        ) from error
    return settings


def read_maps(path, flag, dataset):
    """Reads a map file and prints what it holds. Returns (maps (n, h, w), manifest)."""
    try:
        maps, manifest = load_maps(path, dataset)
    except ValueError as error:
        raise ValueError(
            f"{flag} {path}: {error}; or delete it, or give another name"
        ) from error
    flat, failed = manifest["flat"], manifest["failed"]
    large = manifest["settings"].get("large", [])
    method, shape = manifest["method"], manifest["shape"][1:]
    say(
        f"{path}: {len(dataset)} maps of {shape} by {method}, {len(flat)} flat, "
        f"{len(failed)} failed, {len(large)} larger than 90 % of the picture"
    )
    if method == "tokencut" and len(flat) > len(dataset) / 10:
        say(
            "hint: flat maps weigh nothing. Patches that are all alike call for a "
            "higher --cut (0.5 to 0.9)"
        )
    for i in failed[:LINES]:
        say(f"failed, unreadable or not finite: {dataset.path(i)}")
    if failed:
        manifest_file = path.with_suffix(".json")
        say(f"all {len(failed)} are in {manifest_file}; delete it to try again")
    return maps, manifest


def report_quality(files, dataset, folder):
    """Prints how good the maps are beside the masks of a folder or of the data set.

    files: {name: maps}. Returns {name: figures of attg.map_quality.quality}, empty if there
    are no masks.
    """
    figures = {}
    if not folder and dataset.masks is None:
        return figures
    for name, maps in files.items():
        truth = true_masks(dataset, folder, range(len(dataset)))
        q = quality(maps, truth)
        say(
            f"{name}: IoU {q['IoU']:.1f}, CorLoc {q['CorLoc']:.1f}, "
            f"AUROC {q['AUROC']:.1f} on {q['images']} images"
        )
        figures[name] = q
    return figures


def main(argv=None, data=None):
    """Returns {"maps": path, "manifest": dict, "quality": {file: figures}}, the last
    empty without true masks; of other processes than the first, without both.

    data: a data set of one's own, of which --data is the name then; see open_data.
    """
    args = arguments(argv)
    pictures = resolve_dataset(data, args.data)
    view = {"classes": args.classes, "max_pixels": args.max_pixels}
    with processes(args.device, args.timeout) as (device, rank, world):
        dataset = open_data(pictures, "train", **view)
        with exclusive_run(f"{args.out}.lock", f"--out {args.out}", rank, world):
            settings = make_maps(args, dataset, device, rank, world)
    result = {"maps": str(args.out), "manifest": None, "quality": {}}
    if rank:
        return result

    maps, manifest = read_maps(args.out, "--out", dataset)
    made_with = {"method": manifest["method"], **manifest["settings"]}
    differ = differences(settings, made_with)
    if differ:
        raise ValueError(
            f"--out {args.out}: was made with {differ}; delete it or give another name"
        )
    result["manifest"] = manifest
    files = {str(args.out): maps}
    for path in args.others:
        files[str(path)], _ = read_maps(path, "--with", dataset)

    # The masks of --method masks are the maps themselves, not the truth.
    folder = None if args.method == "masks" else args.masks
    result["quality"] = report_quality(files, dataset, folder)

    if args.show:
        sheet = args.out.with_suffix(".png")
        spread = np.linspace(0, len(dataset) - 1, args.show)
        show(sheet, dataset, files, np.unique(spread.round().astype(int)))
        say(f"sheet: {sheet}")
    return result


if __name__ == "__main__":
    end(main, interrupted="interrupted; the same command goes on")
