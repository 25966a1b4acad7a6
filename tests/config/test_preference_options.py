"""The options of preferences: betas by loss, and what a wrong one says."""

import pytest

from accel_llm.config.command_line import parse_options
from accel_llm.config.preference_options import DpoOptions, KtoOptions
from accel_llm.errors import ConfigError


@pytest.mark.parametrize(
    ("losses", "beta"),
    [
        ("sigmoid", 0.1),  # DPO, arXiv 2305.18290
        ("ipo orpo cpo sft", 0.1),
        ("sft", 0.1),
        ("sigmoid_norm", 5.0),  # Tulu 3, arXiv 2411.15124
        ("simpo", 2.0),  # the authors' recipe for Llama 3 8B: beta 2.0, gamma / beta 0.5
        ("sft simpo", 2.0),
    ],
)
def test_a_loss_has_the_beta_of_its_paper_unless_one_is_given(losses, beta):
    options = parse_options(DpoOptions, ["--loss_type", *losses.split()])
    assert (options.beta, options.simpo_gamma) == (beta, beta / 2)
    given = parse_options(DpoOptions, ["--loss_type", *losses.split(), "--beta", "0.3"])
    assert (given.beta, given.simpo_gamma) == (0.3, 0.15)
    assert parse_options(KtoOptions, ["--loss_type", "bco"]).beta == 0.1


def test_losses_with_different_betas_need_one():
    with pytest.raises(ConfigError) as refused:
        parse_options(DpoOptions, ["--loss_type", "sigmoid", "simpo"])
    assert str(refused.value) == (
        "beta: it is one for all losses, but usual are 0.1 for sigmoid, 2 for simpo; give a value."
    )
    assert parse_options(DpoOptions, ["--loss_type", "sigmoid", "simpo", "--beta", "1"]).beta == 1.0


def test_a_wrong_option_is_the_only_problem():
    with pytest.raises(ConfigError) as refused:
        parse_options(DpoOptions, ["--seed", "x"])
    assert refused.value.problems == [
        "seed: 'x' is not allowed; give a whole number of at least 0 and below 4294967296."
    ]


def test_weights_of_losses_are_numbers():
    assert parse_options(DpoOptions, ["--loss_type", "sigmoid", "sft", "--loss_weights", "1", "0.1"]).losses == {
        "sigmoid": 1.0,
        "sft": 0.1,
    }
    with pytest.raises(ConfigError) as refused:
        parse_options(DpoOptions, ["--loss_weights", "x"])
    assert refused.value.problems == ["loss_weights: 'x' is not allowed; give one or several numbers."]
