"""Run the MONAI Deploy app of examples/deploy on a DICOM series, and compare its results with the bundle's own.

    scripts/deploy/setup.sh VENV
    VENV/bin/python scripts/deploy/check.py

The bundle is built from the repository. Its folder is all that the app gets: sspformer is not installed. The series is
a subject of the demonstration data, oblique and without every second row, so pixels are not square; or SERIES, a folder
with one series. Prints PASS and FAIL lines; about two minutes on a CPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"}
failed = []


def expect(ok: bool, what: str, detail: object = "") -> None:
    print("PASS" if ok else "FAIL", what, detail, sep="  ", flush=True)
    failed.extend([] if ok else [what])


def run(*command: object) -> None:
    done = subprocess.run([sys.executable, *map(str, command)], env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}\nFAIL  {' '.join(map(str, command))}")


def make_series(folder: Path) -> Path:
    """A T1 series with pixels of 3.0 x 1.5 mm."""
    from sspformer.demo import make_demo_dataset

    series = Path(make_demo_dataset(folder, n_subjects=3)) / "images/demo_03"
    for path in series.iterdir():
        ds = pydicom.dcmread(path)
        rows = ds.pixel_array[::2]
        ds.Rows, ds.PixelSpacing, ds.PixelData = len(rows), [2 * ds.PixelSpacing[0], ds.PixelSpacing[1]], rows.tobytes()
        ds.save_as(path)
    return series


def results(folder: Path) -> dict[str, Path]:
    """The DICOM files of a folder by their modality."""
    return {pydicom.dcmread(path, stop_before_pixels=True).Modality: path for path in folder.glob("*.dcm")}


def read_segmentation(path: Path) -> tuple[list[tuple[str, str]], hd.Volume, set[str]]:
    """Label and code of each segment, the label map, and the series that it refers to."""
    seg = hd.seg.segread(path)
    kinds = [(s.SegmentLabel, s.SegmentedPropertyTypeCodeSequence[0].CodeValue) for s in seg.SegmentSequence]
    series = {item.SeriesInstanceUID for item in seg.ReferencedSeriesSequence}
    return kinds, seg.get_volume(combine_segments=True, dtype=np.uint8), series


def main(series: Path | None) -> int:
    with tempfile.TemporaryDirectory(prefix="deploy_check_") as folder:
        work = Path(folder)
        run(ROOT / "scripts/build_bundle.py", "--output_dir", work, "--unpacked", work / "models")
        bundle = work / "models/sspformer_mri"
        sys.path.insert(0, str(bundle))
        sys.dont_write_bytecode = True
        series = series.absolute() if series else make_series(work / "demo")
        run(ROOT / "examples/deploy", "-i", series, "-o", work / "app", "-m", work / "models")
        configs = ["--config_file", bundle / "configs/inference.json", "--bundle_root", bundle]
        data = ["--dataset_dir", series, "--output_dir", work / "own", "--dicom", "true"]
        run("-m", "monai.bundle", "run", "inference", *configs, *data)

        app, own = results(work / "app"), results(work / "own")
        expect(app.keys() == {"SEG", "SR"}, "the app writes a DICOM SEG and a DICOM SR", sorted(app))
        kinds, labels, referred = read_segmentation(app["SEG"])
        own_kinds, own_labels, own_referred = read_segmentation(own["SEG"])
        expect(kinds == own_kinds, "its segments are those of --dicom true", len(kinds))
        found = len(np.unique(labels.array)) - 1
        expect(found > len(kinds) / 2, "most of them are found", found)
        expect(referred == own_referred, "it refers to the same series")
        same_grid = labels.shape == own_labels.shape and np.allclose(labels.affine, own_labels.affine, atol=1e-4)
        expect(same_grid, "it has the same grid", f"{labels.shape}, spacing {labels.spacing} mm")
        differing = int((labels.array != own_labels.array).sum()) if same_grid else "all"
        expect(
            differing == 0, "it is the label map of --dicom true", f"{differing} voxels of {labels.array.size} differ"
        )

        text = pydicom.dcmread(app["SR"]).ContentSequence[0].TextValue.splitlines()[1:]
        volumes = np.bincount(labels.array.ravel())[1:] * np.prod(labels.spacing) / 1000
        lines = [f"{name}: {volume:.1f} ml" for (name, _), volume in zip(kinds, volumes)]
        expect(text == lines, "the SR has the volumes of all structures", text[:1])
    print(f"{len(failed)} failed")
    return bool(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("series", type=Path, nargs="?", help="folder of a DICOM series (default: demonstration data)")
    sys.exit(main(**vars(parser.parse_args())))
