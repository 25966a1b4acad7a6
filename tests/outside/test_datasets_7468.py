"""A folder of data with brackets in its name was read as a pattern, and its files were not found.

The right rows are those of the file; a pattern inside such a folder matches as in any other folder.
"""

import json

import pytest

from accel_llm.config.fields import Source
from accel_llm.data.sources import read_source


@pytest.mark.parametrize("name", ["[D_DATA]", "a*b", "what?", "[ab]"])
@pytest.mark.parametrize("form", ["{}", "{}/koch", "{}/koch/data.jsonl", "{}/*/data.jsonl", "{}/**/d*.jsonl"])
def test_a_folder_is_no_pattern(tmp_path, name, form):
    for folder, text in ((name, "right"), ("a", "wrong"), ("axb", "wrong")):
        file = tmp_path / folder / "koch" / "data.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    path = str(tmp_path / form.format(name))
    assert [row.fields["text"] for row in read_source(Source(path=path))] == ["right"]
