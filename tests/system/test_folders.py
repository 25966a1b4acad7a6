"""A folder appears complete, or the old one stays as it was."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from accel_llm.errors import ConfigError
from accel_llm.system import folders
from accel_llm.system.folders import atomic_folder, atomic_output, check_output_dir


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(target: Path, text: str) -> None:
    with atomic_folder(target) as partial:
        assert not (target / "new").exists()
        (partial / "new").write_text(text)


def test_a_folder_appears_when_the_block_has_ended(tmp_path):
    target = tmp_path / "a" / "b"
    write(target, "1")
    assert names(target.parent) == ["b"] and (target / "new").read_text() == "1"
    (target / "other").touch()
    with atomic_folder(target) as partial:
        (partial / "new").write_text("2")
        assert (target / "new").read_text() == "1"
    assert names(target.parent) == ["b"] and names(target) == ["new"] and (target / "new").read_text() == "2"


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_a_failed_block_leaves_nothing(tmp_path, error):
    target = tmp_path / "target"
    for before in ([], ["target"]):
        with pytest.raises(error), atomic_folder(target) as partial:
            (partial / "new").touch()
            raise error
        assert names(tmp_path) == before
        target.mkdir(exist_ok=True)


def test_sigterm_ends_the_block_and_removes_its_files(tmp_path):
    program = f"""
import os, pathlib, signal, time
from accel_llm.system.folders import atomic_output
with atomic_output(pathlib.Path({str(tmp_path / "target")!r})) as partial:
    (partial / "new").touch()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (result.returncode, result.stderr) == (143, b"") and names(tmp_path) == []


def test_a_full_disk_is_reported_in_one_sentence(tmp_path):
    with (
        pytest.raises(
            ConfigError, match=r"^output_dir: .*target could not be written: No space left on device; make room"
        ),
        atomic_output(tmp_path / "target"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), atomic_output(tmp_path / "target"):
        raise PermissionError(errno.EACCES, "Permission denied")
    assert names(tmp_path) == []


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    target, partial, old = (tmp_path / name for name in ("target", ".target.partial", ".target.old"))
    for folder in (partial, old):
        folder.mkdir()
        (folder / "half").touch()
    write(target, "1")
    assert names(tmp_path) == ["target"]
    # Killed between the two renames: the earlier model is put back before anything else is done.
    target.rename(old)
    with pytest.raises(ValueError, match="no"), atomic_folder(target):
        assert (target / "new").read_text() == "1"
        raise ValueError("no")
    assert names(tmp_path) == ["target"] and (target / "new").read_text() == "1"


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path):
    target, base = tmp_path / "target", tmp_path / "target" / "base"
    check_output_dir(target, [], False, "config.json")
    target.touch()
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        check_output_dir(target, [], True, "config.json")
    target.unlink()
    base.mkdir(parents=True)
    with pytest.raises(ConfigError, match="holds the base that is read; name another folder"):
        check_output_dir(target, [("base", base)], True, "config.json")
    with pytest.raises(ConfigError, match="is not empty; name another folder, or set overwrite_output_dir"):
        check_output_dir(target, [], False, "config.json")
    with pytest.raises(ConfigError, match="holds files that are not an adapter"):
        check_output_dir(target, [], True, "adapter_config.json")
    (target / "config.json").touch()
    check_output_dir(target, [], True, "config.json")


@pytest.mark.parametrize("call", ["sync", "rename"])
def test_a_disk_that_fails_at_the_end_leaves_the_earlier_folder(tmp_path, monkeypatch, call):
    target = tmp_path / "target"
    write(target, "1")
    sync, rename = folders.sync_to_disk, Path.rename

    def fail(path: Path, *other: Path) -> None:
        if path == tmp_path / ".target.partial":
            raise OSError(errno.EIO, "Input/output error")
        (sync if call == "sync" else rename)(path, *other)

    if call == "sync":
        monkeypatch.setattr(folders, "sync_to_disk", fail)
    else:
        monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"), atomic_folder(target) as partial:
        (partial / "new").write_text("2")
    assert names(tmp_path) == ["target"] and (target / "new").read_text() == "1"
