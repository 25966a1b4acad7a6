"""A share was given as the number of warmup steps, and the run ended with a traceback. A share of 1 as `warmup_ratio`
means all steps, which as a number of steps would be a single one.

Transformers 5 defines the meaning: below 1 a share of all steps, rounded up, otherwise a number of steps.
"""

import pytest
from transformers import TrainingArguments

from accel_llm.config.command_line import parse_options
from accel_llm.config.options import SftOptions, count_warmup_steps
from accel_llm.errors import ConfigError


@pytest.mark.parametrize("name", ["warmup_steps", "warmup_ratio"])
@pytest.mark.parametrize("value", ["0", "0.1", "0.034", "1e-2"])
def test_a_share_means_the_same_under_both_names(tmp_path, name, value):
    options = parse_options(SftOptions, [f"--{name}", value])
    arguments = TrainingArguments(output_dir=str(tmp_path), warmup_steps=float(value), use_cpu=True)
    assert count_warmup_steps(options.warmup_steps, 1000) == arguments.get_warmup_steps(1000)


def test_a_share_of_one_is_not_one_step():
    with pytest.raises(
        ConfigError, match=r"^warmup_ratio: '1\.0' is not a share below 1; give the number of steps as "
    ):
        parse_options(SftOptions, ["--warmup_ratio", "1.0"])
