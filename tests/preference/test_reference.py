"""The reference's columns: what plain transformers computes, each row once, read again, and never those of another model."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from hand_made_answers import DOCUMENTS, answering_model, dpo_options, pair_rows, single_rows
from safetensors.torch import load_file, save_file
from support import make_rows

from accel_llm.chat.targets import IGNORED
from accel_llm.config.preference_options import KtoOptions
from accel_llm.data.answers import Pairs, collate_answers
from accel_llm.data.ledger import Ledger
from accel_llm.data.prepare import EncodedData
from accel_llm.data.rows import Rows
from accel_llm.data.stream import Position, Stream
from accel_llm.demo.tokenizer import build_demo_tokenizer
from accel_llm.errors import ConfigError, DataError
from accel_llm.model.fingerprint import model_fingerprint
from accel_llm.model.loss import attach_loss
from accel_llm.preference import reference as module
from accel_llm.preference.mismatched import mismatch
from accel_llm.preference.reference import Reference, check_reference_tokenizer, reference_columns, reference_name


def by_transformers(model: Any, rows: Rows) -> list[float]:
    sums = []
    for ids, labels in (rows[k] for k in range(len(rows))):
        with torch.no_grad():
            logits = type(model).forward(model, input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0]
        log_p = logits.double().log_softmax(1)
        sums.append(sum(float(log_p[k - 1, label]) for k, label in enumerate(labels) if label != IGNORED))
    return sums


def test_columns_are_those_of_plain_transformers_in_evaluation_mode(accelerator):
    model, rows = answering_model(), pair_rows()
    column = reference_columns(accelerator, model, rows, dpo_options(), 0)
    np.testing.assert_allclose(column, by_transformers(model, rows.rows), rtol=1e-6)
    single = reference_columns(accelerator, model, rows.rows, dpo_options(per_device_eval_batch_size=1), 0)
    np.testing.assert_allclose(column, single, rtol=1e-6)
    assert column.dtype == np.float64 and model.training


class Columns:
    """A run's `Reference` with a cache in a folder of its own."""

    def __init__(self, accelerator, monkeypatch, tmp_path, options, rows, evaluation=None):
        monkeypatch.setattr(module, "model_fingerprint", lambda name, revision="main", whole=False: name)
        self.accelerator, self.options = accelerator, options.model_copy(update={"cache_dir": str(tmp_path)})
        (tmp_path / "rows").mkdir(exist_ok=True)
        table = rows.rows if isinstance(rows, Pairs) else rows
        self.data = EncodedData(table, evaluation, Ledger(), "rows")
        self.stream = Stream(rows, self.options, Position(), 0, collate_answers)

    def new(self, resumed: bool = False, **changes: Any) -> Reference:
        options = self.options.model_copy(update=changes)
        reference = Reference(self.accelerator, options, self.data, self.stream)
        reference.find(resumed)
        return reference


def test_columns_are_found_again_and_are_not_those_of_another_reference(accelerator, monkeypatch, tmp_path):
    options = dpo_options(model_name_or_path="base")
    run = Columns(accelerator, monkeypatch, tmp_path, options, pair_rows(), pair_rows().rows)
    first = run.new()
    assert first.missing
    model = answering_model()
    first.compute(model, first.can_share(model))
    again = run.new(resumed=True)
    assert not again.missing
    for part in ("train", "eval"):
        np.testing.assert_array_equal(again.columns[part], first.columns[part])
    rows, collate = again.rows("train", False)
    batch = collate(rows, [3, 0], False, 0, 0)
    expected = np.array(by_transformers(model, pair_rows().rows))[[6, 7, 0, 1]]
    np.testing.assert_allclose(batch["reference"], expected, rtol=1e-6)

    elsewhere = {"reference_model_name_or_path": "elsewhere"}
    # Another base, precision, method or seed is another policy; beta, dropout and the rate of learning are not.
    for same in ({"beta": 0.5}, {"lora_dropout": 0.1}, {"learning_rate": 1e-3}, {"loss_type": ["ipo"]}):
        assert not run.new(**same).missing
    others = ({"model_name_or_path": "other"}, {"precision": "bf16"}, {"method": "full"}, {"seed": 1})
    for other in (*others, elsewhere):
        assert run.new(**other).missing
    with pytest.raises(
        ConfigError, match=r"resume_from_checkpoint: the log-probabilities of the reference, .* are missing"
    ):
        run.new(resumed=True, seed=1)
    assert run.new(resumed=True, **elsewhere).missing  # it can be asked again

    # The seed chooses the mismatched answers of KTO, whatever the reference is.
    names = [reference_name(options.model_copy(update=elsewhere | {"seed": seed})) for seed in (1, 2)]
    assert names[0] != names[1]

    # A file that is cut short does not count.
    path = run.new().files["eval"]
    path.write_bytes(path.read_bytes()[:-8])
    assert run.new().missing


