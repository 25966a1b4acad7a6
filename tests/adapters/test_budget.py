"""AdaLoRA as PEFT has it: the schedule after each step, the penalty once a step, the kept ranks in the export."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from support import random_rows, tiny_model

from accel_llm.adapters.adopt import adopt_adapter_options
from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.budget import IMPORTANCE, UNCERTAINTY, RankBudget, budget_bytes, set_schedule
from accel_llm.adapters.methods import check_method, fresh_adapter_config
from accel_llm.adapters.saved import check_saved_adapter, save_adapter
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import collate_padded, to_device
from accel_llm.errors import ConfigError
from accel_llm.model.loss import attach_loss, next_token_loss
from accel_llm.training.optimizers import build_optimizer
from accel_llm.training.schedule import build_schedule

STEPS, RATE = 12, 3e-2
TARGETS = ["q_proj", "v_proj", "down_proj"]  # of 2 layers: 24 ranks, of which 12 are kept
PHASES = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2}
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
PEFT_KEYS = pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # PEFT warns of its own pattern


def options(**values: Any) -> TrainOptions:
    settings: dict[str, Any] = {
        "output_dir": "unused", "method": "adalora", "method_options": PHASES, "lora_target_modules": TARGETS,
        "lora_alpha": 16, "lora_dropout": 0, "learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "weight_decay": 0,
    }  # fmt: skip
    return TrainOptions(**(settings | values))


def kept(model: Any) -> dict[str, list[bool]]:
    return {name: (p.view(-1) != 0).tolist() for name, p in model.named_parameters() if "lora_E" in name}


def ours(base: Any, dtype: torch.dtype, steps: int = STEPS, **values: Any) -> tuple[Any, Any, Any]:
    attach_loss(base, 64)
    settings = options(**values)
    model = attach_adapter(base, settings).to(dtype)
    optimizer = build_optimizer(model, settings, "cpu", "none")
    scheduler = build_schedule(optimizer, settings, steps)
    RankBudget(model, settings, optimizer, scheduler, steps)
    return model.train(), optimizer, scheduler


def make_step(model: Any, optimizer: Any, seed: int = 0) -> None:
    next_token_loss(model, to_device(collate_padded(random_rows(4, 16, seed), 0), "cpu")).backward()
    optimizer.step()
    optimizer.zero_grad()


def run(base: Any, dtype: torch.dtype, skip: int = 0) -> tuple[Any, Any, list[tuple[float, float]]]:
    """Train with plain PEFT and with ours, which cuts each step in two; return both models and the losses of each step.

    Ours does not step in the step `skip`, and PEFT's loop leaves out its batch.
    """
    config = AdaLoraConfig(
        task_type="CAUSAL_LM", total_step=STEPS, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS, **PHASES
    )
    plain: Any = get_peft_model(deepcopy(base), config).to(dtype).train()
    model, optimizer, scheduler = ours(base, dtype)
    model.load_state_dict(plain.state_dict())
    adam = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], RATE, weight_decay=0.0)
    adam.param_groups[0] |= {key: optimizer.param_groups[0][key] for key in ("betas", "eps")}
    losses = []
    for step in range(1, STEPS + 1):
        rows = random_rows(4, 16, step)
        batch = to_device(collate_padded(rows, 0), "cpu")
        total = 0.0
        if step != skip:
            loss = plain(batch["input_ids"], attention_mask=batch.get("attention_mask"), labels=batch["labels"]).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            adam.step()
            plain.base_model.update_and_allocate(step)
            adam.zero_grad()
            for part in (rows[:1], rows[1:]):
                part_loss = next_token_loss(model, to_device(collate_padded(part, 0), "cpu")) / batch["total_weight"]
                part_loss.backward()
                total += part_loss.item()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append((total, loss.item()))
        scheduler.step()
        assert kept(model) == kept(plain), step
    return plain, model, losses


def largest_difference(left: Any, right: Any) -> float:
    pairs = zip(left.named_parameters(), right.named_parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for (_, a), (_, b) in pairs if a.requires_grad)


@pytest.mark.parametrize(
    ("dtype", "skip"), [(torch.float64, 0), (torch.float32, 5), pytest.param(torch.float32, 0, marks=pytest.mark.long)]
)
def test_a_run_is_that_of_plain_peft(dtype, skip):
    plain, model, losses = run(tiny_model("llama"), dtype, skip)
    assert all(abs(mine - theirs) < 1e-5 for mine, theirs in losses)
    assert largest_difference(plain, model) < 1e-5
    ranks = [sum(flags) for flags in kept(model).values()]
    assert sum(ranks) == 12 and len(set(ranks)) > 1


def test_the_last_allocation_is_made_up_for_if_its_step_is_skipped():
    """PEFT does it in exactly that step, or never; without it nothing would be given up for good."""
    model, optimizer, scheduler = ours(tiny_model("llama"), torch.float32)
    for step in range(1, STEPS + 1):
        if step != STEPS - PHASES["tfinal"]:
            make_step(model, optimizer, step)
        scheduler.step()
    assert sum(sum(flags) for flags in kept(model).values()) == 12


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_of_one_or_two_steps_ends_with_the_wanted_ranks(steps):
    model, optimizer, scheduler = ours(
        tiny_model("llama"), torch.float32, steps, method_options={"init_r": 4, "target_r": 2}
    )
    for _ in range(steps):
        make_step(model, optimizer)
        scheduler.step()
    assert sum(sum(flags) for flags in kept(model).values()) == 12


def test_the_penalty_counts_in_training_only():
    base = tiny_model("llama")
    batch = to_device(collate_padded(random_rows(4, 16), 0), "cpu")
    attach_loss(base, 64)
    expected = float(next_token_loss(base, batch).detach())
    model = attach_adapter(base, options()).eval()
    assert float(next_token_loss(model, batch).detach()) == pytest.approx(expected, rel=1e-6)
    # All A and B together, written out: E is 0, so the model itself is still the base.
    factors = {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name or "lora_B" in name}
    squares = [p @ p.T if "lora_A" in name else p.T @ p for name, p in factors.items()]
    penalty = torch.stack([(square - torch.eye(4)).square().sum().sqrt() for square in squares]).mean()
    wanted = expected + 0.5 * batch["total_weight"] * float(penalty)
    assert (
        float(next_token_loss(model.train(), batch).detach()) == pytest.approx(wanted, rel=1e-6) and float(penalty) > 1
    )


def test_the_averages_take_the_bytes_that_are_estimated():
    model, optimizer, _ = ours(tiny_model("llama"), torch.float32)
    make_step(model, optimizer)
    averages = [state[name] for state in optimizer.state.values() for name in (IMPORTANCE, UNCERTAINTY)]
    assert budget_bytes(model) == sum(average.nbytes for average in averages) > 0


@PEFT_KEYS
@pytest.mark.parametrize("all_given_up", [False, True])
def test_plain_peft_loads_the_ranks_that_are_kept(tmp_path, all_given_up):
    base = tiny_model("llama")
    plain, model = deepcopy(base), attach_adapter(base, options()).eval()
    with torch.no_grad():
        for k, (_, p) in enumerate((n, p) for n, p in model.named_parameters() if "lora_E" in n):
            p.normal_()
            p[: 4 if all_given_up else k] = 0  # the fifth and sixth layer keep none
    state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    save_adapter(model, tmp_path, state, "base")
    check_saved_adapter(model, tmp_path)
    loaded = PeftModel.from_pretrained(plain, tmp_path).eval()
    assert sum(p.numel() for n, p in loaded.named_parameters() if "lora_E" in n) == (
        0 if all_given_up else 4 + 3 + 2 + 1
    )
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(loaded(tokens).logits, model(tokens).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"target_r": 4, "init_r": 4}, "target_r 4 must be at least 1 and less than init_r, which is 4"),
        ({"total_step": 100}, "total_step is the number of steps of the run"),
        ({"rank_pattern": {}}, "rank_pattern is what adalora finds out"),
        ({"r": 16}, "adalora does not use r, which is an option of lora"),
        ({"deltaT": 0}, "deltaT 0 is not allowed; give at least 1"),
        ({"beta1": 1.0}, "beta1 1.0 is not allowed; give a number between 0 and 1"),
    ],
)
def test_options_that_peft_would_ignore_or_fail_with_later(values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        check_method(options(method_options=values))


def test_the_phases_are_shares_of_the_run_unless_they_are_set():
    def phases(steps: int, **values: int) -> tuple[int, int, int]:
        settings = options(method_options=values)
        config = fresh_adapter_config(settings)
        set_schedule(config, settings, steps)
        assert config.total_step == steps
        return config.tinit, config.tfinal, config.deltaT

    assert phases(4000) == (500, 2000, 4) and phases(10) == (1, 5, 1) and phases(1) == (0, 0, 1)
    assert phases(100, tinit=7, deltaT=3) == (7, 50, 3)
    with pytest.raises(ConfigError, match="of the 10 steps of this run tinit 5 and tfinal 5 leave none"):
        phases(10, tinit=5)


def test_an_adapter_is_not_trained_further(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "ADALORA", "total_step": 9}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="is an ADALORA adapter: it has given up ranks, and its schedule is over"):
        adopt_adapter_options(TrainOptions(output_dir="unused", adapter_name_or_path=str(tmp_path)))


def test_adaptive_subspaces_of_adamss_are_refused():
    with pytest.raises(
        ConfigError, match="use_asa of method adamss cannot be used: PEFT freezes weights in the middle"
    ):
        check_method(TrainOptions(output_dir="unused", method="adamss", method_options={"use_asa": True}))
