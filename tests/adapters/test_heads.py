"""The head of a classifier in an adapter's file."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from accel_llm.adapters.heads import count_saved_scores

SHAPE = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 30}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21.2
@pytest.mark.parametrize("labels", [1, 2, 16, 40])
@pytest.mark.parametrize(
    ("config", "model", "whole"),
    [
        (BertConfig, BertForSequenceClassification, ["bert.pooler", "classifier"]),
        (RobertaConfig, RobertaForSequenceClassification, ["classifier"]),
    ],
)
def test_the_scores_of_an_adapter_that_peft_has_written_are_counted(
    tmp_path: Path, config, model, whole, labels
) -> None:
    """Also where there are more classes than the model is wide."""
    base = model(config(**SHAPE, num_labels=labels))
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["query"], modules_to_save=whole)
    get_peft_model(base, lora).save_pretrained(tmp_path)
    assert count_saved_scores(tmp_path) == labels


def test_an_adapter_without_a_head_has_no_scores(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"modules_to_save": None}))
    save_file({"base_model.model.q.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "adapter_model.safetensors")
    assert count_saved_scores(tmp_path) == 0
