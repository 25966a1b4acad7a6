"""The hash that names content."""

import hashlib
from pathlib import Path


def data_fingerprint(*parts: object) -> str:
    """Hash `parts` to a name of 24 characters. A Path counts as the content of its file, other parts as their repr."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
        else:
            digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:24]
