"""
A run: its processes, signals, log, checkpoints, and how it is continued.
"""

import argparse
import contextlib
import dataclasses
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist

from common.files import replacing, require


def save_checkpoint(path, /, **parts):
    """Writes tensors and plain types, all or nothing; OSError names the file, and the old one stays."""
    try:
        with replacing(path) as temporary:
            torch.save(parts, temporary)
    except (
        OSError,
        RuntimeError,
    ) as error:  # torch.save raises RuntimeError on a full disk
        raise OSError(
            f"{path} could not be written: {error}; is the disk full? An earlier {path} is intact"
        ) from error


def load_checkpoint(path):
    """What torch.save wrote, on the CPU: tensors and plain types. ValueError for all else, of which nothing is run."""
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # facebookresearch/mae's training files hold one
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        raise ValueError(
            f"{path}: damaged, or no checkpoint of tensors ({type(error).__name__}: {error})"
        ) from error
    require(
        isinstance(loaded, dict),
        f"{path}: no checkpoint, it holds a {type(loaded).__name__}",
    )
    return loaded


def find_checkpoint(cfg, total, say, fixed, free):
    """The parts of the checkpoint to continue, or None; settings that differ are named, or refused."""
    path = Path(cfg.out, "last.pt") if cfg.resume == "auto" else Path(cfg.resume)
    if cfg.resume == "none" or (cfg.resume == "auto" and not path.exists()):
        return None
    parts = load_checkpoint(path)
    lacks = {"model", "optimizer", "scaler", "step", "config"} - set(parts)
    require(
        not lacks,
        f"{path}: not a training checkpoint of this project, lacks {sorted(lacks)}; try --init",
    )
    new, old = json.loads(
        json.dumps([dataclasses.asdict(cfg), parts["config"]])
    )  # tuples become lists
    differ = {k: f"--{k} {old.get(k)} -> {new[k]}" for k in new if old.get(k) != new[k]}
    wrong = [
        differ[k]
        for k in differ
        if k in fixed or (parts["step"] >= total and k not in free)
    ]
    require(
        not wrong,
        f"{path} is of another run: {', '.join(wrong)}; change --out, or start anew: --resume none",
    )
    say(
        f"continuing {path} after step {parts['step']}"
        + f"; the new value holds: {[*differ.values()]}" * bool(differ)
    )
    return parts


@contextlib.contextmanager
def processes(name):
    """(device, rank, world): the named device or the best there is; torchrun's group of processes for as long."""
    rank, local_rank, world = (
        int(os.environ.get(k, 0)) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    )
    kinds = (
        ["cuda"] * torch.cuda.is_available()
        + ["mps"] * torch.backends.mps.is_available()
        + ["cpu"]
    )
    require(
        not name or name.split(":")[0] in kinds,
        f"--device {name}: there is none here; choose from {kinds}",
    )
    device = torch.device(name or kinds[0])
    if device.type == "cuda":
        device = torch.device(
            "cuda", local_rank if device.index is None else device.index
        )
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    yield device, rank, max(1, world)
    if (
        world > 1
    ):  # not after an error: it would wait for the other processes, which torchrun ends
        dist.destroy_process_group()


def wait(world):
    if world > 1:
        dist.barrier()
