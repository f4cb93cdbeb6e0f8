"""
Attention map files: written, checked and read.

    save_maps("maps.npy", maps, dataset, method="tokencut", backbone="dino_vits16")
    maps, manifest = load_maps("maps.npy", dataset)    # refuses any other data set

A map file is a pair:
    NAME.npy     float16 (n, h, w), C order, values in [0, 1]: one map per image of the
                 training split, in data set order
    NAME.json    the manifest: version (of this format), method, fingerprint (of the
                 data set, see ImageData), number (n), shape ([n, h, w]), flat and
                 failed (rows that are zero because the map was constant, or not
                 finite), checksum (sha256 of the .npy), settings (of the method)
"""

import json
from pathlib import Path

import numpy as np
import torch

from attg.files import replacing, sha256
from attg.kernels import normalize_map

# Manifests of version 1 have none, and call affinity_threshold cut.
VERSION = 2
MANIFEST = {"method": str, "fingerprint": str, "shape": list, "settings": dict}
MANIFEST |= {"flat": list, "failed": list, "checksum": str}


def chunks(maps, values=2**22):
    """Yield (first row, rows) of about `values` numbers each, 32 MiB in float64."""
    rows = max(1, values // max(1, maps.shape[1] * maps.shape[2]))
    for first in range(0, len(maps), rows):
        yield first, maps[first : first + rows]


def normalize_maps(chunk):
    """Min-max normalize each map over the whole image; flat and failed ones become 0.

    chunk: (rows, h, w) of any real type. Returns float16 (rows, h, w), flat and failed:
    bool (rows,).
    """
    m = torch.from_numpy(np.array(chunk, dtype=np.float64, order="C")).flatten(1)
    failed = ~m.isfinite().all(dim=1)
    m[failed] = 0
    m = normalize_map(m)
    # Any other map has a 1.
    flat = ~m.any(dim=1) & ~failed
    return m.numpy().astype("<f2").reshape(chunk.shape), flat.numpy(), failed.numpy()


def save_maps(path, maps, dataset, method, **settings):
    """Write NAME.npy (= path) and NAME.json, each under a temporary name first.

    maps: array (n, h, w) of any real type, may be memory-mapped. Each map is min-max
    normalized over the whole image; flat (max - min <= 1e-5 max|M|) and failed (not
    finite) maps become zeros and are listed. settings: plain types, for the manifest.
    ValueError if the file name, or the shape or number of the maps is wrong.
    """
    path = Path(path)
    if path.suffix != ".npy" or len(maps.shape) != 3 or len(maps) != len(dataset):
        raise ValueError(
            f"map file {path}: needs a name ending in .npy and maps ({len(dataset)}, "
            f"h, w), one per image, not {tuple(maps.shape)}"
        )
    manifest = {
        "version": VERSION,
        "method": method,
        "fingerprint": dataset.fingerprint,
        "number": len(maps),
        "shape": list(maps.shape),
        "flat": [],
        "failed": [],
        "settings": settings,
    }
    # Before anything is written: settings that JSON cannot hold raise TypeError.
    json.dumps(manifest)
    with replacing(path) as temporary:
        layout = {"descr": "<f2", "fortran_order": False, "shape": tuple(maps.shape)}
        # Not a memory map: on a full disk that would be a bus error.
        with open(temporary, "wb") as file:
            np.lib.format.write_array_header_1_0(file, layout)
            for first, chunk in chunks(maps):
                m, flat, failed = normalize_maps(chunk)
                file.write(m)
                manifest["flat"] += (first + np.flatnonzero(flat)).tolist()
                manifest["failed"] += (first + np.flatnonzero(failed)).tolist()
        manifest["checksum"] = sha256(temporary)
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(manifest, indent=1))


def refusal(path, reason, remedy="make the maps again with object_discovery.py"):
    """The error for a map file that cannot be used."""
    return ValueError(f"--maps {path}: {reason}; {remedy}")


def read_manifest(path):
    """Read the manifest of the map file `path`, a dict as save_maps writes it."""
    file = path.with_suffix(".json")
    if not file.is_file():
        reason = f"the manifest {file} is missing"
        raise refusal(path, reason, "keep it beside the .npy")
    try:
        manifest = json.loads(file.read_text())
        for key, kind in MANIFEST.items():
            if not isinstance(manifest[key], kind):
                raise ValueError(f"{key} is not a {kind.__name__}")
    # Not JSON, nested beyond Python's recursion limit, or JSON of something else.
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise refusal(path, f"the manifest {file} is damaged ({error!r})") from error
    version = manifest.setdefault("version", 1)
    if version not in (1, VERSION):
        raise refusal(path, f"version {version} instead of {VERSION}")
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
        raise refusal(path, "no such .npy file", "make it with object_discovery.py")
    manifest = read_manifest(path)
    shape, fingerprint = tuple(manifest["shape"]), manifest["fingerprint"]
    if shape[:1] != (len(dataset),) or not dataset.matches(fingerprint):
        reason = (
            f"made for other data (maps of shape {shape}, fingerprint "
            f"{fingerprint[:12]}, but --data has {len(dataset)} images, "
            f"{dataset.fingerprint[:12]}; number, names and sizes of the files count)"
        )
        raise refusal(path, reason, "use the --data and --classes it was made with")
    try:
        # np.load would accept archives and pickles as well.
        maps = np.lib.format.open_memmap(path, mode="r")
    # The header is a Python expression: a damaged one raises anything.
    except Exception as error:
        raise refusal(path, f"truncated or not a .npy file ({error})") from error
    if maps.dtype != np.float16 or maps.ndim != 3 or maps.shape != shape:
        reason = f"holds {maps.dtype} {maps.shape}, must be float16 {shape}"
        raise refusal(path, reason)
    for first, chunk in chunks(maps):
        # Written so that NaN, which fails every comparison, counts as bad.
        good = ((chunk >= 0) & (chunk <= 1)).all((1, 2))
        if not good.all():
            bad = first + int(np.argmin(good))
            reason = f"NaN, inf or values outside [0, 1] in map number {bad}"
            raise refusal(path, reason)
    if sha256(path) != manifest["checksum"]:
        raise refusal(path, "does not match the checksum in its manifest")
    return maps, manifest


def open_maps(path, dataset, name):
    """The maps (n, h, w) that guide training, from the map file `path`.

    Without a path, the masks that the data set `name` brings; ValueError if it has none.
    """
    if path is not None:
        return load_maps(path, dataset)[0]
    if dataset.masks is None:
        raise ValueError(
            f"--data {name} needs attention maps: make them with python "
            "object_discovery.py --method tokencut --backbone dino_vits16 "
            f"--data {name} --out maps.npy and pass --maps maps.npy, or "
            "train a vanilla MAE with --guidance none"
        )
    return dataset.masks
