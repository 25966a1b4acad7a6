"""Supervised fine-tuning on conversations.

    accelerate launch --config_file accelerate_configs/zero2.yaml launch/sft.py
    accelerate launch --config_file accelerate_configs/fsdp2.yaml launch/sft.py \
        --model_name_or_path Qwen/Qwen3-0.6B --train_files chats.jsonl --output_dir output

Without a model and data it trains the embedded demo of launch/recipes/demo.yaml. `--help` lists all options.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from accel_llm.adapters import attach as adapter
from accel_llm.backend import accelerator as distributed
from accel_llm.chat.template import template_of
from accel_llm.checkpoint import resume
from accel_llm.checkpoint.checkpoints import Checkpoints
from accel_llm.config.command_line import resolved
from accel_llm.config.options import SftOptions, TrainOptions
from accel_llm.data import prepare as encode
from accel_llm.data import sources
from accel_llm.data.stream import Stream, to_device
from accel_llm.demo import skills as demo
from accel_llm.errors import check, run
from accel_llm.model import loading as models
from accel_llm.model import loss as losses
from accel_llm.model import placement as shards
from accel_llm.model import vocabulary
from accel_llm.report import display
from accel_llm.report.metrics import Meter
from accel_llm.report.record import recording
from accel_llm.training import optimizers as optim
from accel_llm.training import preflight as census
from accel_llm.training.bad_steps import Health
from accel_llm.training.evaluation import Evaluation
from accel_llm.training.export import export, stop_ids

DEMO = Path(__file__).parent / "recipes" / "demo.yaml"
# A person's own value wins over each of these.
BY_HEART = {"limit_rows": 64, "num_train_epochs": 60, "total_batch_size": 1, "learning_rate": 1e-3}
BY_HEART |= {"lr_scheduler_type": "constant_with_warmup", "eval_generate": 8}


class Options(SftOptions, TrainOptions):
    """Everything that can be set for supervised fine-tuning."""


def main() -> None:
    options = demo.parse_or_demo(Options, DEMO, sys.argv[1:])
    if options.overfit:
        options = options.with_defaults(BY_HEART)
    options = adapter.taken_over(options)
    check(models.problems(options) + sources.problems(options))
    distributed.quiet()
    accelerator = distributed.build_accelerator(options)
    tokenizer = models.tokenizer_of(options)
    new_tokens = vocabulary.add_missing(tokenizer, options)
    template = template_of(tokenizer, options)
    tokenizer.chat_template = template.source
    config = models.load_config(options, options.max_length)
    encoded = encode.conversations(options, options.seed, tokenizer, template)
    if options.overfit:
        encoded = replace(encoded, eval=encoded.train)
    models.check_token_ids(encoded.token_ids, config, tokenizer, new_tokens)
    start = resume.start(accelerator, options, encoded.train)
    stream = Stream(encoded.train, options, start, models.pad_id(tokenizer))
    display.before_training(accelerator, options, tokenizer, encoded, stream.plan)
    if options.dry_run:
        return

    set_seed(options.seed)
    model = models.load_model(options)
    vocabulary.extend(model, new_tokens)
    if options.method != "full":
        model = adapter.attach(model, options, new_tokens)
    optim.neftune(model, options.neftune_noise_alpha)
    shards.place(accelerator, model, options)
    optimizer = optim.build_optimizer(model, options, accelerator.device.type, distributed.engine(), options.seed)
    scheduler = optim.build_schedule(optimizer, options, stream.plan.total_steps)
    model, optimizer = distributed.prepare(accelerator, model, optimizer)
    facts = census.take(accelerator, model, optimizer, options)
    set_seed(options.seed, device_specific=True)
    checkpoints = Checkpoints(accelerator, model, optimizer, scheduler, options, start)
    checkpoints.resume()
    stop = stop_ids(model, tokenizer, template.turn_end_id)
    display.stop_proof(accelerator, encoded.train, tokenizer, template.turn_end_id, stop)

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
    if options.overfit:
        display.by_heart(accelerator, evaluation)


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
