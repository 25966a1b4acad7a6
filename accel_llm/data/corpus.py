"""What a run does with prepared corpora: it maps them where it can, and uses the packing that they were sealed with."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from accel_llm.config.data_options import DataOptions
from accel_llm.config.fields import Source
from accel_llm.config.options import TrainOptions
from accel_llm.data.corpus_encode import tokenizer_fingerprint
from accel_llm.data.corpus_shards import TokenShards, corpus_problem, is_prepared_corpus, open_corpus, read_manifest
from accel_llm.data.ledger import Ledger
from accel_llm.data.packing import Bins, shuffle_bins
from accel_llm.data.rows import Rows, StoredPacking
from accel_llm.data.sources import as_source
from accel_llm.errors import ConfigError


def corpus_defaults(options: DataOptions) -> dict[str, Any]:
    """Return the options that prepared corpora suggest, if all sources are such: their `max_length`, and `packing`.

    Packing is then static: the packed rows are those of the shards, and only their order is drawn in each epoch.
    """
    folders = _corpora(options)
    if not folders:
        return {}
    lengths = {read_manifest(folder)["settings"]["max_length"] for folder in folders}
    return {"max_length": max(lengths), "packing": "static"}


def check_corpora(sources: list[Source], tokenizer: PreTrainedTokenizerFast) -> None:
    """Check that prepared corpora among the sources have the ids of this tokenizer.

    Raises:
        ConfigError: one was prepared with another tokenizer.
    """
    for source in filter(_is_corpus, sources):
        manifest = read_manifest(Path(source.path))
        if manifest["tokenizer"] != tokenizer_fingerprint(tokenizer):
            raise ConfigError(
                f"tokenizer_name: {tokenizer.name_or_path} is not the tokenizer with which {source.path} was prepared "
                f"({manifest['tokenizer_name']}); give that one, or prepare the corpus again."
            )


def map_corpora(places: list[str | Source], options: DataOptions) -> tuple[Rows, Ledger, list[str]] | None:
    """Return the rows of prepared corpora memory-mapped, with their ledger and their fingerprints.

    None if the sources are not all prepared corpora, or if an option changes their rows: these are then encoded like
    other rows of token ids.
    """
    sources = [as_source(place) for place in places]
    changed = options.limit_rows or options.eval_share or options.virtual_tokens
    if not sources or changed or not all(_is_corpus(source) and source.limit_rows is None for source in sources):
        return None
    parts = [open_corpus(Path(source.path), number) for number, source in enumerate(sources)]
    if any(part.stored is None or part.stored.capacity > options.max_length for part in parts):
        return None
    ledger, prints = Ledger(), []
    for source in sources:
        manifest = read_manifest(Path(source.path))
        ledger.merge(Ledger.from_dict(manifest["ledger"]))
        prints.append(manifest["fingerprint"])
    return parts[0] if len(parts) == 1 else _join(parts), ledger, prints


def _join(parts: list[Rows]) -> Rows:
    """Return the rows of several corpora as one; token ids stay mapped, the other arrays come into memory."""
    stored = [part.stored for part in parts if part.stored is not None]
    row_starts = np.cumsum([0, *map(len, parts)])
    token_starts = np.cumsum([0, *(int(part.offsets[-1]) for part in parts)])
    file_starts = np.cumsum([0, *(len(part.origins) for part in parts)])

    def chain(arrays: list[np.ndarray], starts: np.ndarray, skip: int = 0) -> np.ndarray:
        joined = [values[skip:] + start for values, start in zip(arrays, starts, strict=False)]
        return np.concatenate([np.zeros(skip, np.int64), *joined])

    packing = StoredPacking(
        chain([part.bins for part in stored], row_starts, 1),
        chain([part.order for part in stored], row_starts),
        max(part.capacity for part in stored),
        None,
    )
    shards = [shard for part in parts for shard in part.input_ids.shards]  # type: ignore[attr-defined]
    return replace(
        parts[0],
        input_ids=TokenShards(shards, max(int(part.input_ids.max()) for part in parts)),  # type: ignore[arg-type]
        offsets=chain([part.offsets for part in parts], token_starts, 1),
        number=np.concatenate([part.number for part in parts]),
        origin=chain([part.origin for part in parts], file_starts).astype(np.int32),
        digest=np.concatenate([part.digest for part in parts]),
        origins=tuple(origin for part in parts for origin in part.origins),
        stored=packing,
    )


def uses_stored_packing(rows: Rows, options: TrainOptions) -> bool:
    """Tell whether a run trains on the packed rows of prepared corpora, as they are."""
    has_weights = any(as_source(place).weight is not None for place in options.train_files)
    return (
        rows.stored is not None
        and rows.stored.capacity == options.max_length
        and (options.packing, options.order) == ("static", "shuffle")
        and not has_weights
    )


def stored_epoch(rows: Rows, options: TrainOptions, epoch: int) -> Bins:
    """Return the packed rows of prepared corpora in the order of an epoch (from 0).

    It is the order of `arrange_epoch` with `packing: static` for the same seed: the first epoch of that seed is the
    order of the shards.
    """
    assert rows.stored is not None
    bins = Bins(np.arange(len(rows)), rows.stored.bins)
    if epoch == 0 and rows.stored.seed == options.seed:
        return bins
    return shuffle_bins(bins, np.random.Generator(np.random.Philox(key=[options.seed, epoch])))


def _is_corpus(source: Source) -> bool:
    return is_prepared_corpus(Path(source.path))


def _corpora(options: DataOptions) -> list[Path]:
    """Return the folders of the training sources, if all of them are prepared corpora; else none."""
    sources = [as_source(place) for place in options.train_files]
    folders = [Path(source.path) for source in sources if _is_corpus(source) and not corpus_problem(Path(source.path))]
    return folders if len(folders) == len(sources) else []
