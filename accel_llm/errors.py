"""The two errors that a user can cause: wrong settings (`ConfigError`) and unusable data (`DataError`)."""


class ConfigError(Exception):
    """Settings that cannot work. Each of `problems` is one sentence: the option, its value and the remedy."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class DataError(Exception):
    """A row or file that cannot be used. The message names the file, the row, the field, its value and what is allowed.

    `reason` is a short description that is the same for all rows with this fault, so that they can be counted.
    """

    def __init__(self, message: str, reason: str = "not usable"):
        super().__init__(message)
        self.reason = reason


def raise_problems(problems: list[str]) -> None:
    """Raise one ConfigError with all `problems`; do nothing if the list is empty."""
    if problems:
        raise ConfigError(*problems)
