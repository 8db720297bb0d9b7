# SPDX-License-Identifier: Apache-2.0
"""The small examples: short, each alone, and they run; so do the notebooks, which are made from them."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import notebooks
import pytest
from hub_process import hub_environment, run_python

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py"))
OF_CLIENTS = {"four_bit"}  # which needs bitsandbytes and is run with it, in tests/clients
HERE = Path(__file__).parent
# What a run has to have printed; weights are random and tiny, so the scores are not looked at.
PRINTED = {
    "trainer_csv": r"accuracy on 6 held-out texts: \d\.\d\d\n(.|\n)*(billing|technical)\n",
    "chat_sft": r"(before: (.|\n)*tuned: (.|\n)*){3}",
    "timm_loop": r"epoch 0: loss \d\.\d+, \d+ of 96 held-out pictures right\n(.|\n)*is a circle\n",
    "image_folder": r"accuracy on 60 held-out images: \d\.\d\d\n(.|\n)*predicted \w+ of a \w+\n",
    "pmoe": r"epoch 2: \d+ of 48 held-out pictures right\n(.|\n)*is a circle\n",
    "hub": r"loaded as it was pushed: True\n",
    "routing_pictures": r"layer  entropy  load of experts",
}
LEFT = {"routing_pictures": ["load.png", "pathways.png", "tokens.gif"]}


# More than five seconds each, of tiny models too; the recipes of README are quick tests of what they show.
SEVERAL_SECONDS = {"chat_sft", "image_folder", "pmoe"}
RUNNABLE = [path for path in SCRIPTS if path.stem not in OF_CLIENTS]
RUNNABLE += [notebooks.notebook_of(path) for path in notebooks.SCRIPTS]
QUICK = [path.relative_to(EXAMPLES).as_posix() for path in RUNNABLE if path.stem not in SEVERAL_SECONDS]
SLOW = [path.relative_to(EXAMPLES).as_posix() for path in RUNNABLE if path.stem in SEVERAL_SECONDS]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return hub_environment(tmp_path_factory.mktemp("hub"))


def run(environment: dict[str, str], folder: Path, scripts: list[Path]) -> dict[str, dict[str, Any]]:
    """What became of each script, all of them run by one process."""
    run_python(environment, folder, str(HERE / "run_examples.py"), "results.json", *map(str, scripts))
    found: dict[str, dict[str, Any]] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def quick(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return run(environment, tmp_path_factory.mktemp("examples"), [EXAMPLES / name for name in QUICK])


def check(script: Path, result: dict[str, Any]) -> None:
    assert result["error"] is None, result["error"]
    assert re.search(PRINTED[script.stem], result["printed"]), result["printed"][-2000:]
    assert all(result["sizes"].get(name, 0) > 1000 for name in LEFT.get(script.stem, []))


@pytest.mark.parametrize("name", QUICK)
def test_an_example_runs(name: str, quick: dict[str, dict[str, Any]]) -> None:
    script = EXAMPLES / name
    check(script, quick[str(script)])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW, ids="{}-takes-several-seconds".format)
def test_a_longer_example_runs(name: str, environment: dict[str, str], tmp_path: Path) -> None:
    script = EXAMPLES / name
    check(script, run(environment, tmp_path, [script])[str(script)])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_and_stands_alone(script: Path) -> None:
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    nodes = list(ast.walk(ast.parse(text)))
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names}
    assert not {path.stem for path in EXAMPLES.rglob("*.py")} & imported
    assert "peft_promptmoe" in imported


def test_the_table_of_examples_names_them_all() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| \[`([\w/]+\.py)`\]\(\1\)", table, re.MULTILINE))
    runnable = {path for path in EXAMPLES.rglob("*.py") if '__name__ == "__main__"' in path.read_text("utf-8")}
    assert named == {path.relative_to(EXAMPLES).as_posix() for path in {*SCRIPTS, *runnable}}


@pytest.mark.parametrize("script", notebooks.SCRIPTS, ids=lambda path: path.stem)
def test_a_notebook_is_its_script_s(script: Path) -> None:
    written = notebooks.notebook_of(script).read_text(encoding="utf-8")
    assert written == notebooks.notebook(script), "run tests/docs/notebooks.py"
    kinds = {kind for kind, _ in notebooks.cells(script.read_text(encoding="utf-8"))}
    code = [source for kind, source in notebooks.cells(script.read_text(encoding="utf-8")) if kind == "code"]
    own = "\n".join(source for source in code if source != notebooks.INSTALL)
    assert kinds == {"markdown", "code"}
    assert ast.dump(ast.parse(own)) == ast.dump(ast.parse(script.read_text(encoding="utf-8")))
