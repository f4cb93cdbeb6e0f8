"""
Attention maps for a whole data set, made once, ahead of training (Sick et al.,
arXiv 2402.15172): by TokenCut, DINO's class attention or Grad-CAM, or from masks.

    python object_discovery.py --backbone pixels --data toy --out maps.npy --show 8
    python object_discovery.py --method tokencut --backbone dino_vits16 --data DATA --out maps.npy
    python object_discovery.py --method dino --backbone ENCODER.pt --data DATA --out maps.npy
    python object_discovery.py --method gradcam --backbone resnet50 --data DATA --out maps.npy
    python object_discovery.py --method masks --masks DIR --data DATA --out maps.npy
    torchrun --nproc_per_node=8 object_discovery.py --method tokencut --data DATA --out maps.npy

The first command needs no weights and no data: the embedded toy set takes about half a
minute on one CPU core. tokencut and dino take any checkpoint of this project, MAE, timm
or Hugging Face; dino_vits16 is downloaded. resnet50 and mobilenet_v2 were trained with
ImageNet's labels. DATA: see docs/data.md.

Maps cover the whole image, squashed to the input size; training pools them over each crop.
The same command resumes an interrupted job. --show N saves a sheet of examples beside the
map file; --masks DIR (toy brings its masks) measures the quality of the maps.

Shapes: B images, H heads, L patches of a grid (h, w), d or D channels.
"""

if __name__ == "__main__":
    from attg.cli import quiet_sigint_during_import

    quiet_sigint_during_import()

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from attg.backbones import NamedViT, is_named, load_cnn
from attg.cli import RunFlags, WeightFlags, check_unused, flag, parse, run_cli
from attg.datasets import open_data, resolve_dataset
from attg.distributed import barrier, exclusive_run, processes
from attg.evaluation import (
    CheckpointDataFlags,
    default_data,
    fill_defaults,
    open_encoder,
)
from attg.figures import save_map_sheet
from attg.files import sha256
from attg.images import sha256_of
from attg.kernels import normalize_map
from attg.log import describe_files, log_line, print_table
from attg.map_job import SquashedImages, run_job
from attg.map_quality import ground_truth_masks, peak_component, quality
from attg.maps import load_maps
from attg.masks import MaskFolder
from attg.weights import read_weights
from attg_mae import IMAGENET_MEAN, IMAGENET_STD, load_encoder, normalize

# -- TokenCut --------------------------------------------------------------------------


def normalized_affinity(edges, eps):
    """The symmetric form of the cut's eigenproblem for graphs edges: bool (B, L, L).

    (D - A) y = lambda D y becomes S v = (1 - lambda) v with S = D^-1/2 A D^-1/2 and
    y = D^-1/2 v: the second-smallest lambda is the second-largest eigenvalue of S.
    Returns S (B, L, L), the diagonal of D^-1/2 (B, L), and the trivial eigenvector
    of S, D^1/2 1, of eigenvalue 1 (B, L). All float64.
    """
    A = edges.double().clamp_(min=eps)
    degree = A.sum(dim=-1)
    scale = degree.rsqrt()
    # In place, because A is what fills the cache.
    S = A.mul_(scale[:, :, None]).mul_(scale[:, None])
    trivial = (degree / degree.sum(dim=1, keepdim=True)).sqrt()
    return S, scale, trivial


# Numbers of Lanczos steps after which convergence is tested. The last one is the maximum.
LANCZOS_TESTS = (16, 24, 32, 40, 52, 64, 80, 96)


