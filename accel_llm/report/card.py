"""README.md of an export: the card that the model hub shows, without paths and secrets of this machine."""

import json
import math
import platform
import shlex
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import yaml
from huggingface_hub import metadata_load, try_to_load_from_cache
from transformers import AutoConfig

from accel_llm.adapters.saved import read_base_fingerprint
from accel_llm.model.classifier import REWARD_LABEL
from accel_llm.report.page import read_metrics
from accel_llm.report.shared_settings import shared_settings
from accel_llm.system.disk import write_atomically
from accel_llm.system.hub import is_hub_id
from accel_llm.system.secrecy import hide_secrets

# Their versions are written into a card.
CARD_PACKAGES = ("torch", "transformers", "peft", "safetensors")
MAX_LABELS = 20
LICENSE_KEYS = ("license", "license_name", "license_link")  # of the header of a card
# Of an evaluation: the loss has a line of its own, and those of single sources have the names of files.
NOT_IN_CARD = ("loss", "perplexity")
ADAPTER_EXAMPLE = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained({name})
tokenizer = AutoTokenizer.from_pretrained({name})"""
MODEL_EXAMPLE = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({name}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({name})"""

ADAPTER_SCORE_EXAMPLE = """from peft import AutoPeftModelForSequenceClassification
from transformers import AutoConfig, AutoTokenizer

config = AutoConfig.from_pretrained({name})
names = ("num_labels", "id2label", "label2id", "problem_type", "pad_token_id")
settings = {{name: getattr(config, name) for name in names}}
model = AutoPeftModelForSequenceClassification.from_pretrained({name}, **settings)
tokenizer = AutoTokenizer.from_pretrained({name})"""
MODEL_SCORE_EXAMPLE = """from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained({name}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({name})"""


def exports_scores(folder: Path) -> bool:
    """Return whether an export, adapter/ or model/, gives scores, and not tokens."""
    adapter, model = folder / "adapter_config.json", folder / "config.json"
    if adapter.is_file():
        return json.loads(adapter.read_text(encoding="utf-8")).get("task_type") == "SEQ_CLS"
    names = json.loads(model.read_text(encoding="utf-8")).get("architectures") if model.is_file() else None
    return bool(names) and names[0].endswith("ForSequenceClassification")


def classifies(folder: Path) -> bool:
    """Return whether an export gives scores that have names, or a number: those of launch/classify.py, and no rewards."""
    if not exports_scores(folder) or not (file := folder / "config.json").is_file():
        return False
    return list(json.loads(file.read_text(encoding="utf-8")).get("id2label", {}).values()) != [REWARD_LABEL]


def _label_names(folder: Path) -> list[str]:
    """Return the names of the classes that an export tells, at most MAX_LABELS of them; none if it gives no classes."""
    if not classifies(folder):
        return []
    config: Any = AutoConfig.from_pretrained(str(folder))
    names = list(map(str, config.id2label.values()))
    return [*names[:MAX_LABELS], f"and {len(names) - MAX_LABELS:,} more"] if len(names) > MAX_LABELS else names


def card_header(library: str, base: str | None, relation: str, tags: list[str], **more: Any) -> list[str]:
    """Return the lines of the YAML header that the hub reads; `base` is the base's name as the user gave it.

    A folder is private, and the hub refuses a card that names one: only a hub id is published as base_model.
    """
    header: dict[str, Any] = {"library_name": library}
    if base and is_published(base):
        header |= {"base_model": base, "base_model_relation": relation}
    header |= {"tags": tags} | {name: value for name, value in more.items() if value}
    return ["---", *yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000).splitlines(), "---", ""]


def is_published(name: str) -> bool:
    """Return whether `name` is a hub id, and not something on this machine."""
    return is_hub_id(name) and not Path(name).expanduser().exists()


def short_path(folder: Path) -> str:
    """Return the last two parts of a path. A card is published, and the rest of the path is private."""
    return "/".join(folder.resolve().parts[-2:])


def versions_sentence() -> str:
    """Say with which versions an export was written."""
    versions = [f"{name} {version(name)}" for name in CARD_PACKAGES]
    return f"Written with Python {platform.python_version()}, {', '.join(versions)}."


