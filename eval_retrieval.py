"""
Image retrieval on revisited Oxford and Paris (arXiv 2402.15172, Table 8).

    python eval_retrieval.py CHECKPOINT --data path/to/jpg --gnd gnd_roxford5k.pkl
    python eval_retrieval.py CHECKPOINT --data path/to/jpg --gnd gnd_rparis6k.pkl

Reports mAP and mP@k in percent by the protocol of Radenovic et al. (arXiv 1803.11285).
As in DINO's evaluation, photographs keep their aspect ratio and queries are not cropped.

Shapes: Q queries, N images of the database, D width.
"""

if __name__ == "__main__":
    from attg.cli import quiet_sigint_during_import

    quiet_sigint_during_import()

import dataclasses
import math
import pickle
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from attg.cli import RunFlags, check_unused, flag, parse, run_cli
from attg.evaluation import EvalFlags, evaluate, open_encoder
from attg.features import FEATURES, pool_tokens, unit_rows
from attg.images import MODES, load_image, to_8_bits, to_tensor
from attg.log import log_line, progress
from attg.weights import resize_positions
from attg_mae import load_encoder


@dataclasses.dataclass(kw_only=True)
class Settings(EvalFlags, RunFlags):
    data: str | None = flag(None, "folder of the photographs, DIR/NAME.jpg")
    gnd: str | None = flag(None, "the authors' gnd_roxford5k.pkl or gnd_rparis6k.pkl")


# (positives, ignored images) of a query
DIFFICULTIES = {"medium": (("easy", "hard"), ("junk",))}
DIFFICULTIES["hard"] = ("hard",), ("junk", "easy")


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
    """Read the protocol's pickle; ValueError names --gnd.

    {"imlist": N names, "qimlist": Q names, "gnd": Q dicts of easy, hard, junk, which are
    lists of image numbers}.
    """
    try:
        with open(path, "rb") as file:
            truth = PlainUnpickler(file).load()
        for _, query in zip(truth["qimlist"], truth["gnd"], strict=True):
            for kind in ("easy", "hard", "junk"):
                # IndexError for images that are not listed.
                query[kind] = [range(len(truth["imlist"]))[i] for i in query[kind]]
    except Exception as error:  # a damaged pickle raises nearly anything
        message = f"not a ground truth ({error}); get the authors' gnd_roxford5k.pkl"
        raise ValueError(f"--gnd {path}: {message}") from error
    return truth


def retrieval_map(database, queries, gnd, ks=(1, 5, 10)):
    """{"medium": {"mAP", "mP@1", ...}, "hard": {...}} in percent.

    database (N, D), queries (Q, D): compared by cosine. gnd: Q dicts with lists easy,
    hard, junk of image numbers. Positives are easy and hard ones in "medium", hard ones in
    "hard"; ignored images are removed from the ranking first. Queries without positives
    do not count.
    """
    cosine = unit_rows(queries) @ unit_rows(database).T  # (Q, N)
    rankings = cosine.argsort(dim=1, descending=True, stable=True).cpu().numpy()

    names = ["mAP"] + [f"mP@{k}" for k in ks]
    metrics = {}
    for difficulty, kinds in DIFFICULTIES.items():
        scores = []
        for ranking, truth in zip(rankings, gnd, strict=True):
            positives, ignored = ([i for k in part for i in truth[k]] for part in kinds)
            ranking = ranking[~np.isin(ranking, ignored)]
            ranks = np.flatnonzero(np.isin(ranking, positives))  # from 0
            if len(ranks):
                # Up to the last positive, as in the authors' code.
                seen = np.minimum(ks, ranks[-1] + 1)
                precision = (ranks < seen[:, None]).sum(axis=1) / seen  # (K,)
                scores.append([average_precision(ranks), *precision])
        means = 100 * np.mean(scores, axis=0) if scores else len(names) * [math.nan]
        metrics[difficulty] = dict(zip(names, map(float, means), strict=True))
    return metrics


def average_precision(ranks):
    """Area under the precision-recall curve, by the protocol's trapezoidal rule.

    ranks: those of all positives, from 0, ascending.
    """
    earlier = np.arange(len(ranks))
    # Precision just before each positive (1 at the top of the ranking), and with it.
    before = np.where(ranks > 0, earlier / np.maximum(ranks, 1), 1.0)
    after = (earlier + 1) / (ranks + 1)
    return ((before + after) / 2).mean()


def load_photograph(path, longest, cfg):
    """uint8 (1, C, h, w): a photograph in its aspect ratio, of whole patches.

    The longer side is shrunk to `longest` pixels, smaller images are not enlarged. An
    incomplete patch at the right or the bottom is cropped. cfg: the encoder's.
    """
    try:
        image = to_8_bits(load_image(path), MODES[cfg.in_chans])
    except Exception as error:  # decoders raise nearly anything
        raise ValueError(f"--data: {path} is unreadable ({error})") from error
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    p = cfg.patch_size
    # A side shorter than a patch is padded with black.
    sides = [max(p, side - side % p) for side in image.size]
    return to_tensor(image.crop((0, 0, *sides)))[None]


@torch.no_grad()
def photograph_features(encoder, paths, longest, device):
    """Class tokens and means of the patch tokens (2, n, D) of photographs."""
    cfg, grid, positions = encoder.cfg, encoder.cfg.grid, encoder.pos_embed.data
    features = []
    for path in progress(paths, desc="features"):
        imgs = load_photograph(path, longest, cfg).to(device)
        # Resize the positions to the grid of each image, as in DINO's code: in a landscape
        # image they span the same range as in a square.
        cfg.img_size = tuple(imgs.shape[2:])
        encoder.pos_embed.data = resize_positions(positions, grid, cfg.grid)
        tokens = encoder.forward_features(encoder.normalize(imgs))  # (1, N, D)
        features.append(torch.cat(pool_tokens(encoder, tokens)))
    return torch.stack(features, dim=1)


def evaluate_retrieval(settings, data, dist_info):
    """Results of both features."""
    device, rank, _ = dist_info
    if rank != 0:
        return []  # rank 0 works alone
    for name in ("data", "gnd"):
        if getattr(settings, name) is None:
            raise ValueError(f"--{name}: missing; see --help")
    truth = load_ground_truth(settings.gnd)
    encoder = open_encoder(load_encoder, settings, True, img_size=None).to(device)
    longest = settings.img_size or max(encoder.cfg.size)
    names = truth["imlist"] + truth["qimlist"]
    paths = [Path(settings.data, f"{name}.jpg") for name in names]
    name = Path(settings.gnd).stem.removeprefix("gnd_")
    sizes = f"{len(truth['imlist']):,} images, {len(truth['qimlist']):,} queries"
    settings.header = f"data {settings.data}, {name}: {sizes}"
    log_line(settings.header)
    features = photograph_features(encoder, paths, longest, device)
    results = []
    for feature, x in zip(FEATURES, features, strict=True):
        images, queries = x.split([len(truth["imlist"]), len(truth["qimlist"])])
        for difficulty, values in retrieval_map(images, queries, truth["gnd"]).items():
            labels = {"feature": feature, "protocol": f"{name} {difficulty}"}
            results.append(labels | values)
    return results


def main(argv=None):
    """Returns the results, a list of dicts."""
    settings = parse(Settings, __doc__, argv)
    check_unused(settings, ["workers"], "has no effect on retrieval")
    return evaluate("eval_retrieval", settings, evaluate_retrieval)


if __name__ == "__main__":
    run_cli(main)
