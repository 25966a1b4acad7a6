"""Names and values of other trainers, and what each becomes or is answered with here."""

# Other trainers' names for an option that takes the same values here.
RENAMED_OPTIONS = {
    **dict.fromkeys(["block_size", "max_seq_length", "max_seq_len", "cutoff_len", "model_max_length"], "max_length"),
    **dict.fromkeys(["train_file", "train_data", "data_path", "data_files"], "train_files"),
    **dict.fromkeys(["eval_file", "validation_file", "validation_files", "eval_data_path"], "eval_files"),
    **dict.fromkeys(["torch_dtype", "dtype"], "precision"),
    **dict.fromkeys(["max_train_samples", "max_samples"], "limit_rows"),
    **dict.fromkeys(["per_device_batch_size", "micro_batch_size"], "per_device_train_batch_size"),
    **dict.fromkeys(["lora_rank", "r"], "lora_r"),
    **dict.fromkeys(["target_modules", "lora_target"], "lora_target_modules"),
    "val_size": "eval_share",
    "finetuning_type": "method",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "warmup_ratio": "warmup_steps",
    "template": "chat_template",
}
TORCH_DTYPES = {"bfloat16": ("precision", "bf16"), "float16": ("precision", "fp16"), "float32": ("precision", "fp32")}
# Other trainers' switches: the values that have a meaning here, as (option, value), or None where it is so anyway.
TRANSLATED_VALUES: dict[str, dict[str, tuple[str, str | bool] | None]] = {
    "bf16": {"true": ("precision", "bf16"), "false": None},
    "fp16": {"true": ("precision", "fp16"), "false": None},
    "mixed_precision": {"bf16": ("precision", "bf16"), "fp16": ("precision", "fp16"), "no": ("precision", "fp32")},
    "torch_dtype": {"auto": None, **TORCH_DTYPES},
    "dtype": {"auto": None, **TORCH_DTYPES},
    "load_in_4bit": {"true": ("method", "qlora"), "false": None},
    "use_peft": {"true": ("method", "lora"), "false": ("method", "full")},
    "do_train": {"true": None},
    "do_eval": {"false": None},
    "evaluation_strategy": {"no": None, "false": None},
    "eval_strategy": {"no": None, "false": None},
    "logging_strategy": {"steps": None},
    "save_strategy": {"steps": None},
}
# Names that mean nothing here: what to do instead.
ANSWERED_OPTIONS = {
    "deepspeed": "DeepSpeed comes from the launcher: accelerate launch --config_file accelerate_configs/zero2.yaml",
    "fsdp": "FSDP comes from the launcher: accelerate launch --config_file accelerate_configs/fsdp2.yaml",
    "fsdp_config": "FSDP comes from the launcher: accelerate launch --config_file accelerate_configs/fsdp2.yaml",
    "num_processes": "processes come from the launcher: accelerate launch --num_processes",
    "local_rank": "ranks come from the launcher: accelerate launch --config_file accelerate_configs/ddp.yaml",
    "use_cpu": "the device comes from the launcher: accelerate launch --config_file accelerate_configs/cpu.yaml",
    "logging_dir": "metrics are written to metrics.jsonl in output_dir; report_to names trackers that get them too",
    "do_train": "training is what the script does; dry_run stops before it",
    "do_eval": "evaluation runs where eval_files or eval_share gives rows; eval_steps says how often",
    "evaluation_strategy": "eval_steps says how often to evaluate; eval_files or eval_share on what",
    "eval_strategy": "eval_steps says how often to evaluate; eval_files or eval_share on what",
    "logging_strategy": "logging_steps says how often to log",
    "save_strategy": "save_steps says how often to save; without it the end is saved",
    "lr_scheduler_kwargs": "min_lr_rate and decay_share shape the schedule",
    "validation_split_percentage": "eval_share holds out a share, 0.05 for 5 percent",
    "bf16": "it is true or false here; precision takes auto, bf16, fp16 or fp32",
    "fp16": "it is true or false here; precision takes auto, bf16, fp16 or fp32",
    "mixed_precision": "precision takes auto, bf16, fp16 or fp32",
    "load_in_4bit": "it is true or false here; method qlora trains on a 4-bit base",
    "use_peft": "it is true or false here; method takes full, lora or qlora",
}
