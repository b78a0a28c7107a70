"""Intensities between percentiles: MONAI's numbers, and those of a small object in a large field of view."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, Flipd, ScaleIntensityRangePercentilesd

from sspformer.transforms import ScaleByPercentilesd

CONFIGS = Path(__file__).resolve().parents[2] / "bundle" / "configs"


@pytest.mark.parametrize("side", [20, 101])  # from a million voxels on MONAI leaves percentiles to NumPy
def test_of_ordinary_scans_the_numbers_are_those_of_monai(side):
    image = 700 * torch.rand(1, side, side, side, generator=torch.Generator().manual_seed(0)) ** 3 - 20
    scan = Flipd("image", 0)({"image": MetaTensor(image, affine=torch.diag(torch.tensor([2.0, 1, 3, 1])))})
    ours = ScaleByPercentilesd("image")(scan)["image"]
    theirs = ScaleIntensityRangePercentilesd("image", 0.5, 99.5, 0.0, 1.0, clip=True)(scan)["image"]
    assert torch.equal(ours.as_tensor(), theirs.as_tensor()) and ours.dtype == theirs.dtype
    assert torch.equal(ours.affine, theirs.affine) and ours.applied_operations == theirs.applied_operations != []


@pytest.mark.parametrize("workflow", ["pretrain", "train", "evaluate", "inference"])
def test_a_small_object_is_scaled_by_its_maximum_in_all_workflows(workflow, tmp_path):
    voxels = np.zeros((64, 64, 64), np.int16)
    voxels[8:12, 8:12, 8:12], voxels[52:56, 52:56, 52:56] = 1000, 3000  # 0.05 % of the field of view
    nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2, 2, 1])), tmp_path / "scan.nii.gz")
    parser = ConfigParser()
    files = ("train", "evaluate") if workflow == "evaluate" else (workflow,)
    parser.read_config([str(CONFIGS / f"{name}.json") for name in files])
    parser.config["keys"] = ["image"]
    preprocessing = Compose(parser.get_parsed_content("preprocessing"))
    image = preprocessing({"image": str(tmp_path / "scan.nii.gz")})["image"]
    assert (image.min(), image.max()) == (0, 1)
    assert ((image - 1 / 3).abs() < 1e-3).sum() >= 8


def test_an_image_of_one_value_is_refused_and_percentiles_ascend():
    for lower in (0.5, None):
        with pytest.raises(ValueError, match="^image: all voxels have the same value, 7"):
            ScaleByPercentilesd("image", lower)({"image": torch.full((1, 4, 4, 4), 7.0)})
    with pytest.raises(ValueError, match="^lower and upper must be ascending .* got 99 and 1"):
        ScaleByPercentilesd("image", 99, 1)
