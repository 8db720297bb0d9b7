# SPDX-License-Identifier: Apache-2.0
"""Python processes that find tiny models under Hub ids, and no network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tiny_hub import fill

HERE = Path(__file__).parent
QUIET = {"TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1", "MPLBACKEND": "agg"}


def hub_environment(cache: Path) -> dict[str, str]:
    """Of a process that finds tiny models in `cache`, which is filled here, and this checkout's package."""
    cache.mkdir(exist_ok=True)
    fill(cache)
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE), *sys.path])
    hub = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "HF_DATASETS_CACHE": str(cache / "datasets")}
    return {**os.environ, **hub, **QUIET, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def run_python(environment: dict[str, str], folder: Path, *arguments: str) -> str:
    """Standard output of a Python process in a folder; it has to end well."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
