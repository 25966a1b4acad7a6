"""PEFT's decompositions of the base's weights run on the training device where their signs do not matter."""

import pytest
import torch
from peft import OSFConfig, get_peft_model
from support import equal_tensors, tiny_model

from accel_llm.adapters.decompositions import FUNCTIONS, Decompositions, decomposition_work

META, CPU = torch.device("meta"), torch.device("cpu")


def test_on_the_cpu_they_are_the_same_numbers_in_the_same_form():
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    for function in FUNCTIONS:
        with Decompositions("osf", CPU, 0):
            found = function(matrix)
        expected = function(matrix)
        assert type(found) is type(expected) and all(map(torch.equal, found, expected))


def test_psoft_stays_on_the_cpu_because_signs_may_differ_elsewhere():
    matrix = torch.randn(6, 6)
    with Decompositions("psoft", META, 0):
        assert torch.linalg.svd(matrix).U.device == CPU
    # Meta tensors have no values that could come back.
    with Decompositions("tinylora", META, 0), pytest.raises(NotImplementedError, match="no data"):
        torch.linalg.svd(matrix)


def test_osf_is_attached_as_by_plain_peft_and_long_work_is_announced(capsys, monkeypatch):
    monkeypatch.setattr("accel_llm.adapters.decompositions.MENTIONED", -1)
    config = OSFConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], effective_rank=4)
    models = []
    for inside in (False, True):
        torch.manual_seed(0)
        base = tiny_model("llama")
        if inside:
            widths = base.config.hidden_size, base.config.intermediate_size
            work = decomposition_work(base, config)
            assert work == base.config.num_hidden_layers * (widths[0] ** 3 + widths[0] ** 2 * widths[1])
            with Decompositions("osf", CPU, work):
                models.append(get_peft_model(base, config))
        else:
            models.append(get_peft_model(base, config))
    assert equal_tensors(*(dict(model.state_dict()) for model in models))
    said = capsys.readouterr().out
    assert said.count("method: osf decomposes the base's weights on the CPU; the first took") == 1
