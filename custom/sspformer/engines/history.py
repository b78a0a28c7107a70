"""The history of a training: a table and curves."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events

from ..io.tables import write_csv
from ..pictures import curves

logger = logging.getLogger("sspformer")


class History:
    """Writes one row for each epoch to ``history.csv``, and its curves to ``pictures/curves.png``; for the trainer.

    The training loss is summed on the device and read once in each epoch. A resumed run drops the rows of the epochs
    that it repeats.

    Args:
        output_dir: where the files go.
        evaluator: its metrics join the row of an epoch in which it ran.
        optimizer: the learning rate of its first group, of :func:`layer_decay_groups` the decoder, joins the row.
        attributes: name to function without arguments, for more columns (such as beta).
        summary_writer: TensorBoard writer that gets the columns as scalars too, or None.
    """

    def __init__(
        self,
        output_dir: str,
        evaluator: Engine | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        attributes: Mapping[str, Any] | None = None,
        summary_writer=None,
    ) -> None:
        self.directory = Path(output_dir)
        self.evaluator = evaluator
        self.attributes: dict[str, Any] = {}
        if optimizer is not None:
            self.attributes["learning_rate"] = lambda: optimizer.param_groups[0]["lr"]
        self.attributes.update(attributes or {})
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
        engine.state.output = [{"loss": loss}]  # as MONAI's handlers (MLflow, statistics) expect it

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
                "scans.csv; the checkpoint of the previous epoch is kept."
            )
        self.rows.append(row)
        write_csv(self.path, self.rows)
        if self._validated_epoch == epoch or epoch == engine.state.max_epochs:
            self.draw()
        if self.writer is not None:
            for name, value in row.items():
                if name not in ("epoch", "iteration"):
                    self.writer.add_scalar(name, value, epoch)
            self.writer.flush()
        message = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "epoch")
        logger.info(f"epoch {epoch}/{engine.state.max_epochs}: {message}")

    def draw(self) -> None:
        pictures = self.directory / "pictures"
        pictures.mkdir(parents=True, exist_ok=True)
        curves(self.rows).savefig(pictures / "curves.png", dpi=100)


def _number(text: str) -> float:
    return int(text) if text.isdigit() else float(text)
