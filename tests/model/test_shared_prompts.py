"""Answers that share a prompt, which stands in the packed row once, are computed as in documents of their own."""

from typing import Any

import numpy as np
import pytest
import torch
from answer_batches import answer_batch, random_pairs, separate_documents
from peft import LoraConfig, get_peft_model
from support import FAMILIES, relative_distance, tiny_model
from torch import nn

from accel_llm.data.batches import collate_packed
from accel_llm.model import attention, document_attention
from accel_llm.model.attention import enable_packing, forward_arguments, packed_attention
from accel_llm.model.document_attention import assumed_gpu
from accel_llm.model.log_probabilities import answer_log_probabilities
from accel_llm.model.loss import attach_loss
from accel_llm.model.neftune import attach_neftune
from accel_llm.model.probe import sharing_obstacle

PAIRS = random_pairs()
NAMED = ["llama", "qwen3", "mistral", "gemma2", "gpt_oss", "mixtral", "deepseek_v3"]
# peft 0.21.2 asks for a property that transformers 5.23 deprecates, and knows experts under two names
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:(?s).*_pattern keys did not match:RuntimeWarning"),
]


def quick(names: list[str], *chosen: str) -> list[Any]:
    return [pytest.param(name, marks=[] if name in chosen else pytest.mark.long) for name in names]


def shared_logits(model: nn.Module) -> list[torch.Tensor]:
    """Logits of each prompt with its first answer, and of its second answer."""
    batch = answer_batch(PAIRS, "shared")
    return list(model(**forward_arguments(batch), use_cache=False).logits[0].split(batch["lengths"]))


def separate_logits(model: nn.Module) -> list[torch.Tensor]:
    """The same logits, of documents without anything in common."""
    batch = collate_packed([(ids, ids) for ids in separate_documents(PAIRS)])
    logits = list(model(**forward_arguments(batch), use_cache=False).logits[0].split(batch["lengths"]))
    logits[1::2] = [each[len(prompt) :] for each, (prompt, *_) in zip(logits[1::2], PAIRS, strict=True)]
    return logits


@pytest.mark.parametrize("family", quick(list(FAMILIES), "llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3"))
def test_logits_are_those_of_documents_of_their_own(family: str) -> None:
    """The window of 4 tokens is shorter than two prompts, and begins in a prompt or in an answer."""
    model = tiny_model(family)
    enable_packing(model)
    with torch.no_grad():
        for shared, separate in zip(shared_logits(model), separate_logits(model), strict=True):
            assert relative_distance(shared, separate) <= 1e-5


def loss_and_gradient(model: Any, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    sums = answer_log_probabilities(model, answer_batch(PAIRS, layout)).sums
    model.zero_grad()
    first, second = sums.view(-1, 2).T
    (-nn.functional.logsigmoid(0.1 * (first - second)).sum()).backward()
    return sums.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def answering_model(family: str, how: str) -> Any:
    model = tiny_model(family)
    attach_loss(model.train(), 1024)
    enable_packing(model)
    if "recomputed" in how:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if "lora" in how:
        torch.manual_seed(1)
        settings = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, r=4)
        model = get_peft_model(model, settings)  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("how", ["plain", "recomputed", "lora recomputed"])
@pytest.mark.parametrize("family", quick(NAMED, "mistral"))
def test_gradients_are_those_of_documents_of_their_own(family: str, how: str) -> None:
    model = answering_model(family, how)
    sums, gradient = loss_and_gradient(model, "shared")
    expected_sums, expected = loss_and_gradient(model, "packed")
    assert relative_distance(sums, expected_sums) <= 1e-6
    assert relative_distance(gradient, expected) <= 5e-6


def test_in_float64_nothing_differs() -> None:
    """GPT-2 computes nothing in float32, as the norms of other families do."""
    model = answering_model("gpt2", "recomputed").double()
    for shared, separate in zip(loss_and_gradient(model, "shared"), loss_and_gradient(model, "packed"), strict=True):
        assert relative_distance(shared, separate) <= 1e-13


