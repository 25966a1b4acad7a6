"""A damaged folder is recognized; a folder appears and disappears by one rename."""

import json
import shutil
from pathlib import Path

import pytest
from support import spoil

from accel_llm.checkpoint.resume import newest_checkpoint
from accel_llm.system.disk import sha256
from accel_llm.system.manifest import find_damage, find_parts, remove_folder, seal_folder, write_part

FILES = {"state.json": b'{"step": 3}', "rank-00000.safetensors": bytes(range(256)) * 4, "rank-00001.json": b"{}"}


def write(folder: Path) -> Path:
    """Write a folder as two processes do."""
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True)
    for name, content in FILES.items():
        (partial / name).write_bytes(content)
    sizes_and_hashes = {name: ((partial / name).stat().st_size, sha256(partial / name)) for name in FILES}
    write_part(partial, 1, {"rank-00001.json": sizes_and_hashes.pop("rank-00001.json")})
    assert find_parts(partial, 2) is None
    write_part(partial, 0, sizes_and_hashes)
    parts = find_parts(partial, 2)
    assert parts is not None and not folder.exists()
    seal_folder(partial, folder, parts)
    return folder


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    for step in (3, 6):
        write(tmp_path / "checkpoints" / f"step-{step:08d}")
    return tmp_path / "checkpoints"


def test_a_sealed_folder_holds_only_its_files_and_the_manifest(checkpoints: Path) -> None:
    folder = checkpoints / "step-00000006"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "manifest.json"])
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000003", "step-00000006"]
    assert find_damage(folder) is None and newest_checkpoint(checkpoints, find_damage) == folder


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "truncated", "flipped", "a folder"])
def test_a_damaged_file_is_named_and_an_older_checkpoint_taken(checkpoints: Path, capsys, name: str, how: str) -> None:
    folder = checkpoints / "step-00000006"
    spoil(folder / name, how)
    problem = f"lacks {name}" if how in ("missing", "a folder") else f"has a damaged {name}"
    assert find_damage(folder) == problem
    assert newest_checkpoint(checkpoints, find_damage) == checkpoints / "step-00000003"
    assert capsys.readouterr().out == f"checkpoint {folder} {problem}; taking an older one\n"


def test_processes_share_the_reading_and_all_know_the_result(checkpoints: Path) -> None:
    folder = checkpoints / "step-00000006"
    spoil(folder / "rank-00001.json", "flipped")
    codes: list[list[float]] = []
    for rank in range(2):
        find_damage(folder, rank, 2, lambda values: codes.append(values) or values)
    sums = [sum(column) for column in zip(*codes, strict=True)]
    assert sorted(map(sum, codes))[0] == 0.0  # one of them saw no damage
    for rank in range(2):
        assert find_damage(folder, rank, 2, lambda _: sums) == "has a damaged rank-00001.json"


def test_without_a_whole_manifest_a_folder_is_no_checkpoint(checkpoints: Path) -> None:
    (checkpoints / "step-00000006" / "manifest.json").unlink()
    assert find_damage(checkpoints / "step-00000006") == "is not a whole checkpoint (no manifest.json)"
    path = checkpoints / "step-00000003" / "manifest.json"
    for content in (
        '{"state.json": [1',
        "[]",
        "{}",
        '{"state.json": 1}',
        '{"../secret": [1, "a"]}',
        '{"/etc/passwd": [1, "a"]}',
    ):
        path.write_text(content, encoding="utf-8")
        assert find_damage(path.parent) == "has a damaged manifest.json"
    assert newest_checkpoint(checkpoints, find_damage) is None
    assert find_damage(checkpoints / "step-00000009") == "does not exist"


def test_a_removed_folder_loses_its_name_first(checkpoints: Path, monkeypatch) -> None:
    folder = checkpoints / "step-00000003"
    rmtree = shutil.rmtree

    def interrupted(path: Path, **settings: bool) -> None:
        if path.exists():
            assert not folder.exists() and find_damage(path) is None
            raise KeyboardInterrupt
        rmtree(path, **settings)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(folder)
    assert newest_checkpoint(checkpoints, find_damage) == checkpoints / "step-00000006"
    assert json.loads((checkpoints / "step-00000006" / "state.json").read_text()) == {"step": 3}
