"""
Training steps of this project beside those of others, on the same images.

Each code has a model of the preset's sizes with random weights, and AdamW. A step is
forward, backward and update; the images are normalized floats on the device. `ours` and
the peers run without a map. `train_step` is what attg_mae.py does in a step beside
that: it normalizes and flips 8-bit images, crops the maps, and measures the unweighted
error and the norm of the gradient; `guided` has maps, `vanilla` none.
"""

import importlib
import math
import os
import statistics
import sys
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from attg.files import require
from attg.loader import Batch
from attg_mae import (
    Config,
    build_model,
    flip_and_normalize,
    param_groups,
    resolve,
    train_step,
)
from benchmarks.measure import (
    clock_words,
    machine,
    nothing,
    peak_memory_on_gpu,
    percentiles,
    print_row,
    quiet_clock,
    table,
    take_turns,
)


class Code(NamedTuple):
    """Somebody's MAE: loss(model, imgs, noise), and who it is."""

    name: str
    model: Any
    loss: Any
    optimizer: Any


# -- The codes -------------------------------------------------------------------------


def our_loss(model, imgs, noise):
    return model(imgs, noise=noise)[0]


def hugging_face(cfg):
    """transformers' ViTMAEForPreTraining with its fused attention."""
    import transformers

    settings = transformers.ViTMAEConfig(
        image_size=cfg.img_size,
        patch_size=cfg.patch_size,
        hidden_size=cfg.width,
        num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.heads,
        intermediate_size=4 * cfg.width,
        decoder_hidden_size=cfg.decoder_width,
        decoder_num_hidden_layers=cfg.decoder_depth,
        decoder_num_attention_heads=cfg.decoder_heads,
        decoder_intermediate_size=4 * cfg.decoder_width,
        layer_norm_eps=1e-6,
        norm_pix_loss=True,
        attn_implementation="sdpa",
    )
    return transformers.ViTMAEForPreTraining(settings), hugging_face_loss


def hugging_face_loss(model, imgs, noise):
    return model(imgs, noise=noise).loss


