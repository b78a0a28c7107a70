"""One picture of what a run of quickstart.sh did: a held-out scan hidden and redrawn, its tissues, and denoised.

    python scripts/quickstart_panel.py OUTPUT_DIR segmentation denoising

Reads the pictures that the pretraining and the tasks named left in OUTPUT_DIR and sets them one below the other in
OUTPUT_DIR/quickstart.png.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib.image
from matplotlib.figure import Figure

#: task: how many held-out scans to show, title
TASKS = {
    "segmentation": (2, "Segmentation of held-out scans: truth and prediction"),
    "denoising": (1, "Denoising of a held-out scan"),
}


def evaluated(folder: Path) -> list[Path]:
    """Pictures of the scans that the last evaluation scored, in its order; the folder may have those of others."""
    if not (folder / "metrics.csv").is_file():
        return []
    with (folder / "metrics.csv").open(newline="") as file:
        names = dict.fromkeys(row["name"] for row in csv.DictReader(file))
    return [picture for name in names if (picture := folder / "pictures" / f"{name}.png").is_file()]


def main(output_dir: Path, tasks: Sequence[str]) -> Path:
    epochs = sorted((output_dir / "pretrain" / "pictures").glob("epoch_*.png"), key=lambda path: path.stat().st_mtime)
    groups = [("Pretraining: hidden patches of held-out scans, redrawn", epochs[-1:])]
    for task in tasks:
        count, title = TASKS[task]
        groups.append((title, evaluated(output_dir / task / "evaluation")[:count]))
    shown = [
        (title if picture == pictures[0] else "", matplotlib.image.imread(picture))
        for title, pictures in groups
        for picture in pictures
    ]
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
    return output_dir / "quickstart.png"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="of quickstart.sh")
    parser.add_argument("tasks", nargs="*", default=list(TASKS), help=f"of this run (default: {' '.join(TASKS)})")
    print(main(**vars(parser.parse_args())))
