import copy
import functools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from largest import Largest
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from pydantic import ValidationError
from support import FAMILIES, ROOT, UNFUSED_FAMILIES, UNPACKABLE, random_rows, tiny_model
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from accel_llm.adapters.prompts import fit_virtual_tokens
from accel_llm.chat.targets import IGNORED
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import collate_packed, collate_padded
from accel_llm.data.packing import pack
from accel_llm.data.source_names import add_sources
from accel_llm.errors import ConfigError
from accel_llm.model import logits as logits_module
from accel_llm.model.attention import enable_packing
from accel_llm.model.loss import attach_loss, check_loss, next_token_loss

# Families with a balance loss of their experts; JetMoE has another name for the coefficient.
BALANCED = ["mixtral", "qwen2_moe", "qwen3_moe", "granitemoe", "olmoe", "phimoe", "gpt_oss", "jetmoe"]


def family_loss(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    targets = int((batch["labels"][:, 1:] != IGNORED).sum())
    return type(model).forward(model, **inputs, use_cache=False).loss * targets


def gradients(model: PreTrainedModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close_in_norm(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Compare each gradient, relative to its norm or to a tenth of the largest norm.

    The gradient of a bias of keys (OPT) is 0 except for the rounding of larger terms, which differs from call to call.
    """
    assert actual.keys() == expected.keys()
    least = 0.1 * max(gradient.norm() for gradient in expected.values())
    for name, gradient in actual.items():
        assert (gradient - expected[name]).norm() <= tolerance * max(expected[name].norm(), least), name


def assert_the_familys(model: PreTrainedModel, batch: dict) -> None:
    """Loss and every gradient are those of the family's own forward, to rounding in float32."""
    stock = family_loss(model, batch)
    loss = next_token_loss(model, batch)
    torch.testing.assert_close(loss, stock, rtol=1e-6, atol=0)
    assert_close_in_norm(gradients(model, loss), gradients(model, stock), 2e-6)


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, *UNPACKABLE])
def test_own_loss_is_the_familys(family, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    assert is_tied(model) == tied
    assert attach_loss(model, 1024) == "own"
    for chunks in (1, 3):
        model.loss_chunks = chunks
        assert_the_familys(model, collate_padded(random_rows(4, 12), 0))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", UNFUSED_FAMILIES)
def test_a_family_that_treats_its_logits_in_a_way_of_its_own_takes_the_stock_path(family, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    assert is_tied(model) == tied
    assert attach_loss(model, 1024) == "stock"
    assert_the_familys(model, collate_padded(random_rows(4, 12), 0))


# --- the balance loss of experts ---


def balanced_model(family: str, **options) -> PreTrainedModel:
    """In training mode, where the balance loss counts; without dropout."""
    coefficient = {"jetmoe": "aux_loss_coef"}.get(family, "router_aux_loss_coef")
    return tiny_model(family, output_router_logits=True, **{coefficient: 0.1}, **options).train()


@pytest.mark.parametrize("family", BALANCED)
def test_balance_loss_is_part_of_the_loss_where_the_config_asks_for_it(family):
    model = balanced_model(family)
    assert attach_loss(model, 1024) == "stock"
    batch = collate_padded(random_rows(4, 12), 0)
    assert_the_familys(model, batch)
    plain = next_token_loss(model.eval(), batch)
    torch.testing.assert_close(plain, family_loss(tiny_model(family), batch), rtol=1e-6, atol=0)
    assert next_token_loss(model.train(), batch) > 1.01 * plain


def switch_loss(router_logits: list[torch.Tensor], top_k: int) -> float:
    """experts * sum over experts of (share of the choices) * (mean probability), over all tokens [n, experts] of all
    layers; top_k times what Switch Transformer (arXiv 2101.03961, equation 4) has for one choice a token."""
    logits = torch.cat(router_logits).double()
    tokens, experts = logits.shape
    choices = torch.zeros(experts, dtype=torch.float64)
    for row in logits:
        for expert in row.argsort(descending=True)[:top_k]:
            choices[expert] += 1 / tokens
    return float(experts * (choices * logits.softmax(1).mean(0)).sum())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@torch.no_grad()
def test_balance_is_that_of_real_tokens_weighed_with_the_weight_of_the_targets(family, packed):
    rows, weights = weighted_rows()
    model = balanced_model(family)
    attach_loss(model, 1024)
    router_logits: list[torch.Tensor] = []
    for ids, _ in rows:
        router_logits += model(torch.from_numpy(ids)[None]).router_logits
    expected = 0.1 * switch_loss(router_logits, 2)
    if packed:
        enable_packing(model)
    batch = collate_packed(rows, weights) if packed else collate_padded(rows, 0, weights)
    balance = next_token_loss(model, batch) - next_token_loss(model.eval(), batch)
    assert float(balance / batch["total_weight"]) == pytest.approx(expected, rel=1e-5)


def test_a_steps_balance_loss_is_the_mean_of_its_micro_batches_in_proportion_to_their_targets():
    model = balanced_model("qwen3_moe")
    attach_loss(model, 1024)
    rows = random_rows(12, 20)
    micro_batches = [collate_padded(part, 0) for part in (rows[:1], rows[1:4], rows[4:])]
    counts = [batch["num_targets"] for batch in micro_batches]
    means = [family_loss(model, batch) / count for batch, count in zip(micro_batches, counts, strict=True)]
    expected = sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts)
    loss = sum(next_token_loss(model, batch) for batch in micro_batches) / sum(counts)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert len({int(count) for count in counts}) == 3
    twice = sum(next_token_loss(model, batch) for batch in [micro_batches[2]] * 2) / (2 * counts[2])
    torch.testing.assert_close(twice, means[2], rtol=1e-6, atol=0)


def test_the_router_learns_balance_through_recomputed_layers_too():
    batch = collate_padded(random_rows(4, 12), 0)
    results = []
    for recompute in (False, True):
        model = balanced_model("mixtral")
        attach_loss(model, 1024)
        if recompute:
            recomputed = functools.partial(checkpoint, use_reentrant=False)
            model._set_gradient_checkpointing(gradient_checkpointing_func=recomputed)
        results.append(gradients(model, next_token_loss(model, batch)))
    assert_close_in_norm(results[1], results[0], 1e-6)
    plain = tiny_model("mixtral").train()
    attach_loss(plain, 1024)
    without = gradients(plain, next_token_loss(plain, batch))
    moved = [name for name in without if not torch.allclose(without[name], results[1][name], rtol=1e-3)]
    assert any("gate" in name for name in moved)


# --- settling the path ---


class TwiceTheLoss(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.loss = None if output.loss is None else 2 * output.loss
        return output


def test_a_loss_that_logits_do_not_give_is_refused():
    model = tiny_model("llama")
    model.__class__ = TwiceTheLoss
    with pytest.raises(ConfigError, match="TwiceTheLoss cannot be trained here"):
        attach_loss(model, 1024)


def test_check_loss_chooses_the_path_of_a_model_that_could_not_be_tested_when_attached():
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_model("hyperclovax").config)
    empty.unread = True
    assert attach_loss(empty, 1024) == "own"
    model = tiny_model("hyperclovax")
    attach_loss(model, 1024)
    model.loss_path = "own"
    assert check_loss(model, "cpu", torch.float32) == "stock" == model.loss_path


@pytest.mark.parametrize("extra", [{}, {"label_smoothing": 0.2, "z_loss_coef": 0.1}], ids=["plain", "regularised"])
@pytest.mark.parametrize("family", ["llama", "hyperclovax", "jetmoe"])
@pytest.mark.parametrize("chunks", [1, 4])
def test_no_label_gives_zero_and_zero_gradients(family, chunks, extra):
    model = balanced_model(family) if family in BALANCED else tiny_model(family).train()
    attach_loss(model, 1024, **extra)
    model.loss_chunks = chunks
    loss = next_token_loss(
        model, collate_padded([(ids, np.full_like(ids, IGNORED)) for ids, _ in random_rows(2, 9)], 0)
    )
    loss.backward()
    assert float(loss.detach()) == 0
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_chunks_follow_from_capacity_and_the_head_is_used_as_often_whatever_the_labels(monkeypatch):
    monkeypatch.setattr(logits_module, "CHUNK_BYTES", 97 * logits_module.LOGIT_BYTES * 100)
    monkeypatch.setattr(logits_module, "LAYER_BYTES", 0)
    model = tiny_model("llama")
    attach_loss(model, 450)
    assert (model.loss_chunks, model.eval_loss_chunks) == (5, 0)
    attach_loss(model, 450, 900)
    assert (model.loss_chunks, model.eval_loss_chunks) == (5, 9)
    calls = []
    model.train().lm_head.register_forward_hook(lambda *_: calls.append(1))
    for rows in (random_rows(4, 12), [(np.array([3, 4]), np.array([IGNORED, 4]))]):
        next_token_loss(model, collate_padded(rows, 0)).backward()
    assert len(calls) == 2 * 5, "5 chunks, each of them once"
    with torch.no_grad():
        next_token_loss(model.eval(), collate_padded(random_rows(4, 12), 0))
    assert len(calls) == 10 + 9


def test_a_chunk_takes_less_than_a_layer():
    assert [logits_module.chunk_count(tokens, 4096, 128256) for tokens in (0, 2048, 8192)] == [0, 4, 4]
    assert logits_module.chunk_count(2048, 64, 128256) == 6, "256 MiB each: products of few rows would be slow"


@pytest.mark.parametrize("weight", [1.0, 1e-4])
def test_in_fp16_the_gradient_has_the_scale_of_the_loss(weight):
    """The oracle is float64. Rounded to fp16 without the scale, gradients of light tokens would be 2% off."""
    model = tiny_model("llama", tie_word_embeddings=False, vocab_size=32000, hidden_size=256).half().train()
    attach_loss(model.requires_grad_(False), 1024)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.lm_head.weight, std=0.05)
    targets, weights = torch.arange(64), torch.full((64,), weight)
    hidden = (8 * model.lm_head.weight[targets].float() + 0.3 * torch.randn(64, 256)).half().requires_grad_()
    scale = 65536 / weights.sum()
    (logits_module.sum_of_chunks(model, hidden, targets, weights) * scale / 64).backward()
    exact = hidden.detach().double().requires_grad_()
    terms = F.cross_entropy(exact @ model.lm_head.weight.double().T, targets, reduction="none")
    ((terms * weights).sum() * scale.double() / 64).backward()
    assert (hidden.grad - exact.grad).norm() < 2e-3 * exact.grad.norm()


REGULARISED = {"label_smoothing": 0.1, "z_loss_coef": 1e-3}


@pytest.mark.parametrize("recomputed", [False, True], ids=["one-pass", "recomputed"])
@pytest.mark.parametrize("extra", [{}, REGULARISED], ids=["plain", "regularised"])
@pytest.mark.parametrize("method", ["frozen", "trained"])
def test_one_copy_of_the_logits_in_float32_and_no_product_more_than_needed(method, extra, recomputed, monkeypatch):
    model = tiny_model("llama", tie_word_embeddings=False).train()
    model.lm_head.requires_grad_(method == "trained")
    attach_loss(model, 1024, **extra)
    model.loss_chunks = 4
    if recomputed:
        monkeypatch.setattr(logits_module, "needs_recomputation", lambda *_: True)
    hidden = torch.randn(400, 32, dtype=torch.bfloat16, requires_grad=True)
    targets, weights = torch.arange(400) % 97, torch.rand(400)
    # A logit of float32 and one of bfloat16 beside it.
    limit = 100 * 97 * (4 + 2)
    with torch.autocast("cpu", torch.bfloat16), Largest(97) as forward:
        loss = logits_module.sum_of_chunks(model, hidden, targets, weights if extra else None)
    with Largest(97) as backward:
        loss.backward()
    assert max(forward.most, backward.most) <= limit
    # The gradient by the hidden states, and by the head only where it is trained.
    gradients = 4 * (1 + (method == "trained"))
    expected = (4, 4 + gradients) if recomputed else (4 + gradients, 0)
    assert (forward.products, backward.products) == expected
    assert hidden.grad is not None and (model.lm_head.weight.grad is not None) == (method == "trained")


def terms_in_float64(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, smoothing: float, z_coef: float
) -> torch.Tensor:
    """torch's own label smoothing, and the log of Z that it computes itself."""
    terms = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    return ((terms + z_coef * logits.logsumexp(1).square()) * weights).sum()


@pytest.mark.parametrize("scale", [0.1, 3, 30])
@pytest.mark.parametrize("extra", [{}, REGULARISED], ids=["plain", "regularised"])
def test_loss_and_gradient_are_at_least_as_exact_as_torchs(extra, scale):
    """Against float64. A small scale gives a flat distribution, a large one answers that are all but certain."""
    model = tiny_model("llama").train()
    attach_loss(model, 1024, **extra)
    torch.manual_seed(0)
    targets, weights, logits = torch.randint(8000, (64,)), torch.rand(64), scale * torch.randn(64, 8000)
    logits[torch.arange(32), targets[:32]] += 3 * scale
    settings = extra.get("label_smoothing", 0), extra.get("z_loss_coef", 0)

    def loss_and_gradient(function, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values.requires_grad_()
        loss = function(values)
        return loss.detach().double(), torch.autograd.grad(loss, values)[0].double()

    expected = loss_and_gradient(lambda x: terms_in_float64(x, targets, weights.double(), *settings), logits.double())
    torchs = loss_and_gradient(lambda x: terms_in_float64(x, targets, weights, *settings), logits.clone())
    ours = loss_and_gradient(lambda x: logits_module.sum_terms(model, x, targets, weights), logits.clone())
    for own, other, exact in zip(ours, torchs, expected, strict=True):
        error, torchs_error = (float((value - exact).norm() / exact.norm()) for value in (own, other))
        assert error <= max(torchs_error, 1e-7)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere2"])
def test_one_pass_is_as_exact_as_recomputation(family, monkeypatch):
    rows, weights = weighted_rows()
    batch = collate_padded(rows, 0, weights)
    model = tiny_model(family).train()
    attach_loss(model, 1024, label_smoothing=0.1, z_loss_coef=0.01)
    model.loss_chunks = 3

    def found(recomputed: bool, bf16: bool) -> tuple[float, torch.Tensor]:
        monkeypatch.setattr(logits_module, "needs_recomputation", lambda *_: recomputed)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = next_token_loss(model, batch) / 7
        return float(loss.detach()), torch.cat([g.flatten() for g in gradients(model, loss).values()])

    loss, exact = found(False, False)
    other_loss, other = found(True, False)
    assert loss == pytest.approx(other_loss, rel=1e-6) and (exact - other).norm() < 1e-6 * exact.norm()
    ours, recomputed = (float((found(how, True)[1] - exact).norm() / exact.norm()) for how in (False, True))
    assert ours < 1.1 * recomputed < 5e-2


def test_generation_is_the_familys():
    model, attached = tiny_model("qwen3"), tiny_model("qwen3")
    attach_loss(attached, 1024)
    prompts = {"input_ids": torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10]])}
    prompts["attention_mask"] = (prompts["input_ids"] != 0).long()
    options = {"max_new_tokens": 8, "do_sample": False}
    assert model.generate(**prompts, **options).tolist() == attached.generate(**prompts, **options).tolist()
    assert attached(**prompts).logits.shape == (2, 4, 97)


