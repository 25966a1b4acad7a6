from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import FAMILIES, SCALED, UNFUSED_FAMILIES, UNPACKABLE, random_rows, scaled_model, tiny_model
from torch import nn

from accel_llm.data.batches import collate_packed, collate_padded
from accel_llm.errors import ConfigError
from accel_llm.model import attention, document_attention
from accel_llm.model.attention import (
    PACKED_ATTENTION,
    PADDED_ATTENTION,
    enable_packing,
    enable_padding,
    forward_arguments,
    packed_attention,
    stock_attention,
)
from accel_llm.model.document_attention import (
    VARLEN_OPTIONS,
    assumed_gpu,
    group_documents,
    grouped_attention,
    sdpa_attention,
    varlen_supports,
)
from accel_llm.model.loss import attach_loss, next_token_loss
from accel_llm.model.probe import check_isolation


def alone(model, rows) -> list[torch.Tensor]:
    """Logits of each row by itself under transformers' own attention."""
    with stock_attention(model):
        return [model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0] for ids, _ in rows]


def in_one_row(model, rows) -> list[torch.Tensor]:
    logits = model(**forward_arguments(collate_packed(rows)), use_cache=False).logits[0]
    return list(logits.split([len(ids) for ids, _ in rows]))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_computed_as_if_alone(family):
    rows = random_rows(5, 20)
    model = tiny_model(family)
    attach_loss(model, 1024)
    enable_packing(model)
    with torch.no_grad():
        for packed, single in zip(in_one_row(model, rows), alone(model, rows), strict=True):
            assert (packed - single).norm() <= 1e-5 * single.norm()
        packed = next_token_loss(model, collate_packed(rows))
        with stock_attention(model):
            singles = [next_token_loss(model, collate_padded([row], 0)) for row in rows]
    torch.testing.assert_close(packed, sum(singles), rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_changing_one_document_moves_no_bit_of_another(family):
    rows = random_rows(5, 20)
    model = tiny_model(family)
    enable_packing(model)
    changed_rows = [rows[0], (rows[1][0][::-1].copy(), rows[1][1]), *rows[2:]]
    with torch.no_grad():
        before, after = in_one_row(model, rows), in_one_row(model, changed_rows)
    # An expert multiplies the tokens of all documents that chose it at once, and with more than one thread the number of
    # rows decides how a product is summed: seen up to 6e-7. That nothing crosses over is in the gradients, exactly.
    rounding = 2e-6 if any("expert" in name for name in FAMILIES[family]) else 0.0
    same = [bool((a - b).norm() <= rounding * b.norm()) for a, b in zip(before, after, strict=True)]
    assert same == [True, False, True, True, True]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_are_what_the_familys_eager_attention_gives(family):
    rows = random_rows(5, 20, seed=1)
    model = tiny_model(family, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    with torch.no_grad():
        singles = [model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0] for ids, _ in rows]
        enable_packing(model)
        for packed, single in zip(in_one_row(model, rows), singles, strict=True):
            assert (packed - single).norm() <= 1e-5 * single.norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_crosses_a_boundary(family):
    rows = random_rows(4, 12)
    model = tiny_model(family)
    enable_packing(model)
    embedded = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: embedded.append(output))
    logits = in_one_row(model, rows)
    (gradient,) = torch.autograd.grad(logits[1].square().sum(), embedded)
    parts = gradient[0].split([len(ids) for ids, _ in rows])
    assert [bool(part.any()) for part in parts] == [False, True, False, False]


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("bloom", {}, "BloomForCausalLM computes attention outside"),
        ("falcon", {}, "FalconForCausalLM computes attention outside"),
        ("llama4_text", {}, "layers of kind chunked_attention"),
        ("recurrent_gemma", {}, "layers of kind linear_attention"),
        ("phimoe", {"sliding_window": 4}, "passes its sliding window to the attention mask only"),
    ],
)
def test_families_that_cannot_be_isolated_are_refused(family, options, reason):
    with pytest.raises(ConfigError, match=f"{reason}.*set packing: false"):
        enable_packing(tiny_model(family, **options))


