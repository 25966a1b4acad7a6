"""torchtune 481: the same command started twice, perhaps for another device, overwrites the checkpoints of the first.

Whatever the second start may be, no byte in the folder of the first may change while that one lives.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from accel_llm.errors import ConfigError

FIRST_RUN = """
import sys
from pathlib import Path
from accel_llm.system.run_lock import lock_output_dir
lock_output_dir(Path(sys.argv[1]))
print("alive", flush=True)
sys.stdin.read()
"""


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
def test_a_second_start_is_refused_and_touches_nothing(script, tiny, chats, tmp_path) -> None:
    output = tmp_path / "output"
    command = [
        *("sft", "--model_name_or_path", tiny, "--train_files", chats, "--max_length", 128, "--max_steps", 2),
        *("--save_steps", 1, "--output_dir", output),
    ]
    script(*command, "--max_steps", 1)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", FIRST_RUN, str(output)], **pipes) as first:
        assert first.stdout.readline() == "alive\n"
        before = contents(output)
        for more in ([], ["--overwrite_output_dir"], ["--resume_from_checkpoint", "none"]):
            with pytest.raises(ConfigError, match=f"output_dir: {output} is in use by process {first.pid} on"):
                script(*command, *more)
        assert contents(output) == before
        script(*command, "--overwrite_output_dir", "--dry_run")  # writes nothing there
        assert contents(output) == before
    script(*command, "--overwrite_output_dir")
    assert contents(output) != before and not (output / ".run.lock").exists()
