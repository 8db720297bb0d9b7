# SPDX-License-Identifier: Apache-2.0
"""The supported versions, as one command: `nox` runs the tests on the floors, on the newest, and on each Python.

    nox                          # all of it
    nox -s floor                 # what pyproject.toml names as the lowest of everything
    nox -s newest-3.13 -- -k mept -m "not slow"
    nox -s clients               # beside each of the libraries that users run adapters with (tests/clients)
    nox -s "clients(client='trl')"

Tests that need a GPU or a network are left out; arguments behind `--` go to pytest.
"""

from __future__ import annotations

import nox
from nox.project import load_toml

PYTHONS = ["3.11", "3.12", "3.13"]
NEEDED = ["pytest", "pytest-xdist", "accelerate", "pandas", "matplotlib", "pillow", "filelock"]
DEFAULT = ["-n", "2", "-m", "not slow and not gpu and not network", "tests/unit", "tests/contract", "tests/attacks"]
DEFAULT += ["tests/golden", "tests/processes"]

# Each of them is the newest version that was tried; `nox -s clients` notes what came of it in CLIENT_RESULTS.
CLIENTS = {
    "trl": ["trl==1.16.0"],
    "bitsandbytes": ["bitsandbytes==0.50.2"],
    "torchao": ["torchao==0.18.0"],
    "sentence-transformers": ["sentence-transformers==6.2.0"],
    "lm-eval": ["lm-eval[hf]==0.4.13"],
    "deepspeed": ["deepspeed==0.19.8"],
    "onnx": ["onnx==1.23.2", "onnxruntime==1.32.0", "onnxscript==0.7.2"],
    "generate-batch": ["transformers==5.24.0"],
}
CLIENT_RESULTS = "benchmarks/results/clients.json"

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["floor", "newest"]


def floors() -> list[str]:
    """What pyproject.toml requires, pinned to the lowest version that it allows."""
    project = load_toml("pyproject.toml")["project"]
    required = [*project["dependencies"], *project["optional-dependencies"]["vision"]]
    return [requirement.split(",")[0].replace(">=", "==") for requirement in required]


def run_tests(session: nox.Session, requirements: list[str], chosen: list[str] | None = None) -> None:
    session.install(*requirements, *NEEDED)
    session.install("--no-deps", "--editable", ".")
    session.run("python", "-m", "pip", "list", silent=False)
    # One thread for each of the two workers: more threads than cores make small tensors slower, not faster.
    session.run("python", "-m", "pytest", *(chosen or session.posargs or DEFAULT), env={"OMP_NUM_THREADS": "1"})


@nox.session(python=PYTHONS[0])
def floor(session: nox.Session) -> None:
    """The lowest versions that are supported, together, without what the lowest torch cannot do by itself."""
    chosen = session.posargs or [*DEFAULT, "-k", "not compile and not fsdp2"]
    run_tests(session, floors(), chosen)


@nox.session(python=PYTHONS)
def newest(session: nox.Session) -> None:
    """The newest versions that there are, on each Python."""
    project = load_toml("pyproject.toml")["project"]
    run_tests(session, ["--upgrade", *project["dependencies"], *project["optional-dependencies"]["vision"]])


@nox.session(python=PYTHONS[0])
@nox.parametrize("package", ["peft", "transformers", "timm"])
def floor_of(session: nox.Session, package: str) -> None:
    """One package at its floor and all others the newest: tells which of them a failure of `floor` comes from."""
    project = load_toml("pyproject.toml")["project"]
    newest_ = [*project["dependencies"], *project["optional-dependencies"]["vision"]]
    pinned = [requirement for requirement in floors() if requirement.startswith(f"{package}==")]
    run_tests(session, [*[one for one in newest_ if not one.startswith(f"{package}>")], *pinned])


@nox.session(python=PYTHONS[0])
@nox.parametrize("client", list(CLIENTS))
def clients(session: nox.Session, client: str) -> None:
    """One library that users run adapters with, pinned: docs/clients.md has the results."""
    project = load_toml("pyproject.toml")["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["vision"], "datasets"]
    test = f"tests/clients/test_{client.replace('-', '_')}.py"
    run_tests(session, [*needed, *CLIENTS[client]], [test, f"--client-results={CLIENT_RESULTS}", *session.posargs])
