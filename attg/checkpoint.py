"""
Files of weights and of whole runs: written whole or not at all, and read unchanged or
not at all.

    save_checkpoint("last.pt", model=model.state_dict(), step=7)
    parts = load_checkpoint("last.pt")
    load_state(model, parts["model"], "last.pt")

Nothing but tensors and plain types is read, and nothing of a file is run. torch.load does
not notice bits that have changed on a disk or on the way. So these files carry the crc32
of each tensor, and one of all else, as a part of their own. Of other people's files the
checksums of the zip archive are compared, and all weights must be finite. In files that
are no archives, safetensors and those of torch.save before PyTorch 1.6, and in archives
whose checksums were written anew, a change to another finite weight cannot be seen.
"""

import argparse
import dataclasses
import errno
import json
import math
import re
import zipfile
import zlib
from importlib.util import find_spec
from pathlib import Path

import torch

from attg.files import replacing, require
from attg.pretraining import check_config, resolve

# What a checkpoint may hold: values in it, and the characters of the longest name.
MAX_VALUES = 10**6
MAX_NAME_LENGTH = 1000


# -- Writing ---------------------------------------------------------------------------


def save_checkpoint(path, /, **parts):
    """Writes tensors and plain types, all or nothing.

    OSError names the file; an earlier one stays as it was.
    """
    parts["checksums"] = checksums(parts)
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.save(parts, file)
    except (OSError, RuntimeError) as error:
        # torch.save may raise an error of its own after that of the disk.
        cause = error if isinstance(error, OSError) else error.__context__
        words = f"{path} could not be written: {cause or error}"
        if getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            words += "; the disk is full"
        if Path(path).exists():
            words += f"; the earlier {path} is intact"
        raise OSError(words) from error


def checksums(parts):
    """{name: crc32} of the tensors in nested dicts and lists, and of all else as "rest"."""
    found, rest = {}, []
    for name, value in leaves(parts):
        if isinstance(value, torch.Tensor):
            content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found[name] = zlib.crc32(content.numpy())
            value = f"{value.dtype} {list(value.shape)}"
        rest.append(f"{name} {type(value).__name__} {value!r}")
    found["rest"] = zlib.crc32("\n".join(rest).encode())
    return found


def leaves(parts):
    """[(name, value)] of all that is neither a dict nor a list, within dicts and lists."""
    found, left = [], [("", parts)]
    seen = 0
    while left:
        name, value = left.pop()
        seen += 1
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list | tuple):
            items = enumerate(value)
        else:
            found.append((name, value))
            continue
        left += [(f"{name}[{key!r}]", item) for key, item in items]
        # A small file can hold a list that holds itself, or one a billion times.
        require(
            len(name) <= MAX_NAME_LENGTH and seen + len(left) <= MAX_VALUES,
            "too many values in it",
        )
    return found


# -- Reading ---------------------------------------------------------------------------


def load_checkpoint(path):
    """What torch.save or safetensors wrote, on the CPU: tensors and plain types.

    ValueError for all else, of which nothing is run, and for a damaged file.
    """
    path = Path(path)
    require(path.exists(), f"{path}: there is no such file")
    require(not path.is_dir(), f"{path}: a folder; name a file in it, such as last.pt")
    if path.suffix == ".safetensors":
        loaded = load_safetensors(path)
    else:
        loaded = load_torch(path)
    kind = type(loaded).__name__
    require(isinstance(loaded, dict), f"{path}: no checkpoint, it holds a {kind}")
    try:
        verify_checksums(path, loaded)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    return loaded


def load_torch(path):
    """What torch.save wrote; see load_checkpoint."""
    try:
        # facebookresearch/mae's training files hold a Namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        reason = f"damaged, or no file of weights ({type(error).__name__})"
        # PyTorch's own words advise to switch the check off.
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign:
            reason = (
                f"holds {foreign[1]}, which is no tensor and no plain type; refused, and "
                "nothing of it was run"
            )
        raise ValueError(f"{path}: {reason}") from error


def load_safetensors(path):
    """The tensors of a .safetensors file, a dict."""
    require(
        find_spec("safetensors") is not None,
        f"{path}: to read it the package safetensors is needed: pip install safetensors",
    )
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except Exception as error:
        raise ValueError(
            f"{path}: damaged, or no safetensors file ({error})"
        ) from error


