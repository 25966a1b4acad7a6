"""axolotl 904 (LLaMA-Factory 6244): a bf16 model comes back in float32, twice as large, after it was trained in full.

The export must have the dtype of the files that it came from, whatever the master weights are. Read off the headers of
the files: config.json may name no dtype, and transformers then takes float32 for it.
"""

import torch
from safetensors.torch import load_file
from support import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from accel_llm.config.options import TrainOptions
from accel_llm.model.stored_dtypes import StoredDtypes
from accel_llm.training import export


def test_an_export_has_the_dtypes_of_the_files(tmp_path) -> None:
    model = tiny_model("llama").bfloat16()
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(file.read_text().replace('"dtype": "bfloat16",', ""))
    config = AutoConfig.from_pretrained(tmp_path / "base")
    assert config.dtype is None

    masters = model.float()
    stored = StoredDtypes(TrainOptions(model_name_or_path=str(tmp_path / "base"), method="full"), config)
    state = stored.cast(masters, dict(masters.named_parameters()))
    export._save_model(masters, tmp_path / "model", state, stored.main)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "model"))
    assert {name: t.dtype for name, t in after.items()} == {name: t.dtype for name, t in before.items()}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16
