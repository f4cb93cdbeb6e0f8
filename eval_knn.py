"""
Features as they are: k-NN, k-NN with few labels, image retrieval (arXiv 2402.15172,
Tables 1, 3, 6 and 8).

    python eval_knn.py out/NAME/last.pt --data PATH_OR_NAME --k 10 20
    python eval_knn.py out/NAME/last.pt --data PATH_OR_NAME --shots 1 5 10 20
    python eval_knn.py out/NAME/last.pt --retrieval roxford5k --data DIR --gnd gnd.pkl

The figures are top-1 and top-5; --shots: labelled images a class. --retrieval: revisited
Oxford and Paris, with the pictures as they are in DINO's evaluation. Reads checkpoints of
this project, MAE, DINO, timm and Hugging Face. Runs under torchrun as well. The encoder
sees whole images, nothing is masked; both the class token and the mean of the patch
tokens are measured.

Shapes: n training images, B test images, D width, C classes, K values of k, Q queries,
N images of a database.
"""

if __name__ == "__main__":
    from attg.cli import ignore_sigint_during_import

    ignore_sigint_during_import()

import copy
import pickle
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from attg.cli import Parser, end
from attg.datasets import Sample, open_labelled, shot_indices
from attg.evaluation import (
    MAKING,
    add_data,
    add_running,
    add_shots,
    add_val,
    check_flags,
    check_shots,
    evaluate,
    refuse_idle,
    view_of,
)
from attg.features import (
    FEATURES,
    knn_classify,
    knn_rankings,
    make_features,
    read_features,
)
from attg.files import require
from attg.images import MAX_PIXELS, MODES, load_image, to_8_bits
from attg.weights import resize_positions
from attg_mae import load_encoder

__all__ = ["accuracy", "knn_classify", "load_ground_truth", "main", "retrieval_map"]

# -- k-NN ------------------------------------------------------------------------------


def accuracy(bank, labels, queries, truth, ks, num_classes, device, rank=0, world=1):
    """(K, 2) top-1 and top-5 in percent for each k of ks.

    bank (n, D), labels (n,), queries (B, D), truth (B,). Each process classifies its
    share of the queries.
    """
    mine = slice(rank, None, world)
    classes = knn_rankings(
        bank.to(device),
        labels.to(device),
        queries[mine].to(device),
        ks,
        num_classes=num_classes,
    )
    right = classes == truth[mine].to(device)[:, None]  # (K, b, min(5, C))
    first = right[..., 0].sum(dim=1)
    any_of_five = right.any(dim=2).sum(dim=1)
    hits = torch.stack([first, any_of_five], dim=1).float()
    if world > 1:
        dist.all_reduce(hits)
    return 100 * hits.cpu().double() / len(truth)


def knn_rows(parts, args, place):
    """The rows of k-NN with all labels, or with few (--shots)."""
    bank = parts["train"]
    tests = {n: part for n, part in parts.items() if n not in ("train", "settings")}
    require(tests, f"--features {args.features}: holds no test set")
    labelled = bank["labels"] >= 0
    require(
        labelled.any(),
        f"--features {args.features}: of images without labels; "
        "add --retrieval and --gnd",
    )
    labels = bank["labels"][labelled]
    if args.features:
        check_shots(labels, args.shots, place[1])
    rows = []
    for feature in FEATURES:
        x = bank[feature][labelled]
        for name, test in tests.items():
            measured = rows_of(x, labels, test[feature], test["labels"], args, place)
            for row in measured:
                words = {"feature": feature, "protocol": row.pop("protocol")}
                # A column of its own where there is a choice.
                if list(tests) != ["test"]:
                    words["test"] = name
                rows.append(words | row)
    return rows


