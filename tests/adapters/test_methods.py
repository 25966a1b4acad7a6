"""Each weight-space method of PEFT against plain PEFT and transformers in float64: values, gradients, files."""

import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, PromptLearningConfig
from support import materialize, moved_adapter, relative_distance, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

from accel_llm.adapters.adopt import adopt_adapter_options
from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.methods import LORA_VARIANTS, REFUSED_METHODS, check_method, config_class_of, peft_methods
from accel_llm.adapters.saved import check_saved_adapter
from accel_llm.config.command_line import parse_options
from accel_llm.config.options import SftOptions, TrainOptions
from accel_llm.data.batches import collate_packed
from accel_llm.errors import ConfigError
from accel_llm.model.attention import stock_attention
from accel_llm.model.loading import load_model
from accel_llm.model.loss import next_token_loss

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    # PEFT trains a copy of any kind of norm, but warns of those that are not torch's own. BOFT looks for a compiler.
    pytest.mark.filterwarnings(
        "ignore:(?s).*(Unsupported layer type|CUDA ext|butterfly_factor|no bias term|Sparse inv)"
    ),
]
OPTIONS = {
    "trainable_tokens": {"token_indices": [5, 9]},
    "fourierft": {"init_weights": True},  # PEFT begins with random numbers, which are large in a model of this size
}
# AdaLoRA changes its ranks in training: tests/adapters/test_budget.py.
METHODS = [
    name
    for name in peft_methods()
    if name not in (*REFUSED_METHODS, "qlora", "adalora")
    and not issubclass(config_class_of(name), PromptLearningConfig)
]
# One method of each family runs in the default suite: scaled activations, random projections, orthogonal products.
FAMILIES = ("ia3", "vera", "oft")
PARAMETERS = [pytest.param(name, marks=[] if name in FAMILIES else pytest.mark.long) for name in METHODS]
each_method = pytest.mark.parametrize("method", PARAMETERS)


class Adapter(NamedTuple):
    """An adapter whose weights moved away from their first values: a model with it, and its folder."""

    method: str
    model: Any
    folder: Path
    exact: dict[str, torch.Tensor]  # its gradients of a step in float64


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama", attention_bias=True, tie_word_embeddings=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=PARAMETERS)
def adapter(request, base, tmp_path_factory) -> Adapter:
    folder = tmp_path_factory.mktemp(request.param)
    with warnings.catch_warnings():  # marks and fixtures of a test do not reach a fixture of the module
        warnings.simplefilter("ignore")
        model = moved(base, folder, request.param)
        return Adapter(request.param, model, folder, exact_gradients(folder, base))


def rows(number: int = 6) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return rows of uneven lengths, of which an uneven share of tokens has a label."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(4, 20, number)
    ids = [rng.integers(3, 97, length) for length in lengths]
    return [(row, np.where(rng.random(len(row)) < 0.2 + 0.6 * (k % 2), row, -100)) for k, row in enumerate(ids)]


def step_gradients(model: Any, cuts: tuple[int, ...] = (1, 4), autocast: bool = False) -> dict[str, torch.Tensor]:
    """Return the gradients of one step whose rows are cut into uneven packed micro-batches."""
    parts = np.split(np.arange(len(rows())), cuts)
    batches = [collate_packed([rows()[k] for k in part]) for part in parts]
    targets = sum((row[1][1:] != -100).sum() for row in rows())
    model.zero_grad()
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = next_token_loss(model, batch) / int(targets)
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def exact_gradients(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """Return the gradients of the same step by plain transformers and PEFT, in float64, row by row."""
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(plain, str(folder), is_trainable=True).double().eval()
    for module in model.modules():
        if isinstance(vars(module).get("dtype"), torch.dtype):  # AdaMSS casts its input to what the base was before
            vars(module)["dtype"] = torch.float64
    targets = sum(int((labels[1:] != -100).sum()) for _, labels in rows())
    for ids, labels in rows():
        logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0, :-1]
        loss = F.cross_entropy(logits, torch.from_numpy(labels)[1:], reduction="sum", ignore_index=-100)
        (loss / targets).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def kind_of(name: str) -> str:
    """Return the name that a parameter has in every layer, such as lora_A."""
    return re.split(r"\.default|\.weight", name)[0].rsplit(".", 1)[-1]


