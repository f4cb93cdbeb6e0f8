"""
Checkpoints: written atomically, read only if unchanged; and the rules of resuming a run.

    save_checkpoint("last.pt", model=model.state_dict(), step=7)
    parts = load_checkpoint("last.pt")
    load_state(model, parts["model"], "last.pt")

Files may hold tensors and plain types only (weights_only): no code in them is executed.
torch.load does not notice changed bits, so a checkpoint carries the crc32 of each tensor
and one of everything else. In other people's files, the checksums of the zip archive are
verified and weights must be finite; safetensors files and torch.save's format before
PyTorch 1.6 have no checksums.
"""

import argparse
import dataclasses
import json
import math
import re
import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path

import torch

from attg.cli import resume_class
from attg.files import replacing
from attg.log import rename

# Limits of what a checkpoint may hold.
MAX_VALUES = 10**6
MAX_NAME_LENGTH = 1000


# -- Writing ---------------------------------------------------------------------------


def save_checkpoint(path, /, **parts):
    """Write tensors and plain types atomically.

    OSError names the file; an earlier file of that name is then intact.
    """
    parts["checksums"] = checksums(parts)
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(parts, file)
    except (OSError, RuntimeError) as error:
        # torch.save may raise an error of its own while it handles the disk's.
        cause = error if isinstance(error, OSError) else error.__context__
        intact = f"; the earlier {path} is intact" if Path(path).exists() else ""
        raise OSError(
            f"{path} could not be written: {cause or error}{intact}"
        ) from error


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
    found, stack = [], [("", parts)]
    seen = 0
    while stack:
        name, value = stack.pop()
        seen += 1
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list | tuple):
            items = enumerate(value)
        else:
            found.append((name, value))
            continue
        stack += [(f"{name}[{key!r}]", item) for key, item in items]
        # A small file can hold a list that contains itself, or one a billion times.
        if len(name) > MAX_NAME_LENGTH or seen + len(stack) > MAX_VALUES:
            raise ValueError("holds too many values")
    return found


# -- Reading ---------------------------------------------------------------------------


def load_checkpoint(path):
    """The content of a file of torch.save or safetensors, on the CPU.

    ValueError if it holds anything but tensors and plain types, or is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file")
    if path.is_dir():
        raise ValueError(f"{path}: a folder; name a file in it, such as last.pt")
    load = load_safetensors if path.suffix == ".safetensors" else load_torch
    parts = load(path)
    if not isinstance(parts, dict):
        kind = type(parts).__name__
        raise ValueError(f"{path}: not a checkpoint, it holds a {kind}")
    try:
        verify_checksums(path, parts)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    return parts


def load_torch(path):
    """The content of a file of torch.save; see load_checkpoint."""
    try:
        # Training files of facebookresearch/mae hold a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises almost anything on a damaged file
        reason = f"damaged, or not a checkpoint ({type(error).__name__})"
        # PyTorch's message advises to disable weights_only.
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if unsafe:
            reason = (
                f"holds {unsafe[1]}, which is neither a tensor nor a plain type; refused, "
                "and no code in it was executed"
            )
        raise ValueError(f"{path}: {reason}") from error


def load_safetensors(path):
    """The tensors of a .safetensors file, as a dict."""
    if find_spec("safetensors") is None:
        raise ValueError(
            f"{path}: needs the package safetensors: pip install safetensors"
        )
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:
        raise ValueError(
            f"{path}: damaged, or not a safetensors file ({error})"
        ) from error


def verify_checksums(path, parts):
    """ValueError if the content of a file has changed. Removes "checksums" from parts.

    Without our checksums: if the checksums of the zip archive differ, or a tensor is not
    finite.
    """
    stored = parts.pop("checksums", None)
    tensors = [x for x in leaves(parts) if isinstance(x[1], torch.Tensor)]
    for name, tensor in tensors:
        check_storage(name, tensor)
    if stored is not None:
        actual = checksums(parts)
        if stored != actual:
            known = stored if isinstance(stored, dict) else {}
            changed = [name for name in actual if known.get(name) != actual[name]]
            raise ValueError(f"{changed[:3]} changed since they were written")
        return
    if zipfile.is_zipfile(path):
        verify_archive(path)
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite")


def check_storage(name, x):
    """ValueError for a tensor that is larger than its storage in the file."""
    if x.layout != torch.strided or x.device.type != "cpu":
        raise ValueError(f"{name} is a {x.layout} tensor on the device {x.device}")
    size = x.untyped_storage().nbytes()
    if x.numel() * x.element_size() > size:
        raise ValueError(f"{name} has the shape {tuple(x.shape)}, but {size} bytes")


def verify_archive(path):
    """ValueError if a file in a zip archive does not match its crc32."""
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
    return rename(settings)


# -- States of model, optimizer and scaler ---------------------------------------------


def load_state(model, state, name):
    """Load the weights of a module, which must agree in names, shapes and dtypes.

    name: of the file, for the ValueError if they do not.
    """
    if not isinstance(state, dict):
        raise ValueError(f"{name}: holds no weights")
    expected = model.state_dict()
    differ = sorted(map(str, set(expected) ^ set(state)))
    if differ:
        raise ValueError(f"{name}: of another model; only one has {differ[:3]}")
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


# Optimizer state per parameter.
MOMENTS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "LARS": {"momentum"}}


def load_optimizer(optimizer, stored, steps, name):
    """Load the moments of an optimizer, without its hyperparameters.

    stored: its state_dict after so many steps. name: of the file, for the ValueError.
    PyTorch does not check the shapes, and its fused AdamW would write out of bounds.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = stored.get("state") if isinstance(stored, dict) else None
    if not isinstance(states, dict):
        raise ValueError(f"{name}: holds no optimizer state")
    # Empty until the first step that the gradient scaler of fp16 does not skip.
    if states and set(states) != set(range(len(parameters))):
        raise ValueError(
            f"{name}: moments of {len(states)} parameters, must be {len(parameters)}"
        )
    for number, state in states.items():
        where = f"{name}: optimizer state of parameter {number}"
        expected = MOMENTS[type(optimizer).__name__]
        if not isinstance(state, dict) or set(state) != expected:
            raise ValueError(f"{where}: must hold {sorted(expected)}")
        for key, x in state.items():
            if key != "step":
                check_like(x, parameters[number], f"{where}: {key}")
                state[key] = x.contiguous()
                continue
            step = float(x) if torch.is_tensor(x) and x.numel() == 1 else x
            if type(step) not in (int, float) or step not in range(steps + 1):
                raise ValueError(f"{where}: step must be from 0 to {steps}")
            state[key] = torch.tensor(float(step))
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def load_scaler(scaler, stored, name):
    """Load the state of a GradScaler, which is empty without fp16; see load_optimizer."""
    if not isinstance(stored, dict):
        raise ValueError(f"{name}: holds no scaler state")
    expected = scaler.state_dict()
    # A resumed run may change its precision.
    if not stored or not expected:
        return
    for key in expected:
        value = stored.get(key)
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ValueError(
                f"{name}: {key} of the scaler must be finite, not negative"
            )
    scaler.load_state_dict({key: stored[key] for key in expected})


