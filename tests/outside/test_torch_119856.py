"""torch 119856 (also 68258): torchrun kills its processes 30 s after a signal, although a step and its save take longer.

Since torch 2.13 the seconds can be set in the environment of the launcher. The name that we tell must be the one that
torch reads.
"""

import pytest
from torch.distributed.launcher.api import LaunchConfig

from accel_llm.system import signals


@pytest.mark.parametrize("seconds", ["30", "600"])
def test_the_seconds_that_we_tell_are_those_that_torchrun_waits(monkeypatch, capsys, seconds: str) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    if seconds != "30":
        monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", seconds)
    signals._announce_stop(signals.signal.SIGTERM)
    told = capsys.readouterr().err
    assert LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=1).shutdown_timeout == int(seconds)
    assert told.startswith("\nSIGTERM: the run saves at the end of this step and stops; `kill ")
    assert told.endswith(
        f"; the launcher waits {seconds} s for it (TORCH_ELASTIC_SHUTDOWN_TIMEOUT in its environment)\n"
    )
