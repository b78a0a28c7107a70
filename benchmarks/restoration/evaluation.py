"""What the benchmarks of denoising and super-resolution share: held-out heads, the bundle's inference, scores, tables,
pictures."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.metrics import PSNRMetric, SSIMMetric
from monai.metrics.regression import compute_ssim_and_cs
from monai.transforms import Compose, Orientationd
from torch import Tensor, nn

from benchmarks.common import (
    BUNDLE,
    RESULTS,
    add_device,
    argument_parser,
    save_csv,
    save_figure,
    scans,
    stopwatch,
)
from sspformer.engines import StrictCheckpointLoader
from sspformer.intensity import above_mean
from sspformer.io import LoadScand, format_table
from sspformer.metrics import summarize
from sspformer.pictures import axial_slice
from sspformer.transforms import ScaleByPercentilesd

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
METRICS = ("psnr", "ssim", "psnr_foreground", "ssim_foreground")
MAX_SPACING = {"denoising": math.inf, "super_resolution": 1.5}  # mm; thick slices have no detail to take away

# ---------------------------------------------------------------------------------------------------------------------
# Arguments and data
# ---------------------------------------------------------------------------------------------------------------------


def restoration_parser(description: str, task: str, region: Sequence[int]) -> argparse.ArgumentParser:
    """The arguments of both scripts."""
    parser = argument_parser(description, RESULTS / f"{task}.csv", data=True)
    add_device(parser)
    parser.add_argument(
        "--weights",
        type=_name_and_path,
        nargs="*",
        default=[("ours", BUNDLE / "models" / task / "model.pt")],
        metavar="NAME=PATH",
        help="weights of our network to evaluate (default: ours=, those that ship)",
    )
    parser.add_argument(
        "--region",
        type=int,
        nargs=3,
        default=region,
        help="voxels to evaluate, in RAS order, around the middle of the head, or fewer where the scan is smaller; "
        f"0 0 0: the whole scan (default: {' '.join(map(str, region))})",
    )
    parser.add_argument("--max_scans", type=int, help="only the first scans, for a quick look")
    parser.add_argument("--seed", type=int, default=0, help="of noise and bootstrap (default: %(default)s)")
    return parser


def _name_and_path(text: str) -> tuple[str, Path]:
    """``NAME=PATH``."""
    name, _, path = text.partition("=")
    if not name or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"must be NAME=PATH of a file that exists, got {text!r}")
    return name, Path(path)


def training_scans(data: Path, task: str) -> list[dict[str, str]]:
    """Rows of the manifest that a restoration task trains on.

    These are the heads of the train split, without ADC maps, which are no scans. Denoising adds the T1 heads of IXI;
    super-resolution does not, as 2 mm voxels hold no detail to restore.
    """
    heads = [row for row in scans(data, "train", max_spacing=MAX_SPACING[task]) if row["contrast"] != "ADC"]
    return heads + (scans(data, "train", "brain_structures/images") if task == "denoising" else [])


def load_clean(image: str) -> tuple[Tensor, Tensor]:
    """A scan in RAS order, ``(1, *S)``, and its foreground.

    Intensities from 0 to the 99.5th percentile become 0 to 1, as in the bundle; fat and vessels reach up to 4. Values
    below 0, which earlier resampling left, become 0: a magnitude has none.
    """
    voxels = Compose([LoadScand("image"), Orientationd("image", "RAS", labels=None)])({"image": image})["image"]
    voxels = voxels.as_tensor().clamp(min=0)
    voxels = voxels / np.percentile(voxels.numpy(), 99.5)
    return voxels, above_mean(voxels)


def central_region(foreground: Tensor, size: Sequence[int]) -> tuple[slice, ...]:
    """Slices ``(channel, *S)`` around the middle of the foreground ``(1, *S)``; a side of 0 takes the whole axis."""
    slices = [slice(None)]
    for axis, (side, wanted) in enumerate(zip(foreground.shape[1:], size), start=1):
        others = [other for other in range(foreground.ndim) if other != axis]
        where = foreground.sum(dim=others).cumsum(0)
        middle = int((where < where[-1] / 2).sum())  # the median: a few bright voxels elsewhere do not move it
        wanted = min(wanted or side, side)
        start = min(max(middle - wanted // 2, 0), side - wanted)
        slices.append(slice(start, start + wanted))
    return tuple(slices)


# ---------------------------------------------------------------------------------------------------------------------
# Networks, as the bundle runs them
# ---------------------------------------------------------------------------------------------------------------------


def bundle_config(workflow: str, task: str, device: str) -> ConfigParser:
    """The bundle's ``train.json`` or ``inference.json`` with the overlays of a restoration task."""
    parser = ConfigParser()
    parser.read_config([BUNDLE / "configs" / f"{name}.json" for name in (workflow, "restoration", task)])
    parser["bundle_root"], parser["device"] = str(BUNDLE), device
    return parser


