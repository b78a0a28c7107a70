"""Pictures of what pretraining does: panels of masks and reconstructions, and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .transforms.masking import high_frequency_map

__all__ = ["reconstruction_panel", "curves", "figure_to_array"]

PANEL_COLUMNS = ("clean", "input with noise", "high-frequency map", "masked", "reconstruction", "error x 2")


def reconstruction_panel(output: Mapping, n_images: int = 4, titles: Sequence[str] | None = None) -> Figure:
    """One row a sample: clean, noisy input, high-frequency map, mask, reconstruction, absolute error.

    Args:
        output: of :class:`sspformer.pretraining.Reconstruct`; images in [0, 1]. Of 3D images the middle slice along the
            last axis (axial after ``Orientationd("RAS")``) is shown, of several channels the first.
        n_images: rows at the most.
        titles: a name for each row.
    """
    target = output["label"]
    detail = high_frequency_map(target["image"], target["spacing"])
    hidden = torch.where(output["voxel_mask"], torch.full_like(target["noisy"], torch.nan), target["noisy"])
    error = (output["reconstruction"] - output["clean"]).abs()
    columns = [output["clean"], target["noisy"], detail, hidden, output["reconstruction"], error]
    limits = [1.0, 1.0, None, 1.0, 1.0, 0.5]
    rows = min(n_images, output["clean"].shape[0])

    figure = Figure(figsize=(2.2 * len(columns), 2.2 * rows + 0.3), layout="constrained", facecolor="white")
    axes = np.atleast_2d(figure.subplots(rows, len(columns)))
    colors = matplotlib.colormaps["gray"].with_extremes(bad="#40507a")  # hidden patches
    for row in range(rows):
        for column, (name, volume, limit) in enumerate(zip(PANEL_COLUMNS, columns, limits)):
            picture = _slice(volume[row])
            axis = axes[row, column]
            shown = limit or float(np.quantile(picture, 0.995)) or 1.0
            axis.imshow(picture, cmap="magma" if name.startswith(("high", "error")) else colors, vmin=0, vmax=shown)
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(name, fontsize=9)
        if titles is not None:
            axes[row, 0].set_ylabel(titles[row], fontsize=7)
    return figure


def _slice(image: Tensor) -> np.ndarray:
    """First channel of ``(C, *S)``; the middle axial slice, right of the person at the left of the picture, front
    up."""
    picture = image[0].detach().float().cpu().numpy()
    if picture.ndim == 3:
        picture = picture[..., picture.shape[-1] // 2]
    return np.rot90(picture)


def curves(history: Sequence[Mapping[str, float]]) -> Figure:
    """Training loss, validation errors and image quality over epochs, from the rows of ``history.csv``."""
    panels = [
        ("mean squared error", ["train_loss", "masked_error", "high_frequency_error", "mean_prediction_error"]),
        ("PSNR of masked patches, dB", ["psnr"]),
        ("SSIM of the reconstruction", ["ssim"]),
    ]
    figure = Figure(figsize=(12, 3.4), layout="constrained", facecolor="white")
    for axis, (title, names) in zip(figure.subplots(1, len(panels)), panels):
        for name in names:
            points = [(row["epoch"], row[name]) for row in history if row.get(name) is not None]
            if points:
                axis.plot(
                    *zip(*points), label=name.replace("_", " "), linestyle=":" if name.startswith("mean") else "-"
                )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if len(names) > 1:
            axis.set_yscale("log")
            axis.legend(fontsize=8)
    return figure


def figure_to_array(figure: Figure, dpi: int = 100) -> np.ndarray:
    """The figure as RGB ``(H, W, 3)``, uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
