# SPDX-License-Identifier: Apache-2.0
"""README and docs: their code runs, their messages are the code's, their addresses are those of pyproject.toml."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from pathlib import Path

import pytest
from hub_process import hub_environment, run_python
from run_pages import blocks

import peft_promptmoe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITH_CODE = [page for page in PAGES if blocks(page)]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return hub_environment(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def errors(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What each page's code ends in, all of them run by one process."""
    folder = tmp_path_factory.mktemp("pages")
    run_python(environment, folder, str(Path(__file__).with_name("run_pages.py")), "errors.json", *map(str, WITH_CODE))
    found: dict[str, str | None] = json.loads((folder / "errors.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_code_of_a_page_runs(page: Path, errors: dict[str, str | None]) -> None:
    assert errors[str(page)] is None, errors[str(page)]


def test_the_quick_start_runs_in_two_processes(environment: dict[str, str], tmp_path: Path) -> None:
    train, predict = blocks(ROOT / "README.md")[:2]
    assert len((train + predict).splitlines()) <= 25
    run_python(environment, tmp_path, "-c", train)
    lines = run_python(environment, tmp_path, "-c", predict).strip().splitlines()
    # With random weights the classes are anyone's guess; the texts are those of the output that README shows.
    printed = re.findall(r"^(?:billing|technical) 0\.\d\d  (.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert [re.sub(r"^(?:billing|technical) \d\.\d\d  ", "", line) for line in lines] == printed and len(printed) == 2


def messages() -> str:
    """All strings of the package that are no docstrings, one a line; what stands between braces is a mark."""
    parts = []
    for path in sorted((ROOT / "peft_promptmoe").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts.append("".join(p.value if isinstance(p, ast.Constant) else "\0" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                parts.append(node.value)
    return "\n".join(part.replace("\n", " ") for part in parts)


def test_messages_of_the_troubleshooting_page_are_the_code_s() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.+)`$", text, re.MULTILINE)
    assert len(quoted) > 20
    code = messages()
    others = [one for one in quoted if not re.search(".*".join(map(re.escape, one.split("..."))), code)]
    assert others == ["KeyError: 'MEPT'"]  # PEFT's


def test_addresses_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project["urls"]["Repository"]
    place = repository.removeprefix("https://github.com/")
    owner = place.split("/")[0]
    for page in [*PAGES, ROOT / "CITATION.cff", ROOT / "peft_promptmoe" / "sharing" / "model_card.py"]:
        text = page.read_text(encoding="utf-8")
        for found in re.findall(rf"https://[\w./-]*(?:peft_promptmoe|{owner})[\w./-]*", text):
            raw = f"https://raw.githubusercontent.com/{place}"
            assert found.startswith((repository, raw, project["urls"]["Documentation"])), (page, found)
    assert f'git+{repository}"' in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^::: peft_promptmoe\.(\w+)$", text, re.MULTILINE))
    assert named == set(peft_promptmoe.__all__) - {"__version__"}


def test_files_that_readme_shows_are_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"(?:raw\.githubusercontent\.com/[\w-]+/[\w-]+/main|/blob/main)/([\w./-]+)", text)
    assert shown
    assert [path for path in shown if not (ROOT / path).is_file()] == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180
