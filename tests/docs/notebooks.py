# SPDX-License-Identifier: Apache-2.0
"""The notebooks of the examples, written from their scripts, whose cells begin with `# %%`.

python tests/docs/notebooks.py    # after a change of one of the scripts
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = [EXAMPLES / f"{name}.py" for name in ("trainer_csv", "chat_sft", "timm_loop")]
PROJECT = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INSTALL = f'%pip install -q "peft-promptmoe[examples] @ git+{PROJECT["urls"]["Repository"]}"'


def notebook_of(script: Path) -> Path:
    return EXAMPLES / "notebooks" / f"{script.stem}.ipynb"


def cells(text: str) -> list[tuple[str, str]]:
    """Kind and source of each cell: what follows `# %%` is a heading, the licence line stays with the code."""
    licence, *parts = re.split(r"^# %%", text, flags=re.MULTILINE)
    made: list[tuple[str, str]] = []
    for part in parts:
        title, _, body = part.partition("\n")
        if title.strip() == "[markdown]":
            made.append(("markdown", re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE)))
            made.append(("code", INSTALL))
            continue
        if title.strip():
            made.append(("markdown", f"## {title.strip()}"))
        made.append(("code", body.strip()))
    first = next(number for number, (kind, source) in enumerate(made) if kind == "code" and source != INSTALL)
    made[first] = ("code", f"{licence.strip()}\n{made[first][1]}")
    return made


def notebook(script: Path) -> str:
    """The notebook of a script, as JSON of nbformat 4.5."""
    content: list[dict[str, Any]] = []
    for number, (kind, source) in enumerate(cells(script.read_text(encoding="utf-8"))):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        content.append(cell | {"source": source.splitlines(keepends=True)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": content, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for path in SCRIPTS:
        notebook_of(path).parent.mkdir(exist_ok=True)
        notebook_of(path).write_text(notebook(path), encoding="utf-8")