# peft 0.21.2 asks for a property that transformers 5.23 deprecates
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
)
def test_peft_around_the_attached_model(config):
    torch.manual_seed(1)
    base = tiny_model("llama")
    model = get_peft_model(base, config).eval()
    batch = collate_padded(random_rows(4, 12), 0)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    expected = model(**inputs).loss * batch["num_targets"]
    attach_loss(base, 1024)
    if isinstance(config, PromptTuningConfig):  # PEFT alone would move the places of the targets
        with pytest.raises(ConfigError, match="PEFT's own forward has put virtual tokens before the rows"):
            next_token_loss(model, batch)
        fit_virtual_tokens(model)
        batch = collate_padded(random_rows(4, 12), 0, None, 3)
    torch.testing.assert_close(next_token_loss(model, batch), expected, rtol=1e-6, atol=0)
    assert check_loss(model, "cpu", torch.float32) == "own"


def test_accelerate_wraps_the_attached_forward_in_autocast():
    model = tiny_model("llama")
    attach_loss(model, 1024)
    batch = collate_padded(random_rows(4, 12), 0)
    exact = next_token_loss(model, batch)
    try:
        prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        loss = next_token_loss(prepared, batch)
        assert check_loss(prepared, "cpu", torch.bfloat16) == "own"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert loss.dtype == torch.float32 and loss != exact
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)


