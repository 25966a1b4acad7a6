"""The stream: its order is a pure function of seed and epoch, and a step has the same rows for any processes."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from support import make_rows

from accel_llm.chat.targets import IGNORED
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import to_device
from accel_llm.data.rows import Rows
from accel_llm.data.stream import Position, Stream, TrainingPlan, padding_share

PAD = 0
MAX_LENGTH = 16


def documents(count: int = 50, longest: int = 9) -> Rows:
    """Document k is the token k + 1, repeated 2 to `longest` times; all but the first are labels."""
    lengths = np.random.default_rng(7).integers(2, longest + 1, count)
    return make_rows((k + 1, [k + 1] * n, [IGNORED] + [k + 1] * (n - 1)) for k, n in enumerate(lengths.tolist()))


ROWS = documents()


def met(batch: dict[str, Any]) -> list[int]:
    """The documents of a batch, each checked to be whole. The batch of an empty slot has none."""
    if "cu_seqlens" in batch:
        parts = batch["input_ids"][0].split(batch["cu_seqlens"].diff().tolist())
        labels = batch["labels"][0].split(batch["cu_seqlens"].diff().tolist())
    else:
        sizes = batch["attention_mask"].sum(1).tolist()
        parts = [row[:n] for row, n in zip(batch["input_ids"], sizes, strict=True)]
        labels = [row[:n] for row, n in zip(batch["labels"], sizes, strict=True)]
    numbers = []
    for ids, row_labels in zip(parts, labels, strict=True):
        number = int(ids[0])
        if number == PAD:
            assert len(parts) == 1 and len(ids) == 2 and (batch["labels"] == IGNORED).all()
            continue
        expected_ids, expected_labels = ROWS[number - 1]
        assert ids.tolist() == expected_ids.tolist() and row_labels.tolist() == expected_labels.tolist()
        numbers.append(number)
    return numbers


class Cutting:
    """`world` processes with micro-batches of `size` rows, and the rows that they get in a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, world: int, size: int, **options: Any):
        monkeypatch.setenv("WORLD_SIZE", str(world))
        values = {"max_length": MAX_LENGTH, "per_device_train_batch_size": size, **options}
        begin = {"step": values.pop("first_step", 0), "rows": values.pop("first_row", 0)}
        starts = [Position(rank=rank, world=world, **begin) for rank in range(world)]
        self.ranks = [Stream(ROWS, TrainOptions(**values), start, PAD) for start in starts]
        self.plan, self.accumulation = self.ranks[0].plan, self.ranks[0].accumulation

    def batches(self, step: int) -> list[dict[str, Any]]:
        return [rank.micro_batch(step, micro) for micro in range(self.accumulation) for rank in self.ranks]

    def step(self, step: int) -> list[int]:
        return sorted(number for batch in self.batches(step) for number in met(batch))

    def steps(self) -> Iterator[list[int]]:
        return (self.step(step) for step in range(self.plan.total_steps))


CUTTINGS = [(1, 8, 1), (1, 1, 8), (2, 2, 2), (4, 2, 1), (8, 1, 1), (2, 1, 4), (2, 4, 1), (1, 4, 2)]


@pytest.mark.parametrize("packing", [True, False])
def test_a_step_has_the_same_rows_for_any_split_over_processes(monkeypatch, packing):
    runs = [
        list(Cutting(monkeypatch, world, size, gradient_accumulation_steps=accumulation, packing=packing).steps())
        for world, size, accumulation in CUTTINGS
    ]
    # A total that the processes do not divide is cut to the same steps, too.
    runs += [
        list(Cutting(monkeypatch, world, size, total_batch_size=8, packing=packing).steps())
        for world, size in [(1, 1), (1, 3), (3, 1), (3, 2), (5, 1), (8, 2)]
    ]
    assert all(run == runs[0] for run in runs)
    assert len({tuple(step) for step in runs[0]}) == len(runs[0])
    other = Cutting(monkeypatch, 1, 8, packing=packing, seed=43)
    assert list(other.steps()) != runs[0]


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world, size, accumulation", [(1, 1, 1), (3, 2, 2), (4, 1, 3), (2, 5, 1)])
def test_every_document_comes_once_an_epoch(monkeypatch, packing, world, size, accumulation):
    cutting = Cutting(
        monkeypatch, world, size, gradient_accumulation_steps=accumulation, num_train_epochs=3, packing=packing
    )
    assert Counter(number for step in cutting.steps() for number in step) == dict.fromkeys(range(1, 51), 3)
    stream, bins = cutting.ranks[0], cutting.plan.bins
    for epoch in range(3):
        order = [k for position in range(epoch * bins, (epoch + 1) * bins) for k in stream.documents(position)]
        assert sorted(order) == list(range(50))


