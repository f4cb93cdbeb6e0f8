"""
Attention maps: the files that hold them, and how good they are beside true masks.

    save_maps("maps.npy", maps, dataset, method="tokencut", backbone="dino_vits16")
    maps, manifest = load_maps("maps.npy", dataset)    # refuses any other data set
    figures = quality(maps, true_masks(dataset, "masks", range(len(dataset))))

A map file is a pair:
    NAME.npy     float16 (n, h, w), C order, values in [0, 1]: one map for each picture
                 of the training split, in its order
    NAME.json    the manifest: method, fingerprint (of the data set, see ImageData:
                 number, names and sizes of its files), number (n), shape ([n, h, w]),
                 flat and failed (rows that are zero because the map was constant, or
                 not finite), checksum (sha256 of the .npy), settings (of the method)

Files of older versions, whose fingerprint lacks the sizes, are taken with a warning.
"""

import hashlib
import io
import json
import warnings
from pathlib import Path

import numpy as np

from attg.files import replacing

# A map whose range is at most this part of its largest value is flat.
FLAT = 1e-5


# -- Map files -------------------------------------------------------------------------


def chunks(maps, values=2**22):
    """(first row, rows) of about `values` numbers each, 32 MiB in float64."""
    rows = max(1, values // max(1, maps.shape[1] * maps.shape[2]))
    for first in range(0, len(maps), rows):
        yield first, maps[first : first + rows]


def normalize_maps(chunk):
    """
    Min-max normalization, each map over its whole picture; flat and failed maps become
    zeros.

    chunk: (rows, h, w) of any real type -> float16 (rows, h * w), flat: bool (rows,),
    failed: bool (rows,).
    """
    m = np.array(chunk, dtype=np.float64, order="C").reshape(len(chunk), -1)
    failed = ~np.isfinite(m).all(1)
    m[failed] = 0
    low = m.min(1, keepdims=True)
    high = m.max(1, keepdims=True)
    even = high - low <= FLAT * abs(m).max(1, keepdims=True)
    # 1 stands in for the range of a flat map: there is nothing to divide by.
    m = np.where(even, 0, (m - low) / np.where(even, 1, high - low))
    return m.astype("<f2"), even[:, 0] & ~failed, failed


def save_maps(path, maps, dataset, method, **settings):
    """
    Writes NAME.npy (= path) and NAME.json, each under a temporary name first.

    maps: array (n, h, w) of any real type, may be memory-mapped. Each is min-max
    normalized over the whole picture; flat (max - min <= 1e-5 max|M|) and failed (not
    finite) ones become zeros and are listed. settings: plain types.
    ValueError if the name or the number of maps does not fit.
    """
    path = Path(path)
    if path.suffix != ".npy" or len(maps.shape) != 3 or len(maps) != len(dataset):
        raise ValueError(
            f"map file {path}: needs a name ending in .npy and maps ({len(dataset)}, "
            f"h, w), one for each picture, not {tuple(maps.shape)}"
        )
    # The header goes first, by hand: the maps follow chunk by chunk, however many.
    header = io.BytesIO()
    shape = tuple(maps.shape)
    layout = {"descr": "<f2", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, layout)
    checksum = hashlib.sha256(header.getvalue())
    flat = []
    failed = []

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(header.getvalue())
        for first, chunk in chunks(maps):
            m, chunk_flat, chunk_failed = normalize_maps(chunk)
            flat += (first + np.flatnonzero(chunk_flat)).tolist()
            failed += (first + np.flatnonzero(chunk_failed)).tolist()
            checksum.update(m)
            file.write(m)
        manifest = {
            "method": method,
            "fingerprint": dataset.fingerprint,
            "number": len(maps),
            "shape": list(maps.shape),
            "flat": flat,
            "failed": failed,
            "checksum": checksum.hexdigest(),
            "settings": settings,
        }
        # Inside the block: settings that JSON cannot hold must not leave a .npy.
        text = json.dumps(manifest, indent=1)
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(text)


def refusal(path, what, remedy="make the maps again with object_discovery.py"):
    """The error for a map file that cannot be used."""
    return ValueError(f"--maps {path}: {what}; {remedy}")


def read_manifest(path):
    """The manifest, a dict of what save_maps writes, of the map file `path`."""
    json_path = path.with_suffix(".json")
    if not json_path.is_file():
        what = f"the manifest {json_path.name} is missing"
        raise refusal(path, what, "keep it beside the .npy")
    try:
        manifest = json.loads(json_path.read_text())
        check_manifest(manifest)
    # Text that is no JSON, nested beyond Python's depth, or something else in JSON.
    except (ValueError, RecursionError) as error:
        what = f"the manifest {json_path.name} is damaged ({error})"
        raise refusal(path, what) from error
    return manifest


def check_manifest(manifest):
    """ValueError unless all is there, of the right types; other files need not fit."""
    kinds = {"method": str, "fingerprint": str, "number": int, "shape": list}
    kinds |= {"flat": list, "failed": list, "checksum": str, "settings": dict}
    if not isinstance(manifest, dict):
        raise ValueError(f"holds a {type(manifest).__name__}, not names and values")
    for key, kind in kinds.items():
        # isinstance would take True for a number.
        if type(manifest.get(key)) is not kind:
            raise ValueError(f"{key} is missing or not a {kind.__name__}")
    if not manifest["method"].isprintable():
        raise ValueError("method is no text")
    lists = {key: manifest[key] for key in ("flat", "failed")}
    # What object_discovery.py counts besides.
    lists["large"] = manifest["settings"].get("large", [])
    for key, rows in lists.items():
        number = manifest["number"]
        if type(rows) is not list or not all(type(i) is int for i in rows):
            raise ValueError(f"{key} is not a list of numbers")
        if rows and not 0 <= min(rows) <= max(rows) < number:
            raise ValueError(f"{key} names a row that is none of {number}")


def check_data(path, manifest, dataset):
    """ValueError unless the maps were made for these pictures, in this order."""
    number = manifest["number"]
    fingerprint = manifest["fingerprint"]
    if number == len(dataset):
        match = dataset.matches(fingerprint)
        if match == "exact":
            return
        if match == "names":
            warnings.warn(
                f"--maps {path}: an older file, which knows number and names of its "
                "pictures but not their sizes: whether they are the same pictures is "
                "not checked",
                stacklevel=3,
            )
            return
    raise refusal(
        path,
        f"made for other data ({number} pictures, fingerprint "
        f"{fingerprint[:12]}, but --data has {len(dataset)}, "
        f"{dataset.fingerprint[:12]}; number, names and sizes of the files count)",
        "use the --data and --classes it was made with",
    )


def map_array(path, manifest):
    """The memory-mapped array of the file, of the right type and shape."""
    try:
        # np.load would take archives and pickles as well.
        maps = np.lib.format.open_memmap(path, mode="r")
    # A header is a Python expression: a damaged one raises anything.
    except Exception as error:
        what = f"truncated or not a .npy file ({error})"
        raise refusal(path, what) from error
    number = manifest["number"]
    right_shape = maps.ndim == 3 and len(maps) == number
    if maps.dtype != np.float16 or not right_shape or not maps.flags.c_contiguous:
        what = f"holds {maps.dtype} {maps.shape}, must be float16 ({number}, h, w)"
        raise refusal(path, what)
    if manifest["shape"] != list(maps.shape):
        what = f"holds {maps.shape}, its manifest says {manifest['shape']}"
        raise refusal(path, what)
    return maps


def load_maps(path, dataset):
    """
    (maps: memory-mapped float16 (n, h, w) in [0, 1], manifest: dict) of a file of
    save_maps, after one pass over it.

    ValueError, naming --maps, what is wrong and the remedy, unless it is whole and made
    for `dataset`. A warning if it is of a version that did not know the files' sizes.
    """
    path = Path(path)
    if path.suffix != ".npy" or not path.is_file():
        remedy = "give the NAME.npy that object_discovery.py wrote"
        raise refusal(path, "no such .npy file", remedy)
    manifest = read_manifest(path)
    check_data(path, manifest, dataset)
    maps = map_array(path, manifest)

    # Values in range, and the bytes that were written? The header is hashed as well.
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(maps.offset))
    bad = []
    for first, chunk in chunks(maps):
        digest.update(chunk)
        # Written so that NaN, which fails every comparison, counts as bad.
        good = ((chunk >= 0) & (chunk <= 1)).all((1, 2))
        bad += (first + np.flatnonzero(~good)).tolist()
    if bad:
        raise refusal(
            path,
            f"NaN, inf or values outside [0, 1] in {len(bad)} of {len(maps)} maps, "
            f"the first is number {bad[0]}",
        )
    whole = path.stat().st_size == maps.offset + maps.nbytes
    if digest.hexdigest() != manifest["checksum"] or not whole:
        raise refusal(path, "does not match the checksum in its manifest")
    return maps, manifest


def open_maps(path, dataset, name):
    """
    The maps (n, h, w) that guide training, on the host: of the map file `path`, or,
    if that is None, those the data set brings. ValueError if it brings none.
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
