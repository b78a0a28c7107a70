"""Augmentation of whole batches: MONAI's transforms of one image are the oracles."""

import numpy as np
import pytest
import torch
from monai.transforms import AdjustContrast, RandBiasField

from sspformer.transforms import (
    BatchedBiasField,
    BatchedContrast,
    BatchedNoise,
    BatchedResolution,
    BatchedSkullStrip,
    RandSkullStripd,
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


def test_skulls_are_stripped_as_one_by_one():
    before = batch(60)
    after = BatchedSkullStrip(1.0, margin=2)(before, seeded())["image"]
    one_by_one = RandSkullStripd("image", prob=1.0, margin=2)
    wanted = set()
    for seed in range(40):
        one_by_one.set_random_state(seed)
        wanted.add(int((one_by_one({n: v[0] for n, v in before.items()})["image"] > 0).sum()))
    found = {int(n) for n in (after > 0).flatten(1).sum(1)}
    assert len(wanted) == 3 and found == wanted


@pytest.mark.parametrize("bad", [{"prob": 1.2}, {"gamma": (2, 1)}])
def test_settings_that_make_no_sense(bad):
    with pytest.raises(ValueError, match="^(prob|gamma) must be"):
        BatchedContrast(**bad)
