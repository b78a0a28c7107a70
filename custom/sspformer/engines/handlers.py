"""Ignite handlers that MONAI does not have: seeds for each epoch, gradient clipping, a frozen encoder."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers.tqdm_logger import ProgressBar
from monai.engines.utils import IterationEvents
from monai.handlers import ValidationHandler

from .checkpoints import _every_and_last

__all__ = ["FreezeEncoder", "GradientClipping", "Progress", "SeedEpoch", "Validation"]


class SeedEpoch:
    """Start every random source anew at each epoch, from the seed, the epoch's number and the process's.

    What an epoch draws then depends on nothing before it, so a run that was killed and resumed at an epoch's start
    draws what an unkilled one draws.

    Args:
        seed: of the run.
        randomizables: what has MONAI's ``set_random_state``, and datasets, whose ``transform`` has it.
        same_every_epoch: the same draws each time, for validation; the global sources are then left alone.
    """

    def __init__(self, seed: int, randomizables: Sequence[Any] = (), same_every_epoch: bool = False) -> None:
        self.seed, self.randomizables, self.same_every_epoch = seed, randomizables, same_every_epoch

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        seed = self.seed
        if not self.same_every_epoch:
            seeds = np.random.SeedSequence([self.seed, engine.state.epoch]).generate_state(idist.get_world_size())
            seed = int(seeds[idist.get_rank()])
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
        for randomizable in self.randomizables:
            source = getattr(randomizable, "transform", randomizable)
            if hasattr(source, "set_random_state"):  # MONAI's default prepare_batch draws nothing
                source.set_random_state(seed=seed)


class GradientClipping:
    """Clip the norm of all gradients together after each backward pass.

    Args:
        network: whose gradients.
        max_norm: above 0.
    """

    def __init__(self, network: torch.nn.Module, max_norm: float = 1.0) -> None:
        if max_norm <= 0:
            raise ValueError(f"max_norm must be above 0, got {max_norm}.")
        self.network, self.max_norm = network, max_norm

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.max_norm)


class Progress(ProgressBar):
    """A progress bar through each epoch, with the loss of the epoch before; only on a terminal, so that logs stay
    readable."""

    def __init__(self) -> None:
        super().__init__(disable=None)

    def attach(self, engine: Engine) -> None:  # type: ignore[override]
        engine.state.train_loss = float("nan")  # until the first epoch is over
        super().attach(engine, state_attributes=["train_loss"])


class Validation(ValidationHandler):
    """MONAI's ``ValidationHandler`` that validates after the last epoch as well, whatever the interval."""

    def attach(self, engine: Engine) -> None:
        if self.exec_at_start:
            # epoch 1, as MONAI's evaluator runs twice from epoch 0
            engine.add_event_handler(Events.STARTED, lambda: self.validator.run(1))
        engine.add_event_handler(_every_and_last(self.interval), self)


class FreezeEncoder:
    """Train the decoder alone for the first epochs: new layers do not shake pretrained ones.

    Args:
        network: a dense network; any other too where ``epochs`` is 0.
        epochs: for how many; 0: none; as many as the run has: the encoder stays as it was pretrained.
    """

    def __init__(self, network: torch.nn.Module, epochs: int = 0) -> None:
        if epochs < 0:
            raise ValueError(f"freeze_epochs must be 0 or more, got {epochs}.")
        self.encoder = getattr(network, "module", network).encoder if epochs else None
        self.epochs = epochs

    def attach(self, engine: Engine) -> None:
        if self.encoder is not None:
            engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        self.encoder.requires_grad_(engine.state.epoch > self.epochs)