def load_weights(network: nn.Module, path: Path) -> nn.Module:
    """The network with the weights of a file, for inference."""
    StrictCheckpointLoader(network, path)()
    return network.eval()


def make_networks(task: str, args: argparse.Namespace) -> dict[str, nn.Module]:
    """The networks of ``--weights`` by name."""
    networks = {}
    for name, path in args.weights:
        config = bundle_config("inference", task, args.device)
        networks[name] = load_weights(config.get_parsed_content("network_def"), path).to(args.device)
    return networks


@torch.no_grad()
def restore(degraded: Tensor, network: nn.Module, inferer: Inferer, device: str) -> Tensor:
    """Restore an image ``(1, *S)`` as the bundle does: scaled by its 99.5th percentile, in sliding windows."""
    scale = ScaleByPercentilesd("image", lower=None)
    scaled = scale({"image": MetaTensor(degraded)})["image"]
    pred = inferer(scaled.as_tensor()[None].to(device), network)[0].cpu()
    pred = MetaTensor(pred, applied_operations=scaled.applied_operations)
    return scale.inverse({"image": pred})["image"].as_tensor()


# ---------------------------------------------------------------------------------------------------------------------
# Scores
# ---------------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A degraded scan: its row of the manifest, the degradation, truth ``(1, *S)``, and what restores it."""

    scan: Mapping[str, str]
    degradation: float | str
    clean: Tensor
    foreground: Tensor
    methods: Mapping[str, Callable[[], Tensor]]


def evaluate(
    cases: Iterable[Case],
    column: str,
    args: argparse.Namespace,
    setting: Mapping[str, object],
    pictured: Callable[[str, float | str], bool],
    more_scores: Callable[[Tensor, Tensor, Tensor], dict] = lambda *_: {},
) -> tuple[list[dict], list[tuple]]:
    """Score every method on every case; write the rows so far after each.

    Args:
        cases: scans with their methods.
        column: name of the degradation in the rows.
        args: with ``output`` and ``device``.
        setting: columns that are the same in every row.
        pictured: whether a scan, by its name, with a degradation is for :func:`picture`.
        more_scores: of predicted and clean image and foreground, beside :func:`quality`.

    Returns:
        The rows, and what :func:`picture` takes.
    """
    rows, pictures = [], []
    for scan, degradation, clean, foreground, methods in cases:
        images: dict[str, Tensor] = {}
        name_of_scan = Path(scan["file"]).name.removesuffix(".nii.gz")
        for name, method in methods.items():
            seconds = stopwatch(lambda: images.update({name: method()}), args.device)  # noqa: B023
            of = images[name], clean, foreground
            row = {"scan": name_of_scan, "subject": scan["subject"], "contrast": scan["contrast"]}
            row |= {column: degradation, "method": name, **quality(*of), **more_scores(*of)}
            row |= {"seconds": round(seconds, 2), "region": "x".join(str(side) for side in clean.shape[1:])}
            rows.append(row | setting)
            scores = "{method:18s} {psnr:.2f} dB  SSIM {ssim:.4f}  {seconds:.1f} s".format(**row)
            print(f"{name_of_scan}  {degradation}  {scores}", flush=True)
        if pictured(name_of_scan, degradation):
            pictures.append((f"{name_of_scan}\n{degradation}", clean, images))
        save_csv(args.output, rows)
    return rows, pictures


def quality(pred: Tensor, clean: Tensor, foreground: Tensor) -> dict[str, float]:
    """PSNR in dB and SSIM of a restored image, over all voxels and over the foreground.

    MONAI's metrics with a data range of 1. SSIM over the foreground is the mean of its map there.

    Args:
        pred: ``(1, *S)``.
        clean: ``(1, *S)``.
        foreground: ``(1, *S)``, bool.
    """
    pred, clean = pred.float().cpu()[None], clean.float().cpu()[None]
    psnr = PSNRMetric(max_val=1.0, reduction="none")
    ssim = SSIMMetric(spatial_dims=3, data_range=1.0, win_size=SSIM_WINDOW, kernel_sigma=SSIM_SIGMA, reduction="none")
    window = ([SSIM_WINDOW] * 3, [SSIM_SIGMA] * 3)
    ssim_map, _ = compute_ssim_and_cs(pred, clean, 3, *window, data_range=1.0)
    border = SSIM_WINDOW // 2  # the map has a voxel for each place where the whole window fits
    inside = foreground[(None, slice(None), *[slice(border, -border)] * 3)]
    return {
        "psnr": float(psnr(pred, clean)),
        "ssim": float(ssim(pred, clean)),
        "psnr_foreground": float(psnr(pred[foreground[None]][None, None], clean[foreground[None]][None, None])),
        "ssim_foreground": float(ssim_map[inside].mean()),
    }


