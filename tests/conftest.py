# SPDX-License-Identifier: Apache-2.0
"""What all tests share: no network, no GPU unless asked for, one thread, fixed seeds."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")
if "PEFT_PROMPTMOE_TEST_GPU" not in os.environ:  # `make test-gpu`
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from collections.abc import Iterator

import peft
import pytest
import torch
import transformers.integrations.peft as transformers_integration
from packaging.version import Version

if Version(peft.__version__) < Version(transformers_integration.MIN_PEFT_VERSION):
    # transformers 5.24 came out before the PEFT release that its add_adapter and load_adapter ask for. All that lies
    # behind that one check is tested with the PEFT there is; to users transformers says which version it wants.
    transformers_integration.MIN_PEFT_VERSION = peft.__version__

pytest_plugins = ["matrix"]


@pytest.fixture(autouse=True)
def one_thread_and_seed() -> Iterator[None]:
    """Tests run side by side, and sums over several threads need not repeat bit by bit."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
