"""Any range of elements can be read from saved ranges; missing elements are reported."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from accel_llm.checkpoint.pieces import Piece, PieceReader, Share
from accel_llm.errors import ConfigError
from accel_llm.system.disk import sha256
from accel_llm.system.tensors import DTYPE_NAMES, find_nonfinite, write_tensors

WEIGHTS = torch.arange(24, dtype=torch.float32) / 7


def test_a_written_file_is_a_safetensors_file_with_the_returned_hash(tmp_path: Path) -> None:
    kinds = [dtype for dtype in DTYPE_NAMES if dtype.is_floating_point]
    tensors = {f"a.{k}|weight|0": WEIGHTS.to(dtype) for k, dtype in enumerate(kinds)}
    tensors |= {
        "b|mask|whole": torch.tensor([[True, False, True]]),
        "b|state1|5": torch.arange(9, dtype=torch.uint8)[2:7],
    }
    tensors |= {"c|weight|0": WEIGHTS.view(4, 6).T, "d|weight|0": torch.zeros(0)}
    size, digest = write_tensors(tmp_path / "a.safetensors", tensors)
    assert (size, digest) == ((tmp_path / "a.safetensors").stat().st_size, sha256(tmp_path / "a.safetensors"))
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


def open_reader(folder: Path, cuts: list[int]) -> PieceReader:
    """`WEIGHTS` as written by several processes, cut at `cuts`."""
    bounds = [0, *cuts, len(WEIGHTS)]
    for rank, (start, stop) in enumerate(pairwise(bounds)):
        save_file({f"w|weight|{start}": WEIGHTS[start:stop].clone()}, folder / f"rank-{rank:05d}.safetensors")
    return PieceReader(folder, sorted(folder.glob("*.safetensors")), {"w|step": 3}, ["w|weight|0"])


@pytest.mark.parametrize("cuts", [[], [12], [5, 6, 20]])
def test_any_range_can_be_read_from_any_split(tmp_path: Path, cuts: list[int]) -> None:
    reader = open_reader(tmp_path, cuts)
    assert reader.parameter_sizes() == {"w": 24}
    for start in range(24):
        for size in range(1, 25 - start):
            flat = torch.full((30,), -1.0)
            reader.fill(Piece("w", start, 3, size), "weight", flat)
            assert torch.equal(flat[3 : 3 + size], WEIGHTS[start : start + size])
            assert (flat[:3] == -1).all() and (flat[3 + size :] == -1).all()


def test_fields_keep_their_order(tmp_path: Path) -> None:
    """A resumed run writes the same bytes as one that was never stopped."""
    names = ["momentum", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg", "a", "z", "weight"]
    write_tensors(tmp_path / "a.safetensors", {f"w|{name}|0": WEIGHTS for name in names})
    reader = PieceReader(tmp_path, [tmp_path / "a.safetensors"], {}, [])
    assert reader.fields(Share("w", WEIGHTS, WEIGHTS, [Piece("w", 0, 0, 24)])) == names[:-1]


def test_missing_elements_and_other_dtypes_are_reported(tmp_path: Path) -> None:
    reader = open_reader(tmp_path, [12])
    with pytest.raises(ConfigError, match=r"holds 4 of 6 elements of w \(weight\)\.$"):
        reader.fill(Piece("w", 20, 0, 6), "weight", torch.zeros(6))
    with pytest.raises(ConfigError, match=r"holds 0 of 2 elements of v \(exp_avg\)"):
        reader.fill(Piece("v", 0, 0, 2), "exp_avg", torch.zeros(2))
    with pytest.raises(ConfigError, match=r"has w \(weight\) in torch.float32, not torch.bfloat16"):
        reader.fill(Piece("w", 0, 0, 2), "weight", torch.zeros(2, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        (2**62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (14).to_bytes(8, "little") + b'{"a|b|0":{"c"}',
        (7).to_bytes(8, "little") + b'{"a":1}',
    ],
)
def test_other_files_than_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rank-00000.safetensors"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is not a safetensors file"):
        PieceReader(tmp_path, [path], {}, [])


def test_tensors_with_nan_or_infinity_are_named() -> None:
    tensors = {"a": torch.ones(3), "b": torch.tensor([1.0, float("nan")]), "c": torch.tensor([-float("inf")])}
    tensors |= {
        "d": torch.arange(3),
        "e": torch.zeros(0),
        "f": torch.tensor([3.4e38, 3.4e38]),
        "g": tensors["b"].bfloat16(),
    }
    assert find_nonfinite(tensors) == ["b", "c", "g"]
