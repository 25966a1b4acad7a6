"""Answer the rows of files: chats, questions, instructions. Each row is written again, with its answer beside it.

    python launch/predict.py --model output --input_files questions.jsonl --output_file answers.jsonl
    python launch/predict.py --model merged --input_files chats.parquet --output_file answers.csv --max_new_tokens 64
    python launch/predict.py --model output --input_files answers.csv --output_file both.csv --column_prefix tuned_

An answer at the end of a row is not shown to the model. The new columns are `generated` and `stopped` (whether the
answer ended by itself). The same command again goes on where it was killed.
"""

import time

import accel_llm.system.chatter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from accel_llm.backend.library_messages import quiet_libraries
from accel_llm.config.command_line import parse_options
from accel_llm.config.tool_options import PredictOptions
from accel_llm.merge.dialogues import open_dialogue
from accel_llm.merge.load import print_placement
from accel_llm.merge.predictions import Predictions, check_files, open_predictions
from accel_llm.model.answers import print_remark
from accel_llm.system.exit import run_script
from accel_llm.system.out_of_memory import ran_out_of_memory

LINE_SECONDS = 30  # between two lines of progress where the output is no terminal


def main() -> None:
    options = parse_options(PredictOptions)
    quiet_libraries()
    # What is wrong with the files, and with any row, shows before anything is generated.
    input_hash = check_files(options)
    dialogue = open_dialogue(options)
    print_placement(dialogue.model)
    with open_predictions(options, dialogue, input_hash) as predictions:
        predictions.survey()
        show_survey(predictions)
        try:
            answer_all(predictions)
        except (KeyboardInterrupt, Exception) as stop:
            if ran_out_of_memory(stop):
                print_remark(f"per_device_eval_batch_size: fewer than {predictions.questions.size} take less memory.")
            print_remark(
                f"{rows_done(predictions)} are kept in {predictions.part.path}; the same command goes on there."
            )
            raise
        predictions.finish()
        show_result(predictions)


def answer_all(predictions: Predictions) -> None:
    """Answer what has no answer yet, and show rows, tokens a second and the time left."""
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn()
    start = line = time.monotonic()
    before, tokens = len_done(predictions), 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("predict", total=predictions.total, completed=before, speed="")
        for batch in predictions.batches_left():
            tokens += sum(answer.tokens for answer in predictions.answer(batch))
            now = time.monotonic()
            done, speed = len_done(predictions), f"{tokens / (now - start):,.0f} tokens/s"
            bar.update(task, completed=done, speed=speed)
            if not console.is_terminal and now - line > LINE_SECONDS:
                line, left = now, (now - start) * (predictions.total - done) / (done - before)
                console.print(f"{rows_done(predictions)}, {speed}, {left / 60:,.1f} minutes left")


def len_done(predictions: Predictions) -> int:
    return predictions.answered + predictions.problems.total()


def rows_done(predictions: Predictions) -> str:
    return f"{len_done(predictions):,} of {predictions.total:,} rows"


def show_survey(predictions: Predictions) -> None:
    """Say what was done before, what makes batches smaller, and which rows get no answer."""
    if done := len_done(predictions):
        print_remark(f"{done:,} of {predictions.total:,} rows were done before.")
    if not predictions.questions.may_pad:
        print_remark(
            "Only prompts of the same length are answered together: padding would change answers of this model."
        )
    for sentence in predictions.examples:
        print_remark(f"No answer: {sentence}.")


def show_result(predictions: Predictions) -> None:
    """Print how many rows were answered, how long the answers are, and where they stand."""
    count = predictions.answered
    for reason, rows in predictions.problems.items():
        print(f"no answer: {rows:,} rows, {reason}")
    mean, stopped = predictions.tokens / max(count, 1), predictions.stopped / max(count, 1)
    print(
        f"answered: {count:,} of {predictions.total:,} rows, {mean:,.1f} tokens on average, {stopped:.1%} ended by themselves"
    )
    print(f"wrote {predictions.options.output_file}")


if __name__ == "__main__":
    run_script(main)
