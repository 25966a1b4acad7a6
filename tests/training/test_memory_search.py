"""The plan of each launch YAML: the estimate is that of a start, what fits is the largest that does, refusals are said."""

from typing import Any

import pytest
from support import ROOT
from transformers import LlamaConfig

from accel_llm.backend.launch_yaml import as_launched
from accel_llm.config.options import TrainOptions
from accel_llm.config.plan_options import Cards, PlanOptions, parse_cards
from accel_llm.training import memory_search
from accel_llm.training.memory_estimate import GB, estimate_memory
from accel_llm.training.memory_search import ROOM, StrategyPlan, between, plan_strategies

# Large enough that a card of 8 GB is full at some size.
SHAPE: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
    "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 65536,
}  # fmt: skip
CONFIG = LlamaConfig(**SHAPE)


def direct(options: TrainOptions, plan: StrategyPlan, count: int, rows: int, length: int) -> int:
    """Return the bytes that the estimate of a start has for this size."""
    sized = options.model_copy(update={"per_device_train_batch_size": rows, "max_length": length})
    with as_launched(plan.path, count):
        return estimate_memory(sized, CONFIG, count).total


@pytest.mark.long
@pytest.mark.parametrize(
    "values",
    [
        {"method": "lora", "gradient_checkpointing": True},
        {"method": "qlora", "packing": False},
        {"method": "full", "per_device_train_batch_size": 2},
    ],
)
def test_the_sizes_that_fit_are_the_largest_by_the_estimate_of_a_start(values, monkeypatch):
    monkeypatch.setattr(memory_search, "CARD_SIZES", (16, 80))
    options = TrainOptions(**values, max_length=1024, precision="bf16")
    plans = {plan.name: plan for plan in plan_strategies(options, CONFIG, Cards(24, 2))}
    assert list(plans) == list(memory_search.SEVERAL_CARDS) and all(plan.estimate for plan in plans.values())
    rows = options.per_device_train_batch_size
    for name in ("ddp", "zero3"):
        plan = plans[name]
        assert plan.estimate and plan.estimate.total == direct(options, plan, 2, rows, 1024)
        for card in (16, 24, 80):
            room = ROOM * card * GB
            # Between the sizes that are followed the estimate lies on a straight line, within 3%.
            if most := plan.rows[card]:
                assert direct(options, plan, 2, most, 1024) <= 1.03 * room
            assert direct(options, plan, 2, most + 1 + most // 10, 1024) > 0.97 * room
            if longest := plan.lengths[card]:
                assert direct(options, plan, 2, rows, longest) <= 1.03 * room
            if longest < 60_000:  # the model has 65,536 positions
                larger = max(memory_search.LEAST_LENGTH, longest + 64 + longest // 10)  # nothing below is named
                assert direct(options, plan, 2, rows, larger) > 0.97 * room


def test_larger_cards_hold_more_and_what_fits_none_is_0(monkeypatch):
    monkeypatch.setattr(memory_search, "CARD_SIZES", (1, 8, 24, 80))
    options = TrainOptions(method="full", max_length=1024, precision="bf16", gradient_checkpointing=True)
    for plan in plan_strategies(options, CONFIG, Cards(24, 1)):
        for sizes in (list(plan.rows.values()), list(plan.lengths.values())):
            assert sizes == sorted(sizes) and sizes[0] == 0 < sizes[-1]
            assert plan.lengths[80] <= SHAPE["max_position_embeddings"]


def test_what_a_launch_yaml_refuses_is_said():
    options = TrainOptions(method="lora", load_in_8bit=True, max_length=512, precision="bf16")
    plans = {plan.name: plan for plan in plan_strategies(options, CONFIG, Cards(24, 2))}
    assert {name for name, plan in plans.items() if plan.refused} == {"zero3", "zero3_offload", "fsdp2"}
    assert plans["fsdp2"].refused.startswith("load_in_8bit: fsdp2 cannot shard 8-bit weights")
    assert plans["fsdp2"].estimate is None and plans["ddp"].estimate is not None


def test_offload_moves_terms_to_the_host():
    options = TrainOptions(method="full", max_length=512, precision="bf16", gradient_checkpointing=True)
    plans = {plan.name: plan.estimate for plan in plan_strategies(options, CONFIG, Cards(24, 2))}
    zero3, offload = plans["zero3"], plans["zero3_offload"]
    assert zero3 and offload
    numbers = offload.trainable // 2  # of each process; beside masters and moments there are gradients in two places
    assert offload.host["weights"] == pytest.approx(2 * numbers, rel=0.01) and "weights" not in zero3.host
    assert offload.host["masters, gradients and state"] == pytest.approx((4 + 8 + 4 + 4) * numbers, rel=0.01)
    assert offload.terms["weights"] == 0 and offload.total < zero3.total


def test_a_yaml_of_ones_own_is_planned_too(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text((ROOT / "accelerate_configs" / "ddp.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    options = TrainOptions(method="lora", max_length=512, precision="bf16")
    *_, ddp, mine = (
        plan for plan in plan_strategies(options, CONFIG, Cards(24, 2), path) if plan.name in ("ddp", "mine")
    )
    assert mine.name == "mine" and mine.estimate == ddp.estimate


def test_figures_lie_on_lines_between_the_known_ones():
    points = {1: {"a": 10}, 3: {"a": 30}, 7: {"a": 110}}
    assert [between(points, size)["a"] for size in (1, 2, 3, 5, 7, 9)] == [10, 20, 30, 70, 110, 150]
    assert between({4: {"a": 7}}, 9) == {"a": 7}


@pytest.mark.parametrize("text", ["24GB x 2", "24 gb x2", "24G*2", "2 x 24GB", "2x24gib", ["24GB", "x", "2"]])
def test_cards_are_read_as_people_write_them(text):
    assert parse_cards(str(PlanOptions(gpu=text).gpu)) == (24, 2)


@pytest.mark.parametrize("text", ["24", "two", "24GB x 0", "0GB", "24GB x", "-8GB"])
def test_other_words_are_refused(text):
    with pytest.raises(ValueError, match="give the memory of a card, such as 24GB"):
        PlanOptions(gpu=text)


def test_a_single_card_needs_no_number():
    assert parse_cards("141 GB") == (141, 1) and parse_cards("7.5GB") == (7.5, 1)
