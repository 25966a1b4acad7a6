"""Compares the logits of a merged model with those of base and adapter, in a fresh process with plain transformers."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from accel_llm.adapters.compat import SavedAdapter, read_adapter
from accel_llm.backend.library_messages import quiet_libraries
from accel_llm.config.tool_options import MergeOptions
from accel_llm.errors import ConfigError
from accel_llm.merge.attached import adapted_modules
from accel_llm.merge.fresh_process import run_in_fresh_process
from accel_llm.merge.one_module import scale_module
from accel_llm.merge.plan import plan_merge
from accel_llm.merge.skeleton import model_class, read_model_config
from accel_llm.merge.verify import LOGIT_BOUNDS
from accel_llm.model.classifier import has_scores, logits_to_compare
from accel_llm.model.loading import LOADING_ERRORS, short_reason
from accel_llm.model.positions import position_limit
from accel_llm.system.exit import run_script

SAMPLE_TOKENS = 256  # at most this many tokens are compared
SAMPLE_TEXT = """The ferry left at seven, twenty minutes late, with eleven passengers and a crate of lemons on deck. Nobody spoke
until the lighthouse. "You can see both coasts from here," the captain said, "but only in October."

def area(width: float, height: float) -> float:
    if width < 0 or height < 0:
        raise ValueError(f"not a rectangle: {width} x {height}")
    return width * height

Question: A shop sells pens at 3 for 2.40. What do 7 pens cost? Answer: One costs 0.80, so seven cost 5.60.
Die Rechnung kam am Montag, zwei Tage nach der Lieferung. Elle l'a payée sans la lire.
天气预报说明天有雨,我们还是决定去爬山。 {"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"]}
"""


def compare_logits(folder: Path, source: Path, adapters: list[Path], options: MergeOptions) -> dict[str, float]:
    """Return relative differences |actual - expected| / |expected| of logits on a text, computed in a fresh process.

    `merged`: the model in `folder`, compared with base and adapter. If merge_base is set, also `original` and
    `dequantized`: the adapter merged into the base's own weights, and into its dequantized 4-bit weights, both compared
    with the adapter on the 4-bit base that it was trained on.

    Raises:
        ConfigError: plain transformers cannot load the written model, or its logits differ beyond rounding.
    """
    arguments = [str(folder), str(source), json.dumps([str(adapter) for adapter in adapters])]
    arguments.append(json.dumps(options.model_dump(exclude_unset=True)))
    remedy = "most often because memory ran out: it loads two whole models; set verify: modules."
    return run_in_fresh_process("accel_llm.merge.compare_logits", arguments, "compares logits", remedy)


def main() -> None:
    """Print the differences as JSON. The command line holds the arguments of `compare_logits`."""
    quiet_libraries()
    folder, source, adapters, options = (
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        json.loads(sys.argv[3]),
        json.loads(sys.argv[4]),
    )
    print(json.dumps(_compare(folder, source, [Path(name) for name in adapters], MergeOptions(**options))))


def _compare(folder: Path, source: Path, folders: list[Path], options: MergeOptions) -> dict[str, float]:
    adapters = [read_adapter(adapter, options.allow_pickle) for adapter in folders]
    task = adapters[0].config.task_type
    model = load_plain(folder, task, options)
    # One text for all models, in the tokens of the written one.
    ids = _sample_ids(folder, model, options.trust_remote_code)
    actual, dtype = _logits(model, ids), model.dtype
    # One model at a time in memory.
    del model
    if options.unmerge:
        # The adapter on the unmerged model must answer as the merged model that it was taken out of.
        expected = _logits(load_plain(source, task, options), ids)
        actual = _logits(load_adapted(adapters, folder, options), ids)
    else:
        expected = _logits(load_adapted(adapters, source, options), ids)
    relative, bound = _relative_error(actual, expected), LOGIT_BOUNDS[dtype]
    if not relative <= bound:
        raise ConfigError(
            f"verify: the merged model's logits differ from the adapter's by {relative:.1e} (allowed for {dtype}: "
            f"{bound:.0e}); nothing was written."
        )
    base_errors = _base_errors(adapters, source, options, ids) if "merge_base" in options.model_fields_set else {}
    return {"merged": relative} | base_errors


def load_plain(folder: Path, task: str | None, options: MergeOptions) -> PreTrainedModel:
    """Load a model with plain transformers."""
    loader = model_class(read_model_config(folder, options.trust_remote_code), task)
    remote = {"trust_remote_code": True} if options.trust_remote_code else {}
    try:
        return loader.from_pretrained(str(folder), dtype="auto", **remote)
    except LOADING_ERRORS as error:
        raise ConfigError(
            f"verify: the written model cannot be loaded ({short_reason(error)}); nothing was kept."
        ) from None


def load_adapted(adapters: list[SavedAdapter], source: Path, options: MergeOptions) -> Any:
    """Load the base with the adapters on it, unmerged, scaled and combined as the options say."""
    plan = plan_merge(options, adapters, source, lazy=False)
    attached = plan.attached
    for name, tensor in attached.replacements.items():
        getattr(*attached.owners[name]).data = tensor.to(plan.specs[name].dtype)
    if options.scale != 1:
        for _, module in adapted_modules(attached.wrapped):
            scale_module(module, options.scale)
    return attached.wrapped


def _base_errors(
    adapters: list[SavedAdapter], source: Path, options: MergeOptions, ids: torch.Tensor
) -> dict[str, float]:
    """Return the relative error of the logits after merging into the original base, and into the dequantized one.

    Both are compared with the adapter on its 4-bit base. That base computes with the dequantized weights.
    """
    dequantized = options.model_copy(update={"merge_base": "dequantized"})
    expected = _logits(load_adapted(adapters, source, dequantized), ids)
    in_4_bits = getattr(read_model_config(source, options.trust_remote_code), "quantization_config", None)
    errors = {}
    # A base in 4-bit files has no original weights to merge into.
    for way in ("dequantized",) if in_4_bits else ("original", "dequantized"):
        wrapped = load_adapted(adapters, source, options.model_copy(update={"merge_base": way}))
        for _, module in adapted_modules(wrapped):
            with torch.no_grad():
                module.merge()
        errors[way] = _relative_error(_logits(wrapped, ids), expected)
    return errors


def _sample_ids(folder: Path, model: PreTrainedModel, trust_remote_code: bool) -> torch.Tensor:
    """Return token ids [1, tokens] of the sample text, or random ones if the model has no tokenizer.

    A model need not have as many positions as rows of its table of positions, see `position_limit`.
    """
    config = model.config.get_text_config()
    if not hasattr(config, "vocab_size"):
        raise ConfigError(
            "verify: logits are compared on a text, but this is not a language model; set verify: modules."
        )
    length = min(SAMPLE_TOKENS, position_limit(model.config) or SAMPLE_TOKENS)
    ids = torch.empty(1, 0)
    # Without its files transformers builds a tokenizer with an empty vocabulary for some families.
    if any((folder / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
            ids = torch.tensor([tokenizer(SAMPLE_TEXT).input_ids[:length]])
        except LOADING_ERRORS:
            pass
    if not ids.numel():
        ids = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    return ids % config.vocab_size


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    # Encoder-decoder models need both inputs; the same ids serve for both.
    encodes = getattr(model.config, "is_encoder_decoder", False)
    arguments = {"decoder_input_ids": ids} if encodes else {}
    with torch.no_grad():
        if has_scores(model.config) and not encodes:
            return logits_to_compare(model.eval(), ids)
        result = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **arguments)
    return (result.logits if "logits" in result else result[0]).float()


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


if __name__ == "__main__":
    run_script(main)
