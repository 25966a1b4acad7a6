"""A package that is too old is named at the start, and not by a traceback of a library."""

import re
from pathlib import Path

import pytest

from accel_llm.errors import ConfigError
from accel_llm.system import packages
from accel_llm.system.packages import OLDEST, check_packages


def test_the_oldest_releases_are_those_of_the_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    needed = dict(re.findall(r'^    "([a-z]+)>=([\d.]+)', text, re.M))
    assert {name: needed[name] for name in OLDEST} == OLDEST
    check_packages()


def test_one_sentence_names_an_old_package(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"transformers": "5.17.0", "torch": "2.13.0+cpu"}
    monkeypatch.setattr(packages, "version", lambda name: installed.get(name, "99"))
    with pytest.raises(ConfigError) as raised:
        check_packages()
    sentence = "transformers: 5.17.0 is installed, but 5.23 or newer is needed; run pip install 'transformers>=5.23'."
    assert raised.value.problems == [sentence]
