"""Ignite handlers that MONAI does not have: seeds for each epoch, gradient clipping, checkpoints that survive a kill,
pictures and curves."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
import random
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import CallableEventWithFilter, Engine, Events
from ignite.handlers.tqdm_logger import ProgressBar
from monai.engines.utils import IterationEvents
from monai.handlers import CheckpointLoader, MLFlowHandler, ValidationHandler
from monai.utils import str2bool

from .files import replacing
from .transforms.masking import MaskSampler
from .visualize import curves, figure_to_array, reconstruction_panel

__all__ = [
    "FreezeEncoder",
    "GradientClipping",
    "History",
    "LoadCheckpoint",
    "Progress",
    "ReconstructionPanel",
    "SaveBestModel",
    "SaveCheckpoint",
    "SaveEncoder",
    "SeedEpoch",
    "Validation",
    "close_tracking",
    "errors_last",
    "find_checkpoint",
    "log_config",
    "save_atomically",
    "save_network",
]

logger = logging.getLogger("sspformer")


def save_atomically(content: Any, path: str | os.PathLike) -> None:
    """``torch.save``: a kill leaves the old file or the new one, never half of one."""
    with replacing(path) as part:
        torch.save(content, part)


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


class LoadCheckpoint(CheckpointLoader):
    """MONAI's ``CheckpointLoader`` that restores the trainer's own state (epoch and iteration) as well."""

    def __call__(self, engine: Engine) -> None:
        self.load_dict = {**self.load_dict, "trainer": engine}
        super().__call__(engine)
        if engine.state.epoch >= engine.state.max_epochs:
            logger.info(f"this run is complete: {engine.state.epoch} of {engine.state.max_epochs} epochs are done")


def _every_and_last(interval: int) -> CallableEventWithFilter:
    """The end of every so many epochs, and of the last one whatever the interval."""
    return Events.EPOCH_COMPLETED(
        event_filter=lambda engine, epoch: epoch % interval == 0 or epoch == engine.state.max_epochs
    )


class Validation(ValidationHandler):
    """MONAI's ``ValidationHandler`` that validates after the last epoch as well, whatever the interval."""

    def attach(self, engine: Engine) -> None:
        if self.exec_at_start:
            # epoch 1, as MONAI's evaluator runs twice from epoch 0
            engine.add_event_handler(Events.STARTED, lambda: self.validator.run(1))
        engine.add_event_handler(_every_and_last(self.interval), self)


class SaveCheckpoint:
    """Write the whole state of the training after each epoch, atomically, to one file that :class:`LoadCheckpoint`
    reads.

    MONAI's ``CheckpointSaver`` writes in place: a kill at the wrong moment would leave nothing to resume from.

    Args:
        path: of the file.
        save_dict: name to object with ``state_dict``; the trainer's own state joins them.
        interval: epochs between two writes; the last epoch is always written.
    """

    def __init__(self, path: str, save_dict: Mapping[str, Any], interval: int = 1) -> None:
        self.path, self.save_dict, self.interval = path, save_dict, interval

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(_every_and_last(self.interval), self)

    def __call__(self, engine: Engine) -> None:
        objects = {**self.save_dict, "trainer": engine}
        # without a parallel wrapper, so that one process can go on from what several wrote, and the other way round
        save_atomically({name: getattr(obj, "module", obj).state_dict() for name, obj in objects.items()}, self.path)


class SaveEncoder:
    """Write the encoder alone, a plain state dict that loads with ``weights_only=True``, as often as checkpoints.

    Args:
        network: the masked autoencoder.
        path: of the file, usually ``models/pretrained/encoder.pt``.
        interval: epochs between two writes; the last epoch is always written.
    """

    def __init__(self, network: torch.nn.Module, path: str, interval: int = 1) -> None:
        self.network, self.path, self.interval = network, path, interval

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self)
        engine.add_event_handler(Events.COMPLETED, self)  # also of a run that was complete when it was resumed

    def __call__(self, engine: Engine) -> None:
        if engine.state.iteration > 0:
            save_network(getattr(self.network, "module", self.network).encoder, self.path)


