"""Sharing an export on the model hub: what of it is uploaded, and what remains to be done if that fails."""

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from huggingface_hub import hf_hub_download

from accel_llm.config.command_line import shell_command
from accel_llm.config.hub_options import HubOptions
from accel_llm.config.options import TrainOptions
from accel_llm.report.card import is_published, short_path
from accel_llm.report.record import Record
from accel_llm.system.launcher import process_rank
from accel_llm.system.upload import describe_answer, upload_files, upload_problems

# Keys of the configs of an export whose value may be the path of a folder on this machine.
PATH_KEYS = ("base_model_name_or_path", "tokenizer_name_or_path", "name_or_path", "_name_or_path")


def find_export(folder: Path) -> Path | None:
    """Return the export in the folder of a run, or `folder` itself if it holds a model or an adapter; else None."""
    for place in (folder, folder / "adapter", folder / "model"):
        if any((place / name).is_file() for name in ("adapter_config.json", "config.json")):
            return place
    return None


def shared_files(folder: Path, name: str) -> dict[str, Path | bytes]:
    """Return what is uploaded of an export to the repository `name`: the content of each file by its path there.

    Nothing else of the run is among it, and no path of this machine: a base that is a folder here is called by its last
    part, and the card calls the model by its name on the hub. Hidden files are left out.
    """
    files: dict[str, Path | bytes] = {}
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in place.parts):
            files[place.as_posix()] = path
    for place in [place for place in files if place.endswith("config.json")]:
        if (shared := _without_paths(folder / place)) is not None:
            files[place] = shared
    if "README.md" in files:
        files["README.md"] = _shared_card(folder, name).encode()
    return files


def _shared_card(folder: Path, name: str) -> str:
    """Return the card with the model's name on the hub; scripts that need the folder of an adapter download it first."""
    text = (folder / "README.md").read_text(encoding="utf-8").replace(short_path(folder), name)
    if not (folder / "adapter_config.json").is_file():
        return text
    copy = name.partition("/")[2]
    return re.sub(
        rf"^python launch/(chat|predict)\.py --model {re.escape(name)}",
        rf"hf download {name} --local-dir {copy}\npython launch/\1.py --model {copy}",
        text,
        flags=re.MULTILINE,
    )


def _without_paths(file: Path) -> bytes | None:
    """Return a config without paths of this machine, or None if it has none."""
    config: Any = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        return None
    paths = {key: config[key] for key in PATH_KEYS if isinstance(config.get(key), str)}
    local = {key: Path(path).name for key, path in paths.items() if path and not is_published(path)}
    return (json.dumps(config | local, indent=2, ensure_ascii=False) + "\n").encode() if local else None


def share_export(folder: Path, name: str, private: bool) -> str:
    """Say what is uploaded, and upload an export to the repository `name`; return the address.

    Raises:
        Exception: of the hub, of its library or of the disk; nothing was added to the repository.
    """
    files = shared_files(folder, name)
    sizes = [len(content) if isinstance(content, bytes) else content.stat().st_size for content in files.values()]
    print(f"uploading {len(files)} files ({sum(sizes) / 1e6:,.1f} MB) of {folder} to {name}", flush=True)
    return upload_files(files, name, private)


def sharing_problems(options: TrainOptions) -> list[str]:
    """Try out what push_to_hub needs; a run that will not end makes no repository. The main process does it for all.

    The card of a base on the hub is read into the cache: its licence goes into the card of the run.
    """
    if not (options.push_to_hub and options.hub_model_id) or process_rank():
        return []
    create = not (options.dry_run or options.check_only)
    problems = upload_problems(options.hub_model_id, options.hub_private_repo, create)
    base = options.model_name_or_path
    if not problems and base and is_published(base):
        with suppress(Exception):  # without it the licence is not known
            hf_hub_download(base, "README.md", revision=options.revision)
    return problems


def describe_failed_upload(folder: Path, name: str, private: bool, error: BaseException) -> str:
    """Say in one sentence that an export was not uploaded, why, and by which command it can be later."""
    visibility = {} if private else {"hub_private_repo": "false"}
    command = shell_command("push.py", model=folder, hub_model_id=name, **visibility)
    return f"push_to_hub: {folder} is complete, but not uploaded to {name} ({describe_answer(error)}); try: {command}"


def share_run(accelerator: Accelerator, options: HubOptions, record: Record) -> None:
    """Upload the export of a run that has ended, if it was asked for. Main process only.

    A failure is a problem of the run, which has lost nothing.
    """
    folder = find_export(record.path.parent)
    if not (options.push_to_hub and options.hub_model_id and folder and accelerator.is_main_process):
        return
    name, private = options.hub_model_id, options.hub_private_repo
    try:
        address = share_export(folder, name, private)
    except (Exception, KeyboardInterrupt) as error:  # whatever a library raises; Ctrl-C gives up the upload alone
        return record.add_problem(describe_failed_upload(folder.absolute(), name, private, error))
    record.update(uploaded=address)
    print(f"uploaded {folder} to {address}{' (private)' * private}", flush=True)
