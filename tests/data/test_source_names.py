"""Metrics tell sources apart by short names."""

import pytest

from accel_llm.config.fields import Source
from accel_llm.data.source_names import short_names


@pytest.mark.parametrize(
    "places, names",
    [
        (["/data/a.txt", "/data/b.jsonl"], ["a.txt", "b.jsonl"]),
        (["/en/wiki.txt", "/zh/wiki.txt", "/zh/books.txt"], ["en/wiki.txt", "zh/wiki.txt", "zh/books.txt"]),
        (["a.txt", "a.txt"], ["a.txt (1)", "a.txt (2)"]),
        (["data/*.txt", "owner/name"], ["*.txt", "name"]),
        ([Source(path="owner/name", name="zh"), Source(path="owner/name")], ["name:zh", "name"]),
        ([Source(path="owner/name", split="validation"), Source(path="owner/name")], ["name:validation", "name"]),
        (["wiki.txt", "/a/wiki.txt"], ["wiki.txt", "a/wiki.txt"]),
        ([], []),
    ],
)
def test_names_are_short_and_differ(places, names):
    assert short_names(places) == names
