"""The options of each script, by group, as --help lists them: none appears, disappears or moves by accident.

An option that is added or renamed on purpose is added or renamed in the lists here as well.
"""

import re

import pytest

MODEL = """
model_name_or_path tokenizer_name revision trust_remote_code allow_pickle precision attn_implementation
gradient_checkpointing offload_embeddings
"""
DATA = """
train_files eval_files eval_share limit_rows data_format columns on_bad_row chat_template chat_template_kwargs add_tokens
allow_special_in_text train_on train_on_eos split_turns open_thought max_length overlong max_lost packing order
preprocessing_num_workers cache_dir
"""
METHOD = """
method method_options load_in_4bit load_in_8bit adapter_name_or_path lora_r lora_alpha lora_dropout lora_bias lora_target_modules modules_to_save
init_lora_weights prompt_ensemble use_dora use_rslora
"""
OPTIMIZER = """
optim learning_rate learning_rate_patterns weight_decay adam_beta1 adam_beta2 adam_epsilon master_weights max_grad_norm lr_scheduler_type
min_lr_rate decay_share decay_steps warmup_steps neftune_noise_alpha loraplus_lr_ratio label_smoothing_factor z_loss_coef
"""
RUN = """
output_dir overwrite_output_dir resume_from_checkpoint per_device_train_batch_size per_device_eval_batch_size
gradient_accumulation_steps total_batch_size num_train_epochs max_steps logging_steps eval_steps save_steps
save_total_limit save_async metric_for_best_model early_stopping_patience allow_changed max_skipped_steps spike_threshold seed
report_to run_name project dry_run preflight check_only verbose eval_on_start eval_generate
"""
SHARING = "push_to_hub hub_model_id hub_private_repo"
TRAINING = [MODEL, DATA, METHOD, OPTIMIZER, RUN, SHARING]
ASK = """
model base allow_other_base max_new_tokens temperature chat_template precision load_in_4bit seed trust_remote_code
allow_pickle
"""


def without(*names: str) -> list[str]:
    """The groups of TRAINING without options that have no meaning in a script."""
    return [" ".join(name for name in group.split() if name not in names) for group in TRAINING]


PREFERENCE = ["reference_model_name_or_path", *without("label_smoothing_factor", "z_loss_coef")]
PAIRS = [PREFERENCE[0], "scored_answers", *PREFERENCE[1:]]
SCORES = without("label_smoothing_factor", "z_loss_coef", "train_on", "train_on_eos", "eval_generate", "add_tokens")
TURNS = ("chat_template", "chat_template_kwargs", "add_tokens", "allow_special_in_text")
TURNS += ("train_on", "train_on_eos", "split_turns", "open_thought")
TOKENS = "tokens_per_step max_tokens warmup_tokens decay_tokens batch_warmup_steps batch_warmup_tokens"
SAMPLES = "sample_text sample_steps sample_tokens"
SCRIPTS = {
    "sft": ["overfit", *TRAINING],
    "dpo": ["loss_type loss_weights beta label_smoothing simpo_gamma cpo_alpha rpo_alpha use_weighting", *PAIRS],
    "kto": ["loss_type beta desirable_weight undesirable_weight", *PREFERENCE],
    "reward": ["center_rewards_coefficient", "scored_answers", *SCORES],
    "classify": ["problem_type class_weights focal_gamma", *without(*TURNS, "z_loss_coef", "eval_generate")],
    "pretrain": [
        "config_name config_overrides streaming cross_document_attention",
        "text_column sample_by",
        TOKENS,
        SAMPLES,
        *without(*TURNS),
    ],
    "prepare": [
        """
        tokenizer_name output_dir part deduplicate near_duplicate_threshold decontaminate_files
        decontaminate_ngram fim_rate fim_spm_rate seed revision trust_remote_code
        """,
        "text_column sample_by",
        "train_files columns on_bad_row max_length overlong max_lost preprocessing_num_workers",
    ],
    "plan": ["gpu config_file", "overfit", *TRAINING],
    "show_data": ["rows source random row json", "overfit", *TRAINING],
    "show_methods": ["methods json"],
    "report": ["runs output_file"],
    "chat": ["adapters prompt file system top_p top_k min_p repetition_penalty", ASK],
    "predict": [
        """
        input_files output_file overwrite_output_file column_prefix data_format columns on_bad_row max_length overlong
        per_device_eval_batch_size
        """,
        ASK,
    ],
    "merge": [
        """
        adapter output_dir base revision dtype merge_base allow_other_base scale adapter_weights combination_type
        density seed unmerge verify max_shard_size overwrite_output_dir allow_pickle trust_remote_code
        """,
        SHARING,
    ],
    "push": ["model hub_model_id hub_private_repo"],
    "extract": ["model base output_dir lora_r modules_to_save overwrite_output_dir trust_remote_code"],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_exactly_these_options(name, script, capsys):
    with pytest.raises(SystemExit) as ended:
        script(name, "--help")
    assert ended.value.code == 0

    # A blank line begins a group; `  --name` begins an option.
    groups = capsys.readouterr().out.split("\n\n")
    options = [re.findall(r"^  --(\w+)$", group, re.MULTILINE) for group in groups]
    assert [names for names in options if names] == [group.split() for group in SCRIPTS[name]]
