"""Metrics of segmentation and restoration, and their summary over subjects."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from ignite.metrics import EpochMetric
from monai.handlers import MeanSquaredError, PeakSignalToNoiseRatio, from_engine
from monai.handlers.ignite_metric import IgniteMetricHandler
from monai.metrics import HausdorffDistanceMetric, PSNRMetric, SSIMMetric, SurfaceDiceMetric, compute_roc_auc
from monai.metrics.regression import compute_ssim_and_cs
from monai.networks import one_hot
from scipy.stats import bootstrap
from torch import Tensor

from . import kspace
from .intensity import above_mean

__all__ = [
    "FittedSSIM",
    "ForegroundPSNR",
    "ForegroundSSIM",
    "HausdorffDistance95",
    "SurfaceDice",
    "bootstrap_interval",
    "classification_scores",
    "mean_of_finite",
    "reconstruction_metrics",
    "regression_scores",
    "restoration_metrics",
    "scan_metrics",
    "score_intervals",
    "summarize",
    "surface_metrics",
]


class _OfLabelMaps:
    """Lets a surface metric take label maps ``(B, 1, *S)``, MetaTensors, and measure in mm.

    Only the box around the labels becomes one-hot, because 17 structures of a 1 mm head would take gigabytes. A
    structure that the true map lacks has no score (nan), whatever was predicted, as in MONAI's ``DiceMetric``.
    """

    num_classes: int
    of_missed: float  # score of a structure that was not predicted, see sspformer.compat

    def _compute_tensor(self, y_pred: Tensor, y: Tensor, **kwargs) -> Tensor:
        spacing = kspace.spacing_of(y[0])
        if spacing is None:
            raise ValueError("the true label map is a plain tensor without an affine, so distances in mm are unknown.")
        maps = [torch.as_tensor(labels).as_subclass(Tensor).cpu() for labels in (y_pred, y)]  # as KD-trees need it
        voxels = torch.stack(maps).amax(dim=(0, 1, 2)).nonzero()
        if len(voxels):
            box = [slice(low, high + 1) for low, high in zip(voxels.amin(0).tolist(), voxels.amax(0).tolist())]
            maps = [labels[(..., *box)] for labels in maps]
        pred, true = (one_hot(labels, self.num_classes, dtype=torch.uint8) for labels in maps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about absent and missed structures, handled below
            scores = super()._compute_tensor(pred, true, spacing=spacing.tolist())  # type: ignore[misc]
        is_there, is_predicted = (labels[:, 1:].flatten(2).amax(dim=2) > 0 for labels in (true, pred))
        scores = scores.masked_fill(is_there & ~is_predicted, self.of_missed)
        return scores.masked_fill(~is_there, torch.nan)


class SurfaceDice(_OfLabelMaps, SurfaceDiceMetric):
    """MONAI's ``SurfaceDiceMetric`` for label maps: the share of both surfaces within ``tolerance`` of the other.

    Args:
        num_classes: with the background, which has no score.
        tolerance: in mm, 0 or more.
    """

    of_missed = 0.0

    def __init__(self, num_classes: int, tolerance: float) -> None:
        super().__init__([tolerance] * (num_classes - 1), use_subvoxels=True)
        self.num_classes = num_classes


class HausdorffDistance95(_OfLabelMaps, HausdorffDistanceMetric):
    """MONAI's ``HausdorffDistanceMetric`` for label maps, 95th percentile, in mm.

    It is infinite for a structure that was not predicted at all.

    Args:
        num_classes: with the background, which has no score.
    """

    of_missed = torch.inf

    def __init__(self, num_classes: int) -> None:
        super().__init__(percentile=95)
        self.num_classes = num_classes


class ForegroundPSNR(PSNRMetric):
    """MONAI's ``PSNRMetric`` over the voxels brighter than the mean of the true image, because air is easy to restore.

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
    """MONAI's ``SSIMMetric`` with a window that fits thin slabs.

    Along an axis with fewer voxels than ``win_size``, the window has the largest odd number of them.

    Args:
        spatial_dims: 2 or 3.
        data_range: the intensity range.
        kwargs: of ``SSIMMetric``.
    """

    def __init__(self, spatial_dims: int = 3, data_range: float = 1.0, **kwargs) -> None:
        super().__init__(spatial_dims, data_range, **kwargs)

    def ssim_map(self, y_pred: Tensor, y: Tensor) -> tuple[Tensor, list[int]]:
        """SSIM wherever the whole window fits, ``(B, C, *s)``, and the sides of the window."""
        sides = [min(size, side - 1 + side % 2) for size, side in zip(self.kernel_size, y.shape[2:])]
        window = {"kernel_type": self.kernel_type, "kernel_size": sides, "kernel_sigma": self.kernel_sigma}
        ssim, _ = compute_ssim_and_cs(
            y_pred, y, self.spatial_dims, data_range=self.data_range, k1=self.k1, k2=self.k2, **window
        )
        return ssim, sides

    def _compute_metric(self, y_pred: Tensor, y: Tensor) -> Tensor:
        return self.ssim_map(y_pred, y)[0].flatten(1).mean(dim=1, keepdim=True)


