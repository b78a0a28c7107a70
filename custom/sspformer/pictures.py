"""Figures: panels of reconstructions, segmentations and restored scans, and training curves."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from monai.data import MetaTensor
from monai.metrics import PSNRMetric, compute_dice
from monai.transforms import Orientation
from torch import Tensor

from .transforms.masking import MaskIndices, high_frequency_map, voxel_mask

__all__ = [
    "axial_slice",
    "class_colors",
    "curves",
    "figure_to_array",
    "prediction_figure",
    "reconstruction_panel",
    "restoration_panel",
    "segmentation_panel",
]

# distinct on grey; in the order of the 17 brain structures, neighbours contrast
COLORS = (
    "#e6594c #f2e6c4 #3f7fe0 #35c7f0 #1fa8a0 #7fa6c9 #59c14f #ff9d2e #c04fd6 #f7d33b #ff5fa8 #2fe0a6 #9a6bff #a8743d "
    "#bfe03a #d98cb8 #ffb38a #5c9ead #b0413e #8fd694"
).split()


#: title of a plot, and pattern of the columns in it
CURVES = (("loss", r".*(loss|_error)"), ("Dice", r".*dice.*"), ("PSNR, dB", r".*psnr.*"), ("SSIM", r".*ssim.*"))

#: the axis, and what follows a schedule
NOT_DRAWN = ("epoch", "iteration", "learning_rate", "beta")


def reconstruction_panel(
    output: Mapping,
    n_images: int = 4,
    titles: Sequence[str] | None = None,
    mask: Callable[..., MaskIndices] | None = None,
) -> Figure:
    """One row a sample: clean, noisy, high-frequency map, masks, reconstruction, absolute error.

    Args:
        output: of :class:`sspformer.engines.Reconstruct`; images in [0, 1]. Of 3D images the middle slice along the
            last axis (axial after ``Orientationd("RAS")``) is shown, of several channels the first.
        n_images: rows at the most.
        titles: a name for each row.
        mask: the mask strategy of the training; one more column then shows a mask of it.
    """
    target, clean, noisy = output["label"], output["clean"], output["label"]["noisy"]
    columns = [
        ("clean", clean, 1.0),
        ("with noise", noisy, 1.0),
        ("high-frequency map", high_frequency_map(clean, target["spacing"]), None),
        ("input: uniform mask", noisy.masked_fill(output["voxel_mask"], torch.nan), 1.0),
        ("reconstruction", output["reconstruction"], 1.0),
        ("error x 2", (output["reconstruction"] - clean).abs(), 0.5),
    ]
    if mask is not None:
        indices = mask(clean, target["spacing"], torch.Generator(clean.device).manual_seed(0))
        drawn = voxel_mask(indices, clean.shape[2:], output["patch_size"])
        columns.insert(3, ("input: training mask", noisy.masked_fill(drawn, torch.nan), 1.0))
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


def class_colors(n_classes: int) -> list[str]:
    """A colour for each label from 1 to ``n_classes``; they repeat after twenty."""
    return [COLORS[i % len(COLORS)] for i in range(n_classes)]


def segmentation_panel(samples: Sequence[Mapping], class_names: Sequence[str] | None = None) -> Figure:
    """One row for each sample: true and predicted labels on axial, coronal and sagittal slices, with a legend.

    The slices show as much of the structures as possible, and are cropped to the labels. The patient's right is on the
    left, as radiologists look at scans; in sagittal slices, the front is.

    Args:
        samples: mappings with ``image`` (C, *S), of which the first channel is shown; ``pred``, labels (1, *S) or
            scores of the classes (C, *S); and perhaps ``label``, as ``pred``, and ``name``. Tensors without an affine
            are taken as RAS with unit spacing.
        class_names: of the labels from 1 on; None: those in the metadata of ``pred``, or numbers.
    """
    rows = []
    for sample in samples:
        volumes, spacing = _in_ras(sample, ("image", "label", "pred"))
        maps = {key: _label_map(volumes[key]) for key in ("label", "pred") if key in volumes}
        box = _around(np.maximum.reduce(list(maps.values())), spacing)
        rows.append((volumes["image"][0][box], {key: labels[box] for key, labels in maps.items()}, spacing))

    class_names = class_names or getattr(samples[0]["pred"], "meta", {}).get("class_names")
    n_classes = len(class_names or ()) or max(1, *(int(labels.max()) for row in rows for labels in row[1].values()))
    names = class_names or [f"label {i + 1}" for i in range(n_classes)]
    columns = [(plane, key) for plane in _planes(rows[0][0]) for key in rows[0][1]]
    figure, axes = _figure_of_slices([[(image, spacing, plane) for plane, _ in columns] for image, _, spacing in rows])
    for row, (image, maps, spacing) in enumerate(rows):
        top = float(np.quantile(image, 0.995)) or 1.0
        reference = next(iter(maps.values()))
        at = {plane: _richest_slice(reference, plane) for plane, _ in columns}
        for axis, (plane, key) in zip(axes[row], columns):
            _show(axis, image, spacing, plane, at[plane], cmap="gray", vmin=0, vmax=top, interpolation="bicubic")
            overlay = np.ma.masked_equal(maps[key], 0)
            colors = ListedColormap(["black", *class_colors(n_classes)])
            look = {"cmap": colors, "vmin": -0.5, "vmax": n_classes + 0.5, "interpolation": "nearest", "alpha": 0.6}
            _show(axis, overlay, spacing, plane, at[plane], **look)
            if row == 0:
                axis.set_title({"label": "truth", "pred": "prediction"}[key], fontsize=10)
        axes[row, 0].set_ylabel(_caption(samples[row], maps, n_classes), fontsize=9)
    patches = [Patch(color=color, label=name) for color, name in zip(class_colors(n_classes), names)]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(6, n_classes), fontsize=9, frameon=False)
    return figure


def restoration_panel(samples: Sequence[Mapping]) -> Figure:
    """Two rows for each sample, an axial and a coronal slice: before, after, truth, and both errors on one scale.

    Without a truth, the difference of before and after is shown, if they share a grid.

    Args:
        samples: mappings with ``image`` (C, *S), the scan before, and ``pred``, the scan after, of which the first
            channels are shown; and perhaps ``name`` and ``label``, the true scan (C, *S) or a mapping with it as
            ``clean``. All samples have a truth, or none. Tensors without an affine are taken as RAS with unit spacing.
            The PSNR in the picture takes 1 as the largest intensity.
    """
    rows, titles = [], ["before", "after"]
    for sample in samples:
        truth = sample.get("label")
        truth = truth["clean"] if isinstance(truth, Mapping) else truth
        volumes, spacing = _in_ras({"image": sample["image"], "label": truth}, ("image", "label"))
        pred = sample["pred"]
        if not isinstance(pred, MetaTensor) and isinstance(sample["image"], MetaTensor):
            pred = MetaTensor(pred, affine=sample["image"].affine)
        restored, new_spacing = _in_ras({"image": pred}, ("image",))  # perhaps on a finer grid
        before, after = volumes["image"][0], restored["image"][0]
        gray = {"cmap": "gray", "vmin": 0, "vmax": float(np.quantile(before, 0.995)) or 1.0}
        shown, text = [(before, spacing, gray), (after, new_spacing, gray)], []
        if truth is not None:
            clean = volumes["label"][0]
            errors = np.abs(before - clean), np.abs(after - clean)
            titles = ["before", "after", "truth", "error before", "error after"]
            shown.append((clean, spacing, gray))
            text = [f"{_psnr(before, clean):.1f} dB", f"{_psnr(after, clean):.1f} dB"]
        elif before.shape == after.shape:
            errors = (np.abs(after - before),)
            titles = ["before", "after", "difference"]
        else:
            errors = ()
        for error in errors:
            limit = float(np.quantile(errors[0], 0.995)) or 1.0
            shown.append((error, spacing, {"cmap": "magma", "vmin": 0, "vmax": limit}))
        name = str(sample.get("name", ""))
        rows += [(plane, shown, name, text) for plane in _planes(before)[:2]]

    figure, axes = _figure_of_slices([[(*cell[:2], plane) for cell in shown] for plane, shown, *_ in rows])
    for row, (plane, shown, name, text) in enumerate(rows):
        for axis, (volume, spacing, look) in zip(axes[row], shown):
            _show(axis, volume, spacing, plane, volume.shape[plane] // 2 if volume.ndim == 3 else 0, **look)
        for axis, label in zip(axes[row], text):
            axis.text(0.03, 0.03, label, color="white", fontsize=10, transform=axis.transAxes)
        axes[row, 0].set_ylabel(name, fontsize=9)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=10)
    return figure


def _in_ras(sample: Mapping, keys: Sequence[str]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Volumes (C, *S) of a sample in RAS order, and their spacing in mm; all are on the grid of ``image``."""
    image = sample["image"]
    affine = image.affine if isinstance(image, MetaTensor) and image.ndim == 4 else None
    volumes, spacing = {}, np.ones(image.ndim - 1)
    for key in keys:
        if sample.get(key) is None:
            continue
        volume = torch.as_tensor(sample[key]).as_subclass(Tensor).detach().float().cpu()
        if affine is not None:
            volume = Orientation("RAS", labels=None)(MetaTensor(volume, affine=affine))
            spacing = volume.pixdim.numpy()
        volumes[key] = np.asarray(volume.as_subclass(Tensor))
    return volumes, spacing