def settings(base: Path, method: str, **more: Any) -> TrainOptions:
    options = {"method_options": OPTIONS.get(method, {}), "packing": True, "max_length": 128}
    return TrainOptions(model_name_or_path=str(base), method=method, **(options | more))


def attached(options: TrainOptions) -> Any:
    torch.manual_seed(0)
    return materialize(attach_adapter(load_model(options), options), options)


def moved(base: Path, folder: Path, method: str, **more: Any) -> Any:
    """Return a model with an adapter that moved away from its first values, as it was saved in `folder`."""
    options = {"method_options": OPTIONS.get(method, {}), "packing": True, "max_length": 128} | more
    return moved_adapter(base, folder, by=0.01, method=method, **options)


def logits_of(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    ids = torch.arange(3, 40)[None] if ids is None else ids
    with torch.no_grad(), stock_attention(model):
        return model.eval()(input_ids=ids).logits


def test_gradients_of_a_step_equal_float64(adapter):
    # In training PVeRA draws noise.
    actual, expected = step_gradients(adapter.model.train(adapter.method != "pvera")), adapter.exact
    assert actual.keys() == expected.keys()
    # A single number, such as DeLoRA's lambda, may nearly cancel; all numbers of a kind do not.
    for kind in {kind_of(name) for name in expected}:
        theirs, ours = (
            torch.cat([g.flatten().double() for name, g in gradients.items() if kind_of(name) == kind])
            for gradients in (expected, actual)
        )
        assert relative_distance(ours, theirs) < 1e-5, kind
    assert all(float(gradient.norm()) > 0 for gradient in expected.values())


def test_no_token_sees_later_tokens_or_other_documents(adapter):
    model, ids = adapter.model.eval(), torch.arange(3, 23)[None]
    changed = torch.cat([ids[:, :12], ids[:, 12:] + 40], 1)
    assert torch.allclose(logits_of(model, ids)[:, :12], logits_of(model, changed)[:, :12], atol=1e-5)
    with torch.no_grad():
        packed = float(next_token_loss(model, collate_packed(rows())))
        alone = sum(float(next_token_loss(model, collate_packed([row]))) for row in rows())
    assert packed == pytest.approx(alone, rel=1e-5)


def test_a_saved_adapter_is_loaded_and_trained_further(adapter, base):
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter.folder))
    assert torch.equal(logits_of(loaded), logits_of(adapter.model))
    # Neither the method nor its options are named again.
    options = TrainOptions(model_name_or_path=str(base), adapter_name_or_path=str(adapter.folder), packing=False)
    options = adopt_adapter_options(options)
    again = attached(options)
    assert options.method == adapter.method and torch.equal(logits_of(again), logits_of(adapter.model))
    assert trained_names(again) == trained_names(adapter.model)


def test_recomputed_activations_give_the_same_gradients(adapter, base, tmp_path):
    stored = adapter.model.train()
    recomputed = moved(base, tmp_path, adapter.method, gradient_checkpointing=True)
    gradients = []
    for model in (stored, recomputed):
        torch.manual_seed(7)
        gradients.append(step_gradients(model))
    assert max(relative_distance(gradients[1][name], gradients[0][name]) for name in gradients[0]) < 1e-6


def test_on_a_bf16_base_all_that_is_trained_is_float32(adapter, base, tmp_path):
    model = moved(base, tmp_path, adapter.method, precision="bf16")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    gradients = step_gradients(model.train(adapter.method != "pvera"), autocast=True)
    flat, exact = (torch.cat([g[n].flatten().double() for n in adapter.exact]) for g in (gradients, adapter.exact))
    assert relative_distance(flat, exact) < 0.2
    with model.disable_adapter():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        assert torch.equal(logits_of(model), logits_of(plain))


@each_method
def test_training_moves_the_adapter_alone(base, method):
    model = attached(settings(base, method))
    fixed = {name: p for name, p in model.named_parameters() if not p.requires_grad} | dict(model.named_buffers())
    before = {name: tensor.clone() for name, tensor in fixed.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    losses = []
    for _ in range(4):
        step_gradients(model)
        optimizer.step()
        with torch.no_grad():
            losses.append(float(next_token_loss(model, collate_packed(rows()))))
    assert losses[-1] < losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in fixed.items())
    # Whatever was trained, the base is what it was.
    with model.disable_adapter():
        assert torch.equal(logits_of(model), logits_of(AutoModelForCausalLM.from_pretrained(base)))


