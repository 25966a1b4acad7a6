"""Our defaults of each method, with the paper or guide that each comes from, and what to say of a choice of the user.

A rate holds for AdamW. `PEFT's comparison` is method_comparison/MetaMathQA in PEFT's repository: Llama 3.2 3B, 5,000
steps of 4 rows, one task for all methods; it starts each method from 1e-4 and gives some another rate.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from accel_llm.config.options import ADAMW, SftOptions, TrainOptions
from accel_llm.config.preference_options import OTHER_BETAS, DpoOptions, PreferenceOptions, RewardOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.model.loading import load_model_config


@dataclass(frozen=True)
class MethodDefaults:
    """The default learning rate of a method, its source, further `method_options`, and rates by pattern."""

    learning_rate: float
    source: str
    options: dict[str, Any] = field(default_factory=dict)
    patterns: dict[str, float] = field(default_factory=dict)


COMPARISON = "PEFT's comparison"
GUIDE = "PEFT's guide"
# Methods that are not listed have the rate from which PEFT's comparison starts all of them.
OTHERS = MethodDefaults(1e-4, COMPARISON)
# The other ranks, sizes and targets are those of the options with flat names (all linear layers: QLoRA, arXiv
# 2305.14314, figure 2; LoRA Without Regret), or PEFT's own.
METHOD_DEFAULTS = {
    # Weights of the model itself. Freeze trains matrices as full does.
    "full": MethodDefaults(2e-5, "Stanford Alpaca, 7B"),
    "freeze": MethodDefaults(2e-5, "that of method full", {"layers": 2}),  # layers: LLaMA-Factory's default
    "bitfit": MethodDefaults(1e-3, "BitFit's code, arXiv 2106.10199"),
    # For text no rate of this method is published: 1e-4 taught nothing in PEFT's comparison, and the example in PEFT's
    # repository takes 5e-2. This is the rate of the comparison for other vectors that scale activations (IA3, RoAd).
    "ln_tuning": MethodDefaults(1e-3, "as IA3 in PEFT's comparison"),
    # Low rank. LoRA's own rate is computed by `_lora_rate`.
    "adalora": MethodDefaults(5e-4, "AdaLoRA's code for text generation, arXiv 2303.10512"),
    "loha": MethodDefaults(1e-4, COMPARISON, {"r": 32, "alpha": 64}),
    "lokr": MethodDefaults(3e-3, COMPARISON, {"r": 32, "alpha": 64, "decompose_factor": 4}),
    "hira": MethodDefaults(4.5e-3, COMPARISON),
    "delora": MethodDefaults(1e-3, COMPARISON, {"r": 32}),
    "gralora": MethodDefaults(2e-4, COMPARISON),
    "osf": MethodDefaults(5e-5, COMPARISON),
    "tinylora": MethodDefaults(1e-3, COMPARISON),
    # Vectors and coefficients.
    "ia3": MethodDefaults(3e-3, "T-Few's code, arXiv 2205.05638"),
    "vera": MethodDefaults(1e-3, COMPARISON),
    "pvera": MethodDefaults(3e-3, COMPARISON),
    "vblora": MethodDefaults(1e-3, GUIDE, patterns={"vblora_logits": 1e-2}),
    "road": MethodDefaults(1e-3, GUIDE),
    "c3a": MethodDefaults(1e-1, GUIDE),
    # PEFT begins with random numbers, which change a small model beyond recognition (loss 5.3 -> 8.0 at width 96).
    "fourierft": MethodDefaults(6e-2, "PEFT's example, and FourierFT's code, arXiv 2405.03003", {"init_weights": True}),
    "shira": MethodDefaults(3e-4, COMPARISON),
    # PEFT's default of 256 numbers makes each of them a share of so many weights that no usual rate moves them.
    "unilora": MethodDefaults(2e-3, COMPARISON, {"theta_d_length": 131072}),
    # Virtual tokens. More than 20 of them gain little (Lester et al. 2021, arXiv 2104.08691, section 3.2), and
    # embeddings of real tokens are a better start than random numbers (the same section, and PEFT's comparison).
    "prompt": MethodDefaults(1e-3, COMPARISON, {"num_virtual_tokens": 20, "prompt_tuning_init": "SAMPLE_VOCAB"}),
    "p_tuning": MethodDefaults(1e-4, COMPARISON, {"num_virtual_tokens": 20}),
    "prefix": MethodDefaults(
        5e-5, "prefix-tuning's code, arXiv 2101.00190", {"num_virtual_tokens": 10, "encoder_hidden_size": 512}
    ),
    "p_tuning_v2": MethodDefaults(5e-3, "P-tuning v2's code, arXiv 2110.07602", {"num_virtual_tokens": 20}),
}

# The rule of Thinking Machines for LoRA in all linear layers with alpha 32, from runs with Llama and Qwen models
# ("LoRA Without Regret", 2025, and the formula in the documentation of Tinker): 5e-5 x 10 x (2000 / hidden size)^p,
# whatever the rank is, because the adapter is scaled by alpha / rank. The exponents by model_type:
RULE_EXPONENTS = {"llama": 0.781, **dict.fromkeys(["qwen2", "qwen2_moe", "qwen3", "qwen3_moe"], 0.0775)}
RULE_WIDTHS = range(2048, 8193)  # hidden sizes from Llama 3.2 1B to Llama 3.1 70B
RULE_ALPHA = 32
# QLoRA (arXiv 2305.14314): 2e-4 for 7B and 13B, 1e-4 for 33B (hidden size 6656) and 65B.
QLORA_RATE, QLORA_LARGE_RATE, QLORA_LARGE_WIDTH = 2e-4, 1e-4, 6656


# FourierFT's inverse transform divides by the number of weights of a matrix. So a rate moves the weights of a narrow
# model much more: at width 64 that of the paper doubles the loss. 768 is the least width of the paper (table 2).
FOURIER_WIDTH = 768
# PiSSA (arXiv 2404.02948) begins with the largest singular values, which a LoRA's rate would tear apart.
PISSA_RATE = 2e-5
# Options of a method that mean something together: if the user sets one, the others do not get our default.
TOGETHER = (
    ("r", "alpha"),
    ("prompt_tuning_init", "prompt_tuning_init_text"),
    ("layers", "modules", "parameters", "embeddings", "head", "norms"),
)
# Preferences take a part of the rate of fine-tuning, which is 2e-5 for full and 2e-4 for LoRA and QLoRA.
# A fortieth: DPO takes 5e-7 for full (Zephyr, arXiv 2310.16944, section 4.3) and 5e-6 for QLoRA (alignment-handbook, the
# recipe of Zephyr's authors); SimPO takes 3e-7 to 1e-6 for full (its authors' README), and LN-DPO 5e-7 (Tulu 3, arXiv
# 2411.15124).
# A quarter: ORPO, which fine-tunes at the same time (its authors' script for Mistral 7B, full: 5e-6).
# A half: reward models, whose head begins at random (Llama 2, arXiv 2307.09288, section 3.2.2, full: 1e-5).
PREFERENCE_DIVISOR, ORPO_DIVISOR, REWARD_DIVISOR = 40, 4, 2
# Random weights are trained faster than those of a model: LLaMA (arXiv 2302.13971, table 2) takes 3e-4 for 7B and 13B.
FRESH_RATE = 3e-4
# Below this hidden size a model is a toy, for which usual rates mean nothing.
LEAST_WIDTH = 1024
# Lester et al. 2021 (arXiv 2104.08691, figure 1): a prompt comes near to full fine-tuning at billions of parameters.
LEAST_FOR_PROMPTS = 10**9


def fill_method_options(options: Any) -> Any:
    """Return the options with our defaults in `method_options`, for those that the user did not set.

    With `adapter_name_or_path` the settings of that adapter are there already, and nothing is filled in.
    """
    ours = METHOD_DEFAULTS.get(options.method, OTHERS).options
    if options.adapter_name_or_path is not None or not ours:
        return options
    taken = {name for names in TOGETHER for name in names if not options.method_options.keys().isdisjoint(names)}
    ours = {name: value for name, value in ours.items() if name not in taken}
    return options.model_copy(update={"method_options": ours | options.method_options})


def fill_learning_rate(options: Any) -> Any:
    """Return the options with the learning rates of the method on the model, for those that the user did not set.

    Raises:
        ConfigError: the model's config, from which the rate follows, cannot be read.
    """
    if "learning_rate" in options.model_fields_set:
        return options
    values: dict[str, Any] = {"learning_rate_patterns": METHOD_DEFAULTS.get(options.method, OTHERS).patterns}
    # With overfit there is a default for all methods.
    if not (isinstance(options, SftOptions) and options.overfit):
        values["learning_rate"] = default_rate(options)[0]
    return options.with_defaults(values)


def default_rate(options: TrainOptions) -> tuple[float, str]:
    """Return the default learning rate of the method on the model, and where it comes from.

    Raises:
        ConfigError: the model's config, from which the rate follows, cannot be read.
    """
    rate, source = _fine_tuning_rate(options)
    divisor = _preference_divisor(options)
    if divisor == 1:
        return rate, source
    return float(f"{rate / divisor:.3g}"), f"1/{divisor} of {rate:g} for fine-tuning: {source}"


def _preference_divisor(options: TrainOptions) -> int:
    """Return by how much the rate of fine-tuning is divided for the losses of the options."""
    if isinstance(options, RewardOptions):
        return REWARD_DIVISOR
    if isinstance(options, DpoOptions) and {"orpo", "sft"}.issuperset(options.loss_type):
        return ORPO_DIVISOR
    return PREFERENCE_DIVISOR if isinstance(options, PreferenceOptions) else 1


def _fine_tuning_rate(options: TrainOptions) -> tuple[float, str]:
    if isinstance(options, PretrainOptions) and options.config_name and options.method == "full":
        return FRESH_RATE, "random weights: LLaMA, 7B"
    if options.method in ("lora", "qlora"):
        return _lora_rate(options, load_model_config(options))
    defaults = METHOD_DEFAULTS.get(options.method, OTHERS)
    if options.method == "fourierft":
        width = load_model_config(options).get_text_config().hidden_size
        if width < FOURIER_WIDTH:
            rate = defaults.learning_rate * (width / FOURIER_WIDTH) ** 2
            return float(f"{rate:.3g}"), f"{defaults.source}, x ({width} / {FOURIER_WIDTH})^2 for a narrow model"
    return defaults.learning_rate, defaults.source


def _lora_rate(options: TrainOptions, config: PreTrainedConfig) -> tuple[float, str]:
    text = config.get_text_config()
    if str(options.init_lora_weights).startswith("pissa"):
        return PISSA_RATE, "PiSSA, arXiv 2404.02948"
    exponent = RULE_EXPONENTS.get(text.model_type.removesuffix("_text"))
    scaled = options.lora_alpha == RULE_ALPHA and not options.use_rslora
    if exponent is None or not scaled or text.hidden_size not in RULE_WIDTHS or options.in_4_bits:
        rate = QLORA_RATE if text.hidden_size < QLORA_LARGE_WIDTH else QLORA_LARGE_RATE
        return rate, "QLoRA, arXiv 2305.14314"
    rate = 5e-5 * 10 * (2000 / text.hidden_size) ** exponent
    rule = f"5e-4 x (2000 / {text.hidden_size})^{exponent}"
    return float(f"{rate:.3g}"), f"LoRA Without Regret, for alpha {RULE_ALPHA} and any rank: {rule}"


def describe_rate(options: TrainOptions) -> str:
    """Say in one sentence which learning rate is in force, and where it comes from."""
    if "learning_rate" in options.model_fields_set:
        return f"{options.learning_rate:g}, as given"
    rate, source = default_rate(options)
    if rate != options.learning_rate:
        return f"{options.learning_rate:g}, the default with overfit"
    return f"{rate:g}, the default of method {options.method} ({source})"


def method_notes(options: TrainOptions, config: PreTrainedConfig) -> list[str]:
    """Return a sentence for each choice that is likely to disappoint, though it works."""
    notes = []
    method, text = options.method, config.get_text_config()
    if isinstance(options, PretrainOptions) and options.config_name and method != "full":
        notes.append(
            f"method {method}: what it does not train stays random; use method full to train from random weights."
        )
    elif isinstance(options, PretrainOptions) and method != "full":
        notes.append(
            f"method {method}: it learns little new knowledge, so it is not advised for pretraining; use method full."
        )
    elif "learning_rate" in options.model_fields_set and text.hidden_size >= LEAST_WIDTH and options.optim in ADAMW:
        usual, source = default_rate(options)
        assert options.learning_rate is not None, "OptimOptions fills it in"
        factor = options.learning_rate / usual
        if not 0.101 < factor < 9.9:
            side = "above" if factor > 1 else "below"
            notes.append(
                f"learning_rate: {options.learning_rate:g} is far {side} the usual rate of method {method}, {usual:g} "
                f"({source})."
            )
    if isinstance(options, DpoOptions):
        notes += [
            f"beta: {options.beta:g} is far below the usual {usual:g} of {name}, whose rewards are means over tokens."
            for name, usual in OTHER_BETAS.items()
            if name in options.loss_type and options.beta < usual / 9.9
        ]
    if method == "prompt" and _parameter_count(text) < LEAST_FOR_PROMPTS:
        notes.append(
            "method prompt: on a model of less than a billion parameters a prompt at the input learns much less than "
            "an adapter (Lester et al. 2021, figure 1); p_tuning_v2 or lora learns more."
        )
    return notes


def _parameter_count(text: PreTrainedConfig) -> int:
    """Return roughly how many parameters a plain transformer of these sizes has."""
    return 12 * text.num_hidden_layers * text.hidden_size**2 + text.vocab_size * text.hidden_size