def lanczos(S, trivial):
    """Second-largest eigenvector of each S (B, L, L), and whether it converged.

    trivial (B, L): the largest one. Returns v (B, L), float64, and bool (B,).
    """
    B, L, _ = S.shape
    steps = min(L - 1, LANCZOS_TESTS[-1])
    # The same start for every image: its vector must not depend on the batch.
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(L, generator=generator, dtype=torch.float64).to(S.device)

    # Rows of `basis` are orthonormal, rows of `products` are S times them. Row 0 is the
    # trivial eigenvector. All others are orthogonal to it, so that the largest
    # eigenvalue they see is the second largest of S.
    basis, products = S.new_empty(2, B, steps + 1, L)
    basis[:, 0] = trivial
    w = start.expand(B, 1, L)
    for j in range(1, steps + 1):
        # In exact arithmetic w needs to be made orthogonal to the last few rows only.
        recent = basis[:, max(0, j - 3) : j]
        w = w - w @ recent.mT @ recent
        # Nothing is left if S has few distinct eigenvalues: restart with another vector,
        # or rounding errors would be amplified to a basis vector.
        beta = w.norm(dim=-1, keepdim=True)
        w = torch.where(beta < 1e-10, start.roll(j), w / beta)
        # Rounding reintroduces the earlier rows, above all the trivial one.
        earlier = basis[:, :j]
        w = w - w @ earlier.mT @ earlier
        basis[:, j : j + 1] = w / w.norm(dim=-1, keepdim=True)
        w = basis[:, j : j + 1] @ S
        products[:, j : j + 1] = w
        if j in LANCZOS_TESTS or j == steps:
            v, converged = largest_pair(basis[:, 1 : j + 1], products[:, 1 : j + 1])
            if converged.all():
                break
    return v, converged


def largest_pair(basis, products):
    """Rayleigh-Ritz: S's largest eigenvector in the span of `basis`, and its test.

    basis, products (B, j, L): orthonormal rows q and the rows S q. Returns v (B, L) and
    bool (B,), converged: by the residual |S v - theta v| alone. The error of v is
    residual / gap, but the gap of the Ritz values must not be used: two eigenvalues
    that lie close together look like one at first, and the next gap looks wide.
    """
    theta, coordinates = torch.linalg.eigh(basis @ products.mT)
    largest = coordinates[:, :, -1:].mT  # (B, 1, j)
    v = largest @ basis
    product = largest @ products
    residual = (product - theta[:, -1:, None] * v).norm(dim=-1).flatten()
    return v[:, 0], residual <= 1e-12


def dense_solver(S, trivial):
    """The vectors of `lanczos` by a dense eigensolver: O(L^3) per image."""
    # The trivial eigenvalue moves from 1 to -1, so that the second largest comes last.
    deflated = S - 2 * trivial[:, :, None] * trivial[:, None]
    return torch.linalg.eigh(deflated).eigenvectors[:, :, -1]


def positive_peak(y):
    """y (B, L) with the sign that makes its entry of largest magnitude positive."""
    magnitude = y.abs()
    # Among entries that are equal up to rounding, the first one decides.
    near_maximum = magnitude >= (1 - 1e-6) * magnitude.amax(dim=1, keepdim=True)
    first = near_maximum.int().argmax(dim=1, keepdim=True)
    return y * y.gather(1, first).sign()