def rows_of(x, labels, queries, truth, args, place):
    """The rows of one feature x (n, D) on one test set, queries (B, D)."""
    setup = (args.k, int(labels.max()) + 1, *place)
    rows = []
    if not args.shots:
        tops = accuracy(x, labels, queries, truth, *setup).tolist()
        for k, (top1, top5) in zip(args.k, tops, strict=True):
            row = {"protocol": "k-NN", "k": k}
            rows.append(row | {"top-1": top1, "top-5": top5})
    for shots in args.shots:
        tops = []
        for seed in range(args.seeds):
            chosen = shot_indices(labels, shots, seed)
            few = x[chosen], labels[chosen]
            tops.append(accuracy(*few, queries, truth, *setup))
        tops = torch.stack(tops)  # (seeds, K, 2)
        images = {"seeds": args.seeds, "images": len(chosen)}
        for k, top in zip(args.k, tops.unbind(1), strict=True):
            row = {"protocol": f"{shots} shots", "k": k}
            rows.append(row | mean_and_spread(top) | images)
    return rows


def mean_and_spread(top):
    """Figures of (seeds, 2) top-1 and top-5; the deviation of one seed is 0."""
    correction = min(1, len(top) - 1)
    return {
        "top-1": top[:, 0].mean().item(),
        "+-": top[:, 0].std(correction=correction).item(),
        "top-5": top[:, 1].mean().item(),
    }


# -- Image retrieval: the revisited Oxford and Paris protocol --------------------------
# Radenovic et al., arXiv 1803.11285


class PlainUnpickler(pickle.Unpickler):
    """Builds lists, dicts, numbers, strings and numpy arrays, and nothing else.

    A pickle may ask for any function of any module; these are what arrays and numbers of
    numpy 1 and 2 ask for, written by Python 2 or 3.
    """

    PLAIN = {
        ("builtins", "bytes"),
        ("__builtin__", "bytes"),
        ("_codecs", "encode"),
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.numeric", "_frombuffer"),
    }

    def find_class(self, module, name):
        asked = f"{module}.{name}"
        plain = (module, name) in self.PLAIN
        require(plain, f"it asks for {asked}, which ground truth does not need")
        return super().find_class(module, name)


def load_ground_truth(path):
    """The pickle of the protocol, as plain lists and numbers; ValueError names --gnd.

    {"imlist": N names, "qimlist": Q names, "gnd": Q dicts of bbx, easy, hard, junk}.
    """
    try:
        with open(path, "rb") as file:
            gnd = PlainUnpickler(file).load()
        make_plain(gnd)
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(
            f"--gnd {path}: no ground truth ({error}); "
            "get the authors' gnd_roxford5k.pkl"
        ) from error
    return gnd


def make_plain(gnd):
    """Arrays become lists of numbers, in place; ValueError for numbers of no image."""
    images = len(gnd["imlist"])
    for query in gnd["gnd"]:
        query["bbx"] = [float(x) for x in query["bbx"]]
        for kind in ("easy", "hard", "junk"):
            query[kind] = [int(i) for i in query[kind]]
            known = all(0 <= i < images for i in query[kind])
            require(known, f"a number of {kind} is not one of the {images} images")
    queries, truths = len(gnd["qimlist"]), len(gnd["gnd"])
    require(queries == truths, f"{queries} queries, but truth for {truths}")


# What a query is to find, and what is neither right nor wrong for it.
DIFFICULTIES = {
    "medium": (("easy", "hard"), ("junk",)),
    "hard": (("hard",), ("junk", "easy")),
}


def retrieval_map(database, queries, gnd, ks=(1, 5, 10)):
    """{"medium": {"mAP", "mP@1", ...}, "hard": {...}} in percent.

    database (N, D), queries (Q, D): compared by cosine. gnd: Q dicts of lists easy, hard,
    junk of images. Medium finds easy and hard ones, hard the hard ones only; what is
    neither searched nor wrong is taken out of the ranking before. Queries that have
    nothing to find are left out.
    """
    database = F.normalize(database.float(), dim=1)
    queries = F.normalize(queries.float(), dim=1)
    cosine = queries @ database.T  # (Q, N)
    ranking = cosine.argsort(dim=1, descending=True, stable=True).cpu().numpy()

    names = ["mAP"] + [f"mP@{k}" for k in ks]
    result = {}
    for difficulty, (find, ignore) in DIFFICULTIES.items():
        scores = []
        for order, truth in zip(ranking, gnd, strict=True):
            positives = [i for kind in find for i in truth[kind]]
            ignored = [i for kind in ignore for i in truth[kind]]
            if not positives:
                continue
            order = order[~np.isin(order, ignored)]
            places = np.flatnonzero(np.isin(order, positives))  # from 0
            score = [average_precision(places, len(positives))]
            for k in ks:
                # No further than the last positive, as in the authors' code.
                seen = min(k, places[-1] + 1)
                score.append((places < seen).sum() / seen)
            scores.append(score)
        means = np.full(len(names), np.nan)
        if scores:
            means = 100 * np.mean(scores, axis=0)
        result[difficulty] = dict(zip(names, means.tolist(), strict=True))
    return result


