"""Held-out rows: the mean is over every labelled token, an answer counts only if it is right to its end."""

import copy
import json
import multiprocessing
import os
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from support import character_tokenizer, make_rows
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from accel_llm.config.command_line import resolved_options
from accel_llm.config.options import TrainOptions
from accel_llm.data.batches import collate_padded
from accel_llm.data.rows import Rows
from accel_llm.data.stream import TrainingPlan
from accel_llm.errors import ConfigError
from accel_llm.model.attention import PACKED_ATTENTION, enable_packing, unwrap_causal_lm
from accel_llm.model.loss import attach_loss, next_token_loss
from accel_llm.report.metrics import Meter
from accel_llm.report.record import Record
from accel_llm.training.evaluation import (
    Evaluation,
    GeneratedAnswer,
    exact_match,
    mean_loss,
    questions_in_batch,
    select_questions,
)
from accel_llm.training.start import Start

EOS = 2
MAX_LENGTH = 40


def random_rows(count: int = 13) -> Rows:
    """Uneven documents with gaps in what is trained, one with a single label."""
    rng = np.random.default_rng(1)
    encoded = []
    for number in range(1, count + 1):
        ids = rng.integers(5, 100, int(rng.integers(3, 31))).tolist()
        labels = [-100, *(token if rng.random() < 0.6 else -100 for token in ids[1:-1]), ids[-1]]
        encoded.append((number, ids, labels))
    encoded.append((count + 1, [7, 8, 9, 10], [-100, -100, 9, -100]))
    return make_rows(encoded)


def reference(model: LlamaForCausalLM, rows: Rows) -> tuple[float, int]:
    """Mean loss and count in float64, each document alone."""
    model = copy.deepcopy(model).double()
    total, count = 0.0, 0
    for ids, labels in (rows[k] for k in range(len(rows))):
        logits = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0, :-1]
        targets = torch.from_numpy(labels.astype(np.int64))[1:]
        total += float(F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").detach())
        count += int((targets != -100).sum())
    return total / count, count


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_mean_loss_equals_a_float64_reference(accelerator, tiny_llama, packing, batch_size):
    rows, model = random_rows(), tiny_llama()
    expected, count = reference(model, rows)
    if packing:
        enable_packing(model)
    attach_loss(model, MAX_LENGTH)
    options = TrainOptions(packing=packing, max_length=MAX_LENGTH, per_device_eval_batch_size=batch_size)
    metrics = mean_loss(accelerator, model.train(), rows, options, 0)
    assert metrics["eval/loss"] == pytest.approx(expected, rel=1e-6)
    assert metrics["eval/perplexity"] == pytest.approx(np.exp(expected), rel=1e-5)
    assert metrics["eval/supervised_tokens"] == count and model.training
    # A mean of the documents' means would be another number.
    alone = [reference(tiny_llama(), make_rows(iter([(1, *map(np.ndarray.tolist, rows[k]))])))[0] for k in range(14)]
    assert abs(float(np.mean(alone)) - expected) > 1e-2


def test_dropout_is_off_while_evaluating(accelerator, tiny_llama):
    model = tiny_llama(attention_dropout=0.5)
    attach_loss(model, MAX_LENGTH)
    options = TrainOptions(packing=False, max_length=MAX_LENGTH)
    model.train()
    first, second = (mean_loss(accelerator, model, random_rows(), options, 0) for _ in range(2))
    assert first == second


def test_a_loss_beyond_float_has_no_infinite_perplexity(accelerator, tiny_llama):
    model = tiny_llama()
    attach_loss(model, MAX_LENGTH)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    metrics = mean_loss(accelerator, model, random_rows(), TrainOptions(packing=False, max_length=MAX_LENGTH), 0)
    assert metrics["eval/loss"] > 1000 and metrics["eval/perplexity"] == np.exp(700.0)


def test_an_evaluation_is_as_large_as_training_unless_a_size_is_given():
    options = TrainOptions(per_device_train_batch_size=3)
    assert resolved_options(options)["per_device_eval_batch_size"] == options.per_device_eval_batch_size == 3
    assert "per_device_eval_batch_size" not in options.model_fields_set
    assert TrainOptions().per_device_eval_batch_size == TrainOptions().per_device_train_batch_size == 1
    assert TrainOptions(per_device_train_batch_size=3, per_device_eval_batch_size=2).per_device_eval_batch_size == 2


def test_answers_take_no_more_tokens_than_the_rows_of_a_forward_pass():
    questions = [(np.arange(10), np.arange(4)), (np.arange(20), np.arange(2))]  # up to 20 + 4 + 8 tokens
    for rows, packing, expected in ((1, True, 4), (2, True, 8), (2, False, 2)):
        options = TrainOptions(packing=packing, max_length=128, per_device_eval_batch_size=rows)
        assert questions_in_batch(questions, options) == expected
    assert questions_in_batch(questions, TrainOptions(packing=True, max_length=16)) == 1  # no less than one row


def test_questions_ask_for_the_last_trained_turn():
    rows = make_rows(
        iter(
            [
                (1, [1, 11, 12, 13, 14, 15], [-100, -100, 12, -100, 14, 15]),  # two turns: the second
                (2, [1, 21, 22], [-100, -100, -100]),  # nothing trained
                (3, [31, 32, 33], [31, 32, 33]),  # no prompt
                (4, [1, 41, 42, 43, 44], [-100, 41, 42, -100, -100]),  # what follows the turn is not part of it
                (5, [1, 51, 52], [-100, -100, 52]),
            ]
        )
    )
    pairs = [(prompt.tolist(), answer.tolist()) for prompt, answer in select_questions(rows, 10)]
    assert pairs == [([1, 11, 12, 13], [14, 15]), ([1], [41, 42]), ([1, 51], [52])]
    assert len(select_questions(rows, 2)) == 2 and select_questions(rows, 0) == []
    assert [prompt.tolist() for prompt, _ in select_questions(rows, 1)] == [[1, 11, 12, 13]]


def bigram_model(tiny_llama, following: dict[int, int]) -> LlamaForCausalLM:
    """Answers token x with `following[x]`, whatever came before: layers that add nothing, one-hot embeddings."""
    model = tiny_llama(hidden_size=112, vocab_size=105)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(105, 112))
        model.lm_head.weight.zero_()
        for token, answer in following.items():
            model.lm_head.weight[answer, token] = 1.0
    return model


