"""
Checkpoints: written atomically, read only if unchanged; and the rules of resuming a run.

Files may hold tensors and plain types only (weights_only): no code in them is executed.
torch.load does not notice changed bits, so a checkpoint carries the crc32 of each tensor
and one of everything else. In other people's files, the checksums of the zip archive are
verified; safetensors files and torch.save's format before PyTorch 1.6 have none.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import zipfile
import zlib
from pathlib import Path

import torch

from attg.cli import resume_class
from attg.distributed import is_restarted
from attg.files import atomic_write
from attg.log import read_log, rename_settings


def save_checkpoint(path, /, **parts):
    """Write tensors and plain types atomically.

    OSError names the file; an earlier file of that name is then intact.
    """
    parts["checksums"] = checksums(parts)
    try:
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            torch.save(parts, file)
    except (OSError, RuntimeError) as error:
        # torch.save may raise an error of its own while it handles the disk's.
        cause = error if isinstance(error, OSError) else error.__context__ or error
        intact = f"; the earlier {path} is intact" if Path(path).exists() else ""
        raise OSError(f"{path} could not be written: {cause}{intact}") from error


def checksums(parts):
    """{name: crc32} of the tensors in nested dicts and lists; "rest": everything else."""
    sums, rest = {}, []
    for name, value in leaves(parts):
        if isinstance(value, torch.Tensor):
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            sums[name] = zlib.crc32(content.numpy())
            value = f"{value.dtype} {list(value.shape)}"
        rest.append(f"{name} {type(value).__name__} {value!r}")
    sums["rest"] = zlib.crc32("\n".join(rest).encode())
    return sums


def leaves(parts):
    """[(name, value)] of everything in nested dicts and lists that is neither."""
    found, stack, seen = [], [("", parts)], 0
    while stack:
        name, value = stack.pop()
        seen += 1
        if not isinstance(value, dict | list | tuple):
            found.append((name, value))
            continue
        items = value.items() if isinstance(value, dict) else enumerate(value)
        stack += [(f"{name}[{key!r}]", item) for key, item in items]
        # A small file can hold a list that contains itself, or one a billion times.
        if len(name) > 1000 or seen + len(stack) > 10**6:
            raise ValueError("holds too many values")
    return found


def load_checkpoint(path):
    """The content of a file of torch.save or safetensors, on the CPU.

    ValueError if it holds anything but tensors and plain types, or is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if path.is_dir():
        raise ValueError(f"{path}: a folder; name a file in it, such as last.pt")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            parts = load_file(path)
        else:
            # Training files of facebookresearch/mae hold a Namespace.
            with torch.serialization.safe_globals([argparse.Namespace]):
                parts = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError as error:
        raise ValueError(f"{path}: {error}: pip install safetensors") from error
    except Exception as error:  # almost anything, on a damaged file
        reason = f"damaged, or not a checkpoint ({type(error).__name__})"
        # PyTorch's message advises to disable weights_only.
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if unsafe:
            reason = f"refused: {unsafe[1]} is not a plain type; no code was executed"
        raise ValueError(f"{path}: {reason}") from error
    if not isinstance(parts, dict):
        raise ValueError(f"{path}: not a checkpoint, but a {type(parts).__name__}")
    try:
        verify_checksums(path, parts)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    return parts


def verify_checksums(path, parts):
    """ValueError if the content of a file has changed. Removes "checksums" from parts.

    Without our checksums: if the checksums of the zip archive differ.
    """
    stored = parts.pop("checksums", None)
    tensors = {name: x for name, x in leaves(parts) if isinstance(x, torch.Tensor)}
    for name, x in tensors.items():
        if x.layout != torch.strided or x.device.type != "cpu":
            raise ValueError(f"{name} is a {x.layout} tensor on the device {x.device}")
        # A small file can hold a large tensor, of one value that is repeated.
        size = x.untyped_storage().nbytes()
        if x.numel() * x.element_size() > size:
            raise ValueError(f"{name} has the shape {tuple(x.shape)}, but {size} bytes")
    if stored is not None:
        actual = checksums(parts)
        known = stored if isinstance(stored, dict) else {}
        changed = [name for name in actual if known.get(name) != actual[name]]
        if changed or stored != actual:
            raise ValueError(f"{changed[:3]} changed since they were written")
        return
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                changed = archive.testzip()
        except Exception as error:  # almost anything, on a damaged file
            raise ValueError(f"damaged archive ({type(error).__name__})") from error
        if changed is not None:
            raise ValueError(f"{changed} changed since it was written")


