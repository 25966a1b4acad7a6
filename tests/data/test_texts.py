"""Batches of texts: every place in them is checked against the tokenizer's own padded call, or counted by hand."""

from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import to_device
from accel_llm.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from accel_llm.data.rows import ARRAYS, RowPart, Rows, as_rows
from accel_llm.data.stream import Position, Stream, evaluation_batches
from accel_llm.data.texts import collate_texts

SHARED = Path(__file__).parents[3] / "shared" / "data"
IDS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
SECOND = [2, 5, 1]  # the first text alone is a pair


def make_texts(
    targets: list[list[float]], problem_type: str, ids: list[list[int]] = IDS, second: list[int] | None = SECOND
) -> Rows:
    part = RowPart()
    for k, (row, values) in enumerate(zip(ids, targets, strict=True)):
        part.add(array("i", row), array("i", [-100] * len(row)), None, k + 1, 0, k)
        part.targets.extend(values)
    part.second_start.extend(second or [])
    rows = as_rows({name: np.array(getattr(part, name), kind) for name, kind in ARRAYS.items()}, [(0, "a")])
    return replace(rows, problem_type=problem_type)


CLASSES = make_texts([[0], [2], [1]], SINGLE_LABEL)


def flat(batch: dict[str, Any], name: str, places: str) -> list[int]:
    return batch[name].flatten()[batch[places]].tolist()