def _label_map(volume: np.ndarray) -> np.ndarray:
    return (volume.argmax(axis=0) if len(volume) > 1 else volume[0]).astype(int)


def _planes(volume: np.ndarray) -> tuple[int, ...]:
    """The axes normal to axial, coronal and sagittal slices of an RAS volume; a 2D image is one axial slice."""
    return (2, 1, 0) if volume.ndim == 3 else (2,)


def _around(labels: np.ndarray, spacing: np.ndarray, margin: float = 12.0) -> tuple[slice, ...]:
    """The box around all labels, with a margin in mm, or the whole image without labels."""
    voxels = np.argwhere(labels)
    if len(voxels) == 0:
        return (slice(None),) * labels.ndim
    margins = np.ceil(margin / spacing).astype(int)
    return tuple(slice(max(a, 0), b) for a, b in zip(voxels.min(0) - margins, voxels.max(0) + margins + 1))


def _richest_slice(labels: np.ndarray, plane: int) -> int:
    """The slice with the largest sum of the structures' shares; small structures count as much as large ones."""
    if labels.ndim == 2 or not labels.any():
        return labels.shape[plane] // 2 if labels.ndim == 3 else 0
    others = tuple(axis for axis in range(3) if axis != plane)
    areas = np.stack([(labels == label).sum(axis=others) for label in np.unique(labels[labels > 0])])
    return int((areas / areas.sum(axis=1, keepdims=True)).sum(axis=0).argmax())