@pytest.mark.parametrize("packing", [True, False])
def test_order_is_a_pure_function_of_seed_and_epoch(monkeypatch, packing):
    def order(epoch: int, **options: Any) -> list[list[int]]:
        stream = Cutting(monkeypatch, 1, 1, max_steps=10_000, packing=packing, **options).ranks[0]
        bins = stream.plan.bins
        return [stream.documents(position) for position in range(epoch * bins, (epoch + 1) * bins)]

    epochs = [order(epoch) for epoch in (0, 1, 2, 1000)]
    assert [order(epoch) for epoch in (1000, 2, 1, 0)] == epochs[::-1]
    different = [*epochs, order(0, seed=43), order(1, seed=43)]
    assert len({str(one) for one in different}) == len(different)
    assert {len(one) for one in epochs} == {len(epochs[0])}
    if packing:  # another epoch shares rows out anew, it does not only shuffle full rows
        assert {frozenset(row) for row in epochs[0]} != {frozenset(row) for row in epochs[1]}
    else:
        assert epochs[0] != [[k] for k in range(50)]


def test_packed_rows_are_full_and_never_too_long(monkeypatch):
    cutting = Cutting(monkeypatch, 1, 1)
    lengths = [
        batch["input_ids"].shape[1] for step in range(cutting.plan.total_steps) for batch in cutting.batches(step)
    ]
    assert max(lengths) <= MAX_LENGTH and sum(lengths) == ROWS.offsets[-1]
    assert cutting.plan.bins == len(lengths) <= -(-sum(lengths) // MAX_LENGTH) + 1 < 50
    assert Cutting(monkeypatch, 1, 1, packing=False).plan.bins == 50


def test_slots_left_over_by_the_processes_stay_empty(monkeypatch):
    cutting = Cutting(monkeypatch, 3, 1, total_batch_size=8, packing=False)
    assert (cutting.accumulation, cutting.plan.rows_per_step) == (3, 8)
    for step in range(6):
        batches = cutting.batches(step)
        filled = [len(met(batch)) for batch in batches]
        assert filled[:6] == [1] * 6 and sorted(filled[6:]) == [0, 1, 1]
        filler = batches[filled.index(0)]
        assert filler["input_ids"].tolist() == [[PAD, PAD]] and filler["labels"].tolist() == [[IGNORED, IGNORED]]
    two_a_slot = Cutting(monkeypatch, 3, 2, total_batch_size=8, packing=False)
    filled = [len(met(batch)) for batch in two_a_slot.batches(0)]
    assert filled[:3] == [2, 2, 2] and sorted(filled[3:]) == [0, 0, 2]


@pytest.mark.parametrize("packing", [True, False])
def test_the_last_step_is_not_filled_up_with_a_further_epoch(monkeypatch, packing):
    cutting = Cutting(monkeypatch, 2, 2, gradient_accumulation_steps=2, packing=packing, num_train_epochs=1)
    bins, plan = cutting.plan.bins, cutting.plan
    assert bins % 8 and plan == TrainingPlan(bins, 8, bins, bins // 8 + 1)
    steps = list(cutting.steps())
    assert sorted(number for step in steps for number in step) == list(range(1, 51))
    used = [batch for batch in cutting.batches(plan.total_steps - 1) if met(batch)]
    assert len(used) < 4 and cutting.step(plan.total_steps) == [] == cutting.step(plan.total_steps + 9)
    endless = Cutting(monkeypatch, 2, 2, gradient_accumulation_steps=2, packing=packing, max_steps=plan.total_steps)
    assert all(met(batch) for batch in endless.batches(plan.total_steps - 1))
    assert list(endless.steps())[:-1] == steps[:-1]


def test_max_steps_cross_epochs(monkeypatch):
    cutting = Cutting(monkeypatch, 1, 8, packing=False, max_steps=25)
    assert cutting.plan == TrainingPlan(50, 8, None, 25)
    steps = list(cutting.steps())
    assert [len(step) for step in steps] == [8] * 25
    counts = Counter(number for step in steps for number in step)
    assert counts == dict.fromkeys(range(1, 51), 4)
    assert [cutting.plan.epoch(step) for step in (0, 1, 6, 7, 25)] == [0.0, 0.16, 0.96, 1.12, 4.0]
    # Step 6 (from 0) holds the last 2 rows of the first epoch and the first 6 of the second.
    stream = cutting.ranks[0]
    assert steps[6] == sorted(stream.documents(position)[0] + 1 for position in range(48, 56))


@pytest.mark.parametrize("epochs, rows, steps, reached", [(1.5, 75, 10, 1.5), (0.1, 5, 1, 0.1), (1e-4, 1, 1, 0.02)])
def test_fractional_epochs(monkeypatch, epochs, rows, steps, reached):
    cutting = Cutting(monkeypatch, 2, 4, packing=False, num_train_epochs=epochs)
    assert cutting.plan == TrainingPlan(50, 8, rows, steps) and cutting.plan.epoch(steps) == reached
    counts = Counter(number for step in cutting.steps() for number in step)
    assert sum(counts.values()) == rows and max(counts.values()) == -(-rows // 50)


@pytest.mark.parametrize("packing", [True, False])
def test_a_stream_that_starts_late_is_the_end_of_the_whole_stream(monkeypatch, packing):
    options = {"gradient_accumulation_steps": 3, "packing": packing, "num_train_epochs": 4}
    for world in (1, 2):
        whole = Cutting(monkeypatch, world, 2, **options)
        steps = whole.plan.total_steps
        late = Cutting(monkeypatch, world, 2, **options)
        for rank in range(world):
            early = list(islice(whole.ranks[rank].batches(), 3 * steps))
            for first in (1, steps // 2, steps - 1):
                tail = list(islice(late.ranks[rank].batches(first), 3 * (steps - first)))
                assert len(tail) == len(early[3 * first :])
                for one, other in zip(early[3 * first :], tail, strict=True):
                    assert one.keys() == other.keys()
                    assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one)


@pytest.mark.parametrize("size, world", [(2, 1), (3, 2), (1, 5), (7, 1)])
def test_no_row_is_lost_or_repeated_when_the_rows_per_step_change(monkeypatch, size, world):
    """After three steps of 8 rows, a run with size x world rows per step ends where the data ends."""
    before = Cutting(monkeypatch, 1, 8, packing=False, num_train_epochs=2)
    rows_before = [number for step in range(3) for number in before.step(step)]
    after = Cutting(monkeypatch, world, size, packing=False, num_train_epochs=2, first_step=3, first_row=24)
    assert after.plan.rows_per_step == size * world and after.plan.total_steps == 3 + -(-76 // (size * world))
    assert after.plan.rows_at(3) == 24 and after.plan.epoch(after.plan.total_steps) == 2.0
    left = [number for step in range(3, after.plan.total_steps) for number in after.step(step)]
    assert Counter(rows_before + left) == dict.fromkeys(range(1, 51), 2)
    begin = 24 + size * world
    assert after.step(4) == sorted(before.ranks[0].documents(k)[0] + 1 for k in range(begin, begin + size * world))


@pytest.mark.parametrize("world, size", [(1, 4), (2, 2), (4, 8), (3, 2)])
def test_groups_of_similar_length_go_on_with_the_same_rows_on_other_processes(monkeypatch, world, size):
    """200 rows for 3 epochs: 5 steps of 16 rows by 2 processes, then a resume; the sequence of rows is one."""
    monkeypatch.setitem(globals(), "ROWS", documents(200, 40))
    options = {"packing": False, "order": "group_by_length", "max_length": 40, "num_train_epochs": 3}
    before = Cutting(monkeypatch, 2, 8, **options)
    whole = [k + 1 for position in range(600) for k in before.ranks[0].documents(position)]
    for step in range(5):
        assert before.step(step) == sorted(whole[16 * step : 16 * step + 16])
    after = Cutting(monkeypatch, world, size, first_step=5, first_row=80, **options)
    rows = after.plan.rows_per_step
    assert after.plan.total_steps == 5 + -(-520 // rows)
    for step in range(5, after.plan.total_steps):
        begin = 80 + (step - 5) * rows
        assert after.step(step) == sorted(whole[begin : begin + rows])
    assert Counter(whole) == dict.fromkeys(range(1, 201), 3)
    assert whole != [
        k + 1
        for position in range(600)
        for k in Cutting(monkeypatch, 1, 1, **options, seed=1).ranks[0].documents(position)
    ]


@pytest.mark.parametrize("order", ["shuffle", "group_by_length", "source"])
@pytest.mark.parametrize("world, size, total", [(1, 1, 1), (1, 4, 4), (2, 8, 32), (1, 3, 8), (3, 2, 8), (1, 64, 64)])
def test_the_share_of_padding_is_that_of_the_batches_of_an_epoch(monkeypatch, order, world, size, total):
    options = {"packing": False, "order": order, "total_batch_size": total, "num_train_epochs": 1}
    cutting = Cutting(monkeypatch, world, size, **options)
    steps = range(cutting.plan.total_steps)
    masks = [batch["attention_mask"] for step in steps for batch in cutting.batches(step) if met(batch)]
    expected = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    share = padding_share(ROWS, cutting.ranks[0].options, cutting.plan.rows_per_step)
    assert share == pytest.approx(expected, abs=1e-12) and (share > 0) == (size > 1)


def test_processes_never_share_a_row(monkeypatch):
    cutting = Cutting(monkeypatch, 4, 1, gradient_accumulation_steps=2)
    for step in range(cutting.plan.total_steps):
        numbers = [number for batch in cutting.batches(step) for number in met(batch)]
        assert len(numbers) == len(set(numbers))


def test_to_device_moves_tensors_and_keeps_the_rest():
    batch = {"input_ids": torch.ones(1, 2), "max_seqlen": 2}
    moved = to_device(batch, torch.device("meta"))
    assert moved["input_ids"].device.type == "meta" and moved["max_seqlen"] == 2
    assert batch["input_ids"].device.type == "cpu"
