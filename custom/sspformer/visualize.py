"""Pictures of what pretraining does: panels of masks and reconstructions, and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from .transforms.masking import MaskSampler, high_frequency_map, voxel_mask

__all__ = ["axial_slice", "curves", "figure_to_array", "reconstruction_panel"]


def reconstruction_panel(
    output: Mapping, n_images: int = 4, titles: Sequence[str] | None = None, mask: MaskSampler | None = None
) -> Figure:
    """One row a sample: clean, noisy, high-frequency map, masks, reconstruction, absolute error.

    Args:
        output: of :class:`sspformer.pretraining.Reconstruct`; images in [0, 1]. Of 3D images the middle slice along the
            last axis (axial after ``Orientationd("RAS")``) is shown, of several channels the first.
        n_images: rows at the most.
        titles: a name for each row.
        mask: what draws the masks of the training; one more column then shows one of them, and its high-pass is that
            of the map.
    """
    target, clean, noisy = output["label"], output["clean"], output["label"]["noisy"]
    highpass = (mask.gamma, mask.cutoff) if mask is not None else ()
    columns = [
        ("clean", clean, 1.0),
        ("with noise", noisy, 1.0),
        ("high-frequency map", high_frequency_map(clean, target["spacing"], *highpass), None),
        ("input: uniform mask", noisy.masked_fill(output["voxel_mask"], torch.nan), 1.0),
        ("reconstruction", output["reconstruction"], 1.0),
        ("error x 2", (output["reconstruction"] - clean).abs(), 0.5),
    ]
    if mask is not None:
        indices, *_ = mask(clean, target["spacing"], torch.Generator(clean.device).manual_seed(0))
        drawn = voxel_mask(indices, clean.shape[2:], mask.patch_size)
        columns.insert(3, (f"training mask, beta {mask.beta:.2g}", noisy.masked_fill(drawn, torch.nan), 1.0))
    rows = min(n_images, clean.shape[0])

    figure = Figure(figsize=(2.2 * len(columns), 2.2 * rows + 0.3), layout="constrained", facecolor="white")
    axes = np.atleast_2d(figure.subplots(rows, len(columns)))
    gray = matplotlib.colormaps["gray"].with_extremes(bad="#40507a")  # hidden patches
    for row in range(rows):
        for column, (name, volume, limit) in enumerate(columns):
            picture = axial_slice(volume[row])
            axis = axes[row, column]
            shown = limit or float(np.quantile(picture, 0.995)) or 1.0
            axis.imshow(picture, cmap="magma" if name.startswith(("high", "error")) else gray, vmin=0, vmax=shown)
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(name, fontsize=9)
        if titles is not None:
            axes[row, 0].set_ylabel(titles[row], fontsize=7)
    return figure


def axial_slice(image: Tensor, height: float = 0.5) -> np.ndarray:
    """An axial slice of an image in RAS order as radiologists look at it: the person's right at the left, front up.

    Args:
        image: ``(C, *S)``; its first channel is shown, of a 3D image the slice at ``height``, a share of its last side.
    """
    picture = image[0].detach().float().cpu().numpy()
    if picture.ndim == 3:
        picture = picture[..., int(height * picture.shape[-1])]
    return np.rot90(picture[::-1])


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
