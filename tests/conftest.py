# SPDX-License-Identifier: Apache-2.0
"""What all tests share: no network, one thread, fixed seeds."""

from __future__ import annotations

import os

os.environ.update(
    HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1", CUDA_VISIBLE_DEVICES=""
)

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_and_seed() -> Iterator[None]:
    """Tests run side by side, and sums over several threads need not repeat bit by bit."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
