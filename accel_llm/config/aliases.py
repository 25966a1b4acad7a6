"""Option names and values of other trainers: which option of ours they mean, or what to do instead."""

# Other trainers' names for our options; the values are the same.
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
# Other trainers' switches: their values as (our option, its value), or None if the value changes nothing here.
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
# Names without an option of ours, and values of switches that are not listed above: the remedy.
ANSWERED_OPTIONS = {
    "deepspeed": "start with `accelerate launch --config_file accelerate_configs/zero2.yaml`",
    "fsdp": "start with `accelerate launch --config_file accelerate_configs/fsdp2.yaml`",
    "fsdp_config": "start with `accelerate launch --config_file accelerate_configs/fsdp2.yaml`",
    "num_processes": "start with `accelerate launch --num_processes`",
    "local_rank": "the launcher sets it; start with `accelerate launch --config_file accelerate_configs/ddp.yaml`",
    "use_cpu": "start with `accelerate launch --config_file accelerate_configs/cpu.yaml`",
    "logging_dir": "metrics.jsonl in output_dir has the metrics; report_to names trackers that get them too",
    "do_train": "the script always trains; dry_run stops before training",
    "do_eval": "eval_files or eval_share turns evaluation on; eval_steps sets how often it runs",
    "evaluation_strategy": "eval_files or eval_share turns evaluation on; eval_steps sets how often it runs",
    "eval_strategy": "eval_files or eval_share turns evaluation on; eval_steps sets how often it runs",
    "logging_strategy": "logging_steps sets how often metrics are logged",
    "save_strategy": "save_steps sets how often checkpoints are saved; without it only the end is saved",
    "lr_scheduler_kwargs": "min_lr_rate and decay_share shape the schedule",
    "validation_split_percentage": "eval_share holds out a share of the rows, such as 0.05 for 5 percent",
    "bf16": "give true or false, or use precision: auto, bf16, fp16 or fp32",
    "fp16": "give true or false, or use precision: auto, bf16, fp16 or fp32",
    "mixed_precision": "use precision: auto, bf16, fp16 or fp32",
    "load_in_4bit": "give true or false, or use method: qlora",
    "use_peft": "give true or false, or use method: full, lora or qlora",
}
