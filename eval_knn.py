"""
Features as they are: k-NN, k-NN with few labels, image retrieval (arXiv 2402.15172, Tables 1, 3, 6 and 8).

    python eval_knn.py out/NAME/last.pt --data PATH_OR_NAME --k 10 20                # top-1 and top-5
    python eval_knn.py out/NAME/last.pt --data PATH_OR_NAME --shots 1 5 10 20        # labelled images a class, k = 5
    python eval_knn.py out/NAME/last.pt --retrieval roxford5k --data DIR --gnd gnd_roxford5k.pkl

Reads checkpoints of this project, MAE, DINO, timm and Hugging Face. Runs under torchrun as well. The encoder sees whole
images, nothing is masked; both the class token and the mean of the patch tokens are measured.

Shapes: n training images, B test images, D width, C classes, Q queries, N images of a database.
"""

import argparse
import pickle
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from attg_mae import load_encoder
from common.data import Sample, open_labelled, shot_indices, to_rgb
from common.features import FEATURES, features_of, knn_classify
from common.files import report, sha256
from common.run import load_checkpoint, processes, save_checkpoint


def accuracy(bank, labels, queries, truth, ks, num_classes, device, rank=0, world=1):
    """(K, 2) top-1 and top-5 in percent for each k of ks. Each process classifies its share of the queries."""
    mine = slice(rank, None, world)
    classes = knn_classify(
        bank.to(device),
        labels.to(device),
        queries[mine].to(device),
        ks,
        num_classes=num_classes,
    )
    right = classes == truth[mine].to(device)[:, None]  # (K, b, min(5, C))
    hits = torch.stack(
        [right[..., 0].sum(dim=1), right.any(dim=2).sum(dim=1)], dim=1
    ).float()
    if world > 1:
        dist.all_reduce(hits)
    return 100 * hits.cpu().double() / len(truth)


# ---------------------------------------------------------------------------------------------------------------------
# Image retrieval: the revisited Oxford and Paris protocol (Radenovic et al., arXiv 1803.11285)


class PlainUnpickler(pickle.Unpickler):
    """Builds lists, dicts, numbers, strings and numpy arrays, and nothing else."""

    PLAIN = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    PLAIN |= {
        (f"numpy.{core}.multiarray", f)
        for core in ("core", "_core")
        for f in ("_reconstruct", "scalar")
    }
    PLAIN |= {
        ("numpy._core.numeric", "_frombuffer"),
        ("builtins", "bytes"),
        ("__builtin__", "bytes"),
    }

    def find_class(self, module, name):
        if (module, name) not in self.PLAIN:
            raise ValueError(
                f"it asks for {module}.{name}, which ground truth does not need"
            )
        return super().find_class(module, name)


def load_ground_truth(path):
    """The pickle of the protocol: {"imlist": N names, "qimlist": Q names, "gnd": Q dicts of bbx, easy, hard, junk}."""
    try:
        with open(path, "rb") as file:
            gnd = PlainUnpickler(file).load()
        for query in gnd["gnd"]:
            query["bbx"] = [float(x) for x in query["bbx"]]
            for kind in ("easy", "hard", "junk"):
                query[kind] = [int(i) for i in query[kind]]
                if not all(0 <= i < len(gnd["imlist"]) for i in query[kind]):
                    raise ValueError(
                        f"a number of {kind} is not one of the {len(gnd['imlist'])} images"
                    )
        if len(gnd["gnd"]) != len(gnd["qimlist"]):
            raise ValueError(
                f"{len(gnd['qimlist'])} queries, but truth for {len(gnd['gnd'])}"
            )
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(
            f"--gnd {path}: no ground truth ({error}); get the authors' gnd_roxford5k.pkl"
        ) from error
    return gnd


