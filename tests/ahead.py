"""
Compiles the kernels for GPUs that need not be there, and tells what became of them.

    python -m tests.ahead sm_90     # in a process without TRITON_INTERPRET; prints JSON

Prints [[launch, ...], a launch that is too large or null, whether images are read in
register groups], or null for a target that this Triton cannot compile for. A launch is a
dictionary: case, kernel, spills (bytes on NVIDIA, registers on AMD), barriers, and on
NVIDIA loads, {bytes that a thread loads at once: how often in the code}.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

kernel = importlib.import_module("attg.kernels.attg_loss")

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "sm_80": GPUTarget("cuda", 80, 32)}
OLD = not hasattr(triton.language, "tuple")  # Triton 3.2
# Older versions need ROCm's linker to compile for AMD.
NEWER = tuple(int(x) for x in triton.__version__.split(".")[:2]) >= (3, 6)
if "amd" in triton.backends.backends and NEWER:
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


def source_of(jitted, signature, constants, attributes):
    """What Triton compiles. Triton 3.2 wants it in another form."""
    if not OLD:
        return ASTSource(jitted, signature, constants, attributes)
    from triton.backends.compiler import AttrsDescriptor

    signature = {k: v for k, v in signature.items() if k not in constants}
    multiples = [i for (i,) in attributes]
    properties = {"tt.divisibility": multiples, "tt.equal_to": []}
    hints = {"arg_properties": properties, "cls": "AttrsDescriptor"}
    return ASTSource(jitted, signature, constants, AttrsDescriptor.from_dict(hints))


def compiled(target, jitted, warps, arguments):
    """A launch in the languages of the compiler, {"ptx": text, ...}.

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
    source = source_of(jitted, signature, constants, attributes)
    options = {"num_warps": warps}
    return triton.compile(source, target=TARGETS[target], options=options).asm


def facts(target, case, jitted, warps, arguments):
    """What the compiler made of a launch."""
    asm = compiled(target, jitted, warps, arguments)
    found = {"case": case, "kernel": jitted.__name__}
    if "amdgcn" in asm:
        spilled = re.search(r"vgpr_spill_count: *([0-9]+)", asm["amdgcn"])[1]
        found["spills"] = int(spilled)
        found["barriers"] = asm["amdgcn"].count("s_barrier")
        return found
    found["spills"] = stack(asm["cubin"])
    found["barriers"] = asm["ptx"].count("bar.sync")
    loads = {}
    for line in asm["ptx"].splitlines():
        load = re.search(r"\bld\.global\S*\.[bu](8|16|32|64)\b", line)
        if load:
            vector = re.search(r"\.v([24])\.", load[0])
            size = int(load[1]) // 8 * int(vector[1] if vector else 1)
            loads[size] = loads.get(size, 0) + 1
    found["loads"] = loads
    return found


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


def launch(pred, target, patch_size=None, mask=torch.float32):
    """A forward and a backward pass with everything switched on."""
    rows = torch.empty(2, pred.shape[1])
    tau = rows[0, 0]
    options = {"tau": tau, "patch_size": patch_size, "impl": "triton"}
    loss = kernel.attg_loss(pred, target, rows.to(mask), rows, **options)
    loss.backward()


def empty(*shape, dtype=torch.float32, grad=False):
    return torch.empty(shape, dtype=dtype, requires_grad=grad)


def predictions(L, P, dtype=torch.float32):
    """As MAE hands them over, without the class token."""
    return empty(2, L + 1, P, dtype=dtype, grad=True)[:, 1:]


def main(target):
    if target not in TARGETS:
        print("null")
        return
    # The launches are only taken down, so that tensors on the CPU do.
    kernel._why_not_fused = lambda *tensors: ""
    kernel._triton()
    launches = []
    for name in ("_forward_kernel", "_total_kernel", "_backward_kernel"):
        setattr(kernel, name, Recorder(getattr(kernel, name), launches))

    bf16, fp16 = torch.bfloat16, torch.float16
    imgs = empty(2, 3, 224, 224)
    cases = {
        "images": (predictions(196, 768, bf16), imgs, 16),
        "patches": (predictions(196, 768), empty(2, 196, 768), None, torch.bool),
        "bytes": (predictions(196, 768, bf16), imgs.to(torch.uint8), 16),
        "small": (predictions(3136, 48, fp16), imgs.to(torch.uint8), 4),
        "largest": (predictions(9, 12288), empty(2, 3, 192, 192), 64),
    }
    found = []
    for case, arguments in cases.items():
        if target != "sm_80" or case in ("images", "patches"):
            launches.clear()
            launch(*arguments)
            found += [facts(target, case, *recorded) for recorded in launches]

    # The last and largest case by so few warps takes more registers than there are: a
    # thread has 255 on NVIDIA, 512 on AMD.
    too_few = {"sm_90": 2, "gfx942": 1}
    oversized = None
    if target in too_few:
        jitted, _, values = launches[0]
        oversized = facts(target, "oversized", jitted, too_few[target], values)
    print(json.dumps([found, oversized, not OLD]))


if __name__ == "__main__":
    main(sys.argv[1])
