"""Pretraining on plain text, from random weights (config_name) or those of a model (model_name_or_path).

    accelerate launch --config_file accelerate_configs/cpu.yaml launch/pretrain.py \
        --config launch/recipes/demo_base.yaml
    accelerate launch --config_file accelerate_configs/zero2.yaml launch/pretrain.py \
        --config_name Qwen/Qwen2.5-1.5B --tokenizer_name Qwen/Qwen2.5-1.5B --train_files text.jsonl --output_dir output
"""

from functools import partial
from typing import Any

import accel_llm.config.early

from accelerate import Accelerator

from accel_llm.backend import accelerator as backend
from accel_llm.checkpoint.checkpoints import Checkpoints
from accel_llm.checkpoint.resume import find_start
from accel_llm.config.pretrain_options import PretrainOptions as Options
from accel_llm.data.stream import Stream
from accel_llm.model.loss import next_token_loss
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
    options = setup.read_options(Options)
    accelerator = backend.build_accelerator(options)

    # Encode text as rows of tokens with labels, and print the ledger and the plan.
    tokenizer = setup.text_tokenizer(options)
    config = setup.read_config(options)
    data = setup.encode_documents(options, config, tokenizer)
    start = find_start(accelerator, options, data.train)
    stream = setup.open_stream(options, data.train, start, tokenizer)
    memory = setup.show_plan_and_memory(accelerator, options, config, tokenizer, data, stream.plan)
    if options.dry_run:
        return

    # Data comes first, because its mistakes show quickly; only then weights are read.
    model = setup.assemble_model(accelerator, options, config, stream)
    optimizer, scheduler = setup.optimizer_and_schedule(accelerator, model, options, stream.plan.total_steps)
    model, optimizer = backend.prepare(accelerator, model, optimizer)

    # Check that the libraries did what the options ask. Then a checkpoint, if there is one, replaces the initial state.
    checks = memory | preflight(accelerator, model, optimizer, options)
    checkpoints = Checkpoints(accelerator, model, optimizer, scheduler, options, start)
    checkpoints.resume()
    stop = setup.stop_tokens(model, tokenizer)

    # Train, export, and evaluate for the last time. run.json records the status, also after a failure.
    with recording(options.output_dir, accelerator.is_main_process, setup.run_facts(options, data, checks)) as record:
        evaluation = Evaluation(accelerator, tokenizer, data.eval, options, stop)
        export = partial(export_model, accelerator, model, tokenizer, stop, options, config, start, record)
        checkpoints.rehearse(export, evaluation, stream, next_token_loss)
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
            if not targets:  # no process has a label in this step, so there is nothing to learn
                break
            with accelerator.accumulate(model):
                loss = next_token_loss(model, batch)  # the sum over the labels of this batch
                losses.append(loss.detach())
                accelerator.backward(loss * undo_averaging / targets)  # in total: the mean over the labels of the step
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