def retrieval_map(database, queries, gnd, ks=(1, 5, 10)):
    """{"medium": {"mAP", "mP@1", ...}, "hard": {...}} in percent.

    database (N, D), queries (Q, D): compared by cosine. gnd: Q dicts of lists easy, hard, junk of images. Medium finds
    easy and hard ones, hard the hard ones only; what is neither searched nor wrong is taken out of the ranking before.
    Average precision by trapezoids, as in the protocol. Queries that have nothing to find are left out.
    """
    cosine = (
        F.normalize(queries.float(), dim=1) @ F.normalize(database.float(), dim=1).T
    )  # (Q, N)
    ranking, result = (
        cosine.argsort(dim=1, descending=True, stable=True).cpu().numpy(),
        {},
    )
    for name, find, ignore in (
        ("medium", ("easy", "hard"), ("junk",)),
        ("hard", ("hard",), ("junk", "easy")),
    ):
        scores = []
        for order, truth in zip(ranking, gnd, strict=True):
            positives, junk = (
                [i for kind in kinds for i in truth[kind]] for kinds in (find, ignore)
            )
            if not positives:
                continue
            order = order[~np.isin(order, junk)]
            places = np.flatnonzero(np.isin(order, positives))  # from 0
            found = np.arange(len(places))
            before = np.where(places > 0, found / np.maximum(places, 1), 1.0)
            average = ((before + (found + 1) / (places + 1)) / 2).sum() / len(positives)
            seen = [
                min(k, places[-1] + 1) for k in ks
            ]  # no further than the last positive
            scores.append([average, *((places < k).sum() / k for k in seen)])
        means = (
            100 * np.mean(scores, axis=0) if scores else [float("nan")] * (1 + len(ks))
        )
        result[name] = dict(
            zip(("mAP", *(f"mP@{k}" for k in ks)), map(float, means), strict=True)
        )
    return result


class Landmarks(Dataset):
    """Photographs DIR/NAME.jpg, cut to a box in pixels if there is one, squashed to (h, w)."""

    def __init__(self, folder, names, size, boxes=None):
        self.paths, self.size, self.boxes = (
            [Path(folder, f"{name}.jpg") for name in names],
            size,
            boxes,
        )
        missing = [str(path) for path in self.paths if not path.is_file()]
        if missing:
            raise ValueError(
                f"--data {folder}: {len(missing)} of {len(names)} photographs are missing, as {missing[0]}"
            )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        picture = to_rgb(Image.open(self.paths[i]))
        picture = (
            picture.crop(tuple(round(x) for x in self.boxes[i]))
            if self.boxes
            else picture
        )
        picture = picture.resize(self.size[::-1], Image.Resampling.BICUBIC)
        return Sample(pil_to_tensor(picture), -1, i, torch.zeros(4), False)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


SOURCE = ("checkpoint", "data", "classes", "img_size", "precision")  # of features


def arguments(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "checkpoint", nargs="?", help="file with an encoder; not needed with --features"
    )
    add(
        "--data",
        default="toy",
        help="as for attg_mae.py; with --retrieval the folder of the photographs [%(default)s]",
    )
    add(
        "--classes",
        help="file with the class folders to keep, one a line (ImageNet-100)",
    )
    add("--k", type=int, nargs="+", help="neighbours [20; 5 with --shots]")
    add("--shots", type=int, nargs="+", default=[], help="labelled images a class")
    add(
        "--seeds",
        type=int,
        default=5,
        help="random choices of the --shots [%(default)s]",
    )
    add(
        "--retrieval", choices=("roxford5k", "rparis6k"), help="image retrieval instead"
    )
    add("--gnd", help="its ground truth [gnd_NAME.pkl in the folder --data]")
    add("--features", help="file of --save_features to start from")
    add("--save_features", help="file to write the features to")
    add(
        "--precision",
        choices=("fp32", "bf16"),
        default="fp32",
        help="of the encoder [%(default)s]",
    )
    add("--img_size", type=int, help="input size in pixels [the checkpoint's]")
    add("--batch_size", type=int, default=256)
    add(
        "--workers",
        type=int,
        default=None,
        help="loader processes of each process [CPU 0, GPU 8]",
    )
    add("--device", help="cuda, mps or cpu [the first there is]")
    add(
        "--out",
        help="file that the results are added to [eval_knn.jsonl beside the checkpoint or the features]",
    )
    args = parser.parse_args(argv)
    if not args.checkpoint and not args.features:
        raise ValueError(
            "a checkpoint is needed: eval_knn.py CHECKPOINT, or --features FILE"
        )
    args.k = args.k or ([5] if args.shots else [20])
    if min(args.k + args.shots + [args.seeds]) < 1:
        raise ValueError(
            f"--k {args.k}, --shots {args.shots}, --seeds {args.seeds}: must be above 0"
        )
    return args


