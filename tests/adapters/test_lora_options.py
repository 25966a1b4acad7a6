"""Options of LoRA in method_options: each has its effect, or is refused. The oracle is plain PEFT on the exported files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from support import moved_adapter, relative_distance, saved_bases
from transformers import AutoModelForCausalLM

from accel_llm.adapters.attach import attach_adapter
from accel_llm.adapters.initial import lora_layers
from accel_llm.adapters.methods import check_method
from accel_llm.adapters.saved import check_saved_adapter
from accel_llm.config.options import TrainOptions
from accel_llm.errors import ConfigError
from accel_llm.model.loading import load_model

pytestmark = pytest.mark.usefixtures("quiet")
IDS = torch.randint(3, 50, (3, 20), generator=torch.Generator().manual_seed(3))
Q = {"lora_target_modules": ["q_proj"]}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "alora_invocation_tokens": ("packed into one row", {"alora_invocation_tokens": [4, 5]}),
    "arrow_config": ("trained before", {"arrow_config": {}}),
    "eva_config": ("has an effect only with init_lora_weights eva", {"eva_config": {"rho": 1.0}}),
    "fan_in_fan_out": ("PEFT itself sees", {"fan_in_fan_out": True}),
    "init_rows": ("has an effect only with init_lora_weights eva, corda, lora_ga", {"init_rows": 4}),
    "kasa_config": ("out of the base's weights", {"kasa_config": {}}),
    "layer_replication": ("more layers than its base", {"layer_replication": [[0, 2], [1, 2]]}),
    "loftq_config": ("has an effect only with init_lora_weights loftq", {"loftq_config": {"loftq_bits": 4}}),
    "megatron_config": ("no Megatron layers", {"megatron_config": {"a": 1}}),
    "monteclora_config": ("variational loss", {"monteclora_config": {}}),
    "use_qalora": ("GPTQ", {"use_qalora": True}),
    "velora_config": ("cut into micro-batches", {"velora_config": {"num_groups": 8}}),
}
# What has no effect on this model, and what the sentence says of it.
WITHOUT_EFFECT: dict[str, tuple[str, dict[str, Any]]] = {
    "rank_pattern": ("rank_pattern has 'qq_proj'", {"rank_pattern": {"qq_proj": 2}}),
    "alpha_pattern": ("alpha_pattern has 'qq_proj'", {"alpha_pattern": {"qq_proj": 2}}),
    "exclude_modules": ("exclude_modules has 'x_proj'", {"exclude_modules": ["x_proj"]}),
    "layers_to_transform": ("layers_to_transform has 7", {"layers_to_transform": [1, 7]}),
    "target_parameters": ("target_parameters has 'experts.x'", {"target_parameters": ["experts.x"]}),
    "ensure_weight_tying": ("are two matrices", {"ensure_weight_tying": True}),
    "trainable_token_indices": ("has no row 999, only 0 to 96", {"trainable_token_indices": [999]}),
    "use_bdlora": (
        "use_bdlora has 'x_proj'",
        {"use_bdlora": {"target_modules_bd_a": ["x_proj"], "match_strict": False}},
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    return saved_bases(tmp_path_factory, ("llama", "gemma", "qwen3_moe", "falcon_h1"))


def attached(base: Path, **options: Any) -> Any:
    settings = TrainOptions(**{"model_name_or_path": str(base), "packing": False, "lora_r": 4, **options})
    check_method(settings)
    return attach_adapter(load_model(settings), settings)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.double()


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_here_is_refused(name):
    reason, values = REFUSED[name]
    with pytest.raises(ConfigError, match=f"method_options: {name}.*{reason}"):
        check_method(TrainOptions(model_name_or_path="-", method_options=values))


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")  # PEFT warns of some of them
@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_what_has_no_effect_is_an_error(bases, name):
    reason, values = WITHOUT_EFFECT[name]
    with pytest.raises(ConfigError, match=reason):
        attached(bases["llama"], method_options=values)


@pytest.mark.parametrize(
    "options, count",
    [  # widths: q_proj 32 x 32, k_proj 32 x 16
        ({**Q, "method_options": {"layers_to_transform": [1]}}, 4 * 64),
        ({"lora_target_modules": ["q_proj", "k_proj"], "method_options": {"rank_pattern": {"q_proj": 2}}}, None),
        ({"method_options": {"layers_to_transform": 1}}, None),
    ],
)
def test_patterns_choose_ranks_and_layers(bases, options, count):
    model = attached(bases["llama"], **options)
    layers = lora_layers(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    patterns = options["method_options"].get("rank_pattern", {})
    for name, layer in layers.items():
        assert layer.r["default"] == patterns.get(name.rsplit(".", 1)[-1], 4)
    assert trained == sum(k.r["default"] * (k.in_features + k.out_features) for k in layers.values())
    assert count in (None, trained)
    numbers = {name.split(".")[2] for name in layers}
    assert numbers == ({"1"} if "layers_to_transform" in options["method_options"] else {"0", "1"})
    assert len(layers) == {"q_proj": 1, "q_proj k_proj": 4}.get(" ".join(options.get("lora_target_modules", [])), 7)


@pytest.mark.parametrize(
    "family, chosen, matrices",
    [
        ("llama", [3, 9], ["embed_tokens"]),
        ("llama", {"embed_tokens": [3], "lm_head": [40, 4]}, ["embed_tokens", "lm_head"]),
        ("gemma", [3, 9], ["embed_tokens"]),  # tied: the head follows
    ],
)
def test_rows_of_chosen_tokens_are_trained_and_exported(bases, tmp_path, family, chosen, matrices):
    options = {**Q, "method_options": {"trainable_token_indices": chosen}, "lora_r": 4}
    model = moved_adapter(bases[family], tmp_path / "adapter", **options)
    check_saved_adapter(model, tmp_path / "adapter")
    trained = {name.split(".")[-2]: p for name, p in model.named_parameters() if name.endswith(".new_rows")}
    assert sorted(trained) == sorted(matrices)
    plain = AutoModelForCausalLM.from_pretrained(bases[family])
    base = logits(plain)
    loaded: Any = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert relative_distance(logits(loaded), logits(model)) < 1e-6
    # Only these rows change the result, and switching the adapter off gives the base back bit for bit.
    assert relative_distance(logits(loaded), base) > 1e-3
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), base)


def test_names_of_the_parts_of_experts_mean_the_experts(bases):
    model = attached(bases["qwen3_moe"], lora_target_modules=["gate_proj", "up_proj", "q_proj"])
    assert model.peft_config["default"].target_parameters == {"gate_up_proj"}
    with pytest.raises(
        ConfigError, match="lora_target_modules: the model has no 'gxx_proj'; its linear layers are k_p"
    ):
        attached(bases["qwen3_moe"], lora_target_modules=["gxx_proj", "q_proj"])
    with pytest.raises(ConfigError, match="lora_dropout: PEFT cannot use it for experts"):
        attached(bases["qwen3_moe"], lora_dropout=0.1)


def test_all_linear_leaves_out_what_peft_refuses(bases, capsys):
    model = attached(bases["falcon_h1"])
    assert "without an adapter: model.layers.N.mamba.out_proj" in capsys.readouterr().out
    names = {name.rsplit(".", 1)[-1] for name in lora_layers(model)}
    assert "in_proj" in names and "out_proj" not in names
