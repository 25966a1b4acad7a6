"""The tokenizer of a run, checked."""

import numpy as np
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from accel_llm.config.options import ModelOptions
from accel_llm.errors import ConfigError
from accel_llm.model import loading
from accel_llm.model.loading import LOADING_ERRORS, short_reason
from accel_llm.model.untrusted import check_untrusted_tokenizer


def configured_tokenizer(options: ModelOptions) -> PreTrainedTokenizerFast:
    """The tokenizer that a run names, or its model's own.

    Raises:
        ConfigError: neither is named, or there is none.
    """
    name = options.tokenizer_name or loading._source(options)
    return load_tokenizer(name, options.revision, options.trust_remote_code)


def load_tokenizer(name: str, revision: str = "main", trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder or hub id, with no truncation or padding of its own and with a pad token.

    Raises:
        ConfigError: there is none, or it is not a fast tokenizer (masks need offsets).
    """
    check_untrusted_tokenizer(loading._located(name), revision, trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            loading._located(name), revision=revision, trust_remote_code=trust_remote_code
        )
    except LOADING_ERRORS as error:
        raise ConfigError(
            f"tokenizer_name: no tokenizer could be loaded from {name} ({short_reason(error)})."
        ) from None
    if not tokenizer.is_fast:
        raise ConfigError(
            f"tokenizer_name: {name} is not a fast tokenizer (no tokenizer.json); exact masks need its offsets."
        )
    # Files saved in the middle of somebody's training carry truncation and padding that would cut every row.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    if tokenizer.pad_token_id is None:
        # Labels go by span and attention by length, so sharing the id with eos masks nothing.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def pad_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that fills a padded batch: `load_tokenizer` gives every tokenizer one."""
    token = tokenizer.pad_token_id
    assert isinstance(token, int)
    return token


def check_token_ids(
    parts: list[np.ndarray],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    new_tokens: range = range(0),
) -> None:
    """Raises ConfigError when the data holds an id that the embedding has no row for, nor will get one."""
    rows = max(config.get_text_config().vocab_size, new_tokens.stop if new_tokens else 0)
    largest = max(int(input_ids.max()) for input_ids in parts)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise ConfigError(
            f"tokenizer_name: the data holds token id {largest} ({token!r}), but the model's vocabulary has {rows} rows; "
            "use the model's own tokenizer."
        )
