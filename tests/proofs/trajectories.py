"""Golden trajectories: loss and gradient norm of 50 steps, of the demo's recipes and of the matrix's model."""

import json
import subprocess
from importlib.metadata import version
from pathlib import Path

from forks import ROOT, Run, execute, metric

FILE = ROOT / "tests" / "proofs" / "golden" / "trajectories.json"
STEPS = 50
RECIPES = {"demo": ("sft", "--eval_generate 0 --eval_on_start false"), "demo_base": ("pretrain", "--limit_rows 2000")}
CURVES = ("loss", "grad_norm")


def trajectories(work: Path, tiny: dict[str, list[str]]) -> dict[str, dict[str, list[float]]]:
    """Return curves by name of the run: the recipes, and sft.py with each command line in `tiny`, on one CPU."""
    runs = []
    for name in (*RECIPES, *tiny):
        output, (script, extra) = work / "runs" / f"golden-{name}", RECIPES.get(name, ("sft", ""))
        recipe = ["--config", str(ROOT / "launch" / "recipes" / f"{name}.yaml")]
        words = f"{extra} --max_steps {STEPS} --logging_steps 1 --cache_dir {work / 'cache'} --output_dir {output}"
        runs.append(Run(name, script, "cpu", 1, [*tiny.get(name, recipe), *words.split()], output))
    curves = {}
    for end in execute(runs, work):
        if end.code:
            raise RuntimeError(f"{end.run.name}: {end.log}")
        curves[end.run.name] = {name: metric(end.run.output, name).round(7).tolist() for name in CURVES}
    return dict(sorted(curves.items()))


def versions() -> dict[str, str]:
    return {
        name: version(name) for name in ("torch", "transformers", "accelerate", "peft", "deepspeed", "bitsandbytes")
    }


def record(work: Path, tiny: dict[str, list[str]]) -> None:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    # Only these folders decide the numbers, so other files may have changes.
    changed = git("status", "--porcelain", "--", "accel_llm", "launch", "accelerate_configs")
    if changed:
        raise SystemExit(f"--record: there are changes that are not committed:\n{changed}")
    commit = git("rev-parse", "HEAD").strip()
    head = json.dumps({"commit": commit, "versions": versions()})[1:-1]
    runs = ",\n".join(f'"{name}": {json.dumps(curves)}' for name, curves in trajectories(work, tiny).items())
    FILE.write_text(f'{{{head}, "runs": {{\n{runs}\n}}}}\n', encoding="utf-8")


def check(work: Path, tiny: dict[str, list[str]]) -> list[str]:
    """Return the curves that differ from the recorded ones by more than 1e-4. CPUs add up in different orders."""
    golden, problems = json.loads(FILE.read_text(encoding="utf-8")), []
    if golden["versions"] != versions():
        print(f"recorded with {golden['versions']}, here are {versions()}", flush=True)
    for name, curves in trajectories(work, tiny).items():
        for kind, curve in curves.items():
            expected = golden["runs"][name][kind]
            worst = max(abs(a - b) for a, b in zip(curve, expected, strict=True))
            print(f"trajectory {name}: {kind} within {worst:.1e}", flush=True)
            problems += [f"trajectory {name}: {kind} is off by {worst:.1e}"] if worst > 1e-4 else []
    return problems