def write_run_card(folder: Path) -> None:
    """Write README.md of the export `folder`, adapter/ or model/, from its run's run.json and metrics.jsonl.

    Raises:
        OSError: a file cannot be read or written.
    """
    run = json.loads((folder.parent / "run.json").read_text(encoding="utf-8"))
    options, adapter = run["options"], folder / "adapter_config.json"
    settings = json.loads(adapter.read_text(encoding="utf-8")) if adapter.is_file() else {}
    base, sources = options.get("model_name_or_path"), [_source_path(source) for source in options["train_files"]]
    published = [source for source in sources if is_published(source)]
    name, scores = short_path(folder), exports_scores(folder)

    lines = card_header(
        "peft" if settings else "transformers",
        base,
        "adapter" if settings else "finetune",
        ["accel-llm", *([settings.get("peft_type", "LORA").lower()] if settings else [])],
        pipeline_tag="text-classification" if scores else "text-generation",
        datasets=published,
        **base_license(base, options.get("revision", "main")),
    )
    facts = {"base": _describe_base(options, folder), "method": _describe_method(options, settings)}
    facts |= {"labels": ", ".join(_label_names(folder))}
    facts |= {"data": ", ".join(_describe_source(source, run) for source in sources)}
    facts |= _describe_training(run, options, read_metrics(folder.parent / "metrics.jsonl"))
    lines += [f"# {name}", "", "| | |", "|-|-|"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in facts.items() if value]
    examples = (MODEL_SCORE_EXAMPLE, ADAPTER_SCORE_EXAMPLE) if scores else (MODEL_EXAMPLE, ADAPTER_EXAMPLE)
    example = examples[bool(settings)].format(name=json.dumps(name, ensure_ascii=False))
    word = shlex.quote(name)
    lines += ["", "```python", example, "```", ""]
    shell = [] if scores else [f"python launch/chat.py --model {word}"]
    if classifies(folder):
        shell = [f"python launch/predict.py --model {word} --input_files FILE --output_file predictions.jsonl"]
    shell += [f"python launch/merge.py --adapter {word} --output_dir merged"] if settings else []
    lines += ["```sh", *shell, "```", ""] if shell else []
    lines += _describe_settings(options)
    lines += [versions_sentence(), ""]
    write_atomically(folder / "README.md", hide_secrets("\n".join(lines)))


def base_license(base: str | None, revision: str = "main") -> dict[str, str]:
    """Return the licence of a base model as its card says it: license, and the name and link of one that has its own.

    The card is read from the base's folder, or from the cache of the hub; nothing is asked for. Empty if it is not
    there, or says nothing.
    """
    file = Path(base or "").expanduser() / "README.md" if base and not is_published(base) else None
    if base and file is None:
        cached = try_to_load_from_cache(base, "README.md", revision=revision)
        file = Path(cached) if isinstance(cached, str) else None
    if file is None or not file.is_file():
        return {}
    try:
        header = metadata_load(file)
    except (OSError, ValueError, yaml.YAMLError):  # somebody else's card
        return {}
    said = {name: (header or {}).get(name) for name in LICENSE_KEYS}
    return {name: value for name, value in said.items() if isinstance(value, str)}


def _describe_settings(options: dict[str, Any]) -> list[str]:
    """Return the lines of the settings, as a recipe without model, data and places."""
    recipe = yaml.safe_dump(shared_settings(options), sort_keys=False, allow_unicode=True, width=1000)
    return ["<details><summary>Settings</summary>", "", "```yaml", *recipe.splitlines(), "```", "", "</details>", ""]


def _source_path(source: Any) -> str:
    return source["path"] if isinstance(source, dict) else str(source)


def _describe_base(options: dict[str, Any], folder: Path) -> str:
    base = options.get("model_name_or_path")
    if base is None:
        return "none: trained from random weights"
    name = base if is_published(base) else Path(base).expanduser().resolve().name
    fingerprint = read_base_fingerprint(folder)
    return f"`{name}`" + (f", fingerprint {fingerprint}" if fingerprint else "")


