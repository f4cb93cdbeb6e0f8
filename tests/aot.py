"""
Compiles the kernels for a GPU that need not be present, and reports what they use.

    python -m tests.aot sm_90     # in a process without TRITON_INTERPRET; prints JSON

Prints [[launch, ...], an oversized launch or null, whether images are read in register
groups], or null for a target that this Triton cannot compile for. A launch is a
dictionary: case, kernel, spills (bytes on NVIDIA, registers on AMD), barriers, and on
NVIDIA loads, {bytes that a thread loads at once: number of such instructions}.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

kernel = importlib.import_module("attg.kernels.attg_loss")

TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "sm_80": GPUTarget("cuda", 80, 32)}
# Older versions need ROCm's linker to compile for AMD.
NEW = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
if "amd" in triton.backends.backends and NEW:
    TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)


def facts(case, name, compiled):
    """Return what the compiler made of a launch."""
    asm, row = compiled.asm, {"case": case, "kernel": name}
    if "amdgcn" in asm:
        spilled = re.search(r"vgpr_spill_count: *([0-9]+)", asm["amdgcn"])[1]
        barriers = asm["amdgcn"].count("s_barrier")
        return row | {"spills": int(spilled), "barriers": barriers}
    loads = Counter()
    for code, bits in re.findall(r"\b(ld\.global\S*\.[bu](8|16|32|64))\b", asm["ptx"]):
        vector = re.search(r"\.v([24])\.", code)
        loads[int(bits) // 8 * int(vector[1] if vector else 1)] += 1
    row |= {"spills": stack(asm["cubin"]), "barriers": asm["ptx"].count("bar.sync")}
    return row | {"loads": loads}


def stack(cubin):
    """Return the bytes of stack of a kernel, by the cuobjdump that Triton bundles."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([tool, "-res-usage", file.name], text=True)
    return int(re.search(r"STACK:([0-9]+)", usage)[1])


def call(L, P, dtype, target, patch_size=None, mask=torch.float32, return_mse=True):
    """Call forward and backward; pred is as MAE passes it, without the class token."""
    pred = torch.empty(2, L + 1, P, dtype=dtype, requires_grad=True)[:, 1:]
    rows = torch.zeros(2, L)
    options = {"tau": rows[0, 0], "patch_size": patch_size, "impl": "triton"}
    options["return_mse"] = return_mse
    loss = kernel.attg_loss(pred, target, rows.to(mask), rows, **options)
    (loss[0] if return_mse else loss).backward()


def main(name):
    if name not in TARGETS:
        print("null")
        return
    # Nothing is run, so tensors on the CPU will do.
    gpu = {"get_current_target": lambda: TARGETS[name]}
    gpu |= {"get_current_device": lambda: 0, "get_current_stream": lambda device: 0}
    driver.set_active(SimpleNamespace(**gpu))
    kernel._why_not_fused = lambda *tensors: ""
    kernel._triton()
    launches, rows, run = [], [], triton.JITFunction.run

    def record(jitted, *args, warmup, **named):
        compiled = partial(run, jitted, *args, warmup=True, **named)
        launches.append((jitted.__name__, compiled))

    triton.JITFunction.run = record

    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    imgs, patches = torch.empty(2, 3, 224, 224), torch.empty(2, 196, 768)
    cases = {
        "images": (196, 768, bf16, imgs, 16),
        "patches": (196, 768, fp32, patches, None, torch.bool, False),
        "bytes": (196, 768, bf16, imgs.byte(), 16),
        "small": (3136, 48, fp16, imgs.byte(), 4),
        "largest": (9, 12288, fp32, torch.empty(2, 3, 192, 192), 64),
    }
    for case, arguments in cases.items():
        if name != "sm_80" or case in ("images", "patches"):
            launches.clear()
            call(*arguments)
            rows += [facts(case, jitted, launch()) for jitted, launch in launches]

    # The check of spills must be able to fail: of 255 registers a thread on NVIDIA, 512 on
    # AMD.
    oversized = None
    if name != "sm_80":
        launches.clear()
        call(4, 23232, fp32, torch.empty(2, 3, 176, 176), 88)
        jitted, launch = launches[0]
        oversized = facts("", jitted, launch(num_warps=2 if name == "sm_90" else 1))
    print(json.dumps([rows, oversized, kernel._has_tuples()]))


if __name__ == "__main__":
    main(sys.argv[1])
