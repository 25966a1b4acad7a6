"""Texts that are read, encoded and packed while the run trains, through a buffer of a few hundred rows.

A block is what the buffer holds at a time. Its rows are a pure function of where it begins: the place in the files, and
the few documents that were left over before. That is what a checkpoint keeps. A resumed run reads this one block again,
however far it is in its data, and whatever its number of processes: each of them reads the same stream, and trains its
own rows of it.
"""

import base64
import copy
import itertools
import threading
import zlib
from array import array
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from accel_llm.config.options import TrainOptions
from accel_llm.data.encode import Encoder
from accel_llm.data.encoders import encode_rows
from accel_llm.data.ledger import Ledger
from accel_llm.data.limits import check_lost_share
from accel_llm.data.packing import Bins, pack, pack_in_order
from accel_llm.data.rows import ARRAYS, Origin, RowPart, Rows, as_rows
from accel_llm.data.text_reader import StreamedFile, TextPlace, TextReader
from accel_llm.errors import DataError

BUFFER_ROWS = 256  # full rows of a block
NEARLY_FULL = 0.995  # rows that are less full wait for the next block
ROWS_LEFT = BUFFER_ROWS // 8  # that may wait
ROWS_BEFORE_CHECK = 1000  # of the sources, before their lost share is judged
STEPS_KEPT = 4  # rows of so many steps stay in memory: of the one that trains, and of those that are made ahead


