"""
Attention map files: written, checked and read.

    save_maps("maps.npy", maps, dataset, method="tokencut", backbone="dino_vits16")
    maps, manifest = load_maps("maps.npy", dataset)    # refuses any other data set

A map file is a pair:
    NAME.npy     float16 (n, h, w), C order, values in [0, 1]: one map per image of the
                 training split, in data set order
    NAME.json    the manifest: version (of this format), method, settings (of the
                 method), fingerprint (of the data set, see ImageData), shape, checksum
                 (sha256 of the .npy), flat and failed (rows that are zero because the
                 map was constant, or not finite)
"""

import json
import math
from pathlib import Path

import numpy as np
import torch

from attg.files import atomic_write, sha256
from attg.kernels import normalize_map
from attg.log import log_line

# Version 1 has no "version" field, and calls affinity_threshold "cut".
VERSION = 2
MANIFEST = {"method": str, "fingerprint": str, "shape": list, "settings": dict}
MANIFEST |= {"flat": list, "failed": list, "checksum": str}
# save_maps reads about so many values at a time, 32 MiB in float64.
CHUNK = 2**22


def save_maps(path, maps, dataset, method, **settings):
    """Write NAME.npy (= path) and NAME.json, each under a temporary name first.

    maps: array (n, h, w) of any real type; memory-mapped, NumPy's masked and zarr's will
    do. Each map is min-max normalized over the whole image; flat (max - min <= 1e-5 max|M|)
    and failed ones (with NaN, inf or masked cells) become zeros and are listed. settings:
    plain types, for the manifest.
    ValueError if the file name, or the shape or number of the maps is wrong.
    """
    rows = max(1, CHUNK // max(1, math.prod(maps.shape[1:])))
    chunks = (maps[i : i + rows] for i in range(0, maps.shape[0], rows))
    write_maps(path, maps.shape, chunks, dataset, method, settings)


def write_maps(path, shape, chunks, dataset, method, settings):
    """save_maps of maps that come in chunks (rows, h, w); shape: (n, h, w)."""
    path, number = Path(path), len(dataset)
    if path.suffix != ".npy" or len(shape) != 3 or shape[0] != number:
        raise ValueError(
            f"map file {path}: needs a name ending in .npy and maps ({number}, h, w), one "
            f"per image, not {tuple(shape)}"
        )
    manifest = {"version": VERSION, "method": method, "shape": list(shape)}
    manifest |= {"fingerprint": dataset.fingerprint, "settings": settings}
    flat, failed, json_path = [], [], path.with_suffix(".json")
    with atomic_write(path) as temporary, atomic_write(json_path) as json_temporary:
        layout = {"descr": "<f2", "fortran_order": False, "shape": tuple(shape)}
        # Not a memory map: on a full disk that would be a bus error.
        with open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, layout)
            for chunk in chunks:
                m = np.ma.asarray(chunk).astype(np.float64, order="C").filled(np.nan)
                m = torch.from_numpy(m).flatten(1)
                is_failed = ~m.isfinite().all(dim=1)
                m[is_failed] = 0
                m = normalize_map(m)
                # Any other map has a 1.
                flat += (~m.any(dim=1) & ~is_failed).tolist()
                failed += is_failed.tolist()
                file.write(m.numpy().astype("<f2"))
        manifest["flat"] = np.flatnonzero(flat).tolist()
        manifest["failed"] = np.flatnonzero(failed).tolist()
        if len(manifest["failed"]) == number:
            raise ValueError(
                f"none of {number} maps is finite: no image could be read, or --backbone, "
                f"--masks or --max_pixels is wrong; the first image is {dataset.path(0)}"
            )
        manifest["checksum"] = sha256(temporary)
        json_temporary.write_text(json.dumps(manifest, indent=1))


def map_error(path, reason, remedy="make the maps again with object_discovery.py"):
    """The error for a map file that cannot be used."""
    return ValueError(f"--maps {path}: {reason}; {remedy}")


def read_manifest(path):
    """Read the manifest of the map file `path`, a dict as save_maps writes it."""
    file = path.with_suffix(".json")
    try:
        manifest = json.loads(file.read_text())
        for key, kind in MANIFEST.items():
            if not isinstance(manifest[key], kind):
                raise ValueError(f"{key} is not a {kind.__name__}")
    # Missing, not JSON, nested beyond Python's recursion limit, or of something else.
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise map_error(
            path, f"no valid manifest {file} beside it ({error!r})"
        ) from error
    version = manifest.setdefault("version", 1)
    if version not in (1, VERSION):
        raise map_error(path, f"version {version} instead of {VERSION}")
    settings = manifest["settings"]
    if version == 1 and "cut" in settings:
        settings["affinity_threshold"] = settings.pop("cut")
    return manifest


def load_maps(path, dataset):
    """Read a map file: (maps: memory-mapped float16 (n, h, w) in [0, 1], manifest).

    ValueError naming --maps, the fault and the remedy unless the file is intact and was
    made for `dataset`.
    """
    path = Path(path)
    if path.suffix != ".npy" or not path.is_file():
        raise map_error(path, "no such .npy file", "make it with object_discovery.py")
    manifest = read_manifest(path)
    shape, fingerprint = tuple(manifest["shape"]), manifest["fingerprint"]
    if shape[:1] != (len(dataset),) or not dataset.matches(fingerprint):
        reason = (
            f"made for other data (maps {shape}, fingerprint {fingerprint[-12:]}, but --data "
            f"has {len(dataset)} images, {dataset.fingerprint[-12:]}; names, sizes and "
            "contents of files count, `targets` and subsets of data from Python)"
        )
        raise map_error(path, reason, "use the --data and --classes it was made with")
    if sha256(path) != manifest["checksum"]:
        raise map_error(
            path, "truncated, or does not match the checksum in its manifest"
        )
    try:
        # np.load would accept archives and pickles as well.
        maps = np.lib.format.open_memmap(path, mode="r")
    # The header is a Python expression: a damaged one raises anything.
    except Exception as error:
        raise map_error(path, f"not a .npy file ({error})") from error
    if maps.dtype != np.float16 or maps.shape != shape or len(shape) != 3:
        reason = f"holds {maps.dtype} {maps.shape}, must be float16 {shape}"
        raise map_error(path, reason)
    return maps, manifest


def open_maps(path, dataset, name, log=log_line):
    """The maps (n, h, w) of the file `path`, which guide training, and their checksum.

    ValueError without a path; name: of the data set. log(text) tells how many are empty,
    and asks about maps that look inverted.
    """
    if path is None:
        raise ValueError(
            f"--data {name} needs attention maps: make them with python "
            f"object_discovery.py --data {name} --out maps.npy and pass --maps maps.npy, "
            "or train a vanilla MAE with --guidance none"
        )
    maps, manifest = load_maps(path, dataset)
    counts = f"{len(manifest['flat'])} flat and {len(manifest['failed'])} failed"
    if manifest["flat"] or manifest["failed"]:
        log(f"--maps {path}: {counts} of {len(maps)} maps do not guide")
    sample = np.float32(maps[:: len(maps) // 200 + 1])
    edges = (sample[:, [0, -1]].mean() + sample[:, :, [0, -1]].mean()) / 2
    if edges > 1.05 * sample.mean():
        log(f"--maps {path}: higher at the edges of images than inside; inverted?")
    return maps, manifest["checksum"]
