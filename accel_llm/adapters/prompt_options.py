"""What can be wrong in the options of the prompt-learning methods, beyond the types that PEFT's config classes name."""

import accel_llm.system.chatter

from peft.tuners.p_tuning import PromptEncoderReparameterizationType
from peft.tuners.prompt_tuning import PromptTuningInit

from accel_llm.config.options import MethodOptions, TrainOptions

# Options whose values PEFT 0.21 does not check: an unknown one has no effect, or stops it later.
CHOICES = {
    "prompt_tuning_init": [choice.value for choice in PromptTuningInit],
    "encoder_reparameterization_type": [choice.value for choice in PromptEncoderReparameterizationType],
}
MINIMUM = {"num_virtual_tokens": 1, "encoder_hidden_size": 1, "encoder_num_layers": 1}


def prompt_problems(options: MethodOptions) -> list[str]:
    """Return a sentence for each problem with the options of a prompt-learning method."""
    given = options.method_options
    problems = [
        f"method_options: {name} {given[name]!r} is unknown; allowed are {', '.join(choices)}."
        for name, choices in CHOICES.items()
        if name in given and given[name] not in choices
    ]
    problems += [
        f"method_options: {name} {given[name]} is too small; give {least} or more."
        for name, least in MINIMUM.items()
        if isinstance(given.get(name), int) and given[name] < least
    ]
    count = given.get("num_virtual_tokens")
    if count is None:
        problems.append(f"method_options: method {options.method} needs num_virtual_tokens; give a number.")
    elif type(count) is not int:  # PEFT would take "20" and 20.0, but `options.virtual_tokens` does not
        problems.append(f"method_options: num_virtual_tokens {count!r} is not allowed; give a whole number.")
    elif isinstance(options, TrainOptions) and options.max_length - options.virtual_tokens < 2:
        problems.append(
            f"method_options: {count} num_virtual_tokens leave no room for a document in max_length {options.max_length}; "
            "they count against it: lower num_virtual_tokens, or raise max_length."
        )
    return problems + [
        f"method_options: {name} has no effect, {reason} leave it out." for name, reason in _unused(options)
    ]


def _unused(options: MethodOptions) -> list[tuple[str, str]]:
    """Return the options that PEFT would ignore, each with the reason."""
    given, unused = options.method_options, []
    if given.get("prompt_tuning_init") != "TEXT" and given.get("prompt_tuning_init_text"):
        unused.append(("prompt_tuning_init_text", "only prompt_tuning_init: TEXT reads it; set that, or"))
    if options.method == "p_tuning_v2" and given.get("encoder_hidden_size"):
        unused.append(("encoder_hidden_size", "only method prefix has an encoder;"))
    if options.method == "p_tuning" and given.get("encoder_reparameterization_type") != "LSTM":
        names = [name for name in ("encoder_num_layers", "encoder_dropout") if name in given]
        unused += [(name, "only encoder_reparameterization_type: LSTM uses it;") for name in names]
    return unused
