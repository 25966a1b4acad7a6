"""A question near the end of a model's positions: its answer ran on beyond them, and GPT-2 died with an IndexError.

Rows fit the positions, but an answer may be as long as the longest one of all, and 8 tokens more. Where positions are
rotary nothing failed, and the tokens beyond meant nothing. Right is what plain transformers says with the room there is.
"""

import numpy as np
import pytest
import torch
from support import tiny_model

from accel_llm.training.evaluation import exact_match


def test_answers_end_at_the_last_position(accelerator, tokenizer) -> None:
    model = tiny_model("gpt2")  # 64 positions
    rng = np.random.default_rng(0)
    questions = [(rng.integers(5, 97, n), np.full(length, 7)) for n, length in ((60, 4), (10, 20), (63, 1))]
    ids = torch.from_numpy(questions[0][0])[None]
    with pytest.raises(IndexError):
        model.generate(ids, max_new_tokens=28, do_sample=False, eos_token_id=-1, pad_token_id=0)
    room = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)[0, 60:]
    answers = exact_match(accelerator, model, tokenizer, questions, 3, [])[1]
    (first,) = [answer for answer in answers if answer.prompt == tokenizer.decode(questions[0][0])]
    assert first.generated == tokenizer.decode(room)
    assert sorted(len(tokenizer.encode(answer.generated)) for answer in answers) == [1, 4, 28]