def evaluate(args, device, rank, world):
    """[{"feature", "protocol", ...figures}] of everything that was asked for."""
    gnd = (
        load_ground_truth(args.gnd or Path(args.data, f"gnd_{args.retrieval}.pkl"))
        if args.retrieval
        else None
    )
    if args.features:
        parts = load_checkpoint(args.features)
        if not {"train", "test", "settings"} <= set(parts):
            raise ValueError(
                f"--features {args.features}: holds {sorted(parts)[:5]}; name a file of --save_features"
            )
    else:
        model = load_encoder(args.checkpoint, img_size=args.img_size).to(device)
        size, workers = model.cfg.size, 0 if device.type == "cpu" else 8
        if args.retrieval:
            boxes = [query["bbx"] for query in gnd["gnd"]]
            pair = (
                Landmarks(args.data, gnd["imlist"], size),
                Landmarks(args.data, gnd["qimlist"], size, boxes),
            )
        else:
            train_set, tests = open_labelled(
                args.data, ["test"], size, classes=args.classes
            )
            pair = train_set, tests["test"]
            for shots in args.shots:  # are there enough?
                shot_indices(train_set.labels, shots, 0)
        loader = {
            "batch_size": args.batch_size,
            "workers": workers if args.workers is None else args.workers,
        }
        dtype = torch.bfloat16 if args.precision == "bf16" else None
        found = [
            features_of(model, dataset, loader, dtype, rank, world) for dataset in pair
        ]
        found = [dict(zip((*FEATURES, "labels"), x, strict=True)) for x in found]
        source = {"sha256": sha256(args.checkpoint), "val": ["test"]} | {
            k: getattr(args, k) for k in SOURCE
        }
        parts = {"train": found[0], "test": found[1], "settings": source}
        if args.save_features and rank == 0:
            save_checkpoint(args.save_features, **parts)
    vars(args).update(parts["settings"])
    bank, queries, rows = parts["train"], parts["test"], []
    if args.retrieval:
        for feature in FEATURES:
            for name, scores in retrieval_map(
                bank[feature], queries[feature], gnd["gnd"]
            ).items():
                rows.append(
                    {
                        "feature": feature,
                        "protocol": f"{args.retrieval} {name}",
                        **scores,
                    }
                )
        return rows
    known = bank["labels"] >= 0
    if not known.any():
        raise ValueError(
            f"--features {args.features}: of images without labels; add --retrieval and --gnd"
        )
    labels, num_classes = bank["labels"][known], int(bank["labels"].max()) + 1
    setup = {"num_classes": num_classes, "device": device, "rank": rank, "world": world}
    for feature in FEATURES:
        x, test, truth = bank[feature][known], queries[feature], queries["labels"]
        for shots in args.shots:
            picks = [shot_indices(labels, shots, seed) for seed in range(args.seeds)]
            scores = torch.stack(
                [accuracy(x[i], labels[i], test, truth, args.k, **setup) for i in picks]
            )
            for k, top in zip(args.k, scores.unbind(1), strict=True):  # (seeds, 2)
                spread = top[:, 0].std(correction=min(1, args.seeds - 1)).item()
                row = {
                    "feature": feature,
                    "protocol": f"{shots} shots",
                    "k": k,
                    "top-1": top[:, 0].mean().item(),
                }
                rows.append(
                    row
                    | {
                        "+-": spread,
                        "top-5": top[:, 1].mean().item(),
                        "seeds": args.seeds,
                    }
                )
        if not args.shots:
            for k, (one, five) in zip(
                args.k,
                accuracy(x, labels, test, truth, args.k, **setup).tolist(),
                strict=True,
            ):
                rows.append(
                    {
                        "feature": feature,
                        "protocol": "k-NN",
                        "k": k,
                        "top-1": one,
                        "top-5": five,
                    }
                )
    return rows


def main(argv=None):
    """Returns the rows of `evaluate`; prints them as a table and, with all settings, as a last line of JSON."""
    args, began = arguments(argv), time.perf_counter()
    with processes(args.device) as (device, rank, world):
        out = args.out or Path(args.features or args.checkpoint).with_name(
            "eval_knn.jsonl"
        )
        rows = evaluate(args, device, rank, world)
        if rank == 0:
            report(
                rows,
                vars(args) | {"seconds": round(time.perf_counter() - began, 1)},
                out,
            )
    return rows


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"eval_knn.py: error: {error}")