def _caption(sample: Mapping, maps: Mapping[str, np.ndarray], n_classes: int) -> str:
    name = str(sample.get("name", ""))
    if "label" not in maps:
        return name
    truth, pred = (torch.from_numpy(maps[key])[None, None] for key in ("label", "pred"))
    dice = float(compute_dice(pred, truth, include_background=False, num_classes=n_classes + 1).nanmean())
    return f"{name}\nmean Dice {dice:.3f}".strip()


def _psnr(image: np.ndarray, clean: np.ndarray) -> float:
    return float(PSNRMetric(max_val=1.0)(torch.from_numpy(image)[None, None], torch.from_numpy(clean)[None, None]))


def _sides(volume: np.ndarray, spacing: np.ndarray, plane: int) -> tuple[float, float]:
    """Width and height of a slice in mm."""
    width, height = (n * step for axis, (n, step) in enumerate(zip(volume.shape, spacing)) if axis != plane)
    return float(width), float(height)


def _figure_of_slices(rows: Sequence[Sequence[tuple]], width: float = 14.0) -> tuple[Figure, np.ndarray]:
    """A figure, ``width`` inches wide, with axes for rows of (volume, spacing, plane), all at one scale."""
    sides = np.array([[_sides(*cell) for cell in row] for row in rows])  # rows, columns, (width, height)
    widths, heights = sides[..., 0].max(axis=0), sides[..., 1].max(axis=1)
    scale = width / widths.sum()
    figure = Figure(figsize=(width, scale * heights.sum() + 0.8), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.06, hspace=0)
    axes = figure.subplots(*sides.shape[:2], width_ratios=widths, height_ratios=heights, squeeze=False)
    for (i, j), axis in np.ndenumerate(axes):
        (w, h), room_w, room_h = sides[i, j], widths[j], heights[i]
        axis.set(xticks=[], yticks=[], facecolor="black", aspect="equal")
        axis.set(xlim=((w - room_w) / 2, (w + room_w) / 2), ylim=((h - room_h) / 2, (h + room_h) / 2))
        axis.autoscale(False)
        axis.spines[:].set_visible(False)
    return figure, axes


