"""A scan of each kind in, and what the weights that ship make of it: the pictures of docs/gallery.md.

    python -m benchmarks.figures.gallery --data data

Each picture has three slices of the scan above those of the result. Inference runs with the bundle's own settings. The
average head of nilearn stands for a 1 mm scan; one copy is made noisy, and one averaged to voxels of 2 mm. The other
scans are test scans of the data that ``benchmarks/prepare_data.py`` makes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
from matplotlib.colors import ListedColormap
from nilearn.datasets import load_mni152_template

from benchmarks.common import IMAGES, argument_parser, infer, save_figure
from sspformer.demo import write_series
from sspformer.pictures import class_colors

RESTORATION = "restoration"


def average_head(folder: Path) -> Path:
    """The MNI152 template, 1 mm."""
    head = load_mni152_template(resolution=1)
    return _save(folder / "average_head.nii.gz", head.get_fdata(), head.affine)


def noisy(folder: Path) -> Path:
    """The average head with Rician noise of 9 % of its brightest."""
    head = load_mni152_template(resolution=1)
    image = head.get_fdata() / head.get_fdata().max()
    noise = 0.09 * np.random.default_rng(0).standard_normal((2, *image.shape))
    return _save(folder / "noisy.nii.gz", np.hypot(image + noise[0], noise[1]), head.affine)


def coarse(folder: Path) -> Path:
    """The average head, averaged to voxels of 2 mm."""
    head = load_mni152_template(resolution=1)
    x, y, z = (side // 2 for side in head.shape)
    image = head.get_fdata()[: 2 * x, : 2 * y, : 2 * z].reshape(x, 2, y, 2, z, 2).mean(axis=(1, 3, 5))
    return _save(folder / "coarse.nii.gz", image, head.affine @ nib.affines.from_matvec(np.diag([2, 2, 2]), [0.5] * 3))


def dicom_series(scan: Path) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        image = nib.load(scan)
        write_series(folder / "series", "gallery", np.rint(image.get_fdata()).clip(0, 32767), image.affine)
        return folder / "series"

    return make


def _save(path: Path, image: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image((1000 * image).astype(np.float32), affine), path)
    return path


def picture(before: nib.Nifti1Image, after: nib.Nifti1Image, n_classes: int) -> plt.Figure:
    """Middle slices of a scan above those of its labels (``n_classes`` above 0) or of the restored scan."""
    before, after = (nib.as_closest_canonical(image) for image in (before, after))
    figure, axes = plt.subplots(2, 3, figsize=(7.5, 5), layout="constrained", facecolor="black")
    for i, axis in enumerate(axes.flat):
        row, shown = i // 3, 2 - i % 3
        scan = after if row and not n_classes else before
        look = {"cmap": "gray", "vmin": 0, "vmax": np.quantile(scan.get_fdata(), 0.995), "interpolation": "nearest"}
        _show(axis, scan, shown, **look)
        if row and n_classes:
            colors = ListedColormap(["none", *class_colors(n_classes)])
            _show(axis, after, shown, cmap=colors, vmin=-0.5, vmax=n_classes + 0.5, interpolation="nearest", alpha=0.6)
        axis.axis("off")
    for row, name in enumerate(("scan", "labels" if n_classes else "result")):
        axes[row, 0].text(0.01, 0.99, name, color="white", va="top", transform=axes[row, 0].transAxes)
    return figure


def _show(axis: plt.Axes, image: nib.Nifti1Image, plane: int, **look) -> None:
    """A slice in RAS, sagittal ones beside the midline: the patient's right, or the front, is on the left."""
    sides = [axis_ for axis_ in range(3) if axis_ != plane]
    section = np.take(image.get_fdata(), int((0.42 if plane == 0 else 0.5) * image.shape[plane]), axis=plane).T
    spacing = [image.header.get_zooms()[side] for side in sides]
    axis.imshow(section, origin="lower", aspect=spacing[1] / spacing[0], **look)
    axis.invert_xaxis()


def main() -> None:
    parser = argument_parser(__doc__, IMAGES, data=True)
    parser.add_argument("--only", nargs="+", help="names of the pictures to make (default: all)")
    args = parser.parse_args()
    heads = args.data.resolve() / "heads"
    hippocampus = args.data.resolve() / "hippocampus/images/hippocampus_001.nii.gz"
    with_skull, thick = (heads / f"ds000011_sub-08_{contrast}.nii.gz" for contrast in ("T1", "T2"))
    super_resolution = (RESTORATION, "super_resolution")
    kinds = {  # makes the scan, overlays, options, classes
        "head": (average_head, (), {}, 17),
        "thick": (lambda _: thick, super_resolution, {"factor": [1, 1, 4]}, 0),
        "noisy": (noisy, (RESTORATION, "denoising"), {}, 0),
        "coarse": (coarse, super_resolution, {"factor": 2}, 0),
        "hippocampus": (lambda _: hippocampus, ("hippocampus",), {}, 2),
        "dicom": (dicom_series(with_skull), (), {"dicom": True}, 17),
    }
    for name in args.only or kinds:
        make, overlays, options, n_classes = kinds[name]
        with tempfile.TemporaryDirectory() as folder:
            scan = make(Path(folder))
            infer(scan, Path(folder, "out"), overlays, **options)
            before = with_skull if scan.is_dir() else scan
            (result,) = Path(folder, "out").glob("*.nii.gz")
            figure = picture(nib.load(before), nib.load(result), n_classes)
            save_figure(figure, args.output / f"gallery_{name}.png", dpi=75)
            plt.close(figure)


if __name__ == "__main__":
    main()