class Lightly(torch.nn.Module):
    """lightly's encoder and decoder, put together as its documentation does."""

    def __init__(self, cfg):
        super().__init__()
        # It asks its server for a newer version otherwise.
        os.environ["LIGHTLY_DID_VERSION_CHECK"] = "True"
        from lightly.models import utils
        from lightly.models.modules import (
            MaskedVisionTransformerDecoderTIMM,
            MaskedVisionTransformerTIMM,
        )
        from timm.models.vision_transformer import VisionTransformer

        self.utils = utils
        self.patch_size = cfg.patch_size
        vit = VisionTransformer(
            cfg.img_size,
            cfg.patch_size,
            embed_dim=cfg.width,
            depth=cfg.depth,
            num_heads=cfg.heads,
            num_classes=0,
        )
        self.encoder = MaskedVisionTransformerTIMM(vit)
        width = cfg.decoder_width
        self.embed = torch.nn.Linear(cfg.width, width)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=math.prod(cfg.grid),
            embed_dim=width,
            depth=cfg.decoder_depth,
            num_heads=cfg.decoder_heads,
        )
        self.predict = torch.nn.Linear(width, cfg.patch_size**2 * cfg.in_chans)

    def forward(self, imgs):
        utils = self.utils
        size = (len(imgs), self.encoder.sequence_length)
        keep, hidden = utils.random_token_mask(size, 0.75, device=imgs.device)
        latent = self.embed(self.encoder.encode(imgs, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, size)
        tokens = utils.set_at_index(tokens, keep, latent.type_as(tokens))
        decoded = self.decoder(tokens)
        pred = self.predict(utils.get_at_index(decoded, hidden))
        # The class token has no patch.
        patches = utils.patchify(imgs, self.patch_size)
        target = utils.get_at_index(patches, hidden - 1)
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        return F.mse_loss(pred, (target - mean) / (variance + 1e-6).sqrt())


def lightly(cfg):
    return Lightly(cfg), lightly_loss


def lightly_loss(model, imgs, noise):
    """It draws its own masks."""
    return model(imgs)


def facebook(repo, cfg):
    """models_mae.py of a copy of facebookresearch/mae.

    It was written for timm 0.3.2 and NumPy below 1.24; a newer timm's blocks take no
    qk_scale, which it passes as None, and use fused attention.
    """
    from timm.models.vision_transformer import Block

    def block(*args, qk_scale=None, **options):
        return Block(*args, **options)

    np.float = float
    sys.path.insert(0, str(repo))
    try:
        models_mae = importlib.import_module("models_mae")
    finally:
        sys.path.remove(str(repo))
    models_mae.Block = block
    model = models_mae.MaskedAutoencoderViT(
        img_size=cfg.img_size,
        patch_size=cfg.patch_size,
        embed_dim=cfg.width,
        depth=cfg.depth,
        num_heads=cfg.heads,
        decoder_embed_dim=cfg.decoder_width,
        decoder_depth=cfg.decoder_depth,
        decoder_num_heads=cfg.decoder_heads,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        norm_pix_loss=True,
    )
    return model, facebook_loss


def facebook_loss(model, imgs, noise):
    """It draws its own masks."""
    return model(imgs, mask_ratio=0.75)[0]


def ours(cfg):
    return build_model(cfg), our_loss


def available_codes(cfg, device, mae_repo=None, wanted=None, say=print):
    """[Code] of what is installed, ours first; says what is not.

    wanted: names, the first words are enough; None is all.
    """
    codes = {"ours": partial(ours, cfg)}
    if find_spec("transformers"):
        codes["HF sdpa"] = partial(hugging_face, cfg)
    else:
        say("without HF sdpa: transformers is not installed")
    if find_spec("lightly") and find_spec("timm"):
        codes["lightly"] = partial(lightly, cfg)
    else:
        say("without lightly: lightly or timm is not installed")
    if mae_repo and find_spec("timm"):
        codes["mae"] = partial(facebook, Path(mae_repo), cfg)
    else:
        say("without mae: no --mae_repo, or timm is not installed")
    if wanted:
        first = ("ours", *wanted)
        codes = {name: make for name, make in codes.items() if name.startswith(first)}
        require(
            len(codes) > 1 or "ours" in wanted,
            f"--codes {' '.join(wanted)}: none of them is here",
        )

    ready = []
    for name, make in codes.items():
        try:
            model, loss = make()
            model = model.train().to(device)
            groups = param_groups(model, 0.05)
            optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        # Other versions of a peer may lack or want anything.
        except Exception as error:
            if name == "ours":
                raise
            say(f"without {name}: {type(error).__name__}: {error}")
            continue
        ready.append(Code(name, model, loss, optimizer))
    return ready


# -- A step ----------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What the steps of all codes are given."""

    cfg: Config
    # Normalized floats (B, C, H, W).
    imgs: torch.Tensor
    # (B, L): the lowest stay visible.
    noise: torch.Tensor
    # The same images as 8-bit crops with maps, for train_step.
    batch: Batch
    # Of autocast, or None.
    dtype: torch.dtype | None
    tau: torch.Tensor


def random_batch(cfg, batch_size, device):
    """A Batch of random pixels and maps."""
    generator = torch.Generator(device).manual_seed(0)
    where = {"generator": generator, "device": device}
    height, width = cfg.size
    shape = (batch_size, cfg.in_chans, height, width)
    corners = torch.tensor([0.1, 0.2, 0.8, 0.9], device=device)
    return Batch(
        image=torch.randint(0, 256, shape, dtype=torch.uint8, **where),
        maps=torch.rand(batch_size, *cfg.grid, **where),
        box=corners.expand(batch_size, 4),
        flip=torch.rand(batch_size, **where) < 0.5,
        noise=torch.rand(batch_size, math.prod(cfg.grid), **where),
    )


def make_inputs(cfg, batch_size, dtype, device):
    """Inputs of random pixels; dtype: torch.float32 is without autocast."""
    batch = random_batch(cfg, batch_size, device)
    imgs = flip_and_normalize(batch, cfg)
    dtype = None if dtype == torch.float32 else dtype
    tau = torch.tensor(0.75, device=device)
    return Inputs(cfg, imgs, batch.noise, batch, dtype, tau)


def plain_step(code, inputs, model, _=None):
    """Forward, backward and update."""
    device = inputs.imgs.device.type
    with torch.autocast(device, inputs.dtype, enabled=inputs.dtype is not None):
        loss = code.loss(model, inputs.imgs, inputs.noise)
    loss.backward()
    code.optimizer.step()
    code.optimizer.zero_grad()


def whole_step(code, inputs, model, batch, _=None):
    """attg_mae.train_step, guided if the batch has maps."""
    tau, cfg, dtype = inputs.tau, inputs.cfg, inputs.dtype
    scaler = torch.amp.GradScaler(tau.device.type, enabled=False)
    train_step(model, code.optimizer, scaler, [batch], tau, cfg, dtype)


def steps_of(code, inputs, compiled, backend):
    """{name: call} of a code: its plain step, and for ours train_step."""
    model, after = code.model, ""
    if compiled:
        model, after = torch.compile(code.model, backend=backend), ", compiled"
    steps = {code.name + after: partial(plain_step, code, inputs, model)}
    if code.name == "ours":
        guided, vanilla = inputs.batch, inputs.batch._replace(maps=None)
        for words, batch in (("vanilla", vanilla), ("guided", guided)):
            call = partial(whole_step, code, inputs, model, batch)
            steps[f"train_step, {words}{after}"] = call
    return steps


# -- What a step takes -----------------------------------------------------------------


def model_flops(step):
    """Floating-point operations of a step's matrix products and attention."""
    # The fused attention of CPUs would not be counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def saved_bytes(code, inputs):
    """Bytes that a forward pass keeps for the backward pass, each storage once."""
    storages = {}

    def pack(x):
        storage = x.untyped_storage()
        # Kept, so that no other takes its address.
        storages[storage.data_ptr()] = storage
        return x

    device = inputs.imgs.device.type
    with saved_tensors_hooks(pack, unchanged):
        with torch.autocast(device, inputs.dtype, enabled=inputs.dtype is not None):
            loss = code.loss(code.model, inputs.imgs, inputs.noise)
    del loss
    return sum(storage.nbytes() for storage in storages.values())


def unchanged(x):
    return x


def first_images(inputs, number):
    """The same inputs for the plain step of the first images alone."""
    return inputs._replace(imgs=inputs.imgs[:number], noise=inputs.noise[:number])


def saved_bytes_per_image(code, inputs):
    """Of two images less those of one: weights count for nothing."""
    two = saved_bytes(code, first_images(inputs, 2))
    return two - saved_bytes(code, first_images(inputs, 1))


def operator_calls(step, device):
    """{"operators": calls of PyTorch's, "kernels": on a GPU} of a step."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        step()
    calls, kernels = 0, 0
    for event in profiler.key_averages():
        if event.key.startswith("aten::"):
            calls += event.count
            continue
        # What ran on the GPU itself; the optimiser marks its whole step there.
        on_gpu = event.self_device_time_total > 0 and event.self_cpu_time_total == 0
        if on_gpu and not event.key.startswith("Optimizer."):
            kernels += event.count
    if device.type == "cuda":
        return {"operators": calls, "kernels": kernels}
    return {"operators": calls}


def properties(code, inputs, say=print):
    """What a plain step takes, whatever the clock says."""
    step = partial(plain_step, code, inputs, code.model)
    # The first step makes the optimiser's state.
    step()
    one = partial(plain_step, code, first_images(inputs, 1), code.model)
    found = {
        "GFLOP/img": model_flops(one) / 1e9,
        "saved MB/img": saved_bytes_per_image(code, inputs) / 1e6,
    }
    try:
        found |= operator_calls(step, inputs.imgs.device)
    # A profiler wants rights that some machines do not give.
    except RuntimeError as error:
        say(f"without operator calls of {code.name}: {error}")
    return found


# -- The table -------------------------------------------------------------------------


def measure_steps(codes, inputs, modes, repeats, say=print, backend="inductor"):
    """A row for each code and step; what fails is left out, by name.

    modes: False is eager, True compiled by `backend`. `x ours` is the speed beside that
    of our plain step in the same mode.
    """
    device = inputs.imgs.device
    steps, memory = {}, {}
    for compiled, code in product(modes, codes):
        for name, step in steps_of(code, inputs, compiled, backend).items():
            try:
                # Compiles, and makes the optimiser's state.
                step()
                memory[name] = step_memory(step, device)
                steps[name] = step
            except Exception as error:
                say(f"without {name}: {type(error).__name__}: {str(error)[:300]}")
    taken = {}
    for code in codes:
        if code.name in steps:
            taken[code.name] = properties(code, inputs, say)
    calls = {name: (nothing, step) for name, step in steps.items()}
    # In the same rounds: the rate of a machine that others use as well changes.
    product_flops, calls["product"] = matrix_product(inputs.dtype, device)
    times = take_turns(calls, device, repeats, quiet_clock())
    rate = product_flops / statistics.median(times.pop("product"))
    return step_rows(inputs, times, taken, memory, rate)


def matrix_product(dtype, device):
    """(floating-point operations, (prepare, call)) of a large product."""
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device).to(dtype or torch.float32)
    return 2 * side**3, (partial(unchanged, a), a.matmul)


def step_rows(inputs, times, taken, memory, rate):
    """Rows of seconds, properties and peak memory, by the names of the steps.

    rate: of the matrix product, operations a second.
    """
    B, dtype = len(inputs.imgs), inputs.dtype or torch.float32
    # A code that does more operations is not better.
    flops = taken["ours"]["GFLOP/img"] * 1e9
    rows = []
    for name, seconds in times.items():
        base = times["ours"]
        if name.endswith("compiled"):
            base = times.get("ours, compiled", base)
        median, p20, p80 = percentiles(seconds)
        img_s = 1e3 * B / median
        row = {
            "model": inputs.cfg.model,
            "type": str(dtype).removeprefix("torch."),
            "batch": B,
            "step": name,
            "img/s": img_s,
            "p20": 1e3 * B / p80,
            "p80": 1e3 * B / p20,
            "x ours": percentiles(base)[0] / median,
            "% of matrix rate": 100 * flops * img_s / rate,
        }
        rows.append(row | memory[name] | taken.get(name, {}))
    return rows


def step_memory(step, device):
    """{"peak MiB": beside weights and optimiser state}, on a GPU only."""
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize()
    return {"peak MiB": peak_memory_on_gpu(step)}


def guidance_cost(rows):
    """{mode: percent that guidance adds to train_step}, from rows of one model."""
    speed = {row["step"]: row["img/s"] for row in rows}
    costs = {}
    for mode in ("", ", compiled"):
        vanilla = speed.get(f"train_step, vanilla{mode}")
        guided = speed.get(f"train_step, guided{mode}")
        if vanilla and guided:
            costs[mode] = 100 * (vanilla / guided - 1)
    return costs


def run(args, device, out):
    """Images a second, and what a step takes."""
    on_gpu = device.type == "cuda"
    batch_size = (args.batches or [128 if on_gpu else 4])[0]
    dtypes = args.dtypes or ["bfloat16" if on_gpu else "float32"]
    modes = [False, True] if args.compile else [False]
    rows = []
    for name, dtype in product(args.models, dtypes):
        cfg = resolve(Config(name))
        codes = available_codes(cfg, device, args.mae_repo, args.codes)
        inputs = make_inputs(cfg, batch_size, getattr(torch, dtype), device)
        more = measure_steps(codes, inputs, modes, args.repeats)
        for row in more:
            print_row(row)
        rows += more
    table(rows, out, "step", f"{machine(device)}; {clock_words(device)}")