def _show(axis, volume: np.ndarray, spacing: np.ndarray, plane: int, at: int, **look) -> None:
    width, height = _sides(volume, spacing, plane)
    axis.imshow(_upright(volume, plane, at), extent=(0, width, 0, height), **look)


def _upright(volume: np.ndarray, plane: int, at: int) -> np.ndarray:
    """A slice of an RAS volume, or a 2D image, as radiologists look at it: the patient's right, or the front, is on the
    left, and the top, or the front, is up."""
    picture = volume.take(at, axis=plane) if volume.ndim == 3 else volume
    return np.rot90(picture[::-1])


def axial_slice(image: Tensor, height: float = 0.5) -> np.ndarray:
    """An axial slice of an RAS image as radiologists look at it: the patient's right is on the left, the front is up.

    Args:
        image: ``(C, *S)``; the first channel is shown.
        height: of the slice, a share of the last side.
    """
    picture = image[0].detach().float().cpu().numpy()
    return _upright(picture, 2, int(height * picture.shape[-1]))


def curves(history: Sequence[Mapping[str, float]]) -> Figure:
    """Losses, errors and metrics over epochs, from the rows of ``history.csv``.

    Columns of one kind (losses and errors, Dice, PSNR, SSIM) share a plot; other columns have their own. What an
    untrained network reaches (``mean_prediction_*``, ``*_input``) is dotted.
    """
    names = [name for name in dict.fromkeys(name for row in history for name in row) if name not in NOT_DRAWN]
    plots: dict[str, list[str]] = {title: [] for title, _ in CURVES}
    for name in names:
        kind = next((title for title, pattern in CURVES if re.fullmatch(pattern, name)), name.replace("_", " "))
        plots.setdefault(kind, []).append(name)
    plots = {title: columns for title, columns in plots.items() if columns}

    across = min(4, len(plots))
    down = math.ceil(len(plots) / across)
    figure = Figure(figsize=(4 * across, 3.4 * down), layout="constrained", facecolor="white")
    axes = figure.subplots(down, across, squeeze=False).flat
    for (title, columns), axis in zip(plots.items(), axes):
        lowest = math.inf
        for name in columns:
            points = [(row["epoch"], row[name]) for row in history if row.get(name) is not None]
            dotted = name.startswith("mean_prediction") or name.endswith("_input")
            axis.plot(*zip(*points), label=name.replace("_", " "), linestyle=":" if dotted else "-")
            lowest = min(lowest, *(value for _, value in points))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if title == "loss" and lowest > 0:
            axis.set_yscale("log")
        if len(columns) > 1:
            axis.legend(fontsize=8)
    for axis in list(axes):
        axis.remove()  # the last row may not be full
    return figure


def prediction_figure(pred: Tensor, target: Tensor, class_names: Sequence[str] = ()) -> Figure:
    """The confusion matrix of classes, or predicted against true numbers.

    Args:
        pred: probabilities ``(N, C)``, or numbers ``(N,)``.
        target: classes or numbers, ``(N,)``.
        class_names: C names; empty: numbers.
    """
    n = len(class_names)
    figure = Figure(figsize=(max(4, 1 + 0.6 * n),) * 2, layout="constrained", facecolor="white")
    axis = figure.subplots()
    axis.set(xlabel="predicted", ylabel="true")
    if not class_names:
        ends = [float(torch.cat([pred, target]).min()), float(torch.cat([pred, target]).max())]
        axis.plot(ends, ends, color="grey", linewidth=1)
        axis.scatter(pred, target, s=16)
        axis.set_aspect("equal")
        return figure
    counts = torch.bincount(n * target + pred.argmax(dim=1), minlength=n * n).reshape(n, n)
    axis.imshow(counts / counts.sum(dim=1, keepdim=True).clamp(min=1), cmap="Blues", vmin=0, vmax=1)
    axis.set_xticks(range(n), class_names, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(n), class_names)
    for i, j in np.ndindex(n, n):
        share = counts[i, j] / counts[i].sum().clamp(min=1)
        axis.text(j, i, int(counts[i, j]), ha="center", va="center", color="white" if share > 0.5 else "black")
    return figure


def figure_to_array(figure: Figure, dpi: int = 100) -> np.ndarray:
    """The figure as RGB ``(H, W, 3)``, uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
