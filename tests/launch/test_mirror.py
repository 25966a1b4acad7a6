"""A mirror of the hub (HF_ENDPOINT) and no network at all: a model, a config and a dataset, from a server of our own."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from accel_llm.demo.skills import demo_documents

pytestmark = pytest.mark.long
COMMIT = "c" * 40
LAUNCH = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", "accelerate_configs/cpu.yaml"]


class Mirror:
    """Repositories by their place, `owner/model` or `datasets/owner/rows`, each with its files."""

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        self.repositories = repositories
        self.asked: list[str] = []
        self.surprises: list[str] = []

    def answer(self, command: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and content of the answer to a request."""
        self.asked.append(f"{command} {path}")
        if path == "/":
            return 200, {}, b""
        if file := re.fullmatch(r"/((?:datasets/)?[\w-]+/[\w-]+)/resolve/(?:main|c{40})/(.+)", path):
            return self.file(file[1], file[2])
        found = re.fullmatch(r"/api/(?:models|(datasets))/([\w-]+/[\w-]+)(/.*)?", path)
        place = f"datasets/{found[2]}" if found and found[1] else found[2] if found else ""
        if place not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        rest = (found[3] if found else None) or "/revision/main"
        files = self.repositories[place]
        if re.fullmatch(r"/revision/(main|c{40})", rest):
            siblings = [{"rfilename": name} for name in files]
            return self.json({"id": place.removeprefix("datasets/"), "sha": COMMIT, "siblings": siblings, "tags": []})
        entries = [{"type": "file", "path": n, "size": len(c), "oid": self.digest(c)} for n, c in files.items()]
        if re.fullmatch(r"/tree/(main|c{40})(/.*)?", rest):
            return self.json(entries)
        if re.fullmatch(r"/paths-info/(main|c{40})", rest):
            asked = json.loads(body)["paths"] if body.startswith(b"{") else re.findall(r"paths=([^&]+)", body.decode())
            return self.json([entry for entry in entries if entry["path"] in asked])
        return 404, {"X-Error-Code": "EntryNotFound"}, b"{}"

    def file(self, place: str, name: str) -> tuple[int, dict[str, str], bytes]:
        if name not in self.repositories.get(place, {}):
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        content = self.repositories[place][name]
        return 200, {"ETag": f'"{self.digest(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, content

    @staticmethod
    def digest(content: bytes) -> str:
        return hashlib.sha1(content, usedforsecurity=False).hexdigest()

    @staticmethod
    def json(value: Any) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@pytest.fixture
def mirror() -> Iterator[tuple[Mirror, str, Any]]:
    """A running mirror, its address, and a function that ends it."""
    model = {path.name: path.read_bytes() for path in (ROOT / "accel_llm" / "demo_base").iterdir()}
    lines = [json.dumps({"text": text}) for text in demo_documents(0, 40)]
    shape = {name: model[name] for name in ("config.json", "tokenizer.json", "tokenizer_config.json")}
    state = Mirror(
        {"team/base": model, "team/shape": shape, "datasets/team/texts": {"train.jsonl": "\n".join(lines).encode()}}
    )

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, content = state.answer(self.command, self.path.partition("?")[0], body)
            if (span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))) and status == 200:
                start, stop = int(span[1]), int(span[2] or len(content) - 1)
                headers["Content-Range"] = f"bytes {start}-{stop}/{len(content)}"
                status, content = 206, content[start : stop + 1]
            self.send_response(status)
            for name, text in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(name, text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_HEAD = do_GET = do_POST = reply

        def log_message(self, *arguments: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ended: list[bool] = []

        def end() -> None:
            if not ended:
                ended.append(True)
                server.shutdown()
                server.server_close()

        yield state, f"http://127.0.0.1:{server.server_port}", end
        end()


def pretrain(home: Path, output: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Start pretrain.py as a person would, with a cache of its own; any address but this machine's is unreachable."""
    dead = {name: "http://127.0.0.1:9" for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")}
    own = {"HF_HOME": str(home), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    more = ["--train_files", "team/texts", "--max_length", "128", "--max_steps", "1", "--preflight", "false"]
    command = [*LAUNCH, "launch/pretrain.py", *words, *more, "--output_dir", str(output)]
    return subprocess.run(
        command, cwd=ROOT, env=kept | dead | own | environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_mirror_serves_model_config_and_rows_and_afterwards_no_network_is_needed(mirror, tmp_path):
    state, address, end = mirror
    fresh = [
        "--config_name",
        "team/shape",
        "--tokenizer_name",
        "team/base",
        "--config_overrides",
        "num_hidden_layers=1",
    ]
    runs = {"weights": ["--model_name_or_path", "team/base"], "fresh": fresh}
    for name, words in runs.items():
        process = pretrain(tmp_path / "home", tmp_path / name, *words, HF_ENDPOINT=address)
        assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    places = {request.partition(" ")[2].removeprefix("/") for request in state.asked}
    assert any(place.startswith("team/base/resolve/") and place.endswith("model.safetensors") for place in places)
    assert any(place.startswith("team/shape/resolve/") and place.endswith("config.json") for place in places)
    assert any(place.startswith("datasets/team/texts/resolve/") for place in places)

    # The same without any network: what is in the cache is enough, and gives the same numbers.
    end()
    asked = len(state.asked)
    for name, words in runs.items():
        process = pretrain(tmp_path / "home", tmp_path / f"{name}-offline", *words, HF_HUB_OFFLINE="1")
        assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
        first, second = (
            json.loads((tmp_path / f / "metrics.jsonl").read_text().splitlines()[0]) for f in (name, f"{name}-offline")
        )
        assert first["loss"] == second["loss"] and first["grad_norm"] == second["grad_norm"]
    assert len(state.asked) == asked

    # What is not in the cache is an error that says so.
    process = pretrain(tmp_path / "empty", tmp_path / "none", *runs["weights"], HF_HUB_OFFLINE="1")
    assert process.returncode != 0
    assert "model_name_or_path: team/base is not a folder and not in the cache of the hub" in process.stderr
