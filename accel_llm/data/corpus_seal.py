"""Makes one corpus of all parts: removes duplicates, packs all documents together, and writes shards.

Documents stand in the order of the sources whatever part they come from, and everything here depends on them alone. So
the shards are the same, bit for bit, however many parts there were.
"""

import hashlib
import json
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from accel_llm.config.data_options import DataOptions
from accel_llm.data.corpus_encode import count_documents
from accel_llm.data.corpus_parts import PieceEntry, PieceFile, read_part_lists, write_whole
from accel_llm.data.corpus_shards import CORPUS_FORMAT, CORPUS_MANIFEST, INDEX_ARRAYS, SHARD_FILES
from accel_llm.data.duplicates import find_equal
from accel_llm.data.fingerprint import data_fingerprint
from accel_llm.data.ledger import TRAINED, Ledger
from accel_llm.data.limits import check_lost_share, describe_losses
from accel_llm.data.near_duplicates import HASHES, find_similar
from accel_llm.data.packing import pack
from accel_llm.errors import ConfigError, DataError
from accel_llm.system.disk import atomic_file
from accel_llm.system.progress import Bar

SHARD_TOKENS = 1 << 26  # at most in one shard, which is 256 MiB
EXACT, NEAR = "removed: exact duplicate", "removed: near duplicate"  # bins of the ledger; such documents are not lost


class SealedCorpus(NamedTuple):
    """What `prepare.py` says at the end."""

    documents: int
    rows: int
    packed_rows: int
    tokens: int
    fill: float  # share of the packed rows that are tokens
    ledger: Ledger
    new_shards: int


@dataclass
class _Documents:
    """All documents of the pieces, in the order of the sources; `removed` says which are left out."""

    rows: np.ndarray  # int32 [documents], rows of each
    tokens: np.ndarray  # int32 [documents], before any cut
    number: np.ndarray  # int64 [documents], the row's number in its file
    digest: np.ndarray  # uint64 [documents]
    text_digest: np.ndarray  # uint64 [documents, 2]
    entry: np.ndarray  # int32 [documents], index of its piece
    row_lengths: np.ndarray  # int32 [rows]
    removed: np.ndarray  # bool [documents]


def seal_corpus(folders: list[Path], output: Path, max_lost: float | None = None) -> SealedCorpus:
    """Write the corpus that all parts in `folders` make together into `output`.

    Raises:
        ConfigError: a part is missing, the parts are of different corpora, or more than `max_lost` is lost.
        DataError: nothing is left, or a file of a source has no rows.
    """
    plan, entries, places = _find_parts(folders)
    settings = plan["settings"] | ({} if max_lost is None else {"max_lost": max_lost})
    pieces = [PieceFile(places[entry.address], entry.address) for entry in entries]
    ledger = Ledger(notes=list(plan["notes"]))
    for label in plan["labels"]:
        ledger.read(label, 0)
    documents = _read_documents(entries, pieces, ledger)
    _remove_duplicates(documents, pieces, entries, ledger, plan["labels"], settings)
    if rearranged := sum(piece.rearranged for piece in pieces):
        ledger.note(f"fim_rate: {rearranged:,} documents were rearranged for fill-in-the-middle, duplicates counted.")
    ledger.balance()
    kept = ~documents.removed
    lengths = documents.row_lengths[np.repeat(kept, documents.rows)]
    check_lost_share(ledger, _percentiles(lengths), _options(settings))
    if not len(lengths):
        raise DataError(f"train_files: no document is left: {describe_losses(ledger)}.")

    # The rows are packed as a run with `packing: static` and the same seed packs its first epoch.
    rng = np.random.Generator(np.random.Philox(key=[settings["seed"], 0]))
    order, bins = pack(lengths, settings["max_length"], rng)
    shards, new, largest = _write_tokens(documents, pieces, order, lengths, output)
    index = _index_arrays(documents, entries, order, lengths) | {"bins": bins}
    written = {name: _write_array(output, name, index[name].astype(kind)) for name, kind in INDEX_ARRAYS.items()}
    manifest = {
        "format": CORPUS_FORMAT,
        "fingerprint": data_fingerprint([shard["name"] for shard in shards], sorted(map(repr, written.items()))),
        "tokenizer": plan["tokenizer"],
        "tokenizer_name": plan["tokenizer_name"],
        "settings": settings,
        "documents": int(kept.sum()),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "largest_id": largest,
        "files": _file_names(entries),
        "shards": shards,
        "index": written,
        "ledger": ledger.to_dict(),
    }
    write_whole(output / CORPUS_MANIFEST, json.dumps(manifest, indent=1).encode())
    for path in (output / SHARD_FILES).iterdir():  # of a corpus that was there before, or of a process that was killed
        if path.name not in {entry["name"] for entry in (*shards, *written.values())}:
            path.unlink()
    packed = len(bins) - 1
    fill = manifest["tokens"] / (packed * settings["max_length"])
    return SealedCorpus(int(kept.sum()), len(lengths), packed, manifest["tokens"], fill, ledger, new)


