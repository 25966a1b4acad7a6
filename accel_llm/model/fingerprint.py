"""A model folder's weights and config as a few digits: the same wherever the folder lies, another for another model."""

import hashlib
import json
from pathlib import Path

from transformers.utils.hub import cached_file

SAMPLE_BYTES = 1024  # bytes read of each tensor
MAX_SAMPLES = 4096  # tensors of a file that are looked at
MAX_HEADER_BYTES = 2**27  # bytes


def model_fingerprint(name: str, revision: str = "main") -> str:
    """16 hexadecimal digits of a model folder or a hub id that has been loaded.

    They follow from the config, from the names, shapes and dtypes of all weights and from a kilobyte out of the middle of
    each: two models of one shape differ there, and tens of gigabytes need not be read.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = Path(str(cached_file(name, "config.json", revision=revision))).parent
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name == "config.json":
            digest.update(_config(path))
        elif path.suffix == ".safetensors":
            _add_safetensors(digest, path)
        elif path.suffix == ".bin":
            _add_sampled(digest, path, 0, path.stat().st_size, 64)
    return digest.hexdigest()[:16]


def _config(path: Path) -> bytes:
    """Without what says only who wrote it."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    about = {"_name_or_path", "transformers_version"}
    return json.dumps({key: value for key, value in settings.items() if key not in about}, sort_keys=True).encode()


def _add_safetensors(digest: "hashlib._Hash", path: Path) -> None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, MAX_HEADER_BYTES))
        digest.update(text)
        try:
            spans = [about["data_offsets"] for name, about in json.loads(text).items() if name != "__metadata__"]
        except ValueError:  # for whoever loads it to say
            return
        spans.sort()
        for start, stop in spans[:: -(-len(spans) // MAX_SAMPLES) or 1]:
            file.seek(8 + length + start + max(0, (stop - start - SAMPLE_BYTES) // 2))
            digest.update(file.read(min(SAMPLE_BYTES, stop - start)))


def _add_sampled(digest: "hashlib._Hash", path: Path, start: int, stop: int, count: int) -> None:
    digest.update(str(stop - start).encode())
    with path.open("rb") as file:
        for k in range(count):
            file.seek(start + (stop - start) * k // count)
            digest.update(file.read(SAMPLE_BYTES))