@pytest.mark.parametrize(
    "method", ["ia3", *(pytest.param(name, marks=pytest.mark.long) for name in ("vera", "oft", "shira"))]
)
def test_modules_to_save_are_trained_saved_and_loaded(tmp_path, method):
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    model = moved(base, tmp_path / "adapter", method, modules_to_save=["lm_head"])
    assert any("lm_head.modules_to_save" in name for name in trained_names(model))
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    assert torch.equal(logits_of(loaded), logits_of(model))


def problem(base: Path, method: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        asked = settings(base, method, **options)
        check_method(asked)
        attached(asked)
    return str(error.value)


def test_sizes_that_do_not_fit_the_widths(base, capsys):
    assert problem(base, "c3a", method_options={"block_size": 10}) == (
        "method_options: block_size 10 does not divide the widths 16, 32, 48 of the adapted layers; allowed: 1, 2, 4, 8, "
        "16."
    )
    assert problem(base, "shira", method_options={"r": 64}) == (
        "method_options: r 64 is too large for a layer of 32 inputs and 16 outputs; allowed: at most 10."
    )
    attached(settings(base, "c3a"))
    assert "block_size is 16, because the default of 256 does not divide the widths" in capsys.readouterr().out


@pytest.mark.parametrize("name", LORA_VARIANTS)
def test_a_kind_of_lora_that_people_call_a_method_is_named_as_it_is_set(base, name):
    """What the sentence says to write is an option that exists, and it is another setting than plain LoRA's."""
    assert LORA_VARIANTS[name] in problem(base, name)
    words = ["--model_name_or_path", str(base), "--train_files", "x.jsonl", "--output_dir", "x"]
    options = parse_options(SftOptions, [*words, *LORA_VARIANTS[name].split()])
    check_method(options)
    assert not options.problems() and options.method in ("lora", "qlora") and len(options.model_fields_set) > 4


def test_options_of_a_method_are_checked(base):
    assert problem(base, "ia3", method_options={"feedforward_module": ["down_proj"]}) == (
        "method_options: method ia3 has no 'feedforward_module'; did you mean feedforward_modules?"
    )
    assert problem(base, "ia3", method_options={"lora_r": 4}) == (
        "method_options: method ia3 has no 'lora_r'; it has exclude_modules, feedforward_modules, init_ia3_weights."
    )
    for name in ("lora_r", "r"):
        assert problem(base, "lora", method_options={name: 4}) == (
            f"method_options: {name} is set by an option of its own; write --lora_r 4."
        )
    assert problem(base, "vera", method_options={"r": "x"}).startswith("method_options: r 'x' is not allowed (")
    assert "eva_config of method lora has no 'rhoo'; did you mean rho?" in problem(
        base, "lora", init_lora_weights="eva", method_options={"eva_config": {"rhoo": 2.0}}
    )
    assert "needs token_indices" in problem(base, "trainable_tokens", method_options={})
    assert "generator_seed of method pvera cannot be used" in problem(
        base, "pvera", method_options={"generator_seed": 1}
    )
    assert "lily cannot be trained here: PEFT mixes its matrices" in problem(base, "lily")
    for values in ({"r": True}, {"alpha": True}, {"rank_dropout": 2.0}):
        assert "is not allowed" in problem(base, "loha", method_options=values)
    assert "d_initial 'nan' is not allowed" in problem(base, "vera", method_options={"d_initial": "nan"})


@pytest.mark.parametrize(
    ("ids", "reason"), [([5, 97], "97, but the embedding has rows 0 to 96"), ([-1], "-1, but"), ([5, 5], "5 twice")]
)
def test_tokens_without_a_row_of_their_own_are_refused(base, ids, reason):
    assert f"token_indices names {reason}" in problem(base, "trainable_tokens", method_options={"token_indices": ids})


def test_ia3_in_all_linear_layers_is_loaded_by_peft(base, tmp_path):
    model = moved(base, tmp_path, "ia3", lora_target_modules="all-linear")
    check_saved_adapter(model, tmp_path)
    assert sum("ia3_l" in name and ".layers.0." in name for name in trained_names(model)) == 7
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path))
    assert relative_distance(logits_of(model), logits_of_plain(plain)) < 1e-5


