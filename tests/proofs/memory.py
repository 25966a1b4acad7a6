"""Estimate the memory of a recipe on one GPU: arithmetic over shapes, without a measurement."""

from typing import NamedTuple

from accel_llm.config.options import TrainOptions
from accel_llm.model.logits import LOGIT_BYTES, chunk_count

GB = 2**30  # a "24 GB" GPU has 24 of these
CONTEXT = 1 * GB  # the CUDA context, workspaces of libraries, fragmentation
# 4 bits a weight, one absmax of 8 bits for 64 weights, one of 32 bits for 256 of those (QLoRA, arXiv 2305.14314)
NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)
STATES = {"adamw": 8, "adamw_8bit": 2}  # bytes a trained parameter


class Shape(NamedTuple):
    """The sizes in a published model's config.json, and the billions of parameters in its model card."""

    kind: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    billions: float

    @property
    def linear(self) -> list[tuple[int, int]]:
        """(in, out) of the linear layers of one transformer layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        if self.kind == "phi3":
            attention, mlp = [query + 2 * key], [2 * self.intermediate]
        else:
            attention, mlp = [query, key, key], [self.intermediate] * 2
        inner = [(self.hidden, width) for width in attention + mlp]
        return [*inner, (query, self.hidden), (self.intermediate, self.hidden)]

    @property
    def linear_parameters(self) -> int:
        return self.layers * sum(rows * columns for rows, columns in self.linear)

    @property
    def embedding_parameters(self) -> int:
        """The parameters of the embedding, and of the output head if it is not tied."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    def adapter_parameters(self, rank: int) -> int:
        """The parameters of a LoRA on every linear layer except the head."""
        return self.layers * sum(rank * (rows + columns) for rows, columns in self.linear)