class ForegroundSSIM(FittedSSIM):
    """:class:`FittedSSIM`, averaged over the voxels brighter than the mean of the true image."""

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


def reconstruction_metrics(spatial_dims: int = 3) -> dict[str, IgniteMetricHandler]:
    """Scores of pretraining, of the output of :class:`sspformer.engines.Reconstruct`; for an evaluator, whose key
    metric is the first. Intensity range 1.

    ``masked_error`` is the mean squared error of the masked patches, ``high_frequency_error`` that of the quarter of
    them with the highest energy, ``mean_prediction_error`` that of a network that has learned nothing. ``psnr`` is of
    the masked patches, ``ssim`` (window of 7 voxels) of the whole reconstruction.

    Args:
        spatial_dims: 2 or 3.
    """

    def mean_squared_error(pred: str, true: str) -> MeanSquaredError:
        return MeanSquaredError(output_transform=from_engine([pred, true]))

    ssim = SSIMMetric(spatial_dims, data_range=1.0, win_size=7)
    return {
        "masked_error": mean_squared_error("pred_masked", "true_masked"),
        "high_frequency_error": mean_squared_error("pred_high", "true_high"),
        "mean_prediction_error": mean_squared_error("mean_masked", "true_masked"),
        "psnr": PeakSignalToNoiseRatio(1.0, output_transform=from_engine(["pred_masked", "true_masked"])),
        "ssim": IgniteMetricHandler(ssim, output_transform=from_engine(["reconstruction", "clean"])),
    }


def surface_metrics(num_classes: int, tolerance: float) -> dict[str, IgniteMetricHandler]:
    """:class:`SurfaceDice` and :class:`HausdorffDistance95` of ``pred`` against ``label``, for an evaluator.

    Args:
        num_classes: with the background, which has no score.
        tolerance: of the surface Dice in mm, 0 or more.
    """
    metrics = {"surface_dice": SurfaceDice(num_classes, tolerance), "hd95": HausdorffDistance95(num_classes)}
    return {
        name: IgniteMetricHandler(metric, output_transform=from_engine(["pred", "label"]))
        for name, metric in metrics.items()
    }


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


