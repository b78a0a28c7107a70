"""Metrics of segmentation and restoration, and their summary over subjects."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from monai.handlers import from_engine
from monai.handlers.ignite_metric import IgniteMetricHandler
from monai.metrics import HausdorffDistanceMetric, PSNRMetric, SSIMMetric, SurfaceDiceMetric
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
    "mean_of_finite",
    "restoration_metrics",
    "summarize",
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
    options = {"confidence_level": confidence, "n_resamples": n_resamples, "method": "percentile"}
    interval = bootstrap((scores,), np.mean, **options, rng=np.random.default_rng(seed)).confidence_interval
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
