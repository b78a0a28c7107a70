"""Crops of many scans in one resampling: MONAI's own at the same place, one by one, is the oracle."""

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import SpatialResample

from sspformer.data import ScanBuffer
from sspformer.transforms import CropSampler

CONFIGS = Path(__file__).resolve().parents[2] / "bundle" / "configs"
SHAPES = [(20, 24, 18), (16, 30, 22), (9, 12, 31)]
SPACINGS = [(1.0, 1.0, 1.0), (0.9, 2.0, 1.2), (1.5, 0.7, 3.0)]


def scans(generator=None):
    """Smooth images with label maps, of several shapes and spacings, float16 and uint8."""
    items = []
    for shape, spacing in zip(SHAPES, SPACINGS):
        coarse = torch.rand(1, 1, 5, 5, 5, generator=generator or torch.Generator().manual_seed(0))
        image = torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0]
        affine = torch.diag(torch.tensor([*spacing, 1.0], dtype=torch.float64))
        affine[:3, 3] = torch.tensor([-3.0, 7.0, 11.0])
        items.append(
            {
                "image": MetaTensor(image.half(), affine=affine),
                "label": MetaTensor((4 * image).to(torch.uint8), affine=affine),
            }
        )
    return items


def draw(sampler, index, seed=0):
    buffer = ScanBuffer(scans(), ["image", "label"])
    index = torch.tensor(index)
    matrix = sampler(buffer.shape[index], buffer.spacing[index], torch.Generator().manual_seed(seed))
    return buffer, matrix, buffer.crops(index, matrix, sampler.size)


@pytest.mark.parametrize("settings", [{}, {"scale": (0.7, 1.4)}, {"rotate": 0.5, "flip_prob": 0.5, "margin": 0.3}])
def test_crops_are_those_of_monai_at_the_same_place(settings):
    index = [0, 1, 2, 1, 0, 2]
    buffer, _, crops = draw(CropSampler((12, 10, 8), **settings), index)
    items = scans()
    for n, scan in enumerate(index):
        for key, mode in (("image", "bilinear"), ("label", "nearest")):
            source = items[scan][key].to(torch.float64)
            wanted = SpatialResample(mode=mode, padding_mode="border", align_corners=True, dtype=torch.float64)(
                source, dst_affine=crops["affine"][n].double(), spatial_size=(12, 10, 8)
            )[0]
            corner = torch.linalg.inv(items[scan][key].affine) @ crops["affine"][n].double()
            grid = torch.stack(torch.meshgrid(*(torch.arange(s).double() for s in (12, 10, 8)), indexing="ij"), -1)
            point = grid @ corner[:3, :3].T + corner[:3, 3]
            sides = torch.tensor(SHAPES[scan])
            inside = ((point > -0.49) & (point < sides - 0.51)).all(-1)
            outside = ((point < -0.51) | (point > sides - 0.49)).any(-1)
            found = crops[key][n, 0].double()
            near = inside if mode == "bilinear" else inside & ((point % 1 - 0.5).abs() > 1e-3).all(-1)
            torch.testing.assert_close(found[near], wanted.as_tensor().double()[near], atol=2e-3, rtol=0)
            assert (found[outside] == 0).all()
            assert near.float().mean() > 0.3


def test_without_scale_and_rotation_crops_are_voxels_of_the_scan():
    buffer, matrix, crops = draw(CropSampler((8, 8, 8), flip_prob=0.5), [0, 0, 1, 1])
    assert torch.equal(matrix, matrix.round())
    start = matrix[0, :, 3].long()
    flips = [axis for axis in range(3) if matrix[0, axis, axis] < 0]
    corner = torch.minimum(start, start + (matrix[0, :, :3].sum(1) * 7).long())
    x, y, z = corner.tolist()
    wanted = scans()[0]["image"][0, x : x + 8, y : y + 8, z : z + 8].float().as_tensor().flip(flips)
    assert torch.equal(crops["image"][0, 0], wanted)
    assert torch.equal(crops["spacing"][:2], torch.ones(2, 3))


def test_crops_stay_within_the_scan_and_reach_all_of_it():
    sampler = CropSampler((8, 8, 8))
    shape = torch.tensor([[20, 8, 5]]).expand(4000, 3)
    starts = sampler(shape, torch.ones(4000, 3), torch.Generator().manual_seed(0))[..., 3]
    assert starts[:, 0].min() == 0 and starts[:, 0].max() == 12
    assert (starts[:, 1] == 0).all()
    assert starts[:, 2].unique().tolist() == [-3, -2, -1, 0]  # a smaller scan lies anywhere in the crop


