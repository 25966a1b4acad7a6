"""Uploads to the model hub. What would fail is found before the work, and files arrive in one commit or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from accel_llm.system.hub import ask_hub, is_hub_id

# Files that a new repository has, or that its owner gives it on the website.
FILES_OF_A_NEW_REPOSITORY = {".gitattributes", "README.md", "LICENSE"}
TOKEN_REMEDY = "run `hf auth login`, or set the environment variable HF_TOKEN"


def upload_problems(name: str, private: bool, create: bool = True) -> list[str]:
    """Find out whether files can be uploaded to the repository `name`; return why not, as one sentence or none.

    With `create` the repository is created, because only this shows that the login may do so. One that exists must hold
    no model yet, and must be private if `private`: the hub does not change that of an existing one.
    """
    problem = _name_problem(name)
    if not problem and (reason := ask_hub()):
        problem = f"nothing can be uploaded to {name}, because the hub cannot be reached ({reason}); leave push_to_hub "
        problem += "out, and upload the export later with launch/push.py"
    if not problem:
        try:
            problem = _login_problem(name) or _repository_problem(name, private, create)
        except Exception as error:  # of the hub, or of the HTTP client of its library
            problem = f"{name} cannot be used as a repository on the hub ({describe_answer(error)}); name another one"
    return [f"hub_model_id: {problem}."] if problem else []


def upload_files(files: Mapping[str, Path | bytes], name: str, private: bool) -> str:
    """Upload files, by their paths in the repository `name`, in one commit; return the address of the repository.

    Raises:
        Exception: of the hub, of its library or of the disk; the repository is as it was.
    """
    api = HfApi()
    address = api.create_repo(name, private=private, exist_ok=True)
    additions = [CommitOperationAdd(place, content) for place, content in files.items()]
    api.create_commit(name, additions, commit_message="Upload the export of accel-llm")
    return str(address)


def describe_answer(error: BaseException) -> str:
    """Return why the hub refused something, in its own words, or the message of any other error; one line."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    words = cause.server_message if isinstance(cause, HfHubHTTPError) else None
    status = f"{cause.response.status_code}: " if words and isinstance(cause, HfHubHTTPError) else ""
    return (status + " ".join((words or str(cause) or type(cause).__name__).split()))[:300]


def _name_problem(name: str) -> str:
    if "/" not in name:
        owner = "" if not is_hub_id(name) else f", such as me/{name}"
        return f"{name!r} has no owner; give owner/name{owner}"
    return "" if is_hub_id(name) else f"{name!r} is not the name of a repository; give owner/name"


def _login_problem(name: str) -> str:
    """Say what is wrong with the login: there is none, its token may not write, or the owner is somebody else."""
    if get_token() is None:
        return f"nothing can be uploaded to {name} without a login; {TOKEN_REMEDY} to a token that may write"
    try:
        login: dict[str, Any] = HfApi().whoami()
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            return f"nothing can be uploaded to {name}, because the hub does not know the token; {TOKEN_REMEDY}"
        raise
    if login.get("auth", {}).get("accessToken", {}).get("role") == "read":
        place = f"{constants.ENDPOINT}/settings/tokens"
        return f"nothing can be uploaded to {name} with a token that may only read; make one that may write at {place}"
    owners = [login["name"], *(group["name"] for group in login.get("orgs", []))]
    if name.partition("/")[0].lower() not in [owner.lower() for owner in owners]:
        return f"{name} does not belong to the login; the owner can be {' or '.join(owners)}"
    return ""


def _repository_problem(name: str, private: bool, create: bool) -> str:
    """Say why an existing repository cannot be used; one that does not exist is created if `create`."""
    api = HfApi()
    try:
        info = api.model_info(name)
    except RepositoryNotFoundError:
        if create:
            api.create_repo(name, private=private)
        return ""
    if private and not info.private:
        return f"{name} is there and public; name another one, or set hub_private_repo: false"
    if files := sorted({file.rfilename for file in info.siblings or []} - FILES_OF_A_NEW_REPOSITORY):
        shown = ", ".join(files[:3]) + ", ..." * (len(files) > 3)
        return f"{name} holds files already ({shown}); name another one, or delete it on the hub"
    api.auth_check(name, write=True)
    return ""