def report(rows: Sequence[Mapping], column: str, baseline: str, args: argparse.Namespace) -> list[dict]:
    """Summarise the rows of :func:`evaluate`; print and write the summary, and draw the gains."""
    summary = summarize_rows(rows, (column, "method"), baseline, args.seed)
    shown = [f"{name}_{part}" for name in ("psnr", "gain_psnr", "ssim") for part in ("mean", "ci_low", "ci_high")]
    print(f"\n{format_table(summary, [column, 'method', 'n_subjects', *shown])}")
    save_csv(args.output.with_name(f"{args.output.stem}_summary.csv"), summary)
    plot_gains(args.output.with_suffix(".png"), summary, column, baseline)
    return summary


def summarize_rows(rows: Sequence[Mapping], by: Sequence[str], baseline: str, seed: int) -> list[dict]:
    """Mean, standard deviation and 95 % confidence interval over subjects, for each value of the columns ``by``.

    A subject counts once, with the mean of its scans. ``gain_...`` is the difference from the method ``baseline`` on
    the same scan.
    """

    def scores_of(group: Mapping, metric: str) -> np.ndarray:
        return np.array([row[metric] for row in rows if group.items() <= row.items()])

    summary = []
    for group in dict.fromkeys(tuple(row[column] for column in by) for row in rows):
        here = dict(zip(by, group, strict=True))
        subjects = [row["subject"] for row in rows if here.items() <= row.items()]
        line = {**here, "n_subjects": len(set(subjects))}
        for metric in METRICS:
            scores = {metric: scores_of(here, metric)}
            if metric.startswith("psnr"):
                scores[f"gain_{metric}"] = scores[metric] - scores_of(here | {"method": baseline}, metric)
            for name, values in scores.items():
                over_subjects = summarize(values, seed, subjects)
                parts = ("mean", "std", "ci_low", "ci_high")
                line |= {f"{name}_{part}": round(float(over_subjects[part]), 4) for part in parts}
        summary.append(line)
    return summary


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def plot_gains(path: Path, summary: Sequence[Mapping], column: str, baseline: str) -> None:
    """Draw the gain in PSNR over the baseline by degradation, with intervals, in the region and its foreground."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained", facecolor="white")
    panels = figure.subplots(1, 2, sharey=True)
    degradations = list(dict.fromkeys(line[column] for line in summary))
    names = [name for name in dict.fromkeys(line["method"] for line in summary) if name != baseline]
    for panel, metric in zip(panels, ("gain_psnr", "gain_psnr_foreground"), strict=True):
        for i, name in enumerate(names):
            lines = [line for line in summary if line["method"] == name]
            mean, low, high = (
                np.array([line[f"{metric}_{part}"] for line in lines]) for part in ("mean", "ci_low", "ci_high")
            )
            place = np.arange(len(lines)) + 0.1 * (i - (len(names) - 1) / 2)
            panel.errorbar(place, mean, [mean - low, high - mean], fmt="o", markersize=4, capsize=2, label=name)
        panel.set_xticks(range(len(degradations)), degradations, fontsize=8)
        panel.axhline(0, color="grey", linestyle=":")
        panel.set(xlabel=column, title="foreground" if "foreground" in metric else "region")
        panel.grid(alpha=0.3, axis="y")
    panels[0].set_ylabel(f"PSNR over {baseline}, dB")
    panels[0].legend(fontsize=8)
    save_figure(figure, path)


def picture(
    path: Path, rows: Sequence[tuple[str, Tensor, Mapping[str, Tensor]]], limit: float = 0.15, coronal: bool = False
) -> None:
    """Draw middle slices of the restored images, and below each row their differences from the clean one.

    Args:
        path: PNG file.
        rows: a title, the clean image ``(1, *S)`` and the images by name.
        limit: the ends of the difference's colours.
        coronal: instead of axial slices.
    """
    from matplotlib.figure import Figure

    def middle(image: Tensor) -> np.ndarray:
        return axial_slice(image.transpose(-1, -2) if coronal else image)

    n_columns = 1 + max(len(images) for _, _, images in rows)
    heights = [1.9 * middle(clean).shape[0] / middle(clean).shape[1] for _, clean, _ in rows]
    size = (1.9 * n_columns, sum(2 * height + 0.5 for height in heights))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots(2 * len(rows), n_columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for i, (title, clean, images) in enumerate(rows):
        above, below = axes[2 * i], axes[2 * i + 1]
        for axis, (name, image) in zip(above, {"clean": clean, **images}.items(), strict=False):
            axis.imshow(middle(image), cmap="gray", vmin=0, vmax=1.1)
            axis.set_title(name if name != "clean" else f"clean\n{title}", fontsize=7)
        for axis, image in zip(below[1:], images.values(), strict=False):
            shown = axis.imshow(middle(image - clean), cmap="RdBu_r", vmin=-limit, vmax=limit)
        figure.colorbar(shown, ax=list(below), shrink=0.7, label="difference").ax.tick_params(labelsize=7)
    save_figure(figure, path)
