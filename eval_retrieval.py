"""
Image retrieval on revisited Oxford and Paris (arXiv 2402.15172, Table 8).

    python eval_retrieval.py CHECKPOINT --data path/to/jpg --gnd gnd_roxford5k.pkl
    python eval_retrieval.py CHECKPOINT --data path/to/jpg --gnd gnd_rparis6k.pkl

Reports mAP and mP@k in percent by the protocol of Radenovic et al. (arXiv 1803.11285).
As in DINO's evaluation, photographs keep their aspect ratio and queries are not cropped.

Shapes: Q queries, N images of the database, D width.
"""

if __name__ == "__main__":
    from attg.cli import ignore_sigint_during_import

    ignore_sigint_during_import()

import dataclasses
import pickle
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from attg.cli import DataFlags, RunFlags, check_unused, flag, parse, run_cli
from attg.evaluation import EvalFlags, FeatureFlags, check_source, evaluate
from attg.features import FEATURES, make_features, read_features
from attg.images import MAX_PIXELS, MODES, Sample, load_image, to_8_bits
from attg.weights import resize_positions
from attg_mae import load_encoder

__all__ = ["load_ground_truth", "main", "retrieval_map"]


@dataclasses.dataclass(kw_only=True)
class Settings(EvalFlags, DataFlags, FeatureFlags, RunFlags):
    gnd: str | None = flag(None, "the authors' gnd_roxford5k.pkl or gnd_rparis6k.pkl")


def arguments(argv=None):
    """The Settings of a command line, checked, with defaults resolved."""
    settings = parse(Settings, __doc__, argv)
    check_source(settings)
    check_unused(settings, ["classes"], "has no effect on retrieval")
    if not settings.gnd:
        raise ValueError("--gnd: missing; give the ground truth, gnd_roxford5k.pkl")
    return dataclasses.replace(settings, precision=settings.precision or "fp32")


# -- Ground truth ----------------------------------------------------------------------


