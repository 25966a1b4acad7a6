import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from accel_llm import attention, losses
from accel_llm.errors import ConfigError
from accel_llm.packing import IGNORED, collate_packed, collate_padded, pack

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS = {"head_dim": 8}
WINDOW = {"sliding_window": 4}
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
FAMILIES: dict[str, dict] = {
    "llama": {},
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 0},
    "qwen3": HEADS,
    "mistral": WINDOW,
    "gemma": HEADS,
    "gemma2": {**HEADS, **WINDOW, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**HEADS, **WINDOW, "final_logit_softcapping": 3.0},
    "phi3": {},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {**WINDOW, "logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.2},
    "gpt2": GPT,
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0},
    "olmo2": {},
    "glm4": HEADS,
    "starcoder2": WINDOW,
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {**HEADS, **WINDOW, "num_local_experts": 4, "num_experts_per_tok": 2},
}
UNPACKABLE: dict[str, dict] = {"stablelm": {}, "falcon": {"num_kv_heads": 2}, "bloom": {"n_head": 4, "n_layer": 2}}
STOCK: dict[str, dict] = {
    "hyperclovax": {"logits_scaling": 2.0},
    "recurrent_gemma": {"logits_soft_cap": 3.0},
    "modernbert-decoder": {},
    "llama4_text": {**HEADS, "num_local_experts": 4, "intermediate_size_mlp": 48},
}


