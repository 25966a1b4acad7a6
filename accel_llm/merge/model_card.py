"""Writes the files beside the weights of a merged model: tokenizer and template, configs, code, and the model card."""

import shutil
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel

from accel_llm.errors import ConfigError
from accel_llm.model.config_file import save_config
from accel_llm.model.fingerprint import model_fingerprint
from accel_llm.model.generation import saveable_generation_config
from accel_llm.model.loading import LOADING_ERRORS, short_reason
from accel_llm.report.card import base_license, card_header, is_published, short_path, versions_sentence
from accel_llm.system.disk import sha256

# Files of tokenizers and processors, copied unchanged.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "*processor_config.json",
)


def copy_tokenizer(adapter: Path, base: Path, target: Path) -> str:
    """Copy the tokenizer from the adapter's folder, or else from the base's. Returns a sentence that says which."""
    for role, folder in (("adapter", adapter), ("base", base)):
        # A vocabulary or a template alone does not make a tokenizer.
        if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
            for file in sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)}):
                if file.is_dir():
                    shutil.copytree(file, target / file.name)
                else:
                    shutil.copyfile(file, target / file.name)
            return f"tokenizer: of the {role} ({folder})"
    return "tokenizer: neither the adapter's folder nor the base's has one"


def write_config_files(model: PreTrainedModel, adapter: Path, base: Path, target: Path, code: bool) -> None:
    """Write config.json and, for a model that generates text, generation_config.json.

    `code` also copies the base's Python files.

    Raises:
        ConfigError: a generation_config.json cannot be read.
    """
    # The config was updated for the merged model; it is not copied.
    save_config(model.config, target)
    if model.can_generate():
        own = next((folder for folder in (adapter, base) if (folder / "generation_config.json").is_file()), None)
        # The adapter's own config knows which tokens end an answer.
        try:
            settings = GenerationConfig.from_pretrained(str(own)) if own else model.generation_config
        except LOADING_ERRORS as error:
            raise ConfigError(f"generation_config: the file in {own} cannot be read ({short_reason(error)}).") from None
        saveable_generation_config(settings).save_pretrained(str(target))
    if code:
        for file in sorted(base.glob("*.py")):
            shutil.copyfile(file, target / file.name)


def write_card(
    target: Path, base: str, source: Path, adapters: list[Path], action: str, facts: list[str], hashes: dict[str, str]
) -> None:
    """Write the model card, README.md: base and adapters with hashes, facts about the merge, versions of libraries.

    `base` is the base's name as the user gave it, `source` its folder. `action` completes the sentence "base with 2
    adapters ...".
    """
    # A folder is private; only a hub id is published.
    base_name = base if is_published(base) else Path(base).expanduser().resolve().name
    lines = card_header("transformers", base, "finetune", ["merge"], **base_license(base))
    lines += [f"# {target.name.removeprefix('.').removesuffix('.partial')}", ""]

    # The sentence, the table of hashes, and the facts.
    lines += [
        f"`{base_name}` with {len(adapters)} adapter{'s' * (len(adapters) > 1)} {action}.",
        "",
        "| | SHA-256 |",
        "|-|-|",
        f"| base `{base_name}`, fingerprint | {model_fingerprint(str(source))} |",
    ]
    # Hashes of what went in, then of what came out.
    for adapter in adapters:
        weights = sorted(adapter.glob("adapter_model.*"))
        lines += [f"| adapter `{short_path(adapter)}`, {file.name} | {sha256(file)} |" for file in weights]
    lines += [f"| {name} | {digest} |" for name, digest in hashes.items()]
    lines += ["", *(f"- {fact}" for fact in facts), ""]
    lines += [versions_sentence(), ""]
    (target / "README.md").write_text("\n".join(lines), encoding="utf-8")
