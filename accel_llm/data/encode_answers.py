"""Encode rows of preferences. Both sides of a pair are kept or dropped together, and neither is ever shortened."""

from array import array
from dataclasses import replace

from accel_llm.chat.encoded import EncodedConversation, EncodedRow
from accel_llm.chat.targets import IGNORED
from accel_llm.chat.template import Template
from accel_llm.chat.values import BAD_WEIGHT, EQUAL_ANSWERS, NO_SHARED_PROMPT, ONE_END_TOKEN
from accel_llm.config.data_options import DataOptions
from accel_llm.data.encode import (
    NOTHING_TRAINED,
    Chunk,
    Encoder,
    SourceRow,
    apply_template,
    drop_or_raise,
    hash_tokens,
    note_encoding,
    note_unused,
)
from accel_llm.data.ledger import TRAINED
from accel_llm.data.pairs import Judged, parse_preferences
from accel_llm.errors import DataError

Answer = tuple[array, array]  # ids and labels of prompt and answer, int32 [n] each


def preference_problems(options: DataOptions) -> list[str]:
    """Return a sentence for each option that would train other tokens of a pair than its two answers."""
    problems = []
    if options.overlong in ("truncate", "split"):
        problem = "would cut the two answers of a pair differently; allowed are drop and error"
        problems.append(f"overlong: {options.overlong} {problem}.")
    if options.train_on == "all":
        problems.append("train_on: all trains the prompt, which both answers share; allowed is assistant.")
    if options.split_turns:
        problem = "would give one side of a pair more rows than the other; allowed is false"
        problems.append(f"split_turns: {str(options.split_turns).lower()} {problem}.")
    if options.data_format in ("text", "tokenized"):
        problems.append(f"data_format: {options.data_format} rows have no answers to compare; give conversations.")
    return problems


def encode_answer_chunk(rows: list[SourceRow], encoder: Encoder) -> Chunk:
    """Encode rows of preferences, as `encode_chunk` encodes rows of fine-tuning. In the ledger a pair is one row.

    Raises:
        DataError: a bad row, or with `overlong: error` a pair that is too long; the message names file and row.
    """
    chunk = Chunk()
    for row in rows:
        data_format, columns = encoder.formats[row.source]
        template, kind = encoder.template, encoder.preferences
        assert kind is not None
        try:
            if template is None:
                raise DataError(*encoder.no_template)
            parsed = parse_preferences(row.row.fields, kind, data_format, columns, template.reads)
        except DataError as error:
            drop_or_raise(row, error, encoder, chunk)
            continue
        note_unused(chunk.ledger, parsed)
        for judged in parsed.judged:
            try:
                answers = _encode_sides(judged, template, encoder, chunk)
            except DataError as error:
                drop_or_raise(row, error, encoder, chunk)
                continue
            _add_answers(chunk, row, judged, answers, encoder)
    return chunk


def _encode_sides(judged: Judged, template: Template, encoder: Encoder, chunk: Chunk) -> list[Answer]:
    """Encode the sides, and note what the template does not write. Nothing is returned if a turn has no label.

    Raises:
        DataError: the two sides cannot be compared.
    """
    options = encoder.options
    if len(judged.sides) == 2:
        _check_end(judged, template, encoder)
    encodings = [apply_template(side, template, options) for side in judged.sides]
    # A variable that lets the template write reasoning may change the prompt, so both sides have it.
    variables = {encoding.variable: True for encoding in encodings if encoding.variable}
    if variables:
        encodings = [
            encoding if encoding.variable else apply_template(side, template, options, variables)
            for side, encoding in zip(judged.sides, encodings, strict=True)
        ]
    for k, (side, encoding) in enumerate(zip(judged.sides, encodings, strict=True)):
        noted = _without_noted(encoding, encodings[0]) if k else encoding
        note_encoding(noted, side, template, options, chunk, may_split=False)
    if any(encoding.lost or not encoding.rows for encoding in encodings):
        return []
    answers = [_as_answer(encoding.rows[0]) for encoding in encodings]
    if len(answers) == 2:
        _compare_answers(answers, same_prompt=not options.gives_scores)
    return answers


def _without_noted(encoding: EncodedConversation, first: EncodedConversation) -> EncodedConversation:
    """Return the encoding of the second side without what the first has too: the ledger counts pairs, not sides."""
    return replace(
        encoding,
        left_out=tuple(kind for kind in encoding.left_out if kind not in first.left_out),
        rendered_before=encoding.rendered_before and not first.rendered_before,
        variable="" if first.variable else encoding.variable,
    )