def verify_checksums(path, loaded):
    """ValueError if what was loaded is not what was written. Takes the checksums out.

    Of a file without checksums of its own: if its archive's do not fit, or a number is
    not finite.
    """
    written = loaded.pop("checksums", None)
    for name, value in leaves(loaded):
        if isinstance(value, torch.Tensor):
            check_storage(name, value)
    if written is not None:
        found = checksums(loaded)
        if written != found:
            names = dict(written) if isinstance(written, dict) else {}
            changed = [name for name in found if names.get(name) != found[name]]
            raise ValueError(f"{changed[:3]} changed since they were written")
        return
    if zipfile.is_zipfile(path):
        verify_archive(path)
    for name, value in leaves(loaded):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            require(value.isfinite().all(), f"{name} is not finite")


def check_storage(name, x):
    """ValueError for a tensor that is larger than what the file holds of it."""
    require(
        x.layout == torch.strided and x.device.type == "cpu",
        f"{name} is a {x.layout} tensor of the device {x.device}",
    )
    held = x.untyped_storage().nbytes()
    require(
        x.numel() * x.element_size() <= held,
        f"{name} has the shape {tuple(x.shape)}, but {held} bytes",
    )


def verify_archive(path):
    """ValueError for a zip archive of which a file does not match its crc32."""
    try:
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
    except Exception as error:  # nearly anything, on a damaged file
        raise ValueError(f"no sound archive ({type(error).__name__})") from error
    require(changed is None, f"{changed} changed since it was written")


# -- Settings, weights and optimiser ---------------------------------------------------


def read_settings(stored, name):
    """The settings of a file, as JSON has them: with lists for tuples.

    name: of the file, for the ValueError if they are no dict of plain values.
    """
    try:
        settings = json.loads(json.dumps(stored, allow_nan=False))
        require(isinstance(settings, dict), "no names with values")
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{name}: its settings are damaged ({error})") from error
    return settings


def load_state(model, state, name):
    """Loads all weights of a module, which have to be of its names, shapes and dtypes.

    name: of the file, for the ValueError if they are not.
    """
    own = model.state_dict()
    require(isinstance(state, dict), f"{name}: holds no weights")
    odd = sorted(map(str, set(own) ^ set(state)))
    require(not odd, f"{name}: weights of another model: {odd[:3]} are in one only")
    for key, weight in own.items():
        check_like(state[key], weight, f"{name}: {key}")
    model.load_state_dict(state)


def check_like(x, like, name):
    """ValueError unless x is a tensor of the shape and dtype of another one."""
    require(isinstance(x, torch.Tensor), f"{name} is no tensor")
    words = [f"{t.dtype} {tuple(t.shape)}" for t in (x, like)]
    require(words[0] == words[1], f"{name} is {words[0]}, must be {words[1]}")


# What the optimisers keep of each parameter.
MOMENTS = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "LARS": {"momentum"}}


def load_optimizer(optimizer, stored, steps, name):
    """Loads the moments of its parameters, but no settings, of which the run decides.

    stored: its state_dict, as it was after so many steps. name: of the file, for the
    ValueError. PyTorch trusts the sizes, and would write out of bounds.
    """
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    states = stored.get("state") if isinstance(stored, dict) else None
    require(isinstance(states, dict), f"{name}: holds no state of an optimizer")
    # None before the first step that fp16's scaler lets through.
    numbers = set(range(len(parameters))) if states else set()
    require(
        set(states) == numbers,
        f"{name}: moments of {len(states)} parameters, must be {len(parameters)}",
    )
    wanted = MOMENTS[type(optimizer).__name__]
    for number, state in states.items():
        place = f"{name}: of the optimizer's parameter {number}"
        require(
            isinstance(state, dict) and set(state) == wanted,
            f"{place} it must hold {sorted(wanted)}",
        )
        for key, x in state.items():
            if key != "step":
                check_like(x, parameters[number], f"{place} {key}")
                state[key] = x.contiguous()
                continue
            done = float(x) if torch.is_tensor(x) and x.numel() == 1 else x
            require(
                type(done) in (int, float) and done in range(steps + 1),
                f"{place} step must be a number from 0 to {steps}",
            )
            state[key] = torch.tensor(float(done))
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def load_scaler(scaler, stored, name):
    """Loads the state of a GradScaler, empty where there is no fp16; as load_optimizer."""
    own = scaler.state_dict()
    require(isinstance(stored, dict), f"{name}: holds no state of a scaler")
    # A run may go on in another precision.
    if not stored or not own:
        return
    for key in own:
        value = stored.get(key)
        require(
            type(value) in (int, float) and 0 <= value < math.inf,
            f"{name}: of the scaler {key} is no number from 0 on",
        )
    scaler.load_state_dict({key: stored[key] for key in own})


# -- Checkpoints -----------------------------------------------------------------------