def _find_parts(folders: list[Path]) -> tuple[dict[str, Any], list[PieceEntry], dict[str, Path]]:
    """Return the plan of the parts, the list of all pieces in the order of the sources, and the folder of each.

    Raises:
        ConfigError: parts are missing, or the folders hold parts of different corpora.
    """
    sets: dict[tuple[str, int], dict[int, tuple[dict[str, Any], Path]]] = {}
    for folder in folders:
        for part in read_part_lists(folder):
            number, count = map(int, part["part"].split("/"))
            sets.setdefault((part["plan"]["key"], count), {})[number] = part, folder
    names = ", ".join(map(str, folders))
    if not sets:
        raise ConfigError(f"folders: {names} holds no part; run `prepare.py corpus` with this output_dir first.")
    complete = [parts for (_, count), parts in sets.items() if len(parts) == count]
    if not complete:
        (_, count), parts = max(sets.items(), key=lambda item: len(item[1]))
        missing = [f"{number}/{count}" for number in range(1, count + 1) if number not in parts]
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ConfigError(f"folders: {names} lacks part {', '.join(missing[:5])}{more}; prepare it, then seal again.")
    if len({key for (key, count), parts in sets.items() if len(parts) == count}) > 1:
        raise ConfigError(
            f"folders: {names} holds parts of several corpora, which differ in text or options; prepare each corpus in "
            "a folder of its own."
        )
    entries: dict[PieceEntry, Path] = {}
    for part, folder in complete[0].values():
        entries |= {PieceEntry(*entry): folder for entry in part["pieces"]}
    plan = next(iter(complete[0].values()))[0]["plan"]
    return plan, sorted(entries), {entry.address: folder for entry, folder in entries.items()}


def _read_documents(entries: list[PieceEntry], pieces: list[PieceFile], ledger: Ledger) -> _Documents:
    """Read what sealing must know of each document, and add up the ledgers.

    Raises:
        DataError: a file has no rows.
    """
    rows_read: dict[tuple[int, int], int] = {}
    columns: dict[str, list[np.ndarray]] = {}
    for k, (entry, piece) in enumerate(zip(entries, pieces, strict=True)):
        place = entry.source, entry.file
        arrays = {name: piece.read(name) for name in ("row_lengths", "document_rows", "document_tokens", "digest")}
        arrays |= {"text_digest": piece.read("text_digest"), "number": piece.read("number") + rows_read.get(place, 0)}
        if entry.index:  # the rows of later pieces of a file that one process reads are counted from its start
            arrays["number"] = piece.read("number")
        arrays["entry"] = np.full(len(arrays["number"]), k, np.int32)
        for name, values in arrays.items():
            columns.setdefault(name, []).append(values)
        rows_read[place] = rows_read.get(place, 0) + piece.rows_read
        ledger.merge(piece.ledger)
    for entry in entries:
        if not rows_read[entry.source, entry.file]:
            raise DataError(f"{entry.name}: the file has no rows.")
    joined = {name: np.concatenate(columns.pop(name)) for name in list(columns)}
    removed = np.zeros(len(joined["number"]), bool)
    names = ("document_rows", "document_tokens", "number", "digest", "text_digest", "entry", "row_lengths")
    rows, tokens, number, digest, text_digest, entry, row_lengths = (joined[name] for name in names)
    return _Documents(rows, tokens, number, digest, text_digest, entry, row_lengths, removed)