class SaveBestModel:
    """Write the network's plain state dict when a validation is the best so far.

    For the evaluator; where nothing is held out for validation, for the trainer, whose end it then waits for. Of equal
    values the later counts; a value that is not finite, as of labels that no validation scan has, counts as none, and
    as long as there are no others the last weights are kept. Its own state, the best value, belongs into the
    checkpoint.

    Args:
        network: whose weights.
        path: of the file, usually ``models/model.pt``.
    """

    def __init__(self, network: torch.nn.Module, path: str) -> None:
        self.network, self.path = network, Path(path)
        self.best: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        best = state["best"]
        self.best = best if best is not None and np.isfinite(best) else None

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        name = engine.state.key_metric_name
        value = None if name is None else float(engine.state.metrics[name])
        finite = value is not None and np.isfinite(value)
        better = self.best is None or (finite and not engine.metric_cmp_fn(self.best, value))
        if better or not self.path.is_file():
            self.best = value if finite else None
            save_network(self.network, self.path)
            logger.info(f"weights written to {self.path}" + ("" if name is None else f": {name} {value:.4g}"))


def save_network(network: torch.nn.Module, path: str | os.PathLike) -> None:
    """The plain state dict of a network, without the prefix of a parallel wrapper, on the CPU, atomically."""
    state = getattr(network, "module", network).state_dict()
    save_atomically({name: value.detach().cpu() for name, value in state.items()}, path)


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


class History:
    """One row an epoch in ``history.csv``, and curves of it in ``pictures/curves.png``.

    The training loss is summed on the device and read once an epoch. A resumed run drops the rows of epochs that it
    repeats.

    Args:
        output_dir: where the files go.
        evaluator: whose metrics join the row, if it ran in this epoch.
        attributes: name to function without arguments, for more columns (learning rate, beta).
        summary_writer: TensorBoard writer that gets the columns as scalars too, or None.
    """

    def __init__(
        self,
        output_dir: str,
        evaluator: Engine | None = None,
        attributes: Mapping[str, Any] | None = None,
        summary_writer=None,
    ) -> None:
        self.directory = Path(output_dir)
        self.evaluator = evaluator
        self.attributes = dict(attributes or {})
        self.writer = summary_writer
        self.rows: list[dict[str, float]] = []
        self._validated_epoch = 0

    @property
    def path(self) -> Path:
        return self.directory / "history.csv"

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.load)
        engine.add_event_handler(Events.EPOCH_STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.accumulate)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        if self.evaluator is not None:
            self.evaluator.add_event_handler(Events.COMPLETED, self.validated, engine)

    def load(self, engine: Engine) -> None:
        self.rows = []
        if engine.state.epoch > 0 and self.path.is_file():
            with self.path.open(newline="") as file:
                rows = [{name: _number(v) for name, v in row.items() if v} for row in csv.DictReader(file)]
            self.rows = [row for row in rows if row["epoch"] <= engine.state.epoch]

    def reset(self, engine: Engine) -> None:
        self._loss: torch.Tensor | float = 0.0
        self._batches = 0

    def accumulate(self, engine: Engine) -> None:
        loss = engine.state.output["loss"].detach()
        self._loss = self._loss + loss
        self._batches += 1
        engine.state.output = [{"loss": loss}]  # where MONAI's handlers (MLflow, statistics) look for it, undecollated

    def validated(self, evaluator: Engine, trainer: Engine) -> None:
        self._validated_epoch = trainer.state.epoch

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        loss = float(self._loss) / max(self._batches, 1)
        engine.state.train_loss = loss
        row: dict[str, float] = {"epoch": epoch, "iteration": engine.state.iteration, "train_loss": loss}
        row.update({name: float(value()) for name, value in self.attributes.items()})
        if self.evaluator is not None and self._validated_epoch == epoch:
            row.update({name: float(value) for name, value in self.evaluator.state.metrics.items()})
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} in epoch {epoch}: lower the learning rate, or look at the scans of this run in "
                "scans.csv; the checkpoint of the epoch before is kept."
            )
        self.rows.append(row)
        self.write()
        if self._validated_epoch == epoch or epoch == engine.state.max_epochs:
            self.draw()
        if self.writer is not None:
            for name, value in row.items():
                if name not in ("epoch", "iteration"):
                    self.writer.add_scalar(name, value, epoch)
            self.writer.flush()
        message = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
        logger.info(f"epoch {epoch}/{engine.state.max_epochs}: {message}")

    def write(self) -> None:
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with replacing(self.path) as part, part.open("w", newline="") as file:
            table = csv.DictWriter(file, names, restval="")
            table.writeheader()
            table.writerows(self.rows)

    def draw(self) -> None:
        pictures = self.directory / "pictures"
        pictures.mkdir(parents=True, exist_ok=True)
        curves(self.rows).savefig(pictures / "curves.png", dpi=100)


def _number(text: str) -> float:
    return int(text) if text.isdigit() else float(text)


