import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_llm.data.ledger import Ledger, is_lost


def make_ledger() -> Ledger:
    ledger = Ledger()
    ledger.read("a.jsonl", rows=10, supervised=60, context=40)
    ledger.count("a.jsonl", "trained", rows=8, supervised=45, context=30)
    ledger.count("a.jsonl", "cut: truncated", rows=0, supervised=5, context=2)
    ledger.count("a.jsonl", "dropped: longer than max_length", rows=1, supervised=10, context=8)
    ledger.count("a.jsonl", "dropped: broken row", rows=1)
    ledger.read("b.jsonl", rows=2, supervised=40, context=0)
    ledger.count("b.jsonl", "held out", rows=2, supervised=40)
    return ledger


def test_balance_holds_when_all_is_in_one_bin():
    make_ledger().balance()
    Ledger().balance()


@pytest.mark.parametrize("quantity", ["rows", "supervised", "context"])
def test_balance_names_source_and_quantity_of_what_is_missing(quantity):
    ledger = make_ledger()
    ledger.read("b.jsonl", **{"rows": 0, quantity: 3})
    with pytest.raises(RuntimeError, match=rf"b\.jsonl does not balance: \d+ {quantity} read, \d+ in bins$"):
        ledger.balance()


def test_balance_names_what_is_counted_twice_or_never_read():
    ledger = make_ledger()
    ledger.count("a.jsonl", "trained", supervised=4)
    with pytest.raises(RuntimeError, match="10 rows read, 11 in bins; 60 supervised read, 64 in bins"):
        ledger.balance()
    ledger = Ledger()
    ledger.count("c.jsonl", "trained")
    with pytest.raises(RuntimeError, match=r"c\.jsonl does not balance: 0 rows read, 1 in bins"):
        ledger.balance()


def test_each_source_must_balance_by_itself():
    ledger = Ledger()
    ledger.read("a", rows=1)
    ledger.read("b", rows=1)
    ledger.count("a", "trained", rows=2)
    with pytest.raises(RuntimeError, match="ledger of a "):
        ledger.balance()


def test_lost_share_counts_cut_and_dropped_only():
    assert make_ledger().lost_share() == (2 / 12, 15 / 100)
    assert Ledger().lost_share() == (0.0, 0.0)
    ledger = Ledger()
    ledger.read("a", supervised=4)
    ledger.count("a", "cutlery", supervised=4)
    assert ledger.lost_share() == (0.0, 0.0)


def test_cut_and_dropped_bins_are_lost():
    assert all(map(is_lost, ("cut", "cut: too long", "dropped", "dropped: no answer")))
    assert not any(map(is_lost, ("trained", "held out", "cutlery")))


def test_json_round_trip():
    ledger = make_ledger()
    ledger.skip_turns("the template rewrites it", 3)
    ledger.note("The template closes no turn.")
    values = json.loads(json.dumps(ledger.to_dict()))
    assert values["bins"]["b.jsonl"] == {"held out": {"rows": 2, "supervised": 40, "context": 0}}
    assert Ledger.from_dict(values) == ledger


amounts = st.integers(0, 1000)
counts = st.tuples(
    st.sampled_from("ab"), st.sampled_from(["trained", "cut: x", "dropped: y"]), amounts, amounts, amounts
)


@given(st.lists(st.lists(counts)))
def test_merging_parts_equals_counting_at_once(parts):
    merged, at_once = Ledger(), Ledger()
    for part in parts:
        worker = Ledger()
        for source, bin, *amount in part:
            for ledger in (worker, at_once):
                ledger.read(source, *amount)
                ledger.count(source, bin, *amount)
                ledger.skip_turns("empty", amount[0])
                ledger.note(f"about {source}")
        merged.merge(Ledger.from_dict(worker.to_dict()))
    merged.balance()
    assert merged == at_once
