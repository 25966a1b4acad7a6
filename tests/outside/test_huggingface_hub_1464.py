"""A model folder that does not exist was reported as a badly formed hub id, so its author looked for the mistake there.

A name with the form of a path is one, and what the user needs to know is that nothing is there, and what is. The oracle
is the disk. With the form `folder/name` Transformers asks the hub for it, which takes two minutes without a network.
"""

import pytest

from accel_llm.errors import ConfigError
from accel_llm.model.model_names import check_model_name
from accel_llm.system import hub


@pytest.mark.parametrize("field", ["model_name_or_path", "base", "model", "config_name"])
@pytest.mark.parametrize("typed", ["./dist/models/vicuna-v1-7", "dist/models/vicuna-v1-7b", "models/vicunna-v1-7b"])
def test_a_missing_folder_is_said_to_be_missing(tmp_path, monkeypatch, typed, field):
    def ask() -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "ask_hub", ask)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "vicuna-v1-7b").mkdir(parents=True)
    with pytest.raises(ConfigError) as error:
        check_model_name(typed, field)
    hint = ", but models/vicuna-v1-7b does" if typed == "models/vicunna-v1-7b" else ""
    assert str(error.value) == (
        f"{field}: {typed} does not exist{hint}; a model folder or a hub id (owner/name) is allowed."
    )
