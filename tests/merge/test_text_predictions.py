"""Labels, probabilities and scores of rows are those that plain transformers and PEFT give each text alone."""

import csv
import json
import shutil
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import GPT, SIZES, character_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    CONFIG_MAPPING,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from accel_llm.adapters.saved import BASE_BITS, BASE_FINGERPRINT
from accel_llm.config.tool_options import ChatOptions, PredictOptions
from accel_llm.demo.skills import demo_conversations
from accel_llm.demo.tokenizer import build_demo_tokenizer
from accel_llm.errors import ConfigError, DataError
from accel_llm.merge.dialogues import open_dialogues
from accel_llm.merge.predictions import Predictions, check_files, open_predictions
from accel_llm.merge.prompt_predictions import open_prompts
from accel_llm.merge.text_predictions import TextAnswers, asks_classifier, open_texts
from accel_llm.model.classifier import REWARD_LABEL
from accel_llm.model.encoders import classifier_config, head_names
from accel_llm.model.fingerprint import model_fingerprint
from accel_llm.model.quantization import nf4_config

pytestmark = [
    pytest.mark.usefixtures("quiet"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT's
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SHARED = Path(__file__).parents[3] / "shared" / "data"
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
NAMES = ["bad", "good", "no opinion"]
POSITIONS = 96
ALL_SIZES = SIZES | {"vocab_size": 110, "max_position_embeddings": POSITIONS}
# Options of each family, the layers with a LoRA, and whether the texts of a batch stand in one row.
FAMILIES: dict[str, tuple[dict[str, Any], list[str], bool]] = {
    "bert": ({"type_vocab_size": 2}, ["query", "value"], True),
    "distilbert": ({"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}, ["q_lin", "v_lin"], True),
    "roberta": ({"type_vocab_size": 1, "max_position_embeddings": POSITIONS + 1}, ["query", "value"], True),
    "modernbert": ({"local_attention": 16}, ["Wqkv"], True),
    "deberta-v2": ({"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, ["query_proj"], False),
    "llama": ({}, ["q_proj", "v_proj"], True),
    "gpt2": (GPT | {"n_positions": POSITIONS}, ["c_attn"], True),
}


def text_tokenizer(segments: bool = True) -> PreTrainedTokenizerFast:
    """A token for each character, with first and last token as encoders have them."""
    tokenizer = character_tokenizer()
    backend: Any = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1" if segments else "<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if segments else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_input_names=names
    )


def build(family: str, problem_type: str = SINGLE, names: list[str] = NAMES, **options: Any) -> Any:
    """A classifier with values so large that each text has other scores."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**{**ALL_SIZES, **FAMILIES[family][0], **options})
    model = AutoModelForSequenceClassification.from_config(classifier_config(config, (problem_type, names)))
    return center(move(model, 0.2).eval())


def center(model: Any) -> Any:
    """Let the head, if it has a bias, give scores around 0, so that texts have different labels."""
    last: Any = model.get_submodule(head_names(model)[-1])
    last = getattr(last, "out_proj", last)
    if last.bias is not None:
        with torch.no_grad():
            last.bias -= torch.cat([model(input_ids=ids).logits for ids in torch.randint(9, 90, (9, 1, 30))]).mean(0)
    return model


def move(model: Any, by: float) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * by)
    return model


def save(model: Any, folder: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    model.save_pretrained(folder)
    (tokenizer or text_tokenizer("bert" in str(type(model)).lower())).save_pretrained(folder)
    return folder


def some_texts(count: int, longest: int = 60) -> list[str]:
    rng = np.random.default_rng(0)
    letters = list(string.ascii_lowercase + "   ")
    return ["x" + "".join(rng.choice(letters, rng.integers(1, longest))) for _ in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def reviews(tmp_path) -> Path:
    """30 texts, or pairs of texts in every third row's neighbor, with a column that nobody reads and a label."""
    return write(
        tmp_path / "reviews.jsonl",
        [{"id": k, "text": text, "label": NAMES[k % 3]} for k, text in enumerate(some_texts(30))],
    )


def predict(model: Path | str, file: Path, output: str = "out.jsonl", **options: Any) -> list[dict[str, Any]]:
    """Do as launch/predict.py does, and return the rows of its output."""
    path = file.with_name(output)
    settings = PredictOptions(model=str(model), input_files=[str(file)], output_file=str(path), **options)
    input_hash = check_files(settings)
    assert asks_classifier(settings)
    with open_predictions(settings, open_texts(settings), input_hash) as predictions:
        predictions.survey()
        for batch in predictions.batches_left():
            predictions.answer(batch)
        predictions.finish()
    if path.suffix != ".jsonl":
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def alone(model: Any, tokenizer: Any, *texts: str, **options: Any) -> torch.Tensor:
    """What plain transformers gives one text, or two, float64 [labels]."""
    encoded = tokenizer(*texts, return_tensors="pt", **options)
    names = ("input_ids", "attention_mask", "token_type_ids")
    takes_types = (getattr(model.config, "type_vocab_size", None) or 0) > 1
    given = {name: encoded[name] for name in names if name in encoded and (name != "token_type_ids" or takes_types)}
    with torch.no_grad():
        return model(**given).logits[0].double()


def check_classes(rows: list[dict[str, Any]], scores: list[torch.Tensor], names: list[str] = NAMES) -> None:
    """Check labels and probabilities against scores of each text alone."""
    assert len(rows) == len(scores)
    for row, own in zip(rows, scores, strict=True):
        expected = own.softmax(-1)
        assert list(row["probabilities"]) == names
        assert list(row["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert row["predicted_label"] == names[int(expected.argmax())]
        assert row["probability"] == row["probabilities"][row["predicted_label"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_are_those_of_each_text_alone(family, reviews, tmp_path):
    """For batches of any size, whether the family's texts are packed into one row or padded."""
    model = build(family)
    folder, tokenizer = save(model, tmp_path / "model"), text_tokenizer("bert" in family)
    scores = [alone(model, tokenizer, text) for text in some_texts(30)]
    for size in (1, 7, 64):
        rows = predict(folder, reviews, f"{size}.jsonl", per_device_eval_batch_size=size)
        assert [list(row) for row in rows] == [
            ["id", "text", "label", "predicted_label", "probability", "probabilities"]
        ] * 30
        assert [row["id"] for row in rows] == list(range(30)) and rows[4]["label"] == NAMES[1]
        check_classes(rows, scores)
    assert len({row["predicted_label"] for row in rows}) > 1 or family in ("llama", "gpt2")  # without a bias
    settings = PredictOptions(model=str(folder), input_files=[str(reviews)], output_file="x.csv")
    answerer = open_texts(settings)
    assert (answerer.packed, answerer.size) == (FAMILIES[family][2], 16)


def test_a_model_whose_padding_counts_scores_one_text_at_a_time(reviews, tmp_path, monkeypatch):
    """The check at the start finds it; without the check the scores would be others."""
    model = build("deberta-v2")
    folder, tokenizer = save(model, tmp_path / "model"), text_tokenizer()
    module = type(model.base_model)
    forward = module.forward
    monkeypatch.setattr(
        module, "forward", lambda self, input_ids=None, attention_mask=None, **k: forward(self, input_ids, **k)
    )
    scores = [alone(model, tokenizer, text) for text in some_texts(30)]
    settings = PredictOptions(model=str(folder), input_files=[str(reviews)], output_file="x.csv")
    answerer = open_texts(settings)
    assert answerer.size == 1 and "one at a time" in answerer.remarks()[0]
    check_classes(predict(folder, reviews), scores)

    monkeypatch.setattr("accel_llm.merge.text_predictions.check_text_scores", lambda *_: None)
    with pytest.raises(AssertionError):
        check_classes(predict(folder, reviews, "unchecked.jsonl"), scores)


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_two_texts_of_a_row_are_read_as_the_tokenizer_joins_them(family, tmp_path):
    model, tokenizer = build(family), text_tokenizer(family == "bert")
    folder = save(model, tmp_path / "model", tokenizer)
    texts = some_texts(24, 30)
    pairs = list(zip(texts[:12], texts[12:], strict=True))
    file = write(tmp_path / "pairs.jsonl", [{"premise": one, "hypothesis": two} for one, two in pairs])
    check_classes(predict(folder, file), [alone(model, tokenizer, *pair) for pair in pairs])
    # Columns with other names, and a second text that counts.
    other = write(tmp_path / "other.jsonl", [{"a": one, "b": two} for one, two in pairs])
    named = predict(folder, other, "named.jsonl", columns={"text": "a", "text_pair": "b"})
    check_classes(named, [alone(model, tokenizer, *pair) for pair in pairs])
    first = predict(folder, other, "first.jsonl", columns={"text": "a"})
    check_classes(first, [alone(model, tokenizer, one) for one, _ in pairs])


def adapted(family: str, folder: Path, problem_type: str = SINGLE, names: list[str] = NAMES, **saved: Any) -> Any:
    """Save a base without a head and an adapter with one; return PEFT's model."""
    model = build(family, problem_type, names)
    save(model.base_model, folder / "base", text_tokenizer("bert" in family))
    model.name_or_path = str(folder / "base")
    settings = {"target_modules": FAMILIES[family][1], "modules_to_save": head_names(model)} | saved
    config = LoraConfig(task_type="SEQ_CLS", init_lora_weights=False, **settings)
    wrapped: Any = move(get_peft_model(model, config), 0.1).eval()
    wrapped.save_pretrained(folder / "run" / "adapter")
    return wrapped


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert", "llama"])
def test_adapters_predict_as_plain_peft(family, reviews, tmp_path):
    """On a base without a head; the labels are those of config.json beside the adapter, or have transformers' names."""
    wrapped, tokenizer = adapted(family, tmp_path), text_tokenizer("bert" in family)
    scores = [alone(wrapped, tokenizer, text) for text in some_texts(30)]
    check_classes(predict(tmp_path / "run", reviews), scores, ["LABEL_0", "LABEL_1", "LABEL_2"])
    wrapped.config.save_pretrained(tmp_path / "run" / "adapter")
    check_classes(predict(tmp_path / "run" / "adapter", reviews, "named.jsonl"), scores)
    with wrapped.disable_adapter(), pytest.raises(AssertionError):
        check_classes(predict(tmp_path / "run", reviews, "again.jsonl"), [alone(wrapped, tokenizer, "x")] * 30)


def test_a_head_that_no_file_has_is_refused(reviews, tmp_path):
    adapted("modernbert", tmp_path, modules_to_save=["classifier"])
    with pytest.raises(ConfigError) as error:
        predict(tmp_path / "run", reviews)
    assert str(error.value) == (
        f"base: neither {tmp_path / 'base'} nor the adapter {tmp_path / 'run' / 'adapter'} has the weights "
        "head.dense.weight, head.norm.weight, so predictions would be random; name the classifier that the adapter was "
        "trained on with --base, or train the adapter again with these modules in modules_to_save."
    )
    folder = save(build("bert"), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"model: .*model lacks the weights classifier.bias, so its predictions would"
    ):
        predict(folder, reviews)


def test_several_labels_and_numbers(reviews, tmp_path):
    tokenizer = text_tokenizer()
    several, number = build("bert", MULTI), build("bert", REGRESSION, ["score"])
    rows = predict(save(several, tmp_path / "several"), reviews, "several.jsonl")
    counts = set()
    for row, text in zip(rows, some_texts(30), strict=True):
        expected = alone(several, tokenizer, text).sigmoid()
        assert list(row)[3:] == ["predicted_labels", "probabilities"]
        assert list(row["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
        assert row["predicted_labels"] == [name for name, p in zip(NAMES, expected, strict=True) if p > 0.5]
        counts.add(len(row["predicted_labels"]))
    assert len(counts) > 1
    rows = predict(save(number, tmp_path / "number"), reviews, "number.jsonl")
    expected = [float(alone(number, tokenizer, text)) for text in some_texts(30)]
    assert [row["predicted_score"] for row in rows] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert list(rows[0])[3:] == ["predicted_score"]


def test_without_a_problem_type_one_label_is_a_score_and_several_exclude_each_other(reviews, tmp_path):
    for labels, column in ((1, "predicted_score"), (2, "predicted_label")):
        model = build("bert", REGRESSION, [f"LABEL_{k}" for k in range(labels)])
        model.config.problem_type = None
        rows = predict(save(model, tmp_path / str(labels)), reviews, f"{labels}.jsonl")
        assert list(rows[0])[3] == column


def test_tables_hold_probabilities_as_json_and_parquet_as_numbers_by_name(reviews, tmp_path):
    several = save(build("bert", MULTI), tmp_path / "several")
    for folder in (save(build("bert"), tmp_path / "model"), several):
        rows = predict(folder, reviews, f"{folder.name}.jsonl")
        predict(folder, reviews, f"{folder.name}.parquet")
        assert pq.read_table(reviews.with_name(f"{folder.name}.parquet")).to_pylist() == rows
        predict(folder, reviews, f"{folder.name}.csv")
        with reviews.with_name(f"{folder.name}.csv").open(encoding="utf-8", newline="") as file:
            cells = list(csv.DictReader(file))
        for cell, row in zip(cells, rows, strict=True):
            assert json.loads(cell["probabilities"]) == row["probabilities"]
    assert json.loads(cell["predicted_labels"]) == row["predicted_labels"]


def test_files_of_any_kind_with_a_label_or_without_one(reviews, tmp_path):
    """Tables with a header or without; what is not read is kept."""
    folder = save(build("bert"), tmp_path / "model")
    expected = [row["probabilities"] for row in predict(folder, reviews)]
    texts = some_texts(30)
    (tmp_path / "a.tsv").write_text("sentence\n" + "\n".join(texts) + "\n", encoding="utf-8")
    (tmp_path / "b.tsv").write_text("".join(f"{text}\t{k % 2}\n" for k, text in enumerate(texts)), encoding="utf-8")
    (tmp_path / "c.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    for name, columns in (("a.tsv", {}), ("b.tsv", {}), ("b.tsv", {"text": "0"}), ("c.txt", {})):
        rows = predict(folder, tmp_path / name, f"{name}{len(columns)}.jsonl", columns=columns)
        assert [row["probabilities"] for row in rows] == expected
    rows = predict(folder, tmp_path / "b.tsv", "b.jsonl")
    assert [row["label"] for row in rows] == [str(k % 2) for k in range(30)]


def test_a_text_that_is_too_long_is_refused_or_cut_as_training_cuts_it(tmp_path):
    tokenizer, model = text_tokenizer(), build("bert")
    folder = save(model, tmp_path / "model")
    texts = ["short", "y" * 200, *some_texts(4)]
    file = write(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    with pytest.raises(DataError) as error:
        predict(folder, file)
    assert str(error.value) == (
        f"{file}, row 2: the text has 202 tokens, and at most {POSITIONS} are allowed (positions of the model); "
        "overlong: truncate cuts it as training does; on_bad_row: drop keeps such rows, without an answer."
    )
    rows = predict(folder, file, "dropped.jsonl", on_bad_row="drop")
    assert rows[1]["predicted_label"] is None and rows[1]["problem"].startswith("the text has 202 tokens")
    assert rows[0]["problem"] is None and rows[0]["probabilities"]
    rows = predict(folder, file, "cut.jsonl", overlong="truncate")
    cut = {"truncation": True, "max_length": POSITIONS}
    check_classes(rows, [alone(model, tokenizer, text, **cut) for text in texts])
    rows = predict(folder, file, "at_10.jsonl", overlong="truncate", max_length=10)
    check_classes(rows, [alone(model, tokenizer, text, truncation=True, max_length=10) for text in texts])
    with pytest.raises(DataError, match="cutting leaves nothing of it, so raise max_length"):
        predict(folder, file, "at_2.jsonl", overlong="truncate", max_length=2)
    with pytest.raises(ConfigError, match=r"max_length: 97, but the model has 96 positions; give no more."):
        predict(folder, file, "x.jsonl", max_length=97)
    # RoBERTa has one position less than its table has rows, with pad token 0.
    roberta = save(build("roberta"), tmp_path / "roberta", text_tokenizer(False))
    full = write(tmp_path / "full.jsonl", [{"text": "z" * (POSITIONS - 2)}, {"text": "z" * 300}])
    assert len(predict(roberta, full, "full_out.jsonl", overlong="truncate")) == 2


def test_bad_rows_keep_their_place(tmp_path):
    folder = save(build("bert"), tmp_path / "model")
    rows = [{"text": "a"}, {"text": " "}, {"text": 7}, {"title": "b", "text": "c"}, {"x": "y"}, {"text": "fine"}]
    file = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        DataError, match=r"rows.jsonl, row 2: text: the text is empty .*; on_bad_row: drop keeps such rows"
    ):
        predict(folder, file)
    written = predict(folder, file, on_bad_row="drop")
    assert [{k: row[k] for k in source} for row, source in zip(written, rows, strict=True)] == rows
    assert [row["problem"] is None for row in written] == [True, False, False, False, False, True]
    assert [row["probabilities"] is None for row in written] == [False, True, True, True, True, False]


def test_a_column_of_the_same_name_needs_a_prefix(reviews, tmp_path):
    folder = save(build("bert"), tmp_path / "model")
    predict(folder, reviews, "first.jsonl")
    first = reviews.with_name("first.jsonl")
    with pytest.raises(
        ConfigError, match=r"column_prefix: '' makes a new column 'predicted_label', but .*row 1 has one"
    ):
        predict(folder, first, "both.jsonl")
    (row, *_) = predict(folder, first, "both.jsonl", column_prefix="new_")
    assert list(row)[3:6] == [name.removeprefix("new_") for name in list(row)[6:]]
    assert row["new_probabilities"] == row["probabilities"]


@pytest.mark.long
def test_wherever_a_job_is_killed_it_goes_on_with_the_same_bytes(reviews, tmp_path, monkeypatch):
    folder = save(build("bert"), tmp_path / "model")
    options: dict[str, Any] = {"per_device_eval_batch_size": 4}
    predict(folder, reviews, "right.jsonl", **options)
    right, part = reviews.with_name("right.jsonl").read_bytes(), reviews.with_name("out.jsonl.part")
    kept = {}
    with monkeypatch.context() as patch, pytest.raises(FileNotFoundError):  # the output, which was not written
        patch.setattr(Predictions, "finish", lambda self: kept.update(content=self.part.path.read_bytes()))
        predict(folder, reviews, **options)

    scored: list[int] = []
    answer = TextAnswers.answer
    monkeypatch.setattr(TextAnswers, "answer", lambda self, batch: scored.append(len(batch)) or answer(self, batch))
    content = kept["content"]
    ends = [k + 1 for k, byte in enumerate(content) if byte == 10]
    for length in (0, 5, ends[0], ends[3] - 1, ends[3], len(content) - 1, len(content)):
        part.write_bytes(content[:length])
        scored.clear()
        predict(folder, reviews, **options, overwrite_output_file=True)
        assert reviews.with_name("out.jsonl").read_bytes() == right and not part.exists()
        assert len(scored) == len(ends) - max(1, sum(end <= length for end in ends))

    # Other settings, and other labels of the same weights, are refused.
    reviews.with_name("out.jsonl").unlink()
    for changes in ({"max_length": 50}, {"overlong": "truncate"}, {"columns": {"text": "text"}}):
        part.write_bytes(content[: ends[3]])
        with pytest.raises(ConfigError, match=f"was begun with other {next(iter(changes))} "):
            predict(folder, reviews, **options | changes)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["id2label"]["0"] = "awful"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match="was begun with another model"):
        predict(folder, reviews, **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"max_new_tokens": 5},
            "max_new_tokens: MODEL is a classifier, which scores whole texts and writes no answer; ",
        ),
        ({"temperature": 0.0}, "temperature: MODEL is a classifier, which scores whole texts and writes no answer; "),
        ({"chat_template": "chatml"}, "chat_template: MODEL is a classifier, which scores whole texts and writes no "),
        ({"data_format": "messages"}, "data_format: messages is for language models; a classifier reads text."),
        ({"columns": {"prompt": "q"}}, "columns: prompt=q, but 'prompt' is not a field of a text with a label; "),
    ],
)
def test_options_of_answers_are_refused(options, sentence, reviews, tmp_path):
    folder = save(build("bert"), tmp_path / "model")
    with pytest.raises(ConfigError) as error:
        predict(folder, reviews, **options)
    assert str(error.value).replace(str(folder), "MODEL").startswith(sentence)


def test_a_language_model_has_no_options_of_classifiers_and_a_classifier_no_answers(tiny, tmp_path):
    options = PredictOptions(model=str(tiny), input_files=["x"], output_file="x.csv", overlong="error")
    assert not asks_classifier(options)
    with pytest.raises(ConfigError, match=r"overlong: .* is a language model, whose prompts are never cut; remove it."):
        open_prompts(options)
    folder = save(build("bert"), tmp_path / "model")
    with pytest.raises(ConfigError, match=r"let it score texts with launch/predict.py"):
        open_dialogues(ChatOptions(model=str(folder)))
    adapted("bert", tmp_path)
    with pytest.raises(ConfigError, match=r"gives scores and no answers; let it score texts with launch/predict.py."):
        open_dialogues(ChatOptions(model=str(tmp_path / "run")))


def test_two_classes_of_one_name_are_refused(reviews, tmp_path):
    folder = save(build("bert"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["id2label"]["0"] = "good"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"model: two classes of .*model are named 'good'; give each a name of its own"
    ):
        predict(folder, reviews)


@pytest.fixture
def reward_model(tmp_path) -> Callable[[str], tuple[Path, Any, Any]]:
    """A model with one score and a chat template."""

    def make(name: str) -> tuple[Path, Any, Any]:
        tokenizer = build_demo_tokenizer()
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, "pad_token_id": 0}
        model = build("llama", REGRESSION, [name], **sizes)
        return save(model, tmp_path / name, tokenizer), model, tokenizer

    return make


def test_a_reward_model_scores_chats(reward_model, tmp_path):
    """At the last token that the template writes after the answer, as it was trained. Texts have no template."""
    chats = [row["messages"] for row in demo_conversations("train")[:9]]
    file = write(tmp_path / "chats.jsonl", [{"messages": chat} for chat in chats])
    for name in (REWARD_LABEL, "LABEL_0"):
        folder, model, tokenizer = reward_model(name)
        rows = predict(folder, file, f"{name}.jsonl")
        for row, chat in zip(rows, chats, strict=True):
            ids = tokenizer.apply_chat_template(chat, return_tensors="pt")["input_ids"]
            assert row["predicted_score"] == pytest.approx(float(model(input_ids=ids).logits), rel=1e-4, abs=1e-5)
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": c[0]["content"], "completion": c[1]["content"]} for c in chats])
    ids = tokenizer.apply_chat_template(chats[0][:2], return_tensors="pt")["input_ids"]
    assert predict(folder, pairs)[0]["predicted_score"] == pytest.approx(float(model(input_ids=ids).logits), rel=1e-4)

    asked = write(tmp_path / "asked.jsonl", [{"messages": chats[0][:1]}])
    with pytest.raises(DataError, match=r"asked.jsonl, row 1: "):
        predict(folder, asked, "asked_out.jsonl")
    long = write(tmp_path / "long.jsonl", [{"prompt": "a b " * 300, "completion": "c"}])
    with pytest.raises(
        DataError, match=r"the chat has .* tokens, and at most 256 are allowed \(positions of the model\)"
    ):
        predict(folder, long, "long_out.jsonl")
    with pytest.raises(ConfigError, match="overlong: truncate would cut off the answer that a reward model scores"):
        predict(folder, long, "long_out.jsonl", overlong="truncate")
    texts = write(tmp_path / "texts.jsonl", [{"text": "What is this?"}])
    ids = torch.tensor([tokenizer("What is this?").input_ids])
    for options in ({}, {"data_format": "text"}):
        (row,) = predict(folder, texts, f"text{len(options)}.jsonl", **options)
        assert row["predicted_score"] == pytest.approx(float(model(input_ids=ids).logits), rel=1e-4, abs=1e-5)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the data is not here")
@pytest.mark.long
def test_a_published_adapter_tells_published_texts_as_peft_alone_does(tmp_path):
    """PEFT 0.17's DistilBERT on texts of SST-2; the base has random values, with and without a head of its own."""
    published = SHARED / "adapters" / "peft0.17_distilbert_seqcls_modules_to_save_Tashu014"
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "bert-base-uncased")
    torch.manual_seed(0)
    base = DistilBertForSequenceClassification(DistilBertConfig()).eval()
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(2)
    save(base, tmp_path / "base", tokenizer)
    save(base.distilbert, tmp_path / "headless", tokenizer)
    lines = (SHARED / "seqcls" / "SST-2" / "dev.tsv").read_text(encoding="utf-8").splitlines(keepends=True)[:20]
    file = tmp_path / "dev.tsv"
    file.write_text("".join(lines), encoding="utf-8")
    texts = [line.rsplit("\t", 1)[0] for line in lines[1:]]
    model = PeftModel.from_pretrained(base, str(published)).eval()
    names = ["LABEL_0", "LABEL_1"]
    scores = [alone(model, tokenizer, text) for text in texts]
    for name in ("base", "headless"):
        rows = predict(published, file, f"{name}.jsonl", base=str(tmp_path / name))
        check_classes(rows, scores, names)
        assert [row["text"] for row in rows] == texts and {row["label"] for row in rows} == {"0", "1"}
    with model.disable_adapter(), pytest.raises(AssertionError):
        check_classes(rows, [alone(model, tokenizer, text) for text in texts], names)

    # Without the first layer of its head nobody could tell what it predicts on a base that lacks it, too.
    half = tmp_path / "half"
    half.mkdir()
    shutil.copyfile(published / "adapter_config.json", half / "adapter_config.json")
    weights = load_file(published / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".pre_classifier." not in name}
    save_file(kept, half / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"has the weights pre_classifier.bias, pre_classifier.weight, so predictions"
    ):
        predict(half, file, "half.jsonl", base=str(tmp_path / "headless"))


def test_an_adapter_of_virtual_tokens_is_refused(reviews, tmp_path):
    model = build("bert")
    save(model, tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"adapter: .* PROMPT_TUNING"):
        predict(tmp_path / "adapter", reviews)


def test_a_tokenizer_that_tells_nothing_of_segments_learns_it_from_the_model(tmp_path):
    """transformers 5.24 loads some files of BERT's tokenizer as one without token types."""
    model, tokenizer = build("bert"), text_tokenizer()
    folder = save(model, tmp_path / "model", tokenizer)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"model_input_names": ["input_ids", "attention_mask"]}), encoding="utf-8")
    assert "token_type_ids" not in AutoTokenizer.from_pretrained(folder)("a")
    pairs = list(zip(some_texts(20, 30)[:10], some_texts(20, 30)[10:], strict=True))
    file = write(tmp_path / "pairs.jsonl", [{"text": one, "text_pair": two} for one, two in pairs])
    check_classes(predict(folder, file), [alone(model, tokenizer, *pair) for pair in pairs])


def test_an_adapter_knows_its_base(reviews, tmp_path):
    adapted("bert", tmp_path)
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    mark = {"format": "pt", BASE_FINGERPRINT: model_fingerprint(str(tmp_path / "base"))}
    save_file(load_file(file), file, mark)
    assert len(predict(tmp_path / "run", reviews)) == 30
    other = save(move(build("bert").base_model, 0.1), tmp_path / "other")
    with pytest.raises(ConfigError, match=r"base: .*adapter was trained on another base model \(fingerprint "):
        predict(tmp_path / "run", reviews, "other.jsonl", base=str(other))
    assert len(predict(tmp_path / "run", reviews, "other.jsonl", base=str(other), allow_other_base=True)) == 30


def test_an_adapter_in_4_bits_is_asked_as_it_was_trained(reviews, tmp_path, monkeypatch):
    """The scores are those of PEFT on transformers' own 4-bit base, and not those on the base in 32 bits."""
    wrapped, tokenizer = adapted("llama", tmp_path), text_tokenizer(False)
    scores = [alone(wrapped, tokenizer, text) for text in some_texts(30)]
    file = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", BASE_BITS: "4"})
    names = ["LABEL_0", "LABEL_1", "LABEL_2"]
    rows = predict(tmp_path / "run", reviews)
    with pytest.raises(AssertionError):
        check_classes(rows, scores, names)
    check_classes(predict(tmp_path / "run", reviews, "whole.jsonl", load_in_4bit=False), scores, names)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)  # plain bitsandbytes may repack
    quantized = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, quantization_config=nf4_config(torch.float32), dtype=torch.float32
    )
    model = PeftModel.from_pretrained(quantized, str(tmp_path / "run" / "adapter")).eval()
    check_classes(rows, [alone(model, tokenizer, text) for text in some_texts(30)], names)
