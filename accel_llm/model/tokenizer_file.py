"""Keeps a tokenizer to its tokenizer.json, which the tokenizer classes of transformers 5 replace in part.

In transformers 5.24 LlamaTokenizer, GPT2Tokenizer and others build normalizer and pre-tokenizer anew, whatever
tokenizer.json says. Then OLMo 2 cuts numbers in other places, and Llama 2 and Phi-3 write other tokens behind each
special token than those that the models were trained on (transformers 45488, 45920).
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from accel_llm.system.disk import write_atomically

CONFIG_FILE = "tokenizer_config.json"
TABLES = ("vocab", "merges")  # parts of the model that no class replaces


def load_as_published(name: str, **arguments: Any) -> PreTrainedTokenizerFast:
    """Load a tokenizer that turns text into the ids that its tokenizer.json stands for.

    `arguments` go to `from_pretrained`. The special tokens are those of the class that transformers chooses. Without a
    tokenizer.json this class decides everything, and so does code that comes with the model.
    """
    tokenizer = AutoTokenizer.from_pretrained(name, **arguments)
    revision = arguments.get("revision")
    path = cached_file(name, "tokenizer.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    if path is None or not tokenizer.is_fast or not type(tokenizer).__module__.startswith("transformers."):
        return tokenizer
    if _pipeline(tokenizer.backend_tokenizer) == _pipeline(Tokenizer.from_file(path)):
        return tokenizer
    # The general class takes the file as it is, but has no special tokens beside those in tokenizer_config.json.
    special: dict[str, Any] = {
        key: token for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
    }
    return PreTrainedTokenizerFast.from_pretrained(
        name, **arguments, **special, model_input_names=tokenizer.model_input_names
    )


def _pipeline(backend: Tokenizer) -> dict[str, Any]:
    """Return the steps from text to tokens. A setting that is empty or missing means the same."""
    steps = json.loads(backend.to_str())
    model = {key: value for key, value in steps["model"].items() if key not in TABLES and value not in ("", None)}
    return {"normalizer": steps["normalizer"], "pre_tokenizer": steps["pre_tokenizer"], "model": model}


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the files of a tokenizer so that transformers 4 and the programs that build on it can read them as well.

    transformers 5.24 writes the name of a class and the form of a list that transformers 4 does not know.
    """
    tokenizer.save_pretrained(str(folder))
    file = folder / CONFIG_FILE
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    write_atomically(file, json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