def average_precision(places, count):
    """Area under precision over recall, by trapezoids as the protocol has it.

    places: of the positives in the ranking, from 0, ascending; count: of all positives.
    """
    found = np.arange(len(places))
    # Precision just before each positive (1 at the top of the ranking), and with it.
    before = np.where(places > 0, found / np.maximum(places, 1), 1.0)
    after = (found + 1) / (places + 1)
    return ((before + after) / 2).sum() / count


def retrieval_rows(parts, gnd, name):
    """The rows of image retrieval; name: of the data set."""
    for part, words in (("train", "imlist"), ("test", "qimlist")):
        images, expected = len(parts[part]["labels"]), len(gnd[words])
        require(
            images == expected,
            f"features of {images} images, but {words} of --gnd tells of {expected}; use "
            f"those of {name}",
        )
    rows = []
    for feature in FEATURES:
        database, queries = parts["train"][feature], parts["test"][feature]
        found = retrieval_map(database, queries, gnd["gnd"])
        for difficulty, scores in found.items():
            row = {"feature": feature, "protocol": f"{name} {difficulty}"}
            rows.append(row | scores)
    return rows


class Landmarks(Dataset):
    """Photographs DIR/NAME.jpg, each of its own size: a batch holds one.

    As in DINO's evaluation the longer side is shrunk to `longest` pixels and the aspect
    ratio kept, and queries are not cropped to their boxes. What is no whole patch at the
    right and at the bottom is cut off. cfg: of the encoder, its patches and channels.
    """

    def __init__(self, folder, names, longest, cfg, max_pixels=MAX_PIXELS):
        self.paths = [Path(folder, f"{name}.jpg") for name in names]
        self.longest = longest
        self.patch_size = cfg.patch_size
        self.mode = MODES[cfg.in_chans]
        self.max_pixels = max_pixels
        missing = [str(path) for path in self.paths if not path.is_file()]
        if missing:
            raise ValueError(
                f"--data {folder}: {len(missing)} of {len(names)} photographs are "
                f"missing, as {missing[0]}"
            )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        try:
            picture = to_8_bits(load_image(self.paths[i], self.max_pixels), self.mode)
        except Exception as error:  # decoders raise nearly anything
            raise ValueError(
                f"--data: {self.paths[i]} is unreadable ({error})"
            ) from error
        # Smaller pictures stay as they are.
        picture.thumbnail((self.longest, self.longest), Image.Resampling.LANCZOS)
        p = self.patch_size
        # A side shorter than a patch is filled up with black.
        whole = [max(p, side - side % p) for side in picture.size]
        picture = picture.crop((0, 0, *whole))
        return Sample(pil_to_tensor(picture), -1, i, torch.zeros(4), False)


class AnySize:
    """An encoder for images of any size: its positions are resized to their grid.

    Sin-cos positions as well, as by DINO's code, so that those of a landscape span the
    range of a square's. model: a ViT, whose size and positions change with each batch.
    """

    def __init__(self, model):
        self.model = model
        # A copy: whoever holds the settings keeps theirs.
        model.cfg = copy.copy(model.cfg)
        self.grid = model.cfg.grid
        self.positions = model.pos_embed.detach().clone()  # (1, N, D) of that grid
        # What extract_features asks of an encoder.
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


# -- The features ----------------------------------------------------------------------


