"""What stands in a model folder beside the weights: tokenizer and template, generation config, code, and the model card."""

import platform
import shutil
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import HfApi
from transformers import GenerationConfig, PreTrainedModel

from accel_llm.errors import ConfigError
from accel_llm.model.fingerprint import model_fingerprint
from accel_llm.model.generation import saveable_generation_config
from accel_llm.model.loading import LOADING_ERRORS, short_reason
from accel_llm.system.disk import sha256

# Files of tokenizers and processors as transformers names them; they are copied as they are.
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
CARD_PACKAGES = ("torch", "transformers", "peft", "safetensors")


def copy_tokenizer(adapter: Path, base: Path, target: Path) -> str:
    """Copy the tokenizer of the adapter's folder, or else of the base's, and say which in a sentence."""
    for what, folder in (("adapter", adapter), ("base", base)):
        # A vocabulary alone, or a template, is no tokenizer.
        if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
            for file in sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)}):
                if file.is_dir():
                    shutil.copytree(file, target / file.name)
                else:
                    shutil.copyfile(file, target / file.name)
            return f"tokenizer: of the {what} ({folder})"
    return "tokenizer: there is none, in the adapter's folder or the base's"


def write_config_files(model: PreTrainedModel, adapter: Path, base: Path, target: Path, code: bool) -> None:
    """Write config.json and, for a model that generates, generation_config.json; with `code` the base's Python files."""
    model.config.save_pretrained(str(target))
    if model.can_generate():
        own = next((folder for folder in (adapter, base) if (folder / "generation_config.json").is_file()), None)
        try:
            settings = GenerationConfig.from_pretrained(str(own)) if own else model.generation_config
        except LOADING_ERRORS as error:
            raise ConfigError(
                f"generation_config: {own} holds one that cannot be read ({short_reason(error)})."
            ) from None
        saveable_generation_config(settings).save_pretrained(str(target))
    for file in sorted(base.glob("*.py")) if code else []:
        shutil.copyfile(file, target / file.name)


def write_card(
    target: Path, base: str, source: Path, adapters: list[Path], done: str, facts: list[str], hashes: dict[str, str]
) -> None:
    """Write README.md: base, adapters and their hashes, what was done, the hashes of the weights written, versions.

    `base` is what the person called the base, `source` its folder; `done` says what was done with the
    adapters.
    """
    hub = base if not Path(base).expanduser().exists() else None
    lines = ["---", "library_name: transformers"]
    lines += [f"base_model: {hub}", "base_model_relation: finetune"] if hub else []
    lines += ["tags:", "- merge", "---", "", f"# {target.name.removeprefix('.').removesuffix('.partial')}", ""]
    lines += [
        f"`{hub or _short(Path(base))}` with {len(adapters)} adapter{'s' * (len(adapters) > 1)} {done}.",
        "",
        "| | SHA-256 |",
        "|-|-|",
        f"| base `{hub or _short(Path(base))}`, fingerprint | {model_fingerprint(str(source))} |",
    ]
    for adapter in adapters:
        weights = sorted(adapter.glob("adapter_model.*"))
        lines += [f"| adapter `{_short(adapter)}`, {file.name} | {sha256(file)} |" for file in weights]
    lines += [f"| {name} | {digest} |" for name, digest in hashes.items()]
    lines += ["", *(f"- {fact}" for fact in facts), ""]
    versions = [f"{name} {version(name)}" for name in CARD_PACKAGES]
    lines += [f"Written with Python {platform.python_version()}, {', '.join(versions)}.", ""]
    (target / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _short(folder: Path) -> str:
    """The end of a path: a card goes out to others, whom the rest is no business of."""
    return "/".join(folder.resolve().parts[-2:])


def push_folder(folder: Path, name: str) -> str:
    """Upload a model folder to the hub as `name`, a private repository if it is new; its address.

    Raises:
        ConfigError: the hub cannot be reached, or does not let us in.
    """
    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=folder))
    except (OSError, ValueError) as error:
        raise ConfigError(f"push_to_hub: {folder} is written, but {name} was not ({short_reason(error)}).") from None
