"""Nobody reported it: `generate` with a config of its own still takes the model's repetition penalty, ban lists and beams.

transformers 5 fills every setting that the given config leaves open from the model's generation_config.json (Qwen2.5 has
a penalty of 1.05). So an exact match of "greedy" answers was that of another search. The right value is the argmax of
plain logits, token by token.
"""

import numpy as np
import torch
from support import tiny_model

from accel_llm.training.evaluation import exact_match


def test_greedy_answers_are_the_argmax_of_the_logits(accelerator, tokenizer) -> None:
    model = tiny_model("llama")
    questions = [(np.array([7, 8, 9]), np.array([10, 11, 2])), (np.array([30, 31]), np.array([5, 2]))]
    expected = []
    for prompt, _ in questions:
        ids = torch.from_numpy(prompt)[None]
        for _ in range(3 + 8):
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        expected.append(tokenizer.decode(ids[0, len(prompt) :]))

    own = model.generation_config
    own.update(repetition_penalty=1.5, num_beams=3, no_repeat_ngram_size=2, do_sample=True, temperature=0.9)
    answers = exact_match(accelerator, model, tokenizer, questions, 2, [])[1]
    assert [answer.generated for answer in answers] == expected
    assert model.generation_config.repetition_penalty == 1.5  # the export keeps it
