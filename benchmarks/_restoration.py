"""What the benchmarks of denoising and super-resolution share: held-out heads, the bundle's inference, quality, tables,
pictures."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from _common import add_device_arguments, argument_parser, print_table
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.metrics import PSNRMetric, SSIMMetric
from monai.metrics.regression import compute_ssim_and_cs
from monai.transforms import Compose, Orientationd
from torch import Tensor, nn

from sspformer.engines import StrictCheckpointLoader
from sspformer.intensity import above_mean
from sspformer.io import LoadScand
from sspformer.metrics import bootstrap_interval
from sspformer.pictures import axial_slice
from sspformer.transforms import ScaleByPercentilesd

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundle"
CONFIGS = ROOT / "benchmarks" / "configs"
DATA = ROOT.parent / "shared" / "data"
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
METRICS = ("psnr", "ssim", "psnr_foreground", "ssim_foreground")
PEERS = ("unet", "restormer")  # overlays of ``configs``
MAX_SPACING = {"denoising": math.inf, "super_resolution": 1.5}  # mm: a quarter of the lines of a thick slice is no scan

# ---------------------------------------------------------------------------------------------------------------------
# Arguments and data
# ---------------------------------------------------------------------------------------------------------------------


def restoration_parser(description: str, name: str, region: Sequence[int]) -> argparse.ArgumentParser:
    """The arguments of both scripts."""
    parser = argument_parser(description, name)
    add_device_arguments(parser)
    parser.add_argument("--data_dir", type=Path, default=DATA, help="folder with manifest.csv (default: %(default)s)")
    parser.add_argument(
        "--weights",
        type=_name_and_path,
        nargs="*",
        default=[("ours", BUNDLE / "models" / name / "model.pt")],
        metavar="NAME=PATH",
        help="networks to evaluate, of our kind but those named after a peer, "
        f"{' or '.join(PEERS)} (default: ours=, the weights that ship)",
    )
    parser.add_argument(
        "--region",
        type=int,
        nargs=3,
        default=region,
        help="voxels evaluated, around the middle of the head, in RAS order; smaller where the scan is (default: "
        f"{' '.join(map(str, region))}); 0 0 0: the whole scan",
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


def manifest_scans(
    data: Path, split: str, max_spacing: float = math.inf, folder: str = "heads"
) -> list[dict[str, str]]:
    """Rows of the manifest: scans of a split without a side longer than ``max_spacing`` mm, path in ``image``."""
    if not (data / "manifest.csv").is_file():
        raise SystemExit(f"no manifest.csv in {data}: give the folder of the shared data with --data_dir")
    with (data / "manifest.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["file"].startswith(f"{folder}/") and row["split"] == split]
    rows = [row for row in rows if max(float(side) for side in row["spacing_mm"].split("x")) <= max_spacing]
    for row in rows:
        row["image"] = str(data / row["file"])
        if folder == "heads":  # "sub-07" is another person in another dataset
            row["subject"] = Path(row["file"]).name.split("_")[0] + "_" + row["subject"]
    return rows


def training_scans(data: Path, task: str) -> list[dict[str, str]]:
    """What a restoration task learns from, rows of the manifest: the heads of the train split, but for maps, which are
    no scans; denoising also from the T1 heads of IXI of that split, whose 2 mm hold no detail to sharpen."""
    heads = [row for row in manifest_scans(data, "train", MAX_SPACING[task]) if row["contrast"] != "ADC"]
    return heads + (manifest_scans(data, "train", folder="brain_structures/images") if task == "denoising" else [])


def load_clean(image: str) -> tuple[Tensor, Tensor]:
    """A scan in RAS order, ``(1, *S)``, and its foreground.

    The intensity range is 0 to the 99.5th percentile and becomes 0 to 1, as in the bundle; the brightest voxel (fat,
    vessels) is up to four times that. Values below 0, from somebody's resampling, become 0: a magnitude has none.
    """
    voxels = Compose([LoadScand("image"), Orientationd("image", "RAS", labels=None)])({"image": image})["image"]
    voxels = voxels.as_tensor().clamp(min=0)
    voxels = voxels / np.percentile(voxels.numpy(), 99.5)
    return voxels, above_mean(voxels)


def central_region(foreground: Tensor, size: Sequence[int]) -> tuple[slice, ...]:
    """Slices ``(channel, *S)`` around the middle of the foreground ``(1, *S)``; sides of 0: the whole image."""
    slices = [slice(None)]
    for axis, (side, wanted) in enumerate(zip(foreground.shape[1:], size), start=1):
        others = [other for other in range(foreground.ndim) if other != axis]
        where = foreground.sum(dim=others).cumsum(0)
        middle = int((where < where[-1] / 2).sum())  # the median, which a few bright voxels elsewhere do not move
        wanted = min(wanted or side, side)
        start = min(max(middle - wanted // 2, 0), side - wanted)
        slices.append(slice(start, start + wanted))
    return tuple(slices)


# ---------------------------------------------------------------------------------------------------------------------
# Networks, as the bundle runs them
# ---------------------------------------------------------------------------------------------------------------------


def bundle_config(workflow: str, task: str, device: str, peer: str | None = None) -> ConfigParser:
    """The bundle's ``train.json`` or ``inference.json`` with the overlay of a restoration task, and of a peer."""
    parser = ConfigParser()
    files = [BUNDLE / "configs" / f"{name}.json" for name in (workflow, task)]
    parser.read_config([*files, *([CONFIGS / f"{peer}.json"] if peer else [])])
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
        config = bundle_config("inference", task, args.device, name if name in PEERS else None)
        networks[name] = load_weights(config.get_parsed_content("network_def"), path).to(args.device)
    return networks


