# SPDX-License-Identifier: Apache-2.0
"""Tests of the real kernels: collected everywhere, deselected where there is no CUDA device.

PEFT_PROMPTMOE_TEST_GPU=1 python -m pytest tests/gpu
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every test here says in its id why it may be left out."""
    metafunc.fixturenames.append("device")
    metafunc.parametrize("device", ["cuda"], ids=["needs_cuda"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = [item for item in items if HERE in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.gpu)
    if not torch.cuda.is_available() and here:
        config.hook.pytest_deselected(items=here)
        items[:] = [item for item in items if item not in here]
