"""Ask a model or an adapter, at the terminal or with one question.

python launch/chat.py --model output
python launch/chat.py --model merged --prompt "What is 3 + 4?"
"""

from collections.abc import Iterator
from typing import Any

import accel_llm.system.chatter

from transformers import GenerationConfig, PreTrainedTokenizerFast, set_seed

from accel_llm.adapters.locate import check_bases, find_adapter, find_base
from accel_llm.backend.library_messages import quiet_libraries
from accel_llm.chat.template import Template, load_template
from accel_llm.config.command_line import parse_options
from accel_llm.config.tool_options import ChatOptions
from accel_llm.errors import ConfigError
from accel_llm.merge.load import load_to_ask, load_with_adapter, print_placement
from accel_llm.model.answers import Dialogue
from accel_llm.model.loading import check_model_name
from accel_llm.model.tokenizer import load_tokenizer
from accel_llm.system.exit import run_script


def main() -> None:
    options = parse_options(ChatOptions)
    quiet_libraries()
    set_seed(options.seed)
    model, tokenizer_source = load_model_or_adapter(options)
    tokenizer = load_tokenizer(tokenizer_source, trust_remote_code=options.trust_remote_code)
    template = load_template(tokenizer, options.chat_template)
    settings = generation_settings(model, tokenizer, template, options)
    dialogue = Dialogue(model, tokenizer, template, settings, options.system)
    print_placement(model)
    for question in read_questions(options):
        dialogue.ask(question)


def load_model_or_adapter(options: ChatOptions) -> tuple[Any, str]:
    """Load the model, with its adapter if the options name one; return it and the source of its tokenizer."""
    adapter = find_adapter(options.model)
    if not (adapter / "adapter_config.json").is_file():
        # A run with method full has its model in the folder model/.
        name = str(adapter / "model") if (adapter / "model" / "config.json").is_file() else options.model
        check_model_name(name, "model")
        return load_to_ask(name, "model", options), name

    base = find_base(adapter, options.base)
    if not options.allow_other_base:
        check_bases([adapter], base)
    model = load_with_adapter(adapter, base, options)
    if (adapter / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(adapter))
    return model, str(adapter) if (adapter / "tokenizer_config.json").is_file() else base


def generation_settings(
    model: Any, tokenizer: PreTrainedTokenizerFast, template: Template, options: ChatOptions
) -> GenerationConfig:
    """Sampling, length and stop tokens: those of the model and the end of turn of the template.

    Raises:
        ConfigError: there is no stop token.
    """
    stop = model.generation_config.eos_token_id
    stop_ids = {template.turn_end_id, *(stop if isinstance(stop, list) else [stop])} - {None}
    if not stop_ids:
        raise ConfigError(
            f"model: {options.model} names no end token, so no answer would end; give a chat_template with one."
        )
    sampling = {"do_sample": True, "temperature": options.temperature} if options.temperature else {"do_sample": False}
    tokens = {"eos_token_id": sorted(stop_ids), "pad_token_id": tokenizer.pad_token_id}
    return GenerationConfig(max_new_tokens=options.max_new_tokens, **tokens, **sampling)


def read_questions(options: ChatOptions) -> Iterator[str]:
    """The one question of `prompt`, or questions from the terminal until an empty line, Ctrl-D or Ctrl-C."""
    while True:
        try:
            question = options.prompt or input("you> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not question.strip():
            return
        yield question
        if options.prompt:
            return


if __name__ == "__main__":
    run_script(main)
