"""Merges adapters into their base model, module by module, and verifies the result.

Safetensors files are read and written as streams. For each module that an adapter changes, the weights of base and
adapter are loaded, merged by PEFT's own layer, written, and freed before the next module. All other weights are copied
byte by byte. So the largest merged module bounds the memory, not the size of the model.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from accel_llm.adapters.compat import SavedAdapter, read_adapter
from accel_llm.adapters.locate import check_bases, find_base, locate_folder
from accel_llm.adapters.saved import read_adapter_config, trained_in_4_bits
from accel_llm.config.tool_options import MergeOptions
from accel_llm.errors import ConfigError
from accel_llm.merge.attached import check_mergeable
from accel_llm.merge.compare_logits import compare_logits
from accel_llm.merge.gguf_file import check_serving_packages
from accel_llm.merge.gguf_model import check_family
from accel_llm.merge.model_card import copy_tokenizer, write_card, write_config_files
from accel_llm.merge.plan import plan_merge
from accel_llm.merge.serve import FLOAT16, describe_proof, write_served
from accel_llm.merge.served import ServedModel, ServedProof
from accel_llm.merge.verify import read_back
from accel_llm.merge.write import write_merged
from accel_llm.system.folders import atomic_output, check_output_dir, check_writable
from accel_llm.system.memory import returning_freed_memory

TRAINED_IN_4_BITS = (
    "The adapter was trained on its base in 4 bits. It is merged into the base's own weights, so the answers can differ a "
    "little; --verify logits with --merge_base dequantized measures both."
)


@dataclass(frozen=True)
class MergeResult:
    """What a merge wrote and verified.

    `modules`: number of merged modules. `largest_error`: largest relative error of a module, None if not verified.
    `hashes`: SHA-256 of each weights file. `notes`: sentences for the user. `differences`: see `compare_logits`.
    `served`: what llama.cpp computes, None if not verified.
    """

    folder: Path
    base: str
    dtype: torch.dtype
    modules: int
    largest_error: float | None
    hashes: dict[str, str]
    notes: tuple[str, ...]
    differences: dict[str, float]
    served: ServedProof | None = None


def merge(options: MergeOptions, progress: Callable[[int, int], None] = lambda done, total: None) -> MergeResult:
    """Merge adapters into a base and write a standalone model. `output_dir` appears complete or not at all.

    `progress` is called with the bytes written and the bytes in all.

    Raises:
        ConfigError: adapter or base are missing or do not fit, output_dir is in use, or the merged model differs.
    """
    # Find and check everything that is read before anything is written.
    if options.verify == "served":
        check_serving_packages("gguf", "llama_cpp")
    check_writable(Path(options.output_dir))
    target = Path(options.output_dir).resolve()
    folders = [locate_folder(name, "adapter", allow_pickle=options.allow_pickle) for name in options.adapter]
    bases = {str(read_adapter_config(folder).get("base_model_name_or_path")) for folder in folders}
    if options.base is None and len(bases) > 1:
        raise ConfigError(
            f"base: the adapters name different bases ({', '.join(sorted(bases))}); choose one with --base."
        )
    # The base that the user names, or the one that the adapter was trained on.
    base = find_base(folders[0], options.base)
    sources = [*(("adapter", folder) for folder in folders), ("base", Path(base))]
    check_output_dir(target, sources, options.overwrite_output_dir, "config.json")
    adapters = [read_adapter(folder, options.allow_pickle) for folder in folders]
    for adapter in adapters:
        check_mergeable(adapter, changed=len(adapters) > 1 or options.scale != 1 or options.unmerge)
    source = locate_folder(base, "base", options.revision, options.allow_pickle)
    if not (options.allow_other_base or options.unmerge):
        check_bases(folders, source)

    with atomic_output(target) as partial:
        result = _write_model(options, adapters, base, source, partial, progress)
    return replace(result, folder=target)


def merge_adapter(adapter: str | Path, output_dir: str | Path, **settings: Any) -> MergeResult:
    """Merge one adapter with plain arguments; `settings` are options of launch/merge.py, such as `base` or `verify`.

    Raises:
        ConfigError: see `merge`.
    """
    return merge(MergeOptions(adapter=[str(adapter)], output_dir=str(output_dir), **settings))


def _write_model(
    options: MergeOptions,
    adapters: list[SavedAdapter],
    base: str,
    source: Path,
    folder: Path,
    progress: Callable[[int, int], None],
) -> MergeResult:
    """Write the complete model into `folder`, and verify it."""
    with returning_freed_memory():
        plan = plan_merge(options, adapters, source)
        if options.verify == "served":
            check_family(plan.skeleton.model.config, source)
        weights = write_merged(plan, folder, options, progress)
    hashes = read_back(folder, weights.checksums) if options.verify != "none" else {}

    # Files beside the weights come from the first adapter, or else from the base.
    first, model = adapters[0].folder, plan.skeleton.model
    write_config_files(model, first, source, folder, options.trust_remote_code)
    notes = [copy_tokenizer(first, source, folder), *(note for adapter in adapters for note in adapter.notes)]
    if options.merge_base == "original" and any(trained_in_4_bits(adapter.folder) for adapter in adapters):
        notes.append(TRAINED_IN_4_BITS)

    # Last, because it loads two whole models in another process.
    folders = [adapter.folder for adapter in adapters]
    differences = compare_logits(folder, source, folders, options) if options.verify == "logits" else {}
    proof = None
    if options.verify == "served":
        merged = ServedModel(folder, tuple(folders), source, options.model_dump(exclude_unset=True))
        served = write_served(merged, folder, [FLOAT16], prove=True, progress=progress)
        notes, proof = [*notes, *served.notes], served.proof
    result = MergeResult(
        folder, base, model.dtype, weights.modules, weights.largest_error, hashes, tuple(notes), differences, proof
    )
    action = "taken out of it" if options.unmerge else "merged into it"
    write_card(folder, base, source, folders, action, _card_facts(result, options), hashes)
    return result


def _card_facts(result: MergeResult, options: MergeOptions) -> list[str]:
    """Return the sentences for the model card: what was done, and what was verified."""
    dtype = str(result.dtype).removeprefix("torch.")
    facts = [f"{result.modules} modules {'un' * options.unmerge}merged in {dtype}"]
    if options.scale != 1:
        facts.append(f"scaled by {options.scale:g}")
    if len(options.adapter) > 1:
        weights = ", ".join(f"{weight:g}" for weight in options.adapter_weights or [1.0] * len(options.adapter))
        facts.append(f"combined by {options.combination_type}, weights {weights}")
    if result.largest_error is not None:
        facts.append(
            f"each module compared with its adapted one: relative difference at most {result.largest_error:.1e}"
        )
    if "merged" in result.differences:
        relative = result.differences["merged"]
        facts.append(f"logits compared with those of base and adapter: relative difference {relative:.1e}")
    facts += describe_proof(result.served) if result.served else []
    facts += [f"{way} base: {sentence}" for way, sentence in describe_base_errors(result).items()]
    return facts


def describe_base_errors(result: MergeResult) -> dict[str, str]:
    """Return a sentence about the error of merging a 4-bit adapter into each base, if it was computed."""
    errors = {way: result.differences[way] for way in ("original", "dequantized") if way in result.differences}
    return {
        way: f"merged logits differ from those of the adapter on its 4-bit base by {error:.1e}"
        for way, error in errors.items()
    }