class ReconstructionPanel:
    """A PNG panel a validation, ``pictures/epoch_0010.png``, and the same picture in TensorBoard; for the evaluator.

    Args:
        output_dir: the panels go to its ``pictures``.
        n_images: rows at the most, taken from the first batch.
        mask: what draws the masks of the training, to show one of them as well; or None.
        summary_writer: TensorBoard writer, or None.
    """

    def __init__(
        self, output_dir: str, n_images: int = 4, mask: MaskSampler | None = None, summary_writer=None
    ) -> None:
        self.directory = Path(output_dir) / "pictures"
        self.n_images = n_images
        self.mask = mask
        self.writer = summary_writer

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=1), self)

    def __call__(self, engine: Engine) -> None:
        epoch = engine.state.epoch  # MONAI's ValidationHandler hands over the trainer's
        figure = reconstruction_panel(engine.state.output, self.n_images, engine.state.batch.get("name"), self.mask)
        self.directory.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.directory / f"epoch_{epoch:04d}.png", dpi=100)
        if self.writer is not None:
            self.writer.add_image("reconstruction", figure_to_array(figure), epoch, dataformats="HWC")


#: how the messages of errors begin that MONAI raises from the one that tells what to do
WRAPPERS = ("Failed to evaluate", "Failed to instantiate component", "applying transform", "'query key")


def errors_last() -> None:
    """Let Python end an error's traceback with what tells the user what to do: MONAI wraps it several times."""
    if getattr(sys.excepthook, "errors_last", False):
        return
    before = sys.excepthook

    def hook(kind, error, trace) -> None:
        before(kind, error, trace)
        while error.__cause__ is not None and str(error).startswith(WRAPPERS):
            error = error.__cause__
        said = str(error)
        if "Original Traceback" in said:  # of a DataLoader's worker: its errors arrive as text
            lines = re.findall(r"^[\w.]+: (.+)", said, re.MULTILINE)
            said = next((line for line in reversed(lines) if not line.startswith(WRAPPERS)), said)
        if isinstance(error, Exception):  # and no KeyboardInterrupt
            print(f"\nerror: {said}", file=sys.stderr)

    hook.errors_last = True
    sys.excepthook = hook


def log_config(handlers: Sequence[Any]) -> None:
    """Let ``--tracking mlflow`` log the run's config with ``--output_dir`` given too; before the run, whose handlers
    these are.

    MONAI 1.6 writes it into ``output_dir``, and then looks for a file named ``/path + '/config_20261123_120000.json'``,
    because it takes every ``output_dir`` for an expression.
    """
    for handler in handlers:
        if isinstance(handler, MLFlowHandler):
            paths = [re.sub(r" \+ '(/config_\w+\.json)'$", r"\1", path or "") for path in handler.artifacts]
            handler.artifacts = tuple(paths)


def close_tracking(handlers: Sequence[Any]) -> None:
    """End what ``--tracking mlflow`` has begun for a validator without a trainer, which MONAI leaves open."""
    for handler in handlers:
        if isinstance(handler, MLFlowHandler):
            handler.close()


def find_checkpoint(path: str, resume: bool, settings: Mapping[str, Any]) -> str | None:
    """The checkpoint to resume from, or None to start afresh; writes ``settings`` beside it for the next time.

    Args:
        path: of the checkpoint in the output folder.
        resume: False: start afresh even if there is one, which is kept as ``*_previous.pt``.
        settings: what must be the same for a run to be resumed (data, seed, epochs, ...): what JSON holds, and objects,
            whose plain attributes are compared.

    Raises:
        ValueError: if the checkpoint belongs to a run with other settings, naming them.
    """
    record = Path(path).with_suffix(".json")
    settings = json.loads(json.dumps(settings, default=_attributes))
    resume = str2bool(resume)  # the command line gives "false" as a string
    if resume and os.path.isfile(path):
        before = json.loads(record.read_text()) if record.is_file() else settings
        changed = [name for name in settings if before.get(name) != settings[name]]
        if changed:
            details = [f"{name}: {_short(before.get(name))} then, {_short(settings[name])} now" for name in changed]
            raise ValueError(
                f"{path} belongs to a run with other settings ({'; '.join(details)}). Give this run an --output_dir "
                "of its own, or pass --resume false to start afresh in this one."
            )
        logger.info(f"going on from {path}; pass --resume false to start afresh")
        return path
    with contextlib.suppress(FileNotFoundError):  # there is none, or another process of this run has renamed it
        os.replace(path, record.with_name(record.stem + "_previous.pt"))
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(settings, indent=4) + "\n")
    return None


def _attributes(settings: Any) -> dict[str, Any]:
    plain = (bool, int, float, str, tuple, list, type(None))
    return {k: v for k, v in vars(settings).items() if isinstance(v, plain) and not k.startswith("_")}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
