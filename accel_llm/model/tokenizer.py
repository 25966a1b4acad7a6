"""Loads and checks the tokenizer of a run."""

import numpy as np
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from accel_llm.config.options import ModelOptions
from accel_llm.errors import ConfigError
from accel_llm.model.loading import LOADING_ERRORS, short_reason
from accel_llm.model.model_names import model_source
from accel_llm.model.padding import embedding_rows
from accel_llm.model.tokenizer_pattern import load_with_right_pattern
from accel_llm.model.untrusted import check_untrusted_tokenizer


def configured_tokenizer(options: ModelOptions) -> PreTrainedTokenizerFast:
    """Load the tokenizer that the options name, else the model's own.

    Raises:
        ConfigError: neither is named, or the tokenizer cannot be loaded.
    """
    name = options.tokenizer_name or model_source(options)
    return load_tokenizer(name, options.revision, options.trust_remote_code)


def load_tokenizer(name: str, revision: str = "main", trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model folder or hub id, without truncation or padding, and with a pad token.

    Raises:
        ConfigError: the tokenizer cannot be loaded, or it is not a fast tokenizer (masks need offsets).
    """
    check_untrusted_tokenizer(name, revision, trust_remote_code)
    try:
        tokenizer = load_with_right_pattern(name, revision=revision, trust_remote_code=trust_remote_code)
    except LOADING_ERRORS as error:
        raise ConfigError(
            f"tokenizer_name: no tokenizer could be loaded from {name} ({short_reason(error)})."
        ) from None
    if not tokenizer.is_fast:
        raise ConfigError(
            f"tokenizer_name: {name} is not a fast tokenizer (no tokenizer.json); exact masks need its offsets."
        )
    # A tokenizer.json saved during training can contain truncation and padding, which would cut or fill every row.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if tokenizer.pad_token_id is None:
        # The pad id may equal the eos id: labels go by position and attention by length, so nothing gets masked by id.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def pad_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id that fills a padded batch; every tokenizer from `load_tokenizer` has one."""
    token = tokenizer.pad_token_id
    assert isinstance(token, int)
    return token


def check_token_ids(
    parts: list[np.ndarray],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    new_tokens: range = range(0),
    remedy: str = "use the model's own tokenizer",
) -> None:
    """Check that the embedding has, or will get, a row for every token id of the data; `remedy` says what to do if not.

    Raises:
        ConfigError: an id is too large.
    """
    rows = embedding_rows(config, new_tokens)
    largest = max(int(input_ids.max()) for input_ids in parts)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ConfigError(
            f"tokenizer_name: the data holds token id {largest} ({token!r}), but the model's vocabulary has {rows} "
            f"rows; {remedy}."
        )
