"""Pictures of the method on one head: the high-frequency map, masks by beta, and the noise.

    python -m benchmarks.figures.method_figure --image data/heads/ds000011_sub-02_T1.nii.gz

The default is the first subject of the demonstration data.
"""

from __future__ import annotations

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.common import BUNDLE, argument_parser, head_loader, save_figure
from sspformer.demo import make_demo_dataset
from sspformer.pictures import axial_slice
from sspformer.transforms import (
    NoiseSampler,
    frequency_weighted_noise,
    high_frequency_map,
    inverse_frequency_mask,
    patch_energy,
    voxel_mask,
)

PATCH = (8, 8, 8)


def main() -> None:
    parser = argument_parser(__doc__, BUNDLE / "docs" / "method.png")
    parser.add_argument("--image", help="a NIfTI file")
    parser.add_argument("--slice", type=float, default=0.62, help="axial slice, as a share of the height")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    image = args.image or make_demo_dataset(BUNDLE / "demo_data") + "/images/demo_01.nii.gz"

    batch = next(iter(head_loader([image], 1.5)))
    spacing = torch.tensor([[1.5, 1.5, 1.5]])
    clean = batch["image"].as_tensor()

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(args.seed)

    def picture(volume: torch.Tensor) -> np.ndarray:
        return axial_slice(volume[0], args.slice)

    panels = [
        ("clean", picture(clean), "gray", 1),
        ("high-frequency map", picture(high_frequency_map(clean, spacing)), "magma", None),
    ]
    for beta in (0.0, 1.0, 3.0):
        indices = inverse_frequency_mask(clean, PATCH, beta=beta, spacing=spacing, generator=generator())
        _, foreground = patch_energy(clean, PATCH, spacing)
        hidden = clean.masked_fill(voxel_mask(indices, clean.shape[2:], PATCH), torch.nan)
        share = indices.to_map()[foreground].float().mean().item()
        panels.append((f"beta {beta:g}, {share:.0%} of the foreground masked", picture(hidden), "mask", 1))
    thermal = frequency_weighted_noise(clean, 0.08, 1.0, spacing, generator=generator())
    panels.append(("thermal noise, 8 %, alpha 1", picture(thermal), "gray", 1))
    moving = NoiseSampler(sigma=0.0, motion_prob=1.0, breathing=1.5, heartbeat=0.3, modulation=0.1, repetition_time=1.0)
    panels.append(
        ("breathing 1.5 mm", picture(moving(clean, spacing, generator(), np.random.RandomState(1))), "gray", 1)
    )
    both = NoiseSampler(sigma=0.05, motion_prob=1.0, breathing=1.0)
    panels.append(("both", picture(both(clean, spacing, generator(), np.random.RandomState(1))), "gray", 1))

    gray = matplotlib.colormaps["gray"].with_extremes(bad="#40507a")
    figure = Figure(figsize=(13, 8), layout="constrained", facecolor="white")
    for axis, (title, volume, kind, top) in zip(figure.subplots(2, 4).flat, panels):
        axis.imshow(volume, cmap="magma" if kind == "magma" else gray, vmin=0, vmax=top or np.quantile(volume, 0.99))
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    save_figure(figure, args.output, dpi=90)


if __name__ == "__main__":
    main()