def test_answers_see_their_prompt_and_not_each_other() -> None:
    """Not a bit crosses over."""
    model = tiny_model("qwen3")
    enable_packing(model)
    embedded = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: embedded.append(output))
    logits = shared_logits(model)
    start = 0
    for k, (prompt, one, other) in enumerate(PAIRS):
        places = list(range(start, start + len(prompt) + len(one) + len(other)))
        prompt_and_one, answer = places[: len(prompt) + len(one)], places[len(prompt) + len(one) :]
        for part, seen in ((2 * k, prompt_and_one), (2 * k + 1, places[: len(prompt)] + answer)):
            (gradient,) = torch.autograd.grad(logits[part].square().sum(), embedded, retain_graph=True)
            assert gradient[0].any(-1).nonzero().flatten().tolist() == seen
        start += len(places)


# --- the attention itself ---

# Tokens of prompt, first and second answer.
LENGTHS = ((4, 3, 2), (1, 1, 6))
HEADS, KEY_HEADS, WIDTH, VALUE_WIDTH = 4, 2, 8, 6


def places() -> dict[str, Any]:
    return {
        name: value
        for name, value in forward_arguments(answer_batch(random_pairs(LENGTHS), "shared")).items()
        if name not in ("input_ids", "position_ids")
    }


def random_states(value_width: int = VALUE_WIDTH, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(map(sum, LENGTHS))
    sizes = ((HEADS, WIDTH), (KEY_HEADS, WIDTH), (KEY_HEADS, value_width))
    return [torch.randn(1, heads, tokens, width, generator=generator, dtype=dtype) for heads, width in sizes]


def definition(
    states: list[torch.Tensor], scaling: float, window: int | None, softcap: float | None, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Token by token: what a document of prompt and answer sees, [1, T, heads, width of the values]."""
    query, key, value = states
    output, start = torch.zeros(1, query.shape[2], HEADS, value.shape[3], dtype=query.dtype), 0
    for prompt, first, second in LENGTHS:
        whole = [*range(start, start + prompt + first)]
        other = [*range(start, start + prompt), *range(start + prompt + first, start + prompt + first + second)]
        for document, own in ((whole, whole), (other, other[prompt:])):
            for token in own:
                end = document.index(token) + 1
                seen = document[max(0, end - (window or end)) : end]
                for head in range(HEADS):
                    scores = key[0, head // 2, seen] @ query[0, head, token] * scaling
                    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                    scores = scores if sinks is None else torch.cat([scores, sinks[head : head + 1]])
                    output[0, token, head] = scores.softmax(0)[: len(seen)] @ value[0, head // 2, seen]
        start += prompt + first + second
    return output


SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 5, 100])
def test_scores_follow_their_definition(window: int | None, softcap: float | None, sinks: torch.Tensor | None) -> None:
    """Grouped heads, values of another width; with and without an explicit matrix of scores."""
    output, _ = packed_attention(
        nn.Module(),
        *random_states(),
        None,
        scaling=0.3,
        sliding_window=window,
        softcap=softcap,
        s_aux=sinks,
        **places(),
    )
    expected = definition(random_states(), 0.3, window, softcap, sinks)
    plain = softcap is None and sinks is None
    torch.testing.assert_close(output, expected, rtol=1e-12 if plain else 1e-5, atol=1e-12 if plain else 1e-6)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_dropout_is_applied_to_weights_and_keeps_their_mean(softcap: float | None) -> None:
    torch.manual_seed(0)
    batch = forward_arguments(answer_batch(random_pairs([(40, 40, 40)]), "shared"))
    value = torch.ones(1, 1, 120, 8)
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "key_positions")
    output, _ = packed_attention(
        nn.Module(), value, value, value, None, 0.5, softcap=softcap, **{name: batch[name] for name in names}
    )
    assert output.std() > 0.05 and abs(output[0, 80:].mean() - 1) < 0.1


def kernel_by_definition(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *places: Any, window_size: tuple[int, int], scale: float, enable_gqa: bool
) -> torch.Tensor:  # fmt: skip
    """What FlashAttention 2.1 and later compute: of each document, the last query stands at the last key."""
    queries, keys, longest, most = places
    assert (longest, most) == (int(queries.diff().max()), int(keys.diff().max())) and enable_gqa
    outputs = []
    for k in range(len(queries) - 1):
        q = query[queries[k] : queries[k + 1]].double()
        k_, v = (t[keys[k] : keys[k + 1]].double().repeat_interleave(2, 1) for t in (key, value))
        distance = torch.arange(len(k_))[None] - torch.arange(len(k_) - len(q), len(k_))[:, None]
        hidden = (distance > window_size[1]) | ((distance < -window_size[0]) if window_size[0] >= 0 else False)
        scores = torch.einsum("qhd,khd->hqk", q, k_) * scale
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


@pytest.mark.skipif("window_size" not in document_attention.VARLEN_OPTIONS, reason="torch before 2.12")
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("value_width", [WIDTH, VALUE_WIDTH])
def test_a_gpu_is_asked_for_the_same(window: int | None, value_width: int, monkeypatch) -> None:
    """The arguments of the variable-length kernel, which no CPU has, mean what the definition says."""
    monkeypatch.setattr(document_attention, "varlen_attn", kernel_by_definition)
    states = random_states(value_width, torch.bfloat16)
    with assumed_gpu():
        output, _ = packed_attention(nn.Module(), *states, None, scaling=0.3, sliding_window=window, **places())
    expected = definition([each.double() for each in states], 0.3, window, None, None)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_noise_on_embeddings_is_that_of_the_whole_document() -> None:
    """NEFTune: alpha / sqrt(length * width), where the length of a second answer counts its prompt."""
    model = tiny_model("llama").train()
    enable_packing(model)
    attach_neftune(model, 5.0)
    embedding, noisy = model.get_input_embeddings(), []
    embedding.register_forward_hook(lambda module, args, output: noisy.append(output.detach()))
    pairs = random_pairs([(30, 10, 400)])
    batch = answer_batch(pairs, "shared")
    model(**forward_arguments(batch), use_cache=False)
    noise = (noisy[0] - torch.nn.functional.embedding(batch["input_ids"], embedding.weight))[0].abs().detach()
    for part, length in ((noise[:40], 40), (noise[40:], 430)):
        bound = 5.0 / np.sqrt(length * 32)
        assert 0.9 * bound < float(part.max()) <= bound


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_variable_length_kernel_equals_one_document_at_a_time(dtype, kv_heads, window, monkeypatch):
    pairs = random_pairs([(70, 40, 50), (3, 1, 90), (100, 2, 1)])
    arguments = forward_arguments(answer_batch(pairs, "shared"))
    tokens = arguments.pop("input_ids").shape[1]
    arguments = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in arguments.items() if k != "position_ids"}
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(1, heads, tokens, 64, generator=generator) for heads in (8, kv_heads, kv_heads)]
    calls, kernel = [], document_attention.varlen_attn
    monkeypatch.setattr(document_attention, "varlen_attn", lambda *args, **o: calls.append(1) or kernel(*args, **o))

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [tensor.to("cuda", dtype).requires_grad_() for tensor in states]
        output, _ = packed_attention(nn.Module(), *inputs, None, sliding_window=window, **arguments)
        weights = torch.linspace(-1, 1, output.numel(), device="cuda").view_as(output)
        (output.float() * weights).sum().backward()
        return [tensor.detach().float().cpu() for tensor in (output, *(tensor.grad for tensor in inputs))]

    fused = results(dtype)
    assert bool(calls) == (window is None or "window_size" in document_attention.VARLEN_OPTIONS)
    monkeypatch.setattr(attention, "varlen_supports", lambda *_: False)
    for packed, alone, truth in zip(fused, results(dtype), results(torch.float32), strict=True):
        assert (packed - truth).norm() <= 1.5 * (alone - truth).norm() + 1e-3 * truth.norm()


@pytest.mark.parametrize("family", NAMED)
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_logits_are_those_of_documents_of_their_own_on_a_gpu(family: str) -> None:
    model = tiny_model(family).to("cuda", torch.bfloat16)
    enable_packing(model)
    assert sharing_obstacle(model, "cuda", torch.bfloat16) is None