def reference_gradients(model: PreTrainedModel, rows: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
    """float64 gradients of the mean loss over all labelled tokens of `rows`, each row alone through the stock model."""
    model = copy.deepcopy(model).double()
    model.zero_grad()
    targets = sum(int((labels[1:] != IGNORED).sum()) for _, labels in rows)
    for ids, labels in rows:
        logits = type(model).forward(model, torch.from_numpy(ids)[None]).logits[0, :-1]
        (F.cross_entropy(logits, torch.from_numpy(labels[1:]), reduction="sum") / targets).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def gradient_case(model: PreTrainedModel, micro_batches: list[dict]) -> dict[str, torch.Tensor]:
    """Gradients of one optimizer step as the training loop takes it, in one process."""
    model.train()
    targets = sum(batch["num_targets"] for batch in micro_batches)
    for batch in micro_batches:
        (next_token_loss(model, batch) / targets).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def packed_batches(rows: list[tuple[np.ndarray, np.ndarray]], capacity: int) -> list[dict]:
    bins = pack(np.array([len(ids) for ids, _ in rows]), capacity, np.random.default_rng(0))
    places = zip(bins.offsets[:-1], bins.offsets[1:], strict=True)
    return [collate_packed([rows[document] for document in bins.order[a:b]]) for a, b in places]


@pytest.mark.parametrize(
    ("chunks", "reentrant"), [(1, None), (3, False), (1, True)], ids=["stored", "recomputed-chunked", "reentrant"]
)
@pytest.mark.parametrize("cut", ["32x1", "8x4", "1x32", "packed-40", "packed-1000"])
def test_gradients_of_a_step_do_not_depend_on_how_it_is_cut(cut, chunks, reentrant):
    rows = random_rows(32, 24)
    model = tiny_model("qwen2", num_hidden_layers=1)
    expected = reference_gradients(model, rows)
    attach_loss(model, 1024)
    model.loss_chunks = chunks
    if reentrant is not None:
        recomputed = functools.partial(checkpoint, use_reentrant=reentrant)
        model._set_gradient_checkpointing(gradient_checkpointing_func=recomputed)
        model.enable_input_require_grads()
    if cut.startswith("packed"):
        enable_packing(model)
        micro_batches = packed_batches(rows, int(cut.removeprefix("packed-")))
    else:
        size = int(cut.split("x")[1])
        micro_batches = [collate_padded(rows[i : i + size], 0) for i in range(0, 32, size)]
    for name, gradient in gradient_case(model, micro_batches).items():
        assert (gradient - expected[name]).norm() <= 1e-5 * expected[name].norm(), name


def weighted_rows() -> tuple[list[tuple[np.ndarray, np.ndarray]], list[np.ndarray]]:
    rows = random_rows(6, 12, seed=4)
    rng = np.random.default_rng(5)
    return rows, [rng.choice(np.array([0.25, 0.5, 1.0, 3.0], np.float32), len(ids)) for ids, _ in rows]


@pytest.mark.parametrize(
    ("family", "packed", "chunks"),
    [("llama", True, 1), ("llama", True, 3), ("llama", False, 1), ("hyperclovax", False, 1)],
)
@torch.no_grad()
def test_each_label_counts_its_weight(family, packed, chunks):
    rows, weights = weighted_rows()
    model = tiny_model(family)
    expected, total = 0.0, 0.0
    for (ids, labels), each in zip(rows, weights, strict=True):
        logits = type(model).forward(model, torch.from_numpy(ids)[None]).logits[0, :-1].double()
        targets, each = torch.from_numpy(labels[1:]), torch.from_numpy(each[1:]).double()
        terms = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
        expected, total = expected + float((terms * each).sum()), total + float(each[targets != IGNORED].sum())
    assert attach_loss(model, 1024) == ("own" if family == "llama" else "stock")
    model.loss_chunks = chunks
    if packed:
        enable_packing(model)
    batch = collate_packed(rows, weights) if packed else collate_padded(rows, 0, weights)
    assert float(next_token_loss(model, batch)) == pytest.approx(expected, rel=1e-5)
    assert batch["total_weight"] == pytest.approx(total, rel=1e-12)
    plain = collate_packed(rows) if packed else collate_padded(rows, 0)
    assert plain["total_weight"] == batch["num_targets"] != pytest.approx(total)
    ones = {**batch, "weights": torch.ones_like(batch["weights"])}
    assert float(next_token_loss(model, ones)) == pytest.approx(float(next_token_loss(model, plain)))


# --- label smoothing and z-loss ---


def defined_loss(
    model: PreTrainedModel, rows: list, weights: list[np.ndarray], smoothing: float, z_coef: float
) -> tuple[float, dict[str, torch.Tensor]]:
    """Sum and gradients in float64, written out token by token, each row alone through the stock model."""
    model = copy.deepcopy(model).double()
    total = torch.zeros((), dtype=torch.float64)
    for (ids, labels), row_weights in zip(rows, weights, strict=True):
        logits = type(model).forward(model, torch.from_numpy(ids)[None]).logits[0]
        for t in range(1, len(ids)):
            if labels[t] == IGNORED:
                continue
            z = logits[t - 1].exp().sum()
            minus_log_p = z.log() - logits[t - 1]
            term = (1 - smoothing) * minus_log_p[labels[t]] + smoothing * minus_log_p.mean() + z_coef * z.log() ** 2
            total = total + float(row_weights[t]) * term
    return float(total.detach()), gradients(model, total)


@pytest.mark.parametrize(("smoothing", "z_coef"), [(0.1, 0.0), (0.0, 0.01), (0.3, 0.5)])
@pytest.mark.parametrize(
    ("family", "packed", "chunks", "weighted"),
    [
        ("llama", True, 1, True),
        ("llama", True, 3, True),
        ("llama", False, 3, False),
        ("gemma2", True, 1, True),  # soft-cap
        ("cohere2", False, 1, True),  # logit scale
        ("granite", True, 2, False),  # the other logit scale
        ("hyperclovax", False, 1, True),  # stock path
        ("hyperclovax", True, 1, False),
    ],
)
def test_smoothing_and_z_loss_follow_their_definitions(family, packed, chunks, weighted, smoothing, z_coef):
    rows, weights = weighted_rows()
    weights = weights if weighted else [np.ones(len(ids), np.float32) for ids, _ in rows]
    model = tiny_model(family).train()
    expected, expected_gradients = defined_loss(model, rows, weights, smoothing, z_coef)
    path = attach_loss(model, 1024, label_smoothing=smoothing, z_loss_coef=z_coef)
    assert path == ("stock" if family in UNFUSED_FAMILIES else "own")
    model.loss_chunks = chunks
    if packed:
        enable_packing(model)
    batch_weights = weights if weighted else None
    batch = collate_packed(rows, batch_weights) if packed else collate_padded(rows, 0, batch_weights)
    loss = next_token_loss(model, batch)
    assert float(loss.detach()) == pytest.approx(expected, rel=2e-6)
    assert_close_in_norm({n: g.double() for n, g in gradients(model, loss).items()}, expected_gradients, 1e-5)


@pytest.mark.parametrize("extra", [{"label_smoothing": 0.1}, {"z_loss_coef": 1e-3}])
def test_smoothing_and_z_loss_act_in_training_only(extra):
    batch = collate_padded(random_rows(4, 12), 0)
    plain, model = tiny_model("llama"), tiny_model("llama")
    attach_loss(plain, 1024)
    assert attach_loss(model.train(), 1024, **extra) == "own"
    assert next_token_loss(model.eval(), batch) == next_token_loss(plain, batch)
    ratio = next_token_loss(model.train(), batch) / next_token_loss(plain.train(), batch)
    assert abs(ratio - 1) > 1e-3
    assert check_loss(model, "cpu", torch.float32) == "own" and model.training


def test_uniform_predictions_have_the_same_loss_smoothed():
    model = tiny_model("llama", tie_word_embeddings=False).train()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    batch = collate_padded(random_rows(4, 12), 0)
    count, log_z = float(batch["num_targets"]), float(np.log(97))
    attach_loss(model, 1024, label_smoothing=0.4)
    assert float(next_token_loss(model, batch).detach()) == pytest.approx(count * log_z, rel=1e-6)
    attach_loss(model, 1024, label_smoothing=0.4, z_loss_coef=0.5)
    loss = float(next_token_loss(model, batch).detach())
    assert loss == pytest.approx(count * (log_z + 0.5 * log_z**2), rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "hyperclovax"])
