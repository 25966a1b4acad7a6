"""New tokens: each gets one id, its rows start at the mean, only these rows are trained, saved and merged."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support import materialize
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.saved import read_adapter_config, save_adapter
from accel_llm.chat.template import load_template
from accel_llm.config.options import TrainOptions
from accel_llm.config.tool_options import MergeOptions
from accel_llm.data.batches import collate_padded
from accel_llm.errors import ConfigError
from accel_llm.merge.merge import merge
from accel_llm.model.loading import load_model
from accel_llm.model.loss import attach_loss, next_token_loss
from accel_llm.model.tokenizer import check_token_ids, load_tokenizer
from accel_llm.model.vocabulary import add_missing_tokens, add_tokens, extend_vocabulary
from accel_llm.training import export

pytestmark = pytest.mark.usefixtures("quiet")
DATA = Path(__file__).parents[3] / "shared" / "data"
CHATML = ["<|im_start|>", "<|im_end|>"]
OLD = 257  # 256 bytes and <|endoftext|>
NEW = range(OLD, OLD + 2)
IDS = torch.tensor([[*range(0, 255, 17), 257, 30, 258, 256], [257, *range(5, 250, 15), 258]])
BATCH = collate_padded([(row, row) for row in IDS.numpy()], 0)

FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"intermediate_size": 48, "num_key_value_heads": 2}),
    "gpt2": (GPT2LMHeadModel, GPT2Config, dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"intermediate_size": 48, "num_key_value_heads": 1}),
    "phi": (PhiForCausalLM, PhiConfig, {"intermediate_size": 48}),
}


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Like GPT-2's without its merges: 256 bytes and the end of a text, no chat tokens."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(tokenizer_models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture
def make(tmp_path) -> Callable[..., Path]:
    def build(family: str, dtype: torch.dtype = torch.float32, **config) -> Path:
        """A base model of 257 tokens whose rows all differ."""
        kind, kind_of_config, more = FAMILIES[family]
        shape = {"vocab_size": OLD, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        ends = {"bos_token_id": 256, "eos_token_id": 256, "pad_token_id": None}
        torch.manual_seed(0)
        model = kind(kind_of_config(**{**shape, **ends, **more, **config}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path / f"{family}-{len(list(tmp_path.iterdir()))}"
        model.to(dtype).save_pretrained(folder)
        bytes_tokenizer().save_pretrained(folder)
        return folder

    return build


def load(base: Path, new: range = NEW, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """As launch/sft.py does it; returns the model that trains and the causal LM inside it."""
    settings = TrainOptions(model_name_or_path=str(base), packing=False, **options)
    torch.manual_seed(0)
    model = load_model(settings)
    extend_vocabulary(model, new)
    assert attach_loss(model, IDS.numel()) == "own"
    wrapped = model if settings.method == "full" else attach_adapter(model, settings, new)
    return materialize(wrapped, settings), model  # type: ignore


def backward(model: torch.nn.Module) -> None:
    model.zero_grad()
    next_token_loss(model, BATCH).backward()


def train(model: torch.nn.Module, steps: int = 4) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        backward(model)
        optimizer.step()
    model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def save(model, folder: Path, base: Path) -> Path:
    state = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    save_adapter(model, folder, state, str(base))
    tokenizer = bytes_tokenizer()
    add_tokens(tokenizer, CHATML)
    tokenizer.save_pretrained(folder)
    return folder


def test_tokens_become_single_and_special_and_stay_so(tmp_path):
    tokenizer = bytes_tokenizer()
    text = "<|im_start|>user\nHi<|im_end|>\n"
    assert len(tokenizer(text).input_ids) == len(text)
    assert add_tokens(tokenizer, CHATML) == NEW
    assert tokenizer.convert_tokens_to_ids(CHATML) == [257, 258]
    ids = tokenizer(text).input_ids
    assert ids[0] == 257 and ids[-2] == 258 and len(ids) == len("*user\nHi*\n")
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nHi\n"
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text).input_ids == ids and again.decode(ids, skip_special_tokens=True) == "user\nHi\n"
    assert load_template(again, "chatml").turn_end_id == 258


def test_what_is_there_already_gets_no_new_id():
    tokenizer = bytes_tokenizer()
    assert not add_tokens(tokenizer, [])
    assert not add_tokens(tokenizer, ["<|endoftext|>", "A"])
    assert add_tokens(tokenizer, ["A", "<|im_end|>"]) == range(257, 258)
    assert add_tokens(tokenizer, CHATML) == range(258, 259)
    assert tokenizer.convert_tokens_to_ids(CHATML) == [258, 257]


def test_missing_tokens_are_added_if_the_option_is_set():
    for options, new, ids in (
        ({"chat_template": "chatml", "add_tokens": True}, NEW, [257, 258]),
        ({"chat_template": "chatml"}, range(257, 257), [None, None]),
    ):
        tokenizer = bytes_tokenizer()
        assert add_missing_tokens(tokenizer, TrainOptions(**options)) == new
        assert [tokenizer.get_vocab().get(token) for token in CHATML] == ids
    tokenizer = bytes_tokenizer()
    add_tokens(tokenizer, CHATML)
    assert not add_missing_tokens(tokenizer, TrainOptions(chat_template="chatml", add_tokens=True))


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize("name, size", [("llama2", 32000), ("mistral-7b", 32000), ("phi-3-mini", 32011)])
def test_real_tokenizers_get_chatml(name, size):
    tokenizer = load_tokenizer(str(DATA / "tokenizers" / name))
    assert add_tokens(tokenizer, CHATML) == range(size, size + 2)
    template = load_template(tokenizer, "chatml")
    ids = template.prompt_ids([{"role": "user", "content": "Hi"}])
    assert (ids.count(size), ids.count(size + 1), template.turn_end_id) == (2, 1, size + 1)


KINDS = [(family, tied) for family in ("llama", "gpt2", "gemma3") for tied in (True, False)]


@pytest.mark.parametrize("family, tied", [*KINDS, ("phi", False)])
def test_new_rows_are_the_mean_and_old_ones_stay(make, family, tied):
    _, model = load(make(family, tie_word_embeddings=tied), method="full")
    before = AutoModelForCausalLM.from_pretrained(model.config._name_or_path)
    pairs = [(model.get_input_embeddings().weight, before.get_input_embeddings().weight)]
    head, old_head = model.get_output_embeddings(), before.get_output_embeddings()
    assert (head.weight is pairs[0][0]) == tied
    pairs += [] if tied else [(head.weight, old_head.weight)]
    pairs += [(head.bias, old_head.bias)] if family == "phi" else []
    for matrix, old in pairs:
        assert len(matrix) == 259 and torch.equal(matrix[:257], old)
        mean = old.detach().double().mean(0).expand_as(matrix[257:])
        torch.testing.assert_close(matrix[257:].detach().double(), mean, rtol=0, atol=1e-6)
    assert model.config.vocab_size == 259 and head.out_features == 259
    assert model.config.tie_word_embeddings == tied
    old_ids = torch.arange(12)[None]
    torch.testing.assert_close(model(input_ids=old_ids).logits[..., :257], before(input_ids=old_ids).logits)


def test_spare_rows_are_used_and_do_not_count(make):
    base = make("llama", vocab_size=272, tie_word_embeddings=False)
    before = load_file(base / "model.safetensors")
    _, model = load(base, method="full")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        now, old = model.state_dict()[name], before[name]
        assert torch.equal(now[:257], old[:257]) and torch.equal(now[259:], old[259:])
        torch.testing.assert_close(now[257:259], old[:257].mean(0).expand(2, -1), rtol=0, atol=1e-6)
        assert not torch.allclose(old[:257].mean(0), old.mean(0), atol=1e-4)
    assert model.config.vocab_size == 272


def test_the_mean_of_a_bf16_matrix_is_taken_in_float32(make):
    base = make("llama", torch.bfloat16)
    _, model = load(base, method="lora", precision="bf16")
    rows = model.get_input_embeddings().weight[257:]
    old = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    assert rows.dtype == torch.bfloat16 and torch.equal(rows[0], old.double().mean(0).float().bfloat16())


def test_growing_leaves_the_random_numbers_alone(make):
    base = make("llama")
    torch.manual_seed(3)
    expected = torch.rand(2)
    for new in (range(257, 257), NEW):
        model = AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(3)
        extend_vocabulary(model, new)
        assert torch.equal(torch.rand(2), expected)


def test_no_new_tokens_change_nothing(make):
    base = make("llama")
    model, inner = load(base, range(257, 257), method="lora")
    assert inner.config.vocab_size == 257 and model.peft_config["default"].trainable_token_indices is None
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("family, tied", KINDS)
def test_gradients_are_those_of_full_training(make, family, tied):
    """With B = 0 the adapter adds nothing, so the rows must get what the same rows of the whole matrices get."""
    base = make(family, tie_word_embeddings=tied)
    whole, _ = load(base, method="full")
    single, inner = load(base, method="lora")
    inner.loss_chunks = 3  # type: ignore[assignment] # as a large vocabulary has them
    expected, loss = next_token_loss(whole, BATCH), next_token_loss(single, BATCH)
    torch.testing.assert_close(loss, expected)
    backward(whole)
    backward(single)
    for ends in ("get_input_embeddings", "get_output_embeddings"):
        rows = getattr(single, ends)().new_rows.grad
        torch.testing.assert_close(rows, getattr(whole, ends)().weight.grad[257:], rtol=1e-4, atol=1e-5)
        assert float(rows.norm()) > 1e-2


METHODS = [{"method": "lora"}, {"method": "lora", "use_dora": True}, {"method": "qlora"}]
METHODS += [{"method": "lora", "load_in_8bit": True}, {"method": "lora", "lora_bias": "all"}]


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_only_new_rows_and_the_adapter_are_trained(make, options, tied):
    model, inner = load(make("llama", tie_word_embeddings=tied, attention_bias=True), **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model)
    after = model.state_dict()
    rows = {"base_model.model.model.embed_tokens.new_rows", "base_model.model.lm_head.new_rows"}
    assert {name for name in after if name.endswith("new_rows")} == rows
    for name, tensor in after.items():
        is_trained = name in rows or "lora_" in name or (name.endswith("bias") and "lora_bias" in options)
        assert torch.equal(tensor, before[name]) != is_trained, name
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    assert (head.weight is embedding.weight) == tied and (head.new_rows is embedding.new_rows) == tied
    for name in rows:
        assert after[name].shape == (2, 32) and after[name].dtype == torch.float32
        assert all(not torch.equal(*pair) for pair in zip(after[name], before[name], strict=True))
    # Embedding and head use the trained row for a new token and the frozen row for any other.
    embedded = embedding(torch.tensor([3, 257, 258]))
    assert torch.equal(embedded[0], embedding.weight[3]) and torch.equal(embedded[1:], embedding.new_rows)
    projected = head(torch.eye(32)).T
    assert torch.equal(projected[257:], head.new_rows) and torch.equal(projected[:257], head.weight[:257])


@pytest.mark.parametrize(
    "family, tied, spare", [(*kind, 0) for kind in KINDS] + [("llama", True, 15), ("llama", False, 15)]
)
def test_adapter_in_plain_peft_and_merged_model_answer_as_the_trained_one(make, tmp_path, family, tied, spare):
    base = make(family, tie_word_embeddings=tied, vocab_size=OLD + spare)
    model, _ = load(base, method="lora")
    train(model)
    expected = logits(model)
    folder = save(model, tmp_path / "adapter", base)
    embedding = {"llama": "model.embed_tokens", "gpt2": "transformer.wte", "gemma3": "model.embed_tokens"}[family]
    module_names = [embedding] if tied else [embedding, "lm_head"]
    assert read_adapter_config(folder)["trainable_token_indices"] == {name: [257, 258] for name in module_names}
    adapter_weights = load_file(folder / "adapter_model.safetensors")
    assert {name for name in adapter_weights if "lora_" not in name} == {
        f"base_model.model.{name}.token_adapter.trainable_tokens_delta" for name in module_names
    }
    plain = AutoModelForCausalLM.from_pretrained(base)
    if not spare:
        plain.resize_token_embeddings(259)  # draws the new rows at random: the adapter's count
    assert distance(logits(PeftModel.from_pretrained(plain, folder)), expected) < 1e-5

    result = merge(MergeOptions(adapter=str(folder), output_dir=str(tmp_path / "merged")))
    assert result.largest_error is not None and result.largest_error < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert distance(logits(merged), expected) < 1e-5
    assert merged.config.vocab_size == max(259, OLD + spare) and merged.config.tie_word_embeddings == tied
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids(CHATML) == [257, 258]
    config = json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))
    assert config["vocab_size"] == merged.config.vocab_size and "lm_head.weight" not in adapter_weights


@pytest.mark.parametrize("tied", [True, False])
def test_a_full_model_comes_back_as_it_was_trained(make, tmp_path, tied):
    model, inner = load(make("gpt2", tie_word_embeddings=tied), method="full")
    before = inner.get_output_embeddings().weight.detach().clone()
    train(model)
    assert (inner.get_output_embeddings().weight is inner.get_input_embeddings().weight) == tied
    assert all((inner.get_output_embeddings().weight != before).any(1))
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    export._save_model(inner, tmp_path / "model", state, torch.float32)  # type: ignore[arg-type]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert distance(logits(again), logits(model)) < 1e-6
    assert (again.config.vocab_size, again.config.tie_word_embeddings) == (259, tied)
    assert ("lm_head.weight" in load_file(tmp_path / "model" / "model.safetensors")) == (not tied)


@pytest.mark.parametrize("tied", [True, False])
def test_whole_matrices_in_modules_to_save_need_no_rows_of_their_own(make, tmp_path, tied):
    base = make("llama", tie_word_embeddings=tied)
    model, _ = load(base, method="lora", modules_to_save=["embed_tokens", "lm_head"])
    assert model.peft_config["default"].trainable_token_indices is None
    train(model)
    folder = save(model, tmp_path / "adapter", base)
    merge(MergeOptions(adapter=str(folder), output_dir=str(tmp_path / "merged")))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 259 and distance(logits(merged), logits(model)) < 1e-5


def test_a_whole_head_beside_single_rows(make, tmp_path):
    """Phi's head has a bias, so it is trained whole; its embedding gets rows of its own."""
    base = make("phi")
    model, _ = load(base, method="lora", modules_to_save=["lm_head"])
    assert model.peft_config["default"].trainable_token_indices == {"model.embed_tokens": [257, 258]}
    train(model)
    folder = save(model, tmp_path / "adapter", base)
    merge(MergeOptions(adapter=str(folder), output_dir=str(tmp_path / "merged")))
    assert distance(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(model)) < 1e-5