def checkpoint_to_continue(cfg):
    """Path of the checkpoint that --resume and --out name, or None."""
    if cfg.resume == "none":
        return None
    if cfg.resume != "auto":
        return Path(cfg.resume)
    own = Path(cfg.out, "last.pt")
    return own if own.exists() else None


def checkpoint_to_show(cfg):
    """Path of the checkpoint of which --epochs 0 draws pictures, or None.

    The pictures of a run are not replaced by those of other weights: ValueError.
    """
    own = Path(cfg.out, "last.pt")
    asked = checkpoint_to_continue(cfg)
    if not own.exists():
        return asked
    others = None
    if cfg.init:
        others = f"--init {cfg.init}"
    elif asked is None or asked.resolve() != own.resolve():
        others = f"--resume {cfg.resume}"
    require(
        others is None,
        f"--epochs 0: {own} is of a run, whose reconstructions.png is kept; for pictures "
        f"of {others} name another folder: --out",
    )
    return own


def read_run(path):
    """The parts of a checkpoint of this project's training, or ValueError."""
    parts = load_checkpoint(path)
    lacks = {"model", "optimizer", "scaler", "step", "config"} - set(parts)
    for name in ("model", "optimizer"):
        if not parts.get(name):
            lacks.add(name)
    require(
        not lacks,
        f"{path}: not a training checkpoint of this project, lacks {sorted(lacks)}; "
        "try --init",
    )
    step = parts["step"]
    require(type(step) is int and 0 <= step < 2**53, f"{path}: its step is no number")
    config = read_settings(parts["config"], path)
    return parts | {"config": config, "path": str(path)}


def restore_resolved(cfg, parts):
    """What a continued run has settled itself stays so, unless it is given now.

    That is what stood for "auto", and a warm-up that was the default of its time. parts:
    of the checkpoint.
    """
    old = parts["config"]
    usual = resolve(dataclasses.replace(cfg, warmup_epochs=None)).warmup_epochs
    for name in ("precision", "accum"):
        if getattr(cfg, name) == "auto":
            setattr(cfg, name, old.get(name, "auto"))
    if cfg.warmup_epochs == usual and old.get("epochs") == cfg.epochs:
        cfg.warmup_epochs = old.get("warmup_epochs", usual)
    try:
        check_config(cfg)
    except ValueError as error:
        words = f"{parts['path']}: its settings are damaged ({error})"
        raise ValueError(words) from error


def compare_settings(path, parts, cfg, total_steps, fixed, free):
    """[--NAME OLD -> NEW] of the settings that differ from those in the checkpoint.

    fixed: settings that may not change in a run. free: those that may even change once
    it has ended (any other would pass an old result off as new). ValueError names them.
    """
    new = json.loads(json.dumps(dataclasses.asdict(cfg)))
    old = parts["config"]
    require(
        cfg.resume != "auto" or old.get("epochs") == cfg.epochs or not cfg.epochs,
        f"{path} was made for --epochs {old.get('epochs')}, not {cfg.epochs}, and its lr "
        "and tau follow that number; train in another folder: --out, or go on from it "
        f"by these epochs: --resume {path}",
    )
    ended = parts["step"] >= total_steps
    differences, refused = [], []
    for name, value in new.items():
        if old.get(name) == value:
            continue
        words = f"--{name} {old.get(name)} -> {value}"
        differences.append(words)
        if name in fixed or (ended and name not in free):
            refused.append(words)
    require(
        not refused,
        f"{path} is of another run: {', '.join(refused)}; "
        "change --out, or start anew: --resume none",
    )
    return differences


def find_checkpoint(cfg, total_steps, log, fixed, free):
    """The parts of the checkpoint that this run continues, or None.

    fixed, free: see compare_settings. cfg takes over what that run has settled.
    """
    path = checkpoint_to_continue(cfg)
    if path is None:
        return None
    parts = read_run(path)
    restore_resolved(cfg, parts)
    differences = compare_settings(path, parts, cfg, total_steps, fixed, free)
    note = f"; the new value holds: {differences}" if differences else ""
    log.say(f"continuing {path} after step {parts['step']}{note}")
    return parts


def find_model(cfg, log, fixed):
    """The parts of the checkpoint that --epochs 0 shows, or None.

    fixed: settings by which its model must be that of cfg.
    """
    path = checkpoint_to_show(cfg)
    if path is None:
        return None
    parts = read_run(path)
    everything = set(dataclasses.asdict(cfg))
    compare_settings(path, parts, cfg, 0, fixed, everything)
    log.say(f"pictures of {path} after step {parts['step']}")
    return parts
