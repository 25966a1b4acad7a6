"""The tests on the model itself: they pass what is causal and isolated, and catch what is not."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from support import FAMILIES, SCALED, SIZES, UNFUSED_FAMILIES, UNPACKABLE, scaled_model, tiny_model
from torch import nn
from transformers import CONFIG_MAPPING, AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from accel_llm.adapters.prompts import fit_virtual_tokens
from accel_llm.errors import ConfigError
from accel_llm.model import document_attention
from accel_llm.model.attention import PACKED_ATTENTION, enable_packing, enable_padding, packed_attention
from accel_llm.model.positions import scale_by_document
from accel_llm.model.probe import (
    behavior_lengths,
    check_causality,
    check_isolation,
    narrow_lengths,
    sharing_obstacle,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_isolation_check_passes_what_is_isolated(family):
    model = tiny_model(family)
    enable_packing(model)
    check_isolation(model.train(), "cpu", torch.float32)
    assert model.training


def leaking(module, query, key, value, mask, cu_seq_lens_q, **others):
    boundaries = cu_seq_lens_q[[0, -1]]
    longest = int(boundaries[-1])
    others["max_length_q"] = longest
    return packed_attention(module, query, key, value, mask, cu_seq_lens_q=boundaries, **others)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_isolation_check_catches_a_backend_that_ignores_boundaries(family, dtype, monkeypatch):
    model = tiny_model(family).to(dtype)
    enable_packing(model)
    check_isolation(model, "cpu", dtype)
    monkeypatch.setitem(AttentionInterface._global_mapping, PACKED_ATTENTION, leaking)
    with pytest.raises(ConfigError, match=r"packing: true leaks in .*ForCausalLM|LMHeadModel.*; set packing: false"):
        check_isolation(model, "cpu", dtype)


def changed_backend(**changes: Callable):
    """A backend that differs from the right one in what `changes` does to some of its arguments."""

    def attend(module, query, key, value, mask, **others):
        arguments = {"query": query, "key": key, "value": value, **others}
        arguments |= {name: change(arguments[name]) for name, change in changes.items() if name in arguments}
        query, key, value = (arguments.pop(name) for name in ("query", "key", "value"))
        return packed_attention(module, query, key, value, mask, **arguments)

    return attend


def seeing_the_future(module, query, key, value, mask, cu_seq_lens_q, **others):
    backwards = (cu_seq_lens_q[-1] - cu_seq_lens_q).flip(0)
    query, key, value = (tensor.flip(2) for tensor in (query, key, value))
    output, _ = packed_attention(module, query, key, value, mask, cu_seq_lens_q=backwards, **others)
    return output.flip(1), None


def shift_inner(boundaries: torch.Tensor) -> torch.Tensor:
    return torch.cat([boundaries[:1], boundaries[1:-1] + 1, boundaries[-1:]])


BROKEN = {
    "boundaries one token late": ("llama", changed_backend(cu_seq_lens_q=shift_inner)),
    "last document joined to the one before": ("llama", changed_backend(cu_seq_lens_q=lambda b: b[[0, 1, 3]], max_length_q=lambda n: n + 5)),
    "future tokens seen": ("llama", seeing_the_future),
    "window one token too wide": ("mistral", changed_backend(sliding_window=lambda n: n + 1)),
    "window one token too narrow": ("starcoder2", changed_backend(sliding_window=lambda n: n - 1)),
    "window left out": ("qwen2", changed_backend(sliding_window=lambda n: None)),
    "window left out where layers alternate": ("gemma3_text", changed_backend(sliding_window=lambda n: None)),
    "soft-cap left out": ("gemma2", changed_backend(softcap=lambda cap: None)),
    "soft-cap half as high": ("gemma2", changed_backend(softcap=lambda cap: cap / 2)),
    "sinks left out": ("gpt_oss", changed_backend(s_aux=lambda sinks: None)),
    "scale left out": ("granite", changed_backend(scaling=lambda scale: None)),
    "another head's keys": ("llama", changed_backend(key=lambda key: key.roll(1, 1))),
}  # fmt: skip


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_isolation_check_catches_a_backend_that_computes_something_else(fault, dtype, monkeypatch):
    family, backend = BROKEN[fault]
    model = tiny_model(family).to(dtype)
    enable_packing(model)
    check_isolation(model, "cpu", dtype)
    monkeypatch.setitem(AttentionInterface._global_mapping, PACKED_ATTENTION, backend)
    with pytest.raises(ConfigError, match=r"packing: true (leaks in|changes the results of) .*; set packing: false"):
        check_isolation(model, "cpu", dtype)


class RunningPositions(nn.Module):
    """A wrapper that loses the restart of positions."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids, position_ids=None, **inputs):
        return self.model(input_ids=input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **inputs)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_isolation_check_catches_positions_that_do_not_restart(family):
    model = RunningPositions(tiny_model(family))
    enable_packing(model)
    with pytest.raises(ConfigError, match="packing: true changes the results"):
        check_isolation(model, "cpu", torch.float32)


