# SPDX-License-Identifier: Apache-2.0
"""Libraries that users run adapters with, each pinned and in a session of its own: `nox -s clients`.

They are no part of `make test`: pyproject.toml's `norecursedirs` has this folder. `--client-results FILE` notes in a
JSON file which version was tried and what came of it; docs/clients.md is made from that.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
OUTCOMES = pytest.StashKey[dict[str, dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--client-results", type=Path, help="JSON file to note these tests' results in")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OUTCOMES] = {}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What a library asks of transformers and PEFT by an old name is its own affair."""
    for item in items:
        if HERE in item.path.parents:
            for kind in ("DeprecationWarning", "FutureWarning"):
                for package in ("transformers", "peft"):
                    item.add_marker(pytest.mark.filterwarnings(f"default::{kind}:{package}"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    if HERE in item.path.parents and (report.when == "call" or report.failed):
        function = getattr(item, "obj", None)
        checked = " ".join((function.__doc__ or "").split())
        found = item.config.stash[OUTCOMES].setdefault(item.module.CLIENT, {})
        row = found.setdefault(function.__name__, {"checked": checked, "passed": [], "failed": []})
        case = item.callspec.id if hasattr(item, "callspec") else ""
        row["passed" if report.passed else "failed"].append(case)
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Replace what the file says of the clients that were run whole; keep what it says of others."""
    target = session.config.getoption("--client-results")
    if target is None:
        return
    known = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    for client, tests in session.config.stash[OUTCOMES].items():
        known[client] = {"version": version(client), "tests": tests}
    target.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")
