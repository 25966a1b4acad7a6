"""Adapters of any kinds are asked side by side on one base: each as plain PEFT computes it alone, the base as it was."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn.modules import Linear8bitLt
from peft import AutoPeftModelForCausalLM, get_peft_model
from peft_methods import CAUSAL, METHODS, PROMPTS, randomize
from safetensors.torch import load_file
from support import moved_adapter, relative_distance, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from accel_llm.adapters.adopt import adopt_adapter_options
from accel_llm.adapters.attach import attach_adapter
from accel_llm.config.options import TrainOptions
from accel_llm.config.tool_options import ChatOptions
from accel_llm.errors import ConfigError
from accel_llm.merge.dialogues import BARE, open_dialogues
from accel_llm.merge.load import load_to_ask
from accel_llm.merge.shared_weights import copy_modules
from accel_llm.model.loading import load_model

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's, of tied weights and of what it corrects itself
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CONFIGS = Path(__file__).parents[3] / "shared" / "data" / "adapter_configs"


@pytest.fixture(scope="module")
def base(make_model, tmp_path_factory) -> Path:
    """A base with a tokenizer and weights so large that each answer differs; its positions leave room for two turns."""
    folder = make_model(tmp_path_factory.mktemp("base"), hidden_size=64, num_attention_heads=4, attention_bias=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


def foreign(base: Path, folder: Path, config: Any) -> Path:
    """Save an adapter as plain PEFT does."""
    torch.manual_seed(1)
    wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    randomize(wrapped)
    if config.is_prompt_learning:
        with torch.no_grad():  # far from nothing, so that a prompt that is left out is noticed
            for parameter in wrapped.prompt_encoder.parameters():
                parameter.add_(torch.randn_like(parameter))
    wrapped.save_pretrained(folder)
    return folder


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def check_side_by_side(base: Path, adapters: list[Path]) -> None:
    """Compare each model of several, asked in turns, with plain PEFT and plain transformers."""
    ids = torch.arange(3, 43)[None]
    models = load_to_ask(str(base), "base", ChatOptions(model="-"), adapters)
    plain = logits(AutoModelForCausalLM.from_pretrained(base).eval(), ids)
    expected = [logits(AutoPeftModelForCausalLM.from_pretrained(adapter).eval(), ids) for adapter in adapters]
    for _ in range(2):
        for adapter, model, right in zip(adapters, models[1:], expected, strict=True):
            assert torch.equal(logits(model, ids), right), adapter.name
            assert relative_distance(right[:, -40:], plain) > 1e-4, adapter.name  # PEFT shows virtual tokens
            assert torch.equal(logits(models[0], ids), plain), adapter.name
    # Each weight is in memory once; only OLoRA changes nearly all.
    places = [{parameter.data_ptr() for parameter in model.parameters()} for model in models]
    names = ["", *(adapter.name for adapter in adapters)]
    assert all(len(places[0] & own) > 4 for own, name in zip(places, names, strict=True) if name != "olora")
    stored = load_file(base / "model.safetensors")
    assert all(torch.equal(tensor, models[0].state_dict()[name]) for name, tensor in stored.items())


def test_adapters_of_all_kinds_do_not_meet(base, tmp_path):
    methods = {name: (METHODS | PROMPTS)[name] for name in ("bias", "tokens", "olora", "ia3", "prompt", "prefix")}
    check_side_by_side(base, [foreign(base, tmp_path / name, config()) for name, config in methods.items()])


@pytest.mark.long
def test_all_methods_of_peft_do_not_meet(base, tmp_path):
    methods = METHODS | PROMPTS
    check_side_by_side(base, [foreign(base, tmp_path / name, config()) for name, config in methods.items()])


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # bitsandbytes takes float16
def test_a_copy_of_an_8_bit_model_computes_the_same():
    """bitsandbytes 0.50 keeps the scales at the weight until a layer has used them, and then only at this layer."""
    model = tiny_model("llama")
    for path, layer in [(path, layer) for path, layer in model.model.named_modules() if isinstance(layer, nn.Linear)]:
        packed = Linear8bitLt(layer.in_features, layer.out_features, bias=False, has_fp16_weights=False)
        packed.load_state_dict(layer.state_dict())
        model.model.set_submodule(path, packed.to("cpu"))
    copy, ids = copy_modules(model.eval()), torch.arange(12)[None]
    with torch.no_grad():
        first, second, again = (each(input_ids=ids).logits for each in (model, copy, model))
    assert torch.equal(first, second) and torch.equal(first, again)


@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("llama", marks=pytest.mark.long)])
def test_in_4_bits_each_is_asked_as_it_was_trained(family, tmp_path):
    tiny_model(family).save_pretrained(base := tmp_path / "base")
    folders, ids = [tmp_path / str(k) for k in range(2)], torch.arange(3, 19)[None]
    trained = [moved_adapter(base, folder, seed=k, method="qlora").eval() for k, folder in enumerate(folders)]
    models = load_to_ask(str(base), "base", ChatOptions(model="-"), folders)
    for model, right in zip(models[1:], trained, strict=True):
        assert relative_distance(logits(model, ids), logits(right, ids)) < 1e-6
    (alone,) = load_to_ask(str(base), "base", ChatOptions(model="-", load_in_4bit=True))
    assert torch.equal(logits(models[0], ids), logits(alone, ids))
    assert relative_distance(logits(models[1], ids), logits(models[2], ids)) > 1e-3


def test_what_does_not_belong_together_is_refused_before_a_weight_is_read(base, tmp_path, monkeypatch):
    def sentence(**options: Any) -> str:
        with pytest.raises(ConfigError) as error:
            open_dialogues(ChatOptions(model=str(tmp_path / "4"), **options))
        return str(error.value)

    monkeypatch.setattr("accel_llm.merge.load.load_complete_model", lambda *_, **__: pytest.fail("weights were read"))
    moved_adapter(base, tmp_path / "4", method="qlora")
    moved_adapter(base, tmp_path / "16")
    assert sentence(adapters=[str(tmp_path / "16")]) == (
        f"load_in_4bit: {tmp_path / '4'} was trained on a base in 4 bits, and {tmp_path / '16'} was not; set it to true or "
        "to false, for both."
    )
    assert sentence(adapters=[str(base)]) == f"adapters: {base} is a full model, not an adapter; it is used as it is."
    poly = foreign(base, tmp_path / "poly", peft.PolyConfig(**CAUSAL, r=4, target_modules=["q_proj"]))
    assert sentence(adapters=[str(poly)], load_in_4bit=False) == (
        f"adapter: {poly} is a POLY adapter, which cannot be asked here: each row must name its task (task_ids)."
    )
    assert ChatOptions(model="m", adapters=["a", "a"]).problems() == ["adapters: a is given twice; name it once."]


def test_each_adapter_has_its_own_tokens_and_template(base, tmp_path):
    """The base has no template: it is asked in the words of the first adapter."""
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(bare)
    tokenizer = AutoTokenizer.from_pretrained(base)
    own_template = tokenizer.chat_template
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    adapters = [foreign(bare, tmp_path / str(k), METHODS["lora"]()) for k in range(2)]
    tokenizer.chat_template = own_template
    tokenizer.save_pretrained(adapters[0])
    tokenizer.chat_template = f"A day in May.{own_template}"
    tokenizer.save_pretrained(adapters[1])
    for folder in adapters:
        (folder / "adapter_config.json").write_text(
            json.dumps(
                json.loads((folder / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(bare)}
            )
        )
    dialogues = open_dialogues(ChatOptions(model=str(adapters[0]), adapters=[str(adapters[1])]))
    assert list(dialogues) == [str(adapters[0]), BARE, str(adapters[1])]
    prompts = [dialogue.template.prompt_ids([{"role": "user", "content": "Hi"}]) for dialogue in dialogues.values()]
    assert prompts[0] == prompts[1] and len(prompts[2]) > len(prompts[0])


@pytest.mark.parametrize(
    "name", [n if n in ("prompt", "prefix") else pytest.param(n, marks=pytest.mark.long) for n in PROMPTS]
)
def test_dialogues_behind_virtual_tokens_are_those_of_a_loop_by_hand(name, base, tmp_path, capsys):
    """PEFT 0.21 leaves a prefix out, and repeats a prompt in each step, when transformers 5.24 generates."""
    adapter = foreign(base, tmp_path / name, PROMPTS[name]())
    options = ChatOptions(model=str(adapter), max_new_tokens=8)
    dialogue = open_dialogues(options)[str(adapter)]
    plain = AutoPeftModelForCausalLM.from_pretrained(adapter).double().eval()
    messages = []
    for question in ("What is 3 + 4?", "And 5?"):
        messages.append({"role": "user", "content": question})
        ids = start = dialogue.template.prompt_ids(messages)
        for _ in range(8):
            token = int(logits(plain, torch.tensor([ids]))[0, -1].argmax())
            ids = [*ids, token]
            if token in dialogue.settings.eos_token_id:
                break
        answer = dialogue.ask(question)
        assert answer == dialogue.tokenizer.decode(ids[len(start) :], skip_special_tokens=True)
        messages.append({"role": "assistant", "content": answer})
    bare = open_dialogues(options)[BARE]
    assert bare.ask("What is 3 + 4?") != messages[1]["content"]


@pytest.mark.long
@pytest.mark.skipif(not CONFIGS.is_dir(), reason="shared/data is not there")
@pytest.mark.parametrize("stem, name", [("03_Langchain-Chatchat", "p_tuning_v2"), ("08_llm-tuning", "prompt")])
def test_published_settings_of_prompts_are_asked(stem, name, base, tmp_path):
    """Those of PEFT 0.3 and 0.4, with the sizes of a tiny base."""
    adapter = foreign(base, tmp_path / name, PROMPTS[name]())
    own = json.loads((adapter / "adapter_config.json").read_text())
    published = json.loads((CONFIGS / f"{stem}.json").read_text())
    sizes = ("num_virtual_tokens", "num_attention_heads", "num_layers", "token_dim", "base_model_name_or_path")
    settings = published | {key: own[key] for key in sizes}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    check_side_by_side(base, [adapter])
    # It goes on from its own prompt too.
    (tensor,) = load_file(adapter / "adapter_model.safetensors").values()
    assert any(torch.equal(parameter.flatten(), tensor.flatten()) for parameter in taken_further(base, adapter, name))


def taken_further(base: Path, adapter: Path, method: str) -> list[torch.Tensor]:
    """Return what a run that goes on from the adapter trains, before its first step."""
    options = TrainOptions(model_name_or_path=str(base), packing=False, adapter_name_or_path=str(adapter))
    options = adopt_adapter_options(options)
    assert options.method == method
    parameters = attach_adapter(load_model(options), options).parameters()
    return [parameter.detach() for parameter in parameters if parameter.requires_grad]


@pytest.mark.long
def test_an_ia3_adapter_of_peft_goes_on_from_its_weights(base, tmp_path):
    adapter = foreign(base, tmp_path / "ia3", METHODS["ia3"]())
    stored, trained = load_file(adapter / "adapter_model.safetensors").values(), taken_further(base, adapter, "ia3")
    assert len(stored) == len(trained) > 0
    assert all(any(torch.equal(tensor, parameter) for parameter in trained) for tensor in stored)
