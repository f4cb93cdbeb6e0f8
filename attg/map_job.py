"""
The map job: maps of a whole data set, computed in blocks of images by any number of
processes, and resumed after an interruption.

While it runs, NAME.npy.job/ holds settings.json and a file for each finished block: its
number, raw float16 rows. A block is finished if its file exists, because files are
renamed into place once they are complete.
"""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Resampling
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from attg.cli import log_line, progress
from attg.distributed import broadcast_from_rank0, wait
from attg.files import replacing
from attg.images import MODES, to_8_bits
from attg.kernels import normalize_map
from attg.loader import default_workers, make_loader
from attg.map_quality import read_mask
from attg.maps import save_maps


class SquashedImages(Dataset):
    """Whole images resized to (h, w): [i] -> (uint8 (C, h, w), whether it is readable).

    C = channels, 3 or (grayscale) 1. With mask_folder: the masks of the images in it,
    C = 1. Unreadable images are black.
    """

    def __init__(self, dataset, size, mask_folder=None, channels=3):
        self.dataset, self.size, self.mask_folder = dataset, size, mask_folder
        self.channels = 1 if mask_folder else channels

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        h, w = self.size
        try:
            if self.mask_folder:
                image = read_mask(self.mask_folder, self.dataset.names[i])
                return pil_to_tensor(image.resize((w, h), Resampling.BOX)), True
            image = to_8_bits(self.dataset.read(i)[0], MODES[self.channels])
            return pil_to_tensor(image.resize((w, h), Resampling.BICUBIC)), True
        # Decoders raise OSError, SyntaxError, ValueError and others.
        except Exception:
            return torch.zeros(self.channels, h, w, dtype=torch.uint8), False


def run_job(compute, images, grid, settings, options, dist_info):
    """Compute the maps of all images (SquashedImages) into the map file options.out.

    Does nothing if the file is there. compute: uint8 (B, C, H, W) -> float (B, *grid).
    settings: method and others, plain types, for the manifest. options: out, batch_size,
    workers and timeout as on the command line. dist_info: device, rank, world. A process
    waits for slower ones as long as a block is finished within the timeout.
    """
    device, rank, world = dist_info
    path, batch_size = options.out, options.batch_size
    folder = Path(f"{path}.job")
    complete = path.is_file() and path.with_suffix(".json").is_file()
    if complete and not folder.is_dir():
        return
    starts = range(0, len(images), batch_size)
    files = [folder / str(number) for number in range(len(starts))]

    def begin():
        fingerprint = images.dataset.fingerprint
        job = settings | {"batch_size": batch_size, "fingerprint": fingerprint}
        begin_or_resume(path, folder, job, files)

    broadcast_from_rank0(begin, rank, world)
    # A fixed share: which blocks are missing changes while other processes work.
    missing = {}
    for file, start in list(zip(files, starts, strict=True))[rank::world]:
        if not file.exists():
            missing[file] = range(start, min(start + batch_size, len(images)))
    workers = options.workers
    if workers is None:
        workers = default_workers(device)
    loader = make_loader(images, batch_sampler=list(missing.values()), workers=workers)
    bar = {"total": len(missing), "desc": "maps", "unit": "block"}
    if rank:
        bar["disable"] = True
    for file, (imgs, readable) in progress(zip(missing, loader, strict=True), **bar):
        m = normalize_map(compute(imgs.to(device)).float().flatten(1)).cpu()  # (B, L)
        # save_maps lists NaN as failed; zeros would count as flat.
        m[~readable] = torch.nan
        with replacing(file) as temporary:
            m.half().numpy().astype("<f2").tofile(temporary)

    wait_for_blocks(files, options.timeout)
    wait(world)
    broadcast_from_rank0(
        lambda: finish(path, folder, files, images, grid, settings), rank, world
    )


def begin_or_resume(path, folder, job, files):
    """Write the settings of a new job; ValueError if a job with others has begun."""
    settings = folder / "settings.json"
    if not settings.is_file():
        # Blocks without settings are left over from a removal that was interrupted.
        shutil.rmtree(folder, ignore_errors=True)
        with replacing(settings) as temporary:
            temporary.write_text(json.dumps(job))
        return
    changes = changed_settings(job, json.loads(settings.read_text()))
    if changes:
        raise ValueError(
            f"--out {path}: an unfinished job is there with {changes}; use its settings, "
            f"choose another --out, or delete {folder}"
        )
    done = sum(file.exists() for file in files)
    log_line(f"resuming: {done} of {len(files)} blocks are finished")


def changed_settings(new, old):
    """Describe the settings of `old` that differ from `new`; "" if none does."""
    changes = []
    for key, value in new.items():
        # The weights of a backbone count, not the name of their file.
        same_weights = key == "backbone" and "sha256" in new
        if old.get(key) != value and not same_weights:
            changes.append(f"{key} {old.get(key)}, not {value}")
    return ", ".join(changes)


def wait_for_blocks(files, minutes):
    """Wait until all blocks are finished; ValueError if none was for so many minutes.

    A barrier alone would time out on a process that is merely slower than this one.
    """
    last_change = time.monotonic()
    while files:
        missing = [file for file in files if not file.exists()]
        if len(missing) < len(files):
            last_change = time.monotonic()
        elif time.monotonic() - last_change > 60 * minutes:
            raise ValueError(
                f"--timeout {minutes:g}: no block of maps was finished in this time, "
                f"{len(missing)} are missing in {files[0].parent}, which all processes "
                "must share; run the same command again"
            )
        files = missing
        time.sleep(0.1 * bool(missing))


def finish(path, folder, files, images, grid, settings):
    """Join the blocks into the map file and remove their folder."""
    joined = folder / "joined"
    with open(joined, "wb") as output:
        for file in files:
            output.write(file.read_bytes())
    rows = np.memmap(joined, "<f2", "r", shape=(len(images), *grid))
    # A failed map is NaN everywhere.
    if np.isnan(rows[:, 0, 0]).all():
        shutil.rmtree(folder)
        raise ValueError(
            f"none of {len(rows)} maps is finite: no image could be read, or --backbone, "
            "--mean, --std, --masks or --max_pixels is wrong; the first image is "
            f"{images.dataset.path(0)}"
        )
    save_maps(path, rows, images.dataset, **settings)
    del rows  # Windows removes no file that is mapped.
    shutil.rmtree(folder)
