"""How much of a model is held in 4 bits is said once in a run, with the numbers of the model itself."""

import re

from transformers import AutoModelForCausalLM

from accel_llm.model import quantized_share


def test_a_start_says_it_once(script, tiny, chats, tmp_path, capsys):
    quantized_share._say_once.cache_clear()  # what the runs of other tests said
    words = ["--model_name_or_path", tiny, "--train_files", chats, "--max_length", 128, "--cache_dir", tmp_path / "c"]
    script("sft", *words, "--method", "qlora", "--dry_run", "--output_dir", tmp_path / "out")
    ((share, total),) = re.findall(r"^4-bit weights: ([\d.]+)% of ([\d,]+);", capsys.readouterr().out, re.MULTILINE)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    layers = sum(parameter.numel() for name, parameter in model.named_parameters() if name.endswith("_proj.weight"))
    assert int(total.replace(",", "")) == model.num_parameters()
    assert float(share) == round(100 * layers / model.num_parameters(), 1)