def test_another_reference_must_read_each_token_alike(tmp_path):
    """Otherwise it would score other words, without an error: most vocabularies have an id for any number."""
    tokenizer = build_demo_tokenizer()
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = words["model"]["vocab"]
    first, second = (next(token for token, number in vocabulary.items() if number == k) for k in (40, 41))
    vocabulary[first], vocabulary[second] = 41, 40
    for name, content in {"base": None, "same": None, "other": words}.items():
        tokenizer.save_pretrained(tmp_path / name)
        if content:
            (tmp_path / name / "tokenizer.json").write_text(json.dumps(content))
    names = {"model_name_or_path": str(tmp_path / "base"), "reference_model_name_or_path": str(tmp_path / "other")}
    options = dpo_options(**names)
    check_reference_tokenizer(options, [np.array([3, 39, 42], np.int32)])  # ids that both read alike
    check_reference_tokenizer(
        dpo_options(**names | {"reference_model_name_or_path": str(tmp_path / "same")}), [np.arange(60, dtype=np.int32)]
    )
    message = "has another tokenizer: token id 40 of the rows is .*; use a reference with the tokenizer of the model."
    with pytest.raises(ConfigError, match=message):
        check_reference_tokenizer(options, [np.array([3], np.int32), np.array([41, 40], np.int32)])
    with pytest.raises(ConfigError, match=f"token id {len(tokenizer)} of the rows is None"):  # an added token
        check_reference_tokenizer(options, [np.array([len(tokenizer)], np.int32)])


def test_losses_without_a_reference_compute_none(accelerator, monkeypatch, tmp_path):
    options = dpo_options(loss_type=["simpo", "orpo"], model_name_or_path="base")
    reference = Columns(accelerator, monkeypatch, tmp_path, options, pair_rows()).new(resumed=True)
    assert not reference.missing
    rows, collate = reference.rows("train", False)
    assert "reference" not in collate(rows, [0], False, 0, 0)


def test_a_reference_that_is_not_finite_is_refused(accelerator):
    model = answering_model()
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = float("nan")
    with pytest.raises(ConfigError, match="the reference's log-probability of rows, row 0 is nan"):
        reference_columns(accelerator, model, pair_rows(), dpo_options(), 0)


def test_a_base_that_differs_in_a_few_rows_is_another_reference(make_model, tmp_path):
    """Before: a fingerprint of samples was the same, and the columns of the other base were read: a loss of 13.6."""
    names = []
    for k, folder in enumerate((tmp_path / "a", tmp_path / "b")):
        make_model(folder)
        weights = load_file(folder / "model.safetensors")
        weights["model.embed_tokens.weight"][0] += k
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        names.append(reference_name(dpo_options(model_name_or_path=str(folder))))
    assert names[0] != names[1] and model_fingerprint(str(tmp_path / "a")) == model_fingerprint(str(tmp_path / "b"))


# --- mismatched answers ----------------------------------------------------------------------------------------------


def test_each_answer_stands_beside_one_prompt_that_is_not_its_own():
    rows = single_rows([1, 0] * 12)
    other = mismatch(rows, seed=3, max_length=64)
    assert sorted(other.partners) == list(range(24))
    for k, partner in enumerate(other.partners):
        ids, labels = other[k]
        prompt, answer = DOCUMENTS[k][0], DOCUMENTS[partner][1]
        assert ids.tolist() == prompt + answer
        assert labels.tolist() == [IGNORED] * len(prompt) + answer
        assert other.lengths[k] == len(ids)
    assert (mismatch(rows, seed=3, max_length=64).partners == other.partners).all()
    assert (mismatch(rows, seed=4, max_length=64).partners != other.partners).any()
    short = mismatch(rows, seed=3, max_length=9)
    assert all(len(short[k][0]) == short.lengths[k] <= 9 for k in range(24))


def test_no_answer_meets_its_own_prompt_wherever_that_stands_in_the_data():
    """Before: rows of the data with one prompt were taken for different ones."""
    prompts = [[3, 4], [5], [6, 7, 8]] * 4
    encoded = [(k, [*p, 9 + k], [IGNORED] * len(p) + [9 + k]) for k, p in enumerate(prompts)]
    rows = make_rows(encoded)
    for seed in range(5):
        partners = mismatch(rows, seed, 64).partners
        assert sorted(partners) == list(range(12)) and all(prompts[j] != prompts[k] for k, j in enumerate(partners))
    with pytest.raises(DataError, match="all 4 answers of train_files, or of eval_files, have one prompt"):
        mismatch(make_rows(encoded[::3]), 0, 64)


def test_batches_of_kto_bring_the_mismatched_answers_with_their_reference(accelerator, monkeypatch, tmp_path):
    options = KtoOptions(max_length=64, packing=False, model_name_or_path="base")
    rows = single_rows([1, 0] * 12)
    run = Columns(accelerator, monkeypatch, tmp_path, options, rows)
    reference, model = run.new(), answering_model()
    reference.compute(model, reference.can_share(model))
    rows, collate = reference.rows("train", False)
    batch = collate(rows, [5, 2], False, 0, 0)
    mismatched = reference.parts["train-mismatched"]
    expected = by_transformers(model, mismatched)
    np.testing.assert_allclose(batch["mismatched"]["reference"], [expected[5], expected[2]], rtol=1e-6)
    assert batch["labels_of_answers"].tolist() == [False, True]
    attach_loss(model, 64)
