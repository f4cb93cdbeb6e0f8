"""Random numbers as a function of what they depend on; no generator state is kept."""

import hashlib

import torch

# -- Random numbers --------------------------------------------------------------------


def seed_for(*words):
    """A 64-bit seed mixed from ints and strings, the same on every machine.

    The first word keeps the streams apart: "crop", "order", "masks" ...
    """
    plain = []
    for word in words:
        # Numbers of NumPy and torch are written differently from Python's.
        plain.append(word if isinstance(word, str) else int(word))
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def generator_for(*words):
    """A torch.Generator on the CPU, seeded with seed_for(*words)."""
    return torch.Generator().manual_seed(seed_for(*words))
