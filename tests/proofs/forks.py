"""Run the training scripts as forks: like `accelerate launch`, but everything is imported only once.

The ranks of a run get the environment that the launcher would give them, by Accelerate's own functions, and then become
the script. A program that imports this module must have one thread, because a fork does not copy threads.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import gc
import importlib
import json
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 120  # seconds
WARM = (
    "torch torch.distributed.fsdp torch.distributed.checkpoint.state_dict transformers.models.qwen3.modeling_qwen3 "
    "transformers.models.llama.modeling_llama transformers.integrations.bitsandbytes peft.tuners.lora.bnb "
    "peft.utils.transformers_weight_conversion bitsandbytes datasets deepspeed.runtime.zero.stage_1_and_2 "
    "deepspeed.runtime.superoffload.superoffload_stage3 deepspeed.runtime.zero.muon.muon_optimizer "
    "deepspeed.module_inject.auto_ep_layer numpy.ctypeslib "
    "accelerate.commands.launch accelerate.utils.other sft pretrain dpo kto"
)


class Run(NamedTuple):
    """A script under a launch YAML, as `processes` ranks; each calls `sabotage` before the script starts."""

    name: str
    script: str
    strategy: str
    processes: int
    words: list[str]
    output: Path
    sabotage: Callable[[], None] | None = None
    resumed: bool = False  # it continues the run in `output`

    @property
    def log(self) -> Path:
        return self.output.with_suffix(".log")


class Ended(NamedTuple):
    """The end of a run: its first exit code that is not 0, which is negative for a signal or a timeout."""

    run: Run
    code: int
    seconds: float

    @property
    def log(self) -> str:
        return self.run.log.read_text(encoding="utf-8", errors="replace")

    @property
    def sentences(self) -> list[str]:
        return re.findall(r"^error: .*", self.log, re.MULTILINE)

    @property
    def cause(self) -> str:
        """The error that ended the run, or else the end of its output."""
        errors = re.findall(r"^error \(rank \d+\): .*", self.log, re.MULTILINE)
        raised = re.findall(r"^[\w.]*(?:Error|Exception)\b.*", self.log, re.MULTILINE)
        return [self.log[-400:], *raised, *errors][-1][:400]


def warm() -> None:
    """Import all modules of the scripts once for all forks, and compute nothing."""
    sys.path[:0] = [str(ROOT / "launch"), str(ROOT)]
    for name in WARM.split():
        importlib.import_module(name)
    # A proof may have imported torch before OMP_NUM_THREADS was set here. Then the parent's first operator would start
    # threads, which a fork does not have: it waits for them forever (seen where bitsandbytes quantizes).
    sys.modules["torch"].set_num_threads(1)
    # transformers compiles the patterns of all families when it loads its first model.
    sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("qwen3")
    # DeepSpeed compiles a test program for each of its kernels when it is first asked which ones are available.
    _ = sys.modules["deepspeed"].ops.__compatible_ops__
    # The garbage collector of a fork would touch all these objects, and so copy their memory.
    gc.freeze()


def launch_config(strategy: str, work: Path) -> Path:
    """Return the launch YAML; for ZeRO-3 a copy that shards even the small tensors of the test model."""
    original, copy = ROOT / "accelerate_configs" / f"{strategy}.yaml", work / f"{strategy}.yaml"
    if not strategy.startswith("zero3"):
        return original
    if not copy.exists():  # write it once, as another run may be reading it
        settings = json.loads(original.with_suffix(".json").read_text(encoding="utf-8"))
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        copy.with_suffix(".json").write_text(json.dumps(settings), encoding="utf-8")
        text = original.read_text(encoding="utf-8")
        copy.write_text(text.replace(f"accelerate_configs/{strategy}.json", str(copy.with_suffix(".json"))))
    return copy


def environment(config: Path, processes: int, rank: int, port: int) -> dict[str, str]:
    """Return the environment of a rank: Accelerate's part from its own functions, then torchrun's part."""
    from accelerate.commands import launch

    words = [
        "--config_file",
        str(config),
        "--num_processes",
        str(processes),
        "--main_process_port",
        str(port),
        "script",
    ]
    args, defaults, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    if not (args.use_deepspeed or args.use_fsdp or args.multi_gpu):
        return launch.prepare_simple_launcher_cmd_env(args)[1]
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        variables = launch.prepare_deepspeed_cmd_env(args)[1]
    else:
        variables = launch.prepare_multi_gpu_env(args)
    ranks = {name: str(rank) for name in ("RANK", "LOCAL_RANK", "ROLE_RANK")} | {"GROUP_RANK": "0"}
    sizes = {name: str(processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE")}
    return variables | ranks | sizes | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def script_path(run: Run) -> Path:
    return ROOT / "launch" / f"{run.script}.py"


def be_rank(run: Run, config: Path, rank: int, port: int) -> None:
    """In a fork: become the script that `accelerate launch` would start."""
    os.environ.update(environment(config, run.processes, rank, port))
    sys.argv = [str(script_path(run)), *run.words]
    if run.sabotage:
        run.sabotage()
    from accel_llm.system.exit import run_script

    run_script(importlib.import_module(run.script).main)


def be_launcher(run: Run, config: Path, port: int) -> None:
    program = str(Path(sys.executable).with_name("accelerate"))
    where = ["--config_file", str(config), "--num_processes", str(run.processes), "--main_process_port", str(port)]
    os.execv(program, [program, "launch", *where, str(script_path(run)), *run.words])


def start_fork(task: Callable[[], None], log: Path) -> int:
    """Start a fork that does `task`, appends its output to `log` and ends; return its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(ROOT)
        task()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # skip the exit handlers of the parent, which has files and forks of its own


