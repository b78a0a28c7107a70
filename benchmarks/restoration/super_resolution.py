"""Super-resolution of held-out heads, x2 and x4, against zero-filling and cubic interpolation.

    python -m benchmarks.restoration.super_resolution --data data

The study (``python -m benchmarks.study``) runs this script on the networks that it trains.

Scans are those of the test split of ``heads`` without voxel sides above 1.5 mm. Each is acquired again with a half or a
quarter of its k-space lines, without added noise (:func:`sspformer.kspace.fourier_resample`): along all axes
(``isotropic``), or along the third axis of RAS alone, inferior to superior, as in a stack of thick slices
(``through-plane``). These methods bring it back to its own grid:

- ``zero-filled``: ``fourier_resample`` up, which is sinc interpolation.
- ``cubic``: scipy's cubic spline at the same places. Voxel 0 stays where it is, so there is no half-voxel shift.
- ``ours``, or what ``--weights`` names: the network restores the zero-filled region around the middle of the head
  (``--region``) with the bundle's scaling and sliding window. Then the measured k-space of the whole scan is put back
  into the prediction (:func:`sspformer.kspace.data_consistency`), as the bundle does.

A row has a scan, degradation and method: PSNR and SSIM over the region and over its foreground (brighter than the
scan's mean). ``super_resolution_summary.csv`` has means and 95 % intervals over subjects.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from scipy.ndimage import affine_transform
from torch import Tensor

from benchmarks.common import facts, prepare_machine, scans
from benchmarks.restoration.evaluation import (
    MAX_SPACING,
    Case,
    bundle_config,
    central_region,
    evaluate,
    load_clean,
    make_networks,
    picture,
    report,
    restoration_parser,
    restore,
)
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
    """Restore a region of a scan ``(1, *S)`` and put back the k-space of ``low``, ``(1, 1, *s)``.

    Around the region the prediction is the zero-filled scan.
    """
    pred = zero_filled.clone()
    pred[region] = restored(zero_filled[region])
    return data_consistency(pred[None], low)[0][region]


def make_cases(args: argparse.Namespace) -> Iterator[Case]:
    """Every test scan with every degradation."""
    networks = make_networks(TASK, args)
    inferer = bundle_config("inference", TASK, args.device).get_parsed_content("inferer")
    for scan in scans(args.data, "test", max_spacing=MAX_SPACING[TASK])[: args.max_scans]:
        clean, foreground = load_clean(scan["image"])
        region, size = central_region(foreground, args.region), tuple(clean.shape[1:])
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
            yield Case(scan, degradation, clean[region], foreground[region], methods)


def main() -> None:
    parser = restoration_parser(__doc__, TASK, (64, 64, 40))
    parser.add_argument("--degradations", nargs="+", choices=list(DEGRADATIONS), default=list(DEGRADATIONS))
    parser.add_argument("--pictured", default="openms-cross_patient26_T1", help="scan shown in the picture")
    args = parser.parse_args()
    prepare_machine(parser, args)
    shown = ("isotropic x2", "through-plane x4")
    rows, pictures = evaluate(
        make_cases(args),
        "degradation",
        args,
        {"seed": args.seed, **facts(args.device)},
        pictured=lambda scan, degradation: scan == args.pictured and degradation in shown,
    )
    report(rows, "degradation", "zero-filled", args)
    if pictures:
        picture(args.output.with_name(f"{args.output.stem}_images.png"), pictures, coronal=True)


if __name__ == "__main__":
    main()
