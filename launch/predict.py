"""Tell the answer, the label or the score of each row of files. Each row is written again, with what the model tells.

    python launch/predict.py --model output --input_files questions.jsonl --output_file answers.jsonl
    python launch/predict.py --model merged --input_files chats.parquet --output_file answers.csv --max_new_tokens 64
    python launch/predict.py --model classifier --input_files reviews.csv --output_file labels.csv --columns text=review
    python launch/predict.py --model output --input_files answers.csv --output_file both.csv --column_prefix tuned_

A language model answers chats, questions and instructions: the new columns are `generated` and `stopped` (whether the
answer ended by itself). A classifier tells `predicted_label`, `probability` and `probabilities` of texts, a reward model
the `predicted_score` of chats. The same command again goes on where it was killed.
"""

import time

import accel_llm.config.early
import accel_llm.system.chatter

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from accel_llm.backend.library_messages import quiet_libraries
from accel_llm.config.command_line import parse_options
from accel_llm.config.tool_options import PredictOptions
from accel_llm.merge.load import print_placement
from accel_llm.merge.predictions import Predictions, check_files, open_predictions
from accel_llm.merge.prompt_predictions import open_prompts
from accel_llm.merge.text_predictions import asks_classifier, open_texts
from accel_llm.model.answers import print_remark
from accel_llm.system.exit import run_script
from accel_llm.system.out_of_memory import ran_out_of_memory

LINE_SECONDS = 30  # between two lines of progress where the output is no terminal


def main() -> None:
    options = parse_options(PredictOptions)
    quiet_libraries()
    # What is wrong with the files, and with any row, shows before anything is generated.
    input_hash = check_files(options)
    answerer = open_texts(options) if asks_classifier(options) else open_prompts(options)
    print_placement(answerer.model)
    with open_predictions(options, answerer, input_hash) as predictions:
        predictions.survey()
        show_survey(predictions)
        try:
            answer_all(predictions)
        except (KeyboardInterrupt, Exception) as stop:
            if ran_out_of_memory(stop):
                print_remark(f"per_device_eval_batch_size: fewer than {answerer.size} take less memory.")
            print_remark(
                f"{rows_done(predictions)} are kept in {predictions.part.path}; the same command goes on there."
            )
            raise
        predictions.finish()
        show_result(predictions)


def answer_all(predictions: Predictions) -> None:
    """Answer what has no answer yet, and show rows, tokens or texts a second, and the time left."""
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn()
    start = line = time.monotonic()
    before, work, answerer = len_done(predictions), 0, predictions.answerer
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("predict", total=predictions.total, completed=before, speed="")
        for batch in predictions.batches_left():
            work += sum(map(answerer.work, predictions.answer(batch)))
            now = time.monotonic()
            done, speed = len_done(predictions), f"{work / (now - start):,.0f} {answerer.unit}/s"
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
    for sentence in predictions.answerer.remarks():
        print_remark(sentence)
    for sentence in predictions.examples:
        print_remark(f"No answer: {sentence}.")


def show_result(predictions: Predictions) -> None:
    """Print how many rows have an answer, what the answers are like, and where they stand."""
    for reason, rows in predictions.problems.items():
        print(f"no answer: {rows:,} rows, {reason}")
    print(predictions.answerer.summary(predictions.total))
    print(f"wrote {predictions.options.output_file}")


if __name__ == "__main__":
    run_script(main)