def test_a_family_that_drops_the_boundaries_is_refused_by_the_isolation_check():
    model = tiny_model("stablelm")
    enable_packing(model)
    with pytest.raises(ConfigError, match="StableLmAttention got no boundaries; set packing: false"):
        check_isolation(model, "cpu", torch.float32)


@pytest.mark.parametrize("family", [*FAMILIES, *UNPACKABLE, *UNFUSED_FAMILIES])
def test_padded_batches_of_every_family_pass(family):
    model = tiny_model(family)
    enable_padding(model)
    check_isolation(model, "cpu", torch.float32, packed=False)


class MeanOfTheBatch(nn.Module):
    """A wrapper whose rows see each other."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        output = self.model(**inputs)
        output.logits = output.logits + 0.1 * output.logits.mean(0, keepdim=True)
        return output


def test_padded_rows_that_see_each_other_are_refused():
    with pytest.raises(ConfigError) as error:
        check_isolation(MeanOfTheBatch(tiny_model("llama")), "cpu", torch.float32, packed=False)
    assert str(error.value).startswith(
        "per_device_train_batch_size: more than one document in a batch leaks in LlamaForCausalLM with attention 'sdpa': "
        "changing one document changes the logits of others in its batch by "
    )
    assert str(error.value).endswith("; set per_device_train_batch_size: 1 and per_device_eval_batch_size: 1.")


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", SCALED)
def test_rotary_embeddings_that_depend_on_the_batch_are_refused(kind, packed):
    """Their length is 1000 tokens; no document of the test is as long."""
    for as_if_alone in (False, True):
        model = scaled_model(kind, 1000)
        if as_if_alone:
            scale_by_document(model)
        if packed:
            enable_packing(model)
        if as_if_alone:
            check_isolation(model, "cpu", torch.float32, packed)
            continue
        with pytest.raises(ConfigError, match=r"the logits of pa(cked|dded) and of single documents differ"):
            check_isolation(model, "cpu", torch.float32, packed)
        # Beyond the longest document of the run a length plays no part.
        check_isolation(model, "cpu", torch.float32, packed, max_length=999)
        with pytest.raises(ConfigError, match="differ"):
            check_isolation(model, "cpu", torch.float32, packed, max_length=1000)


def test_a_temperature_by_the_place_in_the_row_is_refused_where_it_is_in_force():
    """Llama 4 without chunked layers: from 8192 tokens on, a query is scaled by its place in the packed row."""
    options = {"layer_types": ["full_attention"] * 2, "no_rope_layers": [1, 0], "floor_scale": 8192}
    model = tiny_model("llama4_text", **options)
    enable_packing(model)
    check_isolation(model, "cpu", torch.float32, max_length=8191)
    with pytest.raises(ConfigError, match="packing: true changes the results of Llama4ForCausalLM"):
        check_isolation(model, "cpu", torch.float32, max_length=8192)


SHARING = [
    pytest.param(f, marks=[] if f in ("gemma2", "gpt_oss", "deepseek_v3") else pytest.mark.long) for f in FAMILIES
]


@pytest.mark.parametrize("family", SHARING)
def test_answers_may_share_a_prompt_where_only_attention_mixes_tokens(family):
    model = tiny_model(family)
    enable_packing(model)
    assert sharing_obstacle(model.train(), "cpu", torch.float32) is None
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["keys of another place", "one key late", "first query at the first key"])
def test_a_shared_prompt_that_an_answer_does_not_see_is_found(fault, dtype, monkeypatch):
    model = tiny_model("mistral").to(dtype)
    enable_packing(model)
    assert sharing_obstacle(model, "cpu", dtype) is None
    if fault == "first query at the first key":
        # What is_causal means to torch's scaled_dot_product_attention.
        monkeypatch.setattr(
            document_attention, "_visible_keys", lambda queries, keys, *_: torch.ones(queries, keys).tril() > 0
        )
    else:
        change = (
            (lambda p: p.roll(1)) if fault == "keys of another place" else (lambda p: (p + 1).clamp(max=int(p.max())))
        )
        monkeypatch.setitem(AttentionInterface._global_mapping, PACKED_ATTENTION, changed_backend(key_positions=change))
    assert "MistralForCausalLM after a shared prompt and after one of their own differ" in str(
        sharing_obstacle(model, "cpu", dtype)
    )


@pytest.mark.parametrize("kind", SCALED)
def test_answers_whose_length_rotates_their_prompt_need_one_each(kind):
    """Their length is 1000 tokens: no document of the test is as long, and those of a run may be."""
    model = scaled_model(kind, 1000)
    scale_by_document(model)
    enable_packing(model)
    assert sharing_obstacle(model, "cpu", torch.float32, max_length=999) is None
    assert "differ" in str(sharing_obstacle(model, "cpu", torch.float32, max_length=1000))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21.2
def test_no_prompt_is_shared_where_its_tokens_do_not_count_alike():
    padded, balanced, prompted = (
        tiny_model("llama"),
        tiny_model("mixtral", output_router_logits=True),
        tiny_model("llama"),
    )
    assert sharing_obstacle(padded, "cpu", torch.float32) == "the rows are padded"
    enable_packing(balanced)
    assert "output_router_logits" in str(sharing_obstacle(balanced, "cpu", torch.float32))
    enable_packing(prompted)
    model = get_peft_model(prompted, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    fit_virtual_tokens(model)
    assert "virtual tokens of the method" in str(sharing_obstacle(model, "cpu", torch.float32))


def wide_and_narrow(name: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a model that changes its behavior at 20 tokens, and one with the same weights that does so at 4."""
    if name in SCALED:
        wide, narrow = scaled_model(name, 20), scaled_model(name, 4)
        for model in (wide, narrow):
            scale_by_document(model)
        return wide, narrow
    if name == "llama4_text":
        options = {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]}
        return tuple(  # type: ignore[return-value]
            tiny_model(name, attention_chunk_size=n, floor_scale=n, **options) for n in (20, 4)
        )
    return tiny_model(name, sliding_window=20), tiny_model(name, sliding_window=4)


