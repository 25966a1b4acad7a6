"""Options of the model that exclude each other, or that a launch YAML's strategy cannot do."""

from accel_llm.backend.strategy import resolve_precision, strategy
from accel_llm.config.options import TrainOptions


def model_option_problems(options: TrainOptions) -> list[str]:
    """Return the problems of model options that exclude each other or do not work under the launch YAML's strategy."""
    problems = []
    if options.load_in_8bit and strategy() in ("zero3", "fsdp2"):
        problems.append(
            f"load_in_8bit: {strategy()} cannot shard 8-bit weights, of which bitsandbytes keeps whole copies; use "
            "ddp.yaml, zero1.yaml or zero2.yaml, or load_in_4bit."
        )
    if options.lora_bias != "none" and (options.in_4_bits or options.load_in_8bit):
        base = "load_in_8bit" if options.load_in_8bit else "load_in_4bit"
        base = "method qlora" if options.method == "qlora" else base
        problems.append(
            f"lora_bias: {options.lora_bias} does not train with {base}, because bitsandbytes rounds the biases of its "
            "layers at every use; give none, or hold the weights in 16 bits."
        )
    if options.offload_embeddings and strategy() in ("zero3", "fsdp2"):
        problems.append(
            f"offload_embeddings: {strategy()} shards the embedding over all processes instead; set it to false, or use "
            "single_gpu.yaml, ddp.yaml or zero2.yaml."
        )
    if options.use_dora and options.in_4_bits and strategy() == "zero3":
        problems.append(
            "use_dora: PEFT reads whole 4-bit weights for it in each step, which ZeRO-3 has sharded; use fsdp2.yaml or "
            "zero2.yaml, or use_dora: false."
        )
    if options.master_weights == "stochastic_rounding":
        if strategy().startswith("zero"):
            problems.append("master_weights: DeepSpeed always keeps float32 copies; use ddp.yaml or fsdp2.yaml.")
        if resolve_precision(options) != "bf16":
            problems.append(
                "master_weights: stochastic_rounding is for weights in bf16, but precision is "
                f"{resolve_precision(options)}; set precision: bf16, or master_weights: float32."
            )
    attention = options.attn_implementation
    if options.packing and attention not in ("auto", "sdpa") and not attention.startswith("flash_attention"):
        problems.append(
            f"attn_implementation: {attention} does not keep packed documents apart; give auto or flash_attention_2, "
            "or set packing: false."
        )
    return problems
