"""The Markdown pages are right: snippets run, the training loop equals that of the script, linked files exist."""

import ast
import importlib
import json
import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matrix
import pytest
import resumes
import torch
from peft import PeftModel
from support import PAGES, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from accel_llm.system.manifest import find_damage

BASE = ROOT / "accel_llm" / "demo_base"
PACKAGE_PAGE = ROOT / "accel_llm" / "README.md"
SECTION = re.compile(r"^#+ (.+?)\n(.*?)(?=^#+ |\Z)", re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def snippets(page: Path) -> dict[str, str]:
    """The Python block under each heading of a page that has one."""
    text = page.read_text(encoding="utf-8")
    # A comment in a block would look like a heading.
    blocks: list[str] = []

    def hide(match: re.Match[str]) -> str:
        blocks.append(match[1])
        return f"<{len(blocks) - 1}>"

    sections = SECTION.findall(SNIPPET.sub(hide, text))
    return {title: blocks[int(number)] for title, body in sections for number in re.findall(r"^<(\d+)>$", body, re.M)}


def check_chat(names: dict[str, Any]) -> None:
    row, tokenizer = names["row"], names["tokenizer"]
    prompt = tokenizer.apply_chat_template(names["messages"][:1], add_generation_prompt=True, return_dict=False)
    assert row.input_ids[: len(prompt)] == prompt
    answer = tokenizer("7<|im_end|>")["input_ids"]
    assert names["trained"] == answer
    line_break = tokenizer("\n")["input_ids"]
    assert row.labels == [-100] * len(prompt) + answer + [-100] * len(line_break)


def check_packing(names: dict[str, Any]) -> None:
    assert sorted(map(sorted, names["rows"])) == [[0, 3], [1, 2]]
    for row, batch in zip(names["rows"], names["batches"], strict=True):
        lengths = [len(names["documents"][k][0]) for k in row]
        assert batch["cu_seqlens"].diff().tolist() == lengths
        assert batch["position_ids"][0].tolist() == [k for length in lengths for k in range(length)]


def check_loss(names: dict[str, Any]) -> None:
    # Transformers' own loss of each document, weighted with its labels.
    stock = AutoModelForCausalLM.from_pretrained(BASE)
    losses = [
        (stock(torch.tensor([ids]), labels=torch.tensor([ids])).loss, len(ids) - 1) for ids in ([7, 8, 9], [5, 6])
    ]
    expected = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    torch.testing.assert_close(names["loss"], expected, rtol=1e-5, atol=0)
    assert all(parameter.grad is not None for parameter in names["model"].parameters())


def check_schedule(names: dict[str, Any]) -> None:
    optimizer, scheduler, rates = names["optimizer"], names["scheduler"], []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    # Ten steps of warmup in equal parts, then half a cosine.
    expected = [2e-5 * (step + 1) / 11 for step in range(10)]
    expected += [1e-5 * (1 + math.cos(math.pi * (step - 10) / 90)) for step in range(10, 100)]
    assert rates == pytest.approx(expected, rel=1e-12)


def check_merge(names: dict[str, Any]) -> None:
    assert names["merged"].modules > 0 and names["merged"].largest_error < 1e-5
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), "adapter")
    merged = AutoModelForCausalLM.from_pretrained("merged")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-4)
    with adapted.disable_adapter():
        assert (merged(ids).logits - adapted(ids).logits).abs().max() > 1e-2
    assert AutoTokenizer.from_pretrained("merged").chat_template


def check_checkpoint(names: dict[str, Any]) -> None:
    folder: Path = names["folder"]
    assert not names["partial"].exists()
    weights = folder / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert find_damage(folder) == "has a damaged weights.safetensors"


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "Exact ids and labels of a chat": check_chat,
    "Lengths packed into rows": check_packing,
    "Isolated documents and the loss as a sum": check_loss,
    "An exact learning-rate schedule": check_schedule,
    "A streamed merge": check_merge,
    "A checkpoint that is whole or not there": check_checkpoint,
}
SNIPPETS = snippets(PACKAGE_PAGE)


def test_every_snippet_has_a_check_and_fits_in_15_lines() -> None:
    assert SNIPPETS.keys() == CHECKS.keys()
    assert {title: lines for title, text in SNIPPETS.items() if (lines := text.count("\n")) > 15} == {}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("title", SNIPPETS)
def test_snippets_of_the_package_page_run(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "accel_llm").mkdir()
    (tmp_path / "accel_llm" / "demo_base").symlink_to(BASE)
    names: dict[str, Any] = {}
    exec(compile(SNIPPETS[title], f"README: {title}", "exec"), names)
    CHECKS[title](names)


def test_the_readme_shows_the_loop_of_the_scripts() -> None:
    (snippet,) = SNIPPET.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    source = (ROOT / "launch" / "sft.py").read_text(encoding="utf-8")
    functions = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    loop = next(node for node in functions["train"].body if isinstance(node, ast.For))
    lines = source.splitlines(keepends=True)[loop.lineno - 1 : loop.end_lineno]
    assert snippet == textwrap.dedent("".join(lines))


def test_pages_are_short() -> None:
    lengths = {path: path.read_text(encoding="utf-8").count("\n") for path in (ROOT / "README.md", PACKAGE_PAGE)}
    assert lengths[ROOT / "README.md"] <= 200 and lengths[PACKAGE_PAGE] <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_and_named_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []
    paths = re.findall(r"`(?:python |pytest )?((?:tests|launch|accelerate_configs|accel_llm)/[\w./-]+)", text)
    assert [name for name in paths if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_that_a_page_imports_exist(page: Path) -> None:
    for snippet in SNIPPET.findall(page.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("accel_llm"):
                module = importlib.import_module(str(node.module))
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_readme_names_every_package_and_script() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.partition("## What is where")[2].partition("## The loop")[0]
    packages = {path.parent.name for path in (ROOT / "accel_llm").glob("*/__init__.py")}
    scripts = {path.stem for path in (ROOT / "launch").glob("*.py")}
    assert {name for name in packages | scripts if not re.search(rf"\b{name}\b", tree)} == set()


def test_pages_show_the_results_that_were_recorded() -> None:
    def cells(name: str) -> dict[str, dict[str, Any]]:
        return json.loads((matrix.GOLDEN / f"{name}.json").read_text(encoding="utf-8"))["cells"]

    def page_table(name: str) -> str:
        text = (ROOT / matrix.PAGES[name]).read_text(encoding="utf-8")
        return text.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]

    backends, stops = cells("matrix"), {name: cell for name, cell in cells("resumes").items() if "-workers" in name}
    assert page_table("matrix") == matrix.table(backends)
    assert page_table("resumes") == resumes.table(stops)

    worst = [max(cell[what] for cell in backends.values() if what in cell) for what in ("loss", "weights", "gradient")]
    same = sum(cell["status"] == "same" for cell in backends.values())
    promise = "in the {} combinations run: losses {:.0e}, weights {:.0e}, gradients {:.0e}".format(same, *worst)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert promise in readme
    assert f"all {len(stops)} combinations" in readme and {cell["status"] for cell in stops.values()} == {"bit-equal"}
