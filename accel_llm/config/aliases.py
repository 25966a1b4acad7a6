"""Option names and values of other trainers: which option of ours they mean, or what to do instead.

A name is accepted only where its values mean the same here. The names are those of Transformers, TRL, LLaMA-Factory,
Axolotl and Unsloth.
"""

# Other trainers' names for our options; the values are the same.
RENAMED_OPTIONS = {
    # model
    **dict.fromkeys(["base_model", "model", "model_name", "model_path"], "model_name_or_path"),
    **dict.fromkeys(["torch_dtype", "dtype"], "precision"),
    **dict.fromkeys(["activation_checkpointing", "use_gradient_checkpointing"], "gradient_checkpointing"),
    "model_revision": "revision",
    **dict.fromkeys(["tokenizer", "tokenizer_path", "tokenizer_name_or_path"], "tokenizer_name"),
    # data
    **dict.fromkeys(["train_file", "train_data", "data", "data_path", "data_files", "datasets"], "train_files"),
    **dict.fromkeys(["dataset_name", "train_dataset"], "train_files"),
    **dict.fromkeys(["eval_file", "validation_file", "validation_files", "eval_data_path"], "eval_files"),
    **dict.fromkeys(["eval_data", "eval_dataset", "test_datasets"], "eval_files"),
    **dict.fromkeys(["val_size", "val_set_size"], "eval_share"),
    "max_train_samples": "limit_rows",
    **dict.fromkeys(["block_size", "max_seq_length", "max_seq_len", "cutoff_len", "model_max_length"], "max_length"),
    **dict.fromkeys(["sequence_len", "seq_len", "context_length"], "max_length"),
    "sample_packing": "packing",
    **dict.fromkeys(["dataset_num_proc", "dataset_processes"], "preprocessing_num_workers"),
    "dataset_prepared_path": "cache_dir",
    "chat_template_path": "chat_template",
    # method
    "lora_model_dir": "adapter_name_or_path",
    **dict.fromkeys(["lora_rank", "r"], "lora_r"),
    **dict.fromkeys(["target_modules", "lora_target"], "lora_target_modules"),
    **dict.fromkeys(["lora_modules_to_save", "additional_target"], "modules_to_save"),
    **dict.fromkeys(["peft_use_dora", "lora_use_dora"], "use_dora"),
    "peft_use_rslora": "use_rslora",
    "peft_init_lora_weights": "init_lora_weights",
    "bias": "lora_bias",
    # optimizer and run
    "optimizer": "optim",
    "lr": "learning_rate",
    **dict.fromkeys(["gradient_clipping", "clip_grad", "gradient_clip_val"], "max_grad_norm"),
    "lr_scheduler": "lr_scheduler_type",
    "warmup_ratio": "warmup_steps",
    "cosine_min_lr_ratio": "min_lr_rate",
    **dict.fromkeys(["epochs", "num_epochs"], "num_train_epochs"),
    **dict.fromkeys(["per_device_batch_size", "micro_batch_size"], "per_device_train_batch_size"),
    "eval_batch_size": "per_device_eval_batch_size",
    "early_stopping_steps": "early_stopping_patience",
    # preferences
    "pref_loss": "loss_type",
    **dict.fromkeys(["pref_beta", "rl_beta", "dpo_beta"], "beta"),
    **dict.fromkeys(["ref_model", "ref_model_name_or_path"], "reference_model_name_or_path"),
    **dict.fromkeys(["kto_chosen_weight", "kto_desirable_weight"], "desirable_weight"),
    **dict.fromkeys(["kto_rejected_weight", "kto_undesirable_weight"], "undesirable_weight"),
    **dict.fromkeys(["random_state", "random_seed"], "seed"),
    "wandb_name": "run_name",
    **dict.fromkeys(["wandb_project", "trackio_project", "swanlab_project"], "project"),
}
# Renamed options that are shares of something: a value of 1 or more would mean a number of steps here.
SHARES = {"warmup_ratio": "give the number of steps as warmup_steps"}