def _as_answer(row: EncodedRow) -> Answer:
    """Return ids and labels of a row. The first token is context: no token comes before it that could predict it.

    Raises:
        DataError: some tokens count more than others, which has no meaning for the probability of an answer.
    """
    weights = [] if row.weights is None else row.weights
    if any(weight != 1 for weight, label in zip(weights, row.labels, strict=bool(weights)) if label != IGNORED):
        raise DataError("weight: an answer that is compared with others counts in full; remove the weights", BAD_WEIGHT)
    return array("i", row.input_ids), array("i", [IGNORED, *row.labels[1:]])


def _check_end(judged: Judged, template: Template, encoder: Encoder) -> None:
    """Check that no end token is written into the text of one answer alone: it would tell good answers from bad ones.

    Raises:
        DataError: one of the two is.
    """
    tokens = {str(token) for token in (template.turn_end, encoder.tokenizer.eos_token) if token}
    texts = [str(side.messages[-1]["content"]).rstrip() for side in judged.sides]
    found = [next((token for token in tokens if text.endswith(token)), None) for text in texts]
    if (found[0] is None) != (found[1] is None):
        side, other = ("chosen", "rejected") if found[0] else ("rejected", "chosen")
        problem = f"its text ends with {found[0] or found[1]}, that of the {other} answer does not"
        raise DataError(f"{side}: {problem}; the template adds it, so remove it from the row", ONE_END_TOKEN)


def _compare_answers(answers: list[Answer], same_prompt: bool) -> None:
    """Check that two encoded sides differ and, with `same_prompt`, continue the same tokens.

    A reward is given to a whole text, in which the first letters of an answer may decide on the tokens before it.

    Raises:
        DataError: they do not.
    """
    if answers[0][0] == answers[1][0]:
        raise DataError("chosen and rejected: the template writes the same text for both", EQUAL_ANSWERS)
    if same_prompt and count_shared(answers) < _first_label(answers):
        problem = "what stands before the trained tokens differs, so their probabilities cannot be compared"
        raise DataError(f"chosen and rejected: {problem}", NO_SHARED_PROMPT)


def _first_label(answers: list[Answer]) -> int:
    """Return the place of the first label of any answer."""
    return min(next(k for k, label in enumerate(labels) if label != IGNORED) for _, labels in answers)


def count_shared(answers: list[Answer]) -> int:
    """Return the number of tokens with which both sides begin, up to the first label of either."""
    limit = _first_label(answers)
    chosen, rejected = (ids[:limit] for ids, _ in answers)
    if chosen == rejected:
        return limit
    return next(k for k, (one, other) in enumerate(zip(chosen, rejected, strict=True)) if one != other)


def _add_answers(chunk: Chunk, row: SourceRow, judged: Judged, answers: list[Answer], encoder: Encoder) -> None:
    """Add the rows of a pair, or of one answer, to the chunk, and count their tokens, a shared prompt once."""
    options, label, ledger, part = encoder.options, encoder.labels[row.source], chunk.ledger, chunk.part
    shared = count_shared(answers) if len(answers) == 2 else 0
    length = sum(len(ids) for ids, _ in answers) - shared
    supervised = sum(len(labels) - labels.count(IGNORED) for _, labels in answers)
    amounts = 1, supervised, length - supervised
    ledger.read(label, *amounts)
    if not answers:
        ledger.count(label, NOTHING_TRAINED, *amounts)
        return
    chunk.lengths[length] += 1
    room = options.max_length - options.virtual_tokens
    if length > room:
        virtual = f" less {options.virtual_tokens} virtual tokens" if options.virtual_tokens else ""
        too_long = f"longer than max_length={options.max_length}{virtual}"
        if options.overlong == "error":
            what = "a pair of" if shared else "an answer of"
            raise DataError(
                f"{row.row.file}, row {row.row.number}: {what} {length} tokens, prompt included, is {too_long}; raise "
                "it, or set overlong: drop."
            )
        what = "the prompt alone is " if _first_label(answers) >= room else ""
        ledger.count(label, f"dropped: {what}{too_long}", *amounts)
        return
    digest = hash_tokens(sum((ids for ids, _ in answers), array("i")))
    for ids, labels in answers:
        part.add(ids, labels, None, row.row.number, row.origin, digest)
    if judged.label is None:
        part.shared.extend([shared, shared])
        part.margin.extend([judged.margin, judged.margin])
    else:
        part.label.append(judged.label)
    ledger.count(label, TRAINED, *amounts)
