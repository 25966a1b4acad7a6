"""Steps of launch/show_data.py, which encodes data and trains nothing: read options, load a tokenizer and its template."""

import sys

from transformers import PreTrainedTokenizerFast

from accel_llm.adapters.adopt import adopt_adapter_options
from accel_llm.adapters.defaults import fill_method_options
from accel_llm.backend.library_messages import quiet_libraries
from accel_llm.chat.template import Template, configured_template
from accel_llm.config.options import SftOptions
from accel_llm.data.sources import source_problems
from accel_llm.demo.files import TrainOptionsT, parse_options_or_demo
from accel_llm.errors import ConfigError, raise_problems
from accel_llm.model.loading import model_problems, tokenizer_problems
from accel_llm.model.tokenizer import configured_tokenizer
from accel_llm.model.vocabulary import add_missing_tokens


def read_data_options(options_class: type[TrainOptionsT], demo: str) -> TrainOptionsT:
    """Read and check the options of a script that encodes data but trains nothing.

    Such a script reads only the tokenizer of a model, so with `tokenizer_name` no model is needed.

    Raises:
        ConfigError: an option, the model or a source of rows cannot be used. It lists all problems.
    """
    options = parse_options_or_demo(options_class, demo, sys.argv[1:])
    options = fill_method_options(adopt_adapter_options(options))  # virtual tokens count in a row
    raise_problems(
        source_problems(options) + (tokenizer_problems(options) if options.tokenizer_name else model_problems(options))
    )
    quiet_libraries()
    return options


def tokenizer_and_template(
    options: SftOptions,
) -> tuple[PreTrainedTokenizerFast, Template | None, tuple[str, str]]:
    """Load the tokenizer and, if there is one, the chat template, for rows that may all be plain text.

    The third value is for `Encoder.no_template`: the message and reason of the error that a conversation is without it.

    Raises:
        ConfigError: one of them cannot be loaded, or they do not fit each other.
    """
    tokenizer = configured_tokenizer(options)
    try:
        add_missing_tokens(tokenizer, options)
        return tokenizer, configured_template(tokenizer, options), ("", "")
    except ConfigError as error:
        if options.chat_template or tokenizer.chat_template:
            raise
        return tokenizer, None, (str(error).rstrip("."), "no chat template")
