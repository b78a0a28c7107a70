"""Heads of other scanners than the labels came from, segmented by the weights that ship: a picture to look at.

    python benchmarks/other_heads.py --data_dir ../shared/data

Nobody has drawn labels on them, so there is no figure. All four are T1: with skull, without, in 3 mm axial and in
4.8 mm sagittal slices. The first three are of test subjects; the last is of the train split, where only the pretraining
saw it, without labels, as no test subject has sagittal slices.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from _restoration import BUNDLE, DATA
from monai.bundle import create_workflow
from monai.transforms import LoadImage

from sspformer.data import class_names
from sspformer.io import output_path
from sspformer.pictures import segmentation_panel

HEADS = (
    "ds000011_sub-08_T1",
    "ds002748_sub-49_T1",
    "openms-long_patient20-study2_T1",
    "dcmqa-decubitus_crlab_T1-HFS",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, default=DATA, help="folder of heads/")
    parser.add_argument("--output", type=Path, default=BUNDLE.parent / "docs" / "images" / "other_heads.png")
    args = parser.parse_args()
    load = LoadImage(image_only=True, ensure_channel_first=True)
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        for name in HEADS:
            file = args.data_dir.resolve() / "heads" / f"{name}.nii.gz"
            config = str(BUNDLE / "configs" / "inference.json")
            paths = {"bundle_root": str(BUNDLE), "dataset_dir": str(file), "output_dir": folder}
            workflow = create_workflow(config_file=config, workflow_type="infer", **paths)
            workflow.run()
            workflow.finalize()
            samples.append({"image": load(file), "pred": load(output_path(name, folder, "seg")), "name": name})
    segmentation_panel(samples, class_names(str(BUNDLE))).savefig(args.output, dpi=60)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
