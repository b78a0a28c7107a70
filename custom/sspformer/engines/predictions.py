"""Whole scans: batches with targets, the report of an evaluation and its picture, the table of inference."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.config import KeysCollection
from monai.engines import PrepareBatch, SupervisedTrainer
from monai.transforms import MapTransform
from torch import Tensor

from ..io.tables import write_csv
from ..metrics import score_intervals
from ..pictures import prediction_figure
from .inference import InferenceReport, ResultWriter
from .panels import Panel
from .report import names_of, samples_of, write_scores


class PrepareTargetBatch(PrepareBatch):
    """MONAI's ``prepare_batch`` for whole scans: images ``(B, C, *S)`` and targets, classes ``(B,)`` or numbers
    ``(B, 1)``."""

    def __call__(
        self, batchdata: Mapping[str, Tensor], device: torch.device | str, non_blocking: bool = False, **kwargs
    ) -> tuple[Tensor, Tensor]:
        image, target = (torch.as_tensor(batchdata[key]).as_subclass(Tensor) for key in ("image", "target"))
        target = target.float()[:, None] if target.is_floating_point() else target
        return image.to(device, non_blocking=non_blocking, **kwargs), target.to(device, non_blocking=non_blocking)


def standardize_head(trainer: SupervisedTrainer) -> None:
    """Pass the training scans once through the encoder, for :meth:`sspformer.networks.ScanPredictor.standardize`.

    Args:
        trainer: its network is a :class:`sspformer.networks.ScanPredictor`, perhaps in a parallel wrapper, with the
            weights that it starts from.
    """
    network = getattr(trainer.network, "module", trainer.network)
    pooled, targets = [], []
    with torch.no_grad():
        for batch in trainer.data_loader:
            image, target = trainer.prepare_batch(batch, trainer.state.device)
            pooled.append(trainer.inferer(image, network.pool).cpu())
            targets.append(target.cpu())
    loader = trainer.data_loader
    n = len(loader.dataset) * getattr(loader, "crops_per_scan", 1)  # more would be what fills up the last batch
    target = torch.cat(targets)[:n]
    network.standardize(torch.cat(pooled)[:n], target if target.is_floating_point() else None)


class _Predictions:
    """Collects the predictions of an evaluation; ``finish`` is called at its end."""

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self.finish)

    def reset(self, engine: Engine) -> None:
        self.rows: list[dict[str, Any]] = []

    def collect(self, engine: Engine) -> None:
        batch, outputs = engine.state.batch, samples_of(engine.state.output)
        for item, name, output in zip(samples_of(batch), names_of(batch), outputs, strict=True):
            row = {"name": name, "subject": str(item.get("subject", name))}
            self.rows.append(row | {key: torch.as_tensor(output[key]).detach().cpu() for key in ("label", "pred")})

    def finish(self, engine: Engine) -> None:
        raise NotImplementedError

    def stacked(self) -> tuple[Tensor, Tensor]:
        """Predictions ``(N, C)``, or numbers ``(N,)``, and targets ``(N,)``."""
        pred, target = (torch.stack([row[key] for row in self.rows]) for key in ("pred", "label"))
        return (pred[:, 0], target[:, 0]) if target.ndim == 2 else (pred, target)


class PredictionReport(_Predictions):
    """Writes the predictions of an evaluation and their scores; for the evaluator.

    - ``metrics.csv``: a row for each scan: name, subject, target, prediction, and the probability of each class;
    - ``summary.csv`` and ``summary.json``: each score with its 95 % confidence interval over subjects (bootstrap).

    Args:
        output_dir: where the files go.
        score: :func:`sspformer.metrics.classification_scores` or :func:`sspformer.metrics.regression_scores`.
        class_names: in the order of the network's outputs; empty: numbers.
        settings: what else ``summary.json`` should say, for example the weights.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        score: Callable[[Tensor, Tensor], dict[str, float]],
        class_names: Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory, self.score, self.class_names = Path(output_dir), score, list(class_names or ())
        self.settings = dict(settings or {})

    def finish(self, engine: Engine) -> None:
        subjects = [row["subject"] for row in self.rows]
        scores = score_intervals(self.score, *self.stacked(), subjects)
        summary = [{"metric": name, "n": len(set(subjects)), **values} for name, values in scores.items()]
        rows = [
            {
                "name": row["name"],
                "subject": row["subject"],
                "target": self.class_names[row["label"]] if self.class_names else f"{float(row['label']):.7g}",
                **describe(row["pred"], self.class_names),
            }
            for row in self.rows
        ]
        write_scores(self.directory, rows, summary, self.settings)


