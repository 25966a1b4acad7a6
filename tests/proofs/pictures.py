"""Take the pictures of README.md: show_data and a run on a terminal, and the page of that run.

python tests/proofs/pictures.py     # writes .github/pictures; needs tmux and Chromium
"""

import base64
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / ".github" / "pictures"
RUN = "accelerate launch --config_file accelerate_configs/zero2.yaml launch/sft.py"
# The command, the words on its screen that are waited for, and the name of the picture.
SCREENS = (
    ("python launch/show_data.py --config launch/recipes/demo.yaml --cache_dir cache --rows 3", "└──", "show_data.svg"),
    (RUN, "step 120/", "run.svg"),
)
WIDTH, HEIGHT = 110, 50
SECONDS = 400  # that a command may take


def tmux(*words: str) -> str:
    return subprocess.run(["tmux", "-L", "pictures", *words], check=True, capture_output=True, text=True).stdout


def capture(folder: Path, command: str, awaited: str, picture: Path) -> None:
    """Run a command in `folder` on a terminal until `awaited` is on its screen, and write what is there as a picture."""
    size = ("-x", str(WIDTH), "-y", str(HEIGHT))
    shell = f"PYTHONPATH={ROOT} OMP_NUM_THREADS=1 {command}; sleep {SECONDS}"
    tmux("new-session", "-d", *size, "-c", str(folder), shell)
    end = time.monotonic() + SECONDS
    while awaited not in (screen := tmux("capture-pane", "-e", "-p")):
        assert time.monotonic() < end, screen
        time.sleep(0.1)
    tmux("kill-server")
    for place, short in ((f"{ROOT}/", ""), (str(Path.home()), "~")):  # whose machine it is tells nothing
        screen = screen.replace(place, short)
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    console.print(Text.from_ansi(screen.strip("\n")))
    console.save_svg(str(picture), title=command)


def take_page(report: Path, picture: Path, profile: Path) -> None:
    """Write what a window of a browser shows of the page."""
    sys.path.insert(0, str(ROOT / "tests"))
    from browser import Browser

    browser = Browser(profile)
    browser.open(report, width=1000)
    picture.write_bytes(base64.b64decode(browser.call("Page.captureScreenshot", format="png")["data"]))
    browser.close()


def main() -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)  # so that no picture names a folder of this machine
        for name in ("launch", "accelerate_configs"):
            shutil.copytree(ROOT / name, work / name)
        for command, awaited, name in SCREENS:
            capture(work, command, awaited, PICTURES / name)
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        words = [*RUN.split(), "--overwrite_output_dir"]
        subprocess.run(words, cwd=work, env=environment, check=True, capture_output=True)
        take_page(work / "output" / "demo" / "report.html", PICTURES / "report.png", work / "profile")


if __name__ == "__main__":
    main()
