"""The options that say what is trained, and which of them are for which methods."""

from typing import Literal

from pydantic import Field

from accel_llm.config.fields import MethodName, Options, Place, TargetModules, Texts, Variables

# Options that only some methods use. If one is set for another method, that is an error.
# Which options a method of PEFT takes besides, its own config class says (adapters/methods.py).
METHODS_BY_OPTION = {
    **dict.fromkeys(["lora_r", "init_lora_weights", "use_dora", "use_rslora", "loraplus_lr_ratio"], ("lora", "qlora")),
    **dict.fromkeys(["lora_alpha", "lora_dropout", "lora_bias"], ("lora", "qlora", "adalora")),
    "prompt_ensemble": ("prompt",),
}
# Methods that train weights of the model itself: all of them, or a part. The others train an adapter beside it.
METHODS_WITHOUT_ADAPTER = ("full", "freeze", "bitfit")
# Methods that train virtual tokens; the file of such an adapter has no place for other weights.
PROMPT_METHODS = ("prefix", "p_tuning_v2", "prompt", "p_tuning")
ADAPTER_OPTIONS = (
    "adapter_name_or_path",
    "lora_target_modules",
    "load_in_4bit",
    "load_in_8bit",
    "modules_to_save",
    "offload_embeddings",
)
# Options whose values are chosen for one method.
CHOSEN_FOR_METHOD = ("learning_rate", "learning_rate_patterns", "lora_target_modules", "method_options")
# Options that an adapter which is trained further has settings for.
SET_BY_ADAPTER = (
    "method",
    "method_options",
    "lora_r",
    "lora_alpha",
    "lora_bias",
    "lora_target_modules",
    "modules_to_save",
    "init_lora_weights",
    "prompt_ensemble",
    "use_dora",
    "use_rslora",
)
# Ways to choose the first values of a LoRA, by PEFT's names; pissa_niter_4 is PiSSA by a random decomposition.
InitMethod = Literal[
    "gaussian", "orthogonal", "olora", "pissa", "pissa_niter_4", "pissa_niter_16", "eva", "corda", "lora_ga", "loftq"
]


class MethodOptions(Options):
    """Method"""

    method: MethodName = Field(
        "lora", description="What is trained: full, lora, qlora, ...; launch/show_methods.py lists all methods"
    )
    method_options: Variables = Field(
        default_factory=dict, description="Further options of the method by PEFT's names, as name=value"
    )
    load_in_4bit: bool = Field(False, description="Load the base of an adapter in 4 bits (NF4); qlora is lora with it")
    load_in_8bit: bool = Field(False, description="Load the base of an adapter in 8 bits")
    adapter_name_or_path: Place | None = Field(
        None, description="Adapter to train further, with its own settings and a new optimizer"
    )
    lora_r: int = Field(16, ge=1, description="Rank of the adapter")
    lora_alpha: float = Field(32, gt=0, description="Alpha of the adapter, which is scaled by alpha / r")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of the adapter")
    lora_bias: Literal["none", "all", "lora_only"] = Field("none", description="Which biases are trained too")
    lora_target_modules: TargetModules = Field(
        "all-linear", description="Modules that get an adapter: all-linear, names, or a pattern for the whole name"
    )
    modules_to_save: Texts = Field(
        default_factory=list, description="Names of modules that are trained and saved whole"
    )
    init_lora_weights: bool | InitMethod = Field(
        True, description="First values of the adapter (A and B); true: A Kaiming uniform, B zero; false: both random"
    )
    prompt_ensemble: int = Field(
        1, ge=1, description="Number of prompts to train at once, each on its share of the rows; they answer together"
    )
    use_dora: bool = Field(False, description="DoRA: train the magnitude and the direction of the weights separately")
    use_rslora: bool = Field(False, description="rsLoRA: scale the adapter by alpha / sqrt(r)")

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained; else weights of the model itself are."""
        return self.method not in METHODS_WITHOUT_ADAPTER

    @property
    def in_4_bits(self) -> bool:
        """Whether the base of the adapter is held in 4 bits."""
        return self.method == "qlora" or self.load_in_4bit

    @property
    def adapter_may_draw(self) -> bool:
        """Whether the adapter may draw random numbers in training; of a plain LoRA it is known that it does not."""
        plain = self.method in ("lora", "qlora") and not (self.lora_dropout or self.method_options)
        return self.has_adapter and not plain

    def problems(self) -> list[str]:
        problems = super().problems() + self._without_effect(METHODS_BY_OPTION, "method")
        if not self.has_adapter:
            problems += [
                f"{name}: method {self.method} trains no adapter; remove it."
                for name in ADAPTER_OPTIONS
                if name in self.model_fields_set and getattr(self, name)
            ]
        if self.in_4_bits and self.load_in_8bit:
            other = "method qlora" if self.method == "qlora" else "load_in_4bit"
            problems.append(f"load_in_8bit: {other} already holds the base in 4 bits; give one of them.")
        if self.method == "qlora" and "load_in_4bit" in self.model_fields_set and not self.load_in_4bit:
            problems.append("load_in_4bit: false contradicts method qlora, which is lora in 4 bits; give method lora.")
        if self.init_lora_weights == "orthogonal" and self.lora_r % 2:
            problems.append(f"lora_r: {self.lora_r} is odd; init_lora_weights orthogonal needs an even rank.")
        return problems


DEFAULT_METHOD = MethodOptions.model_fields["method"].default


def options_for_another_method(own: str, other: str) -> list[str]:
    """Return the names of those options of a run with method `own` that would not mean the same with method `other`."""
    if own == other or {own, other} <= {"lora", "qlora"}:
        return []
    own_alone = [n for n, methods in METHODS_BY_OPTION.items() if own in methods and other not in methods]
    if other in METHODS_WITHOUT_ADAPTER:
        # Only a run that names an adapter to go on with must not go on without it: that stays, and is an error.
        own_alone += [name for name in ADAPTER_OPTIONS if name != "adapter_name_or_path"]
    else:
        own_alone += ["master_weights", *(["modules_to_save"] if other in PROMPT_METHODS else [])]
    return sorted({*CHOSEN_FOR_METHOD, *own_alone})
