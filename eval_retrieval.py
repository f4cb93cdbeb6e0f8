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
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from attg.cli import DataFlags, RunFlags, check_unused, flag, parse, run_cli
from attg.evaluation import EvalFlags, evaluate
from attg.features import FEATURES, extract_sharded
from attg.files import sha256
from attg.images import MAX_PIXELS, MODES, Sample, load_image, to_8_bits
from attg.weights import resize_positions
from attg_mae import load_encoder

__all__ = ["load_ground_truth", "main", "retrieval_map"]


@dataclasses.dataclass(kw_only=True)
class Settings(EvalFlags, DataFlags, RunFlags):
    gnd: str | None = flag(None, "the authors' gnd_roxford5k.pkl or gnd_rparis6k.pkl")


# -- Ground truth ----------------------------------------------------------------------


class PlainUnpickler(pickle.Unpickler):
    """Unpickler of lists, dicts, numbers, strings and numpy arrays, and nothing else.

    A pickle may call any function. Those allowed here build arrays and numbers of numpy 1
    and 2, written by Python 2 or 3.
    """

    ALLOWED = re.compile(
        r"(__builtin__|builtins)\.bytes|_codecs\.encode|numpy\.(dtype|ndarray)"
        r"|numpy\._?core\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer)"
    )

    def find_class(self, module, name):
        if not self.ALLOWED.fullmatch(f"{module}.{name}"):
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


def accept_any_size(model):
    """Make a ViT resize its positions to the grid of each batch.

    Sin-cos positions, too, as in DINO's code: those of a landscape span the same range as
    a square's. The settings and positions of the model change with each batch.
    """
    positions, grid = model.pos_embed.detach().clone(), model.cfg.grid
    forward = model.forward_features

    def forward_features(imgs):
        model.cfg.img_size = tuple(imgs.shape[2:])
        model.pos_embed.data = resize_positions(positions, grid, model.cfg.grid)
        return forward(imgs)

    model.forward_features = forward_features


# -- The protocol ----------------------------------------------------------------------


def retrieval_features(settings, names, dist_info):
    """Features of the photographs of each list of names: class tokens, patch means (n, D)."""
    device, rank, world = dist_info
    encoder = load_encoder(settings.checkpoint).to(device)
    # The Config of the encoder, before it changes with each batch.
    cfg = dataclasses.replace(encoder.cfg)
    longest = settings.img_size or max(cfg.size)
    if longest < cfg.patch_size:
        raise ValueError(
            f"--img_size {longest}: smaller than a patch; use {cfg.patch_size} or more"
        )
    accept_any_size(encoder)
    loader_args = {"batch_size": 1, "workers": settings.workers}
    features = []
    for part in names:
        photos = Landmarks(settings.data, part, longest, cfg, settings.max_pixels)
        *tensors, _ = extract_sharded(encoder, photos, loader_args, None, rank, world)
        features.append(tensors)
    return features


def evaluate_retrieval(settings, data, dist_info):
    """Results of both features, and all settings."""
    truth = load_ground_truth(settings.gnd)
    names = truth["imlist"], truth["qimlist"]
    database, queries = retrieval_features(settings, names, dist_info)
    name = Path(settings.gnd).stem.removeprefix("gnd_")
    results = []
    for feature, images, examples in zip(FEATURES, database, queries, strict=True):
        for difficulty, values in retrieval_map(images, examples, truth["gnd"]).items():
            labels = {"feature": feature, "protocol": f"{name} {difficulty}"}
            results.append(labels | values)
    checksum = {"sha256": sha256(settings.checkpoint)}
    return results, dataclasses.asdict(settings) | checksum


def main(argv=None):
    """Returns the results, a list of dicts."""
    settings = parse(Settings, __doc__, argv)
    check_unused(settings, ["classes"], "has no effect on retrieval")
    if not settings.gnd:
        raise ValueError("--gnd: missing; give the ground truth, gnd_roxford5k.pkl")
    return evaluate("eval_retrieval", settings, evaluate_retrieval)


if __name__ == "__main__":
    run_cli(main)
