"""Scores that a classifier, or a reward model, gives the texts of rows, for `launch/predict.py`."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from accel_llm.adapters.compat import read_adapter
from accel_llm.adapters.locate import find_adapter, find_base
from accel_llm.adapters.saved import read_adapter_config
from accel_llm.chat.template import Template, load_template
from accel_llm.config.fields import Source
from accel_llm.config.tool_options import PredictOptions
from accel_llm.data.batches import to_device
from accel_llm.data.columns import column_problems
from accel_llm.data.encode_labelled import check_contents, encode_text_pairs
from accel_llm.data.formats import Conversation, Document, parse_row
from accel_llm.data.labelled_rows import labelled_column_problems, name_columns, parse_texts
from accel_llm.data.labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from accel_llm.data.sources import RawRow, as_source, read_source
from accel_llm.data.texts import place_texts
from accel_llm.errors import ConfigError, DataError, raise_problems
from accel_llm.merge.classifier_head import adapted_config, class_names, complete_config
from accel_llm.merge.dialogues import find_models, tokenizer_source
from accel_llm.merge.input_rows import TOO_LONG, InputRow, row_format
from accel_llm.merge.load import load_to_ask
from accel_llm.merge.prompt_predictions import check_known, name_limit, smallest_limit, template_identity
from accel_llm.merge.skeleton import read_model_config
from accel_llm.model.attention import enable_packing, enable_padding, unwrap_causal_lm
from accel_llm.model.classifier import REWARD_LABEL, has_scores
from accel_llm.model.encoders import text_scores
from accel_llm.model.model_names import check_model_name
from accel_llm.model.positions import position_limit
from accel_llm.model.text_probe import check_text_scores, text_packing_obstacle
from accel_llm.model.tokenizer import load_tokenizer
from accel_llm.training.classes import give_segments

# The options that change scores, beside the model and the rows.
_DECIDING = ("max_length", "overlong", "precision", "load_in_4bit", "data_format", "columns")
_OF_ANSWERS = ("max_new_tokens", "temperature", "chat_template")  # options that only language models have
_DIGITS = 7  # of a number in the output: those of float32
_SHOWN = 20  # classes in a line
_NO_SCORE = "no score"


class Text(NamedTuple):
    """The tokens of a row; `second_start` is where token types turn from 0 to 1, None if there are none."""

    number: int
    ids: list[int]
    second_start: int | None


def asks_classifier(options: PredictOptions) -> bool:
    """Return whether the model of the options gives scores and no answers. No weight is read.

    Raises:
        ConfigError: there is no such model, or it gives neither.
    """
    given = find_adapter(options.model)
    if (given / "adapter_config.json").is_file():
        task = read_adapter_config(given).get("task_type")
        if task is not None:
            return task == "SEQ_CLS"
        base, field = find_base(given, options.base), "base"
    else:
        base, field = str(given / "model") if (given / "model" / "config.json").is_file() else options.model, "model"
        check_model_name(base, field)
    config = read_model_config(base, options.trust_remote_code, field)
    if str((config.architectures or [""])[0]).endswith("ForMaskedLM"):
        problem = "is a masked language model, which gives neither answers nor labels"
        raise ConfigError(f"{field}: {base} {problem}; train it with launch/classify.py, and name that run.")
    return has_scores(config)


def open_texts(options: PredictOptions) -> "TextAnswers":
    """Load the classifier of the options.

    Raises:
        ConfigError: it cannot be loaded, weights of its head are in no file, or an option does not fit it.
    """
    adapters, base, field = find_models(options, [])
    folders = list(adapters.values())
    config = read_model_config(base, options.trust_remote_code, field)
    config = (
        adapted_config(config, read_adapter(folders[0], options.allow_pickle), options.trust_remote_code)
        if folders
        else complete_config(config)
    )
    _check_names(config, options)
    source = tokenizer_source(folders[0], base) if folders else base
    tokenizer = load_tokenizer(source, trust_remote_code=options.trust_remote_code)
    give_segments(tokenizer, config)
    reads_chats = _reads_chats(config, tokenizer, options)
    raise_problems(_option_problems(options, reads_chats))
    template = load_template(tokenizer, options.chat_template) if reads_chats else None
    model = load_to_ask(base, field, options, folders, config)[-1]
    return TextAnswers(options, model, tokenizer, template)


def _check_names(config: PreTrainedConfig, options: PredictOptions) -> None:
    names = class_names(config)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(
            f"model: two classes of {options.model} are named {twice!r}; give each a name of its own in id2label of its "
            "config.json."
        )


def _reads_chats(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerFast, options: PredictOptions) -> bool:
    """Tell whether a model scores chats: a reward model, as launch/reward.py or other programs train it."""
    if config.num_labels != 1 or options.data_format == "text":
        return False
    (name,) = class_names(config)
    return name == REWARD_LABEL or (name == "LABEL_0" and bool(tokenizer.chat_template))


def _option_problems(options: PredictOptions, reads_chats: bool) -> list[str]:
    what = "a reward model" if reads_chats else "a classifier"
    wrong = [name for name in _OF_ANSWERS if not (reads_chats and name == "chat_template")]
    problems = [
        f"{name}: {options.model} is {what}, which scores whole texts and writes no answer; remove it."
        for name in wrong
        if name in options.model_fields_set
    ]
    if reads_chats and options.overlong == "truncate":
        problems.append("overlong: truncate would cut off the answer that a reward model scores; allowed is error.")
    for source in map(as_source, options.input_files):
        data_format, columns = row_format(source, options)
        if reads_chats:
            problems += column_problems(columns, data_format)
            continue
        problems += labelled_column_problems(columns)
        if data_format not in (None, "text"):
            problems.append(f"data_format: {data_format} is for language models; a classifier reads text.")
    return problems


class TextAnswers:
    """What `merge/predictions.py` needs to know of scores of texts; `prompt_predictions.py` has the same for answers.

    An answer is {"row": its number, "scores": the scores of all classes}. `packed`: the texts of a batch stand in one row,
    without padding. `size`: texts in a batch, 1 if the model cannot score several together.
    """

    unit = "texts"

    def __init__(
        self, options: PredictOptions, model: Any, tokenizer: PreTrainedTokenizerFast, template: Template | None
    ):
        self.options, self.model, self.tokenizer, self.template = options, model, tokenizer, template
        config = unwrap_causal_lm(model).config
        self.problem_type, self.classes = str(config.problem_type), class_names(config)
        self.names = {
            SINGLE_LABEL: ("predicted_label", "probability", "probabilities"),
            MULTI_LABEL: ("predicted_labels", "probabilities"),
            REGRESSION: ("predicted_score",),
        }[self.problem_type]
        self.positions = position_limit(config)
        # launch/classify.py keeps its max_length in the tokenizer, in place of a number beyond all lengths.
        self.limit = smallest_limit(options, self.positions, tokenizer.model_max_length)
        self.vocabulary = model.get_input_embeddings().weight.shape[0]
        self.pad = config.pad_token_id or 0
        self.packed, self.size = _choose_batches(model, options.per_device_eval_batch_size)
        self.alone = self.size < options.per_device_eval_batch_size
        self.answered, self.counts, self.without = 0, Counter[str](), 0
        self.total, self.smallest, self.largest = 0.0, math.inf, -math.inf

    def settings(self) -> dict[str, Any]:
        """Return what decides on the scores, beside the model and the rows."""
        return {name: getattr(self.options, name) for name in _DECIDING} | {
            "chat_template": template_identity(self.options)
        }

    def remarks(self) -> list[str]:
        """Return a sentence on what makes batches smaller."""
        if not self.alone:
            return []
        return ["Texts are scored one at a time: in a batch this model gives them other scores."]

    def read(self, source: Source) -> Iterator[RawRow]:
        """Return an iterator over the rows of a source; a table without a header gets names for its columns."""
        if self.template is not None:
            return read_source(source)
        columns = row_format(source, self.options)[1]
        return read_source(source, lambda cells: name_columns(cells, columns, needs_label=False))

    def encode(self, places: list[InputRow]) -> list[Text | DataError]:
        """Return the tokens of each row, or what is wrong with it."""
        found: dict[int, Text | DataError] = {}
        texts: dict[int, tuple[str, str | None]] = {}
        for k, place in enumerate(places):
            try:
                parsed = self._parse(place)
            except DataError as error:
                found[k] = error
                continue
            if isinstance(parsed, Text):
                found[k] = parsed
            else:
                texts[k] = parsed
        encodings = encode_text_pairs(list(texts.values()), self.tokenizer)
        for k, encoding in zip(texts, encodings, strict=True):
            try:
                check_contents(encoding)
                if self.limit is not None and len(encoding.input_ids) > self.limit:
                    special = len(encoding.input_ids) - sum(encoding.contents)
                    self._check_cut(len(encoding.input_ids), special + len(encoding.contents))
                    (encoding,) = encode_text_pairs([texts[k]], self.tokenizer, self.limit)
                check_known(encoding.input_ids, self.vocabulary)
                found[k] = Text(places[k].number, encoding.input_ids, encoding.second_start)
            except DataError as error:
                found[k] = error
        return [found[k] for k in range(len(places))]

    def _parse(self, place: InputRow) -> tuple[str, str | None] | Text:
        """Return the text of a row, or both, or the tokens of a chat with its answer.

        Raises:
            DataError: the row is bad, or its chat is too long.
        """
        data_format, columns = row_format(place.source, self.options)
        if self.template is None:
            return parse_texts(place.row.fields, columns)
        parsed = parse_row(place.row.fields, data_format, columns, self.template.reads)
        if isinstance(parsed, Document):
            return parsed.text, None
        ids = self._chat_ids(parsed) if isinstance(parsed, Conversation) else parsed.input_ids
        check_known(ids, self.vocabulary)
        if self.limit is not None and len(ids) > self.limit:
            allowed = f"at most {self.limit:,} are allowed ({name_limit(self.limit, self.options, self.positions)})"
            raise DataError(f"the chat has {len(ids):,} tokens, and {allowed}", TOO_LONG)
        return Text(place.number, ids, None)

    def _chat_ids(self, chat: Conversation) -> list[int]:
        """Return the tokens of a chat up to its last one, at which a reward model is trained to score the answer.

        Raises:
            DataError: there is no answer.
        """
        assert self.template is not None
        rows = self.template.encode(chat.messages, tools=chat.tools, variables=chat.variables or None).rows
        if not rows:
            raise DataError("the chat has no answer to score; needs one at its end", _NO_SCORE)
        return list(rows[0].input_ids)

    def _check_cut(self, length: int, least: int) -> None:
        """Check that a text that is too long may be cut, and that something is left of it: `least` tokens.

        Raises:
            DataError: it may not, or nothing is left.
        """
        assert self.limit is not None
        reason = name_limit(self.limit, self.options, self.positions)
        problem = f"the text has {length:,} tokens, and at most {self.limit:,} are allowed ({reason})"
        if self.options.overlong == "error":
            raise DataError(f"{problem}; overlong: truncate cuts it as training does", TOO_LONG)
        if self.limit < least:
            raise DataError(f"{problem}; cutting leaves nothing of it, so raise max_length", TOO_LONG)

    def cut(self, questions: list[Text]) -> list[list[Text]]:
        """Return batches of at most `size` texts of similar length, the longest first."""
        texts = sorted(questions, key=lambda text: (-len(text.ids), text.number))
        return [texts[start : start + self.size] for start in range(0, len(texts), self.size)]

    @torch.no_grad()
    def answer(self, batch: list[Text]) -> list[dict[str, Any]]:
        """Score one batch: a value for each row, which JSON can hold.

        Raises:
            ConfigError: a score is no number.
        """
        ids, seconds = [np.array(text.ids) for text in batch], [text.second_start for text in batch]
        segments = None if None in seconds else [k for k in seconds if k is not None]
        placed = to_device(place_texts(ids, segments, self.packed, self.pad), self.model.device)
        scores = text_scores(self.model, placed)
        if not bool(scores.isfinite().all()):
            raise ConfigError(
                f"precision: scores of {self.options.model} are not finite in {unwrap_causal_lm(self.model).dtype}; set "
                "precision: fp32."
            )
        rows = scores.float().tolist()
        return [{"row": text.number, "scores": row} for text, row in zip(batch, rows, strict=True)]

    def work(self, value: dict[str, Any]) -> int:
        """Return how many of `unit` an answer took."""
        return 1

    def cells(self, value: dict[str, Any]) -> tuple[Any, ...]:
        """Return the cells of the new columns for the scores of one text."""
        scores = value["scores"]
        if self.problem_type == REGRESSION:
            return (_shorten(scores[0]) if len(scores) == 1 else self._by_name(scores),)
        if self.problem_type == MULTI_LABEL:
            probabilities = [1 / (1 + math.exp(-min(max(score, -700.0), 700.0))) for score in scores]
            return self._likely(scores), self._by_name(probabilities)
        exponentials = [math.exp(score - max(scores)) for score in scores]
        probabilities = [number / math.fsum(exponentials) for number in exponentials]
        best = scores.index(max(scores))
        return self.classes[best], _shorten(probabilities[best]), self._by_name(probabilities)

    def _likely(self, scores: list[float]) -> list[str]:
        """Return the labels with a probability over 0.5, which is a score over 0."""
        return [name for name, score in zip(self.classes, scores, strict=True) if score > 0]

    def _by_name(self, numbers: list[float]) -> dict[str, float]:
        return {name: _shorten(number) for name, number in zip(self.classes, numbers, strict=True)}

    def count(self, value: dict[str, Any]) -> None:
        """Count the scores of one text for `summary`."""
        scores = value["scores"]
        self.answered += 1
        if self.problem_type == SINGLE_LABEL:
            self.counts[self.classes[scores.index(max(scores))]] += 1
        elif self.problem_type == MULTI_LABEL:
            labels = self._likely(scores)
            self.counts.update(labels)
            self.without += not labels
        else:
            self.total += scores[0]
            self.smallest, self.largest = min(self.smallest, scores[0]), max(self.largest, scores[0])

    def summary(self, total: int) -> str:
        """Return a line on the scores of all texts of `total` rows."""
        line = f"{'scored' if self.problem_type == REGRESSION else 'classified'}: {self.answered:,} of {total:,} rows"
        if not self.answered:
            return line
        if self.problem_type == REGRESSION:
            return f"{line}, mean {self.total / self.answered:.4g}, from {self.smallest:.4g} to {self.largest:.4g}"
        order = self.classes if len(self.classes) <= _SHOWN else [name for name, _ in self.counts.most_common(_SHOWN)]
        parts = [f"{name} {self.counts[name]:,} ({self.counts[name] / self.answered:.1%})" for name in order]
        parts += [f"{len(self.classes) - _SHOWN:,} more classes"] if len(self.classes) > _SHOWN else []
        parts += [f"no label {self.without:,}"] if self.without else []
        return f"{line}: {', '.join(parts)}"


def _shorten(number: float) -> float:
    """Return a number with the digits that float32 has."""
    return float(f"{number:.{_DIGITS}g}")


def _choose_batches(model: Any, size: int) -> tuple[bool, int]:
    """Switch the model to the attention of training; return whether batches are packed, and how many texts they have.

    The model itself tells whether its scores of texts in a batch are those of each text alone, as in training.
    """
    inner = unwrap_causal_lm(model)
    device, dtype, stock = inner.device, inner.dtype, str(inner.config._attn_implementation)
    if text_packing_obstacle(model, device, dtype) is None:
        enable_packing(model)
        return True, size
    enable_padding(model)
    try:
        check_text_scores(model, device, dtype)
    except ConfigError:
        inner.set_attn_implementation(stock)
        return False, 1
    return False, size
