"""Laws of lower resolution: the acquisition it stands for, factors that are drawn, and the transforms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose

from sspformer import kspace
from sspformer.transforms import (
    RandReducedResolution,
    RandReducedResolutiond,
    ResolutionSampler,
    reduce_resolution,
)


def random_image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("sides", [(24, 17), (24, 17, 10), (9, 16, 12)])
@pytest.mark.parametrize("factors", [(1, 1, 1), (2, 1, 1), (2, 4, 2), (1.5, 3.1, 1.7), (4, 2.5, 100)])
def test_it_is_an_acquisition_with_fewer_lines(sides, factors):
    image, factors = random_image(2, 3, *sides), factors[: len(sides)]
    lines = [max(1, round(side / factor)) for side, factor in zip(sides, factors)]
    acquired = kspace.fourier_resample(image, lines)
    reduced = reduce_resolution(image, factors)
    torch.testing.assert_close(reduced, kspace.fourier_resample(acquired, sides), rtol=0, atol=2e-6)
    torch.testing.assert_close(kspace.fourier_resample(reduced, lines), acquired, rtol=0, atol=2e-6)
    torch.testing.assert_close(reduce_resolution(reduced, factors), reduced, rtol=0, atol=2e-6)  # a projection
    torch.testing.assert_close(reduced.mean(), image.mean())


def test_each_sample_has_factors_of_its_own():
    image = random_image(3, 1, 12, 10, 9)
    factors = torch.tensor([[1.0, 1.0, 1.0], [2.0, 1.0, 3.0], [1.5, 4.0, 2.0]])
    batch = reduce_resolution(image, factors)
    torch.testing.assert_close(batch[0], image[0], rtol=0, atol=1e-6)
    for i in range(3):
        torch.testing.assert_close(batch[i], reduce_resolution(image[i : i + 1], factors[i])[0])


def test_factors_of_the_wrong_shape():
    with pytest.raises(ValueError, match="factors have shape"):
        reduce_resolution(random_image(2, 1, 8, 8), (2, 2, 2))


def test_factors_cover_the_range_and_follow_the_patterns():
    image = torch.zeros(3000, 1, 1, 1, 1)
    factors = ResolutionSampler((1.5, 4.0)).factors(image, generator())
    reduced = factors > 1
    assert factors[reduced].min() >= 1.5 and factors[reduced].max() <= 4
    n_reduced = reduced.sum(dim=1)
    for n in (1, 2, 3):  # through_plane, in_plane, isotropic: a third each
        assert abs((n_reduced == n).float().mean() - 1 / 3) < 0.04
    assert (abs(reduced[n_reduced == 1].float().mean(dim=0) - 1 / 3) < 0.06).all()  # any axis is the slice axis
    # one factor a sample, on a uniform scale
    largest = factors.amax(dim=1)
    assert ((factors == 1) | (factors == largest[:, None])).all()
    assert abs(largest.mean() - 2.75) < 0.05


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"patterns": "isotropic"}, (2, 2, 2)),
        ({"patterns": "through_plane", "axis": 2}, (1, 1, 2)),
        ({"patterns": ["in_plane"], "axis": 0}, (1, 2, 2)),
    ],
)
def test_one_pattern_and_one_factor(settings, expected):
    factors = ResolutionSampler(2.0, **settings).factors(torch.zeros(5, 1, 4, 4, 4), generator())
    assert torch.equal(factors, torch.tensor(expected, dtype=torch.float32).expand(5, 3))


def test_in_2d():
    factors = ResolutionSampler(3).factors(torch.zeros(200, 1, 8, 8), generator())
    assert {tuple(row) for row in factors.tolist()} == {(3, 3), (3, 1), (1, 3)}


@pytest.mark.parametrize(
    "settings",
    [{"factor": 0.5}, {"factor": (4, 2)}, {"factor": (1, 2, 3)}, {"patterns": ()}, {"patterns": ["oblique"]}],
)
def test_errors_name_the_argument(settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))} must"):
        ResolutionSampler(**settings)


# --- the transforms


def scan(seed: int = 0) -> MetaTensor:
    return MetaTensor(random_image(2, 10, 8, 6, seed=seed), affine=torch.diag(torch.tensor([1.0, 1.0, 5.0, 1.0])))


def test_array_transform_keeps_the_metadata_and_is_reproducible():
    image, transform = scan(), RandReducedResolution(factor=(1.5, 4))
    before = image.clone()
    first = transform.set_random_state(7)(image)
    assert isinstance(first, MetaTensor) and first.shape == image.shape and first.dtype == torch.float32
    torch.testing.assert_close(first.affine, image.affine)
    assert torch.equal(image, before), "the input was changed"
    assert not torch.allclose(first, image)
    second = transform(image)
    assert torch.equal(transform(image, randomize=False), second) and not torch.equal(first, second)
    assert torch.equal(transform.set_random_state(7)(image), first)
    assert RandReducedResolution()(np.random.RandomState(0).rand(1, 6, 5)).shape == (1, 6, 5)


def test_dictionary_twin_gives_all_keys_the_same_factors():
    image, other = scan(), scan(1)
    array = RandReducedResolution().set_random_state(3)
    result = RandReducedResolutiond(["image", "other"]).set_random_state(3)({"image": image, "other": other, "n": 1})
    assert torch.equal(result["image"], array(image)) and result["n"] == 1
    assert torch.equal(result["other"], array(other, randomize=False))


def test_prob_0_is_a_no_op():
    image = scan().mul(200).to(torch.uint8)
    for result in (
        RandReducedResolution(prob=0.0)(image),
        RandReducedResolutiond("image", prob=0.0)({"image": image})["image"],
    ):
        assert result.dtype == torch.float32 and torch.equal(result, image.float())


def test_missing_keys():
    with pytest.raises(KeyError, match="other"):
        RandReducedResolutiond(["image", "other"])({"image": scan()})
    assert set(RandReducedResolutiond(["image", "other"], allow_missing_keys=True)({"image": scan()})) == {"image"}


def test_inside_compose():
    def reduced(seed):
        pipeline = Compose([RandReducedResolutiond("image", prob=0.9)]).set_random_state(seed)
        return [pipeline({"image": scan()})["image"] for _ in range(2)]

    first, second = reduced(0)
    again = reduced(0)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert not torch.equal(first, second) and not torch.equal(first, reduced(1)[0])


# --- crops on a coarser grid