def test_an_adapter_of_plain_peft_with_its_own_matrices_merges(make, tmp_path):
    base = make("llama", tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(259)
    wrapped = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merge(MergeOptions(adapter=str(tmp_path / "adapter"), output_dir=str(tmp_path / "merged")))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 259 and distance(logits(merged), logits(wrapped)) < 1e-5


@pytest.mark.parametrize(
    "family, tied, options, sentence",
    [
        (
            "llama",
            False,
            {"lora_target_modules": ["q_proj", "lm_head"]},
            "lora_target_modules: single rows of lm_head are trained (add_tokens, trainable_token_indices), so it cannot "
            "be adapted as well; leave it out, or name it in modules_to_save.",
        ),
        (
            "llama",
            True,
            {"modules_to_save": ["lm_head"]},
            "modules_to_save: model.embed_tokens and lm_head are one matrix, and single rows of it are trained "
            "(add_tokens, trainable_token_indices); name both or neither.",
        ),
        (
            "phi",
            False,
            {},
            "add_tokens: lm_head has a bias, which an adapter of single rows leaves out; name it in modules_to_save, "
            "or set method: full.",
        ),
    ],
)
def test_what_cannot_be_trained_row_by_row_is_refused(make, family, tied, options, sentence):
    with pytest.raises(ConfigError) as error:
        load(make(family, tie_word_embeddings=tied), method="lora", **options)
    assert str(error.value) == sentence


def test_a_model_without_a_plain_head_is_refused(make):
    model = AutoModelForCausalLM.from_pretrained(make("llama"))
    model.lm_head = torch.nn.Bilinear(2, 2, 2)
    with pytest.raises(ConfigError, match=r"^add_tokens: LlamaForCausalLM has no plain embedding and linear head"):
        extend_vocabulary(model, NEW)


def test_ids_of_new_tokens_are_no_mistake_of_the_data(make):
    base = make("llama")
    tokenizer, config = bytes_tokenizer(), AutoModelForCausalLM.from_pretrained(base).config
    new = add_tokens(tokenizer, CHATML)
    check_token_ids([IDS.numpy()], config, tokenizer, new)
    with pytest.raises(ConfigError, match=r"token id 258 \('<\|im_end\|>'\), but the model's vocabulary has 257 rows"):
        check_token_ids([IDS.numpy()], config, tokenizer)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_script_trains_saves_merges_and_answers(script, make, chats, tmp_path, capsys, method):
    base, run = make("llama", max_position_embeddings=1024), tmp_path / "run"
    where = ("--model_name_or_path", base, "--train_files", chats, "--output_dir", run, "--method", method)
    steps = ("--max_steps", 2, "--max_length", 512, "--learning_rate", 1e-2, "--chat_template", "chatml")
    with pytest.raises(ConfigError, match=r"writes <\|im_start\|>, <\|im_end\|>, which the tokenizer .* would split"):
        script("sft", *where, *steps)
    script("sft", *where, *steps, "--add_tokens")
    folder = run / ("adapter" if method == "lora" else "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(CHATML) == [257, 258]
    assert json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"] == [258, 256]
    models_left = [run]
    if method == "lora":
        script("merge", "--adapter", run, "--output_dir", tmp_path / "merged")
        models_left += [folder, tmp_path / "merged"]
    capsys.readouterr()
    answers = []
    for model in models_left:
        script("chat", "--model", model, "--prompt", "What is 3 + 4?", "--max_new_tokens", 8)
        answers.append(capsys.readouterr().out)
    assert answers[0] and len(set(answers)) == 1


@pytest.mark.parametrize("tied", [True, False])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(script, make, chats, tmp_path, tied):
    base = make("llama", max_position_embeddings=1024, tie_word_embeddings=tied)
    where = ("--model_name_or_path", base, "--train_files", chats, "--add_tokens", "--chat_template", "chatml")
    steps = ("--max_steps", 4, "--save_steps", 2, "--max_length", 512, "--learning_rate", 1e-2)
    script("sft", *where, *steps, "--output_dir", tmp_path / "whole")
    half = tmp_path / "whole" / "checkpoints" / "step-00000002"
    script("sft", *where, *steps, "--output_dir", tmp_path / "resumed", "--resume_from_checkpoint", half)
    ours, theirs = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("resumed", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    tensors = load_file(half / "rank-00000.safetensors")
    assert sum("new_rows|weight|" in name for name in tensors) == (1 if tied else 2)
