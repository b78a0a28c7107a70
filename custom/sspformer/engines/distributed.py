"""Training in several processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import ignite.distributed as idist
import torch

from .checkpoints import SaveBestModel, SaveCheckpoint, SaveEncoder
from .handlers import Progress
from .history import History
from .panels import Panel

#: one process writes for all
WRITERS = (History, Panel, Progress, SaveBestModel, SaveCheckpoint, SaveEncoder)


def of_this_process(handlers: Sequence[Any]) -> list[Any]:
    """The handlers of an engine that are for this process: all in the first one, those that write nothing in others."""
    return [handler for handler in handlers if idist.get_rank() == 0 or not isinstance(handler, WRITERS)]


def local_device() -> torch.device:
    """The GPU of this process, by ``LOCAL_RANK`` as torchrun sets it, or the CPU."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def process_rank() -> int:
    """Number of this process, from 0; 0 for a single one."""
    return idist.get_rank()


def join_processes(device: torch.device | str) -> bool:
    """Join the other processes that torchrun has started; all but the first log warnings alone.

    Args:
        device: of this process.

    Returns:
        whether this call joined them, for :func:`leave_processes`; False if they had been joined already.
    """
    on_gpu = torch.device(device).type == "cuda"
    joined = not torch.distributed.is_initialized()
    if joined:
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(device)
    if torch.distributed.get_rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)
    return joined


def leave_processes(joined: bool | None) -> None:
    """Leave the other processes, if :func:`join_processes` joined them."""
    if joined and torch.distributed.is_initialized():
        idist.finalize()
