"""Names and values of other trainers: accepted where they mean the same here, answered otherwise, never guessed."""

import dataclasses

import pytest
import transformers

from accel_llm.config.aliases import ANSWERED_OPTIONS, RENAMED_OPTIONS, SHARES, TRANSLATED_VALUES
from accel_llm.config.command_line import parse_options
from accel_llm.config.options import SftOptions
from accel_llm.config.preference_options import DpoOptions, KtoOptions
from accel_llm.config.pretrain_options import PretrainOptions
from accel_llm.errors import ConfigError

OPTIONS = SftOptions.model_fields.keys()
OF_PREFERENCES = DpoOptions.model_fields.keys() | KtoOptions.model_fields.keys()


def sft(text: str, folder) -> SftOptions:
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    return parse_options(SftOptions, ["--config", str(folder / "recipe.yaml")])


def problems(*words: str, script: type = SftOptions) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_options(script, list(words))
    return caught.value.problems


def test_the_tables_name_options_that_exist_and_hide_none():
    translated = {v[0] for values in TRANSLATED_VALUES.values() for v in values.values() if v}
    assert {*RENAMED_OPTIONS.values(), *translated} <= OPTIONS | OF_PREFERENCES
    names = RENAMED_OPTIONS.keys() | TRANSLATED_VALUES.keys() | ANSWERED_OPTIONS.keys()
    # The remedies of `loss_type` and `streaming` are for scripts that do not have them.
    assert names & (OPTIONS | OF_PREFERENCES | PretrainOptions.model_fields.keys()) == {"loss_type", "streaming"}
    assert not RENAMED_OPTIONS.keys() & ANSWERED_OPTIONS.keys() and SHARES.keys() <= RENAMED_OPTIONS.keys()
    # A switch with some values that mean something here has a remedy for all others.
    assert TRANSLATED_VALUES.keys() <= ANSWERED_OPTIONS.keys() | RENAMED_OPTIONS.keys()
    for remedy in [*ANSWERED_OPTIONS.values(), *SHARES.values()]:
        assert remedy[0].islower() and not remedy.endswith(".")


AXOLOTL = """
base_model: model
load_in_8bit: false
load_in_4bit: true
datasets: [{path: a.jsonl}]
val_set_size: 0.05
dataset_prepared_path: cache
sequence_len: 512
sample_packing: true
pad_to_sequence_len: false
adapter: qlora
lora_r: 8
lora_target_linear: true
wandb_name: name
micro_batch_size: 2
num_epochs: 3
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
train_on_inputs: false
group_by_length: false
bf16: auto
flash_attention: false
warmup_ratio: 0.1
"""
LLAMA_FACTORY = """
model_name_or_path: model
do_train: true
finetuning_type: lora
quantization_bit: 4
lora_rank: 8
lora_target: all
cutoff_len: 512
preprocessing_num_workers: 4
plot_loss: false
learning_rate: 1.0e-4
lr_scheduler_type: cosine
bf16: true
val_size: 0.1
eval_strategy: steps
eval_steps: 500
train_files: a.jsonl
"""
TRL = """
model_name_or_path: model
dataset_name: a.jsonl
use_peft: true
load_in_4bit: true
lora_target_modules: all-linear
assistant_only_loss: true
packing: false
save_strategy: steps
save_steps: 50
eval_strategy: no
optim: adamw_torch
gradient_checkpointing: true
"""


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (AXOLOTL, {"method": "qlora", "max_length": 512, "eval_share": 0.05, "packing": "per_epoch", "optim": "adamw_8bit",
                   "lora_target_modules": "all-linear", "warmup_steps": 0.1, "train_on": "assistant", "run_name": "name",
                   "per_device_train_batch_size": 2, "num_train_epochs": 3, "cache_dir": "cache", "precision": "auto"}),
        (LLAMA_FACTORY, {"method": "lora", "in_4_bits": True, "max_length": 512, "eval_share": 0.1, "eval_steps": 500, "lora_r": 8,
                         "lora_target_modules": "all-linear", "precision": "bf16"}),
        (TRL, {"method": "lora", "in_4_bits": True, "train_files": ["a.jsonl"], "packing": None, "train_on": "assistant", "save_steps": 50,
               "optim": "adamw", "gradient_checkpointing": True, "eval_steps": None}),
    ],
)  # fmt: skip
def test_a_config_of_another_trainer_means_the_same(text, values, tmp_path):
    options = sft(text, tmp_path)
    assert options.model_name_or_path == "model"
    assert {name: getattr(options, name) for name in values} == values


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--val_set_size 100", "val_set_size (here eval_share): '100' is not allowed; give a number of at least 0 and "
         "below 1."),
        ("--warmup_ratio 1", "warmup_ratio: '1' is not a share below 1; give the number of steps as warmup_steps."),
        ("--template qwen", "template: 'qwen' has no meaning here; leave it out: the tokenizer's own template is used; "
         "chat_template takes chatml or a .jinja file."),
        ("--adapter output/adapter", "adapter: 'output/adapter' has no meaning here; use method, such as full, lora or "
         "ia3; adapter_name_or_path continues an adapter."),
        ("--finetuning_type full --quantization_bit 4", "load_in_4bit: method full trains no adapter; remove it."),
        ("--freeze_trainable_layers 3", "freeze_trainable_layers: '3' has no meaning here; write method: freeze and "
         "method_options: {layers: 2} for the last two layers."),
        ("--target_parameters experts", "target_parameters: 'experts' has no meaning here; write method_options: "
         "{target_parameters: ...}."),
        ("--embedding_lr 1e-5", "embedding_lr: '1e-5' has no meaning here; learning_rate_patterns sets rates by parts of "
         "the parameters' names, as embed_tokens=5e-5."),
        ("--assistant_only_loss false", "assistant_only_loss: 'false' has no meaning here; train_on: all trains every "
         "turn."),
        ("--train_on_inputs true", "train_on_inputs: 'true' has no meaning here; train_on: all trains every turn."),
        ("--eval_strategy steps", "eval_strategy: 'steps' has no meaning here; eval_files or eval_share turns evaluation "
         "on; eval_steps sets how often it runs."),
        ("--save_strategy steps", "save_strategy: 'steps' has no meaning here; save_steps sets how often checkpoints are "
         "saved; without it only the end is saved."),
        ("--lora_target_linear false", "lora_target_linear: 'false' has no meaning here; give true or false, or use "
         "lora_target_modules."),
        ("--optimizer galore_adamw", "optimizer (here optim): 'galore_adamw' is not allowed; give adamw, adamw_8bit, "
         "paged_adamw, paged_adamw_8bit, lion, adafactor, sgd or muon."),
        ("--eos_token </s>", "eos_token: '</s>' has no meaning here; the template's end of a turn is trained and ends an "
         "answer; train_on_eos says after which turns."),
        ("--load_best_model_at_end", "load_best_model_at_end: true (or no value) has no meaning here; "
         "metric_for_best_model: eval/loss keeps and exports the best checkpoint."),
        ("--max_samples 10", "max_samples: '10' has no meaning here; limit_rows is the number of rows of all sources; "
         "write {path: ..., limit_rows: ...} for each source."),
    ],
)  # fmt: skip
def test_what_means_something_else_is_answered(words, problem):
    assert problems(*words.split())[0] == problem


