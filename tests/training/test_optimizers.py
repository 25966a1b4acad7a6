"""Parameter groups, every optimizer, NEFTune and other noise, and stochastic rounding."""

import copy
import functools
import math
import os
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from peft import IA3Config, LoraConfig, get_peft_model
from support import random_rows, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from accel_llm.backend.accelerator import build_accelerator
from accel_llm.config.options import MethodOptions, OptimOptions, TrainOptions
from accel_llm.data.batches import collate_packed, collate_padded
from accel_llm.errors import ConfigError
from accel_llm.model.attention import enable_packing, forward_arguments, unwrap_causal_lm
from accel_llm.model.loss import attach_loss, next_token_loss
from accel_llm.model.neftune import attach_neftune
from accel_llm.training import own_optimizers
from accel_llm.training.optimizers import build_optimizer, check_optimizer, effective_optimizer, parameter_groups
from accel_llm.training.own_optimizers import RoundedAdamW, round_stochastically
from accel_llm.training.schedule import build_schedule

# peft 0.21.2 reads the old name of a property of transformers 5.23.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

NAMES = ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lion", "adafactor", "sgd", "muon"]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, attention_bias=True, **sizes))


def with_adapter(model: LlamaForCausalLM, **options):
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], **options))


def step_with_gradient(model: nn.Module, optimizer: torch.optim.Optimizer, value: float) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, value)
    optimizer.step()


# --- parameter groups ---