# -- Resuming --------------------------------------------------------------------------


def checkpoint_path(cfg):
    """Path of the checkpoint to resume, or with --epochs 0 to draw; or None.

    ValueError if --epochs 0 would replace the images of a run by those of other weights.
    """
    last = Path(cfg.out, "last.pt")
    path = last if last.exists() else None
    if cfg.resume != "auto":
        path = None if cfg.resume == "none" else Path(cfg.resume)
    if cfg.epochs == 0 and last.exists():
        other = f"--init {cfg.init}" if cfg.init else None
        if path is None or path.resolve() != last.resolve():
            other = other or f"--resume {cfg.resume}"
        if other:
            raise ValueError(
                f"--epochs 0: {last} belongs to a run, whose reconstructions.png is kept; "
                f"for the images of {other} choose another --out"
            )
    return path


def read_run(path):
    """The parts of a training checkpoint, with its path; ValueError if it is not one."""
    parts = load_checkpoint(path)
    missing = {"model", "optimizer", "scaler", "step", "config"} - set(parts)
    missing |= {name for name in ("model", "optimizer") if not parts.get(name)}
    if missing:
        raise ValueError(
            f"{path}: not a training checkpoint of this project, it lacks "
            f"{sorted(missing)}; to start from its weights use --init"
        )
    step = parts["step"]
    if type(step) is not int or not 0 <= step < 2**53:
        raise ValueError(f"{path}: its step is damaged ({step!r})")
    config = read_settings(parts["config"], path)
    return parts | {"config": config, "path": str(path)}


def restore_settings(cfg, given, checkpoint):
    """On resume, keep auto-resolved settings from the checkpoint unless overridden.

    given: the Config before its defaults were resolved to cfg. Returns a new Config.
    """
    stored = checkpoint["config"]
    names = ["precision", "accum"]
    # The default warm-up follows the number of epochs.
    if stored.get("epochs") == cfg.epochs:
        names.append("warmup_epochs")
    kept = {}
    for name in names:
        if getattr(given, name) in (None, "auto") and name in stored:
            kept[name] = stored[name]
    try:
        return dataclasses.replace(cfg, **kept)
    except ValueError as error:
        raise ValueError(
            f"{checkpoint['path']}: its settings are damaged ({error})"
        ) from error


def check_settings(cfg, checkpoint, total_steps):
    """[--NAME OLD -> NEW] of the settings that a run changes on resume.

    The resume class of a setting (attg.cli.flag) decides whether it may change: never
    ("fixed"), until the run has ended ("open", because an old result would pass for one
    of the new setting), or always ("free"). ValueError names those that may not.
    """
    path = checkpoint["path"]
    # A setting that is newer than the checkpoint had its default.
    defaults = {field.name: field.default for field in dataclasses.fields(cfg)}
    stored = json.loads(json.dumps(defaults)) | checkpoint["config"]
    fixed, free = resume_class(type(cfg), "fixed"), resume_class(type(cfg), "free")
    ended = checkpoint["step"] >= total_steps
    if cfg.epochs == 0:
        # Only draws: what the weights depend on must agree.
        fixed -= {"data", "classes", "batch_size", "seed"}
        ended = False
    elif cfg.resume == "auto" and stored.get("epochs") != cfg.epochs:
        raise ValueError(
            f"{path} was made for --epochs {stored.get('epochs')}, not {cfg.epochs}, and "
            "its lr and tau follow that number; train in another folder: --out, or "
            f"continue it with the new schedule: --resume {path}"
        )
    changed, refused = [], []
    for name, value in json.loads(json.dumps(dataclasses.asdict(cfg))).items():
        if stored.get(name) == value:
            continue
        change = f"--{name} {stored.get(name)} -> {value}"
        changed.append(change)
        if name in fixed or (ended and name not in free):
            refused.append(change)
    if refused:
        raise ValueError(
            f"{path} is of another run: {', '.join(refused)}; change --out, or start "
            "over: --resume none"
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
