"""Most files of a data folder were links whose target was not mounted. They were left out without a word, and the run
went on with the rest.

What is right is what the disk says: the folder has two files, and one of them cannot be read. So the run must stop.
"""

import json

import pytest

from accel_llm.config.data_options import DataOptions
from accel_llm.data.sources import source_problems


@pytest.mark.parametrize("form", ["{}", "{}/*.jsonl", "{}/**/*.jsonl"])
def test_a_link_without_its_target_stops_the_run(tmp_path, form):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}) + "\n", encoding="utf-8")
    options = DataOptions(train_files=[form.format(tmp_path)])
    assert source_problems(options) == []
    (tmp_path / "b.jsonl").symlink_to("/host/only/b.jsonl")
    assert source_problems(options) == [
        f"train_files: {form.format(tmp_path)}: its file {tmp_path / 'b.jsonl'} is a symbolic link to /host/only/b.jsonl, "
        "which does not exist; repair or remove it."
    ]
