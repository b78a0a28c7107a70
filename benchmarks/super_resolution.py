"""Super-resolution of held-out heads, x2 and x4, against zero-filling and cubic interpolation.

    python benchmarks/super_resolution.py --data_dir ../shared/data

Other networks at equal time of training are in ``study.py``, which runs this script on them.

Scans: those of the test split of ``heads`` in the manifest whose voxels have no side above 1.5 mm. A scan is acquired
again with a half or a quarter of the k-space lines, along all axes (``isotropic``) or along the third axis of RAS,
inferior to superior, alone (``through-plane``, as in a stack of thick slices): with
:func:`sspformer.kspace.fourier_resample`. No noise is added. The whole scan is brought back to its own grid by

- ``zero-filled``: ``fourier_resample`` up, sinc interpolation;
- ``cubic``: scipy's cubic spline at the same places (voxel 0 stays where it is, so no half-voxel shift);

and the networks restore the zero-filled region around the middle of the head (``--region``), which is what is
compared. All run through the bundle's scaling and sliding window, and the measured k-space of the whole scan is put
back into what they predict (:func:`sspformer.kspace.data_consistency`), as the bundle does:

- ``ours``: the bundle's weights, trained by ``train_models.py``, and any others that ``--weights`` names.

Rows: a scan, degradation and method; PSNR and SSIM over the region and over its foreground (brighter than the scan's
mean). ``super_resolution_summary.csv``: means and 95 % intervals over subjects.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _common import facts, prepare_machine, stopwatch, write_csv
from _restoration import (
    MAX_SPACING,
    bundle_config,
    central_region,
    load_clean,
    make_networks,
    manifest_scans,
    picture,
    print_summary,
    quality,
    restoration_parser,
    restore,
    summarize,
)
from scipy.ndimage import affine_transform
from torch import Tensor

from sspformer.kspace import data_consistency, fourier_resample

TASK = "super_resolution"
DEGRADATIONS = {
    f"{pattern} x{factor}": axes
    for factor in (2, 4)
    for pattern, axes in (("isotropic", (factor,) * 3), ("through-plane", (1, 1, factor)))
}


def cubic(low: Tensor, size: tuple[int, ...]) -> Tensor:
    """Cubic spline interpolation of ``(1, *s)`` on the grid of :func:`fourier_resample`, ``(1, *size)``."""
    step = np.array(low.shape[1:]) / np.array(size)
    fine = affine_transform(low[0].numpy(), step, output_shape=size, order=3, mode="nearest")
    return torch.from_numpy(fine)[None]


def restore_region(
    zero_filled: Tensor, low: Tensor, region: tuple[slice, ...], restored: Callable[[Tensor], Tensor]
) -> Tensor:
    """The region of a scan ``(1, *S)``, restored, with the k-space of ``low``, ``(1, 1, *s)``, put back; around it the
    prediction is the scan as it was zero-filled."""
    pred = zero_filled.clone()
    pred[region] = restored(zero_filled[region])
    return data_consistency(pred[None], low)[0][region]


def evaluate(args: argparse.Namespace) -> None:
    networks = make_networks(TASK, args)
    inferer = bundle_config("inference", TASK, args.device).get_parsed_content("inferer")
    setting = {"seed": args.seed, **facts(args.device)}
    rows, pictured = [], []
    for scan in manifest_scans(args.data_dir, "test", MAX_SPACING[TASK])[: args.max_scans]:
        clean, foreground = load_clean(scan["image"])
        region = central_region(foreground, args.region)
        size = tuple(clean.shape[1:])
        name_of_scan = Path(scan["file"]).name.removesuffix(".nii.gz")
        for degradation in args.degradations:
            lines = [round(side / factor) for side, factor in zip(size, DEGRADATIONS[degradation], strict=True)]
            low = fourier_resample(clean[None], lines)
            zero_filled = fourier_resample(low, size)[0]
            methods: dict[str, Callable[[], Tensor]] = {
                "zero-filled": lambda: fourier_resample(low, size)[0][region],  # noqa: B023
                "cubic": lambda: cubic(low[0], size)[region],  # noqa: B023
            }
            for name, network in networks.items():
                restored = partial(restore, network=network, inferer=inferer, device=args.device)
                methods[name] = partial(restore_region, zero_filled, low, region, restored)
            images = {}
            for name, method in methods.items():
                seconds = stopwatch(lambda: images.update({name: method()}), args.device)  # noqa: B023
                row = {"scan": name_of_scan, "subject": scan["subject"], "contrast": scan["contrast"]}
                row |= {"degradation": degradation, "method": name}
                row |= quality(images[name], clean[region], foreground[region])
                row |= {"seconds": round(seconds, 2), "region": "x".join(str(side) for side in images[name].shape[1:])}
                rows.append(row | setting)
                print(
                    "{scan}  {degradation:16s}  {method:18s} {psnr:.2f} dB  SSIM {ssim:.4f}".format(**row), flush=True
                )
            if name_of_scan == args.pictured and degradation in ("isotropic x2", "through-plane x4"):
                pictured.append((f"{name_of_scan}\n{degradation}", clean[region], images))
        write_csv(args.output, rows)

    summary = summarize(rows, ("degradation", "method"), "zero-filled", args.seed)
    print_summary(summary, ("degradation", "method"))
    write_csv(args.output.with_name(f"{args.output.stem}_summary.csv"), summary)
    plot(args.output.with_suffix(".png"), summary)
    if pictured:
        picture(args.output.with_name(f"{args.output.stem}_images.png"), pictured, coronal=True)


def plot(path: Path, summary: list[dict]) -> None:
    """Gain in PSNR over zero-filling, with the intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained", sharey=True)
    degradations = list(dict.fromkeys(line["degradation"] for line in summary))
    names = [name for name in dict.fromkeys(line["method"] for line in summary) if name != "zero-filled"]
    for panel, metric in zip(panels, ("gain_psnr", "gain_psnr_foreground"), strict=True):
        for i, name in enumerate(names):
            lines = [line for line in summary if line["method"] == name]
            mean, low, high = (
                np.array([line[f"{metric}_{part}"] for line in lines]) for part in ("mean", "ci_low", "ci_high")
            )
            place = np.arange(len(lines)) + (i - (len(names) - 1) / 2) * 0.8 / len(names)
            panel.bar(place, mean, 0.8 / len(names), yerr=[mean - low, high - mean], capsize=2, label=name)
        panel.set_xticks(range(len(degradations)), degradations, fontsize=8)
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set_title("foreground" if "foreground" in metric else "region")
        panel.grid(alpha=0.3, axis="y")
    panels[0].set_ylabel("PSNR over zero-filling, dB")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=130)
    print(f"written to {path}")


def main() -> None:
    parser = restoration_parser(__doc__, TASK, (64, 64, 40))
    parser.add_argument("--degradations", nargs="+", choices=list(DEGRADATIONS), default=list(DEGRADATIONS))
    parser.add_argument("--pictured", default="openms-cross_patient26_T1", help="scan shown in the picture")
    args = parser.parse_args()
    prepare_machine(parser, args)
    evaluate(args)


if __name__ == "__main__":
    main()
