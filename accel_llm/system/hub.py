"""Names that may be ids on the model hub: which ones probably mean a local folder, and whether the hub answers at all."""

import sys
from functools import cache
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, get_session, validate_repo_id

from accel_llm.system.launcher import process_rank
from accel_llm.system.places import close_path, missing_reason

HUB_TIMEOUT = 10  # seconds
# A repository is in the cache if one of these files is.
_MARKS = ("config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")


def is_hub_id(name: str) -> bool:
    """Tell whether `name` has the form of a hub id: `owner/name`, or the `name` of an old model."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def absence_reason(name: str, revision: str = "main") -> str:
    """Say why `name` is neither a local file or folder nor a model on the hub, as the end of a sentence.

    Empty if it is a file or folder, or if the hub, or its cache if the hub does not answer, may have it. A misspelt path
    is found before the hub is asked.
    """
    if not (reason := missing_reason(name)):
        return ""
    if not is_hub_id(name):
        return reason
    is_cached = any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in _MARKS)
    if not is_cached and (local := misspelt_path(name)):
        return local
    failure = ask_hub()
    if failure and not is_cached:
        return f"is not a folder and not in the cache of the hub, and the hub cannot be reached ({failure})"
    return ""


def misspelt_path(name: str) -> str:
    """Say that a missing `name` looks like a path, although it has the form of a hub id; empty if it does not.

    It looks like one if it misspells a path, is a link that leads nowhere, or begins with the name of a folder.
    """
    meant, owner = close_path(Path(name)), Path(name).parts[0]
    if Path(name).is_symlink() or (meant and ("/" in name or meant.is_dir())):
        return missing_reason(name)
    if "/" in name and Path(owner).is_dir():
        return f"does not exist in the folder {owner} (to take this name from the hub, start in another folder)"
    return ""


@cache
def ask_hub() -> str:
    """Ask the hub once whether it answers. If it does not, let the libraries use their cache alone.

    Returns the reason for which it did not answer. Without this, huggingface_hub 2.4 repeats each request five times:
    a start without a network takes two minutes.
    """
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT)
    except Exception as error:  # of httpx, ssl or a proxy
        constants.HF_HUB_OFFLINE = True
        reason = str(error) or type(error).__name__
        if process_rank() == 0:
            print(f"The hub cannot be reached ({reason}); only its cache is used.", file=sys.stderr)
        return reason
    return ""
