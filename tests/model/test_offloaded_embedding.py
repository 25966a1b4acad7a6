"""An input embedding in host memory gives the same bits, and nobody needs its ids from the device.

On a machine without a GPU the device is the CPU, where the lookup takes the same way, or `meta`, which has no data.
"""

import gc
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support import FAMILIES, random_rows, tiny_model

from accel_llm.adapters.attach import attach_adapter
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import collate_packed, collate_padded, to_device
from accel_llm.errors import ConfigError
from accel_llm.model import placement
from accel_llm.model.attention import enable_packing, forward_arguments
from accel_llm.model.loading import load_model
from accel_llm.model.loss import attach_loss, next_token_loss
from accel_llm.model.model_names import model_problems
from accel_llm.model.neftune import attach_neftune
from accel_llm.model.offloaded_embedding import HostMatrix, embedding_to_offload, host_matrices, keep_on_host
from accel_llm.model.placement import materialize_weights, place_weights
from accel_llm.model.vocabulary import extend_vocabulary

ADAPTER = {"init_lora_weights": False, "packing": False}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "NEFTune": ("llama", {"neftune_noise_alpha": 5.0}),
    "recomputed": ("llama", {"gradient_checkpointing": True}),
    "adapted": ("llama", {"lora_target_modules": ["embed_tokens", "q_proj"]}),
    "scaled by its own class": ("gemma3_text", {}),
    "scaled and adapted": ("gemma3_text", {"lora_target_modules": ["embed_tokens", "q_proj"]}),
    "scaled by the model": ("gemma", {}),
    "with embedded positions": ("gpt2", {}),
}
# peft 0.21.2 asks for a property that transformers 5.23 deprecates
pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def adapted(family: str, new_tokens: range = range(0), **settings: Any) -> Any:
    options = TrainOptions(**ADAPTER, **settings)
    torch.manual_seed(0)
    model: Any = tiny_model(family, tie_word_embeddings=False).train()
    attach_loss(model, 1024)
    if options.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    extend_vocabulary(model, new_tokens)
    model = attach_adapter(model, options, new_tokens)
    attach_neftune(model, options.neftune_noise_alpha)
    return model


def loss_and_gradients(model: Any, batch: dict) -> list[torch.Tensor]:
    torch.manual_seed(3)
    loss = next_token_loss(model, batch)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient is not None for gradient in gradients)
    return [loss.detach(), *gradients]


@pytest.mark.parametrize("new_tokens", [range(0), range(97, 100)], ids=["", "new tokens"])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_have_the_same_bits(case, new_tokens):
    family, settings = CASES[case]
    if new_tokens and "embed_tokens" in settings.get("lora_target_modules", []):
        pytest.skip("refused: either the rows or the embedding")
    rows = [(ids + (ids > 94) * (2 if new_tokens else 0), labels) for ids, labels in random_rows(4, 12)]
    batch = collate_padded(rows, 0)
    plain, offloaded = adapted(family, new_tokens, **settings), adapted(family, new_tokens, **settings)
    name = next(name for name, parameter in plain.named_parameters() if "embed_tokens" in name or "wte" in name)
    matrix = plain.get_parameter(name)
    keep_on_host(embedding_to_offload(offloaded))
    assert name not in {**dict(offloaded.named_parameters()), **offloaded.state_dict()}
    assert list(host_matrices(offloaded)) == [name] and torch.equal(host_matrices(offloaded)[name], matrix)
    expected, actual = loss_and_gradients(plain, batch), loss_and_gradients(offloaded, batch)
    assert len(actual) == len(expected) and all(map(torch.equal, actual, expected))
    # Generated tokens come without ids on the host.
    ids = torch.arange(3, 9)[None]
    generated = [
        model.eval().generate(input_ids=ids, max_new_tokens=5, do_sample=False) for model in (plain, offloaded)
    ]
    assert torch.equal(*generated)


def test_only_rows_go_to_the_device_and_no_ids_come_back(tiny_llama):
    embedding = tiny_llama().get_input_embeddings()
    ids = torch.tensor([[5, 6, 6], [7, 5, 0]])
    expected = embedding(ids)
    keep_on_host(embedding)
    moved = to_device({"input_ids": ids}, "meta")["input_ids"]
    rows = embedding(moved)
    assert rows.device.type == "meta" and rows.shape == expected.shape and rows.dtype == expected.dtype
    assert torch.equal(embedding(ids), expected) and type(embedding(ids)) is torch.Tensor
    # Ids that only the device knows: its data is asked for.
    changed = to_device({"input_ids": ids}, "meta")["input_ids"]
    changed += 1
    for unknown in (moved.clone(), changed):
        with pytest.raises(NotImplementedError, match="meta"):
            embedding(unknown)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "phi3", "mixtral", "olmo2"])
def test_ids_on_the_host_reach_the_embedding(family, packed):
    """A family that embeds other ids than those of the batch would make the host wait for them."""
    model = adapted(family, gradient_checkpointing=family in FAMILIES)
    if packed:
        enable_packing(model)
    batch = (collate_packed if packed else lambda rows: collate_padded(rows, 0))(random_rows(3, 12))
    batch["input_ids"].on_host = object()
    embedded: list[torch.Tensor] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: embedded.append(args[0]))
    next_token_loss(model, batch).backward()
    assert [ids.on_host for ids in embedded] == [batch["input_ids"].on_host]