def bootstrap_interval(scores: np.ndarray, n_resamples: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """95 % confidence interval of the mean over subjects, percentile bootstrap (Efron 1979); nan for fewer than two.

    Args:
        scores: one number a subject, ``(N,)``.
        n_resamples: draws of N subjects with replacement.
        seed: of the draws.
    """
    if len(scores) < 2:
        return np.nan, np.nan
    options = {"n_resamples": n_resamples, "method": "percentile", "rng": np.random.default_rng(seed)}
    interval = bootstrap((scores,), np.mean, **options).confidence_interval
    return float(interval.low), float(interval.high)


def _mean_of_subjects(scores: np.ndarray, subjects: Sequence[str]) -> np.ndarray:
    """Scores of scans to those of subjects: the mean of what is finite of theirs, else nan."""
    order = list(dict.fromkeys(subjects))
    of_each = [scores[[of == subject for of in subjects]] for subject in order]
    return np.array([mean_of_finite(own[None])[0] for own in of_each])


def mean_of_finite(scores: np.ndarray) -> np.ndarray:
    """Mean of the finite scores of each row, ``(N, M)`` to ``(N,)``; nan for a row without any."""
    finite = np.where(np.isfinite(scores), scores, np.nan)
    counts = np.isfinite(scores).sum(axis=1)
    return np.divide(np.nansum(finite, axis=1), counts, out=np.full(len(scores), np.nan), where=counts > 0)


def classification_scores(pred: Tensor, target: Tensor) -> dict[str, float]:
    """Balanced accuracy (mean over the classes of the share that is found), accuracy and AUC (mean over the classes,
    each against all others) of the classes that occur; nan where nothing can be said.

    Args:
        pred: probabilities ``(N, C)``.
        target: classes ``(N,)``.
    """
    right = (pred.argmax(dim=1) == target).double()
    classes = target.unique().tolist()
    areas = [compute_roc_auc(pred[:, c], target == c) for c in classes] if len(classes) > 1 else [np.nan]
    return {
        "balanced_accuracy": float(np.mean([right[target == c].mean() for c in classes])),
        "accuracy": float(right.mean()),
        "auc": float(np.mean(areas)),
    }


def regression_scores(pred: Tensor, target: Tensor) -> dict[str, float]:
    """Coefficient of determination R2 (nan where all targets are the same) and mean absolute error.

    Args:
        pred: numbers, ``(N,)`` or ``(N, 1)``.
        target: of the same shape.
    """
    pred, target = pred.double(), target.double()
    spread = (target - target.mean()).square().sum()
    return {
        "r2": float(1 - (target - pred).square().sum() / spread) if spread > 0 else np.nan,
        "mae": float((target - pred).abs().mean()),
    }


def scan_metrics(score: Callable[[Tensor, Tensor], dict[str, float]], names: Sequence[str]) -> dict[str, EpochMetric]:
    """Metrics of whole scans for an evaluator, whose key metric is the first.

    Args:
        score: :func:`classification_scores` or :func:`regression_scores`.
        names: of the scores to take.
    """

    def metric(name: str) -> EpochMetric:
        return EpochMetric(
            lambda pred, target: score(pred, target)[name],
            output_transform=from_engine(["pred", "label"]),
            check_compute_fn=False,
        )

    return {name: metric(name) for name in names}


def score_intervals(
    score: Callable[[Tensor, Tensor], dict[str, float]],
    pred: Tensor,
    target: Tensor,
    subjects: Sequence[str],
    n_resamples: int = 2000,
) -> dict[str, dict[str, float]]:
    """Scores with 95 % confidence intervals: percentile bootstrap over subjects, who bring all their scans.

    Args:
        score: see :func:`scan_metrics`.
        pred, target: of N scans, as ``score`` takes them.
        subjects: whose scan each is.
        n_resamples: draws of subjects with replacement.

    Returns:
        name to ``value``, ``ci_low`` and ``ci_high``; the interval of one subject is nan.
    """
    of_subject: dict[str, list[int]] = {}
    for i, subject in enumerate(subjects):
        of_subject.setdefault(subject, []).append(i)
    scans, n = list(of_subject.values()), len(of_subject)
    draws = np.random.default_rng(0).integers(n, size=(n_resamples if n > 1 else 0, n))
    resampled = []
    for drawn in draws:  # scipy's bootstrap has no interval where the score of one draw is nan, such as without a class
        index = [i for subject in drawn for i in scans[subject]]
        resampled.append(score(pred[index], target[index]))
    intervals = {}
    for name, value in score(pred, target).items():
        values = np.array([scores[name] for scores in resampled] or [np.nan])
        finite = values[np.isfinite(values)]
        low, high = np.quantile(finite, [0.025, 0.975]) if len(finite) else (np.nan, np.nan)
        intervals[name] = {"value": value, "ci_low": float(low), "ci_high": float(high)}
    return intervals