class PlainUnpickler(pickle.Unpickler):
    """Unpickler of lists, dicts, numbers, strings and numpy arrays, and nothing else.

    A pickle may call any function. Those allowed here build arrays and numbers of numpy 1
    and 2, written by Python 2 or 3.
    """

    ALLOWED = {
        ("builtins", "bytes"),
        ("__builtin__", "bytes"),
        ("_codecs", "encode"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
    }
    for core in ("numpy.core", "numpy._core"):
        ALLOWED.add((f"{core}.multiarray", "_reconstruct"))
        ALLOWED.add((f"{core}.multiarray", "scalar"))
        ALLOWED.add((f"{core}.numeric", "_frombuffer"))

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise ValueError(f"ground truth must not hold {module}.{name}")
        return super().find_class(module, name)


def load_ground_truth(path):
    """Read the protocol's pickle as plain lists and numbers; ValueError names --gnd.

    {"imlist": N names, "qimlist": Q names, "gnd": Q dicts of bbx, easy, hard, junk}.
    """
    try:
        with open(path, "rb") as file:
            truth = PlainUnpickler(file).load()
        images = len(truth["imlist"])
        for query in truth["gnd"]:
            query["bbx"] = [float(x) for x in query["bbx"]]
            for kind in ("easy", "hard", "junk"):
                query[kind] = [int(i) for i in query[kind]]
                if not all(0 <= i < images for i in query[kind]):
                    raise ValueError(f"{kind} has images beyond the {images} listed")
        if len(truth["qimlist"]) != len(truth["gnd"]):
            raise ValueError("qimlist and gnd have different lengths")
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(
            f"--gnd {path}: not a ground truth ({error}); get the authors' "
            "gnd_roxford5k.pkl"
        ) from error
    return truth


# -- Metrics ---------------------------------------------------------------------------

# (positives, ignored images) of a query
DIFFICULTIES = {
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}


def retrieval_map(database, queries, gnd, ks=(1, 5, 10)):
    """{"medium": {"mAP", "mP@1", ...}, "hard": {...}} in percent.

    database (N, D), queries (Q, D): compared by cosine. gnd: Q dicts with lists easy,
    hard, junk of image numbers. Positives are easy and hard ones in "medium", hard ones in
    "hard"; ignored images are removed from the ranking first. Queries without positives
    do not count.
    """
    database = F.normalize(database.float(), dim=1)
    queries = F.normalize(queries.float(), dim=1)
    cosine = queries @ database.T  # (Q, N)
    rankings = cosine.argsort(dim=1, descending=True, stable=True).cpu().numpy()

    names = ["mAP"] + [f"mP@{k}" for k in ks]
    metrics = {}
    for difficulty, (positive_kinds, ignored_kinds) in DIFFICULTIES.items():
        scores = []
        for ranking, truth in zip(rankings, gnd, strict=True):
            positives = [i for kind in positive_kinds for i in truth[kind]]
            ignored = [i for kind in ignored_kinds for i in truth[kind]]
            if not positives:
                continue
            ranking = ranking[~np.isin(ranking, ignored)]
            ranks = np.flatnonzero(np.isin(ranking, positives))  # from 0
            score = [average_precision(ranks, len(positives))]
            for k in ks:
                # Up to the last positive, as in the authors' code.
                seen = min(k, ranks[-1] + 1)
                score.append((ranks < seen).sum() / seen)
            scores.append(score)
        means = np.full(len(names), np.nan)
        if scores:
            means = 100 * np.mean(scores, axis=0)
        metrics[difficulty] = dict(zip(names, means.tolist(), strict=True))
    return metrics


def average_precision(ranks, count):
    """Area under precision over recall, by the trapezoids of the protocol.

    ranks: those of the positives, from 0, ascending; count: number of all positives.
    """
    earlier = np.arange(len(ranks))
    # Precision just before each positive (1 at the top of the ranking), and with it.
    before = np.where(ranks > 0, earlier / np.maximum(ranks, 1), 1.0)
    after = (earlier + 1) / (ranks + 1)
    return ((before + after) / 2).sum() / count


# -- Photographs of any size -----------------------------------------------------------


class Landmarks(Dataset):
    """Photographs DIR/NAME.jpg, each of its own size, so batches hold one.

    The longer side is shrunk to `longest` pixels. An incomplete patch at the right or the
    bottom is cropped. cfg: the encoder's, for its patches and channels.
    """

    def __init__(self, folder, names, longest, cfg, max_pixels=MAX_PIXELS):
        self.paths = [Path(folder, f"{name}.jpg") for name in names]
        self.longest = longest
        self.patch_size = cfg.patch_size
        self.mode = MODES[cfg.in_chans]
        self.max_pixels = max_pixels
        missing = [path for path in self.paths if not path.is_file()]
        if missing:
            raise ValueError(
                f"--data {folder}: {len(missing)} of {len(names)} photographs are "
                f"missing, such as {missing[0]}"
            )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            image = to_8_bits(load_image(self.paths[i], self.max_pixels), self.mode)
        except Exception as error:  # decoders raise nearly anything
            raise ValueError(
                f"--data: {self.paths[i]} is unreadable ({error})"
            ) from error
        # Smaller images are not enlarged.
        image.thumbnail((self.longest, self.longest), Image.Resampling.LANCZOS)
        p = self.patch_size
        # A side shorter than a patch is padded with black.
        sides = [max(p, side - side % p) for side in image.size]
        image = image.crop((0, 0, *sides))
        return Sample(pil_to_tensor(image), -1, i, torch.zeros(4), False)


class AnySizeEncoder:
    """Wrapper of a ViT that resizes its positions to the grid of each batch.

    Sin-cos positions, too, as in DINO's code: those of a landscape span the same range as
    a square's. The settings and positions of the model change with each batch.
    """

    def __init__(self, model):
        self.model = model
        self.grid = model.cfg.grid
        self.positions = model.pos_embed.detach().clone()  # (1, N, D) of that grid
        # extract_features needs these two.
        self.normalize = model.normalize
        self.cls_token = model.cls_token

    def forward_features(self, imgs):
        """Images (B, C, H, W) -> tokens (B, N, D); see ViT.forward_features."""
        model = self.model
        model.cfg.img_size = tuple(imgs.shape[2:])
        model.pos_embed.data = self.positions
        if model.cfg.grid != self.grid:
            resized = resize_positions(self.positions, self.grid, model.cfg.grid)
            model.pos_embed.data = resized
        return model.forward_features(imgs)


# -- The protocol ----------------------------------------------------------------------


def retrieval_features(settings, truth, dist_info):
    """make_features of the database, "train", and the queries, "test"."""
    encoder = load_encoder(settings.checkpoint).to(dist_info[0])
    cfg = encoder.cfg
    longest = settings.img_size or max(cfg.size)
    if longest < cfg.patch_size:
        raise ValueError(
            f"--img_size {longest}: smaller than a patch; use {cfg.patch_size} or more"
        )
    sets = {}
    for part, names in (("train", truth["imlist"]), ("test", truth["qimlist"])):
        sets[part] = Landmarks(settings.data, names, longest, cfg, settings.max_pixels)
    options = dataclasses.asdict(settings) | {"batch_size": 1, "val": None}
    return make_features(AnySizeEncoder(encoder), sets, options, dist_info)


def evaluate_retrieval(settings, data, dist_info):
    """Results of both features, and all settings."""
    truth = load_ground_truth(settings.gnd)
    if settings.features:
        parts = read_features(settings.features)
    else:
        parts = retrieval_features(settings, truth, dist_info)
    for part, key in (("train", "imlist"), ("test", "qimlist")):
        images = len(parts[part]["labels"]) if part in parts else 0
        if images != len(truth[key]):
            raise ValueError(
                f"--features {settings.features}: {images} images in {part}, but "
                f"{len(truth[key])} in {key} of --gnd {settings.gnd}"
            )
    name = Path(settings.gnd).stem.removeprefix("gnd_")
    results = []
    for feature in FEATURES:
        database, queries = parts["train"][feature], parts["test"][feature]
        metrics = retrieval_map(database, queries, truth["gnd"])
        for difficulty, values in metrics.items():
            labels = {"feature": feature, "protocol": f"{name} {difficulty}"}
            results.append(labels | values)
    return results, dataclasses.asdict(settings) | parts["settings"]


def main(argv=None):
    """Returns the results, a list of dicts."""
    return evaluate("eval_retrieval", arguments(argv), evaluate_retrieval)


if __name__ == "__main__":
    run_cli(main)
