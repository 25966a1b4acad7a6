"""What a script reads of a launch YAML without a launch is what `accelerate launch` tells it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from accel_llm.backend.launch_yaml import as_launched
from accel_llm.backend.strategy import engine, strategy
from accel_llm.backend.zero import deepspeed_settings
from accel_llm.errors import ConfigError
from accel_llm.system.launcher import launcher_flag, world_size

YAMLS = sorted(path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml"))
EXPECTED = {
    "cpu": "single", "single_gpu": "single", "ddp": "ddp", "fsdp2": "fsdp2", "zero1": "zero1", "zero2": "zero2",
    "zero3": "zero3", "zero3_offload": "zero3",
}  # fmt: skip
REPORT = """
import json
from accel_llm.backend.strategy import engine, strategy
from accel_llm.backend.zero import deepspeed_settings
from accel_llm.system.launcher import launcher_flag, process_rank, world_size
zero = deepspeed_settings()["zero_optimization"] if engine() == "deepspeed" else {}
facts = [strategy(), engine(), world_size(), launcher_flag("FSDP_OFFLOAD_PARAMS"), zero]
if process_rank() == 0:
    print("FACTS " + json.dumps(facts), flush=True)
"""


def facts_here() -> list:
    zero = deepspeed_settings()["zero_optimization"] if engine() == "deepspeed" else {}
    return [strategy(), engine(), world_size(), launcher_flag("FSDP_OFFLOAD_PARAMS"), zero]


@pytest.mark.parametrize("name", YAMLS)
def test_a_yaml_says_its_strategy_and_leaves_no_trace(name, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # of an outer launch
    before = dict(os.environ)
    with as_launched(ROOT / "accelerate_configs" / f"{name}.yaml", 2):
        assert (strategy(), world_size()) == (EXPECTED[name], 1 if EXPECTED[name] == "single" else 2)
    assert dict(os.environ) == before


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in YAMLS if EXPECTED[name] != "single"])
def test_it_is_what_the_launcher_says(name, tmp_path):
    path = ROOT / "accelerate_configs" / f"{name}.yaml"
    script = tmp_path / "report.py"
    script.write_text(REPORT, encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path), "--num_processes", "2"]
    command += ["--main_process_port", "0", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=300)
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("FACTS ")]
    with as_launched(path, 2):
        assert facts_here() == json.loads(line.removeprefix("FACTS "))


def test_settings_in_the_yaml_itself_count(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("distributed_type: FSDP\nfsdp_config:\n  fsdp_version: 2\n  fsdp_offload_params: true\n")
    with as_launched(path, 4):
        assert facts_here() == ["fsdp2", "fsdp", 4, True, {}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "cannot be read: No such file"), ("a: [", "it is not YAML"), ("3", "holds no settings")],
)
def test_a_yaml_that_cannot_be_read_is_named(content, reason, tmp_path):
    path = Path(tmp_path / "x.yaml")
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=f"config_file: {path} .*{reason}"), as_launched(path, 2):
        pass