@pytest.mark.parametrize(
    "line, order",
    [
        ("group_by_length: true", "group_by_length"),
        ("group_by_length: false", "shuffle"),
        ("train_sampling_strategy: group_by_length", "group_by_length"),
        ("train_sampling_strategy: sequential", "source"),
        ("train_sampling_strategy: random", "shuffle"),
    ],
)
def test_the_sampling_of_transformers_is_an_order(line, order, tmp_path):
    assert sft(f"{line}\npacking: false", tmp_path).order == order
    with pytest.raises(ConfigError, match="train_sampling_strategy: 'batch_rebalance' has no meaning here; order: "):
        sft("train_sampling_strategy: batch_rebalance", tmp_path)


@pytest.mark.parametrize("line", ["adapter: IA3", "finetuning_type: ia3", "method: (IA)3"])
def test_any_method_may_have_the_name_of_another_trainers_option(line, tmp_path):
    assert sft(line, tmp_path).method == "ia3"


def test_a_source_of_axolotl_is_answered_field_by_field(tmp_path):
    with pytest.raises(ConfigError) as caught:
        sft("datasets: [{path: a.jsonl, type: alpaca}]", tmp_path)
    assert caught.value.problems[0].startswith(
        "datasets (here train_files): a source has no field 'type'; give any of "
    )


def test_lora_of_another_script_stays_lora():
    """In pretrain.py the method is full unless the user says otherwise, so `false` must not be silent."""
    options = parse_options(PretrainOptions, ["--config_name", "c", "--full_finetuning", "false"], {"method": "full"})
    assert options.method == "lora"


GUESSES = {  # names that are no misspelling, but have the words of an option
    "batch_size": "did you mean per_device_train_batch_size or per_device_eval_batch_size or total_batch_size?",
    "scheduler": "did you mean lr_scheduler_type?",
    "lora": "did you mean lora_r?",
    "dropout": "did you mean lora_dropout?",
    "num_workers": "did you mean preprocessing_num_workers?",
    "lerning_rate": "did you mean learning_rate?",
    "max_lenght": "did you mean max_length?",
    "steps": "--help lists all options.",
    "order_by": "--help lists all options.",
    "tf32": "--help lists all options.",
}


@pytest.mark.parametrize("name", GUESSES)
def test_a_guess_is_near_or_there_is_none(name):
    assert problems(f"--{name}", "x") == [f"{name}: no such option; {GUESSES[name]}"]


def names_of_other_trainers() -> set[str]:
    classes: list[type] = [transformers.TrainingArguments]
    try:
        import trl

        classes += [trl.SFTConfig, trl.ModelConfig, trl.ScriptArguments]
    except ImportError:
        pass
    return {field.name for each in classes for field in dataclasses.fields(each)}


def test_no_name_of_transformers_or_trl_is_answered_with_a_guess():
    """difflib alone made `eos_token` add_tokens, `packing_strategy` learning_rate and `model` order."""
    guesses: dict[str, list[str]] = {}
    for name in names_of_other_trainers() - OPTIONS:
        try:
            parse_options(SftOptions, [f"--{name}", "x"])
        except ConfigError as error:
            guesses[name] = [sentence for sentence in error.problems if "did you mean" in sentence]
    assert len(guesses) > 80 and not any(guesses.values())