def retrieval_features(args, gnd, settings, place):
    """make_features of retrieval: "train" is the database, "test" the queries."""
    model = load_encoder(args.checkpoint).to(place[0])
    longest = args.img_size or max(model.cfg.size)
    p = model.cfg.patch_size
    require(longest >= p, f"--img_size {longest}: a patch has {p} pixels; use more")
    sets = {}
    for name, photographs in (("train", gnd["imlist"]), ("test", gnd["qimlist"])):
        sets[name] = Landmarks(
            args.data, photographs, longest, model.cfg, args.max_pixels
        )
    return make_features(AnySize(model), sets, args.batch_size, settings, place)


def knn_features(args, settings, place):
    """make_features of a data set with labels."""
    model = load_encoder(args.checkpoint, img_size=args.img_size).to(place[0])
    train_set, tests = open_labelled(args.data, args.val, **view_of(args, model.cfg))
    if args.shots:
        # What cannot be drawn is an error that should come before the long part.
        check_shots(train_set.labels, args.shots, place[1])
    sets = {"train": train_set, **tests}
    return make_features(model, sets, args.batch_size, settings, place)


# -- The command line ------------------------------------------------------------------


def arguments(argv):
    parser = Parser(description=__doc__)
    add_protocol(parser.add_argument)
    add_features(parser.add_argument)
    add_running(parser.add_argument, "the checkpoint or the features")
    args = parser.parse_args(argv)
    require(
        args.checkpoint or args.features,
        "a checkpoint is needed: eval_knn.py CHECKPOINT, or --features FILE",
    )
    if args.features:
        refuse_idle(parser, args, MAKING, "does nothing beside --features")
    if args.retrieval:
        # Each photograph has its own size, the queries are named by --gnd.
        idle = ("batch_size", "val", "classes", "k", "shots")
        refuse_idle(parser, args, idle, "does nothing beside --retrieval")
    else:
        refuse_idle(parser, args, ["gnd"], "does nothing without --retrieval")
    check_flags(args)
    if not args.k:
        args.k = [5] if args.shots else [20]
    if args.batch_size is None:
        args.batch_size = 1 if args.retrieval else 256
    return args


def add_protocol(flag):
    add_data(
        flag,
        checkpoint="file with an encoder; not needed with --features",
        data="as for attg_mae.py; with --retrieval the folder of the photographs",
    )
    add_val(flag)
    flag("--k", type=int, nargs="+", help="neighbours [20; 5 with --shots]")
    add_shots(flag, use="")
    flag(
        "--retrieval", choices=("roxford5k", "rparis6k"), help="image retrieval instead"
    )
    flag("--gnd", help="its ground truth [gnd_NAME.pkl in the folder --data]")


def add_features(flag):
    flag("--features", help="file of --save_features to start from")
    flag("--save_features", help="file to write the features to")
    flag(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the encoder [%(default)s]",
    )
    flag("--batch_size", type=int, help="[256; 1 with --retrieval]")


def protocol(args, settings, place):
    """The rows of figures of everything that was asked for, and all settings."""
    gnd = None
    if args.retrieval:
        beside = Path(args.data, f"gnd_{args.retrieval}.pkl")
        gnd = load_ground_truth(args.gnd or beside)
    if args.features:
        parts = read_features(args.features)
    elif args.retrieval:
        parts = retrieval_features(args, gnd, settings, place)
    else:
        parts = knn_features(args, settings, place)
    settings = settings | parts["settings"]
    if args.retrieval:
        require(
            "test" in parts,
            f"--features {args.features}: has no test set named test, only "
            f"{sorted(parts)[:9]}",
        )
        return retrieval_rows(parts, gnd, args.retrieval), settings
    return knn_rows(parts, args, place), settings


def main(argv=None, data=None):
    """Returns the rows of figures; data: of one's own, see attg.evaluation.evaluate."""
    args = arguments(argv)
    require(
        data is None or not args.retrieval,
        f"--retrieval {args.retrieval}: takes no data of your own, but a folder of "
        "photographs, --data DIR",
    )
    return evaluate("eval_knn", args, protocol, data)


if __name__ == "__main__":
    end(main)
