"""
Compiles the kernels for GPUs that need not be there, and counts what they spill.

    python -m tests.ahead        # in a process without TRITON_INTERPRET; prints JSON

Prints [{target: [spills of a launch, ...]}, {target: spills of a kernel far too large}].
"""

import importlib
import json
import os
import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

kernel = importlib.import_module("kernels.attg_loss")

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "sm_80": GPUTarget("cuda", 80, 32)}
if "amd" in triton.backends.backends:
    TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)


class Recorder:
    """Stands in for a jitted kernel: takes down how it would be launched."""

    def __init__(self, jitted, launches):
        self.jitted, self.launches = jitted, launches

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps, **named):
        values = dict(zip(self.jitted.arg_names, args, strict=False)) | named
        arguments = {name: values[name] for name in self.jitted.arg_names}
        self.launches.append((self.jitted, num_warps, arguments))


def spills(target, jitted, warps, arguments):
    """Bytes (NVIDIA) or registers (AMD) that a launch spills.

    Specialised as by Triton's launcher: 1 and None are constants, and pointers and the
    integers that 16 divides are known to be multiples of it.
    """
    signature, constants, attributes = {}, {}, {}
    for i, (name, x) in enumerate(arguments.items()):
        one = type(x) is int and x == 1
        if jitted.params[i].is_constexpr or x is None or one:
            signature[name], constants[name] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            signature[name] = TYPES[x.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif type(x) is float:
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if x % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(jitted, signature, constants, attributes)
    options = {"num_warps": warps}
    asm = triton.compile(source, target=TARGETS[target], options=options).asm
    if "amdgcn" in asm:
        return int(re.search(r"vgpr_spill_count: *([0-9]+)", asm["amdgcn"])[1])
    return stack(asm["cubin"])


def stack(cubin):
    """Bytes of stack that a kernel uses, as cuobjdump tells, which Triton brings."""
    folder = os.path.dirname(triton.__file__)
    tool = os.path.join(folder, "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:([0-9]+)", done.stdout)[1])


def launch(pred, target, patch_size, mask=torch.float32):
    """A forward and a backward pass with everything switched on."""
    rows = torch.empty(2, pred.shape[1])
    mask = rows.to(mask)
    tau = rows[0, 0]
    kernel._launch_forward(
        pred, target, mask, rows, tau, rows, rows, True, 1e-6, patch_size, True
    )
    kernel._launch_backward(pred, target, mask, rows, rows, pred, patch_size)


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype)


def main():
    kernel._triton()
    launches = []
    for name in ("_forward_kernel", "_backward_kernel"):
        setattr(kernel, name, Recorder(getattr(kernel, name), launches))

    bf16, fp16 = torch.bfloat16, torch.float16
    imgs = empty(2, 3, 224, 224)
    launch(empty(2, 197, 768, dtype=bf16)[:, 1:], imgs, 16)
    launch(empty(2, 197, 768)[:, 1:], empty(2, 196, 768), 0, torch.bool)
    launch(empty(2, 3137, 48, dtype=fp16)[:, 1:], imgs.to(torch.uint8), 4)
    # the largest tile
    launch(empty(2, 10, 12288)[:, 1:], empty(2, 3, 192, 192), 64)
    found = {}
    for target in TARGETS:
        some = launches[:2] if target == "sm_80" else launches
        found[target] = [spills(target, *each) for each in some]

    launches.clear()
    kernel.TILE = 2**16
    launch(empty(2, 197, 768, dtype=bf16)[:, 1:], imgs, 16)
    oversized = {}
    for target in TARGETS:
        if target != "sm_80":
            oversized[target] = spills(target, *launches[0])
    print(json.dumps([found, oversized]))


if __name__ == "__main__":
    main()