TORCH_DTYPES = {"bfloat16": ("precision", "bf16"), "float16": ("precision", "fp16"), "float32": ("precision", "fp32")}
UPLOAD = "push_to_hub uploads the export alone, once, at the end, to the main branch"
# Secrets have no place in recipes, logs and lists of processes; the value of such an option is never printed.
SECRET_OPTIONS = ("hub_token", "hf_hub_token", "hf_token", "use_auth_token", "push_to_hub_token")
LOGIN = "log in with `hf auth login`, or set the environment variable HF_TOKEN"
# Switches that have no option here: false changes nothing, and for true there is a remedy.
ABSENT_SWITCHES = {
    "auto_find_batch_size": "per_device_train_batch_size sets the rows of a forward pass, total_batch_size those of a step",
    "eval_packing": "packing holds for the evaluation too",
    "fp16_full_eval": "an evaluation computes in the precision of the training",
    "bf16_full_eval": "an evaluation computes in the precision of the training",
    "full_determinism": "the order of rows depends on seed alone, and a resumed run repeats the run without a stop",
    "load_best_model_at_end": "metric_for_best_model: eval/loss keeps and exports the best checkpoint",
    "neat_packing": "packing: true keeps the packed documents apart",
    "pad_to_sequence_len": "packed rows are full and need no padding",
    "padding_free": "packing: true needs no padding",
    "plot_loss": "report.html in output_dir shows the curves",
    "predict_with_generate": "eval_generate sets for how many rows answers are generated",
    "pure_bf16": "use method: full, precision: bf16 and master_weights: stochastic_rounding",
    "hub_always_push": UPLOAD,
    "resize_vocab": "add_tokens: true adds the control tokens of the template",
    "streaming": "only pretrain.py streams; rows are encoded once and then read from disk, so they need no memory",
    "dataset_streaming": "pretrain.py has streaming; others encode rows once and read them from disk, without memory",
    "torch_compile": "set dynamo_backend in the accelerate config",
    "use_liger_kernel": "the loss projects trained positions only and needs no kernel package",
    "enable_liger_kernel": "the loss projects trained positions only and needs no kernel package",
    "use_unsloth": "it is another trainer",
    "do_predict": "eval_generate sets for how many rows answers are generated",
    "flash_attention": "attn_implementation: auto takes the best attention that is there; flash_attention_2 asks for it",
    "xformers_attention": "attn_implementation: auto takes the best attention that is there",
    "sdp_attention": "attn_implementation: auto takes the best attention that is there; sdpa asks for it",
    "pissa_init": "give init_lora_weights: pissa",
    "precompute_ref_log_probs": "log-probabilities of the reference are always computed once, before the first step",
    "reference_free": "the losses simpo, orpo and cpo have no reference",
}
# Other trainers' switches: their values as (our option, its value), or None if the value changes nothing here.
TRANSLATED_VALUES: dict[str, dict[str, tuple[str, str | bool] | None]] = {
    **{name: {"false": None} for name in ABSENT_SWITCHES},
    "bf16": {"true": ("precision", "bf16"), "false": None, "auto": None},
    "fp16": {"true": ("precision", "fp16"), "false": None},
    "mixed_precision": {"bf16": ("precision", "bf16"), "fp16": ("precision", "fp16"), "no": ("precision", "fp32")},
    "torch_dtype": {"auto": None, **TORCH_DTYPES},
    "dtype": {"auto": None, **TORCH_DTYPES},
    "quantization_bit": {"4": ("load_in_4bit", True), "8": ("load_in_8bit", True)},
    "use_peft": {"true": ("method", "lora"), "false": ("method", "full")},
    "full_finetuning": {"true": ("method", "full"), "false": ("method", "lora")},
    "adapter": {"none": ("method", "full")},
    "lora_target": {"all": ("lora_target_modules", "all-linear")},
    "lora_target_linear": {"true": ("lora_target_modules", "all-linear")},
    "assistant_only_loss": {"true": ("train_on", "assistant")},
    "completion_only_loss": {"true": ("train_on", "assistant")},
    "train_on_inputs": {"false": ("train_on", "assistant")},
    "train_on_prompt": {"false": ("train_on", "assistant")},
    "mask_history": {"true": ("train_on", "last_assistant"), "false": None},
    "group_by_length": {"true": ("order", "group_by_length"), "false": None},
    "train_sampling_strategy": {
        "random": ("order", "shuffle"),
        "sequential": ("order", "source"),
        "group_by_length": ("order", "group_by_length"),
    },
    "do_train": {"true": None},
    "do_eval": {"false": None},
    "evaluation_strategy": {"no": None, "false": None},
    "eval_strategy": {"no": None, "false": None},
    "logging_strategy": {"steps": None},
    "hub_strategy": {"end": None},
}
# Values that change nothing if this option is given too; alone they mean a default that differs from ours.
VALUES_BESIDE_AN_OPTION = {
    ("eval_strategy", "steps"): "eval_steps",
    ("evaluation_strategy", "steps"): "eval_steps",
    ("save_strategy", "steps"): "save_steps",
    ("lora_target_linear", "false"): "lora_target_modules",
}