@torch.no_grad()
def restore(degraded: Tensor, network: nn.Module, inferer: Inferer, device: str) -> Tensor:
    """A degraded image ``(1, *S)`` restored as the bundle does it: scaled by its own 99.5th percentile, sliding window,
    scaled back."""
    scale = ScaleByPercentilesd("image", lower=None)
    scaled = scale({"image": MetaTensor(degraded)})["image"]
    pred = inferer(scaled.as_tensor()[None].to(device), network)[0].cpu()
    pred = MetaTensor(pred, applied_operations=scaled.applied_operations)
    return scale.inverse({"image": pred})["image"].as_tensor()


# ---------------------------------------------------------------------------------------------------------------------
# Quality
# ---------------------------------------------------------------------------------------------------------------------


def quality(pred: Tensor, clean: Tensor, foreground: Tensor) -> dict[str, float]:
    """PSNR in dB and SSIM of a restored image against the clean one, over all voxels and over the foreground.

    Through MONAI's metrics, data range 1. SSIM over the foreground: the mean of its map there.

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


def summarize(rows: Sequence[Mapping], by: Sequence[str], baseline: str, seed: int) -> list[dict]:
    """Mean, standard deviation and 95 % confidence interval over subjects, for each value of the columns ``by``.

    Scans of one subject are averaged first: they are not independent. The intervals are percentile bootstraps over
    subjects. ``gain_...``: the difference from the method ``baseline`` on the same subject.
    """
    summary = []
    for group in dict.fromkeys(tuple(row[column] for column in by) for row in rows):
        here = dict(zip(by, group, strict=True))
        line = dict(here)
        values, base = (
            _subject_means([row for row in rows if all(row[column] == value for column, value in wanted.items())])
            for wanted in (here, here | {"method": baseline})
        )
        line["n_subjects"] = len(values)
        for i, metric in enumerate(METRICS):
            own = np.array([values[subject][i] for subject in values])
            line |= _mean_and_interval(metric, own, seed)
            if metric.startswith("psnr"):
                gain = own - np.array([base[subject][i] for subject in values])
                line |= _mean_and_interval(f"gain_{metric}", gain, seed)
        summary.append(line)
    return summary


def _subject_means(rows: Sequence[Mapping]) -> dict[str, np.ndarray]:
    subjects = dict.fromkeys(row["subject"] for row in rows)
    return {
        subject: np.mean([[row[metric] for metric in METRICS] for row in rows if row["subject"] == subject], axis=0)
        for subject in subjects
    }


def _mean_and_interval(name: str, values: np.ndarray, seed: int) -> dict[str, float]:
    low, high = bootstrap_interval(values, seed=seed)
    std = values.std(ddof=1) if len(values) > 1 else float("nan")
    columns = {f"{name}_mean": values.mean(), f"{name}_std": std, f"{name}_ci_low": low, f"{name}_ci_high": high}
    return {column: round(float(value), 4) for column, value in columns.items()}


def print_summary(summary: Sequence[Mapping], by: Sequence[str]) -> None:
    """Mean (standard deviation) [interval] of each line of :func:`summarize`."""

    def text(line: Mapping, name: str, digits: int) -> str:
        mean, std, low, high = (line[f"{name}_{part}"] for part in ("mean", "std", "ci_low", "ci_high"))
        return f"{mean:.{digits}f} ({std:.{digits}f}) [{low:.{digits}f}, {high:.{digits}f}]"

    shown = [("psnr", 2), ("gain_psnr", 2), ("psnr_foreground", 2), ("ssim", 4), ("ssim_foreground", 4)]
    header = [*by, "n", *(name.replace("_", " ") for name, _ in shown)]
    cells = [[*(line[column] for column in by), line["n_subjects"]] for line in summary]
    print_table(header, [row + [text(line, *of) for of in shown] for row, line in zip(cells, summary, strict=True)])
    print("\nmean (standard deviation) [95 % bootstrap interval of the mean] over n subjects")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def picture(
    path: Path, rows: Sequence[tuple[str, Tensor, Mapping[str, Tensor]]], limit: float = 0.15, coronal: bool = False
) -> None:
    """Middle slices of the restored images, and below each row of them their difference from the clean one.

    Args:
        path: PNG file.
        rows: a title, the clean image ``(1, *S)`` and the images by name.
        limit: the ends of the difference's colours.
        coronal: instead of axial slices.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def middle(image: Tensor) -> np.ndarray:
        return axial_slice(image.transpose(-1, -2) if coronal else image)

    n_columns = 1 + max(len(images) for _, _, images in rows)
    heights = [1.9 * middle(clean).shape[0] / middle(clean).shape[1] for _, clean, _ in rows]
    size = (1.9 * n_columns, sum(2 * height + 0.5 for height in heights))
    figure, axes = plt.subplots(2 * len(rows), n_columns, figsize=size, layout="constrained", squeeze=False)
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
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"written to {path}")
