"""An adapter and its base become one standalone model, shard by shard and module by module, and it is proved.

Safetensors are read and written as streams. A module that an adapter changes is put together in memory, with its weights
and the adapter's, merged by PEFT's own layer, written, and given up before the next; all other weights are copied as they
are. So memory is bounded by the largest module that is merged, not by the model.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import accel_llm.system.chatter

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel

from accel_llm.adapters.attach import base_fingerprint, read_config
from accel_llm.adapters.compat import Adapter, read
from accel_llm.config.tool_options import MergeOptions
from accel_llm.errors import ConfigError
from accel_llm.merge import attached as graft
from accel_llm.merge import compare_logits as logits
from accel_llm.merge import model_card as card
from accel_llm.merge import verify
from accel_llm.merge import write as walk
from accel_llm.model import fingerprint, vocabulary
from accel_llm.model import placement as shards
from accel_llm.model.loading import check_model_name, load_whole, reason_of
from accel_llm.system.folders import appearing, check_target

# Files of a hub model that a merge needs.
FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")


@dataclass(frozen=True)
class Merged:
    """What was written, and what was proved of it; None where it was not looked at.

    `modules` were merged, `worst` is the largest relative error of one, `hashes` the SHA-256 of each weights file, `notes`
    are sentences for the person, `differences` those of `logits.check`.
    """

    folder: Path
    base: str
    dtype: torch.dtype
    modules: int
    worst: float | None
    hashes: dict[str, str]
    notes: tuple[str, ...]
    differences: dict[str, float]


def adapter_folder(name: str) -> Path:
    """The adapter itself, whether its folder was named or the output folder of the run that made it."""
    folder = Path(name).expanduser()
    inner = folder / "adapter"
    if not (folder / "adapter_config.json").is_file() and (inner / "adapter_config.json").is_file():
        return inner
    return folder


def base_of(adapter: Path, named: str | None, field: str = "base") -> str:
    """The base model: the one named, else the one that adapter_config.json names.

    Raises:
        ConfigError: it is nowhere to be found.
    """
    base = named or read_config(adapter).get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{field}: {adapter} does not name its base model; say where it is.")
    try:
        check_model_name(base, field)
    except ConfigError as error:
        if named:
            raise
        reason = str(error).rstrip(".")
        raise ConfigError(f"{reason}; {adapter} names it as its base, say where it is with --base.") from None
    return base


def merge(options: MergeOptions, progress: Callable[[int, int], None] = lambda done, total: None) -> Merged:
    """Merge and write; `output_dir` appears whole by one rename, or not at all. `progress` is told bytes done and in all.

    Raises:
        ConfigError: no adapter, no base, an adapter that does not fit, a used output_dir, or a merge that differs.
    """
    target = Path(options.output_dir).expanduser().resolve()
    folders = [located(name, "adapter", allow_pickle=options.allow_pickle) for name in options.adapter]
    named = {str(read_config(folder).get("base_model_name_or_path")) for folder in folders}
    if options.base is None and len(named) > 1:
        raise ConfigError(
            f"base: the adapters name different ones ({', '.join(sorted(named))}); say which with --base."
        )
    base = base_of(folders[0], options.base)
    used = [*(("adapter", folder) for folder in folders), ("base", Path(base).expanduser())]
    check_target(target, used, options.overwrite_output_dir, "config.json")
    adapters = [read(folder, options.allow_pickle) for folder in folders]
    for adapter in adapters:
        graft.check_mergeable(adapter)
    source = located(base, "base", options.revision, options.allow_pickle)
    if not (options.allow_other_base or options.unmerge):
        check_fingerprints(folders, source)
    with appearing(target) as partial:
        merged = _build(options, adapters, base, source, partial, progress)
    return replace(merged, folder=target)


def check_fingerprints(adapters: list[Path], base: Path | str) -> None:
    """Raises ConfigError when `base` is another model than the one that an adapter says it was trained on."""
    for folder in adapters:
        expected = base_fingerprint(folder)
        if expected and expected != (found := fingerprint.of_model(str(base))):
            raise ConfigError(
                f"base: {base} is another model (fingerprint {found}) than the one that {folder} was trained on "
                f"({expected}); name that one with --base, or set allow_other_base if it is the same, stored in another way."
            )


def _build(
    options: MergeOptions,
    adapters: list[Adapter],
    base: str,
    source: Path,
    folder: Path,
    progress: Callable[[int, int], None],
) -> Merged:
    """The whole model in `folder`, verified."""
    with shards.memory_given_back():
        plan = walk.plan(options, adapters, source)
        written = walk.write(plan, folder, options, progress)
    hashes = verify.read_back(folder, written.sums) if options.verify != "none" else {}
    own, model = adapters[0].folder, plan.layout.model
    card.write_settings(model, own, source, folder, options.trust_remote_code)
    notes = [card.copy_tokenizer(own, source, folder), *(note for adapter in adapters for note in adapter.notes)]
    folders = [adapter.folder for adapter in adapters]
    differences = logits.check(folder, source, folders, options) if options.verify == "logits" else {}
    merged = Merged(folder, base, model.dtype, written.modules, written.worst, hashes, tuple(notes), differences)
    done = "taken out of it" if options.unmerge else "merged into it"
    card.write_card(folder, base, source, folders, done, _facts(merged, options), hashes)
    return merged


def _facts(merged: Merged, options: MergeOptions) -> list[str]:
    """What was done and proved, for the model card."""
    dtype = str(merged.dtype).removeprefix("torch.")
    facts = [f"{merged.modules} modules {'un' * options.unmerge}merged in {dtype}"]
    if options.scale != 1:
        facts.append(f"scaled by {options.scale:g}")
    if len(options.adapter) > 1:
        weights = ", ".join(f"{weight:g}" for weight in options.adapter_weights or [1.0] * len(options.adapter))
        facts.append(f"combined by {options.combination_type}, weights {weights}")
    if merged.worst is not None:
        facts.append(f"each module compared with its adapted one: relative difference at most {merged.worst:.1e}")
    if "merged" in merged.differences:
        relative = merged.differences["merged"]
        facts.append(f"logits compared with those of base and adapter: relative difference {relative:.1e}")
    facts += [f"{way} base: {sentence}" for way, sentence in of_bases(merged).items()]
    return facts


def of_bases(merged: Merged) -> dict[str, str]:
    """What merging into either base costs an adapter that was trained on 4 bits, where it was computed."""
    ways = {way: merged.differences[way] for way in ("original", "dequantized") if way in merged.differences}
    return {
        way: f"merged logits differ from the adapter's own, on 4 bits, by {error:.1e}" for way, error in ways.items()
    }


def located(name: str, field: str, revision: str = "main", allow_pickle: bool = False) -> Path:
    """The folder of a model or an adapter that is a folder, the folder of a run or a hub id.

    Raises:
        ConfigError: a hub id that cannot be had.
    """
    folder = adapter_folder(name) if field == "adapter" else Path(name).expanduser()
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        return folder
    try:
        patterns = [*FILES, *(["*.bin"] if allow_pickle else [])]
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ConfigError(
            f"{field}: {name} is no folder, and no hub id that can be had ({reason_of(error)})."
        ) from None


def load(
    adapter: Path, base: str, dtype: torch.dtype | str, trust_remote_code: bool, allow_pickle: bool = False
) -> PeftModel:
    """The base model with the adapter on it, every weight of both in use, and a row for each token the adapter added.

    Raises:
        ConfigError: one of them cannot be loaded, or they are not made for each other.
    """
    found = read(adapter, allow_pickle)
    task = found.config.task_type
    if task not in (None, "CAUSAL_LM"):
        raise ConfigError(f"adapter: {adapter} was trained for {task}; only adapters of causal LMs are taken.")
    model = load_whole(base, "base", allow_pickle, dtype=dtype, trust_remote_code=trust_remote_code)
    rows = model.config.get_text_config().vocab_size
    vocabulary.extend(model, range(rows, vocabulary.rows_of_adapter(model, found.settings, found.weights)))
    return graft.load(model, found)