WINDOWED = [family for family, options in FAMILIES.items() if "sliding_window" in options]


@pytest.mark.parametrize("name", [*WINDOWED, *SCALED, "llama4_text"])
def test_a_narrowed_model_is_the_model_of_the_narrow_config(name):
    """What the short documents of the test show is what long documents would show: nothing else reads the lengths."""
    document = torch.randint(97, (1, 12), generator=torch.Generator().manual_seed(0))
    wide, narrow = wide_and_narrow(name)
    with torch.no_grad():
        expected, before = narrow(input_ids=document).logits, wide(input_ids=document).logits
        with narrow_lengths(wide):
            narrowed = wide(input_ids=document).logits
        after = wide(input_ids=document).logits
    assert (narrowed - expected).norm() <= 1e-6 * expected.norm()
    assert (before - expected).norm() > 1e-2 * expected.norm()
    assert torch.equal(before, after)


def test_lengths_of_another_meaning_are_left_alone():
    """YaRN and Llama 3.1 read their lengths while they are built, learned positions have as many rows."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1000.0}
    for model in (tiny_model("llama", rope_parameters=yarn), tiny_model("gpt2"), tiny_model("llama")):
        assert behavior_lengths(model) == []


ENCODERS = {
    "bert": "BertLMHeadModel",
    "roberta": "RobertaForCausalLM",
    "xlm-roberta": "XLMRobertaForCausalLM",
    "electra": "ElectraForCausalLM",
    "camembert": "CamembertForCausalLM",
    "megatron-bert": "MegatronBertForCausalLM",
    "big_bird": "BigBirdForCausalLM",
}


def encoder(family: str, **options) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**SIZES, **options}))


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder_is_refused_and_its_decoder_passes(family):
    with pytest.raises(ConfigError) as error:
        check_causality(encoder(family), "cpu", torch.float32)
    text = str(error.value)
    assert text.startswith(f"model_name_or_path: {ENCODERS[family]} is not causal here: a later token changes the ")
    assert text.endswith('; set "is_decoder": true in its config.json, or name a causal language model.')
    check_causality(encoder(family, is_decoder=True), "cpu", torch.float32)


@pytest.mark.parametrize(
    ("family", "options", "remedy"),
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, 'set "use_bidirectional_attention": false'),
        ("llama", {"is_causal": False}, 'set "is_causal": true'),
        ("qwen3", {"is_causal": False}, 'set "is_causal": true'),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_that_sees_both_ways_is_refused(family, options, remedy, dtype):
    """Also as a new model, in which the leak is smaller than the rounding of bfloat16."""
    for model in (tiny_model(family, **options), encoder(family, **{"head_dim": 8, **options})):
        with pytest.raises(ConfigError, match=f"is not causal here.*{remedy} in its config.json"):
            check_causality(model.to(dtype), "cpu", dtype)


@pytest.mark.parametrize("family", [*FAMILIES, *UNPACKABLE, *UNFUSED_FAMILIES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoders_are_causal(family, dtype):
    model = tiny_model(family).train().to(dtype)
    check_causality(model, "cpu", dtype)
    assert model.training


def test_numbers_that_are_not_finite_pass_no_check():
    """No comparison with NaN is true, so a check must ask whether a distance is small enough."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ConfigError, match="is not causal here"):
        check_causality(model, "cpu", torch.float32)
    enable_packing(model)
    with pytest.raises(ConfigError, match="packing: true leaks"):
        check_isolation(model, "cpu", torch.float32)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21.2