@dataclass
class BlockStart:
    """Where a block begins: the number of its first row, its place in the files, and the documents that were left over."""

    row: int = 0
    block: int = 0
    place: TextPlace = field(default_factory=TextPlace)
    waiting: RowPart = field(default_factory=RowPart)
    ledger: Ledger = field(default_factory=Ledger)  # of all rows before

    def to_dict(self) -> dict[str, Any]:
        """Return the start as plain values for JSON; `from_dict` reads them back."""
        waiting = {name: _as_text(getattr(self.waiting, name)) for name in ARRAYS if len(getattr(self.waiting, name))}
        values = {"row": self.row, "block": self.block, "place": self.place.to_dict()}
        return values | {"waiting": waiting, "ledger": self.ledger.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "BlockStart":
        """Rebuild a start from the plain values of `to_dict`."""
        waiting = RowPart(**{name: _as_array(text, ARRAYS[name]) for name, text in values["waiting"].items()})
        place, ledger = TextPlace.from_dict(values["place"]), Ledger.from_dict(values["ledger"])
        return cls(values["row"], values["block"], place, waiting, ledger)


def _as_text(values: array) -> str:
    return base64.b64encode(zlib.compress(values.tobytes())).decode("ascii")


def _as_array(text: str, kind: str) -> array:
    values = array(kind)
    values.frombytes(zlib.decompress(base64.b64decode(text)))
    return values


@dataclass(frozen=True)
class Block:
    """The packed rows of the buffer; `serial` makes the numbers of its documents unique in this process."""

    start: BlockStart
    epochs: tuple[float, float]  # passed through before and after it
    rows: Rows
    bins: Bins
    serial: int

    @property
    def end(self) -> int:
        """The number of the first row after the block."""
        return self.start.row + len(self.bins.offsets) - 1


class StreamedRows:
    """The documents of the blocks that are in memory, looked up as those of `Rows`.

    The number of a document is the serial number of its block times 2^32, plus its index there.
    """

    rows_per_unit: ClassVar[int] = 1

    def __init__(self) -> None:
        self.blocks: dict[int, Block] = {}

    def _find(self, k: int) -> tuple[Rows, int]:
        return self.blocks[k >> 32].rows, k & 0xFFFFFFFF

    def __getitem__(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        rows, index = self._find(k)
        return rows[index]

    def label_weights(self, indices: list[int]) -> list[np.ndarray] | None:
        """Return for each document how much its labels count, float32 [n]; None if every label counts 1."""
        found = [self._find(k) for k in indices]
        if all(rows.weights is None for rows, _ in found):
            return None
        weights = [(rows.label_weights([index]), rows[index][0]) for rows, index in found]
        return [np.ones(len(ids), np.float32) if some is None else some[0] for some, ids in weights]

    def name(self, k: int) -> str:
        """Return file and number of a document, as messages name it."""
        rows, index = self._find(k)
        return rows.name(index)

    def lengths_of(self, indices: list[int]) -> np.ndarray:
        """Return the tokens of documents, int64 [n]."""
        return np.array([len(self[k][0]) for k in indices], np.int64)

    def sources_of(self, indices: list[int]) -> np.ndarray:
        """Return the numbers of the sources of documents, int64 [n]."""
        found = [self._find(k) for k in indices]
        return np.array([rows.origins[rows.origin[index]].source for rows, index in found], np.int64)


class TextStream:
    """The endless sequence of packed rows of some files. While the rows of a block are trained, the next one is made.

    With `order: shuffle` the documents of a block are packed by best fit and its rows shuffled; with `order: source` they
    are packed one after the other, as `pack_in_order` packs an epoch of materialised ones.
    """

    def __init__(
        self,
        encoder: Encoder,
        options: TrainOptions,
        files: list[StreamedFile],
        number: int | None,
        streamed: StreamedRows,
        serials: Iterator[int],
        start: BlockStart,
        largest_id: int,
    ):
        """`number` is that of the source to read, None for all of `files`. `serials` number the blocks of this process.

        An id above `largest_id` is an error.
        """
        self.encoder, self.options, self.streamed, self.serials = encoder, options, streamed, serials
        self.origins = tuple(Origin(each.number, each.file.label) for each in files)
        own = [k for k, each in enumerate(files) if number in (None, each.number)]
        seed = options.seed if options.order == "shuffle" else None
        self.number, self.largest_id = number or 0, largest_id
        self.reader = TextReader([files[k] for k in own], own, seed, copy.deepcopy(start.place))
        self.blocks: list[Block] = []
        self.lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, "stream")
        self._next: Future[tuple[Block, BlockStart]] = self._thread.submit(self._make_block, start)

    def documents(self, row: int) -> list[int]:
        """Return the numbers of the documents of row `row` (from 0). Rows come in their order, the last ones also again."""
        with self.lock:
            block = self._block(row)
        order, offsets = block.bins
        index = row - block.start.row
        return [(block.serial << 32) | k for k in order[offsets[index] : offsets[index + 1]].tolist()]

    def first_round(self) -> tuple[Bins, np.ndarray]:
        """Return the rows of the first block in memory, and the tokens of their documents in that order."""
        with self.lock:
            block = self.blocks[0] if self.blocks else self._add_block()
        numbers = block.bins.order.astype(np.int64) | (block.serial << 32)  # packing may give int32
        return Bins(numbers, block.bins.offsets), block.rows.lengths[block.bins.order]

    def epoch(self, rows: int) -> float:
        """Return how often the files were passed through after so many rows."""
        with self.lock:
            block = self._block(max(rows - 1, 0))
        before, after = block.epochs
        return before + (after - before) * (rows - block.start.row) / (block.end - block.start.row)

    def state(self, rows: int) -> dict[str, Any]:
        """Return what a checkpoint keeps after so many rows: where the block of the next row begins."""
        with self.lock:
            return self._block(rows).start.to_dict()

    def ledger(self, rows: int) -> Ledger:
        """Return the ledger of all that was read for the first `rows` rows, whole blocks."""
        with self.lock:
            block = self._block(max(rows - 1, 0))
            following = [each for each in self.blocks if each.start.row == block.end]
        return following[0].start.ledger if following else self._next.result()[0].start.ledger

    def forget_before(self, row: int) -> None:
        """Drop the blocks that end before `row`."""
        with self.lock:
            while self.blocks and self.blocks[0].end <= row:
                self.streamed.blocks.pop(self.blocks.pop(0).serial)

    def _block(self, row: int) -> Block:
        if not self.blocks:
            self._add_block()
        while self.blocks[-1].end <= row:
            self._add_block()
        for block in self.blocks:
            if block.start.row <= row < block.end:
                return block
        raise RuntimeError(
            f"row {row} of the stream is no longer in memory; its first block begins at {self.blocks[0].start.row}"
        )

    def _add_block(self) -> Block:
        block, following = self._next.result()
        self._next = self._thread.submit(self._make_block, following)
        self.blocks.append(block)
        self.streamed.blocks[block.serial] = block
        return block

    def _make_block(self, start: BlockStart) -> tuple[Block, BlockStart]:
        """Read and pack a block; return it, and where the next one begins."""
        part, ledger = copy.deepcopy(start.waiting), copy.deepcopy(start.ledger)
        waited, before = len(part.lengths), self.reader.epochs()
        ended = self._read(part, ledger)
        lengths = np.minimum(np.array(part.lengths) + self.options.virtual_tokens, self.options.max_length)
        arrays = {name: np.array(getattr(part, name), kind) for name, kind in ARRAYS.items()}
        rows = as_rows(arrays, self.origins)
        if int(rows.input_ids.max()) > self.largest_id:
            k = int(np.searchsorted(rows.offsets, int(rows.input_ids.argmax()), "right")) - 1
            raise DataError(
                f"tokenizer_name: {rows.name(k)} holds token id {rows.input_ids.max()}, but the model's vocabulary ends "
                f"with {self.largest_id}; use the model's own tokenizer."
            )
        bins, left = self._pack(lengths, waited, start.block, ended)
        block = Block(start, (before, self.reader.epochs()), rows, bins, next(self.serials))
        place = copy.deepcopy(self.reader.place)
        return block, BlockStart(block.end, start.block + 1, place, _chosen(part, left), ledger)

    def _read(self, part: RowPart, ledger: Ledger) -> bool:
        """Fill the buffer; return whether it ends with an epoch. In `order: source` it does so at the latest."""
        wanted, in_order = BUFFER_ROWS * self.options.max_length, self.options.order == "source"
        epoch, found = self.reader.place.epoch, len(part.lengths)
        while len(part.input_ids) < wanted:
            source_rows, ended = self.reader.read_part()
            if source_rows:
                chunk = encode_rows(source_rows, self.encoder)
                append_rows(part, chunk.part)
                ledger.merge(chunk.ledger)
            if ended and len(part.lengths) == found and self.reader.place.epoch > epoch + 1:
                raise DataError("train_files: no row of the streamed sources is left to train on.")
            if ended and in_order and len(part.lengths):
                break
        else:
            ended = False
        if sum(amount["rows"] for amount in ledger.inputs.values()) >= ROWS_BEFORE_CHECK:
            percents = {str(percent): int(np.percentile(part.lengths, percent)) for percent in (50, 95, 99, 100)}
            check_lost_share(ledger, percents, self.options)
        return ended

    def _pack(self, lengths: np.ndarray, waited: int, block: int, ended: bool) -> tuple[Bins, np.ndarray]:
        """Return the rows of a block, and the indices of the documents that wait for the next one.

        The first `waited` documents have waited already.
        """
        nothing, capacity = np.zeros(0, np.int64), self.options.max_length
        if self.options.order == "source":
            if not self.options.packing:
                return Bins(np.arange(len(lengths)), np.arange(len(lengths) + 1)), nothing
            bins = pack_in_order(lengths, capacity)
            last = len(bins.offsets) - 2
            keep = last if last and not ended else last + 1  # the last row may go on in the next block
            return Bins(bins.order[: bins.offsets[keep]], bins.offsets[: keep + 1]), bins.order[bins.offsets[keep] :]
        # A key that no epoch of rows has (data/order.py), and that no other source has.
        key = [self.options.seed, 2**61 + (self.number << 40) + block]
        rng = np.random.Generator(np.random.Philox(key=key))
        if not self.options.packing:
            return Bins(rng.permutation(len(lengths)), np.arange(len(lengths) + 1)), nothing
        return hold_back(pack(lengths, capacity, rng), lengths, waited, capacity)


def hold_back(bins: Bins, lengths: np.ndarray, waited: int, capacity: int) -> tuple[Bins, np.ndarray]:
    """Return the rows of `bins` that are full, and the indices of the documents of the others, which shall wait.

    At most ROWS_LEFT rows wait, the emptiest ones, and none of a document below `waited`: it has waited once.
    """
    sizes = np.diff(bins.offsets)
    tokens = np.add.reduceat(lengths[bins.order], bins.offsets[:-1])
    may_wait = (np.minimum.reduceat(bins.order, bins.offsets[:-1]) >= waited) & (tokens < NEARLY_FULL * capacity)
    emptiest = np.flatnonzero(may_wait)[np.argsort(tokens[may_wait], kind="stable")]
    waits = np.zeros(len(sizes), bool)
    waits[emptiest[: min(ROWS_LEFT, len(sizes) - 1)]] = True
    kept = ~np.repeat(waits, sizes)
    rest = Bins(bins.order[kept], np.concatenate([[0], np.cumsum(sizes[~waits])]))
    return rest, np.sort(bins.order[~kept])


def append_rows(part: RowPart, more: RowPart) -> None:
    """Append the rows of `more` to `part`."""
    if more.weights and not part.weights:
        part.weights.extend([1.0] * len(part.labels))
    for name in ARRAYS:
        getattr(part, name).extend(getattr(more, name))
    if part.weights and not more.weights:
        part.weights.extend([1.0] * len(more.labels))


def _chosen(part: RowPart, indices: np.ndarray) -> RowPart:
    """Return the rows of `part` at `indices`."""
    chosen, offsets = RowPart(), list(itertools.accumulate(part.lengths, initial=0))
    for k in indices.tolist():
        tokens = slice(offsets[k], offsets[k + 1])
        weights = part.weights[tokens].tolist() if part.weights else None
        ids, labels = part.input_ids[tokens], part.labels[tokens]
        chosen.add(ids, labels, weights, part.number[k], part.origin[k], part.digest[k])
    return chosen
