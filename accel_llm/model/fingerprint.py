"""A short fingerprint of a model's weights and config: it does not depend on where the folder is."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

from transformers.utils.hub import cached_file

from accel_llm.system.tensors import read_header

SAMPLE_BYTES = 1024  # bytes read of each tensor
MAX_SAMPLES = 4096  # at most so many tensors of a file are read
PICKLE_SAMPLES = 64  # a .bin file is sampled at so many places


def model_fingerprint(name: str, revision: str = "main", whole: bool = False) -> str:
    """Return 16 hexadecimal digits for a model folder, or for a hub id that is already in the local cache.

    The fingerprint covers the config, the names, shapes and dtypes of all weights, and one kilobyte from the middle of
    each tensor. That is enough to tell two models of one shape apart without reading tens of gigabytes. With `whole` it
    covers all bytes of the weights, for numbers that are kept: two models may differ in a few rows of an embedding.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(str(cached_file(name, "config.json", revision=revision))).parent
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name == "config.json":
            digest.update(_config_bytes(path))
        elif whole and path.suffix in (".safetensors", ".bin"):
            status = path.stat()
            digest.update(_hash_file(path.resolve(), status.st_size, status.st_mtime_ns))
        elif path.suffix == ".safetensors":
            _add_safetensors(digest, path)
        elif path.suffix == ".bin":
            _add_samples(digest, path, 0, path.stat().st_size, PICKLE_SAMPLES)
    return digest.hexdigest()[:16]


@lru_cache(maxsize=256)
def _hash_file(path: Path, size: int, changed: int) -> bytes:
    """Hash all bytes of a file, about a gigabyte a second; once, until its `size` or time of change is another."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.digest()


def _config_bytes(path: Path) -> bytes:
    """Return the config as sorted JSON, without the keys that only say who wrote the file."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    ignored_keys = {"_name_or_path", "transformers_version"}
    settings = {key: value for key, value in settings.items() if key not in ignored_keys}
    return json.dumps(settings, sort_keys=True).encode()


def _add_safetensors(digest: "hashlib._Hash", path: Path) -> None:
    with path.open("rb") as file:
        # The header holds the names, shapes, dtypes and byte ranges of all tensors.
        header, first = read_header(file)
        digest.update(header)
        try:
            entries = json.loads(header).items()
            spans = [entry["data_offsets"] for name, entry in entries if name != "__metadata__"]
        except ValueError:  # the header is broken; loading the model will report it
            return

        # One sample from the middle of each tensor, or of every n-th where there are very many.
        spans.sort()
        for start, stop in spans[:: -(-len(spans) // MAX_SAMPLES) or 1]:
            file.seek(first + start + max(0, (stop - start - SAMPLE_BYTES) // 2))
            digest.update(file.read(min(SAMPLE_BYTES, stop - start)))


def _add_samples(digest: "hashlib._Hash", path: Path, start: int, stop: int, count: int) -> None:
    digest.update(str(stop - start).encode())
    with path.open("rb") as file:
        for k in range(count):
            file.seek(start + (stop - start) * k // count)
            digest.update(file.read(SAMPLE_BYTES))
