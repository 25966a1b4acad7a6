"""Every method on the demo for the same steps, beside the same method by transformers.Trainer and PEFT.

    python tests/proofs/methods.py --record          # all methods; writes golden/methods.json and the table of the page
    python tests/proofs/methods.py --methods ia3 oft --steps 20
    python tests/proofs/methods.py --facts           # counts what launch/show_methods.py shows, and the page's table

Both sides get the same first values, documents, order, learning rates and limit of the gradient's norm, in float32 on
the CPU, and are evaluated on the same held-out rows. Ours is launch/sft.py as a person starts it, which packs where it
can. The other side pads each step's documents into one batch of a plain Trainer. Each side is a process of its own, and
they run one after the other; a row of the table is printed, and kept, as soon as both have ended.

The learning rate is RATE_FACTOR times the method's default, as in the recipe of the demo for LoRA, because its model is
tiny and its run short, but at most LARGEST_RATE. A second's share of a step is the median over all steps by the wall clock, so it means something
only if the machine does nothing else.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from forks import ROOT, Run, compute, execute, warm
from trajectories import versions

GOLDEN = ROOT / "tests" / "proofs" / "golden" / "methods.json"
STEPS, QUESTIONS = 30, 120
RATE_FACTOR, LARGEST_RATE = 15, 0.1  # 3e-3 in the demo's recipe, where LoRA's default is 2e-4
# DeLoRA divides by norms of weights that begin at 0, so rounding grows: after 30 steps our own loss is 1.31, 1.25 or 1.23
# with 4, 2 or 1 rows in a micro-batch.
FEWER_STEPS = {"delora": 8}
ALLOWED = 0.01  # by which our loss may be worse, relative
WITHOUT_ADAPTER = ("full", "freeze", "bitfit")
# What the demo cannot give, or what no method can do without.
NEEDED_OPTIONS = {
    "trainable_tokens": ["--method_options", "token_indices=[1,2,3,4]"],
}


def all_methods() -> list[str]:
    from accel_llm.adapters.methods import REFUSED_METHODS, peft_methods

    return [*WITHOUT_ADAPTER, *(name for name in peft_methods() if name not in REFUSED_METHODS)]


def read_options(words: list[str]) -> Any:
    """Return the options that launch/sft.py reads from this command line."""
    from accel_llm.config.options import SftOptions
    from accel_llm.training import setup

    sys.argv = ["sft.py", *words]
    return setup.read_options(SftOptions, demo="demo")


def command_line(method: str, steps: int, output: Path) -> list[str]:
    """Return the options of launch/sft.py for a method; the learning rate is a multiple of its default."""
    from accel_llm.adapters.defaults import default_rate

    words = ["--method", method, *NEEDED_OPTIONS.get(method, []), "--output_dir", str(output)]
    words += f"--max_steps {steps} --logging_steps 1 --per_device_train_batch_size 4 --precision fp32".split()
    words += f"--eval_on_start false --eval_generate {QUESTIONS} --save_steps 100000".split()
    rate = min(RATE_FACTOR * default_rate(read_options(words))[0], LARGEST_RATE)
    return [*words, "--learning_rate", f"{rate:g}"]


# --- the other side --------------------------------------------------------------------------------------------------


def train_plainly(words: list[str], output: Path) -> None:
    """Train what `words` say by a plain Trainer on a plain PEFT model, and write its figures to `output`."""
    import torch
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

    from accel_llm.data.stream import Position
    from accel_llm.report.metrics import peak_memory_mb
    from accel_llm.training import setup
    from accel_llm.training.schedule import learning_rate_factor

    options = read_options(words)
    chat = setup.chat_tokenizer(options)
    data = setup.encode_chats(options, setup.read_config(options), chat)
    stream = setup.open_stream(options, data.train, Position(), chat.tokenizer)
    ours = assemble_ours(options, stream, chat)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    base = AutoModelForCausalLM.from_pretrained(
        options.model_name_or_path, quantization_config=quantization if options.in_4_bits else None
    )
    model = adapt_plainly(base, options, ours)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes 0.50.2 fails on layers of these widths
    seconds: list[float] = []

    class Steps(TrainerCallback):
        """Takes the time of each step, and moves AdaLoRA's budget as PEFT asks for it."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if options.method == "adalora":
                model.base_model.update_and_allocate(state.global_step + 1)  # the Trainer has not counted this step

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.begun)

    steps = [stream.row_indices(step, 0, 0) for step in range(options.max_steps)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(rate_groups(model, options), weight_decay=options.weight_decay)
    factor = partial(
        learning_rate_factor,
        total_steps=options.max_steps,
        kind=options.lr_scheduler_type,
        warmup_steps=options.warmup_steps,
    )
    arguments = TrainingArguments(
        output_dir=str(output / "trainer"),
        max_steps=options.max_steps,
        per_device_train_batch_size=1,  # one item is a whole step
        max_grad_norm=options.max_grad_norm,
        train_sampling_strategy="sequential",
        seed=options.seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model,
        arguments,
        data_collator=lambda items: pad([data.train[k] for k in items[0]], chat.tokenizer.pad_token_id),
        train_dataset=steps,  # type: ignore[arg-type]
        optimizers=(optimizer, LambdaLR(optimizer, factor)),
        callbacks=[Steps()],
    )
    trainer.train()
    memory = peak_memory_mb(torch.device("cpu"))
    stop = setup.stop_tokens(model, chat.tokenizer, chat.template)
    figures = {
        "first_loss": next(line["loss"] for line in trainer.state.log_history if "loss" in line),
        "seconds": median(seconds),
        "memory_mb": memory,
        "tokens": [sum(len(data.train[k][0]) for k in step) for step in steps],
        "trainable": sum(parameter.numel() for parameter in trained),
        "all": sum(parameter.numel() for parameter in model.parameters()),
        "loss": mean_loss(model, data.eval, chat.tokenizer.pad_token_id),
        "exact_match": exact_match(model, data.eval, stop, chat.tokenizer.pad_token_id),
    }
    (output / "plain.json").write_text(json.dumps(figures), encoding="utf-8")


def rate_groups(model: Any, options: Any) -> list[dict[str, Any]]:
    """Return the trained parameters with their learning rates, of which some methods have two."""
    groups: dict[float, list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rates = (rate for pattern, rate in options.learning_rate_patterns.items() if re.search(pattern, name))
            groups.setdefault(next(rates, options.learning_rate), []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def assemble_ours(options: Any, stream: Any, chat: Any) -> Any:
    """Return the model with our adapter, as it is before the first step."""
    from accelerate import Accelerator

    from accel_llm.training import setup

    return setup.assemble_model(Accelerator(cpu=True), options, setup.read_config(options), stream, chat.new_tokens)


def adapt_plainly(base: Any, options: Any, ours: Any) -> Any:
    """Return `base` with PEFT's own adapter, or with the same trained weights, and with the first values of `ours`."""
    from peft import get_peft_model

    model = base
    if options.has_adapter:
        config = ours.peft_config["default"]
        settings = plain_settings(config)
        if options.method == "adalora":  # whose phases follow from the number of steps
            exported = json.loads((Path(options.output_dir) / "adapter" / "adapter_config.json").read_text("utf-8"))
            settings |= {name: exported[name] for name in ("tinit", "tfinal", "deltaT", "total_step")}
        model = get_peft_model(base, type(config)(**settings))
    trained = {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    if not options.has_adapter:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
    own = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if own != trained:
        raise AssertionError(f"PEFT trains {sorted(own - trained)[:3]}, and we {sorted(trained - own)[:3]}")
    # The base in 4 bits is the same by its own; its packed weights have other names.
    values = {name: value for name, value in ours.state_dict().items() if not options.in_4_bits or name in trained}
    missing, unexpected = model.load_state_dict(values, strict=False)
    buffers = dict(model.named_buffers())  # PSOFT's factors, which PEFT keeps out of its state
    for name in {*unexpected} & buffers.keys():
        buffers[name].copy_(values[name])
        unexpected.remove(name)
    if unexpected or (missing and not options.in_4_bits):
        raise AssertionError(f"names differ: {missing[:3]}, {unexpected[:3]}")
    return model


def plain_settings(config: Any) -> dict[str, Any]:
    """Return the settings of an attached adapter as a person would give them."""
    from dataclasses import fields

    names = [field.name for field in fields(config) if field.init and field.name not in ("peft_type", "peft_version")]
    return {name: getattr(config, name) for name in names}


def pad(rows: list[tuple[Any, Any]], pad_token: int) -> dict[str, Any]:
    """Stack documents (ids [n], labels [n]), padded on the right."""
    import numpy as np
    import torch

    longest = max(len(ids) for ids, _ in rows)

    def stack(arrays: Any, value: int) -> Any:
        padded = [np.pad(np.asarray(a, np.int64), (0, longest - len(a)), constant_values=value) for a in arrays]
        return torch.from_numpy(np.stack(padded))

    mask = stack([np.ones(len(ids)) for ids, _ in rows], 0)
    return {
        "input_ids": stack([ids for ids, _ in rows], pad_token),
        "labels": stack([labels for _, labels in rows], -100),
        "attention_mask": mask,
    }


def mean_loss(model: Any, rows: Any, pad_token: int) -> float:
    """Return the mean over all labels of `rows`, from the logits: the loss of AdaLoRA's model holds its penalty too."""
    import torch

    total, count = 0.0, 0
    model.eval()
    for first in range(0, len(rows), 64):
        batch = pad([rows[k] for k in range(first, min(first + 64, len(rows)))], pad_token)
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits[:, -labels.shape[1] :]  # without those of virtual tokens
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        total, count = total + float(losses), count + int((labels[:, 1:] != -100).sum())
    return total / count


def exact_match(model: Any, rows: Any, stop: list[int], pad_token: int) -> float:
    """Return the share of greedy answers that equal the data's; prompts of the same length share a batch."""
    import torch

    from accel_llm.training.evaluation import EXTRA_TOKENS, select_questions

    questions = sorted(select_questions(rows, QUESTIONS), key=lambda question: len(question[0]))
    new_tokens = max(len(answer) for _, answer in questions) + EXTRA_TOKENS
    right = 0
    for _, group in groupby(questions, key=lambda question: len(question[0])):
        batch = list(group)
        ids = torch.tensor([prompt.tolist() for prompt, _ in batch])
        with torch.no_grad():
            output = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=pad_token,
            )
        for (_, answer), tokens in zip(batch, output[:, ids.shape[1] :].tolist(), strict=True):
            right += tokens[: len(answer)] == answer.tolist()
    return right / len(questions)


# --- both sides, and the table ---------------------------------------------------------------------------------------


def compare(method: str, steps: int, work: Path) -> dict[str, Any]:
    """Run both sides of a method; return their figures, or the sentence with which ours refuses it."""
    from accel_llm.errors import ConfigError

    output = work / method
    try:
        words = command_line(method, steps, output)
    except ConfigError as error:
        return {"refused": str(error)}
    (ended,) = execute([Run(method, "sft", "cpu", 1, words, output)], work)
    if ended.code:
        sentences = [sentence.removeprefix("error: ") for sentence in ended.sentences]
        return {"refused": sentences[-1]} if sentences else {"failed": ended.cause}
    try:
        compute(partial(train_plainly, words, output), output.with_suffix(".plain.log"))
    except RuntimeError as error:
        return {"failed": f"the Trainer: {str(error).strip().splitlines()[-1]}"}
    return read_figures(output)


def read_figures(output: Path) -> dict[str, Any]:
    """Return what both sides have written into the folder of a method."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    training, evaluation = [line for line in lines if "loss" in line], lines[-1]
    plain = json.loads((output / "plain.json").read_text(encoding="utf-8"))
    trainable, speeds = plain.pop("trainable") / plain.pop("all"), [line["tokens_per_second"] for line in training]
    seconds = [tokens / speed for tokens, speed in zip(plain.pop("tokens"), speeds, strict=True)]
    ours = {
        "first_loss": training[0]["loss"],
        "seconds": median(seconds),
        "memory_mb": training[-1]["peak_memory_mb"],
        "loss": evaluation["eval/loss"],
        "exact_match": evaluation["eval/exact_match"],
    }
    return {"trainable": trainable, "ours": ours, "plain": plain}


def problem(method: str, figures: dict[str, Any]) -> str | None:
    """Say what is wrong with a comparison: our loss is worse, or the two sides do not begin with the same loss."""
    if "refused" in figures:
        return None
    if "failed" in figures:
        return f"{method}: {figures['failed']}"
    ours, plain = figures["ours"], figures["plain"]
    # The loss that PEFT returns for AdaLoRA holds its orthogonal penalty, which our metric does not.
    if method != "adalora" and abs(ours["first_loss"] / plain["first_loss"] - 1) > 1e-4:
        return f"{method}: the first losses are {ours['first_loss']:.5f} and {plain['first_loss']:.5f}"
    if not ours["loss"] <= plain["loss"] * (1 + ALLOWED):
        return f"{method}: the loss is {ours['loss']:.4f}, and the Trainer's {plain['loss']:.4f}"
    return None


HEADER = [
    "| method | trained | loss | of Trainer + PEFT | exact match | seconds a step | peak memory, MB |",
    "|---|---|---|---|---|---|---|",
]


def row(method: str, figures: dict[str, Any]) -> str:
    """Return the line of the table for a method; a pair of figures is ours, then the Trainer's."""
    if "ours" not in figures:
        (what, why), *_ = figures.items()
        return f"| `{method}` | {what}: {why} | | | | | |"
    ours, plain = figures["ours"], figures["plain"]
    difference = ours["loss"] / plain["loss"] - 1
    name = f"`{method}` ({FEWER_STEPS[method]} steps)" if method in FEWER_STEPS else f"`{method}`"
    cells = [name, f"{figures['trainable']:.2%}", f"{ours['loss']:.4f}"]
    cells += [f"{plain['loss']:.4f} ({difference:+.2%})", f"{ours['exact_match']:.2f}, {plain['exact_match']:.2f}"]
    cells += [f"{ours['seconds']:.2f}, {plain['seconds']:.2f}", f"{ours['memory_mb']}, {plain['memory_mb']}"]
    return f"| {' | '.join(cells)} |"


def table(results: dict[str, dict[str, Any]]) -> str:
    return "\n".join([*HEADER, *(row(method, figures) for method, figures in results.items())])


def record_facts(methods: list[str] | None) -> None:
    """Find the facts of `methods`, or of all, and write them where launch/show_methods.py reads them."""
    from accel_llm.training import method_facts

    facts = method_facts.recorded_facts() if methods else {}
    for method in methods or method_facts.all_methods():
        facts[method] = method_facts.find_facts(method)
        print(method, facts[method], flush=True)
    lines = ",\n".join(f'"{name}": {json.dumps(facts[name]._asdict())}' for name in facts)
    method_facts.FACTS_FILE.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    show("facts", facts_table())


def facts_table() -> str:
    """Return what launch/show_methods.py shows of the recorded methods, in Markdown."""
    from accel_llm.adapters.described import METHOD_DESCRIPTIONS, NOT_DESCRIBED
    from accel_llm.training.method_facts import recorded_facts

    sys.path.insert(0, str(ROOT / "launch"))
    import show_methods

    recorded = recorded_facts()
    lines = [f"| {' | '.join(show_methods.HEADINGS)} |", "|---" * len(show_methods.HEADINGS) + "|"]
    for name, facts in recorded.items():
        if facts.refused:
            continue
        good_for, paper = METHOD_DESCRIPTIONS.get(name, NOT_DESCRIBED)
        if paper[:1].isdigit():
            paper = f"[{paper}](https://arxiv.org/abs/{paper})"
        cells = [f"`{name}`", *show_methods.figures(facts, recorded["lora"].memory), good_for, paper]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def show(name: str, text: str) -> None:
    """Write a table into the page of accel_llm/adapters, between the marks of its name."""
    page, marks = ROOT / "accel_llm" / "adapters" / "README.md", (f"<!-- {name} -->\n", f"<!-- /{name} -->")
    before, rest = page.read_text(encoding="utf-8").split(marks[0])
    page.write_text(f"{before}{marks[0]}{text}\n{marks[1]}{rest.split(marks[1])[1]}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--work", type=Path, help="folder of the runs, which is kept")
    parser.add_argument("--facts", action="store_true", help="count all methods on the shape of a 7B model, and record")
    parser.add_argument("--record", action="store_true", help=f"write {GOLDEN.name}; with --methods only their rows")
    args = parser.parse_args()
    if args.facts:
        return record_facts(args.methods)
    work = args.work or Path(tempfile.mkdtemp(prefix="methods-"))
    work.mkdir(parents=True, exist_ok=True)
    warm()
    recorded = json.loads(GOLDEN.read_text(encoding="utf-8")) if args.record and GOLDEN.exists() else {}
    same_steps = recorded.get("steps") == args.steps
    results: dict[str, dict[str, Any]] = recorded["methods"] if args.methods and same_steps else {}
    problems = []
    print("\n".join(HEADER), flush=True)
    for method in args.methods or all_methods():
        results[method] = compare(method, min(args.steps, FEWER_STEPS.get(method, args.steps)), work)
        print(row(method, results[method]), flush=True)
        if sentence := problem(method, results[method]):
            problems.append(sentence)
            print(sentence, flush=True)
        if args.record:
            lines = ",\n".join(f'"{name}": {json.dumps(figures)}' for name, figures in results.items())
            head = json.dumps({"steps": args.steps, "versions": versions()})[1:-1]
            GOLDEN.write_text(f'{{{head}, "methods": {{\n{lines}\n}}}}\n', encoding="utf-8")
    if args.record:
        show("trainer", table(results))
    if args.work is None:
        shutil.rmtree(work)
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
