"""What is checked before anything is loaded: that the parts a run names are there and fit each other."""

from pathlib import Path

from accel_llm.adapters.refusals import backend_problems
from accel_llm.config.options import TrainOptions
from accel_llm.config.preference_options import PreferenceOptions
from accel_llm.data.sources import source_problems
from accel_llm.errors import raise_problems
from accel_llm.model.model_names import model_problems
from accel_llm.preference.reference import reference_problems
from accel_llm.report.sharing import sharing_problems
from accel_llm.system.folders import write_problem
from accel_llm.system.launcher import process_rank
from accel_llm.training.bad_steps import spike_problems


def check_run(options: TrainOptions) -> None:
    """Check model, sources, backend, output folder and trackers of a run.

    Raises:
        ConfigError: some of them cannot be used. It lists all problems; those of trackers only if there are no others.
    """
    problems = backend_problems(options) + model_problems(options) + source_problems(options) + spike_problems(options)
    if isinstance(options, PreferenceOptions):
        problems += reference_problems(options)
    raise_problems(problems + _output_problems(options))
    raise_problems(sharing_problems(options))


def _output_problems(options: TrainOptions) -> list[str]:
    """Try to write in the output folder now: hours later it would cost the result. The main process does it for all."""
    if options.dry_run or process_rank() or not (problem := write_problem(Path(options.output_dir))):
        return []
    return [f"output_dir: {options.output_dir} {problem}; name another folder."]
