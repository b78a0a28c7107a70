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


def join_processes(device: torch.device | str) -> None:
    """Join the other processes that torchrun has started; all but the first log warnings alone.

    Args:
        device: of this process.
    """
    on_gpu = torch.device(device).type == "cuda"
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(device)
    if torch.distributed.get_rank() > 0:
        logging.getLogger().setLevel(logging.WARNING)
