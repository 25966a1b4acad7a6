"""PEFT's decompositions of the base's weights run on the training device, and on a CPU as ever."""

import pytest
import torch
from peft import OSFConfig, PsoftConfig, get_peft_model
from support import equal_tensors, tiny_model

from accel_llm.adapters.decompositions import FUNCTIONS, Decompositions, decomposition_work

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
META, CPU = torch.device("meta"), torch.device("cpu")


def test_on_the_cpu_they_are_the_same_numbers_in_the_same_form():
    matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    for function in FUNCTIONS:
        arguments = (matrix @ matrix.T, matrix) if function is torch.linalg.solve else (matrix @ matrix.T,)
        with Decompositions("frod", CPU, 0):
            found = function(*arguments)
        expected = function(*arguments)
        assert type(found) is type(expected)
        assert all(map(torch.equal, *([[x] if isinstance(x, torch.Tensor) else x for x in (found, expected)])))


def test_they_run_on_the_device_but_matrices_that_are_elsewhere_stay_there():
    # Meta tensors have no values that could come back.
    with Decompositions("tinylora", META, 0), pytest.raises(NotImplementedError, match="no data"):
        torch.linalg.svd(torch.randn(6, 6))
    with Decompositions("tinylora", CPU, 0):
        assert torch.linalg.svd(torch.randn(6, 6, device="meta")).U.device == META


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


def test_what_a_low_rank_decomposition_takes_is_not_guessed_from_whole_weights():
    targets = {"target_modules": ["q_proj"], "r": 4}
    works = [
        decomposition_work(tiny_model("llama"), PsoftConfig(psoft_svd=how, **targets)) for how in ("full", "lowrank")
    ]
    assert works[0] > 0 and works[1] == 0
