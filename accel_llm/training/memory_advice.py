"""What a run can say if memory runs out: the estimate of its device and the settings that save most."""

from functools import partial

from accelerate import Accelerator
from transformers import PreTrainedConfig

from accel_llm.config.options import TrainOptions
from accel_llm.system.out_of_memory import as_gb, memory_advice
from accel_llm.training.memory_estimate import estimate_memory, memory_savings

SETTINGS_NAMED = 3


def note_memory_advice(accelerator: Accelerator, options: TrainOptions, config: PreTrainedConfig) -> None:
    """Note what helps this run if memory runs out, for the sentence of `memory_failure`.

    What it is estimated to take, and what saves most, is computed when the sentence is needed.
    """
    device_type = accelerator.device.type
    memory_advice.device_type = device_type
    memory_advice.for_evaluation = _for_evaluation(options)
    memory_advice.for_host = _for_host(options)
    memory_advice.complete = partial(_complete, options, config, accelerator.num_processes, device_type)


def _complete(options: TrainOptions, config: PreTrainedConfig, processes: int, device_type: str) -> None:
    memory_advice.complete = None
    estimate = estimate_memory(options, config, processes, device_type)
    terms = " + ".join(f"{name} {as_gb(size)}" for name, size in estimate.terms.items())
    memory_advice.estimate = f"estimated were {terms} = {as_gb(estimate.total)}"
    savings = memory_savings(options, config, processes, device_type)[:SETTINGS_NAMED]
    gains = ", ".join(f"{setting} ({as_gb(gain)})" for setting, gain in savings)
    memory_advice.for_training = f"what saves most: {gains}" if gains else "take a smaller model or a larger device"


def _for_evaluation(options: TrainOptions) -> str:
    """An evaluation keeps no activations for a backward pass: the size of its batches is what counts."""
    size = options.per_device_eval_batch_size
    if size > 1:
        return f"lower per_device_eval_batch_size, which is {size}"
    return f"lower max_length, which is {options.max_length}"


def _for_host(options: TrainOptions) -> str:
    """Name what takes memory of the host in a run on a GPU."""
    settings = [f"{name}: false" for name in ("save_async", "offload_embeddings") if getattr(options, name)]
    return f"less is taken with {', '.join([*settings, 'fewer processes or a launch YAML without offload'])}"
