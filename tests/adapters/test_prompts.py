"""Prompt-learning methods: equal to plain PEFT, one document at a time, in losses, gradients, answers and files."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import AutoPeftModelForCausalLM, PeftModel
from support import FAMILIES, UNPACKABLE, character_tokenizer, make_rows, random_rows, relative_distance, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from accel_llm.adapters.adopt import adopt_adapter_options
from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.methods import check_method
from accel_llm.adapters.saved import check_saved_adapter, save_adapter
from accel_llm.chat.targets import IGNORED
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import collate, collate_packed, collate_padded
from accel_llm.data.encode import Encoder, SourceRow, encode_chunk
from accel_llm.data.sources import RawRow
from accel_llm.data.stream import Position, Stream
from accel_llm.errors import ConfigError
from accel_llm.model.attention import stock_attention
from accel_llm.model.loading import configure_for_training, load_model
from accel_llm.model.loss import check_loss, next_token_loss
from accel_llm.model.neftune import attach_neftune
from accel_llm.model.probe import check_causality, check_isolation
from accel_llm.model.virtual_tokens import replace_keys

# PEFT 0.21 passes and reads what transformers 5.24 has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]

COUNT = 5
ENCODER = {"encoder_hidden_size": 16}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("prompt", {}),
    "p_tuning": ("p_tuning", ENCODER),
    "LSTM": ("p_tuning", {**ENCODER, "encoder_reparameterization_type": "LSTM"}),
    "prefix": ("prefix", ENCODER),
    "p_tuning_v2": ("p_tuning_v2", {}),
}
# The tiny configs have numbers of heads that these families do not read, but PEFT does.
ONE_KIND_OF_HEADS = {"gpt2": {"num_key_value_heads": 4}, "gpt_neox": {"num_key_value_heads": 4}}
ONE_KIND_OF_HEADS |= {"opt": {"num_key_value_heads": 4}}


def options_for(name: str, packing: bool = True, **others: Any) -> TrainOptions:
    method, method_options = METHODS[name]
    given = {"num_virtual_tokens": COUNT} | method_options | others.pop("method_options", {})
    return TrainOptions(
        **{"model_name_or_path": "none", "max_length": 48} | others,
        method=method,
        packing="per_epoch" if packing else False,
        method_options=given,
    )


def prompted(family: str, options: TrainOptions) -> Any:
    """A tiny model with virtual tokens whose values matter, in training mode."""
    model = configure_for_training(tiny_model(family, **ONE_KIND_OF_HEADS.get(family, {})), options)
    torch.manual_seed(3)
    return attach_adapter(model, options)


def loss_of_peft(model: Any, rows: list[tuple[np.ndarray, np.ndarray]]) -> torch.Tensor:
    """The sum over the labels of each document alone, by PEFT's own forward and transformers' own attention."""
    losses = []
    with stock_attention(model):
        for ids, labels in rows:
            inputs = torch.from_numpy(ids)[None]
            logits = peft_logits(model, inputs)[0, :-1]
            losses.append(F.cross_entropy(logits.double(), torch.from_numpy(labels)[1:], reduction="sum"))
    return torch.stack(losses).nansum()


def peft_logits(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    """The logits of whole rows by PEFT, without those of the virtual tokens."""
    mask = torch.ones_like(inputs)
    model_inputs = {"input_ids": inputs, "attention_mask": mask}
    return model(**model_inputs).logits[:, -inputs.shape[1] :]


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_equals_peft(family: str, name: str, packing: bool, recompute: bool = False) -> None:
    """One step in three micro-batches, and everything that is checked at the start of a run."""
    options = options_for(name, packing, gradient_checkpointing=recompute)
    # PEFT refuses to recompute activations with a prefix, so its gradients come from a model that keeps them.
    reference, model = prompted(family, options_for(name, packing)), prompted(family, options)
    rows = random_rows(6, 12, 1)
    expected = loss_of_peft(reference, rows)
    expected.backward()
    losses = []
    for part in (rows[:1], rows[1:4], rows[4:]):
        batch = collate_packed(part, None, COUNT) if packing else collate_padded(part, 0, None, COUNT)
        losses.append(next_token_loss(model, batch))
        losses[-1].backward()
    assert torch.isclose(sum(losses).double(), expected, rtol=1e-5)
    theirs, ours = gradients(reference), gradients(model)
    assert ours.keys() == theirs.keys() and all("prompt_encoder" in key for key in ours)
    assert max(relative_distance(ours[key], theirs[key]) for key in ours) < 1e-5

    assert check_loss(model, "cpu", torch.float32) in ("own", "stock")
    check_causality(model, "cpu", torch.float32)
    check_isolation(model, "cpu", torch.float32, packing, 48)


@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_equals_that_of_peft(name, packing):
    assert_equals_peft("llama", name, packing, recompute=packing)


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "gemma3_text"])
def test_other_positions_heads_and_windows(family):
    assert_equals_peft(family, "p_tuning_v2", packing=True)
    assert_equals_peft(family, "prompt", packing=family == "gemma2")


# All of FAMILIES were tried but PhiMoE, which draws random numbers in training; these differ in what they do to keys.
@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt_oss", "opt", "olmo3", "mixtral", "smollm3"])
def test_more_families_equal_peft(family):
    for name in ("prompt", "prefix"):
        assert_equals_peft(family, name, packing=True)
        if tiny_model(family)._supports_sdpa or name == "prompt":
            assert_equals_peft(family, name, packing=False)


def test_a_prefix_of_another_layer_would_be_noticed(monkeypatch):
    def next_layer(module, key, value, prefix, positions):
        return replace_keys(module, key, value, prefix.roll(2, 0), positions)

    monkeypatch.setattr("accel_llm.model.attention.replace_keys", next_layer)
    model = prompted("llama", options_for("prefix"))
    with pytest.raises(ConfigError, match="the virtual tokens do not work with LlamaForCausalLM here"):
        check_loss(model, "cpu", torch.float32)
    with pytest.raises(ConfigError, match="changes the results"):
        check_isolation(model, "cpu", torch.float32, True, 48)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_answers_are_those_of_peft_s_forward_whatever_the_padding(name, family):
    model = prompted(family, options_for(name)).eval()
    rng = np.random.default_rng(0)
    prompts = [torch.from_numpy(rng.integers(3, 97, length)) for length in (7, 11, 3)]
    ids, mask = torch.zeros(3, 11, dtype=torch.int64), torch.zeros(3, 11, dtype=torch.int64)
    for row, row_mask, prompt in zip(ids, mask, prompts, strict=True):
        row[-len(prompt) :], row_mask[-len(prompt) :] = prompt, 1
    with torch.no_grad(), stock_attention(model):
        greedy = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        answers = model.generate(input_ids=ids, attention_mask=mask, **greedy)
        assert torch.equal(answers[:, :11], ids)
        for prompt, answer in zip(prompts, answers[:, 11:], strict=True):
            expected = prompt[None]
            for _ in range(8):
                best = peft_logits(model, expected)[:, -1].argmax(-1, keepdim=True)
                expected = torch.cat([expected, best], 1)
            assert answer.tolist() == expected[0, len(prompt) :].tolist()


# --- batches ---------------------------------------------------------------------------------------------------------


def test_each_document_begins_with_places_that_are_no_labels():
    rows = [(np.array([11, 12, 13]), np.array([11, 12, 13])), (np.array([21, 22]), np.array([21, 22]))]
    weights = [np.array([1.0, 2.0, 3.0], np.float32), np.array([4.0, 5.0], np.float32)]
    packed = collate_packed(rows, weights, 2)
    assert packed["input_ids"].tolist() == [[11, 11, 11, 12, 13, 21, 21, 21, 22]]
    assert packed["labels"].tolist() == [[IGNORED, IGNORED, IGNORED, 12, 13, IGNORED, IGNORED, IGNORED, 22]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert packed["cu_seqlens"].tolist() == [0, 5, 9] and packed["lengths"] == [5, 4]
    assert packed["virtual_positions"].tolist() == [0, 1, 5, 6]
    assert packed["total_weight"] == 2 + 3 + 5
    padded = collate_padded(rows, 0, weights, 2)
    assert padded["input_ids"].tolist() == [[11, 11, 11, 12, 13], [21, 21, 21, 22, 0]]
    assert padded["virtual_positions"].tolist() == [0, 1, 5, 6] and padded["total_weight"] == 2 + 3 + 5
    # A slot without a row has places too: all processes must compute a gradient of the virtual tokens.
    empty = collate(make_rows([(1, [5, 6], [5, 6])]), [], True, 0, 2)
    assert empty["virtual_positions"].tolist() == [0, 1] and empty["num_targets"] == 0


def test_virtual_tokens_count_against_max_length():
    tokenizer = character_tokenizer()
    rows = [SourceRow(0, 0, RawRow("rows", n, {"input_ids": list(range(5, 5 + n))})) for n in (6, 7)]
    for method, expected in (("lora", [6, 7]), ("prompt", [6])):
        count = {"method_options": {"num_virtual_tokens": 4}} if method == "prompt" else {}
        options = TrainOptions(model_name_or_path="none", method=method, max_length=10 if count else 7, **count)
        chunk = encode_chunk(rows, Encoder(options, tokenizer, None, ["rows"], [("tokenized", {})]))
        assert list(chunk.part.lengths) == expected
    assert "dropped: longer than max_length=10 less 4 virtual tokens" in chunk.ledger.bins["rows"]


def test_noise_on_embeddings_leaves_out_the_virtual_tokens():
    model = prompted("llama", options_for("prompt"))
    embedded = []
    model.get_base_model().model.layers[0].register_forward_pre_hook(lambda _, args: embedded.append(args[0]))
    batch = collate_packed(random_rows(2, 30, 2), None, COUNT)
    next_token_loss(model, batch)
    attach_neftune(model, 5.0)
    next_token_loss(model, batch)
    noise = (embedded[1] - embedded[0])[0].detach()
    virtual = batch["virtual_positions"]
    assert not noise[virtual].any()
    for length, start in zip(batch["lengths"], [0, batch["lengths"][0]], strict=True):
        document = noise[start + COUNT : start + length]
        bound = 5.0 / ((length - COUNT) * 32) ** 0.5  # NEFTune's, by the tokens of the document alone
        assert 0.9 * bound < document.abs().max() <= bound * 1.001


# --- what is trained, and its files -----------------------------------------------------------------------------------


def gpt2(width: int, layers: int, heads: int) -> Any:
    return GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=heads))


def trained_parameters(model: Any, method: str, **method_options: Any) -> int:
    options = TrainOptions(model_name_or_path="none", method=method, method_options=method_options)
    wrapped = attach_adapter(configure_for_training(model, options), options)
    return sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)


def test_counts_of_the_papers_and_formulas():
    with torch.device("meta"):
        # Lester et al. 2021: 20,480 for a prompt of 5 tokens at the width of T5-XXL, which is that of LLaMA-7B.
        llama = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32))  # 7B
        llama.unread = True
        assert trained_parameters(llama, "prompt", num_virtual_tokens=5) == 20_480
        # Li and Liang 2021: a prefix of 5 tokens is 250K parameters of GPT-2 medium, its network left out.
        medium = gpt2(1024, 24, 16)
        medium.unread = True
        assert trained_parameters(copy.deepcopy(medium), "p_tuning_v2", num_virtual_tokens=5) == 245_760
        n, d, h, kv = 5, 1024, 512, 2 * 24 * 1024
        expected = n * d + (d * h + h) + (h * kv + kv)
        assert (
            trained_parameters(copy.deepcopy(medium), "prefix", num_virtual_tokens=5, encoder_hidden_size=512)
            == expected
        )
        # P-tuning: three linear layers, or a bidirectional LSTM of two layers and two linear layers.
        expected = n * d + (d * h + h) + (h * h + h) + (h * d + d)
        assert (
            trained_parameters(copy.deepcopy(medium), "p_tuning", num_virtual_tokens=5, encoder_hidden_size=512)
            == expected
        )
        lstm = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 512}
        cells = 2 * 4 * ((d * h + h * h + 2 * h) + (2 * h * h + h * h + 2 * h))
        expected = n * d + cells + (2 * h * 2 * h + 2 * h) + (2 * h * d + d)
        assert trained_parameters(medium, "p_tuning", num_virtual_tokens=5, **lstm) == expected
        # Hu et al. 2021 (LoRA, appendix on GPT-3): 3.2M for 256 + 8 embeddings.
        large = gpt2(12288, 2, 96)
        large.unread = True
        assert trained_parameters(large, "prompt", num_virtual_tokens=256 + 8) == 3_244_032


def saved_model(tmp_path: Path, family: str = "qwen3") -> Path:
    folder = tmp_path / "base"
    tiny_model(family).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return folder


def trained_prompt(base: Path, folder: Path, options: TrainOptions, steps: int = 3) -> Any:
    """Train some steps, save the adapter, and return the model."""
    torch.manual_seed(3)
    model = attach_adapter(load_model(options), options)
    model.get_base_model().unread = False
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(steps):
        next_token_loss(model, collate_packed(random_rows(4, 12), None, COUNT)).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    save_adapter(model, folder, state, str(base))
    check_saved_adapter(model, folder)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "family"), [("prompt", "qwen3"), ("LSTM", "qwen3"), ("prefix", "qwen3"), ("prompt", "gpt2")]
)
def test_only_the_prompt_moves_and_plain_peft_loads_it(name, family, tmp_path):
    base, folder, ids = saved_model(tmp_path, family), tmp_path / "adapter", torch.arange(5, 25)[None]
    options = options_for(name, model_name_or_path=str(base))
    model = trained_prompt(base, folder, options)
    plain = load_model(options).eval()
    frozen = {key: value for key, value in model.get_base_model().state_dict().items()}
    assert all(torch.equal(frozen[key], value) for key, value in plain.state_dict().items())
    with torch.no_grad(), stock_attention(model), stock_attention(plain):
        expected = peft_logits(model, ids)
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
        loaded = AutoPeftModelForCausalLM.from_pretrained(folder)
        assert relative_distance(peft_logits(loaded, ids), expected) < 1e-6
        # The untrained prompt gives something else.
        torch.manual_seed(3)
        untrained = attach_adapter(load_model(options), options).eval()
        with stock_attention(untrained):
            assert relative_distance(peft_logits(untrained, ids), expected) > 1e-4

        # It goes on: with the network's results, where the file holds these alone.
        new = adopt_adapter_options(TrainOptions(model_name_or_path=str(base), adapter_name_or_path=str(folder)))
        assert new.method == {"prefix": "p_tuning_v2", "p_tuning": "prompt"}.get(options.method, options.method)
        assert new.virtual_tokens == COUNT
        check_method(new)
        continued = attach_adapter(load_model(new), new).eval()
        with stock_attention(continued):
            assert relative_distance(peft_logits(continued, ids), expected) < 1e-6


@pytest.mark.parametrize("init", ["TEXT", "SAMPLE_VOCAB"])
def test_first_values_from_the_vocabulary(init, tmp_path):
    base = saved_model(tmp_path)
    text = {"prompt_tuning_init_text": "abc"} if init == "TEXT" else {}
    options = options_for(
        "prompt", model_name_or_path=str(base), method_options={"prompt_tuning_init": init, **text}, seed=7
    )
    check_method(options)
    torch.manual_seed(0)
    model: Any = attach_adapter(load_model(options), options)
    prompt = model.prompt_encoder["default"].embedding.weight
    table = model.get_input_embeddings().weight
    ids = [int((table == row).all(1).nonzero()) for row in prompt]
    if init == "TEXT":  # repeated to the number of virtual tokens
        abc = character_tokenizer()("abc")["input_ids"]
        assert ids == (abc * 2)[:COUNT]
    else:  # by the seed of the run, whatever else was drawn before
        torch.manual_seed(1)
        again: Any = attach_adapter(load_model(options), options)
        assert torch.equal(again.prompt_encoder["default"].embedding.weight, prompt)
        other = attach_adapter(load_model(options), options.model_copy(update={"seed": 8}))
        assert not torch.equal(other.prompt_encoder["default"].embedding.weight, prompt)
    assert prompt.requires_grad and prompt.dtype == torch.float32 and prompt is not table
    assert model.peft_config["default"].prompt_tuning_init == init


# --- ensembles --------------------------------------------------------------------------------------------------------


def test_each_document_is_trained_with_its_prompt():
    model = prompted("llama", options_for("prompt", prompt_ensemble=3))
    rows, numbers = random_rows(5, 12, 1), [2, 0, 2, 1, 0]
    losses = []
    for number, row in zip(numbers, rows, strict=True):
        model.set_adapter(list(model.peft_config)[number])
        losses.append(loss_of_peft(model, [row]))
    sum(losses).backward()
    model.set_adapter("default")
    expected = gradients(model)
    batch = collate_packed(rows, None, COUNT) | {"prompt_numbers": torch.tensor(numbers)}
    loss = next_token_loss(model, batch)
    loss.backward()
    assert torch.isclose(loss.double(), sum(losses), rtol=1e-5)
    ours = gradients(model)
    assert len(ours) == 3 and ours.keys() == expected.keys()
    assert max(relative_distance(ours[key], expected[key]) for key in ours) < 1e-5


def test_the_prompt_of_a_row_depends_on_seed_and_position_alone():
    rows = make_rows([(k, list(range(5, 6 + k % 7)), list(range(5, 6 + k % 7))) for k in range(40)])

    def prompts(world: int, size: int, seed: int = 1, packing: bool = True) -> list[tuple[int, int]]:
        options = options_for(
            "prompt",
            packing,
            prompt_ensemble=4,
            max_steps=9,
            total_batch_size=4,
            per_device_train_batch_size=size,
            seed=seed,
        )
        streams = [Stream(rows, options, Position(rank=rank, world=world), 0) for rank in range(world)]
        return [
            pair
            for step in range(9)
            for micro in range(4 // (world * size))
            for rank, stream in enumerate(streams)
            for pair in zip(
                stream.row_indices(step, micro, rank), stream.prompt_numbers(step, micro, rank), strict=True
            )
        ]

    assert prompts(1, 4) == prompts(1, 1)
    assert {number for _, number in prompts(1, 4)} == {0, 1, 2, 3}
    assert prompts(1, 4, packing=False) != prompts(1, 4, seed=2, packing=False)


def test_an_ensemble_answers_by_its_mean_and_goes_on(tmp_path):
    base, folder = saved_model(tmp_path), tmp_path / "adapter"
    options = options_for("prompt", model_name_or_path=str(base), prompt_ensemble=3)
    model = attach_adapter(load_model(options), options).eval()
    model.get_base_model().unread = False
    state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    save_adapter(model, folder, state, str(base))
    check_saved_adapter(model, folder)

    # The first is an adapter of plain PEFT, and so is each of the others.
    new = adopt_adapter_options(TrainOptions(model_name_or_path=str(base), adapter_name_or_path=str(folder)))
    assert new.prompt_ensemble == 3
    for asked in (model, attach_adapter(load_model(new), new).eval()):
        members = [AutoPeftModelForCausalLM.from_pretrained(folder / part) for part in ("", "prompt_2", "prompt_3")]
        prompt = torch.arange(5, 14)[None]
        greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.no_grad(), stock_attention(asked):
            answer = asked.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **greedy)
            expected = prompt
            for _ in range(6):
                mean = sum(peft_logits(member, expected)[:, -1].softmax(-1) for member in members)
                expected = torch.cat([expected, mean.argmax(-1, keepdim=True)], 1)
        assert torch.equal(answer, expected)
    with pytest.raises(ConfigError, match="temperature: the prompts of an ensemble choose the most probable token"):
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=True)
    with pytest.raises(ConfigError, match=r"prompt_ensemble: 2 is given, but the adapter .* has 3; leave it out"):
        adopt_adapter_options(new.model_copy(update={"prompt_ensemble": 2, "adapter_name_or_path": str(folder)}))


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_whole_modules_have_no_place_in_the_file(name):
    with pytest.raises(ConfigError, match=f"modules_to_save: method {name} does not use it; remove it"):
        check_method(options_for(name, modules_to_save=["lm_head"]))


@pytest.mark.parametrize(
    ("name", "method_options", "message"),
    [
        ("prompt", {"num_virtual_tokens": 47}, "47 num_virtual_tokens leave no room for a document in max_length 48"),
        ("prompt", {"num_virtual_tokens": 0}, "num_virtual_tokens 0 is too small; give 1 or more"),
        ("prompt", {"num_virtual_tokens": "20"}, "num_virtual_tokens '20' is not allowed; give a whole number"),
        ("prompt", {"num_virtual_tokens": 20.0}, "num_virtual_tokens 20.0 is not allowed; give a whole number"),
        ("prompt", {"prompt_tuning_init": "text"}, "'text' is unknown; allowed are TEXT, SAMPLE_VOCAB, RANDOM"),
        ("prompt", {"prompt_tuning_init_text": "abc"}, "only prompt_tuning_init: TEXT reads it"),
        ("p_tuning", {"encoder_reparameterization_type": "GRU"}, "'GRU' is unknown; allowed are MLP, LSTM"),
        ("p_tuning", {"encoder_dropout": 0.1}, "only encoder_reparameterization_type: LSTM uses it"),
        ("p_tuning_v2", {"encoder_hidden_size": 8}, "only method prefix has an encoder"),
        ("prefix", {"prefix_projection": False}, "method prefix has no 'prefix_projection'"),
    ],
)
def test_options_that_mean_nothing(name, method_options, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        check_method(options_for(name, method_options=method_options))


@pytest.mark.parametrize("method", ["cpt", "cartridge", "multitask_prompt_tuning"])
def test_methods_that_need_more(method):
    with pytest.raises(ConfigError, match=f"method: {method} cannot be trained here: "):
        check_method(TrainOptions(model_name_or_path="none", method=method))


@pytest.mark.parametrize(
    ("family", "packing", "message"),
    [
        ("falcon", False, "FalconForCausalLM computes its attention by 'sdpa' here, which has no place for them"),
        ("gemma2", False, "set attn_implementation: auto and packing: true, or use method prompt"),
        ("deepseek_v3", True, "PEFT cannot put a prefix into DeepseekV3ForCausalLM"),
        ("stablelm", False, "the virtual tokens do not work with StableLmForCausalLM here"),
    ],
)
def test_families_without_a_place_for_a_prefix(family, packing, message):
    assert family in FAMILIES | UNPACKABLE
    with pytest.raises(ConfigError, match=message):
        model = prompted(family, options_for("p_tuning_v2", packing))
        check_loss(model, "cpu", torch.float32)


def test_new_tokens_have_no_place():
    options = options_for("prompt")
    model = configure_for_training(tiny_model("llama"), options)
    with pytest.raises(ConfigError, match="add_tokens: method prompt trains virtual tokens alone"):
        attach_adapter(model, options, range(97, 99))


def test_a_model_of_peft_stays_one():
    assert isinstance(prompted("llama", options_for("prompt")), PeftModel)