def _describe_method(options: dict[str, Any], settings: dict[str, Any]) -> str:
    """Say what was trained; `settings` are those of the adapter, empty without one."""
    if not settings:
        part = {"bitfit": "all biases (BitFit)", "freeze": "a part of the weights"}.get(
            options["method"], "all weights"
        )
        return "; ".join([part, *(f"{name} {value}" for name, value in options.get("method_options", {}).items())])
    targets = settings.get("target_modules")
    targets = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in targets})) if isinstance(targets, list) else targets
    in_4_bits = options["method"] == "qlora" or options.get("load_in_4bit")
    base = " on a 4-bit base" if in_4_bits else " on an 8-bit base" * options["load_in_8bit"]
    on_targets = [f"on {targets}"] if targets else []
    whole = [f"whole: {', '.join(modules)}"] if (modules := settings.get("modules_to_save")) else []
    if settings.get("peft_type", "LORA") != "LORA":
        own = [f"{name} {value}" for name, value in options.get("method_options", {}).items()]
        return "; ".join([f"{settings['peft_type']}{base}", *own, *on_targets, *whole])
    kind = ["DoRA" if settings.get("use_dora") else "LoRA"] + ["rank-stabilized"] * bool(settings.get("use_rslora"))
    words = [f"{', '.join(kind)}{base}", f"rank {settings['r']}", f"alpha {settings['lora_alpha']:g}", *on_targets]
    if settings["r"] != options["lora_r"]:
        words.append(
            f"trained with rank {options['lora_r']} from {options['init_lora_weights']}, and stored as a plain LoRA of "
            "twice the rank on the unchanged base"
        )
    return "; ".join([*words, *whole])


def _describe_source(source: str, run: dict[str, Any]) -> str:
    """Name a source of rows, without its folder, and count its rows and trained tokens."""
    # Of an address nothing that could be a secret.
    path = urlsplit(source).path if "://" in source else source
    name = source if is_published(source) else PurePosixPath(path).name
    amount = run.get("ledger", {}).get("bins", {}).get(source, {}).get("trained")
    if not amount:
        return f"`{name}`"
    kind = "supervised" if amount["supervised"] else "context"
    tokens = f"{amount[kind]:,}{' trained' * (kind == 'supervised')} tokens"
    return f"`{name}` ({amount['rows']:,} rows, {tokens})"


def _describe_training(run: dict[str, Any], options: dict[str, Any], metrics: list[dict[str, Any]]) -> dict[str, str]:
    """Return what is known of steps and losses, by the name of the line in the card."""
    losses, evaluated, epochs = (_series(metrics, key) for key in ("loss", "eval/loss", "epoch"))
    facts = {"evaluation loss": ", ".join(f"{loss:.4f} at step {step}" for step, loss in evaluated[-3:])}
    facts |= _describe_evaluation(metrics, run.get("exported_step"))
    if losses:
        (first, start), (last, end) = losses[0], losses[-1]
        facts["steps"] = f"{last}" + (f", epoch {epochs[-1][1]:.2f}" if epochs else "")
        facts["training loss"] = f"{start:.4f} at step {first}, {end:.4f} at step {last}"
        if run.get("exported_step", last) != last:
            facts["weights"] = f"of step {run['exported_step']}, the best by {options.get('metric_for_best_model')}"
    if early := run.get("early_stopping"):
        facts["early stopping"] = early
    if here := run.get("accelerate"):
        facts["trained in"] = f"{here['precision']}, by {here['num_processes']} processes ({here['strategy']})"
    return facts


def _describe_evaluation(metrics: list[dict[str, Any]], exported_step: int | None) -> dict[str, str]:
    """Return what else was measured at the evaluation of the exported weights, or at the last one."""
    lines = [line for line in metrics if "eval/loss" in line]
    line = next((line for line in lines if line["step"] == exported_step), lines[-1] if lines else {})
    values = {name.removeprefix("eval/"): value for name, value in line.items() if name.startswith("eval/")}
    shown = [
        f"{name} {value:.4f}"
        for name, value in values.items()
        if name.partition("/")[0] not in NOT_IN_CARD and isinstance(value, float) and math.isfinite(value)
    ]
    return {f"evaluation at step {line['step']}": ", ".join(shown)} if shown else {}


def _series(metrics: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return the finite values of `key` with their steps."""
    return [(line["step"], line[key]) for line in metrics if math.isfinite(line.get(key, math.nan))]


def _cell(text: str) -> str:
    """Return `text` as the content of one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")
