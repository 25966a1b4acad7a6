"""Names that may be ids on the hub: a misspelt path is found before the hub is asked, and the hub is asked once."""

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from accel_llm.system import hub
from accel_llm.system.hub import absence_reason, ask_hub, is_hub_id


@pytest.fixture(autouse=True)
def own_hub(monkeypatch, tmp_path) -> Iterator[None]:
    """A working folder and a cache of our own, and nothing remembered about the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    ask_hub.cache_clear()
    yield
    ask_hub.cache_clear()


@pytest.fixture
def unasked(monkeypatch) -> None:
    """The hub must not be asked."""

    def ask() -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "ask_hub", ask)


@pytest.fixture
def unreachable(monkeypatch) -> None:
    monkeypatch.setattr(hub, "ask_hub", lambda: "no network")


def put_into_cache(folder: Path, name: str) -> None:
    repository = folder / "cache" / f"models--{name.replace('/', '--')}"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "snapshots" / "abc" / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")


def test_the_form_of_a_hub_id():
    assert all(map(is_hub_id, ("owner/name", "gpt2", "Qwen/Qwen3-0.6B", "owner/name_1.x")))
    assert not any(map(is_hub_id, ("a/b/c", "./a", "/a", "~/a", "a b", "a/", "-a", "[x]", "owner/na#me", "", "a" * 97)))


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("output/model", ""),
        ("output/modle", "does not exist, but output/model does"),
        ("ouput/model", "does not exist, but output/model does"),
        ("ouput", "does not exist, but output does"),
        (
            "output/lora",
            "does not exist in the folder output (to take this name from the hub, start in another folder)",
        ),
        ("output/link", "is a symbolic link to gone, which does not exist"),
        ("./owner/name", "does not exist"),
        ("a/b/c", "does not exist"),
        ("owner name", "does not exist"),
    ],
)
def test_a_misspelt_path_is_found_before_the_hub_is_asked(tmp_path, typed, reason):
    (tmp_path / "output" / "model").mkdir(parents=True)
    (tmp_path / "output" / "link").symlink_to("gone")
    assert absence_reason(typed) == reason


@pytest.mark.usefixtures("unreachable")
def test_without_a_network_a_hub_id_must_be_in_the_cache(tmp_path):
    (tmp_path / "owner").mkdir()
    (tmp_path / "gpt-2").mkdir()
    put_into_cache(tmp_path, "owner/name")
    put_into_cache(tmp_path, "gpt2")
    assert absence_reason("owner/name") == absence_reason("gpt2") == ""  # in the cache, so it is no misspelt path
    assert absence_reason("other/name") == (
        "is not a folder and not in the cache of the hub, and the hub cannot be reached (no network)"
    )
    assert absence_reason("owner/name", "other-revision") == (
        "does not exist in the folder owner (to take this name from the hub, start in another folder)"
    )


def test_a_hub_that_answers_is_asked_once(monkeypatch):
    requests = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            requests.append(self.path)
            self.send_response(404)
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert absence_reason("owner/name") == absence_reason("owner/other") == ask_hub() == ""
        server.shutdown()
    assert len(requests) == 1 and not constants.HF_HUB_OFFLINE


def test_a_hub_that_does_not_answer_is_asked_once_and_then_left_alone(monkeypatch, capsys):
    """huggingface_hub would try each file six times, 23 seconds in all."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    # The port is closed now.
    sentence = absence_reason("owner/name")
    assert sentence.startswith("is not a folder and not in the cache of the hub, and the hub cannot be reached (")
    assert constants.is_offline_mode() and absence_reason("owner/name") == sentence
    assert capsys.readouterr().err.count("The hub cannot be reached (") == 1


def test_offline_mode_is_respected(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert absence_reason("owner/name").endswith("the hub cannot be reached (HF_HUB_OFFLINE is set)")