def tiny_model(family: str, **options) -> PreTrainedModel:
    """A float32 model whose random weights are so large that each part of it shows in the logits."""
    sizes = {**FAMILIES, **UNPACKABLE, **STOCK}[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**{**SIZES, **sizes, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.3 if parameter.ndim > 1 else 0.2)
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.add_(1)
    return model.eval()


def random_rows(number: int, longest: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    rows = []
    for length in rng.integers(2, longest + 1, number):
        ids = rng.integers(3, 97, length)
        rows.append((ids, np.where(rng.random(length) < 0.6, ids, IGNORED)))
    return rows


def family_loss(model: PreTrainedModel, batch: dict) -> torch.Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    return type(model).forward(model, **inputs, use_cache=False).loss * losses.count_targets(batch["labels"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, *UNPACKABLE])
def test_own_loss_is_the_familys(family, tied):
    model = tiny_model(family, tie_word_embeddings=tied)
    assert losses.attach(model, 1024) == "own"
    batch = collate_padded(random_rows(4, 12), 0)
    expected = family_loss(model, batch)
    model.loss_chunks = 1
    torch.testing.assert_close(losses.next_token_loss(model, batch), expected, rtol=1e-6, atol=0)
    model.loss_chunks = 3
    torch.testing.assert_close(losses.next_token_loss(model, batch), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", STOCK)
def test_a_family_that_treats_its_logits_in_a_way_of_its_own_takes_the_stock_path(family):
    model = tiny_model(family)
    assert losses.attach(model, 1024) == "stock"
    batch = collate_padded(random_rows(4, 12), 0)
    torch.testing.assert_close(losses.next_token_loss(model, batch), family_loss(model, batch), rtol=1e-6, atol=0)


def test_balance_loss_of_experts_is_part_of_the_loss_where_the_config_asks_for_it():
    balanced = tiny_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.1)
    assert losses.attach(balanced, 1024) == "stock"
    batch = collate_padded(random_rows(4, 12), 0)
    loss = losses.next_token_loss(balanced, batch)
    torch.testing.assert_close(loss, family_loss(balanced, batch), rtol=1e-6, atol=0)
    assert loss > 1.01 * family_loss(tiny_model("mixtral"), batch)


class TwiceTheLoss(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.loss = None if output.loss is None else 2 * output.loss
        return output


def test_a_loss_that_logits_do_not_give_is_refused():
    model = tiny_model("llama")
    model.__class__ = TwiceTheLoss
    with pytest.raises(ConfigError, match="TwiceTheLoss cannot be trained here"):
        losses.attach(model, 1024)


def test_check_settles_the_path_of_a_model_that_could_not_be_tried_when_attached():
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_model("hyperclovax").config)
    assert losses.attach(empty, 1024) == "own"
    model = tiny_model("hyperclovax")
    losses.attach(model, 1024)
    model.loss_path = "own"
    assert losses.check(model, "cpu", torch.float32) == "stock" == model.loss_path


@pytest.mark.parametrize("family", ["llama", "hyperclovax"])
@pytest.mark.parametrize("chunks", [1, 4])
def test_no_label_gives_zero_and_zero_gradients(family, chunks):
    model = tiny_model(family)
    losses.attach(model, 1024)
    model.loss_chunks = chunks
    loss = losses.next_token_loss(
        model, collate_padded([(ids, np.full_like(ids, IGNORED)) for ids, _ in random_rows(2, 9)], 0)
    )
    loss.backward()
    assert float(loss.detach()) == 0
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_chunks_follow_from_capacity_and_the_head_is_used_as_often_whatever_the_labels(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_BYTES", 97 * 4 * 100)
    model = tiny_model("llama")
    losses.attach(model, 450)
    assert (model.loss_chunks, model.eval_loss_chunks) == (5, 0)
    losses.attach(model, 450, 900)
    assert (model.loss_chunks, model.eval_loss_chunks) == (5, 9)
    calls = []
    model.train().lm_head.register_forward_hook(lambda *_: calls.append(1))
    for rows in (random_rows(4, 12), [(np.array([3, 4]), np.array([IGNORED, 4]))]):
        losses.next_token_loss(model, collate_padded(rows, 0)).backward()
    assert len(calls) == 2 * 5 * 2, "5 chunks, forward and backward"
    with torch.no_grad():
        losses.next_token_loss(model.eval(), collate_padded(random_rows(4, 12), 0))
    assert len(calls) == 20 + 9


def test_generation_is_the_familys():
    model, attached = tiny_model("qwen3"), tiny_model("qwen3")
    losses.attach(attached, 1024)
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
    expected = model(**batch).loss * losses.count_targets(batch["labels"])
    losses.attach(base, 1024)
    torch.testing.assert_close(losses.next_token_loss(model, batch), expected, rtol=1e-6, atol=0)
    assert losses.check(model, "cpu", torch.float32) == "own"


def test_accelerate_wraps_the_attached_forward_in_autocast():
    model = tiny_model("llama")
    losses.attach(model, 1024)
    batch = collate_padded(random_rows(4, 12), 0)
    exact = losses.next_token_loss(model, batch)
    try:
        prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        loss = losses.next_token_loss(prepared, batch)
        assert losses.check(prepared, "cpu", torch.bfloat16) == "own"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert loss.dtype == torch.float32 and loss != exact
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)


def test_count_targets_leaves_out_the_first_token():
    assert losses.count_targets(torch.tensor([[5, IGNORED, 7], [IGNORED, 8, 9]])) == 3


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
    targets = sum(losses.count_targets(batch["labels"]) for batch in micro_batches)
    for batch in micro_batches:
        (losses.next_token_loss(model, batch) / targets).backward()
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
    losses.attach(model, 1024)
    model.loss_chunks = chunks
    if reentrant is not None:
        recomputed = functools.partial(checkpoint, use_reentrant=reentrant)
        model._set_gradient_checkpointing(gradient_checkpointing_func=recomputed)
        model.enable_input_require_grads()
    if cut.startswith("packed"):
        attention.enable(model)
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
    assert losses.attach(model, 1024) == ("own" if family == "llama" else "stock")
    model.loss_chunks = chunks
    if packed:
        attention.enable(model)
    batch = collate_packed(rows, weights) if packed else collate_padded(rows, 0, weights)
    assert float(losses.next_token_loss(model, batch)) == pytest.approx(expected, rel=1e-5)
    assert float(losses.total_weight(batch)) == pytest.approx(total, rel=1e-12)
    plain = {name: value for name, value in batch.items() if name != "weights"}
    assert float(losses.total_weight(plain)) == int(losses.count_targets(batch["labels"])) != pytest.approx(total)
    ones = {**batch, "weights": torch.ones_like(batch["weights"])}
    assert float(losses.next_token_loss(model, ones)) == pytest.approx(float(losses.next_token_loss(model, plain)))