def test_causality_is_tested_inside_wrappers_and_under_packed_attention():
    for options, causal in (({}, True), ({"is_causal": False}, False)):
        base = tiny_model("llama", **options)
        enable_packing(base)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
        if causal:
            check_causality(model, "cpu", torch.float32)
            continue
        with pytest.raises(ConfigError, match="LlamaForCausalLM is not causal here"):
            check_causality(model, "cpu", torch.float32)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_run_on_an_encoder_ends_with_one_sentence(sft_errors, make_model, tmp_path, tiny, packing, batch_size):
    """Before: a loss of 0.02 with packing: false, which the message about packing had advised."""
    folder = make_model(tmp_path / "bert")
    words = CONFIG_MAPPING["llama"].from_pretrained(folder).vocab_size
    encoder("bert", vocab_size=words, max_position_embeddings=128).save_pretrained(folder)
    options = ("--packing", packing, "--per_device_train_batch_size", batch_size, "--method", "full")
    (sentence,) = sft_errors("--model_name_or_path", folder, *options)
    assert "BertLMHeadModel is not causal here" in sentence and '"is_decoder": true' in sentence


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_isolation_check_passes_on_cuda(family, dtype):
    model = tiny_model(family).to("cuda", dtype)
    enable_packing(model)
    check_isolation(model, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_autocast_leaves_the_kernel_one_dtype():
    model = tiny_model("qwen3").cuda()
    enable_packing(model)
    with torch.autocast("cuda", torch.bfloat16):
        check_isolation(model, "cuda", torch.bfloat16)
