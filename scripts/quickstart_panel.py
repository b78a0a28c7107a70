"""One picture of what a run of quickstart.sh did: a held-out scan hidden and redrawn, its tissues, and denoised.

    python scripts/quickstart_panel.py OUTPUT_DIR

Reads the pictures that the steps left in OUTPUT_DIR and sets them one below the other in OUTPUT_DIR/quickstart.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.image
from matplotlib.figure import Figure

#: folder of the step, its pictures, title
STEPS = [
    ("pretrain", "pictures/epoch_*.png", "Pretraining: hidden patches of held-out scans, redrawn"),
    ("segmentation/evaluation", "pictures/*.png", "Segmentation of a held-out scan: truth and prediction"),
    ("denoising/evaluation", "pictures/*.png", "Denoising of a held-out scan"),
]


def main(output_dir: Path) -> None:
    shown = []
    for folder, pattern, title in STEPS:
        pictures = sorted((output_dir / folder).glob(pattern))
        if pictures:
            shown.append((title, matplotlib.image.imread(pictures[-1])))
    if not shown:
        sys.exit(f"no pictures below {output_dir}: has quickstart.sh run to its end?")
    width = 12.0
    heights = [width * picture.shape[0] / picture.shape[1] for _, picture in shown]
    figure = Figure(figsize=(width, sum(heights) + 0.4 * len(shown)), layout="constrained", facecolor="white")
    axes = figure.subplots(len(shown), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axis, (title, picture) in zip(axes, shown):
        axis.imshow(picture)
        axis.set_title(title, loc="left", fontsize=13, fontweight="bold")
        axis.axis("off")
    figure.savefig(output_dir / "quickstart.png", dpi=110)
    print(output_dir / "quickstart.png")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
