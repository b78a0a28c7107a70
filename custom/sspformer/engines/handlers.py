"""Ignite handlers that MONAI does not have: seeds for each epoch, gradient clipping, a frozen encoder, progress."""

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


class SeedEpoch:
    """Seed all random sources at the start of each epoch, from the seed, the epoch and the rank of the process.

    An epoch's draws then do not depend on earlier epochs, so a resumed run draws the same as an uninterrupted one.

    Args:
        seed: of the run.
        randomizables: objects with MONAI's ``set_random_state``, or datasets whose ``transform`` has it. One with
            ``shared_draws`` is seeded alike in all processes, as :class:`sspformer.data.DeviceLoader` is.
        same_every_epoch: draw the same in each epoch, for validation; leaves the global sources alone.
    """

    def __init__(self, seed: int, randomizables: Sequence[Any] = (), same_every_epoch: bool = False) -> None:
        self.seed, self.randomizables, self.same_every_epoch = seed, randomizables, same_every_epoch

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self)

    def __call__(self, engine: Engine) -> None:
        seed = shared = self.seed
        if not self.same_every_epoch:
            seeds = np.random.SeedSequence([self.seed, engine.state.epoch]).generate_state(idist.get_world_size())
            seed, shared = int(seeds[idist.get_rank()]), int(seeds[0])
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
        for randomizable in self.randomizables:
            source = getattr(randomizable, "transform", randomizable)
            if hasattr(source, "set_random_state"):  # MONAI's default prepare_batch draws nothing
                source.set_random_state(seed=shared if getattr(source, "shared_draws", False) else seed)


class GradientClipping:
    """Clip the joint norm of all gradients after each backward pass.

    Args:
        network: whose gradients are clipped.
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
    """A progress bar for each epoch, with the loss of the previous one; only on a terminal, to keep logs readable."""

    def __init__(self) -> None:
        super().__init__(disable=None)

    def attach(self, engine: Engine) -> None:  # type: ignore[override]
        engine.state.train_loss = float("nan")  # in the first epoch
        super().attach(engine, state_attributes=["train_loss"])


class Validation(ValidationHandler):
    """MONAI's ``ValidationHandler``, which here also validates after the last epoch, whatever the interval."""

    def attach(self, engine: Engine) -> None:
        if self.exec_at_start:
            # as epoch 1, because MONAI's evaluator runs twice from epoch 0
            engine.add_event_handler(Events.STARTED, lambda: self.validator.run(1))
        engine.add_event_handler(_every_and_last(self.interval), self)


class FreezeEncoder:
    """Train without the encoder in the first epochs, so that new layers do not disturb pretrained ones.

    Args:
        network: with an ``encoder``, if ``epochs`` is above 0.
        epochs: number of those epochs. If it is that of the whole run, the encoder stays as it was pretrained.
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
