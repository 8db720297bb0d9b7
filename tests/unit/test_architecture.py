# SPDX-License-Identifier: Apache-2.0
"""The house: imports run from the methods down to what knows least, and never in a circle."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINT = Path(sys.executable).with_name("lint-imports")


def lint(package_parent: Path) -> subprocess.CompletedProcess[str]:
    """Hold the contracts of pyproject.toml against the package in a folder."""
    command = [str(LINT), "--no-cache", "--config", str(ROOT / "pyproject.toml")]
    environment = {**os.environ, "PYTHONPATH": str(package_parent)}
    return subprocess.run(
        command, env=environment, cwd=package_parent, capture_output=True, text=True, timeout=120, check=False
    )


def test_imports_run_downwards_and_in_no_circle() -> None:
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("room", "line", "broken"),
    [
        ("models/families.py", "from ..engine import columns", "Imports run downwards"),
        ("engine/columns.py", "from ..mept import config", "Imports run downwards"),
        ("routing/record.py", "from ..models import families", "Imports run downwards"),
        ("vapt/generator.py", "from ..mept import config", "Imports run downwards"),
        ("sharing/model_card.py", "if TYPE_CHECKING:\n    from ..config import PromptConfig", "Imports run downwards"),
        ("models/families.py", "from . import sites", "No circles"),
        ("new_room.py", "", "Imports run downwards"),
    ],
    ids=["up", "up-to-a-method", "beside", "method-to-method", "for-types-only", "circle", "room-on-no-floor"],
)
def test_an_import_put_in_by_hand_is_told(room: str, line: str, broken: str, tmp_path: Path) -> None:
    copy = tmp_path / "peft_promptmoe"
    shutil.copytree(ROOT / "peft_promptmoe", copy, ignore=shutil.ignore_patterns("__pycache__"))
    assert lint(tmp_path).returncode == 0
    with (copy / room).open("a") as file:
        file.write(f"\n{line}\n")
    result = lint(tmp_path)
    assert result.returncode == 1
    assert any(broken in text and "BROKEN" in text for text in result.stdout.splitlines()), result.stdout
