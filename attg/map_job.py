"""
The map job: maps of a whole data set, computed in blocks of images by any number of
processes, and resumed after an interruption.

While it runs, NAME.npy.job/ holds settings.json and, for each finished block, a file
named by its number, with raw float16 rows. A block is finished if its file exists,
because files are renamed into place once they are complete. What a killed job leaves is
in this folder.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from attg.distributed import barrier, broadcast_from_rank0
from attg.files import atomic_write
from attg.images import resize_region, to_tensor
from attg.kernels import normalize_map
from attg.loader import default_workers, make_loader
from attg.log import log_line, progress
from attg.maps import read_manifest, write_maps


class SquashedImages(Dataset):
    """Whole images resized to (h, w): [i] -> (uint8 (C, h, w), whether it is readable).

    C = channels, 3 or (grayscale) 1. With masks, a MaskFolder: the masks instead, C = 1.
    Unreadable images are black.
    """

    def __init__(self, dataset, size, masks=None, channels=3):
        self.dataset, self.size, self.masks = dataset, size, masks
        self.channels = 1 if masks else channels

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        h, w = self.size
        try:
            if self.masks:
                image = Image.fromarray(self.masks[i].filled(0))
                return to_tensor(image.resize((w, h), Image.Resampling.BOX)), True
            image = self.dataset.read(i, self.channels)[0]
            return resize_region(image, (0, 0, *image.size), self.size), True
        # Decoders raise OSError, SyntaxError, ValueError and others.
        except Exception:
            return torch.zeros(self.channels, h, w, dtype=torch.uint8), False


def run_job(compute, images, grid, settings, options, dist_info):
    """Compute the maps of all images (SquashedImages) into the map file options.out.

    Does nothing if the file is there. compute: uint8 (B, C, H, W) -> float (B, *grid).
    settings: method and others, plain types, for the manifest. options: out, batch_size
    and workers as on the command line. dist_info: device, rank, world.
    """
    device, rank, world = dist_info
    path, folder = options.out, Path(f"{options.out}.job")
    # Tuples become lists, as in the settings that are read.
    settings = json.loads(json.dumps(settings))
    if path.is_file() and path.with_suffix(".json").is_file() and not folder.is_dir():
        manifest = read_manifest(path)
        check_same_job(path, settings, manifest | manifest["settings"])
        if not images.dataset.matches(manifest["fingerprint"]):
            message = "made for other images; delete it, or choose another --out"
            raise ValueError(f"--out {path}: {message}")
        log_line(f"{path} is complete: nothing is computed")
        return
    workers = default_workers(device) if options.workers is None else options.workers
    check_repeatable(images.dataset, workers)
    rows = torch.arange(len(images)).split(options.batch_size)
    blocks = {folder / str(i): ids for i, ids in enumerate(rows)}
    job = settings | {"batch_size": options.batch_size}
    job["fingerprint"] = images.dataset.fingerprint
    # The images of another rank may be other copies, or a random split of its own.
    check_same_job(path, job, broadcast_from_rank0(lambda: job))
    broadcast_from_rank0(lambda: begin_or_resume(path, blocks, job))
    # A fixed share: which blocks are missing changes while other processes work.
    shard = list(blocks.items())[rank::world]
    missing = {file: ids.tolist() for file, ids in shard if not file.exists()}
    loader = make_loader(images, batch_sampler=list(missing.values()), workers=workers)
    steps = zip(missing, loader, strict=True)
    desc = f"maps, blocks of {options.batch_size}"
    for file, (imgs, readable) in progress(steps, len(missing), desc):
        m = normalize_map(compute(imgs.to(device)).float().flatten(1)).cpu()  # (B, L)
        # write_maps lists NaN as failed; zeros would count as flat.
        m[~readable] = torch.nan
        with atomic_write(file) as temporary:
            # tofile would not notice a full disk.
            temporary.write_bytes(m.half().numpy().astype("<f2").tobytes())

    barrier()
    broadcast_from_rank0(lambda: join_blocks(path, blocks, grid, images, settings))


def check_repeatable(dataset, workers):
    """ValueError if images of a data set from Python change when they are read again."""
    if dataset.pairs is not None:
        images, rows = SquashedImages(dataset, (64, 64)), range(min(8, len(dataset)))
        # In a worker if there will be some: they cannot share an open file.
        loader = make_loader(
            images, workers=min(workers, 1), batch_sampler=[rows, rows]
        )
        (one, _), (two, _) = loader
        if not one.equal(two):
            remedy = "leave random transforms out, training crops and flips"
            raise ValueError(f"data: images change when they are read again; {remedy}")


def begin_or_resume(path, files, job):
    """Write the settings of a new job; ValueError if a job with others has begun."""
    settings = Path(f"{path}.job", "settings.json")
    if settings.is_file():
        check_same_job(path, job, json.loads(settings.read_text()))
        done = sum(file.exists() for file in files)
        log_line(f"resuming: {done} of {len(files)} blocks are finished")
        return
    # Blocks without settings are left over from a removal that was interrupted.
    shutil.rmtree(settings.parent, ignore_errors=True)
    with atomic_write(settings) as temporary:
        temporary.write_text(json.dumps(job))


def check_same_job(path, new, old):
    """ValueError if the map file or unfinished job at `path` was made with others."""
    # The weights of a backbone count, not the name of their file.
    if new.get("sha256") and new["sha256"] == old.get("sha256"):
        new = new | {"backbone": old.get("backbone")}
    changes = [f"{k} {old.get(k)}, not {x}" for k, x in new.items() if old.get(k) != x]
    if changes:
        raise ValueError(
            f"--out {path}: made with {', '.join(changes[:3])}; use its settings, choose "
            f"another --out, or delete it and {path}.job"
        )


def join_blocks(path, files, grid, images, settings):
    """Join the blocks into the map file and remove their folder."""
    method, folder = settings.pop("method"), Path(f"{path}.job")
    blocks = (np.fromfile(file, "<f2").reshape(-1, *grid) for file in files)
    joined, shape = folder / path.name, (len(images), *grid)
    try:
        write_maps(joined, shape, blocks, images.dataset, method, settings)
    except ValueError:  # No map is finite.
        shutil.rmtree(folder)
        raise
    for suffix in (".npy", ".json"):
        target = os.path.realpath(path.with_suffix(suffix))
        shutil.move(joined.with_suffix(suffix), target)
    shutil.rmtree(folder)
