"""One picture of what a run of quickstart.sh did: a held-out scan hidden and redrawn, its tissues, and denoised.

    python scripts/quickstart_panel.py OUTPUT_DIR segmentation denoising

Reads the pictures that the pretraining and the tasks named left in OUTPUT_DIR and sets them one below the other in
OUTPUT_DIR/quickstart.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.image
from matplotlib.figure import Figure

#: step: its pictures, title
STEPS = {
    "pretrain": ("pretrain/pictures/epoch_*.png", "Pretraining: hidden patches of held-out scans, redrawn"),
    "segmentation": (
        "segmentation/evaluation/pictures/*.png",
        "Segmentation of a held-out scan: truth and prediction",
    ),
    "denoising": ("denoising/evaluation/pictures/*.png", "Denoising of a held-out scan"),
}
TASKS = list(STEPS)[1:]


def main(output_dir: Path, tasks: Sequence[str]) -> None:
    shown = []
    for step in ("pretrain", *tasks):
        pattern, title = STEPS[step]
        # the newest: the folder may have others, of a run on other scans
        pictures = sorted(output_dir.glob(pattern), key=lambda picture: (picture.stat().st_mtime, picture.name))
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="of quickstart.sh")
    parser.add_argument("tasks", nargs="*", default=TASKS, help=f"of this run (default: {' '.join(TASKS)})")
    main(**vars(parser.parse_args()))