def read_settings(stored, name):
    """Settings stored in a file, with lists for tuples and today's names.

    name: of the file, for the ValueError if they are not a dict of plain values.
    """
    try:
        settings = json.loads(json.dumps(stored, allow_nan=False))
        if not isinstance(settings, dict):
            raise ValueError(f"a {type(settings).__name__}, not names with values")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{name}: its settings are damaged ({error})") from error
    return rename_settings(settings)


def load_state(model, state, name):
    """Load the weights of a module, which must agree in names, shapes and dtypes.

    name: of the file, for the ValueError if they do not.
    """
    expected = model.state_dict()
    if not isinstance(state, dict):
        raise ValueError(f"{name}: holds no weights")
    differ = sorted(map(str, set(expected) ^ set(state)))
    if differ:
        raise ValueError(f"{name}: does not match the model; only one has {differ[:3]}")
    for key, weight in expected.items():
        check_like(state[key], weight, f"{name}: {key}")
    model.load_state_dict(state)


def check_like(x, like, name):
    """ValueError unless x is a tensor with the shape and dtype of `like`."""
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} is not a tensor")
    kinds = [f"{t.dtype} {tuple(t.shape)}" for t in (x, like)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"{name} is {kinds[0]}, must be {kinds[1]}")


def load_optimizer(optimizer, stored, steps, name):
    """Load the moments of an optimizer, without its hyperparameters.

    stored: its state_dict after so many steps. name: of the file, for the ValueError.
    PyTorch does not check the shapes, and its fused AdamW would write out of bounds.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = stored.get("state") if isinstance(stored, dict) else None
    if not isinstance(states, dict):
        raise ValueError(f"{name}: holds no optimizer state")
    n = len(parameters)
    # Empty until the first step that the gradient scaler of fp16 does not skip.
    if states and set(states) != set(range(n)):
        raise ValueError(
            f"{name}: optimizer state of {len(states)} parameters, expected {n}"
        )
    for number, state in states.items():
        where, parameter = f"{name}: moments of parameter {number}", parameters[number]
        like = {"momentum": parameter}  # of LARS
        if isinstance(optimizer, torch.optim.AdamW):
            like = {"exp_avg": parameter, "exp_avg_sq": parameter}
            like["step"] = torch.zeros(())
        if not isinstance(state, dict) or set(state) != set(like):
            raise ValueError(f"{where}: must hold {sorted(like)}")
        for key, x in state.items():
            check_like(x, like[key], f"{where}: {key}")
            if not x.isfinite().all():
                raise ValueError(f"{where}: {key} is not finite")
            state[key] = x.contiguous()
        if float(state.get("step", 0)) not in range(steps + 1):
            raise ValueError(f"{where}: step must be from 0 to {steps}")
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def load_scaler(scaler, stored, name):
    """Load the state of a GradScaler, which is empty without fp16; see load_optimizer."""
    if not isinstance(stored, dict):
        raise ValueError(f"{name}: holds no scaler state")
    # A resumed run may change its precision.
    expected = scaler.state_dict() if stored else {}
    for key in expected:
        value = stored.get(key)
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ValueError(f"{name}: scaler: {key} must be finite, not negative")
    if expected:
        scaler.load_state_dict({key: stored[key] for key in expected})


def find_checkpoint(cfg, train_set, maps_id):
    """The checkpoint to resume, or with --epochs 0 to draw, see read_run; or None.

    A restarted job (see is_restarted) continues its run even with another --resume.
    If last.pt is missing, the latest complete temporary file takes its place: not every
    file system renames atomically. ValueError if there is none, but steps in the log,
    which a new run would overwrite; or if it was trained on other images or maps.
    """
    path, is_auto = Path(cfg.out, "last.pt"), cfg.resume == "auto"
    if not is_auto and is_restarted() and path.exists():
        # Otherwise a job would lose its steps whenever it is restarted.
        is_auto = read_run(path)["config"].get("resume") == cfg.resume
    if not is_auto:
        if cfg.resume == "none":
            return None
        path = Path(cfg.resume)
    if is_auto and not path.exists():
        complete = {}
        for temporary in path.parent.glob("last.pt*.tmp"):
            with contextlib.suppress(ValueError, OSError):
                complete[read_run(temporary)["step"]] = temporary
        log = path.with_name("log.jsonl")
        if complete:
            os.replace(complete[max(complete)], path)
        elif cfg.epochs and log.exists() and read_log(log):
            raise ValueError(
                f"--out {cfg.out}: last.pt is missing, but log.jsonl has the steps of a "
                "run; restore it, change --out, or start over: --resume none"
            )
        else:
            return None
    checkpoint = read_run(path)
    if cfg.epochs:
        check_data(cfg, checkpoint, train_set, maps_id)
    return checkpoint


def read_run(path):
    """The parts of a training checkpoint, with its path; ValueError if it is not one."""
    parts = load_checkpoint(path)
    names = {"model", "optimizer", "scaler", "step", "config", "data", "maps"}
    missing = names - set(parts)
    if missing:
        reason = f"not a training checkpoint of this project, lacks {sorted(missing)}"
        raise ValueError(f"{path}: {reason}; to start from its weights use --init")
    step = parts["step"]
    if type(step) is not int or not 0 <= step < 2**53:
        raise ValueError(f"{path}: its step is damaged ({step!r})")
    config = read_settings(parts["config"], path)
    return parts | {"config": config, "path": str(path)}


def check_data(cfg, checkpoint, train_set, maps_id):
    """ValueError unless images and maps are those that the checkpoint was trained on.

    They are compared, not their paths. maps_id: checksum of the maps, or None.
    """
    flags = []
    if not train_set.matches(checkpoint["data"]):
        flags.append(f"--data {cfg.data}: number, names, sizes or content of images")
    # A run may change its --guidance, from or to none.
    if maps_id and checkpoint["maps"] and maps_id != checkpoint["maps"]:
        flags.append(f"--maps {cfg.maps}: content of the maps")
    if flags:
        raise ValueError(
            f"{checkpoint['path']} was trained on other data ({'; '.join(flags)}); "
            "restore the data, change --out, or start over: --resume none"
        )


def check_resume(cfg, checkpoint, total_steps):
    """[--NAME OLD -> NEW] of the settings that a run changes on resume.

    The resume class of a setting (attg.cli.flag) decides whether it may change: never
    ("fixed"), until the run has ended ("open", because an old result would pass for one
    of the new setting), or always ("free"). ValueError names those that may not.
    """
    path = checkpoint["path"]
    # A setting that is newer than the checkpoint had its default.
    defaults = {field.name: field.default for field in dataclasses.fields(cfg)}
    stored = json.loads(json.dumps(defaults)) | checkpoint["config"]
    # Data are compared by check_data, wherever they lie now.
    data = {"data", "classes", "maps"}
    fixed = resume_class(type(cfg), "fixed") - data
    free = resume_class(type(cfg), "free") | data
    initial = {"init", "weights_key", "weights_prefix"}
    ended = checkpoint["step"] >= total_steps
    if cfg.epochs == 0:
        # Only draws: the weights must be those that the settings name.
        fixed -= {"batch_size", "seed"}
        ended = False
    elif cfg.resume == "auto":
        # lr and tau follow the number of steps.
        fixed |= {"epochs", "max_steps"} | initial
    if cfg.init:
        # The checkpoint's weights would replace them.
        fixed |= initial
    changed, refused, other = [], [], False
    for name, value in json.loads(json.dumps(dataclasses.asdict(cfg))).items():
        if stored.get(name) != value:
            changed.append(f"--{name} {stored.get(name)} -> {value}")
            if name in fixed or (ended and name not in free):
                refused.append(changed[-1])
                other |= name in fixed
    if refused:
        state = "is of another run" if other else "has ended"
        raise ValueError(
            f"{path} {state}: {', '.join(refused)}; change --out, start over: --resume "
            f"none, or continue with other --epochs or --max_steps: --resume {path}"
        )
    return changed


def restore(optimizer, scaler, checkpoint):
    """Load the states of optimizer and scaler; returns the number of steps done.

    Empties the checkpoint, to free its memory.
    """
    step, path = checkpoint["step"], checkpoint["path"]
    load_optimizer(optimizer, checkpoint["optimizer"], step, path)
    load_scaler(scaler, checkpoint["scaler"], path)
    checkpoint.clear()
    return step
