"""Batches of answers: exact targets, packed with and without shared prompts and padded, and the stream of pairs."""

from array import array
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_llm.chat.targets import IGNORED
from accel_llm.config.options import TrainOptions
from accel_llm.data.answers import Pairs, advise_weights, as_units, collate_answers, count_labels
from accel_llm.data.batches import Batch
from accel_llm.data.encode_answers import count_shared
from accel_llm.data.rows import ARRAYS, RowPart, Rows, as_rows
from accel_llm.data.stream import Position, Stream, evaluation_batches, padding_share
from accel_llm.errors import DataError

PAD = 0
Answer = tuple[list[int], list[int]]  # ids and labels


def make_answers(answers: list[Answer], labels: list[int] | None = None) -> Rows:
    """Rows of answers: pairs, or with `labels` single ones. The reference of row k is -k."""
    part = RowPart()
    for k, (ids, row_labels) in enumerate(answers):
        part.add(array("i", ids), array("i", row_labels), None, k // 2 + 1 if labels is None else k + 1, 0, k)
    if labels is None:
        for first in range(0, len(answers), 2):
            pair = [(array("i", ids), array("i", row_labels)) for ids, row_labels in answers[first : first + 2]]
            part.shared.extend([count_shared(pair)] * 2)
            part.margin.extend([first / 4] * 2)
    else:
        part.label.extend(labels)
    rows = as_rows({name: np.array(getattr(part, name), kind) for name, kind in ARRAYS.items()}, [(0, "rows")])
    return replace(rows, reference=-np.arange(len(answers), dtype=np.float64))


X = IGNORED
# The first pair shares three tokens; the second one two, because its sides agree in the first token of the answer too.
HAND_MADE: list[Answer] = [
    ([5, 6, 7, 20, 21, 3], [X, X, X, 20, 21, X]),
    ([5, 6, 7, 30, 31, 32, 3], [X, X, X, 30, 31, 32, X]),
    ([8, 9, 40, 41], [X, X, 40, 41]),
    ([8, 9, 40, 51], [X, X, 40, 51]),
]


def plain(batch: Batch) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


COMMON = {
    "answer_ids": [20, 21, 30, 31, 32, 40, 41, 40, 51],
    "answer_numbers": [0, 0, 1, 1, 1, 2, 2, 3, 3],
    "answer_lengths": [2, 3, 2, 2],
    "num_targets": 9,
    "total_weight": 2.0,
    "reference": [0, -1, -2, -3],
    "margins": [0.0, 0.5],
}


def test_a_packed_row_holds_a_shared_prompt_once() -> None:
    batch = collate_answers(Pairs(make_answers(HAND_MADE)), [0, 1], True, PAD)
    assert plain(batch) == COMMON | {
        "input_ids": [[5, 6, 7, 20, 21, 3, 30, 31, 32, 3, 8, 9, 40, 41, 40, 51]],
        "position_ids": [[0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 0, 1, 2, 3, 2, 3]],
        "cu_seqlens": [0, 6, 10, 14, 16],
        "lengths": [6, 4, 4, 2],
        "max_seqlen": 6,
        # The first token of a rejected answer is predicted at the last place of the prompt, as that of the chosen one.
        "answer_positions": [2, 3, 2, 6, 7, 11, 12, 11, 14],
        "target_columns": [2, 3, 6, 7, 11, 12, 14],
        "last_positions": [5, 9, 13, 15],
        "key_positions": [0, 1, 2, 3, 4, 5, 0, 1, 2, 6, 7, 8, 9, 10, 11, 12, 13, 10, 11, 14, 15],
        "cu_seqlens_k": [0, 6, 13, 17, 21],
        "max_seqlen_k": 7,
        "key_lengths": [6, 7, 4, 4],
    }
    kinds = {name: (value.dtype, value.dim()) for name, value in batch.items() if isinstance(value, torch.Tensor)}
    assert kinds == {
        **dict.fromkeys(("input_ids", "position_ids"), (torch.int64, 2)),
        **dict.fromkeys(("answer_positions", "answer_ids", "answer_numbers", "target_columns"), (torch.int64, 1)),
        **dict.fromkeys(("last_positions", "key_positions"), (torch.int64, 1)),
        **dict.fromkeys(("cu_seqlens", "cu_seqlens_k"), (torch.int32, 1)),
        "reference": (torch.float64, 1),
        "margins": (torch.float32, 1),
    }


def test_without_sharing_each_answer_has_its_prompt() -> None:
    rows = make_answers(HAND_MADE)
    batch = plain(collate_answers(Pairs(rows, share_prompts=False), [1, 0], True, PAD))
    assert batch["input_ids"] == [[*HAND_MADE[2][0], *HAND_MADE[3][0], *HAND_MADE[0][0], *HAND_MADE[1][0]]]
    assert batch["position_ids"] == [[*range(4), *range(4), *range(6), *range(7)]]
    assert batch["answer_positions"] == [1, 2, 5, 6, 10, 11, 16, 17, 18]
    assert batch["last_positions"] == [3, 7, 13, 20] and "key_positions" not in batch
    assert (batch["reference"], batch["margins"]) == ([-2, -3, 0, -1], [0.5, 0])
    padded = plain(collate_answers(Pairs(rows), [0, 1], False, PAD))
    assert padded == COMMON | {
        "input_ids": [[*ids, *[PAD] * (7 - len(ids))] for ids, _ in HAND_MADE],
        "attention_mask": [[*[1] * len(ids), *[0] * (7 - len(ids))] for ids, _ in HAND_MADE],
        "lengths": [6, 7, 4, 4],
        "answer_positions": [2, 3, 9, 10, 11, 15, 16, 22, 23],
        "target_columns": [1, 2, 3, 4],
        "last_positions": [5, 13, 17, 24],
    }


def test_places_for_virtual_tokens_come_before_each_answer() -> None:
    rows = make_answers(HAND_MADE)
    batch = plain(collate_answers(Pairs(rows), [0], True, PAD, virtual=2))
    assert batch["lengths"] == [8, 9] and batch["virtual_positions"] == [0, 1, 8, 9] and "key_positions" not in batch
    assert batch["answer_positions"] == [4, 5, 12, 13, 14] and batch["last_positions"] == [7, 16]
    padded = plain(collate_answers(Pairs(rows), [0], False, PAD, virtual=2))
    assert padded["answer_positions"] == [4, 5, 13, 14, 15] and padded["virtual_positions"] == [0, 1, 9, 10]


def test_single_answers_have_labels() -> None:
    rows = make_answers(HAND_MADE, labels=[1, 0, 0, 1])
    assert as_units(rows) is rows
    batch = plain(collate_answers(rows, [3, 1], True, PAD))
    assert batch["labels_of_answers"] == [True, False] and batch["total_weight"] == 2.0
    assert batch["answer_numbers"] == [0, 0, 1, 1, 1] and batch["answer_ids"] == [40, 51, 30, 31, 32]
    assert batch["answer_positions"] == [1, 2, 6, 7, 8] and batch["reference"] == [-3, -1]
    assert "margins" not in batch and "key_positions" not in batch
    assert rows.label is not None
    assert count_labels(rows.label[:3]) == "Answers to train on: 1 desirable, 2 undesirable."
    with pytest.raises(DataError, match="all 2 answers are undesirable; KTO needs desirable ones too"):
        count_labels(np.array([0, 0], np.int8))


def test_weights_far_from_those_of_the_paper_bring_advice() -> None:
    labels = np.array([1] * 10 + [0] * 90, np.int8)
    advice = advise_weights(labels, 1, 1)
    assert (
        advice
        and advice.startswith("desirable_weight: ")
        and "weigh 0.11 times" in advice
        and " 9 makes it 1" in advice
    )
    advice = advise_weights(1 - labels, 1, 2)
    assert advice and advice.startswith("undesirable_weight: ") and "weigh 4.5 times" in advice and " 9 makes" in advice
    assert advise_weights(labels, 9, 1) is advise_weights(labels, 12, 1) is advise_weights(labels, 0, 1) is None


@pytest.mark.parametrize("packed", [True, False])
def test_an_empty_slot_adds_nothing(packed: bool) -> None:
    pairs, single = Pairs(make_answers(HAND_MADE)), make_answers(HAND_MADE, [1, 0, 1, 0])
    for rows in (pairs, single):
        batch = plain(collate_answers(rows, [], packed, PAD))
        assert batch["input_ids"] == [[PAD, PAD]] and batch["lengths"] == [2]
        assert batch["total_weight"] == batch["num_targets"] == 0 and batch["target_columns"] == [0]
        for name in (
            "answer_positions",
            "answer_ids",
            "answer_numbers",
            "answer_lengths",
            "last_positions",
            "reference",
        ):
            assert batch[name] == []
        # All ranks take the same way through the attention.
        full = collate_answers(rows, [0], packed, PAD)
        assert full.keys() == batch.keys() and batch.get("key_positions", [0, 1]) == [0, 1]


@st.composite
def random_pairs(draw: st.DrawFn) -> list[Answer]:
    """Pairs of which some share a prompt of some tokens, some begin their answers alike, and some share nothing."""
    token = st.integers(3, 9)
    answers: list[Answer] = []
    for _ in range(draw(st.integers(1, 6))):
        prompt = draw(st.lists(token, min_size=1, max_size=8))
        for _ in range(2):
            own = draw(st.lists(st.tuples(token, st.booleans()), min_size=1, max_size=6))
            ids, trained = [*prompt, *(one for one, _ in own)], [False] * len(prompt) + [flag for _, flag in own]
            trained[draw(st.integers(len(prompt), len(ids) - 1))] = True
            answers.append((ids, [one if flag else IGNORED for one, flag in zip(ids, trained, strict=True)]))
    return answers


def attended(batch: Batch) -> list[list[tuple[int, int]]]:
    """For each place of the flattened rows: the (token, position) pairs that it sees, by a loop over single places."""
    ids = batch["input_ids"].flatten().tolist()
    if "attention_mask" in batch:
        width = batch["input_ids"].shape[1]
        return [[(ids[k - k % width + c], c) for c in range(k % width + 1)] for k in range(len(ids))]
    positions, ends = batch["position_ids"].flatten().tolist(), batch["cu_seqlens"].tolist()
    keys = batch.get("key_positions", torch.arange(len(ids))).tolist()
    key_ends = batch.get("cu_seqlens_k", batch["cu_seqlens"]).tolist()
    seen = []
    for document in range(len(ends) - 1):
        own = keys[key_ends[document] : key_ends[document + 1]]
        count = ends[document + 1] - ends[document]
        for k in range(count):  # causal from the last key and the last query backwards
            seen.append([(ids[key], positions[key]) for key in own[: len(own) - count + k + 1]])
    return seen


@settings(max_examples=60, deadline=None)
@given(random_pairs(), st.sampled_from(["shared", "separate", "padded"]), st.randoms())
def test_every_target_is_predicted_from_its_own_answer(answers: list[Answer], how: str, random: Any) -> None:
    rows = make_answers(answers)
    units = list(range(len(answers) // 2))
    random.shuffle(units)
    pairs = Pairs(rows, share_prompts=how == "shared")
    batch = collate_answers(pairs, units, how != "padded", PAD)
    seen = attended(batch)

    # Naive: each label of each answer, in order, with all the tokens before it.
    expected = []
    for number, row in enumerate(2 * unit + side for unit in units for side in (0, 1)):
        ids, labels = answers[row]
        for k in range(1, len(ids)):
            if labels[k] != IGNORED:
                expected.append((number, ids[k], [(ids[c], c) for c in range(k)]))
    fields = (batch["answer_numbers"], batch["answer_ids"], batch["answer_positions"])
    found = [(n, i, seen[p]) for n, i, p in zip(*(field.tolist() for field in fields), strict=True)]
    assert found == expected and batch["num_targets"] == len(expected)
    assert batch["answer_lengths"] == np.bincount(batch["answer_numbers"].numpy(), minlength=2 * len(units)).tolist()
    # The last token of each answer sees all of it.
    for number, place in enumerate(batch["last_positions"].tolist()):
        ids = answers[2 * units[number // 2] + number % 2][0]
        assert seen[place] == list(zip(ids, range(len(ids)), strict=True))
    # The row is as long as the pairs say.
    if how != "padded":
        assert batch["input_ids"].shape[1] == sum(batch["lengths"]) == pairs.lengths[units].sum()


def many_pairs(count: int = 40) -> list[Answer]:
    rng, answers = np.random.default_rng(5), []
    for k in range(count):
        prompt = [k + 10] * int(rng.integers(1, 12))
        for side in (0, 1):
            answer = [k + 100, side + 1] * int(rng.integers(1, 5))
            answers.append(([*prompt, *answer], [IGNORED] * len(prompt) + answer))
    return answers


MANY = many_pairs()


def met(batch: Batch) -> list[tuple[int, list[int]]]:
    """The targets of each answer of a batch, with its number in the pair."""
    parts = batch["answer_ids"].split(batch["answer_lengths"]) if batch["answer_lengths"] else ()
    return [(number % 2, part.tolist()) for number, part in enumerate(parts)]


def expected_targets(times: int = 1) -> Counter:
    return Counter(str((k % 2, [i for i in labels if i != IGNORED])) for k, (_, labels) in enumerate(MANY * times))


@pytest.mark.parametrize("packing", ["per_epoch", "static", False])
@pytest.mark.parametrize("world, size, accumulation", [(1, 4, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1)])
def test_the_stream_never_divides_a_pair(
    monkeypatch: Any, packing: Any, world: int, size: int, accumulation: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    options = TrainOptions(
        max_length=48,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulation,
        packing=packing,
        num_train_epochs=2,
    )
    pairs = Pairs(make_answers(MANY))
    streams = [Stream(pairs, options, Position(rank=rank, world=world), PAD, collate_answers) for rank in range(world)]
    steps = streams[0].plan.total_steps
    seen: Counter = Counter()
    by_step = []
    for step in range(steps):
        batches = [stream.micro_batch(step, micro) for micro in range(accumulation) for stream in streams]
        answers = [answer for batch in batches for answer in met(batch)]
        for batch in batches:
            sides = met(batch)
            assert [side for side, _ in sides] == [0, 1] * (len(sides) // 2) and len(sides) == 2 * batch["total_weight"]
            assert all(one[1][0] == other[1][0] for one, other in zip(sides[::2], sides[1::2], strict=True))
            if packing:
                assert batch["input_ids"].shape[1] <= 48 * size
        by_step.append(sorted(map(str, answers)))
        seen.update(map(str, answers))
    assert seen == expected_targets(times=2)
    # A step has the same pairs, however it is divided.
    monkeypatch.setenv("WORLD_SIZE", "1")
    alone = Stream(
        pairs, options.model_copy(update={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}), Position(),
        PAD, collate_answers,
    )  # fmt: skip
    assert by_step == [sorted(map(str, met(alone.micro_batch(step, 0)))) for step in range(steps)]
    # A pair whose prompt is not shared after all may fill a row that is longer: the plan stays the same.
    apart = Stream(Pairs(pairs.rows, share_prompts=False), options, Position(), PAD, collate_answers)
    assert apart.micro_batch(0, 0)["num_targets"] > 0


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("world, size", [(1, 1), (2, 3), (3, 2), (8, 4)])
def test_evaluation_counts_each_pair_once(packing: bool, world: int, size: int) -> None:
    options = TrainOptions(max_length=48, per_device_eval_batch_size=size, packing=packing)
    pairs = Pairs(make_answers(MANY))
    ranks = [list(evaluation_batches(pairs, options, r, world, PAD, collate_answers)) for r in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert Counter(str(one) for batches in ranks for batch in batches for one in met(batch)) == expected_targets()
    assert sum(batch["total_weight"] for batches in ranks for batch in batches) == len(pairs)


@pytest.mark.parametrize("virtual", [0, 3])
def test_the_share_of_padding_counts_the_prompt_of_each_answer(virtual: int) -> None:
    """Without packing a pair is two rows, each with its prompt and its virtual tokens."""
    method = {"method": "prompt_tuning", "method_options": {"num_virtual_tokens": virtual}} if virtual else {}
    options = TrainOptions(packing=None, per_device_train_batch_size=4, num_train_epochs=1, **method)
    rows = make_answers(MANY)
    stream = Stream(Pairs(rows, share_prompts=False), options, Position(), PAD, collate_answers)
    masks = [stream.micro_batch(step, 0)["attention_mask"] for step in range(stream.plan.total_steps)]
    expected = 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert padding_share(rows, options, 4) == pytest.approx(expected, abs=1e-12) and expected > 0.05
