"""Pad ids that a model has no row for, or that end a text to score: taken out of its config, replaced in its tokenizer."""

from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from accel_llm.data.prepare import EncodedData
from accel_llm.system.launcher import process_rank


def drop_invalid_pad_ids(config: PreTrainedConfig) -> None:
    """Remove a pad id that is no row of the embedding; transformers 5.24 could not build the model with it.

    It takes -1 (old Llama configs) for the last row, which would then never be trained.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    for part in (config, config.get_text_config()):
        pad = getattr(part, "pad_token_id", None)
        if isinstance(rows, int) and isinstance(pad, int) and not 0 <= pad < rows:
            part.pad_token_id = None


def embedding_rows(config: PreTrainedConfig, new_tokens: range = range(0)) -> int:
    """Return the number of rows that the embedding has, or will get with `new_tokens`."""
    return max(config.get_text_config().vocab_size, new_tokens.stop if new_tokens else 0)


def fit_pad_token(tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig, new_tokens: range = range(0)) -> None:
    """Give `tokenizer` another pad token if the model's embedding has, and will get, no row for its own.

    Often somebody added a pad token to a tokenizer and did not resize the model. Padding would then be an IndexError,
    here and for everybody who loads the exported tokenizer and generation config.
    """
    old_id: Any = tokenizer.pad_token_id
    rows, old = embedding_rows(config, new_tokens), tokenizer.pad_token
    if old_id < rows:
        return
    # No token is masked by its id, so any token can fill a batch; the first of these is what others use too.
    candidates = (tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0)
    new_id = next(token for token in candidates if isinstance(token, int) and token < rows)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(new_id)
    if process_rank() == 0:
        print(
            f"pad token: {old} has id {old_id}, but the model has only {rows} rows; {tokenizer.pad_token} (id {new_id}) "
            "takes its place, also in the exported tokenizer",
            flush=True,
        )


def separate_pad_token(
    tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig, data: EncodedData, turn_end: int | None
) -> None:
    """Give `tokenizer` another pad token if turns, or rows of `data`, end with its own; write its id into `config`.

    transformers 5.24 takes the score of a row at the last token that is not the pad token of the config: in a row that
    ends with this token it would be the score of an earlier one, without a word. Without a pad token it takes one row
    at a time.
    """
    old, rows, ends = tokenizer.pad_token, embedding_rows(config), {turn_end}
    for part in (data.train, data.eval):
        ends |= set() if part is None else set(part.input_ids[part.offsets[1:] - 1].tolist())
    if tokenizer.pad_token_id in ends:
        names = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        candidates = (*names, *sorted(tokenizer.all_special_ids), *range(rows))
        new_id = next(k for k in candidates if isinstance(k, int) and k < rows and k not in ends)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(new_id)
        if process_rank() == 0:
            print(
                f"pad token: texts to score end with {old}, which transformers would take for padding; "
                f"{tokenizer.pad_token} (id {new_id}) takes its place, also in what is exported",
                flush=True,
            )
    config.pad_token_id = tokenizer.pad_token_id
