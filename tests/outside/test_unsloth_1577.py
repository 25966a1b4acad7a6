"""Without a network a model that is in the cache took a long time to load: the hub was asked for each file, again and
again.

The right result is the config that plain Transformers reads from the same folder, with a single question to the hub.
"""

import http.server
import shutil

import huggingface_hub.utils._http as requests_of_hub
import pytest
from huggingface_hub import constants
from transformers import AutoConfig

from accel_llm.config.options import TrainOptions
from accel_llm.model.loading import load_model_config
from accel_llm.model.model_names import model_problems
from accel_llm.system.hub import ask_hub


@pytest.mark.parametrize("is_cached", [True, False])
def test_a_cached_model_needs_no_network(tiny, tmp_path, monkeypatch, is_cached):
    if is_cached:
        repository = tmp_path / "cache" / "models--owner--name"
        shutil.copytree(tiny, repository / "snapshots" / "abc")
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # The port of a server that has ended: nobody answers.
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def repeat(*arguments: object, **more: object) -> None:
        raise AssertionError("a request was repeated")

    monkeypatch.setattr(requests_of_hub, "http_backoff", repeat)
    ask_hub.cache_clear()
    options = TrainOptions(model_name_or_path="owner/name")
    try:
        if is_cached:
            assert model_problems(options) == []
            expected = AutoConfig.from_pretrained(tiny).to_dict()
            assert {**load_model_config(options).to_dict(), "_name_or_path": ""} == {**expected, "_name_or_path": ""}
        else:
            (sentence,) = model_problems(options)
            assert sentence.startswith(
                "model_name_or_path: owner/name is not a folder and not in the cache of the hub, and the hub cannot be "
                "reached ("
            )
    finally:
        ask_hub.cache_clear()
