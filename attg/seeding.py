"""Random numbers as functions of what they depend on, without generator state to save."""

import hashlib

import torch


def seed_for(*parts):
    """64-bit seed hashed from ints and strings, the same on every machine.

    The first part names the stream: "crop", "order", "masks" ...
    """
    # NumPy's and torch's integers have another repr than Python's.
    plain = [part if isinstance(part, str) else int(part) for part in parts]
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def generator_for(*parts):
    """A torch.Generator on the CPU, seeded with seed_for(*parts)."""
    return torch.Generator().manual_seed(seed_for(*parts))
