"""Scores of segmentation and restoration: metrics in mm and over the foreground, a report with a row for each subject
and confidence intervals, and panels."""

from __future__ import annotations

import csv
import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from matplotlib.figure import Figure
from monai.data import MetaTensor
from monai.handlers import from_engine
from monai.handlers.ignite_metric import IgniteMetricHandler
from monai.metrics import HausdorffDistanceMetric, PSNRMetric, SSIMMetric, SurfaceDiceMetric
from monai.metrics.regression import compute_ssim_and_cs
from monai.networks import one_hot
from torch import Tensor

from . import kspace
from .pretraining import above_mean
from .visualize import figure_to_array, restoration_panel, segmentation_panel

__all__ = [
    "EvaluationReport",
    "FittedSSIM",
    "ForegroundPSNR",
    "ForegroundSSIM",
    "HausdorffDistance95",
    "RestorationPanel",
    "SegmentationPanel",
    "SurfaceDice",
    "bootstrap_interval",
    "class_names",
    "restoration_metrics",
    "summarize",
]

logger = logging.getLogger("sspformer")


class _OfLabelMaps:
    """Lets a metric of surfaces take label maps ``(B, 1, *S)``, of which MetaTensors, and measure in mm.

    Only the box around both maps' labels becomes one-hot: 17 structures of a 1 mm head would take gigabytes. A
    structure that the true map lacks has no score (nan), whatever was predicted, as in MONAI's ``DiceMetric``.
    """

    num_classes: int
    of_missed: float  # of a structure that is there and was not predicted: MONAI's quantile of infinities is nan

    def _compute_tensor(self, y_pred: Tensor, y: Tensor, **kwargs) -> Tensor:
        spacing = kspace.spacing_of(y[0])
        if spacing is None:
            raise ValueError("the true label map is a plain tensor without an affine, so distances in mm are unknown.")
        maps = [torch.as_tensor(labels).as_subclass(Tensor).cpu() for labels in (y_pred, y)]  # KD-trees are there
        voxels = torch.stack(maps).amax(dim=(0, 1, 2)).nonzero()
        if len(voxels):
            box = [slice(low, high + 1) for low, high in zip(voxels.amin(0).tolist(), voxels.amax(0).tolist())]
            maps = [labels[(..., *box)] for labels in maps]
        pred, true = (one_hot(labels, self.num_classes, dtype=torch.uint8) for labels in maps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of structures that are absent or missed: see below
            scores = super()._compute_tensor(pred, true, spacing=spacing.tolist())  # type: ignore[misc]
        is_there, is_predicted = (labels[:, 1:].flatten(2).amax(dim=2) > 0 for labels in (true, pred))
        scores = scores.masked_fill(is_there & ~is_predicted, self.of_missed)
        return scores.masked_fill(~is_there, torch.nan)


class SurfaceDice(_OfLabelMaps, SurfaceDiceMetric):
    """MONAI's ``SurfaceDiceMetric`` of label maps: the share of both surfaces that is at most ``tolerance`` from the
    other.

    Args:
        num_classes: with the background, which has no score.
        tolerance: in mm, 0 or more.
    """

    of_missed = 0.0

    def __init__(self, num_classes: int, tolerance: float) -> None:
        super().__init__([tolerance] * (num_classes - 1), use_subvoxels=True)
        self.num_classes = num_classes


class HausdorffDistance95(_OfLabelMaps, HausdorffDistanceMetric):
    """MONAI's ``HausdorffDistanceMetric`` at the 95th percentile, in mm, of label maps.

    Infinite for a structure that is there and was not predicted at all.

    Args:
        num_classes: with the background, which has no score.
    """

    of_missed = torch.inf

    def __init__(self, num_classes: int) -> None:
        super().__init__(percentile=95)
        self.num_classes = num_classes


class ForegroundPSNR(PSNRMetric):
    """MONAI's ``PSNRMetric`` over the voxels that are brighter than the mean of the true image: air, which is easy to
    restore, does not count.

    Args:
        max_val: the intensity range.
    """

    def __init__(self, max_val: float = 1.0) -> None:
        super().__init__(max_val)

    def _compute_metric(self, y_pred: Tensor, y: Tensor) -> Tensor:
        y_pred, y = (torch.as_tensor(image).as_subclass(Tensor).float() for image in (y_pred, y))
        inside = [above_mean(image) for image in y]
        scores = [
            super(ForegroundPSNR, self)._compute_metric(a[m][None], b[m][None]) for a, b, m in zip(y_pred, y, inside)
        ]
        return torch.cat(scores)


class FittedSSIM(SSIMMetric):
    """MONAI's ``SSIMMetric`` with a window that fits: along an axis with fewer voxels than ``win_size``, such as the
    slices of a thin slab, it is as long as the largest odd number of them.

    Args:
        spatial_dims: 2 or 3.
        data_range: the intensity range.
        kwargs: of ``SSIMMetric``.
    """

    def __init__(self, spatial_dims: int = 3, data_range: float = 1.0, **kwargs) -> None:
        super().__init__(spatial_dims, data_range, **kwargs)

    def ssim_map(self, y_pred: Tensor, y: Tensor) -> tuple[Tensor, list[int]]:
        """A value for each place where the whole window fits, ``(B, C, *s)``, and the sides of the window."""
        sides = [min(size, side - 1 + side % 2) for size, side in zip(self.kernel_size, y.shape[2:])]
        window = {"kernel_type": self.kernel_type, "kernel_size": sides, "kernel_sigma": self.kernel_sigma}
        ssim, _ = compute_ssim_and_cs(
            y_pred, y, self.spatial_dims, data_range=self.data_range, k1=self.k1, k2=self.k2, **window
        )
        return ssim, sides

    def _compute_metric(self, y_pred: Tensor, y: Tensor) -> Tensor:
        return self.ssim_map(y_pred, y)[0].flatten(1).mean(dim=1, keepdim=True)


class ForegroundSSIM(FittedSSIM):
    """:class:`FittedSSIM`, its map averaged over the voxels that are brighter than the mean of the true image."""

    def _compute_metric(self, y_pred: Tensor, y: Tensor) -> Tensor:
        ssim, sides = self.ssim_map(y_pred, y)
        inner = (..., *(slice(size // 2, size // 2 + side) for size, side in zip(sides, ssim.shape[2:])))
        inside = torch.stack([above_mean(image) for image in torch.as_tensor(y).as_subclass(Tensor)])[inner]
        return torch.stack([values[where].mean()[None] for values, where in zip(ssim, inside)])


def restoration_metrics(spatial_dims: int = 3) -> dict[str, IgniteMetricHandler]:
    """PSNR in dB and SSIM (window of 7 voxels) of ``pred`` and of the input, ``degraded``, against ``clean``, over the
    whole scan and over its foreground; for an evaluator, whose key metric is the first, ``psnr``. Intensity range 1.

    Args:
        spatial_dims: 2 or 3.
    """
    metrics = {
        "psnr": lambda: PSNRMetric(max_val=1.0),
        "psnr_foreground": ForegroundPSNR,
        "ssim": lambda: FittedSSIM(spatial_dims, win_size=7),
        "ssim_foreground": lambda: ForegroundSSIM(spatial_dims, win_size=7),
    }
    return {
        name + suffix: IgniteMetricHandler(make_metric(), output_transform=from_engine([key, "clean"]))
        for name, make_metric in metrics.items()
        for suffix, key in (("", "pred"), ("_of_input", "degraded"))
    }


class EvaluationReport:
    """Writes every subject's scores and their summary; for the evaluator, whose metrics keep their details.

    - ``metrics.csv``: a row a subject; of segmentation a row for each structure of each subject, and one for the mean
      over the structures that the true map has. A structure that is not there is left blank; one that was missed has
      Dice 0 and an infinite Hausdorff distance. Of restoration the row says what was drawn to degrade the scan:
      ``sigma``, or ``factor`` along each axis of the network's input (RAS).
    - ``summary.csv`` and ``summary.json``: over subjects, n, mean, its 95 % confidence interval (bootstrap), standard
      deviation, median, and how many scores are infinite, which the other columns leave out.

    Of a metric and the same one ``*_of_input`` there is also the gain. Names of subjects are those of the batch.

    Args:
        output_dir: where the files go.
        class_names: of the structures, without the background, where metrics have a column for each.
        settings: what else ``summary.json`` should say, for example the weights.
        seed: of the bootstrap.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        class_names: Sequence[str] | None = None,
        settings: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        self.directory, self.class_names = Path(output_dir), class_names
        self.settings, self.seed = dict(settings or {}), seed

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.COMPLETED, self)

    def reset(self, engine: Engine) -> None:
        self.names: list[str] = []
        self.subjects: list[str] = []
        self.drawn: list[dict[str, Any]] = []

    def collect(self, engine: Engine) -> None:
        names = _names(engine.state.batch)
        self.names += names
        samples = _samples(engine.state.batch)
        self.subjects += [str(sample.get("subject", name)) for sample, name in zip(samples, names, strict=True)]
        drawn = getattr(engine.prepare_batch, "drawn", {})
        self.drawn += [{key: _as_cell(values[i]) for key, values in drawn.items()} for i in range(len(names))]

    def __call__(self, engine: Engine) -> None:
        details = {name: scores.cpu().double().numpy() for name, scores in engine.state.metric_details.items()}
        for name in [name for name in details if f"{name}_of_input" in details]:
            details[f"{name}_gain"] = details[name] - details[f"{name}_of_input"]
        n_columns = max(scores.shape[1] for scores in details.values())
        structures = [""]
        if n_columns > 1:
            named = list(self.class_names or [f"label {i + 1}" for i in range(n_columns)])
            if len(named) != n_columns:
                raise ValueError(f"class_names has {len(named)} names, but the metrics have {n_columns} structures.")
            structures = ["mean", *named]
            details = {name: np.column_stack([_mean_of_finite(scores), scores]) for name, scores in details.items()}
        key = {"structure": structures} if n_columns > 1 else {}
        rows = [
            {
                "name": name,
                "subject": self.subjects[i],
                **self.drawn[i],
                **{column: values[j] for column, values in key.items()},
                **{name: scores[i, j] for name, scores in details.items()},
            }
            for i, name in enumerate(self.names)
            for j in range(len(structures))
        ]
        summary = [
            {
                "metric": name,
                **{column: values[j] for column, values in key.items()},
                **summarize(scores[:, j], self.seed, self.subjects),
            }
            for name, scores in details.items()
            for j in range(len(structures))
        ]
        self.directory.mkdir(parents=True, exist_ok=True)
        _write_csv(self.directory / "metrics.csv", rows)
        _write_csv(self.directory / "summary.csv", summary)
        counts = {"scans": len(self.names), "subjects": len(set(self.subjects))}
        content = {**self.settings, **counts, "summary": [_without_nan(row) for row in summary]}
        (self.directory / "summary.json").write_text(json.dumps(content, indent=4) + "\n")
        said = ", ".join(f"{count} {what}" for what, count in counts.items())
        logger.info(f"{said} evaluated; scores in {self.directory}\n{_table(summary)}")


def summarize(scores: np.ndarray, seed: int = 0, subjects: Sequence[str] | None = None) -> dict[str, float | int]:
    """Number, mean, 95 % confidence interval of the mean, standard deviation and median of the finite scores of
    subjects, and the number of infinite ones; nan where there are too few.

    Args:
        scores: one number a scan, ``(N,)``.
        seed: of the bootstrap.
        subjects: whose scan each is, who then count once; None: each of another.
    """
    of_subjects = scores if subjects is None else _mean_of_subjects(scores, subjects)
    finite = of_subjects[np.isfinite(of_subjects)]
    low, high = bootstrap_interval(finite, seed=seed)
    enough = len(finite) > 0
    return {
        "n": len(finite),
        "mean": float(finite.mean()) if enough else np.nan,
        "ci_low": low,
        "ci_high": high,
        "std": float(finite.std(ddof=1)) if len(finite) > 1 else np.nan,
        "median": float(np.median(finite)) if enough else np.nan,
        "infinite": int(np.isinf(scores).sum()),
    }


def bootstrap_interval(
    scores: np.ndarray, confidence: float = 0.95, n_resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Confidence interval of the mean over subjects, percentile bootstrap (Efron 1979); nan for fewer than two.

    Args:
        scores: one number a subject, ``(N,)``.
        confidence: between 0 and 1.
        n_resamples: draws of N subjects with replacement.
        seed: of the draws.
    """
    if len(scores) < 2:
        return np.nan, np.nan
    draws = np.random.default_rng(seed).integers(len(scores), size=(n_resamples, len(scores)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(scores[draws].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


def _mean_of_subjects(scores: np.ndarray, subjects: Sequence[str]) -> np.ndarray:
    """Scores of scans to those of subjects: the mean of what is finite of theirs, else nan."""
    order = list(dict.fromkeys(subjects))
    of_each = [scores[[of == subject for of in subjects]] for subject in order]
    return np.array([_mean_of_finite(own[None])[0] for own in of_each])


def _mean_of_finite(scores: np.ndarray) -> np.ndarray:
    finite = np.where(np.isfinite(scores), scores, np.nan)
    counts = np.isfinite(scores).sum(axis=1)
    return np.divide(np.nansum(finite, axis=1), counts, out=np.full(len(scores), np.nan), where=counts > 0)


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows({name: _cell(value) for name, value in row.items()} for row in rows)


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if np.isnan(value) else f"{value:.5g}"


def _as_cell(value: Tensor) -> float | str:
    """A number, or several as ``1x1x2.5``."""
    return value.item() if value.ndim == 0 else "x".join(f"{number:.4g}" for number in value.tolist())


def _without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no nan."""
    return {name: None if isinstance(value, float) and np.isnan(value) else value for name, value in row.items()}


def _table(summary: Sequence[Mapping[str, Any]]) -> str:
    """The summary for the log: a line a structure, or a metric where there are no structures."""
    lines: dict[str, list[str]] = {}
    metrics = list(dict.fromkeys(row["metric"] for row in summary))
    for row in summary:
        text = f"{row['mean']:.4g}"
        if not np.isnan(row["ci_low"]):
            text += f" [{row['ci_low']:.4g}, {row['ci_high']:.4g}]"
        if row["infinite"]:
            text += f" ({row['infinite']} infinite)"
        lines.setdefault(row.get("structure", row["metric"]), []).append(text)
    if "structure" in summary[0]:
        lines = {"": metrics, **lines}
    first = max(map(len, lines))
    widths = [max(map(len, cells)) for cells in zip(*lines.values())]
    return "\n".join(
        "  ".join([name.ljust(first), *(cell.ljust(width) for cell, width in zip(cells, widths))]).rstrip()
        for name, cells in lines.items()
    )


def class_names(bundle_root: str | os.PathLike) -> list[str]:
    """Names of the labels from 1 on, as ``configs/metadata.json`` gives the channels of the network's output.

    ``monai.bundle.load`` leaves ``bundle_root`` at the working directory: where that is no bundle, the one in which
    this package stands is read.
    """
    paths = [Path(root) / "configs" / "metadata.json" for root in (bundle_root, Path(__file__).parents[1])]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"no {paths[0]}: start in the bundle's folder, or say where it is with --bundle_root.")
    metadata = json.loads(path.read_text())
    channels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    return [channels[str(i)] for i in range(1, len(channels))]


class _Panel:
    """Keeps the first samples of an evaluation and draws them at its end."""

    tag: str

    def __init__(self, output_dir: str, n_images: int = 2, separate: bool = False, summary_writer=None) -> None:
        self.directory = Path(output_dir) / "pictures"
        self.n_images, self.separate, self.writer = n_images, separate, summary_writer

    def figure(self, samples: Sequence[Mapping]) -> Figure:
        raise NotImplementedError

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.collect)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def reset(self, engine: Engine) -> None:
        self._samples: list[dict] = []

    def collect(self, engine: Engine) -> None:
        batch = engine.state.batch
        for output, item, name in zip(_samples(engine.state.output), _samples(batch), _names(batch)):
            if len(self._samples) < self.n_images:
                sample = {**{key: output.get(key) for key in ("image", "label", "pred")}, "name": name}
                if not isinstance(sample["image"], MetaTensor) and isinstance(item["image"], MetaTensor):
                    sample["image"] = MetaTensor(sample["image"], affine=item["image"].affine)
                self._samples.append(sample)
                if self.separate:
                    self._save(self.figure(self._samples[-1:]), name)
                    self._samples[-1] = {}

    def __call__(self, engine: Engine) -> None:
        if self.separate or not self._samples:
            return
        epoch = engine.state.epoch  # MONAI's ValidationHandler hands over the trainer's
        figure = self.figure(self._samples)
        self._save(figure, f"epoch_{epoch:04d}")
        if self.writer is not None:
            self.writer.add_image(self.tag, figure_to_array(figure), epoch, dataformats="HWC")
        self._samples = []

    def _save(self, figure: Figure, name: str) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.directory / f"{name}.png", dpi=100)


class SegmentationPanel(_Panel):
    """True and predicted labels of the first samples, a PNG an evaluation, ``pictures/epoch_0010.png``, and the same
    picture in TensorBoard; for the evaluator.

    Args:
        output_dir: the pictures go to its ``pictures``.
        class_names: of the labels from 1 on; None: their numbers.
        n_images: samples at the most.
        separate: a file for each sample, ``pictures/<name>.png``, instead of one for all.
        summary_writer: TensorBoard writer, or None.
    """

    tag = "segmentation"

    def __init__(
        self,
        output_dir: str,
        class_names: Sequence[str] | None = None,
        n_images: int = 2,
        separate: bool = False,
        summary_writer=None,
    ) -> None:
        super().__init__(output_dir, n_images, separate, summary_writer)
        self.class_names = class_names

    def figure(self, samples: Sequence[Mapping]) -> Figure:
        return segmentation_panel(samples, self.class_names)


class RestorationPanel(_Panel):
    """Scans before and after, the truth and the errors of the first samples, a PNG an evaluation; for the evaluator.

    Args:
        output_dir, n_images, separate, summary_writer: as of :class:`SegmentationPanel`.
    """

    tag = "restoration"

    def figure(self, samples: Sequence[Mapping]) -> Figure:
        return restoration_panel(samples)


def _samples(output: Mapping | Sequence[Mapping]) -> list[Mapping]:
    """The samples of an engine's output or batch, decollated or not."""
    if not isinstance(output, Mapping):
        return list(output)
    n = len(output["image"])
    return [{key: _take(value, i) for key, value in output.items()} for i in range(n)]


def _take(value: Any, i: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _take(part, i) for key, part in value.items()}
    return value[i] if isinstance(value, (Tensor, Sequence)) else value


def _names(batch: Mapping | Sequence[Mapping]) -> list[str]:
    return [str(sample.get("name", f"sample_{i}")) for i, sample in enumerate(_samples(batch))]
