"""transformers 14243 (also 1363 and 32661): RoBERTa's config says 514 positions, but 513 tokens are an IndexError.

Positions are counted from `pad_token_id` + 1, so two rows of the table are never used. A run with `max_length: 514` dies
at the first long row, on a GPU with an assert that names nothing. Right is the longest input that the model itself
takes.
"""

import json

import pytest
import torch
from support import SIZES
from transformers import RobertaConfig, RobertaForCausalLM

from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.model.loading import load_model_config


def test_max_length_ends_where_the_table_ends(tmp_path):
    sizes = {**SIZES, "num_hidden_layers": 1, "max_position_embeddings": 514, "pad_token_id": 1, "is_decoder": True}
    model = RobertaForCausalLM(RobertaConfig(**sizes)).eval()
    model.config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"] == 514
    with torch.no_grad():
        model(input_ids=torch.full((1, 512), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, 513), 7))

    options = TrainOptions(model_name_or_path=str(tmp_path), output_dir="out")
    load_model_config(options, 512)
    with pytest.raises(ConfigError, match="max_length: 513 is beyond the model's 512 positions; set max_length to 512"):
        load_model_config(options, 513)