@pytest.mark.parametrize("packed", [True, False])
def test_first_and_last_tokens_of_each_text_are_found(packed: bool) -> None:
    batch = collate_texts(CLASSES, [1, 2, 0], packed, pad_token_id=8)
    assert flat(batch, "input_ids", "first_positions") == [8, 13, 5]
    assert flat(batch, "input_ids", "last_positions") == [12, 13, 7]
    assert batch["first_positions"].dtype == batch["last_positions"].dtype == torch.int64
    assert batch["lengths"] == [5, 1, 3] and batch["row_indices"] == [1, 2, 0]
    if packed:
        assert batch["input_ids"].tolist() == [[8, 9, 10, 11, 12, 13, 5, 6, 7]]
        assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 0, 1, 2]]
        assert batch["cu_seqlens"].tolist() == [0, 5, 6, 9] and batch["max_seqlen"] == 5
        assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 0, 0, 0, 0, 1]]
    else:
        assert batch["input_ids"].tolist() == [[8, 9, 10, 11, 12], [13, 8, 8, 8, 8], [5, 6, 7, 8, 8]]
        assert batch["attention_mask"].tolist() == [[1] * 5, [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]
        assert batch["token_type_ids"].tolist() == [[0] * 5, [0] * 5, [0, 0, 1, 0, 0]]


@pytest.mark.parametrize("packed", [True, False])
def test_targets_are_what_the_loss_of_their_problem_type_takes(packed: bool) -> None:
    batch = collate_texts(CLASSES, [1, 0], packed, 0)
    assert batch["targets"].dtype == torch.int64 and batch["targets"].tolist() == [2, 0]
    assert batch["num_targets"] == 2 and batch["total_weight"] == 2.0 and isinstance(batch["total_weight"], float)
    batch = collate_texts(make_texts([[1, 0], [0, 0], [1, 1]], MULTI_LABEL), [2, 1], packed, 0)
    assert batch["targets"].dtype == torch.float32 and batch["targets"].tolist() == [[1, 1], [0, 0]]
    batch = collate_texts(make_texts([[0.25], [-3], [7]], REGRESSION), [0, 1], packed, 0)
    assert batch["targets"].dtype == torch.float32 and batch["targets"].tolist() == [[0.25], [-3]]
    assert batch["total_weight"] == 2.0


def test_class_weights_are_what_cross_entropy_divides_by() -> None:
    weights = np.array([0.5, 3.0, 0.25])
    batch = collate_texts(replace(CLASSES, class_weights=weights), [0, 1, 2], True, 0)
    scores = torch.randn(3, 3, dtype=torch.float64)
    weight = torch.from_numpy(weights)
    summed = torch.nn.functional.cross_entropy(scores, batch["targets"], weight, reduction="sum")
    mean = torch.nn.functional.cross_entropy(scores, batch["targets"], weight)
    assert batch["total_weight"] == 3.75 and batch["num_targets"] == 3
    torch.testing.assert_close(summed / batch["total_weight"], mean)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("rows", [CLASSES, make_texts([[1, 0], [0, 0], [1, 1]], MULTI_LABEL)])
def test_an_empty_slot_has_a_text_that_does_not_count(packed: bool, rows: Rows) -> None:
    batch = collate_texts(replace(rows, class_weights=np.ones(3)), [], packed, 4)
    assert batch["input_ids"].tolist() == [[4, 4]] and batch["token_type_ids"].tolist() == [[0, 0]]
    assert batch["first_positions"].tolist() == [0] and batch["last_positions"].tolist() == [1]
    assert len(batch["targets"]) == 1 and batch["num_targets"] == 0 and batch["total_weight"] == 0.0
    assert batch["row_indices"] == []
    scores = torch.randn(1, 2, requires_grad=True)
    scores[: batch["num_targets"]].sum().backward()
    assert scores.grad is not None and scores.grad.tolist() == [[0, 0]]


@pytest.mark.parametrize("packed", [True, False])
def test_virtual_tokens_do_not_belong_to_a_text(packed: bool) -> None:
    batch = collate_texts(CLASSES, [0, 1], packed, 0, virtual=2)
    assert flat(batch, "input_ids", "first_positions") == [5, 8] and flat(batch, "input_ids", "last_positions") == [
        7,
        12,
    ]
    assert batch["lengths"] == [5, 7]
    first, last = batch["first_positions"].tolist(), batch["last_positions"].tolist()
    assert batch["virtual_positions"].tolist() == [first[0] - 2, first[0] - 1, first[1] - 2, first[1] - 1]
    types = batch["token_type_ids"].flatten()
    assert types.nonzero().flatten().tolist() == [last[0]]


def test_rows_without_token_types_have_none(tmp_path: Path) -> None:
    batch = collate_texts(make_texts([[0], [1], [1]], SINGLE_LABEL, second=None), [0, 1], False, 0)
    assert "token_type_ids" not in batch
    assert to_device(batch, "cpu")["targets"].tolist() == [0, 1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared data")
def test_a_padded_batch_is_the_tokenizers_own() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "bert-base-chinese")
    first, second = ["a b c", "one", "two three"], ["d", "four five six seven", "x y"]
    expected = tokenizer(first, second, padding=True, return_tensors="pt")
    ids = [tokenizer(a, b)["input_ids"] for a, b in zip(first, second, strict=True)]
    starts = [len(tokenizer(a)["input_ids"]) for a in first]
    batch = collate_texts(make_texts([[0]] * 3, SINGLE_LABEL, ids, starts), [0, 1, 2], False, tokenizer.pad_token_id)
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert torch.equal(batch[name], expected[name]), name
    # Packed, the same values stand one after the other.
    packed = collate_texts(make_texts([[0]] * 3, SINGLE_LABEL, ids, starts), [0, 1, 2], True, tokenizer.pad_token_id)
    mask = expected["attention_mask"].bool()
    for name in ("input_ids", "token_type_ids"):
        assert packed[name][0].tolist() == expected[name][mask].tolist(), name


@pytest.mark.parametrize("packing", ["per_epoch", False])
def test_the_stream_gives_each_text_once_on_any_number_of_processes(packing: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    count = 23
    ids = [[k + 1] * (1 + k % 5) for k in range(count)]
    rows = make_texts([[k % 3] for k in range(count)], SINGLE_LABEL, ids, [len(row) for row in ids])
    options = TrainOptions(max_length=8, packing=packing, per_device_train_batch_size=2, per_device_eval_batch_size=2)
    ranks = [Stream(rows, options, Position(rank=rank, world=2), 0, collate_texts) for rank in range(2)]
    steps = -(-ranks[0].plan.bins // ranks[0].plan.rows_per_step)
    trained = [r.micro_batch(s, m) for s in range(steps) for m in range(ranks[0].accumulation) for r in ranks]
    evaluated = [b for rank in range(2) for b in evaluation_batches(rows, options, rank, 2, 0, collate_texts)]
    for batches in (trained, evaluated):
        seen: list[int] = []
        for batch in batches:
            assert len(batch["row_indices"]) == batch["num_targets"] == batch["total_weight"]
            places = batch["first_positions"][: batch["num_targets"]]
            assert (batch["input_ids"].flatten()[places] - 1).tolist() == batch["row_indices"]
            assert batch["targets"][: batch["num_targets"]].tolist() == [k % 3 for k in batch["row_indices"]]
            seen += batch["row_indices"]
        # The last training step may reach into the next epoch.
        assert set(seen) == set(range(count)) and (batches is trained or len(seen) == count)