SHAPES = {
    "Qwen/Qwen2.5-3B-Instruct": Shape("qwen2", 36, 2048, 11008, 16, 2, 128, 151936, True, 3.09),
    "Qwen/Qwen2.5-7B-Instruct": Shape("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, False, 7.62),
    "Qwen/Qwen2.5-14B-Instruct": Shape("qwen2", 48, 5120, 13824, 40, 8, 128, 152064, False, 14.77),
    "Qwen/Qwen2.5-72B-Instruct": Shape("qwen2", 80, 8192, 29568, 64, 8, 128, 152064, False, 72.71),
    "Qwen/Qwen3-4B": Shape("qwen3", 36, 2560, 9728, 32, 8, 128, 151936, True, 4.02),
    "Qwen/Qwen3-8B": Shape("qwen3", 36, 4096, 12288, 32, 8, 128, 151936, False, 8.19),
    "Qwen/Qwen3-14B": Shape("qwen3", 40, 5120, 17408, 40, 8, 128, 151936, False, 14.77),
    "Qwen/Qwen3-32B": Shape("qwen3", 64, 5120, 25600, 64, 8, 128, 151936, False, 32.76),
    "meta-llama/Llama-3.2-3B-Instruct": Shape("llama", 28, 3072, 8192, 24, 8, 128, 128256, True, 3.21),
    "meta-llama/Llama-3.1-8B-Instruct": Shape("llama", 32, 4096, 14336, 32, 8, 128, 128256, False, 8.03),
    "meta-llama/Llama-3.3-70B-Instruct": Shape("llama", 80, 8192, 28672, 64, 8, 128, 128256, False, 70.55),
    "google/gemma-2-2b-it": Shape("gemma2", 26, 2304, 9216, 8, 4, 256, 256000, True, 2.61),
    "google/gemma-2-9b-it": Shape("gemma2", 42, 3584, 14336, 16, 8, 256, 256000, True, 9.24),
    "google/gemma-2-27b-it": Shape("gemma2", 46, 4608, 36864, 32, 16, 128, 256000, True, 27.23),
    "mistralai/Mistral-7B-Instruct-v0.3": Shape("mistral", 32, 4096, 14336, 32, 8, 128, 32768, False, 7.25),
    "mistralai/Mistral-Small-24B-Instruct-2501": Shape("mistral", 40, 5120, 32768, 32, 8, 128, 131072, False, 23.57),
    "microsoft/Phi-3.5-mini-instruct": Shape("phi3", 32, 3072, 8192, 32, 32, 96, 32064, False, 3.82),
    "microsoft/Phi-4-mini-instruct": Shape("phi3", 32, 3072, 8192, 24, 8, 128, 200064, True, 3.84),
    "microsoft/phi-4": Shape("phi3", 40, 5120, 17920, 40, 10, 128, 100352, False, 14.66),
}


def parts(options: TrainOptions) -> dict[str, float]:
    """Return bytes at the peak of a step with gradient checkpointing and packed rows, in bf16 autocast. They add up.

    The activations in memory at one time are the input of every layer, and either one layer that is recomputed or one
    chunk of logits.
    """
    shape = SHAPES[str(options.model_name_or_path)]
    tokens = options.per_device_train_batch_size * options.max_length
    everything = shape.linear_parameters + shape.embedding_parameters
    states = STATES[options.optim]
    if options.method == "full":
        weights = 4 * everything  # float32 masters
        # float32 gradient, AdamW's moments, autocast's bf16 copy; in 8 bits the embedding's moments stay in 32
        trained = (4 + states + 2) * everything + (8 - states) * shape.vocab * shape.hidden
    else:
        per_weight = NF4 if options.method == "qlora" else 2
        weights = per_weight * shape.linear_parameters + 2 * shape.embedding_parameters
        trained = (4 + 4 + states + 2) * shape.adapter_parameters(options.lora_r)
    residual = 4 if options.method == "full" else 2  # a float32 embedding makes the whole residual stream float32
    return {
        "weights": weights,
        "trained": trained,
        "checkpoints": residual * tokens * shape.hidden * shape.layers,
        "peak": max(_layer(shape, options, tokens), _logits(shape, options, tokens)),
        "CUDA": CONTEXT,
    }


def _layer(shape: Shape, options: TrainOptions, tokens: int) -> float:
    """Return bytes of one layer in its backward pass.

    The factors are upper bounds. They were counted operation by operation for small models of these families with LoRA:
    float32 copies inside norms, a bf16 copy of each linear layer's input, the MLP's products and their gradients.
    """
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    total = tokens * (24 * shape.hidden + 8 * query + 6 * key + 18 * shape.intermediate)
    if options.method == "qlora":  # on 4-bit layers PEFT makes no float32 copy of an adapter's input
        total -= tokens * (4 * shape.hidden + 6 * shape.intermediate)
    if shape.kind == "gemma2":  # no fused kernel has its soft-cap, so the scores of the longest document are in memory
        total += 16 * shape.heads * options.max_length**2
    largest = max(rows * columns for rows, columns in shape.linear)
    if options.method == "qlora":
        total += 2 * largest  # the weight as it is unpacked for its product
    if options.method == "full":
        total += (2 + 4) * largest + (4 * shape.vocab * shape.hidden if shape.tied else 0)  # gradients not yet added up
    return total


def _logits(shape: Shape, options: TrainOptions, tokens: int) -> float:
    """Return bytes of one chunk of logits and its gradient, and of the last hidden states; a soft-cap keeps 2 more."""
    chunks = max(1, chunk_count(tokens, shape.hidden, shape.vocab))
    total = tokens * shape.vocab / chunks * (LOGIT_BYTES + (2 if shape.kind == "gemma2" else 0))
    total += 8 * tokens * shape.hidden
    if options.method == "full":
        total += (
            (4 + 2 + 4) * shape.vocab * shape.hidden
        )  # the head's gradient: summed, of this chunk in bf16 and float32
    return total


def estimate(options: TrainOptions) -> float:
    """Return the whole estimate in GB."""
    return sum(parts(options).values()) / GB


def sentence(options: TrainOptions) -> str:
    """Return the estimate as the comments of the recipes show it."""
    terms = " + ".join(f"{size / GB:.1f} {name}" for name, size in parts(options).items())
    return f"{terms} = {estimate(options):.1f} GB."