def _remove_duplicates(
    documents: _Documents,
    pieces: list[PieceFile],
    entries: list[PieceEntry],
    ledger: Ledger,
    labels: list[str],
    settings: dict[str, Any],
) -> None:
    if settings["deduplicate"] == "none":
        return
    found, first = find_equal(documents.text_digest)
    _remove(documents, found, first, EXACT, entries, ledger, labels, settings)
    if settings["deduplicate"] == "near":
        starts = np.searchsorted(documents.entry, np.arange(len(pieces)))

        def read_signatures(chosen: np.ndarray) -> np.ndarray:
            """Return the signatures of documents, piece after piece."""
            signatures = np.empty((len(chosen), HASHES), np.uint32)
            for k in np.unique(documents.entry[chosen]).tolist():
                here = documents.entry[chosen] == k
                signatures[here] = pieces[k].read("signatures")[chosen[here] - starts[k]]
            return signatures

        def read_band(band: int) -> np.ndarray:
            return np.concatenate([piece.read("bands", band, band + 1)[0] for piece in pieces])

        threshold = settings["near_duplicate_threshold"]
        found, twins = find_similar(read_band, read_signatures, threshold, ~documents.removed)
        _remove(documents, found, twins, NEAR, entries, ledger, labels, settings)


def _remove(
    documents: _Documents,
    found: np.ndarray,
    twins: np.ndarray,
    name: str,
    entries: list[PieceEntry],
    ledger: Ledger,
    labels: list[str],
    settings: dict[str, Any],
) -> None:
    """Remove the documents `found`, and move them in the ledger from the trained ones to the bin `name`."""
    documents.removed[found] = True
    starts = np.concatenate([[0], np.cumsum(documents.rows, dtype=np.int64)])
    used = np.add.reduceat(documents.row_lengths.astype(np.int64), starts[:-1]) if len(documents.rows) else starts[:-1]
    source = np.array([entry.source for entry in entries])[documents.entry[found]]
    options = _options(settings)
    for number, label in enumerate(labels):
        chosen = found[source == number]
        if len(chosen):
            # What `count_documents` counts for them is taken back.
            taken = Ledger()
            tokens = documents.tokens[chosen].astype(np.int64)
            count_documents(taken, label, TRAINED, tokens, documents.rows[chosen], used[chosen], options)
            for bin, amount in taken.bins[label].items():
                ledger.count(label, bin, -amount["rows"], -amount["supervised"], -amount["context"])
            ledger.count(label, name, len(chosen), int((tokens - 1).sum()), len(chosen))
    pairs = [
        " = ".join(f"{entries[documents.entry[k]].name}, row {documents.number[k]}" for k in pair)
        for pair in zip(found[:3].tolist(), twins[:3].tolist(), strict=True)
    ]
    if pairs:
        ledger.note(f"{name.capitalize()}s, {len(found):,} in all: {'; '.join(pairs)}{'; ...' * (len(found) > 3)}")


def _options(settings: dict[str, Any]) -> DataOptions:
    """Return the options of the parts that the ledger must know."""
    names = ("max_length", "max_lost", "overlong")
    return DataOptions.model_validate({name: settings[name] for name in names})


def _percentiles(lengths: np.ndarray) -> dict[str, int]:
    percents = (50, 95, 99, 100)
    values = np.percentile(lengths, percents).astype(int).tolist() if len(lengths) else [1] * 4
    return dict(zip(map(str, percents), values, strict=True))


def _file_names(entries: list[PieceEntry]) -> list[str]:
    """Return the names of all files of all sources, in their order."""
    return [next(group).name for _, group in groupby(entries, key=lambda entry: (entry.source, entry.file))]


