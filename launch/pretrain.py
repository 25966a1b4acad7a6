"""Pretraining on plain text, from random weights (config_name) or further from given ones (model_name_or_path).

    accelerate launch --config_file accelerate_configs/cpu.yaml launch/pretrain.py --config launch/recipes/demo_base.yaml
    accelerate launch --config_file accelerate_configs/zero2.yaml launch/pretrain.py \
        --config_name Qwen/Qwen2.5-1.5B --tokenizer_name Qwen/Qwen2.5-1.5B --train_files text.jsonl --output_dir output

`--help` lists all options.
"""

import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from accel_llm.adapters import attach as adapter
from accel_llm.backend import accelerator as distributed
from accel_llm.checkpoint import resume
from accel_llm.checkpoint.checkpoints import Checkpoints
from accel_llm.config.command_line import parse, resolved
from accel_llm.config.options import PretrainOptions, TrainOptions
from accel_llm.data import prepare as encode
from accel_llm.data import sources
from accel_llm.data.stream import Stream, to_device
from accel_llm.demo import skills as demo
from accel_llm.errors import check, run
from accel_llm.model import loading as models
from accel_llm.model import loss as losses
from accel_llm.model import placement as shards
from accel_llm.report import display
from accel_llm.report.metrics import Meter
from accel_llm.report.record import recording
from accel_llm.training import optimizers as optim
from accel_llm.training import preflight as census
from accel_llm.training.bad_steps import Health
from accel_llm.training.evaluation import Evaluation
from accel_llm.training.export import export, stop_ids

DEFAULTS = {"method": "full", "overlong": "split"}


class Options(PretrainOptions, TrainOptions):
    """Everything that can be set for pretraining."""


def main() -> None:
    options = demo.resolve(parse(Options, sys.argv[1:], DEFAULTS))
    options = adapter.taken_over(options)
    check(models.problems(options) + sources.problems(options))
    distributed.quiet()
    accelerator = distributed.build_accelerator(options)
    tokenizer = models.tokenizer_of(options)
    config = models.load_config(options, options.max_length)
    encoded = encode.texts(options, options.seed, tokenizer, options.text_column)
    models.check_token_ids(encoded.token_ids, config, tokenizer)
    start = resume.start(accelerator, options, encoded.train)
    stream = Stream(encoded.train, options, start, models.pad_id(tokenizer))
    display.before_training(accelerator, options, tokenizer, encoded, stream.plan)
    if options.method != "full":
        display.advise(accelerator, "An adapter takes in little new knowledge; method full is advised for pretraining.")
    if options.dry_run:
        return

    set_seed(options.seed)
    model = models.load_model(options) if options.model_name_or_path else models.build_model(config, options)
    if options.method != "full":
        model = adapter.attach(model, options)
    optim.neftune(model, options.neftune_noise_alpha)
    shards.place(accelerator, model, options)
    optimizer = optim.build_optimizer(model, options, accelerator.device.type, distributed.engine(), options.seed)
    scheduler = optim.build_schedule(optimizer, options, stream.plan.total_steps)
    model, optimizer = distributed.prepare(accelerator, model, optimizer)
    facts = census.take(accelerator, model, optimizer, options)
    set_seed(options.seed, device_specific=True)
    checkpoints = Checkpoints(accelerator, model, optimizer, scheduler, options, start)
    checkpoints.resume()
    stop = stop_ids(model, tokenizer, None)

    facts |= {"options": resolved(options), "data": encoded.fingerprint, "ledger": encoded.ledger.to_dict()}
    with recording(Path(options.output_dir), accelerator.is_main_process, **facts) as record:
        evaluation = Evaluation(accelerator, tokenizer, encoded.eval, options, stop)
        train(accelerator, model, optimizer, scheduler, stream, evaluation, checkpoints, options)
        if options.check_only:
            return display.census(accelerator, facts["accelerate"], options)
        exported = checkpoints.finish()
        base, dtype = str(options.model_name_or_path), models.stored_dtype(config)
        folder = export(accelerator, model, tokenizer, stop, base, dtype, stream.start)
        record.update(samples=evaluation.samples, exported_step=exported)
    display.after_training(accelerator, folder)
    accelerator.end_training()


def train(
    accelerator: Accelerator,
    model: Any,
    optimizer: Any,
    scheduler: Any,
    stream: Stream,
    evaluation: Evaluation,
    checkpoints: Checkpoints,
    options: Options,
) -> None:
    start, undo_averaging = stream.start, distributed.undo_averaging(accelerator)
    meter, health = Meter(accelerator, options, stream.plan, start), Health(accelerator, stream, options)
    batches = stream.batches(start.step)
    evaluation.at_start(model, meter, start)
    for step in range(start.step + 1, stream.plan.total_steps + 1):
        micro_batches = [next(batches) for _ in range(stream.accumulation)]
        targets, grad_norm = distributed.global_count(accelerator, micro_batches), 0.0
        for batch in micro_batches if targets else ():  # without a target there is nothing to learn, and no step
            batch = to_device(batch, accelerator.device)
            with accelerator.accumulate(model):
                loss = losses.next_token_loss(model, batch)
                accelerator.backward(loss * undo_averaging / targets)
                if accelerator.sync_gradients:
                    grad_norm = distributed.clip(accelerator, model, options.max_grad_norm)
                if distributed.healthy(accelerator, grad_norm):
                    optimizer.step()
                optimizer.zero_grad()
            meter.add(loss, batch)
        health.check(meter, step, grad_norm)
        if options.check_only:
            break
        meter.log(step, scheduler.get_last_lr()[0], grad_norm)
        scheduler.step()
        evaluation.when_due(model, meter, step)
        checkpoints.when_due(meter, evaluation, health, step)
    meter.close()


if __name__ == "__main__":
    run(main)
