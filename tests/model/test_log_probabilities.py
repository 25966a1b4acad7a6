"""Log-probabilities of answers against plain transformers in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from answer_batches import LAYOUTS, answer_batch, random_pairs
from largest import Largest
from peft import LoraConfig, get_peft_model
from support import relative_distance, tiny_model
from transformers import PreTrainedModel

from accel_llm.data.batches import collate_padded
from accel_llm.model import log_probabilities as scores_module
from accel_llm.model.attention import enable_packing
from accel_llm.model.log_probabilities import AnswerScores, answer_log_probabilities, log_probabilities
from accel_llm.model.loss import attach_loss, next_token_loss

PAIRS = random_pairs()
# Families with scales and caps of their logits, windows, sinks, values of another width, experts; two on the stock path.
OWN = ["llama", "qwen3", "mistral", "gemma2", "cohere", "granitemoe", "gpt_oss", "mixtral", "deepseek_v3"]
STOCK = ["hyperclovax", "recurrent_gemma"]
pytestmark = [
    # peft 0.21.2 asks for a property that transformers 5.23 deprecates
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # and knows experts under two names
    pytest.mark.filterwarnings("ignore:(?s).*_pattern keys did not match:RuntimeWarning"),
]


def objective(sums: torch.Tensor) -> torch.Tensor:
    """A loss in which each answer has another weight, and in which they depend on each other."""
    first, second = sums.view(-1, 2).T
    return -torch.nn.functional.logsigmoid(0.1 * (first - second)).sum() + (0.01 * first.square()).sum()


def gradient(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.requires_grad])


def plain_scores(model: Any, pairs: list = PAIRS) -> AnswerScores:
    """Plain transformers, one document at a time."""
    sums, tokens, squares = [], [], []
    for prompt, *answers in pairs:
        for answer in answers:
            logits = model(input_ids=torch.from_numpy(np.concatenate([prompt, answer]))[None], use_cache=False).logits
            log_p = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            tokens.append(log_p.gather(1, torch.from_numpy(answer)[:, None]).squeeze(1))
            sums.append(tokens[-1].sum())
            squares.append((2 * log_p).logsumexp(1).detach())
    return AnswerScores(torch.stack(sums), torch.cat(tokens), torch.cat(squares), None)


def adapted(model: PreTrainedModel, method: str) -> Any:
    if method == "full":
        return model
    torch.manual_seed(1)
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, r=4)
    return get_peft_model(model, settings)


def in_float64(family: str, method: str) -> Any:
    model = tiny_model(family)
    model.set_experts_implementation("eager")  # transformers' grouped products are not for float64
    return adapted(model, method).double()


def ours(family: str, method: str, packed: bool, chunks: int, **options: Any) -> Any:
    model = tiny_model(family, **options)
    assert attach_loss(model, 1024) == ("stock" if family in STOCK else "own")
    if packed:
        enable_packing(model)
    model.loss_chunks = chunks  # type: ignore[assignment]
    return adapted(model, method)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    assert relative_distance(actual.detach(), expected.detach()) <= tolerance


QUICK = [("llama", "lora"), ("gemma2", "full"), ("hyperclovax", "lora")]
CASES = [(family, method) for family in (*OWN, *STOCK) for method in ("full", "lora")]


@pytest.mark.parametrize(
    ("family", "method"), [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.long) for case in CASES]
)
def test_answers_and_gradients_are_those_of_plain_transformers(family: str, method: str) -> None:
    """Padded, packed, and with prompts that stand in the row once; the vocabulary projected in one chunk or in three."""
    reference = in_float64(family, method)
    expected = plain_scores(reference)
    exact = gradient(reference, objective(expected.sums))
    for layout in LAYOUTS if family != "recurrent_gemma" else ["padded"]:
        model = ours(family, method, layout != "padded", 3 if layout == "packed" else 1)
        scores = answer_log_probabilities(model, answer_batch(PAIRS, layout), squares=True)
        assert_close(scores.sums, expected.sums, 1e-6)
        assert_close(scores.tokens, expected.tokens, 1e-6)
        assert_close(scores.log_squares, expected.log_squares, 5e-6)
        assert_close(gradient(model, objective(scores.sums)), exact, 1e-5)
        assert scores.sums.dtype == torch.float64 and scores.balance is None


@pytest.mark.parametrize("recomputed", [False, True], ids=["one-pass", "recomputed"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_gradient_is_exact_in_float64(trained: bool, recomputed: bool, monkeypatch) -> None:
    """By hidden states and head; each token of a vocabulary of unlike sizes, and chunks of unlike lengths."""
    model = tiny_model("llama", tie_word_embeddings=False).double()
    model.lm_head.requires_grad_(trained)
    monkeypatch.setattr(scores_module, "needs_recomputation", lambda *_: recomputed)
    torch.manual_seed(0)
    hidden, ids, weights = torch.randn(10, 32).double(), torch.randint(97, (10,)), torch.randn(10).double()
    hidden.requires_grad_()
    log_p = (hidden @ model.lm_head.weight.T).log_softmax(1)
    trainable = [hidden, *([model.lm_head.weight] if trained else [])]
    expected = log_p.gather(1, ids[:, None]).squeeze(1)
    exact = torch.autograd.grad((expected.exp() * weights).sum(), trainable)
    model.eval_loss_chunks = 0
    for chunks in (1, 3, 12):
        model.loss_chunks = chunks
        tokens, squares = log_probabilities(model, hidden, ids, squares=True)
        assert_close(tokens.detach(), expected.detach(), 1e-14)
        assert squares is not None and not squares.requires_grad
        assert_close(squares, (2 * log_p.detach()).logsumexp(1), 1e-14)
        for own, other in zip(torch.autograd.grad((tokens.exp() * weights).sum(), trainable), exact, strict=True):
            assert_close(own, other, 1e-13)
        with torch.no_grad():
            assert torch.equal(log_probabilities(model, hidden, ids)[0], tokens.detach())


@pytest.mark.parametrize("scale", [0.1, 3, 30])
def test_scores_are_at_least_as_exact_as_torchs(scale: float) -> None:
    torch.manual_seed(0)
    ids, logits = torch.randint(8000, (64,)), scale * torch.randn(64, 8000)
    logits[torch.arange(32), ids[:32]] += 3 * scale  # answers that are all but certain
    exact = logits.double().log_softmax(1)
    torchs = logits.log_softmax(1)
    tokens, squares = scores_module.LogProbabilities.apply(logits.clone(), ids, True)
    expected, other = (each.gather(1, ids[:, None]).squeeze(1) for each in (exact, torchs))
    assert relative_distance(tokens, expected) <= max(relative_distance(other, expected), 1e-7)
    assert relative_distance(squares, (2 * exact).logsumexp(1)) <= 1e-6


def test_bfloat16_is_as_exact_as_plain_transformers_in_bfloat16() -> None:
    expected = plain_scores(in_float64("llama", "lora"))
    exact = gradient(reference := in_float64("llama", "lora"), objective(plain_scores(reference).sums))
    plain, model = adapted(tiny_model("llama"), "lora"), ours("llama", "lora", True, 3)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = plain_scores(plain)
        scores = answer_log_probabilities(model, answer_batch(PAIRS, "shared"))
    distances = [relative_distance(each.sums.detach(), expected.sums.detach()) for each in (scores, theirs)]
    assert distances[0] < max(1.5 * distances[1], 5e-3)
    errors = [
        relative_distance(gradient(m, objective(each.sums)), exact) for m, each in ((model, scores), (plain, theirs))
    ]
    assert errors[0] < 1.1 * errors[1] < 5e-2


def test_in_fp16_the_gradient_has_the_scale_of_the_loss() -> None:
    """Rounded to fp16 before the loss and its scale are known, small gradients of answers all but certain would vanish."""
    model = (
        tiny_model("llama", tie_word_embeddings=False, vocab_size=4000, hidden_size=256).half().requires_grad_(False)
    )
    model.loss_chunks, model.eval_loss_chunks = 2, 0  # type: ignore[assignment]
    torch.manual_seed(0)
    torch.nn.init.normal_(model.lm_head.weight, std=0.05)
    ids = torch.arange(64)
    hidden = (16 * model.lm_head.weight[ids].float() + 0.3 * torch.randn(64, 256)).half().requires_grad_()
    (log_probabilities(model, hidden, ids)[0].sum() * 1024).backward()
    exact = hidden.detach().double().requires_grad_()
    log_p = (exact @ model.lm_head.weight.double().T).log_softmax(1)
    (log_p.gather(1, ids[:, None]).sum() * 1024).backward()
    assert_close(hidden.grad, exact.grad, 2e-3)


@pytest.mark.parametrize(("family", "method"), [("llama", "full"), ("llama", "lora"), ("hyperclovax", "lora")])
def test_a_slot_without_units_adds_nothing_but_takes_part_in_the_backward_pass(family: str, method: str) -> None:
    for layout in LAYOUTS:
        model = ours(family, method, layout != "padded", 3)
        scores = answer_log_probabilities(model, answer_batch([], layout))
        assert scores.sums.shape == scores.tokens.shape == (0,)
        assert not gradient(model, scores.sums.sum()).any()


@pytest.mark.parametrize("method", ["frozen", "trained"])
def test_one_copy_of_the_logits_in_float32_and_no_product_more_than_needed(method: str) -> None:
    model = tiny_model("llama", tie_word_embeddings=False).train()
    model.lm_head.requires_grad_(method == "trained")
    model.loss_chunks, model.eval_loss_chunks = 4, 0  # type: ignore[assignment]
    hidden, ids = torch.randn(400, 32, dtype=torch.bfloat16, requires_grad=True), torch.arange(400) % 97
    limit = 100 * 97 * (4 + 2)  # a logit of float32 and one of bfloat16 beside it
    with torch.autocast("cpu", torch.bfloat16), Largest(97) as forward:
        tokens, _ = log_probabilities(model, hidden, ids, squares=True)
    with Largest(97) as backward:
        (tokens * torch.rand(400)).sum().backward()
    assert max(forward.most, backward.most) <= limit
    # The logits once and their gradient; of a trained head the logits twice, and the gradients by states and head.
    assert (forward.products, backward.products) == ((8, 0) if method == "frozen" else (4, 12))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Largest(97) as reference:
        log_probabilities(model, hidden, ids)
    assert reference.most <= limit and reference.products == 4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_balance_loss_of_experts_stands_beside_the_answers(layout: str) -> None:
    """In training only; that of a shared prompt is the row's own, see `sharing_obstacle`."""
    model = tiny_model("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.1).train()
    assert attach_loss(model, 1024) == "stock"
    documents = [np.concatenate([prompt, answer]) for prompt, *answers in PAIRS for answer in answers]
    padded = collate_padded([(ids, ids) for ids in documents], 0)
    expected = (
        type(model)
        .forward(model, padded["input_ids"], attention_mask=padded["attention_mask"], use_cache=False)
        .aux_loss
    )
    if layout != "padded":
        enable_packing(model)
    balance = answer_log_probabilities(model, answer_batch(PAIRS, layout)).balance
    assert balance is not None and balance.requires_grad
    if layout != "shared":
        torch.testing.assert_close(balance, 0.1 * expected, rtol=1e-5, atol=0)
    assert answer_log_probabilities(model.eval(), answer_batch(PAIRS, layout)).balance is None


def test_a_prepared_model_in_bf16_returns_the_scores() -> None:
    """Accelerate rebuilds the outputs of a model in mixed precision."""
    plain = ours("llama", "lora", True, 1)
    try:
        prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(ours("llama", "lora", True, 1))
        scores = answer_log_probabilities(prepared, answer_batch(PAIRS, "shared"), squares=True)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    with torch.autocast("cpu", torch.bfloat16):
        expected = answer_log_probabilities(plain, answer_batch(PAIRS, "shared"), squares=True)
    for own, other in zip(scores[:3], expected[:3], strict=True):
        assert torch.equal(own, other)


def test_a_sum_is_not_rounded_as_float32_rounds() -> None:
    """A thousand tokens: the same numbers added up in float32 would be another 1e-5 of beta * log p away."""
    model = ours("llama", "full", False, 1, max_position_embeddings=2048)
    batch = answer_batch(random_pairs([(1, 1500, 1200)]), "padded")
    with torch.no_grad():
        scores = answer_log_probabilities(model, batch)
    parts = scores.tokens.double().split(batch["answer_lengths"])
    torch.testing.assert_close(scores.sums, torch.stack([part.sum() for part in parts]), rtol=1e-12, atol=0)


def test_the_next_token_loss_is_the_sum_over_the_same_tokens() -> None:
    """A model serves both: the loss of answers as labels is what their log-probabilities add up to."""
    model = ours("gemma2", "full", False, 2).train()
    documents = [np.concatenate([prompt, answer]) for prompt, *answers in PAIRS for answer in answers]
    prompts = [len(prompt) for prompt, *_ in PAIRS for _ in range(2)]
    rows = [(ids, np.where(np.arange(len(ids)) < n, -100, ids)) for ids, n in zip(documents, prompts, strict=True)]
    loss = next_token_loss(model, collate_padded(rows, 0))
    scores = answer_log_probabilities(model, answer_batch(PAIRS, "padded"))
    torch.testing.assert_close(-scores.sums.sum().float(), loss, rtol=1e-6, atol=0)
