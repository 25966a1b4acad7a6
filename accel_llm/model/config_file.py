"""Makes config.json true for other programs, such as vLLM and those that build on transformers 4.

transformers 5 keeps all settings of rotary embeddings in `rope_parameters`. Transformers 4 does not know this key: it
takes the default base of 10,000 and no scaling, and vLLM with it, without a word (vLLM 42624). So the old keys are
written as well.
"""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from accel_llm.system.disk import write_atomically
from accel_llm.system.launcher import process_rank

OWN_KEYS = ("rope_theta", "partial_rotary_factor")  # beside `rope_scaling` in transformers 4, not inside
# Families that called them otherwise.
OTHER_NAMES = {"gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}}


def save_config(config: PreTrainedConfig, folder: Path) -> None:
    """Write `config` to `folder`/config.json, with the old names of the rotary settings beside the new ones."""
    config.save_pretrained(str(folder))
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    widened = _with_old_names(settings)
    # A family may read the old names in a way of its own, or refuse them. Then the file stays as it is.
    try:
        same = _rotary_settings(config, widened) == _rotary_settings(config, settings)
    except Exception:
        same = False
    if same:
        write_atomically(file, json.dumps(widened, indent=2, ensure_ascii=False, sort_keys=True) + "\n")
    elif widened != settings:
        print(
            f"config.json: the rotary settings of {config.model_type} have names of transformers 5 only; programs that "
            "build on transformers 4 would read other ones",
            flush=True,
        )


def correct_tied_embeddings(model: PreTrainedModel) -> None:
    """Set `tie_word_embeddings` of a loaded model to false if its files hold a head that differs from the embedding.

    transformers 5.24 then keeps both, whatever config.json says. vLLM and transformers 4 believe config.json and drop
    the head (vLLM 51063), so an export must say what is true.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or getattr(head, "weight", None) is getattr(embedding, "weight", None):
        return
    if untie(model.config) and process_rank() == 0:
        print(
            "tie_word_embeddings: config.json says true, but the files hold a head that differs from the embedding; "
            "both are used, and an export says false",
            flush=True,
        )


def untie(config: PreTrainedConfig) -> bool:
    """Set `tie_word_embeddings` to false, also in the part for text. Return whether it was true anywhere."""
    tied = [part for part in (config, config.get_text_config()) if getattr(part, "tie_word_embeddings", False)]
    for part in tied:
        part.tie_word_embeddings = False
    return bool(tied)


def _with_old_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the old names added, also in the configs of parts, such as `text_config`."""
    parts = {key: _with_old_names(value) if isinstance(value, dict) else value for key, value in settings.items()}
    rope, family = settings.get("rope_parameters"), settings.get("model_type")
    if not isinstance(rope, dict):
        return parts
    # Gemma 3 has one set of values for each kind of layer.
    main, local = rope.get("full_attention", rope), rope.get("sliding_attention")
    if not isinstance(main, dict) or "rope_theta" not in main:
        return parts
    names = OTHER_NAMES.get(str(family), {})
    old = {names.get(key, key): main[key] for key in OWN_KEYS if main.get(key) is not None}
    scaling = {key: value for key, value in main.items() if key not in (*OWN_KEYS, "type")}
    if scaling.get("rope_type") == "longrope":
        # The names that Phi-3 and its kin have in transformers 4. Phi-3 accepts exactly these three keys.
        kept = {"short_factor", "long_factor"} if family == "phi3" else scaling.keys() - {"rope_type"}
        scaling = {"type": "longrope"} | {key: value for key, value in scaling.items() if key in kept}
    old["rope_scaling"] = scaling if scaling.get("rope_type") != "default" else None
    if isinstance(local, dict) and "rope_theta" in local:
        old["rope_local_base_freq"] = local["rope_theta"]
    return old | parts


def _rotary_settings(config: PreTrainedConfig, settings: dict[str, Any]) -> list[Any]:
    """Return all `rope_parameters` that transformers 5 reads from `settings`, also those of parts."""
    return _rope_parameters(type(config).from_dict(json.loads(json.dumps(settings))).to_dict())


def _rope_parameters(settings: Any) -> list[Any]:
    if not isinstance(settings, dict):
        return []
    # `type` is an older name of `rope_type`, which is always there.
    own = (
        [{k: v for k, v in settings["rope_parameters"].items() if k != "type"}]
        if settings.get("rope_parameters")
        else []
    )
    return own + [value for part in settings.values() for value in _rope_parameters(part)]
