"""The memory that each recipe for a GPU is estimated to take: writes it into the recipes' comments and their README.

    python tests/proofs/memory.py

The estimate is the one that the scripts print, for the shapes of the published models. No network is needed.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from transformers import CONFIG_MAPPING, PreTrainedConfig

from accel_llm.config.command_line import parse_options
from accel_llm.config.options import SftOptions
from accel_llm.training.memory_estimate import MemoryEstimate, estimate_memory

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
SIZES = (8, 12, 24, 80)  # GB of one GPU
MARK = "# Estimated, not measured: "


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

    def config(self) -> PreTrainedConfig:
        """Return the config of the model's family with these sizes."""
        sizes: dict[str, Any] = {
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 8192,
            "pad_token_id": 0,
        }
        if self.head_dim * self.heads != self.hidden or self.kind == "qwen3":
            sizes["head_dim"] = self.head_dim
        if self.kind == "mistral":  # the class has another default
            sizes["sliding_window"] = None
        return CONFIG_MAPPING[self.kind](**sizes)


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


def recipe_options(path: Path, *words: str) -> SftOptions:
    """Return the options of a recipe, with further words of a command line."""
    return parse_options(SftOptions, ["--config", str(path), "--train_files", "chats.jsonl", *words])


@cache
def estimate(path: Path, *words: str) -> MemoryEstimate:
    """Return the estimate of a recipe on one GPU, with further words of a command line."""
    options = recipe_options(path, *words)
    return estimate_memory(options, SHAPES[str(options.model_name_or_path)].config(), 1, "cuda")


def sentence(path: Path) -> str:
    """Return the line with the estimate in the comment of a recipe."""
    return f"{MARK}{estimate(path).describe()}."


def recipes_for_a_gpu() -> list[Path]:
    return [
        path for path in sorted(RECIPES.glob("*gb.yaml")) if re.search(rf"_({'|'.join(map(str, SIZES))})gb", path.stem)
    ]


def main() -> None:
    table = (RECIPES / "README.md").read_text(encoding="utf-8")
    for path in recipes_for_a_gpu():
        lines = path.read_text(encoding="utf-8").splitlines()
        lines[1] = sentence(path)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(path.stem, lines[1])
        # In the table of the README: `| model method, 5.7 |` in the row of the family and the column of the size.
        family, size = path.stem.removesuffix("gb").rsplit("_", 1)
        row = next(line for line in table.splitlines() if line.startswith(f"| `{family}` |"))
        cells = row.split("|")
        column = 2 + SIZES.index(int(size))
        cells[column] = re.sub(r", [\d.]+", f", {lines[1].removeprefix(MARK).split()[0]}", cells[column])
        table = table.replace(row, "|".join(cells))
    (RECIPES / "README.md").write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
