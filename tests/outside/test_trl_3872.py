"""trl 3872: an output folder that cannot be written is a PermissionError, after the model and the data were loaded.

It must be one sentence, before anything is loaded: here the model does not even exist, and both are told.
"""

from pathlib import Path

import pytest

from accel_llm.errors import ConfigError


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("file/output", "cannot be created, because {folder}/file is a file"),
        ("file", "is a file"),
        ("link/output", "does not exist, because {folder}/link is a symbolic link to nowhere, which does not exist"),
        ("/proc/output", "cannot be written: No such file or directory"),  # not even root can write there
    ],
)
def test_an_output_folder_is_tried_before_anything_is_loaded(script, chats, tmp_path, place: str, reason: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    output = tmp_path / place
    with pytest.raises(ConfigError) as error:
        script("sft", "--model_name_or_path", tmp_path / "none", "--train_files", chats, "--output_dir", output)
    sentence = f"output_dir: {output} {reason.format(folder=tmp_path)}; name another folder."
    assert error.value.problems[-1] == sentence and error.value.problems[0].startswith("model_name_or_path: ")
    with pytest.raises(ConfigError) as error:
        script("extract", "--base", chats.parent, "--model", chats.parent, "--output_dir", output / "adapter")
    assert str(error.value).startswith("output_dir: ") and str(error.value).endswith("; name another folder.")


def test_a_cache_folder_is_tried_too(script, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("accel_llm.data.rows.HF_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("accel_llm.data.rows.cache_folder", lambda options: Path(tmp_path / "file" / "accel_llm"))
    with pytest.raises(
        ConfigError, match=r"cache_dir: the folder for encoded rows, .*/file/accel_llm, cannot be created"
    ):
        script("sft", "--output_dir", tmp_path / "output")
