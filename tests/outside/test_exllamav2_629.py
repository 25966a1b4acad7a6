"""exllamav2 629 (also open-r1 645): Qwen2.5 with YaRN is made for 131072 tokens, but its config says 32768 twice.

Its model card asks users to add `rope_scaling` and to leave `max_position_embeddings` alone. A limit read from that field
refuses what the model card offers. Right is `factor` times `original_max_position_embeddings`, the number of the card;
DeepSeek-V3 and gpt-oss have the product in `max_position_embeddings`, and must not be multiplied again.
"""

import json

import pytest

from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.model.loading import load_model_config

CARDS = {
    "Qwen2.5-7B-Instruct": ("qwen2", 32768, {"type": "yarn", "factor": 4.0}, 32768, 131072),
    "DeepSeek-V3": ("deepseek_v3", 163840, {"type": "yarn", "factor": 40}, 4096, 163840),
    "gpt-oss-20b": ("gpt_oss", 131072, {"rope_type": "yarn", "factor": 32.0}, 4096, 131072),
}


@pytest.mark.parametrize("name", CARDS)
def test_the_limit_of_max_length_is_the_one_of_the_card(name, tmp_path):
    family, positions, scaling, original, limit = CARDS[name]
    config = {
        "model_type": family,
        "max_position_embeddings": positions,
        "rope_scaling": {**scaling, "original_max_position_embeddings": original},
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    options = TrainOptions(model_name_or_path=str(tmp_path), output_dir="out")
    load_model_config(options, limit)
    with pytest.raises(ConfigError, match=f"is beyond the model's {limit} positions"):
        load_model_config(options, limit + 1)
