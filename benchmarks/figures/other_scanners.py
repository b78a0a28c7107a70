"""Scans of scanners that the labels did not come from, segmented by the weights that ship: a picture to look at.

    python -m benchmarks.figures.other_scanners --data data

Nobody has drawn labels on these scans, so there are no scores. All four are T1: with skull, without, in 3 mm axial and
in 4.8 mm sagittal slices. The first three are of test subjects. The last is in the train split, where the pretraining
saw it without labels, as no test subject has sagittal slices.
"""

from __future__ import annotations

import tempfile

from monai.transforms import LoadImage

from benchmarks.common import BUNDLE, IMAGES, argument_parser, save_figure, segment
from sspformer.data import class_names
from sspformer.io import output_path
from sspformer.pictures import segmentation_panel

SCANS = ("ds000011_sub-08_T1", "ds002748_sub-49_T1", "openms-long_patient20-study2_T1", "dcmqa-decubitus_crlab_T1-HFS")


def main() -> None:
    args = argument_parser(__doc__, IMAGES / "other_scanners.png", data=True).parse_args()
    load = LoadImage(image_only=True, ensure_channel_first=True)
    samples = []
    with tempfile.TemporaryDirectory() as folder:
        for name in SCANS:
            file = args.data.resolve() / "heads" / f"{name}.nii.gz"
            segment(file, folder)
            samples.append({"image": load(file), "pred": load(output_path(name, folder, "seg")), "name": name})
    save_figure(segmentation_panel(samples, class_names(str(BUNDLE))), args.output, dpi=60)


if __name__ == "__main__":
    main()
