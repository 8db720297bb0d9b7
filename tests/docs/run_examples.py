# SPDX-License-Identifier: Apache-2.0
"""Run scripts and notebooks, each in its own folder; a process apart for the tests, in which the Hub takes uploads.

python run_examples.py RESULTS SCRIPT...    # writes {script: {printed, error, sizes of the files it left}} to RESULTS

Uploads go into the local cache, where `from_pretrained` then finds them. Models of timm are made as small as the cache
has them.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import timm
import torch
from huggingface_hub import CommitOperationAdd, HfApi
from tiny_hub import REVISION, TIMM_SIZES


def create_repo(self: HfApi, repo_id: str, **_: Any) -> SimpleNamespace:
    return SimpleNamespace(repo_id=repo_id)


def create_commit(self: HfApi, repo_id: str, operations: list[CommitOperationAdd], **_: Any) -> None:
    folder = Path(os.environ["HF_HUB_CACHE"]) / f"models--{repo_id.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(REVISION)
    for operation in operations:
        path = folder / "snapshots" / REVISION / operation.path_in_repo
        path.parent.mkdir(parents=True, exist_ok=True)
        with operation.as_file() as content:
            path.write_bytes(content.read())
    # What the Hub would answer: an adapter's repository has no config.json.
    missing = folder / ".no_exist" / REVISION / "config.json"
    missing.parent.mkdir(parents=True, exist_ok=True)
    missing.touch()


def execute(script: Path) -> None:
    """Run a script, or the code cells of a notebook one after the other, as a kernel does."""
    if script.suffix == ".py":
        runpy.run_path(str(script), run_name="__main__")
        return
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(script.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not source.startswith("%"):
            exec(compile(source, f"{script.name}, {cell['id']}", "exec"), names)


def run(script: Path) -> dict[str, Any]:
    """What a script prints, the error it ends in, and the files it leaves beside itself."""
    sys.argv = [script.name, "someone/adapter"]
    printed, error = io.StringIO(), None
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        try:
            execute(script)
        except Exception:
            error = traceback.format_exc()
        sizes = {path.name: path.stat().st_size for path in Path(folder).iterdir() if path.is_file()}
    return {"printed": printed.getvalue(), "error": error, "sizes": sizes}


if __name__ == "__main__":
    torch.set_num_threads(1)
    HfApi.create_repo, HfApi.create_commit = create_repo, create_commit  # type: ignore[method-assign, assignment]
    timm.create_model = functools.partial(timm.create_model, **TIMM_SIZES)
    results, scripts = Path(sys.argv[1]).resolve(), sys.argv[2:]
    found = {script: run(Path(script).resolve()) for script in scripts}
    results.write_text(json.dumps(found), encoding="utf-8")
