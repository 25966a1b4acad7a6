"""Reward models: a score for each answer, trained on pairs of answers (Bradley-Terry).

    accelerate launch --config_file accelerate_configs/zero2.yaml launch/reward.py
    accelerate launch --config_file accelerate_configs/zero2.yaml launch/reward.py \
        --model_name_or_path output/sft/model --train_files pairs.jsonl --output_dir output/reward

The score is taken at the last token that the chat template writes. Without a model and data it trains the embedded demo
of launch/recipes/demo_reward.yaml. `--help` lists all options.
"""

from functools import partial
from typing import Any

import accel_llm.config.early

from accelerate import Accelerator

from accel_llm.backend import accelerator as backend
from accel_llm.checkpoint.checkpoints import Checkpoints
from accel_llm.checkpoint.resume import find_start
from accel_llm.config.preference_options import RewardOptions as Options
from accel_llm.data.stream import Stream
from accel_llm.preference.reward import reward_loss
from accel_llm.report import display
from accel_llm.report.metrics import Meter
from accel_llm.report.record import recording
from accel_llm.system.exit import run_script
from accel_llm.training import loop, setup
from accel_llm.training.bad_steps import BadSteps
from accel_llm.training.evaluation import Evaluation
from accel_llm.training.export import export_model
from accel_llm.training.preflight import preflight


def main() -> None:
    # Options, and the processes and devices to run on.
    options = setup.read_options(Options, demo="demo_reward")
    accelerator = backend.build_accelerator(options)

    # Encode the two answers of each pair as rows of tokens with labels, and print the ledger and the plan.
    chat = setup.chat_tokenizer(options)
    config = setup.read_config(options)
    data = setup.encode_preferences(options, config, chat)
    start = find_start(accelerator, options, data.train)
    stream = setup.open_stream(options, data.train, start, chat.tokenizer)
    memory = setup.show_plan_and_memory(accelerator, options, config, chat.tokenizer, data, stream.plan)
    if options.dry_run:
        return

    # Data comes first, because its mistakes show quickly; only then weights are read.
    model = setup.assemble_model(accelerator, options, config, stream, chat.new_tokens)
    optimizer, scheduler = setup.optimizer_and_schedule(accelerator, model, options, stream.plan.total_steps)
    model, optimizer = backend.prepare(accelerator, model, optimizer)

    # Check what the libraries did. Then a checkpoint, if there is one, replaces the initial state.
    checks = memory | preflight(accelerator, model, optimizer, options)
    measure = setup.share_prompts(accelerator, model, options, data, stream)
    checkpoints = Checkpoints(accelerator, model, optimizer, scheduler, options, start)
    checkpoints.resume()
    display.show_score_place(accelerator, data.train, chat.tokenizer)

    # Train, export, and evaluate for the last time. run.json records the status, also after a failure.
    with recording(options.output_dir, accelerator.is_main_process, setup.run_facts(options, data, checks)) as record:
        evaluation = Evaluation(accelerator, chat.tokenizer, data.eval, options, [], measure)
        export = partial(export_model, accelerator, model, chat.tokenizer, [], options, config, start, record)
        checkpoints.rehearse(export, evaluation, stream, partial(reward_loss, options=options))
        meter = Meter(accelerator, options, stream.plan, record, start.step, start.meter, optimizer)
        train(accelerator, model, optimizer, scheduler, stream, meter, evaluation, checkpoints, options)
        if options.check_only:
            return setup.end_check(accelerator, options, checks, stream.plan, checkpoints.step_seconds)
        folder = checkpoints.finish(export, evaluation, meter)
    display.show_end(accelerator, record, folder)
    meter.end_run()


def train(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    stream: Stream,
    meter: Meter,
    evaluation: Evaluation,
    checkpoints: Checkpoints,
    options: Options,
) -> None:
    start, plan, undo_averaging = checkpoints.start, stream.plan, loop.undo_averaging(accelerator)
    bad_steps = BadSteps(accelerator, stream, options, start)
    batches = loop.prefetch_to_device(stream.batches(start.step), accelerator.device, stream.accumulation)
    evaluation.at_start(model, meter, start)
    for step in checkpoints.steps_left(plan, evaluation):
        micro_batches = [next(batches) for _ in range(loop.begin_step(accelerator, stream, step))]
        targets = loop.total_targets(accelerator, micro_batches)
        losses, grad_norm = [], 0.0
        for batch in micro_batches:
            if not targets:  # no process has a pair in this step, so there is nothing to learn
                break
            with accelerator.accumulate(model):
                loss = reward_loss(model, batch, options)  # the sum over the pairs of this batch
                losses.append(loss.detach())
                accelerator.backward(loss * undo_averaging / targets)  # in total: the mean over the pairs of the step
                if accelerator.sync_gradients:
                    grad_norm = loop.clip_gradients(accelerator, model, options.max_grad_norm)
                if bad_steps.may_step(losses, targets, grad_norm):
                    optimizer.step()
                optimizer.zero_grad()
            meter.add(losses[-1], batch)
        bad_steps.check(step, losses, grad_norm)
        if options.check_only:
            continue
        meter.log(step, scheduler.get_last_lr()[0], grad_norm, bad_steps.all_skipped)
        scheduler.step()
        evaluation.when_due(model, meter, step)
        checkpoints.when_due(meter, evaluation, bad_steps, step)


if __name__ == "__main__":
    run_script(main)