def compute(task: Callable[[], None], log: Path) -> None:
    """Do `task` in a fork and wait for it, because computing starts threads."""
    code = os.waitstatus_to_exitcode(os.waitpid(start_fork(task, log), 0)[1])
    if code:
        raise RuntimeError(f"exit code {code}: {log.read_text(encoding='utf-8')}")


def poll_and_end(pids: dict[int, int | None], since: float) -> bool:
    """Record the exit codes of processes. If one failed, end the others. Return True when all have ended."""
    for pid in [pid for pid, code in pids.items() if code is None]:
        ended_pid, status = os.waitpid(pid, os.WNOHANG)
        pids[pid] = os.waitstatus_to_exitcode(status) if ended_pid else None
    if any(pids.values()) or time.monotonic() - since > TIMEOUT:
        stop(pids)
    return None not in pids.values()


def stop(pids: dict[int, int | None]) -> None:
    for pid in [pid for pid, code in pids.items() if code is None]:
        os.killpg(pid, signal.SIGKILL)
        pids[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def first_cause(codes: list[int]) -> int:
    """Return the exit code of the rank that failed by itself, not the signal that then ended the others."""
    return max(codes) if max(codes) > 0 else min(codes)


def free_port() -> int:
    from accelerate.utils.other import get_free_port

    return get_free_port()


def execute(runs: list[Run], work: Path, launch: bool = False) -> Iterator[Ended]:
    """Do the runs, as many ranks at once as there are cores; yield each as it ends. `launch`: use the real launcher."""
    waiting, running = list(runs), []
    try:
        while waiting or running:
            busy = sum(run.processes for run, *_ in running)
            if waiting and (not running or busy + waiting[0].processes <= (os.cpu_count() or 1)):
                run = waiting.pop(0)
                running.append((run, start(run, work, launch), time.monotonic()))
            time.sleep(0.01)
            for entry in [entry for entry in running if poll_and_end(*entry[1:])]:
                running.remove(entry)
                run, pids, since = entry
                yield Ended(run, first_cause([*pids.values()]), time.monotonic() - since)
    finally:
        for _, pids, _ in running:
            stop(pids)


def start(run: Run, work: Path, launch: bool) -> dict[int, int | None]:
    """Start the processes of a run; return their ids, with no exit codes yet."""
    if not run.resumed:
        shutil.rmtree(run.output, ignore_errors=True)
    run.output.parent.mkdir(parents=True, exist_ok=True)
    run.log.unlink(missing_ok=True)
    config, port = launch_config(run.strategy, work), free_port()
    tasks = [partial(be_rank, run, config, rank, port) for rank in range(run.processes)]
    return {
        start_fork(task, run.log): None for task in ([partial(be_launcher, run, config, port)] if launch else tasks)
    }


def metric(output: Path, name: str) -> np.ndarray:
    """Return one value of metrics.jsonl for each step that has it."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return np.array([line[name] for line in map(json.loads, lines) if name in line], float)
