"""LLaVA 94: the tokenizer has a pad token, but the embedding has no row for it, so that a padded batch fails.

The right loss is that of each document alone, from plain transformers; the exported files must name a token that the
model has.
"""

import json

import numpy as np
import pytest
import torch
from support import character_tokenizer, tiny_model
from transformers import AutoModelForCausalLM

from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import collate_padded
from accel_llm.model.generation import build_generation_config
from accel_llm.model.loading import load_model, load_model_config
from accel_llm.model.loss import next_token_loss
from accel_llm.model.padding import fit_pad_token
from accel_llm.model.tokenizer import pad_token_id

ROWS = len(character_tokenizer())  # of the embedding: all tokens but the added [PAD]
pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def added_pad():
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == ROWS == len(tokenizer) - 1
    return tokenizer


@pytest.mark.parametrize("pad", [ROWS, 10 * ROWS, -1, None])
def test_a_pad_id_without_a_row_is_replaced_everywhere(tmp_path, added_pad, pad):
    plain = tiny_model("llama", vocab_size=ROWS)
    plain.save_pretrained(tmp_path)
    for file in ("config.json", "generation_config.json"):
        settings = json.loads((tmp_path / file).read_text()) | {"pad_token_id": pad}
        (tmp_path / file).write_text(json.dumps(settings))

    options = TrainOptions(model_name_or_path=str(tmp_path), method="full", packing=False, max_length=64)
    fit_pad_token(added_pad, load_model_config(options))
    fill = pad_token_id(added_pad)
    assert fill == added_pad.eos_token_id < ROWS
    model = load_model(options)
    documents = [np.array([5, 6, 7, 8, 2]), np.array([9, 10, 2])]
    loss = next_token_loss(model, collate_padded([(ids, ids) for ids in documents], fill))
    alone = [plain(input_ids=torch.tensor(ids)[None], labels=torch.tensor(ids)[None]).loss for ids in documents]
    torch.testing.assert_close(loss, alone[0] * 4 + alone[1] * 2, rtol=1e-5, atol=0)

    # What is exported can be loaded and asked by plain transformers.
    settings = build_generation_config(model, added_pad, [2])
    assert settings.pad_token_id == fill
    assert model.config.pad_token_id is None
    model.config.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_pad_token_with_a_row_stays():
    tokenizer, config = character_tokenizer(), tiny_model("llama", vocab_size=ROWS).config
    fit_pad_token(tokenizer, config)
    assert tokenizer.pad_token == "<pad>"
