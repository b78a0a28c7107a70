"""Augmentation of whole batches: MONAI's transforms of one image are the oracles."""

import numpy as np
import pytest
import torch
from monai.transforms import AdjustContrast, RandBiasField

from sspformer import kspace
from sspformer.transforms import (
    BatchedBiasField,
    BatchedContrast,
    BatchedDownsampling,
    BatchedNoise,
    BatchedResolution,
    BatchedSkullStrip,
)


def batch(n=6, shape=(12, 10, 8)):
    image = torch.rand(n, 1, *shape, generator=torch.Generator().manual_seed(3))
    label = torch.zeros(n, 1, *shape, dtype=torch.uint8)
    label[(..., *(slice(side // 2, side // 2 + 2) for side in shape))] = 2
    return {"image": image, "label": label, "spacing": torch.ones(n, len(shape))}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(12, 10, 8), (14, 9)])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (BatchedContrast, {}),
        (BatchedBiasField, {}),
        (BatchedResolution, {"factor": (2.0, 3.0)}),
        (BatchedNoise, {"sigma": 0.1}),
        (BatchedSkullStrip, {}),
    ],
)
def test_each_sample_is_changed_or_left_as_it_is(kind, settings, shape):
    before, transform = batch(400, shape), kind(0.5, **settings)
    after = transform(dict(before), seeded())
    assert after["label"] is before["label"] and after["image"].dtype == torch.float32
    changed = ((after["image"] - before["image"]).abs() > 1e-5).flatten(1).any(1).float().mean()
    assert 0.4 < changed < 0.6
    assert (after["image"] >= 0).all() and after["image"].isfinite().all()
    if kind is not BatchedNoise:  # it draws its axis from a state of its own
        assert torch.equal(transform(dict(before), seeded())["image"], after["image"])
    transform.prob = 0
    torch.testing.assert_close(transform(dict(before), seeded())["image"], before["image"], atol=1e-5, rtol=0)


def test_contrast_is_that_of_monai():
    before = batch()
    after = BatchedContrast(1.0, gamma=1.7)(before, seeded())["image"]
    for image, found in zip(before["image"], after):
        torch.testing.assert_close(found, AdjustContrast(1.7)(image), atol=1e-5, rtol=0)


def test_bias_field_has_the_terms_of_monai():
    before, transform = batch(), BatchedBiasField(1.0, degree=2, coeff_range=(0.05, 0.05))
    after = transform(before, seeded())["image"]
    monai = RandBiasField(degree=2, coeff_range=(0.05, 0.05), prob=1.0)
    for image, found in zip(before["image"], after):
        wanted = torch.as_tensor(np.asarray(monai(image)))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ndim", [2, 3])
def test_what_lies_further_from_the_labels_than_the_margin_becomes_air(ndim):
    label = torch.zeros(60, 1, *[12] * ndim)
    label[(..., *[slice(4, 8)] * ndim)] = 2
    before = {"image": torch.ones_like(label), "label": label}
    after = BatchedSkullStrip(1.0, margin=2)(before, seeded())
    sides = {round(float(n) ** (1 / ndim)) for n in after["image"].flatten(1).sum(1)}
    assert sides == {4, 6, 8}  # margins of 0, 1 and 2 voxels
    assert after["image"][label > 0].all() and torch.equal(after["label"], label)
    empty = {"image": torch.ones_like(label), "label": torch.zeros_like(label)}
    assert not BatchedSkullStrip(1.0)(empty, seeded())["image"].any()


def test_the_noise_of_a_scan_falls_with_the_volume_of_the_voxels():
    transform = BatchedDownsampling((32, 32, 32), factor=2.0)
    noise = torch.randn(1, 1, *transform.window, generator=seeded())
    data = {"image": noise, "spacing": torch.ones(1, 3), "affine": torch.eye(4)[None]}
    assert float(transform(data, seeded())["image"].std()) == pytest.approx(8**-0.5, rel=0.05)


def test_prob_is_the_share_of_crops_that_are_made_coarser():
    transform = BatchedDownsampling((8, 8, 8), factor=2.0, prob=0.4)
    n = 200
    data = {"image": torch.rand(n, 1, *transform.window), "spacing": torch.ones(n, 3)}
    after = transform({**data, "affine": torch.eye(4).repeat(n, 1, 1)}, seeded())
    spacings = after["spacing"][:, 0].tolist()
    assert set(spacings) == {1.0, 2.0} and 50 <= spacings.count(2.0) <= 110


@pytest.mark.parametrize("bad", [{"prob": 1.2}, {"gamma": (2, 1)}])
def test_settings_that_make_no_sense(bad):
    with pytest.raises(ValueError, match="^(prob|gamma) must be"):
        BatchedContrast(**bad)


@pytest.mark.parametrize("shape", [(12, 10, 7), (11, 8)])
def test_downsampling_is_fourier_resampling_of_each_window(shape):
    transform = BatchedDownsampling(shape, factor=(1.0, 2.0), prob=0.8)
    n, window = 40, transform.window
    image = torch.rand(n, 1, *window, generator=seeded(5))
    affine = torch.eye(4).repeat(n, 1, 1)
    affine[:, 2, 2] = 3.0
    spacing = torch.tensor([1.0, 1.0, 3.0][: len(shape)]).repeat(n, 1)  # the third axis is coarse already
    after = transform({"image": image, "spacing": spacing, "affine": affine}, seeded(1))
    assert after["image"].shape == (n, 1, *shape)
    factors = set()
    for i in range(n):
        step = after["spacing"][i] / spacing[i]
        start = torch.linalg.inv(affine[i]) @ after["affine"][i]
        torch.testing.assert_close(start[:3, :3].diagonal()[: len(shape)], step)
        windows, sizes, inner = [slice(None)], [], [slice(None)]
        for axis, (side, whole) in enumerate(zip(shape, window)):
            wrap = 4 if step[axis] > 1 else 0
            found = [
                (length, round(length / f))
                for f in np.linspace(1, 2, 2001)
                for length in [round((side + 2 * wrap) * f)]
                if abs(length / round(length / f) - float(step[axis])) < 1e-5
                if abs((whole - length) // 2 + (round(length / f) - side) // 2 * step[axis] - start[axis, 3]) < 1e-3
            ]
            assert len(set(found)) == 1 or not wrap
            length, size = found[0] if wrap else (side, side)
            first = (whole - length) // 2
            windows.append(slice(first, first + length))
            sizes.append(size)
            inner.append(slice((size - side) // 2, (size - side) // 2 + side))
            corner = first + (size - side) // 2 * length / size
            assert abs(float(start[axis, 3]) - corner) < 1e-3
        wanted = kspace.fourier_resample(image[i][tuple(windows)][None], sizes)[0][tuple(inner)]
        torch.testing.assert_close(after["image"][i], wanted, atol=2e-5, rtol=0)
        factors.add(round(float(step[0]), 3))
    assert 1.0 in factors and len(factors) > 5
