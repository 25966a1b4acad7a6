"""Uploading an export: what arrives at a hub, what is refused before any work, and what is left after a failure.

The hub is a server in this process that speaks the protocol of huggingface_hub, without Xet.
"""

import base64
import hashlib
import http.server
import json
import re
import shlex
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from accel_llm.config.command_line import parse_options
from accel_llm.config.options import SftOptions
from accel_llm.config.tool_options import MergeOptions
from accel_llm.errors import ConfigError
from accel_llm.report.sharing import find_export, shared_files
from accel_llm.system.hub import ask_hub
from accel_llm.system.upload import upload_problems

TOKEN, SECRET = "hf_tokenOfAda123", "hunter2-of-a-setting"
LOGIN = {"name": "ada", "orgs": [{"name": "lovelace"}], "auth": {"accessToken": {"role": "write"}}}


class Hub:
    """The state of the server: its repositories, who is logged in, what was asked, and the request that fails."""

    def __init__(self) -> None:
        self.address, self.login = "", LOGIN
        self.repositories: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.requests: list[str] = []
        self.failing = ""  # a part of the path of the request that fails
        self.readable_only: set[str] = set()
        self.surprises: list[str] = []  # requests that nobody should send

    def add(self, name: str, private: bool, files: dict[str, bytes]) -> None:
        self.repositories[name] = {"private": private, "files": {".gitattributes": b""} | files}

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        """Return status, JSON and headers."""
        self.requests.append(f"{method} {path}")
        if self.failing and self.failing in path:
            return 403, {"error": "the quota of the storage is used up"}, {}
        if path == "/api/whoami-v2":
            return (200, self.login, {}) if token == f"Bearer {TOKEN}" else (401, {"error": "Invalid token"}, {})
        if path.startswith("/lfs/"):  # an address that was handed out; it asks for no token
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            self.blobs[path.removeprefix("/lfs/")] = body
            return 200, {}, {}
        # A list of programs, which huggingface_hub fetches once a day to name itself.
        if token != f"Bearer {TOKEN}" and method != "HEAD" and path != "/api/agent-harnesses":
            self.surprises.append(f"{method} {path} without the token")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            header = json.loads(body)["content"].split("---")[1]
            return 200, {"errors": [] if yaml.safe_load(header) else [{"message": "empty"}], "warnings": []}, {}
        return self._of_repository(path, body)

    def _create(self, wish: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        name = f"{wish['organization']}/{wish['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.address}/{name}"}, {}
        if wish["organization"] not in ("ada", "lovelace"):
            return 403, {"error": "You don't have the rights to create a model under this namespace"}, {}
        self.add(name, wish.get("visibility") == "private" or wish.get("private") is True, {})
        return 200, {"url": f"{self.address}/{name}"}, {}

    def _of_repository(self, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        found = re.fullmatch(r"/(?:api/models/)?([\w-]+/[\w.-]+?)(\.git/.*|/.*)?", path)
        if not found or found[1] not in self.repositories:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        name, rest = found[1], found[2] or ""
        repository = self.repositories[name]
        files: dict[str, bytes] = repository["files"]
        if not rest:
            siblings = [{"rfilename": file} for file in files]
            return 200, {"id": name, "private": repository["private"], "siblings": siblings, "tags": []}, {}
        if rest == "/auth-check/write":
            return (
                (403, {"error": "You may only read this repository"}, {})
                if name in self.readable_only
                else (200, {}, {})
            )
        if rest == "/preupload/main":
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = {True: "lfs", False: "regular"}
            said = [{"path": p, "uploadMode": modes[p.endswith(".safetensors")], "shouldIgnore": False} for p in asked]
            return 200, {"files": said}, {}
        if rest == ".git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            for entry in objects:
                entry["actions"] = {"upload": {"href": f"{self.address}/lfs/{entry['oid']}"}}
            return 200, {"objects": objects}, {}
        assert rest == "/commit/main"
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
        address = f"{self.address}/{name}/commit/{'a' * 40}"
        return 200, {"success": True, "commitUrl": address, "commitOid": "a" * 40}, {}


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[Hub]:
    state = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(iter(self.read_chunk, b""))
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            status, value, headers = state.answer(self.command, path, self.headers.get("Authorization", ""), body)
            content = json.dumps(value).encode()
            self.send_response(status)
            for name, text in (
                {"Content-Type": "application/json", "Content-Length": str(len(content))} | headers
            ).items():
                self.send_header(name, text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def read_chunk(self) -> bytes:
            chunk = self.rfile.read(int(self.rfile.readline(), 16))
            self.rfile.readline()
            return chunk

        do_HEAD = do_GET = do_POST = do_PUT = reply

        def log_message(self, *arguments: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        state.address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", state.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("MY_API_KEY", SECRET)
        ask_hub.cache_clear()
        yield state
        assert state.surprises == []
        close_session()
        ask_hub.cache_clear()
        server.shutdown()


@pytest.fixture
def train(script, tiny, chats, tmp_path, monkeypatch) -> Callable[..., Path]:
    """Run sft.py for two steps, with a secret in a setting; return the folder of the run."""

    def run(*more: object) -> Path:
        monkeypatch.chdir(tmp_path)
        words = ("--model_name_or_path", tiny, "--train_files", chats, "--max_length", 128, "--output_dir", "run")
        words += ("--max_steps", 2, "--chat_template_kwargs", f"key={SECRET}", "--run_name", SECRET)
        script("sft", *words, *more)
        return tmp_path / "run"

    return run


def files_on_disk(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_gitattributes(hub: Hub, name: str) -> dict[str, bytes]:
    return {place: content for place, content in hub.repositories[name]["files"].items() if place != ".gitattributes"}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_export_arrives_and_nothing_else(hub, train, tiny, tmp_path, capsys, method):
    run = train("--method", method, "--push_to_hub", "--hub_model_id", "ada/mine")
    folder = run / ("adapter" if method == "lora" else "model")
    arrived, written = without_gitattributes(hub, "ada/mine"), files_on_disk(folder)
    assert hub.repositories.keys() == {"ada/mine"} and hub.repositories["ada/mine"]["private"]
    assert arrived.keys() == written.keys() and {"README.md", "tokenizer.json"} <= arrived.keys()

    # What names a place here is the only difference.
    changed = {name for name in arrived if arrived[name] != written[name]}
    assert changed == ({"README.md", "adapter_config.json"} if method == "lora" else {"README.md"})
    if method == "lora":
        config = json.loads(written["adapter_config.json"])
        assert json.loads(arrived["adapter_config.json"]) == config | {"base_model_name_or_path": tiny.name}
    card = arrived["README.md"].decode()
    assert "# ada/mine\n" in card and 'from_pretrained("ada/mine"' in card
    assert "python launch/chat.py --model mine\n" in card or method == "full"
    everything = b"".join(arrived.values()) + b"".join(map(str.encode, arrived))
    for private in (TOKEN, SECRET, str(tmp_path), str(tiny), str(tiny.parent.name)):
        assert private.encode() not in everything

    # The run says where it is, and keeps no secret either.
    text = (run / "run.json").read_text(encoding="utf-8")
    assert json.loads(text)["uploaded"] == f"{hub.address}/ada/mine" and TOKEN not in text and SECRET not in text
    screen = capsys.readouterr().out
    assert f"/{folder.name} to {hub.address}/ada/mine (private)" in screen
    size = sum(map(len, arrived.values())) / 1e6
    assert f"uploading {len(arrived)} files ({size:,.1f} MB) of run/{folder.name} to ada/mine\n" in screen


def test_a_public_repository_is_made_only_if_asked(hub, train):
    train("--push_to_hub", "--hub_model_id", "lovelace/open", "--hub_private_repo", "false")
    assert hub.repositories["lovelace/open"]["private"] is False


@pytest.mark.parametrize("stop", ["--dry_run", "--check_only"])
def test_a_run_that_exports_nothing_makes_no_repository(hub, train, stop):
    train(stop, "--push_to_hub", "--hub_model_id", "ada/mine")
    assert hub.repositories == {} and "GET /api/whoami-v2" in hub.requests


def test_without_the_option_nothing_is_connected(train, monkeypatch):
    def connect(*arguments: object) -> None:
        raise AssertionError(f"a connection to {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert find_export(train()) is not None


def no_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")


def wrong_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_another1234")


def reading_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.login = LOGIN | {"auth": {"accessToken": {"role": "read"}}}


def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def gone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")


def public(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("ada/mine", False, {})


def full(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("ada/mine", True, {"README.md": b"", "model.safetensors": b"", "config.json": b""})


def read_only(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("ada/mine", True, {})
    hub.readable_only.add("ada/mine")


def forbidden(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.failing = "/api/repos/create"


REMEDY = "run `hf auth login`, or set the environment variable HF_TOKEN"
LATER = "leave push_to_hub out, and upload the export later with launch/push.py."


@pytest.mark.parametrize(
    ("prepare", "name", "sentence"),
    [
        (
            no_token,
            "ada/mine",
            rf"nothing can be uploaded to ada/mine without a login; {REMEDY} to a token that may write\.",
        ),
        (wrong_token, "ada/mine", rf"nothing .* to ada/mine, because the hub does not know the token; {REMEDY}\."),
        (
            reading_token,
            "ada/mine",
            r"nothing .* with a token that may only read; make one .* at \S+/settings/tokens\.",
        ),
        (offline, "ada/mine", rf"nothing .* because the hub cannot be reached \(HF_HUB_OFFLINE is set\); {LATER}"),
        (gone, "ada/mine", rf"nothing can be uploaded .* because the hub cannot be reached \(.*\); {LATER}"),
        (public, "ada/mine", r"ada/mine is there and public; name another one, or set hub_private_repo: false\."),
        (
            full,
            "ada/mine",
            r"ada/mine holds files already \(config\.json, model\.safetensors\); name another one, or .*\.",
        ),
        (read_only, "ada/mine", r"ada/mine cannot be used .* \(403: You may only read this repository\); .*\."),
        (forbidden, "ada/mine", r"ada/mine cannot be used .* \(403: the quota of the storage is used up\); .*\."),
        (None, "bob/mine", r"bob/mine does not belong to the login; the owner can be ada or lovelace\."),
        (None, "mine", r"'mine' has no owner; give owner/name, such as me/mine\."),
        (None, "ada/my model", r"'ada/my model' is not the name of a repository; give owner/name\."),
    ],
)
def test_what_would_fail_at_the_end_is_one_sentence_at_the_start(hub, monkeypatch, capsys, prepare, name, sentence):
    if prepare:
        prepare(hub, monkeypatch)
    before = json.dumps({k: v["private"] for k, v in hub.repositories.items()})
    (problem,) = upload_problems(name, private=True)
    assert re.fullmatch(f"hub_model_id: {sentence}", problem)
    assert TOKEN not in problem and "\n" not in problem
    assert json.dumps({k: v["private"] for k, v in hub.repositories.items()}) == before


def test_a_new_repository_and_an_empty_one_of_the_website_can_be_used(hub):
    hub.add("ada/empty", True, {"README.md": b"license: mit"})
    assert upload_problems("ada/empty", private=True) == upload_problems("ada/new", private=True) == []
    assert hub.repositories["ada/new"]["private"]
    assert upload_problems("ADA/new", private=True, create=False) == []


def test_a_script_refuses_before_anything_is_trained_or_merged(hub, train, script, tmp_path):
    hub.login = LOGIN | {"auth": {"accessToken": {"role": "read"}}}
    with pytest.raises(ConfigError, match=r"^hub_model_id: .* may only read"):
        train("--push_to_hub", "--hub_model_id", "ada/mine")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"^hub_model_id: .* may only read"):
        script("merge", "--adapter", "x", "--output_dir", "merged", "--push_to_hub", "--hub_model_id", "ada/mine")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("failing", ["/lfs/", "/commit/"])
def test_an_upload_that_fails_in_the_middle_loses_nothing_and_names_the_command(hub, train, script, capsys, failing):
    hub.failing = failing
    with pytest.raises(ConfigError, match=r"^The run is done and its weights are complete, but something beside"):
        train("--push_to_hub", "--hub_model_id", "ada/mine")
    run = find_export(Path("run")).parent
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (problem,) = facts["problems"]
    assert facts["status"] == "done" and "(403: the quota of the storage is used up); try: python " in problem
    assert problem in capsys.readouterr().out and without_gitattributes(hub, "ada/mine") == {}
    before = files_on_disk(run / "adapter")

    hub.failing = ""
    _, path, *words = shlex.split(problem.partition("; try: ")[2])
    assert Path(path).name == "push.py"
    script("push", *words)
    assert without_gitattributes(hub, "ada/mine").keys() == before.keys() == files_on_disk(run / "adapter").keys()
    assert hub.repositories["ada/mine"]["private"] and "uploaded " in capsys.readouterr().out


def test_ctrl_c_gives_up_the_upload_and_not_the_run(hub, train, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("accel_llm.report.sharing.upload_files", stop)
    with pytest.raises(ConfigError, match=r"^The run is done"):
        train("--push_to_hub", "--hub_model_id", "ada/mine")
    facts = json.loads(Path("run/run.json").read_text(encoding="utf-8"))
    assert facts["status"] == "done" and "(KeyboardInterrupt); try: python " in facts["problems"][0]


def test_a_merged_model_is_uploaded(hub, train, script, tmp_path, capsys):
    run = train()
    words = ("--adapter", run, "--output_dir", tmp_path / "merged")
    script("merge", *words, "--push_to_hub", "--hub_model_id", "ada/merged")
    arrived = without_gitattributes(hub, "ada/merged")
    assert arrived.keys() == files_on_disk(tmp_path / "merged").keys() and "model.safetensors" in arrived
    assert str(tmp_path).encode() not in b"".join(arrived.values()) and hub.repositories["ada/merged"]["private"]
    assert f"uploaded {tmp_path / 'merged'} to {hub.address}/ada/merged (private)" in capsys.readouterr().out


def test_a_folder_without_a_model_is_refused_by_push(script, tmp_path):
    with pytest.raises(ConfigError, match=rf"^model: {tmp_path} holds no adapter and no model; name the output_dir"):
        script("push", "--model", tmp_path, "--hub_model_id", "ada/mine")


def test_hidden_files_stay_here(tmp_path):
    for place in ("config.json", "sub/tokenizer.model", ".cache/x", ".run.lock"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("{}")
    assert shared_files(tmp_path, "ada/x").keys() == {"config.json", "sub/tokenizer.model"}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--push_to_hub", "push_to_hub: it needs the name of a repository; set hub_model_id too, as owner/name."),
        (
            "--hub_model_id a/b",
            "hub_model_id: nothing is uploaded without push_to_hub; set it too, or remove hub_model_id.",
        ),
        (
            "--push_to_hub a/b",
            "push_to_hub: 'a/b' is not a truth value; give push_to_hub without a value, and hub_model_id a/b.",
        ),
        ("--hub_token hf_secret12", f"hub_token: *** has no meaning here; {REMEDY.replace('run', 'log in with')}."),
    ],
)
def test_options_that_cannot_work_are_refused_and_a_token_is_never_shown(words, problem):
    for options in (SftOptions, MergeOptions):
        needed = ["--adapter", "x", "--output_dir", "y"] if options is MergeOptions else []
        with pytest.raises(ConfigError) as error:
            parse_options(options, [*needed, *words.split()])
        assert error.value.problems == [problem]


def test_recipes_of_transformers_are_read():
    options = parse_options(SftOptions, ["--hub_strategy", "end", "--push_to_hub", "--hub_model_id", "a/b"])
    assert options.push_to_hub and options.hub_private_repo
    with pytest.raises(
        ConfigError, match="hub_strategy: 'every_save' has no meaning here; push_to_hub uploads the export"
    ):
        parse_options(SftOptions, ["--hub_strategy", "every_save"])