# Four questions of different lengths; the last token of each decides the answer, which runs on to the end of text.
ASKED = [
    (np.array([50, 10]), np.array([20, 21, EOS])),
    (np.array([11]), np.array([22, EOS])),
    (np.array([50, 51, 52, 53, 12]), np.array([23, 24, 25, EOS])),
    (np.array([50, 51, 13]), np.array([EOS])),
]
FOLLOWING = {10: 20, 20: 21, 21: EOS, 11: 22, 22: EOS, 12: 23, 23: 24, 24: 25, 25: EOS, 13: EOS}


@pytest.mark.parametrize(
    "change, right, stopped",
    [
        ({}, 1.0, 1.0),
        ({11: 23}, 0.75, 1.0),  # another answer, which ends
        ({25: 20}, 0.75, 1.0),  # runs on into the answer of the first
        ({22: 22}, 0.75, 0.75),  # never ends
        ({21: 20, 22: 11, 25: 12}, 0.25, 0.25),
        (dict.fromkeys([*FOLLOWING, 30], 30), 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_exact_match_and_stop_rate(accelerator, tiny_llama, tokenizer, change, right, stopped, batch_size):
    model = bigram_model(tiny_llama, FOLLOWING | change).train()
    scores, answers = exact_match(accelerator, model, tokenizer, ASKED, batch_size, [EOS])
    assert scores == {"eval/exact_match": right, "eval/stop_rate": stopped}
    assert [answer.prompt for answer in answers] == [tokenizer.decode(prompt) for prompt, _ in ASKED]
    assert [answer.expected for answer in answers] == [tokenizer.decode(answer) for _, answer in ASKED]
    assert sum(answer.right for answer in answers) == 4 * right and model.training
    for (_, expected), answer in zip(ASKED, answers, strict=True):
        assert not answer.right or answer.generated == tokenizer.decode(expected)
        assert answer.generated.endswith("</s>") or len(answer.generated) == 4 + 8  # the longest answer, and 8 more


def test_a_right_answer_that_does_not_end_is_not_right(accelerator, tiny_llama, tokenizer):
    model = bigram_model(tiny_llama, FOLLOWING | {22: 3})  # <|im_start|> in place of the end
    scores, answers = exact_match(accelerator, model, tokenizer, ASKED[1:2], 1, [EOS])
    assert scores["eval/exact_match"] == 0.0 and answers[0].generated.startswith(answers[0].expected[0])
    # Any of the tokens that stop generation ends an answer, but only the data's own is the right end.
    scores, answers = exact_match(accelerator, model, tokenizer, ASKED[1:2], 1, [EOS, 3])
    assert scores == {"eval/exact_match": 0.0, "eval/stop_rate": 1.0}
    assert answers[0].generated.endswith("<|im_start|>") and not answers[0].right


def generate(accelerator, model, tokenizer, questions, batch_size: int) -> list[str]:
    return [answer.generated for answer in exact_match(accelerator, model, tokenizer, questions, batch_size, [EOS])[1]]


@pytest.mark.parametrize("packed", [True, False])
def test_padding_on_the_left_changes_no_answer(accelerator, tiny_llama, tokenizer, packed):
    model, rng = tiny_llama(3), np.random.default_rng(2)
    questions = [(rng.integers(5, 100, n), np.array([7, EOS])) for n in (3, 17, 1, 9, 30)]
    alone = generate(accelerator, model, tokenizer, questions, 1)
    assert len(set(alone)) == 5
    if packed:  # the attention of packed rows steps aside while generating, and is back afterwards
        enable_packing(model)
    attach_loss(model, MAX_LENGTH)
    for batch_size in (2, 5, 8):
        assert generate(accelerator, model, tokenizer, questions, batch_size) == alone
    assert (model.config._attn_implementation == PACKED_ATTENTION) == packed
    # This model would notice a padding token that it attends to.
    padded = [(np.concatenate([np.zeros(30 - len(prompt), np.int64), prompt]), answer) for prompt, answer in questions]
    assert generate(accelerator, model, tokenizer, padded, 5)[:4] != alone[:4]


def memorized(tiny_llama) -> tuple[LlamaForCausalLM, Rows]:
    """Return a model that has memorized four rows, and the rows; they differ only in the first token and the answer."""
    encoded = [
        (k, [10 + k, 50, 51, *answer, EOS], [-100, -100, -100, *answer, EOS])
        for k, answer in enumerate([[20, 21], [22], [23, 24, 25], [26, 20]], 1)
    ]
    rows, model = make_rows(encoded), tiny_llama()
    attach_loss(model, MAX_LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = collate_padded([rows[k] for k in range(4)], 0)
    for _ in range(60):
        next_token_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, rows


def test_a_run_evaluates_when_due_and_writes_the_results(accelerator, tiny_llama, tokenizer, tmp_path):
    model, rows = memorized(tiny_llama)
    options = TrainOptions(
        output_dir=str(tmp_path),
        packing=False,
        max_length=MAX_LENGTH,
        eval_steps=2,
        eval_on_start=True,
        eval_generate=3,
    )
    meter = Meter(accelerator, options, TrainingPlan(4, 4, 20, 5), Record(tmp_path, True))
    evaluation = Evaluation(accelerator, tokenizer, rows, options, [EOS])
    evaluation.at_start(model, meter, Start(output_dir=tmp_path, step=3))  # a resumed run has no start
    assert not Path(tmp_path / "metrics.jsonl").exists()
    evaluation.at_start(model, meter, Start(output_dir=tmp_path))
    for step in range(1, 6):
        if step == 5:
            with torch.no_grad():
                model.lm_head.weight.zero_()
        evaluation.when_due(model, meter, step)
    evaluation.at_end(model, meter, tmp_path, 5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4, 5]
    assert [line["eval/exact_match"] for line in lines] == [1.0, 1.0, 1.0, 0.0]
    assert all(line["eval/stop_rate"] == 1.0 and line["eval/loss"] < 0.1 for line in lines[:3])
    assert lines[3]["eval/loss"] == pytest.approx(np.log(105), rel=1e-6)
    assert lines[3]["eval/supervised_tokens"] == 3 + 2 + 4 + 3
    assert len(evaluation.samples) == 3 and evaluation.samples[0]["expected"] == tokenizer.decode([20, 21, EOS])


def test_without_rows_or_questions_nothing_is_measured(accelerator, tiny_llama, tokenizer, tmp_path):
    options: dict[str, Any] = {"output_dir": str(tmp_path), "packing": False, "max_length": MAX_LENGTH}
    meter = Meter(accelerator, TrainOptions(**options), TrainingPlan(4, 4, 4, 1), Record(tmp_path, True))
    Evaluation(accelerator, tokenizer, None, TrainOptions(**options), [EOS]).at_end(None, meter, tmp_path, 1)
    assert list(tmp_path.iterdir()) == []
    model = tiny_llama()
    attach_loss(model, MAX_LENGTH)
    Evaluation(accelerator, tokenizer, random_rows(), TrainOptions(**options), [EOS]).at_end(model, meter, tmp_path, 1)
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line.keys() == {"step", "eval/loss", "eval/perplexity", "eval/supervised_tokens"}


def test_an_answer_is_right_only_as_a_whole():
    assert GeneratedAnswer("q", "a</s>", "a</s>").right
    assert not GeneratedAnswer("q", "a</s>", "a").right and not GeneratedAnswer("q", "a</s>", "a </s>").right


def uneven_rows(count: int, weighted: bool) -> Rows:
    """`count` uneven rows, which neither batches of two nor three processes divide."""
    rows = random_rows(count - 1)
    documents = [(k + 1, rows[k][0].tolist(), rows[k][1].tolist()) for k in range(count)]
    drawn = np.random.default_rng(3)
    weights = [drawn.choice([0.0, 0.5, 2.0], len(ids)).tolist() for _, ids, _ in documents]
    return make_rows(documents, weights if weighted else None)


# How many rows, packed, weighted. One row leaves two of three processes without any.
CASES = [(7, True, False), (7, False, False), (7, True, True), (7, False, True), (2, False, True), (1, True, False)]


def evaluate_as_rank(rank: int, world: int, port: int, folder: Path) -> None:
    """In a process of its own: one rank's figures for every case and its answers, to `folder`."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    accelerator, tokenizer = Accelerator(cpu=True), character_tokenizer()
    assert accelerator.num_processes == world
    model: Any = LlamaForCausalLM.from_pretrained(folder / "random")
    enable_packing(model)
    attach_loss(model, MAX_LENGTH)
    model = accelerator.prepare(model)
    scores: list[dict[str, float]] = []
    answers = []
    for count, packing, weighted in CASES:
        unwrap_causal_lm(model).set_attn_implementation(PACKED_ATTENTION if packing else "sdpa")
        options = TrainOptions(packing=packing, max_length=MAX_LENGTH, per_device_eval_batch_size=2)
        scores.append(mean_loss(accelerator, model, uneven_rows(count, weighted), options, 0))
    model = accelerator.prepare(LlamaForCausalLM.from_pretrained(folder / "bigram"))
    for count in (7, 2):
        metrics, own_answers = exact_match(accelerator, model, tokenizer, (ASKED * 2)[:count], 2, [EOS])
        scores.append(metrics)
        answers.append([asdict(answer) for answer in own_answers])
    (folder / f"{world}-{rank}.json").write_text(json.dumps([scores, answers]), encoding="utf-8")


def over_processes(world: int, folder: Path) -> tuple[list[dict[str, float]], list[list[dict[str, str]]]]:
    """The figures that all of `world` real processes agree on, and all their answers to each set of questions."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    # One import for all: what is forked is a process that has computed nothing yet.
    context.set_forkserver_preload(
        ["torch", "transformers.models.llama.modeling_llama", "accel_llm.training.evaluation"]
    )
    ranks = [context.Process(target=evaluate_as_rank, args=(rank, world, port, folder)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    results = [json.loads((folder / f"{world}-{rank}.json").read_text(encoding="utf-8")) for rank in range(world)]
    assert all(scores == results[0][0] for scores, _ in results)
    return results[0][0], [[answer for _, answers in results for answer in answers[k]] for k in range(2)]


def test_each_row_counts_once_whatever_the_number_of_processes(tiny_llama, tmp_path):
    tiny_llama(3).save_pretrained(tmp_path / "random")
    # The second and third answer never end.
    bigram_model(tiny_llama, FOLLOWING | {11: 23, 25: 25}).save_pretrained(tmp_path / "bigram")
    alone, answered = over_processes(1, tmp_path)
    loss, count = reference(tiny_llama(3), uneven_rows(7, False))
    for scores in alone[:2]:
        assert scores["eval/loss"] == pytest.approx(loss, rel=1e-6) and scores["eval/supervised_tokens"] == count
    assert abs(alone[2]["eval/loss"] - loss) > 1e-3  # weights are no decoration
    assert alone[-2:] == [
        {"eval/exact_match": 3 / 7, "eval/stop_rate": 3 / 7},
        {"eval/exact_match": 0.5, "eval/stop_rate": 0.5},
    ]
    for world in (2, 3):
        metrics, answers_of_all = over_processes(world, tmp_path)
        for several, one in zip(metrics, alone, strict=True):
            assert several == pytest.approx(one, rel=1e-9)
            assert several.get("eval/supervised_tokens") == one.get("eval/supervised_tokens")
        for several, one in zip(answers_of_all, answered, strict=True):
            assert sorted(map(str, several)) == sorted(map(str, one))
    assert [len(answers) for answers in answered] == [7, 2]


def test_no_answer_passes_the_positions_and_none_depends_on_its_batch(accelerator, tokenizer):
    """A learned position beyond the last one is an IndexError; the answer of a long question still fits."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 105, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    rng = np.random.default_rng(0)
    questions = [
        (rng.integers(5, 100, n), np.full(length, 7)) for n, length in ((2, 6), (21, 3), (15, 4), (23, 1), (9, 2))
    ]
    # What the model says, from plain transformers, one question at a time, at most up to position 24.
    expected = {}
    for prompt, _ in questions:
        ids, room = torch.from_numpy(prompt)[None], min(6 + 8, 24 - len(prompt))
        output = model.generate(ids, max_new_tokens=room, do_sample=False, eos_token_id=2, pad_token_id=0)
        expected[tokenizer.decode(prompt)] = tokenizer.decode(output[0, len(prompt) :])
    for batch_size in (1, 2, 5):
        answers = exact_match(accelerator, model, tokenizer, questions, batch_size, [EOS])[1]
        assert {answer.prompt: answer.generated for answer in answers} == expected
    # With more positions than are needed all of them get as many tokens as the longest answer and 8.
    with pytest.raises(IndexError):
        model.generate(torch.from_numpy(questions[3][0])[None], max_new_tokens=14, do_sample=False, pad_token_id=0)


def test_the_models_own_generation_settings_do_not_change_the_answers(accelerator, tiny_llama, tokenizer):
    model, rng = tiny_llama(3), np.random.default_rng(2)
    questions = [(rng.integers(5, 100, n), np.array([7, EOS])) for n in (3, 17, 30)]
    before = generate(accelerator, model, tokenizer, questions, 2)
    own = model.generation_config
    own.repetition_penalty, own.min_new_tokens, own.suppress_tokens = 5.0, 4, [20, 21, 22]
    own.no_repeat_ngram_size, own.num_beams, own.do_sample = 2, 2, True
    assert generate(accelerator, model, tokenizer, questions, 2) == before
    assert model.generation_config is own and own.repetition_penalty == 5.0


def test_an_evaluation_that_fails_ends_no_run_of_one_process(accelerator, tiny_llama, tokenizer, tmp_path, monkeypatch):
    model, rows = memorized(tiny_llama)
    options = TrainOptions(
        output_dir=str(tmp_path), packing=False, max_length=MAX_LENGTH, eval_steps=2, eval_generate=3
    )
    meter = Meter(accelerator, options, TrainingPlan(4, 4, 20, 5), Record(tmp_path, True))
    evaluation = Evaluation(accelerator, tokenizer, rows, options, [EOS])
    original = LlamaForCausalLM.generate

    def failing(self, *arguments, **settings):
        raise ArithmeticError("no answer\nfits")

    monkeypatch.setattr(LlamaForCausalLM, "generate", failing)
    evaluation.when_due(model, meter, 2)
    problem = "The evaluation after step 2 failed (ArithmeticError: no answer fits)."
    assert json.loads((tmp_path / "run.json").read_text())["problems"] == [problem]
    assert model.training and evaluation.step is None
    with pytest.raises(ConfigError, match="The run is done and its weights are complete, but"):
        meter.end_run()
    with pytest.raises(
        RuntimeError, match=r"after the last step failed .*The trained model is complete in there; the same"
    ):
        evaluation.at_end(model, meter, Path("there"), 4)
    with pytest.raises(ArithmeticError):  # nothing is lost yet
        evaluation.at_start(model, meter, Start(output_dir=tmp_path, evaluate=True))
    monkeypatch.setattr(LlamaForCausalLM, "generate", original)
    evaluation.when_due(model, meter, 4)
    assert evaluation.step == 4 and evaluation.metrics["eval/exact_match"] == 1.0
