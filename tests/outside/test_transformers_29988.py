"""transformers 29988: after hours of training the save raises, because the model's generation config is bad.

Published configs hold settings that contradict one another: a temperature without sampling, a length penalty without
beams. transformers loads them with a warning and refuses to save a changed copy. Right is an export that plain
transformers loads without a warning, with the stop tokens of the run; settings without effect are of no use to anybody.
"""

import pytest
from support import tiny_model
from transformers import GenerationConfig

from accel_llm.model.generation import build_generation_config

BAD = {
    "sampling": {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
    "beams": {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
    "cache": {"use_cache": False, "cache_implementation": "static"},
    "several answers": {"num_return_sequences": 3},
}


@pytest.mark.parametrize("kind", BAD)
def test_a_generation_config_that_contradicts_itself_loses_no_run(kind: str, tokenizer, tmp_path, capsys) -> None:
    model = tiny_model("llama")
    for name, value in BAD[kind].items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match=r"Fix these issues|Greedy methods"):
        model.generation_config.save_pretrained(tmp_path)
    build_generation_config(model, tokenizer, [2, 4]).save_pretrained(tmp_path)
    capsys.readouterr()
    loaded = GenerationConfig.from_pretrained(tmp_path)
    loaded.validate(strict=True)
    assert loaded.eos_token_id == [2, 4] and loaded.pad_token_id == 0 and loaded.bos_token_id == 1


def test_valid_settings_stay(tokenizer) -> None:
    model = tiny_model("llama")
    model.generation_config.update(do_sample=True, top_k=20, temperature=0.7, repetition_penalty=1.05)
    settings = build_generation_config(model, tokenizer, [4])
    assert (settings.do_sample, settings.top_k, settings.temperature) == (True, 20, 0.7)
    assert settings.repetition_penalty == 1.05 and settings.eos_token_id == 4
