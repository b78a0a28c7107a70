"""Skull stripping as an augmentation."""

import torch

from sspformer.transforms import RandSkullStripd


def head(ndim=3):
    label = torch.zeros(1, *[12] * ndim)
    label[(slice(None), *[slice(4, 8)] * ndim)] = 2
    return {"image": torch.ones(1, *[12] * ndim), "label": label}


def test_what_lies_further_than_the_margin_becomes_air():
    for ndim in (2, 3):
        strip = RandSkullStripd("image", prob=1.0, margin=2).set_random_state(0)
        sizes = set()
        for _ in range(20):
            out = strip(head(ndim))
            side = round(float(out["image"].sum()) ** (1 / ndim))
            assert out["image"].sum() == side**ndim
            assert out["image"][head(ndim)["label"] > 0].all() and torch.equal(out["label"], head(ndim)["label"])
            sizes.add(side)
        assert sizes == {4, 6, 8}  # margins of 0, 1 and 2 voxels


def test_a_crop_without_labels_becomes_air_and_probability_counts():
    empty = {"image": torch.ones(1, 6, 6, 6), "label": torch.zeros(1, 6, 6, 6)}
    assert RandSkullStripd("image", prob=1.0)(empty)["image"].sum() == 0
    strip = RandSkullStripd("image", prob=0.25).set_random_state(0)
    stripped = sum(float(strip(empty)["image"].sum()) == 0 for _ in range(400))
    assert 70 < stripped < 130


def test_the_same_seed_strips_the_same():
    a, b = (RandSkullStripd("image", prob=0.5).set_random_state(3) for _ in range(2))
    assert all(torch.equal(a(head())["image"], b(head())["image"]) for _ in range(10))
