"""transformers 33922: a run on a base from a local folder cannot be pushed, because its card names the path as base_model.

The right value: huggingface_hub's own check of the card passes, and base_model is there only for a name of the hub.
"""

import json

import pytest
from huggingface_hub import ModelCard
from support import moved_adapter

from accel_llm.report.card import write_run_card


@pytest.mark.parametrize("on_the_hub", [True, False])
def test_a_card_never_names_a_folder_as_base_model(tiny, tmp_path, quiet, on_the_hub):
    moved_adapter(tiny, tmp_path / "adapter")
    base = "owner/model" if on_the_hub else str(tiny)
    options = {
        "model_name_or_path": base,
        "train_files": ["rows.jsonl"],
        "method": "lora",
        "load_in_8bit": False,
        "lora_r": 16,
    }
    (tmp_path / "run.json").write_text(json.dumps({"options": options}), encoding="utf-8")
    write_run_card(tmp_path / "adapter")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.base_model == ("owner/model" if on_the_hub else None)
    assert str(tiny) not in str(card) and "More Information Needed" not in str(card)
