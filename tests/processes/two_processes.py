# SPDX-License-Identifier: Apache-2.0
"""Runs a function on two gloo processes of this machine, as `torchrun --nproc_per_node 2` would."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

# One server imports these once; each process is then a fork of it that has done nothing yet.
PRELOADED = ["torch.distributed.fsdp", "transformers.trainer", "accelerate", "peft", "timm", "pytest"]
PATIENCE = timedelta(seconds=120)  # for a rank that waits for one which has failed


def on_two_processes(job: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `job(*arguments)` returns on each of two ranks.

    Args:
        job: a function of a module; its results are tensors and plain values.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of the ranks has failed, with its traceback.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_run, args=(job, arguments, folder), nprocs=2, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(2)]


def _run(rank: int, job: Callable[..., Any], arguments: tuple[Any, ...], folder: str) -> None:
    torch.set_num_threads(1)
    # By which accelerate, and so the Trainer, sees that it is not alone.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=PATIENCE)
    try:
        torch.save(job(*arguments), Path(folder) / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