def test_smoothing_and_z_loss_keep_no_second_copy_of_the_logits(family):
    batch = collate_padded(random_rows(4, 12), 0)
    copies = []
    for extra in ({}, {"label_smoothing": 0.1, "z_loss_coef": 1e-3}):
        model = tiny_model(family).train()
        attach_loss(model, 1024, **extra)
        sizes: set[int] = set()

        def keep(tensor: torch.Tensor, sizes: set[int] = sizes) -> torch.Tensor:
            if tensor.shape[-1:] == (97,) and len(tensor) != 32 and tensor.is_floating_point():  # not the head's weight
                sizes.add(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = next_token_loss(model, batch)
        copies.append(len(sizes))
        loss.backward()
    assert copies == ([1, 1] if family == "hyperclovax" else [0, 0])


@pytest.mark.parametrize(
    "values",
    [{"label_smoothing_factor": 1.0}, {"label_smoothing_factor": -0.1}, {"z_loss_coef": -1e-4}, {"z_loss_coef": "x"}],
)
def test_impossible_terms_are_refused(values):
    with pytest.raises(ValidationError, match=next(iter(values))):
        TrainOptions(**values)
    assert TrainOptions(label_smoothing_factor=0.999, z_loss_coef=7).z_loss_coef == 7.0
    assert (TrainOptions().label_smoothing_factor, TrainOptions().z_loss_coef) == (0.0, 0.0)


# --- the snippet in the package's README ---


def test_the_readme_snippet_trains_a_plain_transformers_model(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "accel_llm" / "model" / "README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert snippet.count("\n") <= 15
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)
    stock = AutoModelForCausalLM.from_pretrained("accel_llm/demo_base")
    rows = [torch.from_numpy(ids)[None] for ids in names["documents"]]
    expected = sum(stock(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in rows) / 5
    torch.testing.assert_close(names["loss"].float(), expected, rtol=1e-5, atol=0)
    names["loss"].backward()
    assert all(parameter.grad is not None for parameter in names["model"].parameters())


def with_sources(batch: dict, sources: list[int], names: list[str]) -> dict:
    add_sources(batch, sources, names)
    return batch


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("path", ["one-pass", "recomputed", "stock"])
def test_the_loss_of_each_source_is_that_of_its_documents_and_changes_no_bit(path, packed, monkeypatch):
    """The oracle is the family's own loss of each document alone."""
    model = tiny_model("llama", tie_word_embeddings=False).train()
    attach_loss(model, 1024)
    if packed:
        enable_packing(model)
    model.loss_chunks = 3
    if path == "recomputed":
        monkeypatch.setattr(logits_module, "needs_recomputation", lambda *_: True)
    if path == "stock":
        model.loss_path = "stock"
    rows, sources = random_rows(5, 12), [2, 0, 2, 0, 2]
    weights = [np.random.default_rng(k).random(len(ids)).astype(np.float32) for k, (ids, _) in enumerate(rows)]
    make = collate_packed if packed else functools.partial(collate_padded, pad_token_id=0)
    plain, batch = make(rows, weights=weights), with_sources(make(rows, weights=weights), sources, ["a", "b", "c"])
    losses = [next_token_loss(model, each) for each in (plain, batch)]
    assert torch.equal(*losses) and "measured" not in plain
    same = [gradients(model, loss) for loss in losses]  # a backward pass that computes logits again adds nothing
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    for number, name in enumerate("abc"):
        total = weight = 0.0
        for (ids, labels), own_weights, source in zip(rows, weights, sources, strict=True):
            if source == number:
                alone = tiny_model("llama", tie_word_embeddings=False).requires_grad_(False)
                logits = alone(input_ids=torch.tensor(ids)[None]).logits[0, :-1]
                targets, factors = torch.tensor(labels)[1:], torch.tensor(own_weights)[1:]
                terms = F.cross_entropy(logits.double(), targets.long(), reduction="none", ignore_index=IGNORED)
                total += float((terms * factors).sum())
                weight += float(factors[targets != IGNORED].double().sum())
        assert batch["measured"][f"loss/{name}"].tolist() == pytest.approx([total, weight], rel=1e-5, abs=1e-9)