@pytest.mark.parametrize(
    "method, name, value, default",
    [("boft", "boft_n_butterfly_factor", 2, 1), ("lokr", "module_dropout", 0.1, 0.0), ("oft", "coft", True, False)],
)
def test_options_that_would_spoil_a_result_are_refused(base, method, name, value, default):
    assert f"{name} of method {method} cannot be used: " in problem(base, method, method_options={name: value})
    check_method(settings(base, method, method_options={name: default}))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    tiny_model("gpt2").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_layers_of_gpt2_are_adapted_saved_and_trained_further(gpt2, tmp_path, method):
    model = moved(gpt2, tmp_path, method)
    again = adopt_adapter_options(TrainOptions(model_name_or_path=str(gpt2), adapter_name_or_path=str(tmp_path)))
    check_method(again)
    plain = AutoModelForCausalLM.from_pretrained(gpt2)
    # (IA)3 scales keys, values and the second product of the feed-forward part; the first are one layer with the queries.
    if method == "ia3":
        assert {name.split(".h.0.")[-1] for name in trained_names(model) if ".h.0." in name} == {
            "attn.c_attn.ia3_l.default",
            "mlp.c_proj.ia3_l.default",
        }
    assert relative_distance(logits_of(model), logits_of_plain(plain)) > 1e-3
    expected = logits_of_plain(PeftModel.from_pretrained(plain, str(tmp_path)))
    assert relative_distance(logits_of(model), expected) < 1e-5
    assert torch.equal(logits_of(attached(again)), logits_of(model))


def logits_of_plain(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(3, 40)[None]).logits


def test_what_peft_cannot_adapt_in_gpt2_is_refused(gpt2):
    assert problem(gpt2, "peanut").startswith("lora_target_modules: 'all-linear' does not fit the model (PE")
    assert problem(gpt2, "osf").startswith(
        "method: osf has nothing to train in the layers 'all-linear' of this model; "
    )


def test_options_that_leave_nothing_to_train_are_refused(base):
    nothing = {"config_A_B": "none", "config_C": "none", "config_D_E": "none"}
    sentence = problem(base, "glora", method_options=nothing)
    assert sentence.startswith(f"method: glora with method_options {nothing} has nothing to train in the layers ")


@pytest.mark.parametrize(
    ("family", "last"), [("opt", "fc2"), ("phi", "fc2"), ("starcoder2", "c_proj"), ("qwen3", "down_proj")]
)
def test_ia3_scales_keys_values_and_the_second_product(tmp_path, family, last):
    """The paper's choice (section 3.3), where PEFT's table has queries or no entry."""
    tiny_model(family).save_pretrained(tmp_path)
    model = attached(settings(tmp_path, "ia3"))
    names = {name.split(".ia3_l")[0].rsplit(".", 1)[-1] for name in trained_names(model)}
    assert names == {"k_proj", "v_proj", last}
    assert model.peft_config["default"].feedforward_modules == [last]


@pytest.mark.parametrize("family", ["mixtral", "phi3"])
def test_ia3_asks_for_names_that_it_does_not_know(tmp_path, family):
    tiny_model(family).save_pretrained(tmp_path)
    assert "are not known; name them" in problem(tmp_path, "ia3")


def test_an_earlier_adapter_sets_the_method_and_its_options(base, tmp_path):
    moved(base, tmp_path, "vera", method_options={"r": 8})
    start = {"model_name_or_path": str(base), "adapter_name_or_path": str(tmp_path)}
    adopted = adopt_adapter_options(TrainOptions(**start))
    assert (adopted.method, adopted.method_options["r"]) == ("vera", 8)
    for more, message in (
        ({"method": "ia3"}, "method: ia3 is given, but .* holds VERA; give vera, or leave it out"),
        ({"method": "vera", "method_options": {"r": 9}}, "method_options: r: 9 is given, but the adapter .* has 8"),
    ):
        with pytest.raises(ConfigError, match=message):
            adopt_adapter_options(TrainOptions(**start, **more))


def test_lily_would_let_a_token_see_what_follows(base, tmp_path):
    """The reason why it is refused: with PEFT 0.21 a later token changes the logits of an earlier one."""
    model = moved_adapter(base, tmp_path, method="lily").eval()
    ids = torch.arange(3, 23)[None]
    changed = torch.cat([ids[:, :12], ids[:, 12:] + 40], 1)
    assert float((logits_of(model, ids) - logits_of(model, changed))[:, :12].abs().max()) > 1e-2
