"""One adapter of each method of the installed PEFT, for tests of merging and of chat: tiny, for a Llama."""

from collections.abc import Callable
from typing import Any

import peft
import torch
from peft import LoraConfig

CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
TWO = ["q_proj", "down_proj"]


def randomize(model: torch.nn.Module) -> None:
    """Random weights that no initialization gives, so that B is not zero and nothing is as it began."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**(CAUSAL | {"r": 4, "target_modules": "all-linear"} | settings))


METHODS: dict[str, Callable[[], Any]] = {
    "lora": lora,
    "rank": lambda: lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 9}),
    "dora": lambda: lora(use_dora=True),
    "bias": lambda: lora(bias="all"),
    "lora_bias": lambda: lora(target_modules=["q_proj"], lora_bias=True),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "embedding": lambda: lora(target_modules=["q_proj", "embed_tokens"]),
    "saved": lambda: lora(modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": lambda: lora(trainable_token_indices={"embed_tokens": [3, 7], "lm_head": [3]}),
    "adalora": lambda: peft.AdaLoraConfig(**CAUSAL, target_modules=TWO, total_step=10),
    "loha": lambda: peft.LoHaConfig(**CAUSAL, r=4, target_modules=TWO),
    "lokr": lambda: peft.LoKrConfig(**CAUSAL, r=4, target_modules=TWO),
    "oft": lambda: peft.OFTConfig(**CAUSAL, oft_block_size=4, target_modules=TWO),
    "boft": lambda: peft.BOFTConfig(**CAUSAL, boft_block_size=4, target_modules=TWO),
    "hra": lambda: peft.HRAConfig(**CAUSAL, r=4, target_modules=TWO),
    "vera": lambda: peft.VeraConfig(**CAUSAL, r=4, target_modules=["q_proj", "o_proj"]),
    "vera_drawn": lambda: peft.VeraConfig(**CAUSAL, r=4, target_modules=["q_proj", "o_proj"], save_projection=False),
    "ia3": lambda: peft.IA3Config(**CAUSAL, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ln": lambda: peft.LNTuningConfig(**CAUSAL, target_modules=["input_layernorm"]),
    "trainable": lambda: peft.TrainableTokensConfig(**CAUSAL, target_modules=["embed_tokens"], token_indices=[3, 5]),
    "fourier": lambda: peft.FourierFTConfig(**CAUSAL, n_frequency=50, target_modules=TWO),
    "vblora": lambda: peft.VBLoRAConfig(**CAUSAL, r=4, num_vectors=8, vector_length=16, topk=2, target_modules=TWO),
    "randlora": lambda: peft.RandLoraConfig(**CAUSAL, r=4, target_modules=["q_proj"]),
    "miss": lambda: peft.MissConfig(**CAUSAL, r=4, target_modules=TWO),
    "shira": lambda: peft.ShiraConfig(**CAUSAL, r=4, target_modules=TWO),
    "c3a": lambda: peft.C3AConfig(**CAUSAL, block_size=4, target_modules=TWO),
    "road": lambda: peft.RoadConfig(**CAUSAL, group_size=32, target_modules=TWO),
    "delora": lambda: peft.DeloraConfig(**CAUSAL, r=4, target_modules=TWO),
    "osf": lambda: peft.OSFConfig(**CAUSAL, target_modules=TWO),
    "gralora": lambda: peft.GraloraConfig(**CAUSAL, r=4, target_modules=TWO),
    "waveft": lambda: peft.WaveFTConfig(**CAUSAL, n_frequency=50, target_modules=TWO),
    "hira": lambda: peft.HiraConfig(**CAUSAL, r=4, target_modules=TWO),
    "psoft": lambda: peft.PsoftConfig(**CAUSAL, r=4, target_modules=TWO),
    "deft": lambda: peft.DeftConfig(**CAUSAL, target_modules=TWO),
    "adamss": lambda: peft.AdamssConfig(**CAUSAL, target_modules=["q_proj"]),
    "beft": lambda: peft.BeftConfig(**CAUSAL),
    "frod": lambda: peft.FrodConfig(**CAUSAL, target_modules=["q_proj"], progressbar=False),
    "glora": lambda: peft.GloraConfig(**CAUSAL, r=4, target_modules=TWO),
    "peanut": lambda: peft.PeanutConfig(**CAUSAL, r=4, target_modules=TWO),
    "pvera": lambda: peft.PveraConfig(**CAUSAL, r=4, target_modules=["q_proj", "o_proj"]),
    "supertuning": lambda: peft.SupertuningConfig(**CAUSAL),
    "tinylora": lambda: peft.TinyLoraConfig(**CAUSAL, target_modules=TWO),
    "unilora": lambda: peft.UniLoraConfig(**CAUSAL, target_modules=TWO),
}
# Those that add to weights, multiply, rotate, or replace them, and those whose base changes first.
FAMILY_OF_EACH = [
    "lora",
    "dora",
    "pissa",
    "bias",
    "saved",
    "tokens",
    "loha",
    "oft",
    "vera",
    "ia3",
    "ln",
    "beft",
    "shira",
]
PROMPTS: dict[str, Callable[[], Any]] = {
    "prompt": lambda: peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=4),
    "p_tuning": lambda: peft.PromptEncoderConfig(**CAUSAL, num_virtual_tokens=4, encoder_hidden_size=8),
    "lstm": lambda: peft.PromptEncoderConfig(
        **CAUSAL, num_virtual_tokens=4, encoder_hidden_size=8, encoder_reparameterization_type="LSTM"
    ),
    "prefix": lambda: peft.PrefixTuningConfig(
        **CAUSAL, num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8
    ),
    "p_tuning_v2": lambda: peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=4),
}
# How the methods that are not mergeable are made, and what is said of each.
UNMERGEABLE = {
    "lily": (
        lambda: peft.LilyConfig(**CAUSAL, r=4, target_modules=["q_proj"]),
        "a LILY adapter is more than weights: PEFT mixes its matrices by the average",
    ),
    "poly": (
        lambda: peft.PolyConfig(**CAUSAL, r=4, target_modules=["q_proj"]),
        "a POLY adapter is more than weights: each row must name its task",
    ),
    "shadow": (
        lambda: peft.ShadowConfig(**CAUSAL),
        "a SHADOW adapter is more than weights: it trains a second network beside the model",
    ),
    "adaption_prompt": (
        lambda: peft.AdaptionPromptConfig(**CAUSAL, adapter_len=4, adapter_layers=1),
        "a ADAPTION_PROMPT adapter has no weights to add",
    ),
    "prompt": (PROMPTS["prompt"], "a PROMPT_TUNING adapter has no weights to add"),
    "p_tuning": (PROMPTS["p_tuning"], "a P_TUNING adapter has no weights to add"),
    "prefix": (PROMPTS["prefix"], "a PREFIX_TUNING adapter has no weights to add"),
    "multitask_prompt_tuning": (
        lambda: peft.MultitaskPromptTuningConfig(**CAUSAL, num_virtual_tokens=4, num_tasks=2),
        "a MULTITASK_PROMPT_TUNING adapter has no weights to add",
    ),
    "cartridge": (
        lambda: peft.CartridgeConfig(**CAUSAL, num_virtual_tokens=4),
        "a CARTRIDGE adapter has no weights to add",
    ),
    "cpt": (
        lambda: peft.CPTConfig(**CAUSAL, cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]),
        "a CPT adapter has no weights to add",
    ),
    "pvera sampled": (
        lambda: peft.PveraConfig(**CAUSAL, r=4, target_modules=["q_proj"], sample_at_inference=True),
        "it draws random numbers whenever it is used",
    ),
    "alora": (lambda: lora(alora_invocation_tokens=[5]), "an activated LoRA"),
    "replicated": (lambda: lora(layer_replication=[[0, 2], [1, 2]]), "layer_replication makes another model"),
}
