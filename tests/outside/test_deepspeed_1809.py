"""DeepSpeed #1809 (and #774): a misspelt key of a DeepSpeed file changes nothing, and nobody says so.

The right answer is an error that names the key. DeepSpeed 0.19 still accepts it at the top level, which the first test
shows; inside `zero_optimization` it stops, but only when the model is loaded, with a traceback of pydantic.
"""

from deepspeed.runtime.config import DeepSpeedConfig

from accel_llm.backend.deepspeed_keys import deepspeed_problems

MISSPELT = {"train_batch_size": 1, "zero_optimization": {"stage": 2}, "gradient_cliping": 0.1}


def test_a_misspelt_key_is_named_where_deepspeed_ignores_it():
    assert DeepSpeedConfig(dict(MISSPELT)).gradient_clipping == 1.0, "its default"
    (problem,) = deepspeed_problems(MISSPELT)
    assert problem.startswith("gradient_cliping: ") and problem.endswith("did you mean gradient_clipping?")


def test_a_misspelt_key_inside_zero_optimization_is_one_sentence():
    (problem,) = deepspeed_problems({"zero_optimization": {"stage": 2, "reduce_buket_size": 5}})
    assert problem == "zero_optimization.reduce_buket_size: is unknown to DeepSpeed; did you mean reduce_bucket_size?"