@torch.no_grad()
def tokencut(features, tau=0.2, eps=1e-5):
    """TokenCut's map: the second-smallest generalized eigenvector y of each image,
    (D - A) y = lambda D y. Wang et al., TokenCut, arXiv 2202.11539.

    features (B, L, d): a vector for each patch, any float type, any device. Returns
    (B, L) on that device, float64 for float64 features, else float32.

    A_ij = 1 if the cosine of features i and j is above tau, else eps; a zero vector
    has cosine 0 to all. D = diag(A 1). y^T D y = 1 as in scipy.linalg.eigh(D - A, D),
    and the entry of largest magnitude is positive. y is 0 if all patches are connected,
    or no two: any vector is a solution then. The vector of an image does not depend on
    its batch, up to rounding. Features that are not finite give NaN.
    """
    B, L, _ = features.shape
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    # MPS has no float64.
    x = features.cpu() if features.device.type == "mps" else features
    x = x.to(dtype)
    if L < 2:
        return features.new_zeros(B, L, dtype=dtype)
    finite = x.isfinite().all(dim=(1, 2))[:, None]  # (B, 1)
    x = F.normalize(x.where(finite[..., None], 0.0), dim=-1)

    # As many images at a time as fill 4 MB of a CPU's cache, or 1 GB of a GPU.
    values = 2**19 if x.device.type == "cpu" else 2**27
    vectors = []
    for part in x.split(max(1, values // L**2)):
        # Autocast would round the cosines to 16 bits.
        with torch.autocast(x.device.type, enabled=False):
            edges = part @ part.mT > tau
        # Rounding need not be symmetric.
        edges = edges | edges.mT
        number, loops = edges.sum(dim=(1, 2)), edges.diagonal(dim1=1, dim2=2).sum(dim=1)
        S, scale, trivial = normalized_affinity(edges, eps)
        v, converged = lanczos(S, trivial)
        v[~converged] = dense_solver(S[~converged], trivial[~converged])
        unsolvable = (number == L**2) | (number == loops)
        y = (scale * v).masked_fill(unsolvable[:, None], 0.0)
        vectors.append(positive_peak(y))
    y = torch.cat(vectors).to(dtype).where(finite, torch.nan)
    return y.to(features.device)


def border_sign(maps):
    """Maps (B, h, w) in [0, 1], or 1 - M if the border of M has the higher mean.

    Alternative sign rule: the object is the side with the lower mean on the image border
    (MaskCut looks at the corners). NaN cells are ignored; without inner cells M stays.
    """
    border = torch.ones(maps.shape[1:], dtype=torch.bool, device=maps.device)
    border[1:-1, 1:-1] = False
    # The mean of no cells is NaN, which compares as false.
    outer, inner = maps[:, border].nanmean(dim=1), maps[:, ~border].nanmean(dim=1)
    return torch.where((outer > inner)[:, None, None], 1 - maps, maps)


def cut_maps(features, grid, settings):
    """Maps of the cut: features (B, L, d) -> (B, *grid) in [0, 1], NaN if not finite.

    settings.sign decides which end of the eigenvector is the object. With settings.objects
    above 1 it is MaskCut (Wang et al., CutLER, arXiv 2301.11320): each further cut is made
    without the patches of the objects so far, on which its map is 0, and the maps are
    merged by their maximum.
    """
    features = features.float()
    removed = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
    m = merged = torch.zeros(len(features), *grid, device=features.device)
    for number in range(settings.objects):
        if number:
            # The object is the connected component above the mean that holds the maximum.
            means = m.sum(dim=(1, 2)) / (~removed).sum(dim=1)
            objects = map(peak_component, m.cpu().numpy(), means.tolist())
            objects = torch.from_numpy(np.stack(list(objects)))
            removed = removed | objects.flatten(1).to(removed.device)
        # Zero vectors have no edges, so this takes the patches out of the graph.
        x = features.masked_fill(removed[..., None], 0.0)
        y = tokencut(x, settings.affinity_threshold)
        # The peak may have been on a removed patch.
        y = positive_peak(y.masked_fill(removed, 0.0))
        lowest = y.masked_fill(removed, torch.inf).amin(dim=1, keepdim=True)
        m = normalize_map(torch.where(removed, lowest, y))
        if settings.sign == "border":
            m = m.masked_fill(removed, torch.nan).unflatten(1, grid)
            m = border_sign(m).flatten(1)
        m = m.masked_fill(removed, 0.0).unflatten(1, grid)
        merged = torch.maximum(merged, m)
    return merged


# -- DINO, Grad-CAM, and features without weights --------------------------------------


def patch_keys(model, imgs):
    """Keys of the last block of our ViT, heads joined: (B, L, H * d)."""
    _, k, _ = model.last_qkv(imgs)  # (B, H, 1 + L, d)
    return k[:, :, 1:].transpose(1, 2).flatten(2)


def class_attention(model, imgs):
    """DINO's map of our ViT: attention of the class token to the patches, (B, L).

    That of the last block, averaged over the heads. Caron et al., arXiv 2104.14294.
    """
    q, k, _ = model.last_qkv(imgs)  # (B, H, 1 + L, d)
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
    """Features without weights: mean and std of each channel in p x p patches,
    standardized over the image.

    imgs (B, 3, H, W) -> (B, L, 6). They capture color and contrast only. Of whole numbers
    (0 to 255) the sums are exact, so that all patches of a uniform image are alike.
    """
    x = F.unfold(imgs, p, stride=p)  # (B, 3 * p * p, L)
    x = x.unflatten(1, (imgs.shape[1], -1))  # (B, 3, p * p, L)
    x = torch.cat([x.mean(dim=2), x.std(dim=2)], dim=1).mT  # (B, L, 6)
    std = x.std(dim=1, keepdim=True).clamp_min(1e-6)
    return (x - x.mean(dim=1, keepdim=True)) / std


# -- Backbones: one function for each kind, (settings, device) -> Backbone -------------

# facebookresearch/dino's released weights, by their names in the URL.
DINO = {"dino_vits16": "dino_deitsmall16", "dino_vits8": "dino_deitsmall8"}
DINO |= {"dino_vitb16": "dino_vitbase16", "dino_vitb8": "dino_vitbase8"}
DINO_URL = "https://dl.fbaipublicfiles.com/dino/{0}_pretrain/{0}_pretrain.pth"
# Torchvision's classifiers: their layers of strides 16 and 32.
CNNS = {"resnet50": ("layer3", "layer4")}
CNNS["mobilenet_v2"] = ("features.13", "features.18")
IMAGENET = SimpleNamespace(mean=IMAGENET_MEAN, std=IMAGENET_STD)
# Values of --backbone, for messages.
VITS = f"{', '.join(DINO)}, timm:NAME, timm:NAME@FILE, hf:NAME, or a checkpoint"
CLASSIFIERS = ", ".join(CNNS)


class Backbone(NamedTuple):
    """A function from images to maps, and its properties."""

    maps: Callable  # uint8 (B, C, H, W) -> float (B, *grid), NaN if it failed
    size: tuple  # (H, W) of the input, in pixels
    grid: tuple  # (h, w) of a map, in cells
    about: dict  # further entries of the manifest, plain types


def download(url, remedy):
    """Path of the url's file in torch.hub's folder, downloaded once.

    ValueError with the remedy if that fails. torch.hub checks the digits of a sha256 in
    torchvision's file names; DINO publishes none.
    """
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    options = {"check_hash": True, "weights_only": True}
    try:
        torch.hub.load_state_dict_from_url(url, map_location="cpu", **options)
    # urllib raises many kinds.
    except Exception as error:
        message = f"cannot download {url} ({error}); save it as {path}, or {remedy}"
        raise ValueError(message) from error
    return path


def vit(settings, device):
    """A Vision Transformer: the cut of its last keys, or its last class attention."""
    name, is_dino = settings.backbone, settings.method == "dino"
    settings.checkpoint = name
    if name in DINO:
        url = DINO_URL.format(DINO[name])
        path = download(url, "pass --backbone CHECKPOINT, or --backbone pixels")
        settings.checkpoint = str(path)
    elif not (is_named(name) or Path(name).is_file()):
        message = f"no such file; choose from {VITS}, {CLASSIFIERS}, pixels"
        raise ValueError(f"--backbone {name}: {message}")
    model = open_encoder(load_encoder, settings)
    if isinstance(model, NamedViT):
        compute = model.class_attention if is_dino else model.patch_keys
    else:
        compute = partial(class_attention if is_dino else patch_keys, model)
    model, cfg = model.to(device), model.cfg

    @torch.no_grad()
    def maps(imgs):
        x = compute(model.normalize(imgs))
        return x.unflatten(1, cfg.grid) if is_dino else cut_maps(x, cfg.grid, settings)

    if is_dino:
        # Fail before any image is read if the model has no class token.
        maps(torch.zeros(1, cfg.in_chans, *cfg.size, device=device).byte())
    about = {"sha256": settings.sha256, "mean": cfg.mean, "std": cfg.std}
    return Backbone(maps, cfg.size, cfg.grid, about)


def pixels(settings, device):
    """No weights: the cut of patch_statistics."""
    size, p = settings.img_size or 224, 16
    if size < 2 * p or size % p:
        raise ValueError(f"--img_size {size}: pixels takes {2 * p}, {3 * p} ...")
    grid = (size // p, size // p)

    def maps(imgs):
        return cut_maps(patch_statistics(imgs.float(), p), grid, settings)

    return Backbone(maps, (size, size), grid, {})


def cnn(settings, device):
    """A torchvision classifier: Grad-CAM of its last stage, or the cut at stride 16."""
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor

    name, path = settings.backbone, settings.weights
    is_cam, side = settings.method == "gradcam", settings.img_size or 224
    if not path:
        url = torchvision.models.get_model_weights(name).IMAGENET1K_V1.url
        path = download(url, "name a file of its weights: --weights FILE")
    names = settings.weights_key, settings.weights_prefix
    try:
        model, has_classifier = load_cnn(name, path, *names)
    except ValueError as error:
        raise ValueError(f"--weights of {name}: {error}") from error
    if is_cam and not has_classifier:
        raise ValueError(f"--weights {path}: no classifier, which gradcam needs")
    model = model.to(device)
    extract = create_feature_extractor(model, {CNNS[name][is_cam]: "x"})
    head = list(model.children())[-1]
    classify = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    # Each of four halvings rounds up.
    cells = 14 if is_cam else math.ceil(side / 16)
    size, grid = (side, side), (cells, cells)

    @torch.no_grad()
    def maps(imgs):
        x = extract(normalize(imgs, IMAGENET))["x"]  # (B, C, h, w)
        if is_cam:
            return grad_cam(x, classify, grid, size)
        x = x.flatten(2).mT  # (B, L, C)
        # Without its mean, all patches would be alike.
        return cut_maps(x - x.mean(dim=1, keepdim=True), grid, settings)

    return Backbone(maps, size, grid, {"sha256": sha256(path), **vars(IMAGENET)})


def masks_backbone(settings, device):
    """The masks themselves, which SquashedImages reads instead of the images."""
    return Backbone(lambda imgs: imgs[:, 0].float(), (56, 56), (56, 56), {})


# -- The command line ------------------------------------------------------------------

CUT_FLAGS = ("affinity_threshold", "objects", "sign")


@dataclasses.dataclass(kw_only=True)
class Settings(CheckpointDataFlags, WeightFlags, RunFlags):
    """Flags of the command line."""

    method: str = flag(
        "tokencut",
        "where the maps come from",
        choices=("tokencut", "dino", "gradcam", "masks"),
    )
    backbone: str | None = flag(
        None,
        f"{VITS}; {CLASSIFIERS} (tokencut, gradcam); pixels (tokencut) "
        "[dino_vits16, for gradcam resnet50]",
    )
    weights: str | None = flag(None, f"weights of {CLASSIFIERS} [torchvision's]")
    # Not below 0: removed patches become zero vectors, whose cosine is 0.
    affinity_threshold: float = flag(0.2, "cosine above which patches connect", 0, 1)
    sign: str | None = flag(
        None,
        "side of the eigenvector that is the object: with the largest magnitude, as in "
        "TokenCut, or with the lower mean on the border [max for dino_*, else border]",
        choices=("max", "border"),
    )
    objects: int = flag(1, "cuts, each excluding the objects so far (MaskCut)", 1, 1000)
    masks: str | None = flag(None, "folder of PNG masks: maps, or the ground truth")
    mask_values: tuple[str, ...] = flag(
        (), "values of objects, colors as 0xRRGGBB; or ids, soft [see attg/masks.py]"
    )
    out: Path = flag(Path("maps.npy"), "map file")
    img_size: int | None = flag(None, "in pixels [the checkpoint's, or 224]", 1, 8192)
    heads: int | None = flag(None, "attention heads [by file or width]", 1, 1024)
    batch_size: int = flag(64, "images per batch, the unit of resuming", 1, 10**7)
    show: int = flag(0, "save a sheet of this many examples", 0, 10**4)
    # Not flags: the backbone's file or name, and the checksum of its weights.
    checkpoint: str | None = None
    sha256: str | None = None


def resolve(settings):
    """Check the flags against each other, before any download, and fill in defaults."""
    method = settings.method
    if method != "masks" and settings.backbone is None:
        settings.backbone = "resnet50" if method == "gradcam" else "dino_vits16"
    backbone = settings.backbone
    is_cnn, has_no_file = backbone in CNNS, backbone in (None, "pixels")
    unused = {"heads" if is_cnn else "weights"}
    if has_no_file:
        unused |= {"heads", "weights_key", "weights_prefix"}
    if method != "tokencut":
        unused |= set(CUT_FLAGS)
    if method == "masks":
        unused |= {"backbone", "img_size"}
    if not settings.masks:
        unused |= {"mask_values"}
    reason = f"--method {method} --backbone {backbone} does not use it"
    check_unused(settings, unused, reason)
    if settings.sign is None:
        # DINO's maps are the paper's. For other backbones the rule was chosen on the
        # masks of the toy set's training images (docs/maps.md).
        settings.sign = "max" if backbone in DINO else "border"

    if settings.out.suffix != ".npy":
        raise ValueError(f"--out {settings.out}: must end in .npy")
    if method == "masks" and not settings.masks:
        raise ValueError("--masks: missing; --method masks needs the folder of masks")
    if method == "gradcam" and not is_cnn:
        raise ValueError(f"--backbone {backbone}: gradcam takes {CLASSIFIERS}")
    if method == "dino" and (is_cnn or has_no_file):
        raise ValueError(f"--backbone {backbone}: dino takes {VITS}")
    return settings


def make_maps(settings, dataset, masks, dist_info):
    """Run the map job."""
    device, rank, _ = dist_info
    kinds = dict.fromkeys(CNNS, cnn) | {"pixels": pixels, None: masks_backbone}
    # Rank 0 downloads, the others load what it has downloaded.
    if rank:
        barrier()
    backbone = kinds.get(settings.backbone, vit)(settings, device)
    if rank == 0:
        barrier()
    about = {"method": settings.method, "backbone": settings.backbone}
    about |= {"input": backbone.size, "grid": backbone.grid, **backbone.about}
    # Without these flags, their values follow from the weights and the images.
    names = ["heads", "weights_key", "weights_prefix", "white"]
    names += CUT_FLAGS if settings.method == "tokencut" else ()
    about |= {name: getattr(settings, name) for name in names}
    if settings.method == "masks":
        files = [masks.path(i) for i in range(len(dataset))]
        checksums = (sha256(file) if file.is_file() else None for file in files)
        about |= {"masks": masks.rule, "masks_sha256": sha256_of(*checksums)}
    else:
        masks = None
    # A backbone for grayscale images has one mean.
    channels = len(backbone.about.get("mean", IMAGENET_MEAN))
    images = SquashedImages(dataset, backbone.size, masks, channels)
    run_job(backbone.maps, images, backbone.grid, about, settings, dist_info)


def main(argv=None, data=None):
    """Make the map file. Returns the metrics of its quality, {} without ground-truth masks.

    data: a data set of your own, which --data then names; see open_data.
    """
    settings = resolve(parse(Settings, __doc__, argv))
    backbone, config = settings.backbone, {}
    is_file = backbone not in (None, "pixels", *DINO, *CNNS) and not is_named(backbone)
    if is_file and (settings.data is None or Path(backbone).is_file()):
        keys = settings.weights_key, settings.weights_prefix
        config = read_weights(backbone, *keys).settings
        fill_defaults(settings, white=config.get("white"))
    default_data(settings, config, f"--backbone {backbone}")
    out, data, masks = settings.out, resolve_dataset(data, settings.data), None
    with processes(settings.device, settings.timeout) as dist_info:
        _, rank, _ = dist_info
        dataset = open_data(
            data,
            classes=settings.classes,
            max_pixels=settings.max_pixels,
            white=settings.white,
            verify=settings.verify == "full",
        )
        source = describe_files(dataset) if dataset.pairs is None else settings.data
        log_line(f"train split: {len(dataset):,} images of {source}")
        with exclusive_run(f"{out}.lock", f"--out {out}"):
            if settings.masks:
                masks = MaskFolder(settings.masks, dataset, settings.mask_values)
                log_line(masks.rule)
            make_maps(settings, dataset, masks, dist_info)
    if rank:
        return {}

    maps, manifest = load_maps(out, dataset)
    flat, failed = manifest["flat"], manifest["failed"]
    counts = f"{len(flat)} flat (no effect), {len(failed)} failed"
    if settings.method == "tokencut" and len(flat) > len(maps) / 10:
        counts += "; fewer are flat with a higher --affinity_threshold, such as 0.5"
    log_line(f"{out}: maps {maps.shape}, {counts}")
    if failed:
        names = ", ".join(dataset.path(i) for i in failed[:10])
        log_line(f"failed, delete {out} to try again: {names}")
    if settings.show:
        sheet = out.with_suffix(".png")
        save_map_sheet(sheet, dataset, maps, settings.show)
        log_line(f"sheet: {sheet}")
    if settings.method == "masks":
        list(ground_truth_masks(masks, failed))  # logs the reason
        return {}
    if masks is None and dataset.masks is None:
        return {}
    truth = 255 * dataset.masks if masks is None else masks
    metrics = quality(maps, ground_truth_masks(truth, range(len(maps))))
    print_table([metrics])
    return metrics


if __name__ == "__main__":
    run_cli(main, interrupted="interrupted; run the same command to resume")
