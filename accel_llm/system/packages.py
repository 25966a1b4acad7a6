"""The oldest releases of other packages with which this project works."""

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from accel_llm.errors import ConfigError

# As in pyproject.toml. With older ones some things work, and others end in an AttributeError or compute something else.
OLDEST = {"torch": "2.10", "transformers": "5.23", "accelerate": "1.15", "peft": "0.21", "bitsandbytes": "0.50"}


def check_packages() -> None:
    """Check that no package is older than this project needs; one without metadata is taken as it is.

    Raises:
        ConfigError: a package is too old.
    """
    problems = []
    for name, oldest in OLDEST.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue
        if Version(installed) < Version(oldest):
            problems.append(
                f"{name}: {installed} is installed, but {oldest} or newer is needed; run pip install '{name}>={oldest}'."
            )
    if problems:
        raise ConfigError(*problems)
