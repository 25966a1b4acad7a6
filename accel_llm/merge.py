"""An adapter and its base become one standalone model, compared with the adapter before it counts as written."""

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from accel_llm import vocabulary
from accel_llm.adapter import read_config
from accel_llm.attention import causal_lm
from accel_llm.errors import ConfigError
from accel_llm.models import check_model_name, load_tokenizer, load_whole, reason_of, saveable
from accel_llm.options import MergeOptions

# Largest relative difference of logits, |merged - adapter| / |adapter|, that rounding explains in each dtype.
BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Merged:
    """What was written, and how far its logits are from base + adapter (None where it was not compared)."""

    folder: Path
    base: str
    dtype: torch.dtype
    difference: float | None


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


def load(adapter: Path, base: str, dtype: torch.dtype | str, trust_remote_code: bool) -> PeftModel:
    """The base model with the adapter on it, every weight of both in use, and a row for each token the adapter added.

    Raises:
        ConfigError: one of them cannot be loaded, or they are not made for each other.
    """
    settings = read_config(adapter)
    task = settings.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise ConfigError(f"adapter: {adapter} was trained for {task}; only adapters of causal LMs are taken.")
    model = load_whole(base, "base", dtype=dtype, trust_remote_code=trust_remote_code)
    try:
        weights = load_peft_weights(str(adapter), device="cpu")
        rows = model.config.get_text_config().vocab_size
        vocabulary.extend(model, range(rows, vocabulary.rows_of_adapter(model, settings, weights)))
        with warnings.catch_warnings():
            # PEFT 0.21 leaves weights that the adapter's file lacks as they were drawn, and only warns.
            warnings.filterwarnings("error", "Found missing adapter keys")
            wrapped = PeftModel.from_pretrained(model, str(adapter))
        # It says nothing at all about weights that found no place, so they are put there once more.
        unused = set_peft_model_state_dict(wrapped, weights).unexpected_keys
        if unused:
            raise ValueError(f"{len(unused)} of its weights have no place there, such as {min(unused)}")
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, UserWarning) as error:
        raise ConfigError(f"adapter: {adapter} does not fit {base} ({reason_of(error)}).") from None
    return wrapped  # type: ignore[return-value]


def merge(options: MergeOptions) -> Merged:
    """Merge and write; `output_dir` appears whole by one rename, or not at all.

    Raises:
        ConfigError: no adapter, no base, an adapter that does not fit, a used output_dir, or a merge that differs.
    """
    adapter, target = adapter_folder(options.adapter), Path(options.output_dir).expanduser().resolve()
    read_config(adapter)
    base = base_of(adapter, options.base)
    _check_target(target, adapter, base, options.overwrite_output_dir)
    dtype = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
    wrapped = load(adapter, base, dtype, options.trust_remote_code)
    ids = _probe_ids(wrapped.config.get_text_config().vocab_size)
    expected = _logits(wrapped, ids) if options.verify != "none" else None
    merged = _merged(wrapped, adapter)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        written = merged.dtype
        _write(merged, adapter, base, partial, options)
        del merged, wrapped
        difference = _compare(partial, ids, expected, written) if expected is not None else None
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Merged(target, base, written, difference)


def _check_target(target: Path, adapter: Path, base: str, overwrite: bool) -> None:
    """Refuse an output_dir whose replacement would lose anything but an earlier model."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"output_dir: {target} is a file; name a folder.")
    for what, used in (("adapter", adapter), ("base", Path(base))):
        if used.exists() and used.resolve().is_relative_to(target):
            raise ConfigError(f"output_dir: {target} holds the {what} that is merged; name another folder.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"output_dir: {target} is not empty; name another folder, or set overwrite_output_dir.")
    if not (target / "config.json").is_file():
        raise ConfigError(f"output_dir: {target} holds files that are no model; name another folder.")


def _merged(wrapped: PeftModel, adapter: Path) -> PreTrainedModel:
    if not hasattr(wrapped.base_model, "merge_and_unload"):
        raise ConfigError(f"adapter: {adapter} cannot be merged, a {wrapped.peft_type} adapter has no weights to add.")
    _untie(causal_lm(wrapped))
    try:
        return wrapped.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    except ValueError as error:
        raise ConfigError(f"adapter: {adapter} cannot be merged ({reason_of(error)}).") from None


def _untie(model: PreTrainedModel) -> None:
    """Give an adapted head a matrix of its own: merged into the one it shares, it would change the embedding too."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    first, head = (getattr(end, "base_layer", end) for end in ends)
    if [first, head] != ends and head is not None and head.weight is first.weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False


def _write(model: PreTrainedModel, adapter: Path, base: str, folder: Path, options: MergeOptions) -> None:
    own = (adapter / "generation_config.json").is_file()
    model.generation_config = saveable(
        GenerationConfig.from_pretrained(str(adapter)) if own else model.generation_config
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder))
    source = str(adapter) if (adapter / "tokenizer_config.json").is_file() else base
    load_tokenizer(source, trust_remote_code=options.trust_remote_code).save_pretrained(str(folder))


def _probe_ids(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()


def _compare(folder: Path, ids: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> float:
    """Load what was written and compare its logits with those of base + adapter."""
    difference = _logits(AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype), ids) - expected
    relative = float(difference.norm() / expected.norm())
    if not relative <= BOUNDS[dtype]:
        raise ConfigError(
            f"verify: the merged model's logits differ from the adapter's by {relative:.1e} (allowed for {dtype}: "
            f"{BOUNDS[dtype]:.0e}); nothing was written."
        )
    return relative
