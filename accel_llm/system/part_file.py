"""A file of JSON lines that grows while a job is done, so that a job that was killed goes on where it was."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_MARK = "begun_with"  # the key of the first line


class PartFile:
    """The first line holds the settings that the job was begun with, each other line a value, in the order of `append`.

    A line counts once its line break is there. A half line, which a kill leaves at the end, is never read, and it is
    cut off before anything is appended.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file: BinaryIO | None = None

    def settings(self) -> dict[str, Any] | None:
        """Return the settings of the first line; None if there is no whole one.

        Raises:
            ValueError: the file is something else.
        """
        for _, value in self._lines():
            if not isinstance(value, dict) or value.keys() != {_MARK}:
                raise ValueError(f"{self.path} is no file of this kind")
            return value[_MARK]
        if self.path.exists() and self.path.stat().st_size and not self._is_half_settings():
            raise ValueError(f"{self.path} is no file of this kind")
        return None

    def begin(self, settings: dict[str, Any]) -> None:
        """Empty the file, and write the settings."""
        self._file = self.path.open("wb")
        self.append({_MARK: settings})

    def go_on(self) -> None:
        """Cut off what is not a whole line, and append from there."""
        end = max((end for end, _ in self._lines()), default=0)
        self._file = self.path.open("r+b")
        self._file.truncate(end)
        self._file.seek(end)

    def values(self) -> Iterator[Any]:
        """Yield the values of the whole lines."""
        for k, (_, value) in enumerate(self._lines()):
            if k:
                yield value

    def append(self, value: Any) -> None:
        """Write one line; when this returns, a kill cannot lose it."""
        assert self._file is not None
        self._file.write(json.dumps(value).encode("ascii") + b"\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _lines(self) -> Iterator[tuple[int, Any]]:
        """Yield (byte behind the line, value) for each whole line; what follows a broken one does not count."""
        if not self.path.exists():
            return
        end = 0
        with self.path.open("rb") as file:
            for line in file:
                try:
                    value = json.loads(line)
                except ValueError:  # a machine that lost its power may also leave zeros
                    return
                if not line.endswith(b"\n"):
                    return
                end += len(line)
                yield end, value

    def _is_half_settings(self) -> bool:
        """Tell whether the file holds nothing but a part of its first line."""
        with self.path.open("rb") as file:
            start = file.read(len(_MARK) + 4)
        return f'{{"{_MARK}":'.encode().startswith(start[: len(_MARK) + 4])