def test_scale_and_angles_are_drawn_within_their_ranges_in_mm():
    spacing = torch.tensor([[1.0, 2.0, 4.0]]).expand(3000, 3)
    sampler = CropSampler((8, 8, 8), scale=(0.8, 1.25), rotate=0.3, prob=0.6)
    matrix = sampler(torch.full((3000, 3), 40), spacing, torch.Generator().manual_seed(0))
    step = matrix[:, :, :3] * spacing[:, :, None]  # mm
    length = step.square().sum(1).sqrt() / spacing
    assert length.min() >= 0.8 - 1e-5 and length.max() <= 1.25 + 1e-5
    unit = step / step.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(unit.transpose(1, 2) @ unit, torch.eye(3).expand(3000, 3, 3), atol=1e-5, rtol=0)
    turned = (unit - torch.eye(3)).abs().amax((1, 2)) > 1e-6
    assert abs(turned.float().mean() - 0.6) < 0.03
    assert (length[~turned] == 1).all()


def test_slices_keep_their_plane():
    sampler = CropSampler((8, 8), scale=(0.8, 1.25), rotate=0.5, flip_prob=0.5)
    matrix = sampler(torch.tensor([[20, 20, 9]]).expand(500, 3), torch.ones(500, 3), torch.Generator().manual_seed(0))
    assert sampler.size == (8, 8, 1) and sampler.spatial_dims == 2
    torch.testing.assert_close(matrix[:, 2, :3], torch.tensor([0.0, 0.0, 1.0]).expand(500, 3))
    assert set(matrix[:, 2, 3].tolist()) == set(range(9))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop_size": (8,)}, "crop_size must be two or three sides"),
        ({"scale": (1.2, 0.8)}, "scale must be"),
        ({"scale": 0}, "scale must be"),
        ({"flip_prob": 1.5}, "flip_prob must be between 0 and 1"),
        ({"rotate": -1}, "rotate and margin"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        CropSampler(**{"crop_size": (8, 8, 8), **settings})


def test_several_channels_are_refused_by_name():
    item = {"image": MetaTensor(torch.zeros(2, 4, 4, 4), meta={"filename_or_obj": "two.nii"})}
    with pytest.raises(ValueError, match="one channel.*two.nii"):
        ScanBuffer([item])


def test_the_same_seed_draws_the_same():
    first, again, other = (draw(CropSampler((8, 8, 8), rotate=0.2), [0, 1], seed)[2]["image"] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert np.isfinite(first.numpy()).all()


def test_a_turned_crop_contains_the_voxel_that_it_lies_near():
    sampler, n = CropSampler((16, 16, 8), rotate=0.5, scale=(0.8, 1.2), flip_prob=0.5, margin=1.0), 300
    shape, spacing = torch.tensor([[80, 80, 40]]).expand(n, 3), torch.tensor([[0.9, 0.9, 6.0]]).expand(n, 3)
    near = torch.tensor([40.0, 35.0, 20.0]).expand(n, 3)
    matrix = sampler(shape, spacing, torch.Generator().manual_seed(0), near)
    place = torch.linalg.solve(matrix[:, :, :3], (near - matrix[:, :, 3])[..., None])[..., 0]
    assert (place > -0.01).all() and (place < torch.tensor([15.01, 15.01, 7.01])).all()
    assert place[:, 0].min() < 2 and place[:, 0].max() > 13


@pytest.mark.parametrize("margin", [0.0, 0.25])
def test_a_crop_contains_the_voxel_that_it_lies_near_and_reaches_no_further_beyond_its_scan(margin):
    sampler, n = CropSampler((8, 8, 8), flip_prob=0.5, margin=margin), 300
    shape, spacing = torch.tensor([[20, 24, 6]]).expand(n, 3), torch.ones(n, 3)
    generator = torch.Generator().manual_seed(0)
    near = (torch.rand(n, 3, generator=generator) * shape).floor()
    near[::3] = float("nan")
    matrix = sampler(shape, spacing, generator, near)
    ends = torch.stack([matrix[:, :, 3], matrix[:, :, 3] + 7 * matrix[:, :, :3].sum(dim=2)])
    low, high = ends.amin(dim=0), ends.amax(dim=0)
    assert (matrix == matrix.round()).all()  # on the voxels of the scan
    asked = ~near.isnan()
    assert ((near >= low) & (near <= high))[asked].all()
    assert (low[:, :2] >= -8 * margin - 0.5).all() and (high[:, :2] <= shape[:, :2] + 8 * margin - 0.5).all()
    place = ((near - low) / 7)[asked[:, 0], 0]
    assert place.min() < 0.1 and place.max() > 0.9  # anywhere in the crop


@pytest.mark.parametrize("task, shape", [("train", (120, 120, 90)), ("hippocampus", (35, 51, 35))])
def test_the_crops_of_a_segmentation_are_not_spent_on_what_is_beyond_the_scan(task, shape):
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{name}.json") for name in dict.fromkeys(("train", task))])
    parser["imports"] = []
    sampler = parser.get_parsed_content("crops#sampler")
    scan = ScanBuffer([{"image": MetaTensor(torch.ones(1, *shape))}])
    index = torch.zeros(50, dtype=torch.int64)
    matrix = sampler(scan.shape[index], scan.spacing[index], torch.Generator().manual_seed(0))
    most = np.prod([min(side, crop) / crop for side, crop in zip(shape, sampler.size)])
    assert scan.crops(index, matrix, sampler.size)["image"].mean() > 0.9 * most
