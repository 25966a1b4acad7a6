"""Short names of the sources of a run, by which metrics tell them apart, and the source of each token of a batch."""

from collections.abc import Sequence
from pathlib import PurePath

import numpy as np
import torch

from accel_llm.config.fields import Source
from accel_llm.data.batches import Batch
from accel_llm.data.rows import Rows
from accel_llm.data.sources import as_source


def short_names(places: Sequence[str | Source]) -> list[str]:
    """Return a name for each source: the last part of its path, or as many parts as tell all of them apart.

    Equal sources get a number.
    """
    labels = [as_source(place).label for place in places]
    parts = [PurePath(label).parts or (label,) for label in labels]
    for count in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-count:]).lstrip("/") for part in parts]
        if len(set(names)) == len(set(labels)):
            break
    else:
        names = labels
    return [name if names.count(name) == 1 else f"{name} ({k + 1})" for k, name in enumerate(names)]


def evaluated_sources(
    rows: Rows, train_files: Sequence[str | Source], eval_files: Sequence[str | Source]
) -> tuple[list[str], np.ndarray]:
    """Return the names of the sources of rows to evaluate on, and the index of each row's name, int64 [rows].

    The rows are of `eval_files`, or held out from `train_files`.
    """
    names = short_names(eval_files if eval_files else train_files)
    source = rows.source
    return names, -1 - source if eval_files else source


def add_sources(batch: Batch, sources: Sequence[int], names: Sequence[str]) -> None:
    """Tell of each token of a batch from which source it is; `sources` are the indices in `names` of its documents.

    `sources` in the batch is int64 of the shape of `labels`; a token that fills up a row counts to the document before.
    """
    if not len(sources):  # the batch of an empty slot
        sources = [0]
    numbers, shape = np.array(sources, np.int64), tuple(batch["labels"].shape)
    of_tokens = (
        numbers.repeat(batch["lengths"])[None] if "cu_seqlens" in batch else numbers[:, None].repeat(shape[1], 1)
    )
    batch["sources"], batch["source_names"] = torch.from_numpy(of_tokens.reshape(shape)), tuple(names)
