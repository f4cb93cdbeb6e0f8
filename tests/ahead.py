"""
Compiles the kernels for GPUs that need not be present, and reports what they use.

    python -m tests.ahead sm_90     # in a process without TRITON_INTERPRET; prints JSON

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
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

kernel = importlib.import_module("attg.kernels.attg_loss")

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TYPES |= {torch.uint8: "*u8", torch.bool: "*i1"}
TARGETS = {"sm_90": GPUTarget("cuda", 90, 32), "sm_80": GPUTarget("cuda", 80, 32)}
OLD = not hasattr(triton.language, "tuple")  # Triton 3.2
# Older versions need ROCm's linker to compile for AMD.
NEW = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
if "amd" in triton.backends.backends and NEW:
    TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)


class Recorder:
    """Stands in for a jitted kernel and records how it would be launched."""

    def __init__(self, jitted, launches):
        self.jitted, self.launches = jitted, launches

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps, **named):
        values = dict(zip(self.jitted.arg_names, args, strict=False)) | named
        arguments = {name: values[name] for name in self.jitted.arg_names}
        self.launches.append((self.jitted, num_warps, arguments))


def source_of(jitted, signature, constants, multiples):
    """Return what Triton compiles. Triton 3.2 takes it in another form."""
    if not OLD:
        attributes = {(i,): [["tt.divisibility", 16]] for i in multiples}
        return ASTSource(jitted, signature, constants, attributes)
    from triton.backends.compiler import AttrsDescriptor

    signature = {k: v for k, v in signature.items() if k not in constants}
    properties = {"tt.divisibility": multiples, "tt.equal_to": []}
    hints = {"arg_properties": properties, "cls": "AttrsDescriptor"}
    return ASTSource(jitted, signature, constants, AttrsDescriptor.from_dict(hints))


def compiled(target, jitted, warps, arguments):
    """Compile a launch; return its code in the compiler's languages, {"ptx": text, ...}.

    Specialized as by Triton's launcher: 1 and None are constants, and pointers and the
    integers that 16 divides are known to be multiples of it.
    """
    signature, constants, multiples = {}, {}, []
    for i, (name, x) in enumerate(arguments.items()):
        if jitted.params[i].is_constexpr or x is None or type(x) is int and x == 1:
            signature[name], constants[name] = "constexpr", x
        elif isinstance(x, torch.Tensor):
            signature[name] = TYPES[x.dtype]
            multiples.append(i)
        elif type(x) is float:
            signature[name] = "fp32"
        else:
            signature[name] = "i32"
            if x % 16 == 0:
                multiples.append(i)
    source = source_of(jitted, signature, constants, multiples)
    options = {"num_warps": warps}
    return triton.compile(source, target=TARGETS[target], options=options).asm


def facts(target, case, jitted, warps, arguments):
    """Return what the compiler made of a launch."""
    asm = compiled(target, jitted, warps, arguments)
    row = {"case": case, "kernel": jitted.__name__}
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
        command = [tool, "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:([0-9]+)", done.stdout)[1])


def launch(L, P, dtype, target, patch_size=None, mask=torch.float32, return_mse=True):
    """Call forward and backward with every feature in use.

    pred is as MAE passes it, without the class token.
    """
    pred = torch.empty(2, L + 1, P, dtype=dtype, requires_grad=True)[:, 1:]
    rows = torch.empty(2, L)
    options = {"tau": rows[0, 0], "patch_size": patch_size, "impl": "triton"}
    options["return_mse"] = return_mse
    loss = kernel.attg_loss(pred, target, rows.to(mask), rows, **options)
    (loss[0] if return_mse else loss).backward()


def main(target):
    if target not in TARGETS:
        print("null")
        return
    # Launches are only recorded, so tensors on the CPU will do.
    kernel._why_not_fused = lambda *tensors: ""
    kernel._triton()
    launches = []
    for name in ("_forward_kernel", "_total_kernel", "_backward_kernel"):
        setattr(kernel, name, Recorder(getattr(kernel, name), launches))

    fp32, bf16, fp16 = torch.float32, torch.bfloat16, torch.float16
    imgs, patches = torch.empty(2, 3, 224, 224), torch.empty(2, 196, 768)
    cases = {
        "images": (196, 768, bf16, imgs, 16),
        "patches": (196, 768, fp32, patches, None, torch.bool, False),
        "bytes": (196, 768, bf16, imgs.byte(), 16),
        "small": (3136, 48, fp16, imgs.byte(), 4),
        "largest": (9, 12288, fp32, torch.empty(2, 3, 192, 192), 64),
    }
    rows = []
    for case, arguments in cases.items():
        if target != "sm_80" or case in ("images", "patches"):
            launches.clear()
            launch(*arguments)
            rows += [facts(target, case, *recorded) for recorded in launches]

    # With so few warps the last and largest case needs more registers than exist: a
    # thread has 255 on NVIDIA, 512 on AMD.
    too_few = {"sm_90": 2, "gfx942": 1}
    oversized = None
    if target in too_few:
        jitted, _, values = launches[0]
        oversized = facts(target, "oversized", jitted, too_few[target], values)
    print(json.dumps([rows, oversized, not OLD]))


if __name__ == "__main__":
    main(sys.argv[1])
