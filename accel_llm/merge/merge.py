"""An adapter and its base become one standalone model, shard by shard and module by module, and it is proved.

Safetensors are read and written as streams. A module that an adapter changes is put together in memory, with its weights
and the adapter's, merged by PEFT's own layer, written, and given up before the next; all other weights are copied as they
are. So memory is bounded by the largest module that is merged, not by the model.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import accel_llm.system.chatter

import torch
from peft import PeftModel

from accel_llm.adapters.compat import SavedAdapter, read_adapter
from accel_llm.adapters.locate import check_bases, find_base, locate_folder
from accel_llm.adapters.saved import read_adapter_config
from accel_llm.config.tool_options import MergeOptions
from accel_llm.errors import ConfigError
from accel_llm.merge.attached import check_mergeable, load_adapter
from accel_llm.merge.compare_logits import compare_logits
from accel_llm.merge.model_card import copy_tokenizer, write_card, write_config_files
from accel_llm.merge.plan import plan_merge
from accel_llm.merge.verify import read_back
from accel_llm.merge.write import write_merged
from accel_llm.model.loading import load_complete_model
from accel_llm.model.vocabulary import adapter_vocabulary_size, extend_vocabulary
from accel_llm.system.folders import check_output_dir, whole_output
from accel_llm.system.memory import returning_freed_memory


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


def merge(options: MergeOptions, progress: Callable[[int, int], None] = lambda done, total: None) -> Merged:
    """Merge and write; `output_dir` appears whole by one rename, or not at all. `progress` is told bytes done and in all.

    Raises:
        ConfigError: no adapter, no base, an adapter that does not fit, a used output_dir, or a merge that differs.
    """
    target = Path(options.output_dir).expanduser().resolve()
    folders = [locate_folder(name, "adapter", allow_pickle=options.allow_pickle) for name in options.adapter]
    named = {str(read_adapter_config(folder).get("base_model_name_or_path")) for folder in folders}
    if options.base is None and len(named) > 1:
        raise ConfigError(
            f"base: the adapters name different ones ({', '.join(sorted(named))}); say which with --base."
        )
    base = find_base(folders[0], options.base)
    used = [*(("adapter", folder) for folder in folders), ("base", Path(base).expanduser())]
    check_output_dir(target, used, options.overwrite_output_dir, "config.json")
    adapters = [read_adapter(folder, options.allow_pickle) for folder in folders]
    for adapter in adapters:
        check_mergeable(adapter)
    source = locate_folder(base, "base", options.revision, options.allow_pickle)
    if not (options.allow_other_base or options.unmerge):
        check_bases(folders, source)
    with whole_output(target) as partial:
        merged = _build(options, adapters, base, source, partial, progress)
    return replace(merged, folder=target)


def _build(
    options: MergeOptions,
    adapters: list[SavedAdapter],
    base: str,
    source: Path,
    folder: Path,
    progress: Callable[[int, int], None],
) -> Merged:
    """The whole model in `folder`, verified."""
    with returning_freed_memory():
        plan = plan_merge(options, adapters, source)
        written = write_merged(plan, folder, options, progress)
    hashes = read_back(folder, written.sums) if options.verify != "none" else {}
    own, model = adapters[0].folder, plan.layout.model
    write_config_files(model, own, source, folder, options.trust_remote_code)
    notes = [copy_tokenizer(own, source, folder), *(note for adapter in adapters for note in adapter.notes)]
    folders = [adapter.folder for adapter in adapters]
    differences = compare_logits(folder, source, folders, options) if options.verify == "logits" else {}
    merged = Merged(folder, base, model.dtype, written.modules, written.worst, hashes, tuple(notes), differences)
    done = "taken out of it" if options.unmerge else "merged into it"
    write_card(folder, base, source, folders, done, _facts(merged, options), hashes)
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
    facts += [f"{way} base: {sentence}" for way, sentence in describe_base_errors(merged).items()]
    return facts


def describe_base_errors(merged: Merged) -> dict[str, str]:
    """What merging into either base costs an adapter that was trained on 4 bits, where it was computed."""
    ways = {way: merged.differences[way] for way in ("original", "dequantized") if way in merged.differences}
    return {
        way: f"merged logits differ from the adapter's own, on 4 bits, by {error:.1e}" for way, error in ways.items()
    }


def load_with_adapter(
    adapter: Path, base: str, dtype: torch.dtype | str, trust_remote_code: bool, allow_pickle: bool = False
) -> PeftModel:
    """The base model with the adapter on it, every weight of both in use, and a row for each token the adapter added.

    Raises:
        ConfigError: one of them cannot be loaded, or they are not made for each other.
    """
    found = read_adapter(adapter, allow_pickle)
    task = found.config.task_type
    if task not in (None, "CAUSAL_LM"):
        raise ConfigError(f"adapter: {adapter} was trained for {task}; only adapters of causal LMs are taken.")
    model = load_complete_model(base, "base", allow_pickle, dtype=dtype, trust_remote_code=trust_remote_code)
    rows = model.config.get_text_config().vocab_size
    extend_vocabulary(model, range(rows, adapter_vocabulary_size(model, found.settings, found.weights)))
    return load_adapter(model, found)