def test_vectors_do_not_decay_and_matrices_do(model):
    groups = parameter_groups(model, OptimOptions(weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, undecayed = ({names[id(parameter)] for parameter in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert undecayed == {name for name in names.values() if name.endswith(("norm.weight", ".bias"))}
    assert decayed | undecayed == set(names.values())
    assert [group["lr"] for group in groups] == [2e-5, 2e-5]


def test_only_trainable_parameters_are_taken_and_lora_plus_speeds_up_b(model):
    class Adapter(MethodOptions, OptimOptions):
        pass

    peft_model = with_adapter(model, use_dora=True)
    names = {id(parameter): name for name, parameter in peft_model.named_parameters()}
    (plain, vectors) = parameter_groups(peft_model, Adapter())
    assert (plain["lr"], len(plain["params"]), len(vectors["params"])) == (2e-4, 4, 2)

    options = Adapter(loraplus_lr_ratio=16, learning_rate=1e-4, weight_decay=0.1)
    rates = {
        names[id(parameter)].split(".")[-3]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(peft_model, options)
        for parameter in group["params"]
    }
    assert rates["lora_A"] == (1e-4, 0.1)
    assert rates["lora_B"] == (pytest.approx(1.6e-3), 0.1)
    assert rates["lora_magnitude_vector"] == (1e-4, 0.0)


class Adapter(MethodOptions, OptimOptions):
    """The options that an adapter's optimizer reads."""


def rates_by_name(model: nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_a_pattern_sets_the_rate_of_what_it_matches_and_the_first_match_counts(model):
    plain, peft_model = copy.deepcopy(model), with_adapter(model, use_dora=True, modules_to_save=["lm_head"])
    patterns = {"layers.0.*v_proj.lora_B": 3e-3, "lora_B": 2e-3, "magnitude": 1e-5, "lm_head": 4e-5}
    options = Adapter(learning_rate=1e-4, learning_rate_patterns=patterns, loraplus_lr_ratio=16, weight_decay=0.1)
    groups = parameter_groups(peft_model, options)
    rates = rates_by_name(peft_model, groups)
    assert len(rates) == 7
    for name, rate in rates.items():
        wanted = next((value for part, value in (
            ("v_proj.lora_B", 3e-3), ("lora_B", 2e-3), ("magnitude", 1e-5), ("lm_head", 4e-5)
        ) if part in name), 1e-4)  # fmt: skip
        # The ratio of LoRA+ does not multiply the rate of a pattern.
        assert rate == (wanted, 0.0 if "magnitude" in name else 0.1)
    assert groups[0]["lr"] == 1e-4  # what the metrics show

    # LoRA+ by its ratio, and the same by a pattern.
    peft_model = with_adapter(plain)
    one = parameter_groups(peft_model, Adapter(learning_rate=1e-4, loraplus_lr_ratio=16))
    other = parameter_groups(peft_model, Adapter(learning_rate=1e-4, learning_rate_patterns={"lora_B": 16e-4}))
    assert rates_by_name(peft_model, one) == rates_by_name(peft_model, other)
    assert {rate for rate, _ in rates_by_name(peft_model, one).values()} == {1e-4, 16e-4}


def test_a_pattern_without_a_parameter_of_its_own_is_an_error(model):
    for patterns in ({"lora_C": 1e-3}, {"lora": 1e-3, "lora_A": 2e-3}, {"embed_tokens": 1e-5}):
        with pytest.raises(ConfigError) as caught:
            parameter_groups(with_adapter(copy.deepcopy(model)), Adapter(learning_rate_patterns=patterns))
        problem = (
            f"learning_rate_patterns: {list(patterns)[-1]!r} matches no trained parameter that an earlier pattern "
        )
        assert caught.value.problems[0].startswith(f"{problem}leaves; they have names such as base_model.model.model.")


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "sgd", "muon", "adafactor"])
def test_each_optimizer_steps_a_pattern_at_its_own_rate_through_the_schedule(model, name):
    patterns = {"lm_head": 1e-3, "norm": 5e-3}
    options = OptimOptions(optim=name, learning_rate=1e-2, learning_rate_patterns=patterns, warmup_steps=1)
    optimizer = build_optimizer(model, options, "cpu", "none")
    scheduler = build_schedule(optimizer, options, 4)
    before = copy.deepcopy(model.state_dict())
    step_with_gradient(model, optimizer, 1.0)  # at half the rate, in the warmup
    for parameter_name, rate in (
        ("lm_head.weight", 1e-3),
        ("model.norm.weight", 5e-3),
        ("model.embed_tokens.weight", 1e-2),
    ):
        moved = before[parameter_name] - model.get_parameter(parameter_name).data
        torch.testing.assert_close(moved, torch.full_like(moved, rate / 2), rtol=1e-2, atol=1e-5)
    assert sorted(set(scheduler.get_last_lr())) == pytest.approx([5e-4, 2.5e-3, 5e-3])
    assert scheduler.get_last_lr()[0] == pytest.approx(5e-3)


def test_scales_that_begin_with_one_do_not_decay_whatever_their_shape():
    """(IA)3's vectors are [1, n] and [n, 1]; with decay they would turn the layers off."""
    targets = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
    peft_model = get_peft_model(tiny_model("llama"), IA3Config(**targets, task_type="CAUSAL_LM"))
    (group,) = parameter_groups(peft_model, Adapter(weight_decay=0.1))
    shapes = Counter(tuple(parameter.shape) for parameter in group["params"])
    assert group["weight_decay"] == 0 and shapes == {(16, 1): 2, (1, 48): 2}
    # A prompt is a matrix, with the decay of the paper's code.
    prompt = nn.ParameterDict({"prompt": nn.Parameter(torch.ones(20, 32)), "scale": nn.Parameter(torch.ones(1, 32))})
    assert {name: decay for name, (_, decay) in rates_by_name(prompt, parameter_groups(
        prompt, OptimOptions(weight_decay=0.1)
    )).items()} == {"prompt": 0.1, "scale": 0.0}  # fmt: skip
    muon = build_optimizer(prompt, OptimOptions(optim="muon"), "cpu", "none")
    assert [len(group["params"]) for part, _ in muon.parts for group in part.param_groups] == [1, 1]


def test_a_parameter_sharded_by_zero3_keeps_its_kind():
    matrix = nn.Parameter(torch.empty(0))
    matrix.ds_shape = torch.Size([4, 4])
    vector = nn.Parameter(torch.empty(0))
    vector.ds_shape = torch.Size([4])
    module = nn.ParameterDict({"matrix": matrix, "vector": vector})
    groups = parameter_groups(module, OptimOptions(weight_decay=0.1))
    assert [(group["params"][0] is matrix, group["weight_decay"]) for group in groups] == [(True, 0.1), (False, 0.0)]


# --- optimizers ---


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_descends_and_decays_only_matrices(model, name):
    options = OptimOptions(optim=name, learning_rate=1e-2, weight_decay=0.5)
    optimizer = build_optimizer(model, options, "cpu", "none")
    before = copy.deepcopy(model.state_dict())
    step_with_gradient(model, optimizer, 0.0)
    for parameter_name, parameter in model.named_parameters():
        expected = before[parameter_name] * (1 - 1e-2 * 0.5 if parameter.ndim > 1 else 1)
        torch.testing.assert_close(parameter.data, expected, rtol=1e-5, atol=1e-7)

    batch = torch.arange(24)[None]
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - (0.01 if name == "sgd" else 0.2)


def test_adamw_takes_the_steps_of_its_definition(model):
    options = OptimOptions(learning_rate=1e-2, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-3)
    optimizer = build_optimizer(model, options, "cpu", "none")
    weight = model.lm_head.weight.detach().clone()
    step_with_gradient(model, optimizer, 2.0)
    step_with_gradient(model, optimizer, -1.0)
    first, second = 0.0, 0.0
    for step, gradient in enumerate([2.0, -1.0], start=1):
        first = 0.8 * first + 0.2 * gradient
        second = 0.9 * second + 0.1 * gradient**2
        update = first / (1 - 0.8**step) / (math.sqrt(second / (1 - 0.9**step)) + 1e-3)
        weight = weight * (1 - 1e-2 * 0.1) - 1e-2 * update
    torch.testing.assert_close(model.lm_head.weight.data, weight, rtol=1e-5, atol=1e-6)
    assert optimizer.defaults["fused"] is True


def test_lion_steps_by_the_sign_with_its_own_second_decay(model):
    optimizer = build_optimizer(model, OptimOptions(optim="lion", learning_rate=1e-3), "cpu", "none")
    before = model.lm_head.weight.detach().clone()
    step_with_gradient(model, optimizer, -5.0)
    torch.testing.assert_close(model.lm_head.weight.data, before + 1e-3)
    assert optimizer.defaults["betas"][:2] == (0.9, 0.99)


def test_paged_optimizers_are_the_plain_ones_without_cuda(model):
    for name, expected in [("paged_adamw", torch.optim.AdamW), ("paged_adamw_8bit", "AdamW8bit")]:
        optimizer = build_optimizer(model, OptimOptions(optim=name), "cpu", "none")
        assert type(optimizer) is expected or type(optimizer).__name__ == expected
    assert effective_optimizer(OptimOptions(optim="paged_adamw_8bit"), "cpu") == "adamw_8bit"
    assert effective_optimizer(OptimOptions(optim="paged_adamw_8bit"), "cuda") == "paged_adamw_8bit"


def test_8_bit_state_is_8_bit_but_for_embeddings(model):
    optimizer = build_optimizer(model, OptimOptions(optim="adamw_8bit"), "cpu", "none")
    step_with_gradient(model, optimizer, 0.1)
    assert optimizer.state[model.lm_head.weight]["state1"].dtype == torch.uint8
    assert optimizer.state[model.model.embed_tokens.weight]["state1"].dtype == torch.float32


def test_an_adapter_whose_b_is_zero_moves_under_adafactor(model):
    peft_model = with_adapter(model)
    optimizer = build_optimizer(peft_model, OptimOptions(optim="adafactor", learning_rate=1e-3), "cpu", "none")
    step_with_gradient(peft_model, optimizer, 1.0)
    matrix = next(parameter for name, parameter in peft_model.named_parameters() if "lora_B" in name)
    torch.testing.assert_close(matrix.data, torch.full_like(matrix, -1e-3))


@pytest.mark.parametrize(
    ("name", "engine", "problem"),
    [
        ("muon", "deepspeed", "optim: muon cannot run here: DeepSpeed hands it flat pieces of the weights and it "
         "needs matrices; give adamw, lion, sgd."),
        ("lion", "fsdp", "optim: lion cannot run here: FSDP hands it sharded tensors, which it does not take; "
         "give adamw, sgd, muon."),
    ],
)  # fmt: skip
def test_what_an_engine_cannot_run_is_refused(model, name, engine, problem):
    with pytest.raises(ConfigError) as caught:
        build_optimizer(model, OptimOptions(optim=name), "cpu", engine)
    assert caught.value.problems == [problem]
    check_optimizer(OptimOptions(optim=name), "cpu", "none")
    check_optimizer(OptimOptions(optim="paged_adamw"), "cpu", engine)


# --- Muon ---


def test_muon_takes_hidden_matrices_and_adamw_the_rest(model):
    optimizer = build_optimizer(model, OptimOptions(optim="muon"), "cpu", "none")
    (muon, muon_groups), (adamw, adamw_groups) = optimizer.parts
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = {names[id(p)] for group in optimizer.param_groups[muon_groups] for p in group["params"]}
    rest = {names[id(p)] for group in optimizer.param_groups[adamw_groups] for p in group["params"]}
    assert taken == {name for name in names.values() if name.endswith("proj.weight")}
    assert rest == set(names.values()) - taken
    assert "lm_head.weight" in rest and "model.embed_tokens.weight" in rest


def test_muon_with_adamw_equals_the_two_apart(model):
    twin = copy.deepcopy(model)
    together = build_optimizer(model, OptimOptions(optim="muon", learning_rate=1e-2), "cpu", "none")
    hidden = [p for name, p in twin.named_parameters() if name.endswith("proj.weight")]
    others = [p for name, p in twin.named_parameters() if not name.endswith("proj.weight")]
    apart = [
        torch.optim.Muon(hidden, lr=1e-2, weight_decay=0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1e-2, weight_decay=0),
    ]
    batch = torch.arange(24)[None]
    for _ in range(3):
        for trained, optimizers in [(model, [together]), (twin, apart)]:
            trained.zero_grad()
            trained(batch, labels=batch).loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_muon_resumes_from_its_state(model):
    def train(trained, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            trained(batch, labels=batch).loss.backward()
            optimizer.step()

    batch = torch.arange(24)[None]
    options = OptimOptions(optim="muon", learning_rate=1e-2)
    optimizer = build_optimizer(model, options, "cpu", "none")
    train(model, optimizer, 2)
    resumed, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 2)

    fresh = build_optimizer(resumed, options, "cpu", "none")
    fresh.load_state_dict(state)
    train(resumed, fresh, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_muon_follows_the_schedule(model):
    options = OptimOptions(optim="muon", learning_rate=1.0, warmup_steps=3)
    optimizer = build_optimizer(model, options, "cpu", "none")
    build_schedule(optimizer, options, 10)
    optimizer.step()
    assert [group["lr"] for part, _ in optimizer.parts for group in part.param_groups] == [0.25] * 3


class Operations(TorchDispatchMode):
    """Counts the operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(operation).split(".")[1]] += 1
        return operation(*args, **(kwargs or {}))


def test_a_step_over_an_adapter_is_one_operation_and_in_8_bits_one_for_each_tensor(model):
    """launch/recipes/README.md says so."""
    model = with_adapter(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for name, expected in (("adamw", {"_fused_adamw_": 1}), ("adamw_8bit", {"optimizer_update": len(trained)})):
        optimizer = build_optimizer(model, OptimOptions(optim=name), "cpu", "none")
        for parameter in trained:
            parameter.grad = torch.ones_like(parameter)
        with Operations() as operations:
            optimizer.step()
        for operation, count in expected.items():
            assert sum(n for key, n in operations.counts.items() if key.startswith(operation)) == count


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_steps_on_cuda(model, name):
    model.cuda()
    optimizer = build_optimizer(model, OptimOptions(optim=name, learning_rate=1e-2), "cuda", "none")
    batch = torch.arange(24, device="cuda")[None]
    before = model(batch, labels=batch).loss.item()
    for _ in range(8):
        optimizer.zero_grad()
        model(batch, labels=batch).loss.backward()
        optimizer.step()
    assert model(batch, labels=batch).loss.item() < before


# --- schedules ---


def test_every_group_keeps_its_ratio_through_the_schedule(model):
    class Adapter(MethodOptions, OptimOptions):
        pass

    options = Adapter(loraplus_lr_ratio=4, learning_rate=1.0, lr_scheduler_type="linear", warmup_steps=0)
    optimizer = build_optimizer(with_adapter(model), options, "cpu", "none")
    scheduler = build_schedule(optimizer, options, 4)
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.75, 3.0]


# --- NEFTune ---


def added_noise(model, batch: dict, alpha: float = 5.0) -> torch.Tensor:
    """Return the noise that NEFTune adds to the embeddings [B, L, width] of a batch."""
    embeddings_seen = []
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda module, args, embedded: embeddings_seen.append(embedded))
    model(**batch, use_cache=False)
    handle.remove()
    clean = nn.functional.embedding(batch["input_ids"], embeddings.weight)
    return (embeddings_seen[-1] - clean).detach()


PACKED = {
    "input_ids": torch.arange(80)[None],
    "position_ids": torch.cat([torch.arange(64), torch.arange(16)])[None],
    "cu_seq_lens_q": torch.tensor([0, 64, 80], dtype=torch.int32),
}


@pytest.mark.parametrize("adapted", [False, True])
def test_noise_is_bounded_by_each_documents_length(model, adapted):
    model = with_adapter(model) if adapted else model
    model.train()
    attach_neftune(model, alpha=5.0)
    noise = added_noise(model, PACKED)[0]
    for document, length in [(noise[:64], 64), (noise[64:], 16)]:
        bound = 5.0 / math.sqrt(length * 64)
        assert 0.97 * bound < document.abs().max() <= bound * 1.0001
        assert document.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert abs(document.mean()) < 0.1 * bound


def test_noise_of_padded_rows_counts_no_padding(model):
    model.train()
    attach_neftune(model, alpha=5.0)
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[1, 8:] = 0
    noise = added_noise(model, {"input_ids": torch.arange(64).view(2, 32), "attention_mask": mask})
    for row, length in [(noise[0], 32), (noise[1], 8)]:
        bound = 5.0 / math.sqrt(length * 64)
        assert 0.97 * bound < row.abs().max() <= bound * 1.0001
    plain = added_noise(model, {"input_ids": torch.arange(64).view(2, 32)})
    assert plain[1].abs().max() <= 5.0 / math.sqrt(32 * 64) * 1.0001


def test_noise_is_new_at_each_call_seeded_and_absent_in_evaluation(model):
    attach_neftune(model.train(), alpha=5.0)
    torch.manual_seed(3)
    first, second = added_noise(model, PACKED), added_noise(model, PACKED)
    torch.manual_seed(3)
    assert torch.equal(added_noise(model, PACKED), first)
    assert not torch.equal(first, second)
    assert added_noise(model.eval(), PACKED).abs().max() == 0


# --- noise as a whole: NEFTune, dropout of adapters and of attention ---


def noisy_model(
    family: str = "llama", attention_dropout: float = 0.2, lora_dropout: float = 0.2, alpha: float | None = 5.0
) -> nn.Module:
    """Training with every kind of noise, over a loss and packed rows as the scripts have them."""
    base = tiny_model(family, num_hidden_layers=1, attention_dropout=attention_dropout)
    attach_loss(base, 1024)
    adapter = LoraConfig(target_modules="all-linear", lora_dropout=lora_dropout, init_lora_weights=False)
    model = get_peft_model(base, adapter)
    if alpha:
        attach_neftune(model, alpha)
    return model.train()


COPIES = 150
DOCUMENTS = [np.arange(3, 9), np.arange(9, 20)]  # of 6 and 11 tokens


def drawn_logits(model: nn.Module, packed: bool, seed: int) -> list[torch.Tensor]:
    """[COPIES, n, vocabulary] for each document of n tokens, the copies in one batch and each with its own noise."""
    rows = [(ids, ids) for ids in DOCUMENTS for _ in range(COPIES)]
    if packed:
        enable_packing(model)
    batch = forward_arguments(collate_packed(rows) if packed else collate_padded(rows, 0))
    torch.manual_seed(seed)
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    if not packed:
        return [part[:, : len(ids)] for part, ids in zip(logits.split(COPIES), DOCUMENTS, strict=True)]
    parts = logits[0].split([COPIES * len(ids) for ids in DOCUMENTS])
    return [part.view(COPIES, len(ids), -1) for part, ids in zip(parts, DOCUMENTS, strict=True)]


def distances(first: torch.Tensor, second: torch.Tensor) -> tuple[float, float]:
    """Compare two samples [copies, ...]. Return two means over the coordinates.

    The first is of the squared difference of the means in standard errors (1 if both have the same distribution), the
    second of the logarithm of the ratio of the variances (0 if they have).
    """
    a, b = first.double(), second.double()
    squares = (a.mean(0) - b.mean(0)).square() / ((a.var(0) + b.var(0)) / COPIES)
    return float(squares.mean()), float((a.var(0) / b.var(0)).log().mean())


QUIET = {"attention_dropout": 0.0, "lora_dropout": 0.0, "alpha": None}


@pytest.mark.parametrize(
    ("family", "kind", "amount", "other"),
    [
        ("llama", "attention_dropout", 0.2, 0.3),  # fused attention
        ("gemma2", "attention_dropout", 0.2, 0.3),  # soft-cap
        ("gpt_oss", "attention_dropout", 0.2, 0.3),  # sinks
        ("llama", "lora_dropout", 0.2, 0.3),
        ("llama", "alpha", 5.0, 10.0),
    ],
)
def test_noise_has_one_distribution_packed_and_padded(family, kind, amount, other):
    padded = drawn_logits(noisy_model(family, **{**QUIET, kind: amount}), packed=False, seed=1)
    packed = drawn_logits(noisy_model(family, **{**QUIET, kind: amount}), packed=True, seed=2)
    for logits, expected in zip(packed, padded, strict=True):
        squares, ratio = distances(logits, expected)
        assert 0.4 < squares < 1.8 and abs(ratio) < 0.12
        assert all(not torch.equal(logits[0], copy) for copy in logits[1:]), "documents of a row share no noise"
    louder = drawn_logits(noisy_model(family, **{**QUIET, kind: other}), packed=True, seed=2)
    assert all(distances(a, b)[1] > 0.25 for a, b in zip(louder, padded, strict=True))


@pytest.mark.parametrize("packed", [True, False])
def test_recomputed_layers_draw_their_noise_again(packed):
    rows = random_rows(4, 12)
    batch = collate_packed(rows) if packed else collate_padded(rows, 0)

    def gradient(recompute: functools.partial | None) -> dict[str, torch.Tensor]:
        model = noisy_model()
        causal = unwrap_causal_lm(model)
        causal.loss_chunks = 3
        if packed:
            enable_packing(model)
        if recompute:
            causal._set_gradient_checkpointing(gradient_checkpointing_func=recompute)
        torch.manual_seed(1)
        next_token_loss(model, batch).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    stored = gradient(None)
    recomputed = gradient(functools.partial(checkpoint, use_reentrant=False))
    assert all(torch.equal(recomputed[name], stored[name]) for name in stored)
    other = gradient(functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    assert not all(torch.equal(other[name], stored[name]) for name in stored)


NOISES = 4
STREAM = {name: PACKED[name] % 97 if name == "input_ids" else PACKED[name] for name in PACKED}
STREAM |= {"max_length_q": 64, "max_length_k": 64, "cu_seq_lens_k": PACKED["cu_seq_lens_q"]}


def draw_noise(model: nn.Module) -> torch.Tensor:
    """Return the noise of NOISES forwards on the embeddings, followed by the dropped inputs of an adapter: [NOISES, -1]."""
    dropped = []
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj.lora_dropout.default"))
    handle = layer.register_forward_hook(lambda module, args, output: dropped.append((output == 0).float()))
    added = [added_noise(model, STREAM) for _ in range(NOISES)]
    handle.remove()
    return torch.cat([torch.stack(added).flatten(1), torch.stack(dropped).flatten(1)], 1)


def rank_of_two(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    accelerator = build_accelerator(TrainOptions())
    assert accelerator.num_processes == 2
    model = noisy_model()
    enable_packing(model)
    model = accelerator.prepare(model)
    set_seed(42, device_specific=True)
    apart = draw_noise(accelerator.unwrap_model(model))
    set_seed(42)
    torch.save((apart, draw_noise(accelerator.unwrap_model(model))), folder / f"{rank}.pt")
    accelerator.end_training()


@pytest.mark.long
def test_ranks_draw_noise_of_their_own_from_one_distribution(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Not forked: OpenMP's threads do not live on in a fork, and what waits for them waits for ever.
    torch.multiprocessing.spawn(rank_of_two, (port, tmp_path), nprocs=2)
    (first, first_alike), (second, second_alike) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first_alike, second_alike), "it is the seed by rank that sets them apart"

    model = noisy_model()
    enable_packing(model)
    set_seed(42)
    alone = draw_noise(model)
    assert torch.equal(first, alone), "a single process is rank 0"
    drawn = torch.cat([first, second])
    assert all(not torch.equal(drawn[i], drawn[j]) for i in range(2 * NOISES) for j in range(i))
    for part in (slice(0, 80 * 32), slice(80 * 32, None)):  # NEFTune's, dropout's
        correlation = torch.corrcoef(drawn[:, part])
        assert (correlation - torch.eye(2 * NOISES)).abs().max() < 5 / 50, (
            "of 2,560 draws each, 50 is their square root"
        )
        for moment in (1, 2, 4):
            values = [noise[:, part].double() ** moment for noise in (alone, second)]
            error = math.sqrt(sum(float(value.var()) / value.numel() for value in values))
            assert abs(float(values[0].mean() - values[1].mean())) < 4 * error


# Stochastic rounding


def test_values_are_rounded_to_a_neighbor_with_odds_that_keep_the_mean():
    generator = torch.Generator().manual_seed(0)
    for value in (1.0 + 2**-9, -3.3, 1e-20, 0.1):
        exact = torch.full((200_000,), value)
        rounded_values = round_stochastically(exact, generator)
        nearest = exact[:1].to(torch.bfloat16).float()
        gap = float(nearest.abs()) * 2**-7
        assert rounded_values.dtype == torch.bfloat16 and len(rounded_values.unique()) == 2
        assert float((rounded_values.float() - exact).abs().max()) <= gap
        assert abs(float(rounded_values.double().mean()) - float(exact[0].double())) < 0.01 * gap
    representable = torch.tensor([0.0, 1.0, -2.5, float("inf")])
    assert torch.equal(round_stochastically(representable, generator).float(), representable)


def train_rounded(weight: torch.Tensor, steps: int, seed: int = 0, master_weights: str = "stochastic_rounding"):
    model = nn.Linear(*weight.shape[::-1], bias=False).to(weight.dtype)
    model.weight.data.copy_(weight)
    options = OptimOptions(learning_rate=1e-4, master_weights=master_weights)
    optimizer = build_optimizer(model, options, "cpu", "none", seed)
    for _ in range(steps):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
    return model.weight.detach(), optimizer


def test_steps_too_small_for_bfloat16_arrive_in_the_mean():
    start = torch.ones(64, 64, dtype=torch.bfloat16)
    # Below 1 neighbors are 2^-8 apart: a step of 1e-4 is lost by rounding to the nearest.
    lost, _ = train_rounded(start, 20, master_weights="float32")
    assert torch.equal(lost, start)
    weights, optimizer = train_rounded(start, 20)
    assert float(weights.float().mean()) == pytest.approx(1 - 20e-4, abs=1e-4)
    assert {t.dtype for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)} == {
        torch.float32
    }
    again, _ = train_rounded(start, 20)
    other, _ = train_rounded(start, 20, seed=1)
    assert torch.equal(weights, again) and not torch.equal(weights, other)


def test_on_float32_weights_rounding_changes_nothing_but_the_last_bits_of_adamw():
    torch.manual_seed(0)
    start = torch.randn(16, 16)
    reference = nn.Parameter(start.clone())
    adamw = torch.optim.AdamW([reference], lr=1e-2, weight_decay=0.1)
    ours = nn.Parameter(start.clone())
    optimizer = RoundedAdamW([{"params": [ours], "weight_decay": 0.1, "lr": 1e-2}], (0.9, 0.999), 1e-8, 0)
    for _ in range(5):
        gradient = torch.randn(16, 16)
        reference.grad, ours.grad = gradient.clone(), gradient.clone()
        adamw.step()
        optimizer.step()
    # Each of the 5 steps may round by 2^-8 of the weight, once up and once down.
    torch.testing.assert_close(ours.data, reference.data, rtol=5 * 2**-7, atol=1e-3)


def test_a_resumed_run_rounds_alike():
    start = torch.ones(8, 8, dtype=torch.bfloat16)
    whole, _ = train_rounded(start, 6)
    half, optimizer = train_rounded(start, 3)
    model = nn.Linear(8, 8, bias=False).to(torch.bfloat16)
    model.weight.data.copy_(half)
    options = OptimOptions(learning_rate=1e-4, master_weights="stochastic_rounding")
    fresh = build_optimizer(model, options, "cpu", "none", 0)
    fresh.load_state_dict(optimizer.state_dict())
    for _ in range(3):
        model.weight.grad = torch.ones_like(model.weight)
        fresh.step()
    assert torch.equal(model.weight, whole)


@pytest.mark.parametrize("shape", [(64, 16), (1000,), (2, 40, 5), ()])
def test_pieces_of_a_weight_are_stepped_like_the_whole(shape, monkeypatch):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape).to(torch.bfloat16), torch.randn(4, *shape).to(torch.bfloat16)

    def trained(piece_size: int) -> tuple[torch.Tensor, int]:
        """Return the weights after four steps, and the elements of the largest tensor that a step creates."""
        monkeypatch.setattr(own_optimizers, "PIECE_SIZE", piece_size)
        weight = nn.Parameter(start.clone())
        optimizer = RoundedAdamW([{"params": [weight], "weight_decay": 0.1, "lr": 1e-2}], (0.9, 0.999), 1e-8, 0)
        largest = 0
        for k, gradient in enumerate(gradients):
            weight.grad = gradient.clone()
            with Created() as created:
                optimizer.step()
            largest = max(largest, created.largest if k else 0)  # the first step creates the moments
        return weight.detach(), largest

    (whole, _), (pieces, largest) = trained(2**24), trained(256)
    assert torch.equal(pieces, whole)
    assert largest <= 256
    if len(shape) == 2:
        assert trained(2**24)[1] == 1024


class Created(TorchDispatchMode):
    """Counts the elements of the largest tensor that is created, not taken as a view of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        results = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.largest = max(self.largest, tensor.numel())
        return results
