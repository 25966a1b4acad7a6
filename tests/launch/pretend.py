"""Runs scripts of launch/ on Linux as on Windows or macOS: without what Python does not have there.

python tests/launch/pretend.py win32 launch/sft.py --max_steps 2 + launch/chat.py --model output

The libraries are imported first, because they are Linux' own here. Then attributes and modules are removed, and an audit
hook refuses what that system refuses: /proc, handles of folders, names with some characters, and, on Windows, to rename
or delete what this process still has open. PRETEND_STOP=3 sends SIGTERM to the process in step 3.
"""

import importlib
import os
import re
import runpy
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "datasets",
    "sklearn.metrics",
    "rich.live",
    "torch.optim.adamw",
)
# Signals that Windows has; Python has no others there.
WINDOWS_SIGNALS = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"}
LINUX_ALONE = {
    signal: ["SIGRTMIN", "SIGRTMAX", "sigtimedwait", "sigwaitinfo"],
    os: ["pidfd_open", "posix_fallocate", "posix_fadvise", "sched_getaffinity", "sched_setaffinity", "memfd_create"],
}
UNIX_ALONE = {
    signal: ["alarm", "setitimer", "getitimer", "pthread_sigmask", "pthread_kill", "sigwait", "sigpending"],
    os: [
        *("fork", "register_at_fork", "getpgid", "setsid", "killpg", "getuid", "geteuid", "uname", "pread", "pwrite"),
        *("statvfs", "fchmod", "chown", "mkfifo", "sysconf", "getloadavg", "O_DIRECTORY", "O_NOFOLLOW"),
    ],
    select: ["poll", "epoll"],
}
UNIX_MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty")
FORBIDDEN = re.compile(r'[<>:"|?*\\]|[ .]$')  # in the names of files on Windows


def remove(names: dict[Any, list[str]]) -> None:
    for module, attributes in names.items():
        for name in attributes:
            if hasattr(module, name):
                delattr(module, name)


def become(system: str) -> None:
    for library in LIBRARIES:
        importlib.import_module(library)
    warnings.filterwarnings("ignore", category=EncodingWarning)
    warnings.filterwarnings("error", category=EncodingWarning, module="accel_llm")
    remove(LINUX_ALONE)
    if system == "win32":
        _keep_disk_usage(os.statvfs)
        unknown = [name for name in dir(signal) if re.fullmatch(r"SIG[A-Z0-9]+", name) and name not in WINDOWS_SIGNALS]
        remove(UNIX_ALONE | {signal: UNIX_ALONE[signal] + unknown})
        for name in UNIX_MODULES:
            sys.modules[name] = None  # type: ignore[assignment]
        shutil._use_fd_functions = False  # type: ignore[attr-defined]
        tempfile.TemporaryFile = tempfile.NamedTemporaryFile  # type: ignore[misc] # as the module does there
    sys.platform = system
    sys.addaudithook(lambda event, arguments: check(event, arguments, system))


def _keep_disk_usage(statvfs: Callable[[Any], os.statvfs_result]) -> None:
    """Let `shutil.disk_usage` work, which asks Windows by a call of its own."""

    def disk_usage(path: Any) -> Any:
        found = statvfs(path)
        total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
        return shutil._ntuple_diskusage(total, total - free, free)  # type: ignore[attr-defined]

    shutil.disk_usage = disk_usage


def check(event: str, arguments: tuple, system: str) -> None:
    if event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") or not ours():
        return
    path = str(os.fspath(arguments[0])) if isinstance(arguments[0], str | os.PathLike) else ""
    if event == "open" and path.startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", path)
    if system != "win32" or not path:
        return
    if event == "open" and arguments[1] is None and Path(path).is_dir():
        raise PermissionError(13, "Permission denied", path)
    target = str(arguments[1]) if event == "os.rename" else path
    if FORBIDDEN.search(Path(target).name.lstrip(".")):
        raise OSError(22, "Invalid argument", target)
    if event in ("os.rename", "os.remove") and (held := [file for file in open_files() if is_in(file, path, target)]):
        raise PermissionError(13, "The process cannot access the file because it is being used", held[0])


def ours() -> bool:
    """Return whether our code asks, itself or through the standard library."""
    frame: Any = sys._getframe(3)  # beyond the hook
    while frame is not None:
        name = frame.f_code.co_filename
        if "site-packages" in name or name == __file__:
            return False
        if name.startswith((f"{ROOT}/accel_llm/", f"{ROOT}/launch/")):
            return True
        frame = frame.f_back
    return False


def open_files() -> list[str]:
    """Return the paths of the files and folders that this process has open or mapped."""
    files = [str(handle.readlink()) for handle in Path("/proc/self/fd").iterdir() if handle.is_symlink()]
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return files + [line.split(maxsplit=5)[5] for line in lines if "/" in line]


def is_in(file: str, *places: str) -> bool:
    return any(file == place or file.startswith(f"{place}/") for place in map(os.path.abspath, places))


def stop_in_step(number: int) -> None:
    from accel_llm.report.metrics import Meter
    from accel_llm.system.signals import signal_requests

    log = Meter.log

    def log_and_stop(meter: Meter, step: int, *arguments: Any) -> None:
        log(meter, step, *arguments)
        if step == number:
            signal.raise_signal(signal.SIGTERM)
            while not signal_requests.stop:  # a thread notes it
                time.sleep(0.01)

    Meter.log = log_and_stop


if __name__ == "__main__":
    sys.path[:1] = [str(ROOT / "launch"), str(ROOT)]
    system, *words = sys.argv[1:]
    become(system)
    if "PRETEND_STOP" in os.environ:
        stop_in_step(int(os.environ["PRETEND_STOP"]))
    while words:
        end = words.index("+") if "+" in words else len(words)
        sys.argv, words = words[:end], words[end + 1 :]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stopped:
            if stopped.code:
                raise