class PredictionPanel(_Predictions, Panel):
    """The confusion matrix, or predicted against true numbers, of all scans of an evaluation, see :class:`Panel`.

    Args:
        output_dir, summary_writer: see :class:`Panel`.
        class_names: in the order of the network's outputs; empty: numbers.
        separate: the picture is ``pictures/predictions.png``, of no epoch.
        kwargs: not used; the configs give ``n_images`` to every panel.
    """

    tag = "predictions"

    def __init__(
        self,
        output_dir: str,
        class_names: Sequence[str] | None = None,
        separate: bool = False,
        summary_writer: Any = None,
        **kwargs,
    ) -> None:
        super().__init__(output_dir, separate=separate, summary_writer=summary_writer)
        self.class_names = list(class_names or ())

    def finish(self, engine: Engine) -> None:
        figure = prediction_figure(*self.stacked(), self.class_names)
        if self.separate:
            self._save(figure, self.tag)
        else:
            self._publish(figure, engine)


class SavePredictiond(MapTransform, ResultWriter):
    """Writes the prediction for a scan to ``predictions/<name>.csv``; last of the postprocessing.

    Args:
        keys: the prediction, one key: probabilities ``(C,)`` or a number ``(1,)``.
        output_dir: gets the folder.
        class_names: in the order of the network's outputs; empty: numbers.
    """

    def __init__(
        self, keys: KeysCollection, output_dir: str | os.PathLike, class_names: Sequence[str] | None = None
    ) -> None:
        super().__init__(keys)
        self.directory, self.class_names = Path(output_dir) / "predictions", list(class_names or ())

    def path_of(self, item: Mapping[str, Any]) -> Path:
        return self.directory / f"{item['name']}.csv"

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        for key in self.key_iterator(data):
            write_csv(self.path_of(data), [describe(data[key], self.class_names)])
        return dict(data)


class PredictionTable(InferenceReport):
    """:class:`InferenceReport` of whole scans: its table is ``predictions.csv``, with what was predicted for each scan.

    Args:
        output_dir: gets ``predictions.csv``.
        writers: see :func:`mark_done`; the first is a :class:`SavePredictiond`.
    """

    def __init__(self, output_dir: str | os.PathLike, writers: Sequence[SavePredictiond]) -> None:
        super().__init__(output_dir, writers)
        self.path = Path(output_dir) / "predictions.csv"
        columns = describe(torch.ones(max(1, len(writers[0].class_names))), writers[0].class_names)
        self.COLUMNS = ("name", *columns, "status", "seconds", "reason", "source")

    def add(self, name: str, status: str, seconds: float | str = "", reason: str = "") -> None:
        predicted = {}
        if status != "failed":
            with self.writers[0].path_of({"name": name}).open(newline="") as file:
                predicted = next(csv.DictReader(file))
        super().add(name, status, seconds, reason, **predicted)


def describe(pred: Tensor, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """Columns for a prediction: the number, or the class and the probability of each."""
    values = torch.as_tensor(pred).flatten().tolist()
    if not class_names:
        return {"prediction": float(f"{values[0]:.7g}")}
    probabilities = {f"probability of {name}": round(p, 4) for name, p in zip(class_names, values, strict=True)}
    return {"prediction": class_names[values.index(max(values))]} | probabilities
