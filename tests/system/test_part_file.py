"""A file that was cut anywhere goes on with its whole lines."""

import pytest

from accel_llm.system.part_file import PartFile


def test_whatever_a_kill_leaves_whole_lines_are_kept(tmp_path):
    """Each length that a file of three lines can be cut to, with zeros behind it or without, as after a lost power."""
    whole = PartFile(tmp_path / "whole")
    whole.begin({"seed": 1})
    values = [{"a": "é\n"}, [1, 2]]
    for value in values:
        whole.append(value)
    whole.close()
    content = whole.path.read_bytes()
    ends = [k + 1 for k, byte in enumerate(content) if byte == 10]
    for length in range(len(content) + 1):
        for rest in (b"", bytes(5)):
            path = tmp_path / "cut"
            path.write_bytes(content[:length] + rest)
            part, kept = PartFile(path), sum(end <= length for end in ends)
            if kept == 0:
                assert rest or part.settings() is None
                continue
            assert part.settings() == {"seed": 1} and list(part.values()) == values[: kept - 1]
            part.go_on()
            part.append("new")
            part.close()
            assert list(part.values()) == [*values[: kept - 1], "new"]
            assert path.read_bytes() == content[: ends[kept - 1]] + b'"new"\n'


@pytest.mark.parametrize("content", ["one\ntwo\n", '{"seed": 1}\n', "x", "[]\n"])
def test_a_file_of_another_kind_is_not_touched(tmp_path, content):
    path = tmp_path / "notes.part"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="no file of this kind"):
        PartFile(path).settings()
    assert path.read_text(encoding="utf-8") == content