EVALUATION = "eval_files or eval_share turns evaluation on; eval_steps sets how often it runs"
LAUNCHER = "the launcher decides it; start with `accelerate launch --config_file accelerate_configs/ddp.yaml`"
WORKERS = "rows are encoded before the training; preprocessing_num_workers sets by how many processes"
SOURCES = "write a source as {path: ..., name: ..., split: ...} in train_files or eval_files"
OTHER_RATES = "learning_rate_patterns sets rates by parts of the parameters' names, as embed_tokens=5e-5"
# Names in PEFT's configs that people write as options; `method_options` takes all of them.
PEFT_OPTIONS = (
    *("target_parameters", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("trainable_token_indices", "exclude_modules", "feedforward_modules", "num_virtual_tokens", "init_r", "target_r"),
    *("prompt_tuning_init", "prompt_tuning_init_text", "encoder_hidden_size", "encoder_reparameterization_type"),
    *("oft_block_size", "boft_block_size", "module_dropout", "n_frequency"),
)
# Names for `method` whose values are names of methods too.
METHOD_NAMES = ("adapter", "finetuning_type")
# Names without an option of ours, and values of switches that are not listed above: the remedy.
ANSWERED_OPTIONS = {
    **ABSENT_SWITCHES,
    "deepspeed": "the launch YAML names it: write it as deepspeed_config_file into a copy of accelerate_configs/zero2.yaml, and "
    "start with `accelerate launch --config_file`",
    "model_type": "config_name: llama, or another family, begins with random weights; else config.json of the model says it",
    "fsdp": "start with `accelerate launch --config_file accelerate_configs/fsdp2.yaml`",
    "fsdp_config": "start with `accelerate launch --config_file accelerate_configs/fsdp2.yaml`",
    "num_processes": "start with `accelerate launch --num_processes`",
    "local_rank": "the launcher sets it; start with `accelerate launch --config_file accelerate_configs/ddp.yaml`",
    "use_cpu": "start with `accelerate launch --config_file accelerate_configs/cpu.yaml`",
    **dict.fromkeys(["ddp_backend", "ddp_timeout", "ddp_find_unused_parameters", "ddp_bucket_cap_mb"], LAUNCHER),
    **dict.fromkeys(["ddp_broadcast_buffers", "ddp_static_graph", "accelerator_config"], LAUNCHER),
    **dict.fromkeys(["parallelism_config", "device", "devices"], LAUNCHER),
    **dict.fromkeys(["torch_compile_backend", "torch_compile_mode"], ABSENT_SWITCHES["torch_compile"]),
    "logging_dir": "metrics.jsonl in output_dir has the metrics; report_to names trackers that get them too",
    **dict.fromkeys(["hub_strategy", "hub_revision"], UPLOAD),
    **dict.fromkeys(SECRET_OPTIONS, LOGIN),
    "do_train": "the script always trains; dry_run stops before training",
    "do_eval": EVALUATION,
    "evaluation_strategy": EVALUATION,
    "eval_strategy": EVALUATION,
    "evals_per_epoch": EVALUATION,
    "eval_delay": EVALUATION,
    "logging_strategy": "logging_steps sets how often metrics are logged",
    "logging_first_step": "logging_steps: 1 logs every step",
    "save_strategy": "save_steps sets how often checkpoints are saved; without it only the end is saved",
    "saves_per_epoch": "save_steps sets how often checkpoints are saved; without it only the end is saved",
    "save_only_model": "a checkpoint has all that a resume needs; the export has the weights alone",
    "greater_is_better": "it follows from metric_for_best_model",
    "early_stopping_threshold": "early_stopping_patience counts the evaluations that are not better at all",
    "ignore_data_skip": "a resumed run continues with the next row at once",
    "lr_scheduler_kwargs": "min_lr_rate and decay_share shape the schedule",
    "optim_args": "adam_beta1, adam_beta2, adam_epsilon and weight_decay shape the optimizer",
    "optim_target_modules": "it belongs to GaLore and its kin, which are not here; --help lists all options",
    "average_tokens_across_devices": "the loss is always the mean over the trained tokens of all processes",
    "loss_type": "the loss is the mean over the trained tokens of a step; label_smoothing_factor and z_loss_coef change it",
    "router_aux_loss_coef": "the model's config.json decides (output_router_logits and its own router_aux_loss_coef)",
    "data_seed": "seed sets the order of the rows too",
    "eval_accumulation_steps": "an evaluation adds up sums only, so it needs little memory",
    "type": "data_format names the format of the rows, if it is not detected",
    "validation_split_percentage": "eval_share holds out a share of the rows, such as 0.05 for 5 percent",
    "dataset": "train_files names files, folders or hub datasets; the names of dataset_info.json are not known here",
    "max_samples": "limit_rows is the number of rows of all sources; write {path: ..., limit_rows: ...} for each source",
    "dataset_dir": "train_files names files, folders or hub datasets",
    **dict.fromkeys(["dataset_config", "dataset_train_split", "dataset_test_split", "dataset_kwargs"], SOURCES),
    "keep_linebreaks": "sample_by: paragraph or document keeps the line breaks inside a text",
    "dataset_text_field": "launch/pretrain.py has text_column; here columns gives names, as text=yours",
    **dict.fromkeys(["dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory"], WORKERS),
    **dict.fromkeys(["dataloader_persistent_workers", "dataloader_multiprocessing_context"], WORKERS),
    **dict.fromkeys(["dataloader_drop_last", "dataloader_in_order"], "every row is trained once in an epoch"),
    "shuffle_dataset": "order sets the order of the rows",
    **dict.fromkeys(
        ["group_by_length", "train_sampling_strategy"],
        "order: shuffle, group_by_length, length or source sets the order of the rows; packed rows need no groups",
    ),
    "remove_unused_columns": "the ledger lists what nothing reads",
    "label_names": "train_on says what is trained; of launch/classify.py the labels of the rows are the classes",
    **dict.fromkeys(["text_column_name", "text_column_names", "label_column_name"], "columns: text=yours label=yours"),
    **dict.fromkeys(
        ["num_labels", "do_regression", "is_regression"], "problem_type, and the labels of the rows, say it"
    ),
    "packing_strategy": "packing: true or static packs whole documents; overlong says what is done with longer ones",
    "truncation_mode": "overlong: truncate cuts a long row at its end; drop and split are the other choices",
    "pad_to_multiple_of": "packed rows need no padding",
    "template": "leave it out: the tokenizer's own template is used; chat_template takes chatml or a .jinja file",
    **dict.fromkeys(["assistant_only_loss", "completion_only_loss"], "train_on: all trains every turn"),
    **dict.fromkeys(["train_on_inputs", "train_on_prompt"], "train_on: all trains every turn"),
    "roles_to_train": "train_on says which turns are trained",
    "mask_history": "train_on: last_assistant trains the last answer only",
    "eos_token": "the template's end of a turn is trained and ends an answer; train_on_eos says after which turns",
    "pad_token": "the tokenizer's is used, or its end token; padding is never trained",
    **dict.fromkeys(
        ["special_tokens", "new_special_tokens", "tokens"], "add_tokens: true adds the template's control tokens"
    ),
    "split_special_tokens": "allow_special_in_text says whether control tokens in a message stay text, the default",
    **dict.fromkeys(
        ["stage", "rl"], "launch/sft.py, pretrain.py, dpo.py, kto.py, reward.py and classify.py are for one stage each"
    ),
    "max_prompt_length": "max_length bounds prompt and answers together, and longer rows are left out, not cut",
    "max_completion_length": "max_length bounds prompt and answers together, and longer rows are left out, not cut",
    "simpo_gamma_beta_ratio": "give simpo_gamma, which is this ratio times beta",
    "pref_ftx": "rpo_alpha weighs the mean loss of chosen answers' tokens",
    "bf16": "give true or false, or use precision: auto, bf16, fp16 or fp32",
    "fp16": "give true or false, or use precision: auto, bf16, fp16 or fp32",
    "mixed_precision": "use precision: auto, bf16, fp16 or fp32",
    "load_in_16bit": "method: lora has a 16-bit base; precision: bf16 or fp16 names the number format",
    "quantization_bit": "use method: qlora or load_in_4bit: true, or load_in_8bit: true",
    **dict.fromkeys(["bnb_4bit_quant_type", "use_bnb_nested_quant"], "method: qlora quantizes to nf4, twice"),
    "bnb_4bit_quant_storage": "it follows from the launch YAML",
    "use_peft": "give true or false, or use method, such as full, lora or ia3",
    "peft_type": "method names what is trained, such as lora, ia3 or oft",
    "finetuning_type": "use method, such as full, freeze or lora",
    "full_finetuning": "give true or false, or use method: full",
    "adapter": "use method, such as full, lora or ia3; adapter_name_or_path continues an adapter",
    "lora_target_linear": "give true or false, or use lora_target_modules",
    **{name: f"write method_options: {{{name}: ...}}" for name in PEFT_OPTIONS},
    "lora_target_parameters": "write method_options: {target_parameters: [...]}",
    "peft_layers_to_transform": "write method_options: {layers_to_transform: [...]}",
    "peft_layers_pattern": "write method_options: {layers_pattern: ...}",
    "peft_trainable_token_indices": "write method_options: {trainable_token_indices: [...]}",
    "freeze_trainable_layers": "write method: freeze and method_options: {layers: 2} for the last two layers",
    "freeze_trainable_modules": "write method: freeze and method_options: {layers: 2, modules: [mlp]}",
    "freeze_extra_modules": "write method: freeze and method_options with embeddings, head or norms: true",
    "unfrozen_parameters": "write method: freeze and method_options: {parameters: [...]}",
    **dict.fromkeys(["loraplus_lr_embedding", "embedding_lr", "embedding_learning_rate"], OTHER_RATES),
    **dict.fromkeys(["lr_groups", "embedding_lr_scale"], OTHER_RATES),
    **dict.fromkeys(["lora_task_type", "task_type"], "the script says it: launch/classify.py trains classifiers"),
    "rope_scaling": "the model's config.json decides",
    "loftq_config": "init_lora_weights: loftq computes the first values from what 4 bits lose",
    "model_init_kwargs": "attn_implementation, precision and revision are options of their own",
    "flash_attn": "attn_implementation: auto takes the best attention that is there; flash_attention_2 asks for it",
    "gradient_checkpointing_kwargs": "gradient_checkpointing: true recomputes without reentrance",
    "activation_checkpointing_kwargs": "gradient_checkpointing: true recomputes without reentrance",
    "disable_gradient_checkpointing": "gradient_checkpointing is off by default",
    "activation_offloading": "gradient_checkpointing: true recomputes the activations instead",
}
