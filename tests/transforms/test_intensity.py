"""Intensities between percentiles: MONAI's numbers, and those of a small object in a large field of view."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, Flipd, ScaleIntensityRangePercentilesd

from sspformer.intensity import inner_fill
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
    parser.config |= {"keys": ["image"], "bundle_root": str(CONFIGS.parent)}
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


def magnitude(levels=0):
    """Air, tissue of 200 to 1000; of so many levels."""
    generator = torch.Generator().manual_seed(0)
    image = 200 + 800 * torch.rand(1, 24, 24, 24, generator=generator)
    image[:, :6] = 10 * torch.rand(1, 6, 24, 24, generator=generator)
    return (image * levels / 1000).round() if levels else image


@pytest.mark.parametrize("share", [0.05, 0.6])
def test_air_that_was_filled_within_the_range_becomes_air_again(share):
    image = magnitude()[:, 6:]
    image[:, : round(share * image.shape[1])] = 0
    z = torch.where(image > 0, (image - 600) / 230, 0)
    assert inner_fill(z, *z.quantile(torch.tensor([0.005, 0.995]))) == 0
    scaled = ScaleByPercentilesd("image")({"image": MetaTensor(z)})["image"]
    assert not scaled[image == 0].any() and scaled[image > 0].mean() > 0.45
    with pytest.raises(ValueError, match="^image is no magnitude image: its air, at 0, lies inside .*z-scored"):
        ScaleByPercentilesd("image", lower=None)({"image": MetaTensor(z)})


@pytest.mark.parametrize("image", [magnitude(), magnitude(20), magnitude(255)[:, 6:], magnitude() - 600], ids=range(4))
def test_ordinary_scans_have_no_filled_air(image):
    assert inner_fill(image, *image.quantile(torch.tensor([0.005, 0.995]))) is None


@pytest.mark.parametrize(("slope", "shift"), [(1, 0), (0.004, -1.7), (1, -32000), (1, 4000), (1e-3, -2)])
def test_an_affine_scale_becomes_the_magnitude_and_comes_back(slope, shift):
    scaling, plain = ScaleByPercentilesd("image", lower=None), magnitude()
    expected = scaling({"image": MetaTensor(plain)})["image"]
    scaled = scaling({"image": MetaTensor(slope * plain + shift)})
    torch.testing.assert_close(scaled["image"].as_tensor(), expected.as_tensor(), rtol=0, atol=1e-2)
    back = scaling.inverse(scaled)["image"].as_tensor()
    torch.testing.assert_close(back, slope * plain + shift, rtol=1e-6, atol=1e-3 * slope)
