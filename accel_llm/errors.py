"""The two mistakes a person can make, and how a script ends by them, by a signal or by a bug: one cause, told by one rank."""


class ConfigError(Exception):
    """Settings that cannot work. `problems` holds one sentence each: the field, its value, what is allowed."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class DataError(Exception):
    """A row or file that cannot be used: the file, the row, the field, what was found and what is allowed.

    `reason` says what is wrong in a few words that are the same for all rows with this fault, to count them by.
    """

    def __init__(self, message: str, reason: str = "not usable"):
        super().__init__(message)
        self.reason = reason


def raise_problems(problems: list[str]) -> None:
    """Raises ConfigError with all of `problems` at once, if there are any."""
    if problems:
        raise ConfigError(*problems)