def _index_arrays(
    documents: _Documents, entries: list[PieceEntry], order: np.ndarray, lengths: np.ndarray
) -> dict[str, np.ndarray]:
    """Return the arrays of INDEX_ARRAYS but for `bins`, for rows that are stored in `order`."""
    places = [(entry.source, entry.file) for entry in entries]
    numbers = {place: k for k, place in enumerate(dict.fromkeys(places))}
    file = np.array([numbers[place] for place in places], np.int32)
    kept = ~documents.removed
    document = np.repeat(np.flatnonzero(kept), documents.rows[kept])[order]  # of each stored row
    stored = np.empty(len(order), np.int64)
    stored[order] = np.arange(len(order))
    return {
        "offsets": np.concatenate([[0], np.cumsum(lengths[order], dtype=np.int64)]),
        "number": documents.number[document],
        "origin": file[documents.entry[document]],
        "digest": documents.digest[document],
        "order": stored,
    }


def _write_tokens(
    documents: _Documents, pieces: list[PieceFile], order: np.ndarray, lengths: np.ndarray, output: Path
) -> tuple[list[dict[str, Any]], int, int]:
    """Write the token ids of the rows in `order`; return the shards, how many were not there, and the largest id."""
    # Where each kept row stands in its piece.
    starts = np.concatenate([[0], np.cumsum(documents.row_lengths, dtype=np.int64)])[:-1]
    entry = np.repeat(documents.entry, documents.rows)
    first_rows = np.searchsorted(entry, np.arange(len(pieces)))
    starts -= np.append(starts, 0)[first_rows][entry]
    kept = np.repeat(~documents.removed, documents.rows)
    entry, starts = entry[kept], starts[kept]

    ends = np.cumsum(lengths[order], dtype=np.int64)
    shards, new, largest, first, before = [], 0, 0, 0, 0
    with Bar("write shards", int(ends[-1])) as bar:
        while first < len(order):
            stop = max(first + 1, int(np.searchsorted(ends, before + SHARD_TOKENS, "right")))
            ids = _gather(pieces, order[first:stop], entry, starts, lengths)
            largest = max(largest, int(ids.max()))
            shard = _write_array(output, "tokens", ids)
            new += shard.pop("new")
            shards.append(shard)
            first, before = stop, int(ends[stop - 1])
            bar.update(before)
    return shards, new, largest


def _gather(
    pieces: list[PieceFile], rows: np.ndarray, entry: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """Return the token ids of `rows` one after the other; they are read in the order of the pieces."""
    ends = np.cumsum(lengths[rows], dtype=np.int64)
    ids = np.empty(int(ends[-1]), np.int32)
    to = ends - lengths[rows]
    by_piece = np.lexsort((starts[rows], entry[rows]))
    borders = np.flatnonzero(np.diff(entry[rows[by_piece]], prepend=-1, append=-1))
    for low, high in pairwise(borders):
        places = by_piece[low:high]
        chosen = rows[places]
        piece, first = pieces[entry[chosen[0]]], int(starts[chosen[0]])
        last = int(starts[chosen[-1]] + lengths[chosen[-1]])
        # One read for all, unless most of what lies between goes to other shards.
        whole = piece.read("input_ids", first, last) if last - first < 8 * int(lengths[chosen].sum()) else None
        for start, length, target in zip(
            starts[chosen].tolist(), lengths[chosen].tolist(), to[places].tolist(), strict=True
        ):
            row = piece.read("input_ids", start, start + length) if whole is None else whole[start - first :][:length]
            ids[target : target + length] = row
    return ids


def _write_array(output: Path, name: str, values: np.ndarray) -> dict[str, Any]:
    """Write an array under a name that says its content, unless it is there; return its entry in the manifest."""
    content = memoryview(np.ascontiguousarray(values).data).cast("B")
    digest = hashlib.sha256(content).hexdigest()
    path = output / SHARD_FILES / f"{name}-{digest[:24]}.bin"
    is_new = not path.is_file() or path.stat().st_size != len(content)
    if is_new:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(content)
    return {"name": path.name, "length": len(values), "sha256": digest} | ({"new": is_new} if name == "tokens" else {})