def untied(make_model, folder, **settings: Any) -> TrainOptions:
    base = make_model(folder, torch.bfloat16, tie_word_embeddings=False)
    return TrainOptions(model_name_or_path=str(base), offload_embeddings=True, packing=False, **settings)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_placing_leaves_the_matrix_on_the_host_and_nothing_else(method, make_model, tmp_path, accelerator, monkeypatch):
    """Weights are placed for a device other than the CPU, but stay where they can be compared."""
    options = untied(make_model, tmp_path, method=method, precision="bf16")
    model: Any = load_model(options)
    new_tokens = range(model.config.vocab_size, model.config.vocab_size + 2)
    extend_vocabulary(model, new_tokens)
    model = attach_adapter(model, options, new_tokens)
    expected = model.get_input_embeddings().weight.to(torch.float32, copy=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    placed: dict[str, list[str]] = {}

    def place(
        model: Any, modules: list, compute: torch.dtype, device: torch.device, masters: bool, copy: bool = True
    ) -> None:
        for parameter in (parameter for module in modules for parameter in module.parameters(recurse=False)):
            placed.setdefault(names[id(parameter)], []).append(device.type)
        materialize_weights(model, modules, compute, torch.device("cpu"), masters, copy)

    monkeypatch.setattr(placement, "materialize_weights", place)
    accelerator.state.device = torch.device("meta")
    place_weights(accelerator, model, options)
    name = "base_model.model.model.embed_tokens."
    assert placed.pop(f"{name}weight") == ["cpu"] and placed.pop(f"{name}new_rows") == ["cpu", "meta"]
    assert all(devices == ["meta"] for devices in placed.values()) and len(placed) == len(names) - 2
    assert host_matrices(model).keys() == {f"{name}weight"}
    assert torch.equal(host_matrices(model)[f"{name}weight"], expected)
    # What Accelerate and DeepSpeed do next.
    moved = model.get_input_embeddings().to("meta")
    assert moved.new_rows.device.type == "meta" and moved.weight.device.type == "cpu"
    assert isinstance(moved.weight, HostMatrix)


@pytest.mark.parametrize(
    ("sizes", "settings", "sentence"),
    [
        ({"tie_word_embeddings": True}, {}, "model.embed_tokens is also the output head of LlamaForCausalLM, which the GPU needs "
         "whole; set offload_embeddings: false."),
        ({}, {"modules_to_save": ["embed_tokens"]}, "model.embed_tokens is trained as a whole, because modules_to_save names it; "
         "leave it out there, or set offload_embeddings: false."),
        ({}, {"use_dora": True, "lora_target_modules": ["embed_tokens"]}, "use_dora reads the whole matrix of "
         "model.embed_tokens in each step; leave it out of lora_target_modules, or set offload_embeddings: false."),
    ],
)  # fmt: skip
def test_an_embedding_that_the_device_needs_is_refused(sizes, settings, sentence, make_model, tmp_path, accelerator):
    base = make_model(tmp_path, **sizes)
    options = TrainOptions(model_name_or_path=str(base), offload_embeddings=True, packing=False, **settings)
    model = attach_adapter(load_model(options), options)
    with pytest.raises(ConfigError) as refused:
        place_weights(accelerator, model, options)
    assert str(refused.value) == f"offload_embeddings: {sentence}"


def test_it_is_for_frozen_embeddings_that_are_not_sharded(tiny, monkeypatch):
    options = TrainOptions(model_name_or_path=str(tiny), offload_embeddings=True)
    assert model_problems(options) == []
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert model_problems(options) == [
        "offload_embeddings: fsdp2 shards the embedding over all processes instead; set it to false, or use "
        "single_gpu.yaml, ddp.yaml or zero2.yaml."
    ]
    full = TrainOptions(method="full", offload_embeddings=True)
    assert full.problems() == ["offload_embeddings: method full trains no adapter; remove it."]


def test_without_a_gpu_it_has_no_effect_and_says_so(make_model, tmp_path, accelerator, capsys):
    options = untied(make_model, tmp_path)
    model = load_model(options)
    place_weights(accelerator, model, options)
    assert "offload_embeddings: without a GPU all weights lie in host memory" in capsys.readouterr().out
    assert not host_matrices(model) and isinstance(model.get_input_embeddings().weight, torch.nn.Parameter)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_on_a_gpu_nothing_changes_but_where_the_matrix_lies(method, packed, make_model, tmp_path):
    base = make_model(tmp_path, torch.bfloat16, hidden_size=128, vocab_size=50000, tie_word_embeddings=False)
    accelerator = Accelerator(mixed_precision="bf16")
    rows = random_rows(4, 40)
    batch = to_device(collate_packed(rows) if packed else collate_padded(rows, 0), accelerator.device)
    results, sizes = [], []
    for offloaded in (False, True):
        options = TrainOptions(
            model_name_or_path=str(base), method=method, packing=packed, precision="bf16", lora_r=8,
            gradient_checkpointing=True, offload_embeddings=offloaded,
        )  # fmt: skip
        torch.manual_seed(0)
        model: Any = attach_adapter(load_model(options), options)
        gc.collect()
        before = torch.cuda.memory_allocated()
        place_weights(accelerator, model, options)
        sizes.append(torch.cuda.memory_allocated() - before)
        model = accelerator.prepare(model)
        assert bool(host_matrices(model)) == offloaded
        assert all(matrix.device.type == "cpu" for matrix in host_matrices(model).values())
        loss_and_gradients(model, batch)  # the first call loads kernels and may wait
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            results.append(loss_and_gradients(model, batch))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if not packed:
            inputs = forward_arguments(batch)
            results[-1].append(model.eval().generate(**inputs, max_new_tokens=4, do_sample=False))
    assert all(map(torch.equal, *results)) and len(results[0]) == len(results[1])
    assert sizes[0] - sizes[1] == 50000 * 128 * 2