def test_without_boundaries_nothing_is_computed():
    model = tiny_model("llama")
    enable_packing(model)
    batch = collate_padded(random_rows(3, 9), 0)
    with pytest.raises(ConfigError, match="LlamaAttention got no boundaries"):
        model(input_ids=batch["input_ids"])
    with pytest.raises(ConfigError, match="LlamaAttention got no boundaries"):
        model(**forward_arguments(batch))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21.2
def test_stock_generates_inside_any_wrapper_and_is_undone():
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = tiny_model("gemma2").generate(**prompt, **options)
    base = tiny_model("gemma2")
    enable_packing(base)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")).eval()
    with pytest.raises(ZeroDivisionError), stock_attention(model):
        assert model.generate(**prompt, **options).tolist() == expected.tolist()
        raise ZeroDivisionError
    assert base.config._attn_implementation == PACKED_ATTENTION
    check_isolation(model, "cpu", torch.float32)
    assert "attn_implementation" not in base.config.to_json_string()


def brute_force(query, key, value, lengths, scaling, window, softcap, sinks) -> torch.Tensor:
    """float64 attention written token by token: [1, T, heads, head_dim]."""
    output = torch.zeros_like(query)
    groups = query.shape[1] // key.shape[1]
    starts = [sum(lengths[:i]) for i in range(len(lengths)) for _ in range(lengths[i])]
    for head in range(query.shape[1]):
        for t, start in enumerate(starts):
            first = start if window is None else max(start, t - window + 1)
            scores = key[0, head // groups, first : t + 1] @ query[0, head, t] * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1]])
            output[0, head, t] = scores.softmax(0)[: t + 1 - first] @ value[0, head // groups, first : t + 1]
    return output.transpose(1, 2)


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)], ids=["", "sinks"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("scaling", [0.3, 8**-0.5])
def test_scores_follow_their_definition(scaling, window, softcap, sinks):
    generator = torch.Generator().manual_seed(0)
    lengths = [5, 1, 7]
    query, key, value = (torch.randn(1, heads, 13, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    output, _ = packed_attention(
        nn.Module(),
        query.float(),
        key.float(),
        value.float(),
        None,
        scaling=scaling,
        sliding_window=window,
        softcap=softcap,
        s_aux=None if sinks is None else sinks.float(),
        cu_seq_lens_q=torch.tensor([0, 5, 6, 13], dtype=torch.int32),
        max_length_q=7,
    )
    expected = brute_force(query, key, value, lengths, scaling, window, softcap, sinks)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_dropout_is_applied_to_weights_and_keeps_their_mean(softcap):
    value = torch.ones(1, 1, 40, 8)
    boundaries = torch.tensor([0, 40])
    torch.manual_seed(0)
    output, _ = packed_attention(
        nn.Module(), value, value, value, None, 0.5, softcap=softcap, cu_seq_lens_q=boundaries, max_length_q=40
    )
    assert output.std() > 0.05
    assert abs(output[0, 20:].mean() - 1) < 0.1


# --- rows padded on the right ---


def new_model(name: str):
    return scaled_model(name) if name in SCALED else tiny_model(name)


@pytest.mark.parametrize("name", [*FAMILIES, *UNPACKABLE, *UNFUSED_FAMILIES, *SCALED])
@torch.no_grad()
def test_padding_on_the_right_needs_no_mask(name):
    """With and without padding, with a window, and as on a GPU: the logits are transformers' own with a mask."""
    stock, model = new_model(name), new_model(name)
    enable_padding(model)
    assert (model.config._attn_implementation == PADDED_ATTENTION) == (
        stock.config._attn_implementation == "sdpa" and name != "falcon"
    )
    for rows in (random_rows(5, 20), random_rows(1, 20)):
        batch = forward_arguments(collate_padded(rows, 0)) | {"use_cache": False}
        expected, logits = stock(**batch).logits, [model(**batch).logits]
        with assumed_gpu():
            logits.append(model(**batch).logits)
        for row, (ids, _) in enumerate(rows):
            for own in logits:
                assert (own - expected)[row, : len(ids)].norm() <= 1e-5 * expected[row, : len(ids)].norm()


def test_rows_padded_on_the_left_need_stock_attention():
    """Generation: there the mask counts, and the switch is undone behind it."""
    ids = torch.tensor([[0, 0, 0, 5, 6, 7], [8, 9, 10, 11, 12, 13]])
    prompts = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    model = tiny_model("llama")
    expected = model.generate(**prompts, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        logits = model(**prompts).logits[:, -1]
        enable_padding(model)
        assert (model(**prompts).logits[:, -1] - logits)[0].norm() > 1e-2 * logits[0].norm()
    with stock_attention(model):
        assert model.generate(**prompts, max_new_tokens=4, do_sample=False).tolist() == expected.tolist()
    assert model.config._attn_implementation == PADDED_ATTENTION


@pytest.mark.parametrize("term", [{"position_bias": torch.zeros(1)}, {"indices": torch.zeros(1)}])
def test_unknown_score_terms_are_refused(term):
    query = torch.zeros(1, 1, 4, 8)
    with pytest.raises(ConfigError, match=f"does not support {next(iter(term))}.*set packing: false"):
        packed_attention(
            nn.Module(), query, query, query, None, cu_seq_lens_q=torch.tensor([0, 4]), max_length_q=4, **term
        )


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 3, 5])
@pytest.mark.parametrize("said_by", ["module", "argument"])
def test_attention_to_both_sides_is_a_softmax_over_the_document(softcap, window, said_by):
    lengths = [1, 6, 4]
    query, key, value = torch.randn(3, 1, 4, 11, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    module = nn.Module()
    options: dict = {"softcap": softcap, "sliding_window": window}
    if said_by == "module":
        module.is_causal = False  # type: ignore[assignment]
    else:
        options["is_causal"] = False
    boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
    output, _ = packed_attention(
        module, query, key, value, None, cu_seq_lens_q=boundaries, max_length_q=6, scaling=0.5, **options
    )
    number = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    distance = (torch.arange(11)[:, None] - torch.arange(11)[None]).abs()
    visible = (number[:, None] == number[None]) & (distance < (window or 99))
    scores = 0.5 * query @ key.mT
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    expected = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value
    # With a soft-cap the scores are float32, as those of Gemma 2 in transformers.
    torch.testing.assert_close(output[0].transpose(0, 1), expected[0], rtol=0, atol=1e-6 if softcap else 1e-12)


@pytest.mark.parametrize(("window", "causal"), [(None, True), (None, False), (5, True), (5, False)])
def test_the_variable_length_kernel_is_told_which_sides_count(window, causal, monkeypatch):
    told = []
    monkeypatch.setattr(
        document_attention, "varlen_attn", lambda query, key, value, *_, **options: told.append(options) or value
    )
    monkeypatch.setattr(attention, "varlen_supports", lambda *_: True)
    query = torch.zeros(1, 1, 9, 8)
    packed_attention(
        nn.Module(), query, query, query, None, cu_seq_lens_q=torch.tensor([0, 9]), max_length_q=9,
        sliding_window=window, is_causal=causal,
    )  # fmt: skip
    reach = 4 if window else -1
    if "window_size" in VARLEN_OPTIONS:
        assert told[0]["window_size"] == (reach, 0 if causal else reach)
    else:
        assert told[0]["is_causal"] == causal


@pytest.mark.parametrize(("capability", "supported"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_the_variable_length_kernel_is_asked_from_ampere_on(capability, supported, monkeypatch):
    """On a T4 or an RTX 20xx one call for each document takes its place."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    query = SimpleNamespace(is_cuda=True, device="cuda:0", dtype=torch.float16, shape=(1, 8, 233, 64))
    assert varlen_supports(query, None, None) == supported  # type: ignore[arg-type]


def on_cuda(query, key, value, boundaries, dtype, **options) -> list[torch.Tensor]:
    """Output and the three input gradients of one call, float32 on CPU."""
    inputs = [tensor.to("cuda", dtype).requires_grad_() for tensor in (query, key, value)]
    output, _ = packed_attention(
        nn.Module(),
        *inputs,
        None,
        cu_seq_lens_q=boundaries.cuda(),
        max_length_q=int(boundaries.diff().max()),
        **options,
    )
    weights = torch.linspace(-1, 1, output.numel(), device="cuda").view_as(output)
    (output.float() * weights).sum().backward()
    return [tensor.detach().float().cpu() for tensor in (output, *(tensor.grad for tensor in inputs))]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("scaling", [64**-0.5, 0.2])
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_variable_length_kernel_equals_one_document_at_a_time(dtype, kv_heads, scaling, window, causal, monkeypatch):
    options = {"scaling": scaling, "sliding_window": window, "is_causal": causal}
    generator = torch.Generator().manual_seed(0)
    boundaries = torch.tensor([0, 70, 71, 200, 233], dtype=torch.int32)
    tensors = [torch.randn(1, heads, 233, 64, generator=generator) for heads in (8, kv_heads, kv_heads)]
    calls = []
    kernel = document_attention.varlen_attn
    monkeypatch.setattr(
        document_attention, "varlen_attn", lambda *args, **options: calls.append(1) or kernel(*args, **options)
    )
    fused = on_cuda(*tensors, boundaries, dtype, **options)
    kernel_used = bool(calls)
    monkeypatch.setattr(attention, "varlen_supports", lambda *_: False)
    single = on_cuda(*tensors, boundaries, dtype, **options)
    exact = on_cuda(*tensors, boundaries, torch.float32, **options)
    known = VARLEN_OPTIONS
    assert kernel_used == ((window is None or "window_size" in known) and (scaling == 64**-0.5 or "scale" in known))
    for packed, alone, truth in zip(fused, single, exact, strict=True):
        assert (packed - truth).norm() <= 1.5 * (alone - truth).norm() + 1e-3 * truth.norm()


@pytest.mark.parametrize(
    ("kv_heads", "window", "causal"), [(4, None, False), (2, None, True), (2, 5, True), (4, 5, False)]
)
def test_documents_of_similar_length_are_computed_together_as_if_alone(kv_heads, window, causal):
    """The way of attention with dropout, here without it: outputs and gradients of one call for each document."""
    generator = torch.Generator().manual_seed(0)
    lengths = [7, 1, 20, 3, 13, 2, 30, 8, 8, 21]
    tensors = [
        torch.randn(1, heads, sum(lengths), 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    ]
    groups = group_documents(lengths, torch.device("cpu"))
    assert 1 < len(groups.places) < len(lengths)
    together = grouped_attention(*tensors, groups, 0.0, None, window, causal)
    documents = zip(*(tensor.split(lengths, 2) for tensor in tensors), strict=True)
    alone = torch.cat([sdpa_attention(*each, 0.0, None, window, causal) for each in documents], 2).transpose(1, 2)
    assert torch.allclose(together, alone, rtol=0, atol=1e-14)
    factor = torch.randn(together.shape, generator=generator, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad((together * factor).sum(), tensors),
        torch.autograd.grad((alone * factor).sum(), tensors),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-13)


def test_dropout_of_grouped_documents_has_the_mean_of_none_and_reaches_no_other_document():
    lengths = [5, 6, 9, 2]
    query, key, value = (torch.randn(1, 2, sum(lengths), 8) for _ in range(3))
    groups = group_documents(lengths, torch.device("cpu"))
    draws = torch.stack([grouped_attention(query, key, value, groups, 0.5, None, None, False) for _ in range(2000)])
    plain = grouped_attention(query, key, value, groups, 0.0, None, None, False)
    assert (draws.mean(0) - plain).abs().max() < 6 * draws.std(0).max() / 2000**0.5
    changed = value.clone()
    changed[:, :, :5] += 1  # the first document
    torch.manual_seed(0)
    before = grouped_attention(query, key, value, groups, 0.5, None, None, False)
    torch.manual_seed(0)
    after = grouped_attention(query, key, changed, groups, 0.5, None, None, False)
    assert torch.equal(before[:, 5:], after[:, 5:]) and not torch.equal(before[:, :5], after[:, :5])
