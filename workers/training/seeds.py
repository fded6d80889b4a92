"""Seeds of what happens by chance in a training, each for itself, so that a step draws the same whenever it is made."""

from __future__ import annotations

import hashlib


def seed_of(*parts: int | str) -> int:
    """A seed for torch that hangs on all ``parts``, and hardly ever on no others (63 bits)."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1
