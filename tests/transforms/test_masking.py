"""Laws of inverse frequency projection masking (docs/method.md): counts, probabilities, invariances, strata.

Statistical tolerances are several standard errors of the estimate, with fixed seeds; draws are batched.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from scipy.stats import chi2, spearmanr

from sspformer.transforms import (
    InverseFrequencyMask,
    MaskIndices,
    RandInverseFrequencyMask,
    RandInverseFrequencyMaskd,
    draw_mask,
    high_frequency_map,
    inverse_frequency_mask,
    patch_energy,
    voxel_mask,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=seeded(seed))


def head(*sides: int, seed: int = 0) -> torch.Tensor:
    """A textured ball, bright against air of 0: ``(1, 1, *sides)``."""
    axes = torch.meshgrid(*[torch.linspace(-1, 1, side) for side in sides], indexing="ij")
    inside = sum(a.square() for a in axes) < 0.6
    return (inside * (1 + 0.5 * random_image(*sides, seed=seed)))[None, None]


def texture(*sides: int) -> torch.Tensor:
    """A checkerboard of one voxel, +1 and -1."""
    axes = torch.meshgrid(*[torch.arange(side) for side in sides], indexing="ij")
    return 1.0 - 2.0 * (sum(axes) % 2)


def frequency_of_masking(z: torch.Tensor, n_draws: int, **settings) -> torch.Tensor:
    """How often each token of ``z`` (N,) is masked, a share of ``n_draws``."""
    indices = draw_mask(z.expand(n_draws, -1), generator=seeded(), **settings)
    return indices.to_map().float().mean(dim=0)


# --- counts and indices


@pytest.mark.parametrize(
    "sides, patch",
    [
        ((32, 32), (8, 8)),
        ((33, 20), (8, 4)),
        ((16, 16, 16), (4, 4, 4)),
        ((17, 12, 9), (4, 5, 3)),
        ((24, 24, 5), (8, 8, 1)),
    ],
)
@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.75, 0.9])
@pytest.mark.parametrize("stratify", [False, True])
def test_exact_counts_and_partition(sides, patch, ratio, stratify):
    n_tokens = math.prod(-(-side // p) for side, p in zip(sides, patch, strict=True))
    image = torch.cat([head(*sides, seed=i) for i in range(3)])
    indices = inverse_frequency_mask(image, patch, ratio, beta=2.0, stratify=stratify, generator=seeded())
    z, foreground = patch_energy(image, patch)
    assert z.shape == foreground.shape == (3, n_tokens)
    n_mask = round(ratio * n_tokens)
    assert indices.mask.shape == (3, n_mask) and indices.keep.shape == (3, n_tokens - n_mask)
    assert indices.mask.dtype == indices.keep.dtype == torch.int64
    assert (indices.mask.diff(dim=1) > 0).all() and (indices.keep.diff(dim=1) > 0).all()
    both = torch.cat([indices.keep, indices.mask], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(n_tokens).expand(3, -1))
    masked = indices.to_map()
    assert masked.dtype == torch.bool and torch.equal(masked.sum(dim=1), torch.full((3,), n_mask))
    assert masked.gather(1, indices.mask).all() and not masked.gather(1, indices.keep).any()


@pytest.mark.parametrize("n_tokens", [2, 3, 7, 10, 50, 101])
@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_count_is_python_rounding(n_tokens, ratio):
    if round(ratio * n_tokens) == n_tokens:
        with pytest.raises(ValueError, match="mask ratio"):
            draw_mask(torch.zeros(1, n_tokens), ratio, 0.0)
    else:
        assert draw_mask(torch.zeros(1, n_tokens), ratio, 0.0).mask.shape[1] == round(ratio * n_tokens)


@pytest.mark.parametrize("ratio", [-0.1, 0.0, 1.0, 1.5, 0.01])
def test_ratio_errors(ratio):
    with pytest.raises(ValueError, match="mask ratio"):
        draw_mask(torch.zeros(1, 16), ratio, 1.0)


# --- the draw


@pytest.mark.parametrize("strata", [False, True])
def test_beta_0_is_uniform(strata):
    n_tokens, n_draws, ratio = 40, 20000, 0.75
    z = torch.randn(n_tokens, generator=seeded())
    foreground = (torch.arange(n_tokens) < 20).expand(n_draws, -1) if strata else None
    counts = n_draws * frequency_of_masking(z, n_draws, ratio=ratio, beta=0.0, foreground=foreground)
    # draws without replacement: the variance of a count is n p (1 - p), the counts' sum is fixed
    statistic = float((counts - n_draws * ratio).square().sum() / (n_draws * ratio * (1 - ratio)))
    statistic *= (n_tokens - 1) / n_tokens
    degrees = n_tokens - (2 if strata else 1)
    assert chi2.sf(statistic, degrees) > 0.001
    assert chi2.cdf(statistic, degrees) > 0.001  # nor too even


def test_masking_rises_with_energy():
    z = torch.randn(64, generator=seeded(1)).sort().values
    previous = None
    for beta in (0.5, 1.0, 2.0):
        share = frequency_of_masking(z, 20000, ratio=0.5, beta=beta)
        assert spearmanr(z, share).statistic > 0.995
        binned = share.reshape(8, 8).mean(dim=1)
        assert (binned.diff() > 0).all()
        spread = float(binned[-1] - binned[0])
        assert previous is None or spread > previous
        previous = spread
    opposite = frequency_of_masking(z, 5000, ratio=0.5, beta=-1.0)
    assert spearmanr(z, opposite).statistic < -0.98


def test_draw_is_plackett_luce():
    """Inclusion probabilities of k draws in turn without replacement, by summing over all ordered draws."""
    z, beta, k = torch.tensor([-1.2, -0.3, 0.0, 0.4, 1.5]), 1.0, 3
    weight = np.exp(beta * z.numpy().astype(float))
    exact = np.zeros(5)

    def walk(chosen: tuple[int, ...], probability: float) -> None:
        if len(chosen) == k:
            exact[list(chosen)] += probability
            return
        left = [i for i in range(5) if i not in chosen]
        for i in left:
            walk((*chosen, i), probability * weight[i] / weight[left].sum())

    walk((), 1.0)
    assert exact.sum() == pytest.approx(k)
    n_draws = 100_000
    share = frequency_of_masking(z, n_draws, ratio=k / 5, beta=beta).numpy()
    error = np.sqrt(exact * (1 - exact) / n_draws)
    assert (np.abs(share - exact) < 4.5 * error).all()


def test_one_beta_a_sample():
    z = torch.randn(50, generator=seeded(2)).sort().values.expand(4000, -1)
    beta = torch.tensor([0.0, 3.0]).repeat_interleave(2000)
    masked = draw_mask(z, 0.5, beta, generator=seeded()).to_map().float()
    for half, expected in ((slice(0, 2000), 0.5), (slice(2000, None), 0.9)):
        top = float(masked[half, 40:].mean())
        assert top == pytest.approx(0.5, abs=0.02) if expected == 0.5 else top > expected
    both = draw_mask(z, 0.5, torch.full((4000,), 3.0), generator=seeded())
    assert torch.equal(both.mask[2000:], draw_mask(z, 0.5, beta, generator=seeded()).mask[2000:])
    assert torch.equal(both.mask, draw_mask(z, 0.5, 3.0, generator=seeded()).mask)


def test_generator_makes_the_draw_reproducible():
    image = head(32, 32)
    draw = [inverse_frequency_mask(image, (4, 4), generator=seeded(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draw[0].mask, draw[1].mask)
    assert not torch.equal(draw[0].mask, draw[2].mask)


# --- strata


@pytest.mark.parametrize("n_foreground", [0, 1, 3, 10, 33, 63, 64])
@pytest.mark.parametrize("ratio", [0.4, 0.75, 0.9])
@pytest.mark.parametrize("beta", [0.0, 50.0, -50.0])
def test_each_stratum_is_masked_at_the_ratio(n_foreground, ratio, beta):
    n_tokens, n_draws = 64, 20
    foreground = (torch.arange(n_tokens) < n_foreground).expand(n_draws, -1)
    z = torch.randn(n_draws, n_tokens, generator=seeded()) + 3 * foreground
    masked = draw_mask(z, ratio, beta, foreground, generator=seeded(1)).to_map()
    assert (masked.sum(dim=1) == round(ratio * n_tokens)).all()
    for stratum in (foreground, ~foreground):
        in_stratum = (masked & stratum).sum(dim=1)
        assert ((in_stratum - ratio * stratum.sum(dim=1)).abs() <= 1).all()


def test_visible_set_is_never_all_air():
    image = head(48, 48).expand(50, -1, -1, -1)
    settings = dict(patch_size=(4, 4), ratio=0.75, beta=50.0)
    with_strata = inverse_frequency_mask(image, **settings, generator=seeded())
    _, foreground = patch_energy(image, (4, 4))
    visible = foreground.gather(1, with_strata.keep).float().mean(dim=1)
    n_tokens, n_foreground = foreground.shape[1], int(foreground[0].sum())
    assert 0.3 < n_foreground / n_tokens < 0.7
    assert (visible - n_foreground / n_tokens).abs().max() <= 1 / with_strata.keep.shape[1]
    # without them it is nearly all air: what the strata are for
    without = inverse_frequency_mask(image, **settings, stratify=False, generator=seeded())
    assert foreground.gather(1, without.keep).float().mean() < 0.05


def test_foreground_is_the_head():
    image = head(64, 64)
    _, foreground = patch_energy(image, (4, 4))
    inside = torch.nn.functional.avg_pool2d((image > 0).float(), 4).flatten(1)
    assert torch.equal(foreground, inside >= 0.1)


# --- energy


@pytest.mark.parametrize("sides, patch", [((40, 36), (8, 4)), ((16, 20, 12), (4, 4, 4))])
@pytest.mark.parametrize("scale, offset", [(1e-3, 0.0), (2500.0, 0.0), (1.0, 10.0), (0.1, -3.0), (40.0, 400.0)])
def test_scaling_and_offset_change_nothing(sides, patch, scale, offset):
    image = head(*sides)
    z, foreground = patch_energy(image, patch)
    z_changed, foreground_changed = patch_energy(scale * image + offset, patch)
    assert torch.equal(foreground, foreground_changed)
    # float32 keeps 6e-8 of the offset, which is 1e-5 of the detail in air and less than that in tissue
    torch.testing.assert_close(z_changed[foreground], z[foreground], rtol=0, atol=2e-3)
    torch.testing.assert_close(z_changed, z, rtol=0, atol=2e-2)
    first = inverse_frequency_mask(image, patch, generator=seeded())
    second = inverse_frequency_mask(scale * image + offset, patch, generator=seeded())
    assert torch.equal(first.mask, second.mask)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1234.567, 1e6])
@pytest.mark.parametrize("sides", [(32, 30), (16, 13, 9)])
def test_flat_image_is_masked_uniformly(value, sides):
    image = torch.full((2, 1, *sides), value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        indices = inverse_frequency_mask(image, (4,) * len(sides), 0.5, beta=5.0, generator=seeded())
        z, _ = patch_energy(image, (4,) * len(sides))
    assert torch.equal(z, torch.zeros_like(z))
    uniform = draw_mask(torch.zeros_like(z), 0.5, 0.0, generator=seeded())
    assert torch.equal(indices.mask, uniform.mask)


def test_energy_is_standardised_over_the_foreground():
    z, foreground = patch_energy(torch.cat([head(48, 40, seed=i) for i in range(2)]), (4, 4))
    for i in range(2):
        inside = z[i, foreground[i]]
        assert float(inside.mean()) == pytest.approx(0, abs=1e-5)
        assert float(inside.std(correction=0)) == pytest.approx(1, abs=1e-4)
        assert z[i, ~foreground[i]].mean() < inside.mean()


@pytest.mark.parametrize("sides, patch, cell", [((32, 32), (8, 8), (2, 1)), ((24, 24, 24), (6, 6, 6), (1, 2, 2))])
def test_texture_has_the_highest_energy(sides, patch, cell):
    axes = torch.meshgrid(*[torch.linspace(0, 1, side) for side in sides], indexing="ij")
    image = 2 + sum(torch.sin(2 * math.pi * a) for a in axes)
    where = tuple(slice(c * p, (c + 1) * p) for c, p in zip(cell, patch, strict=True))
    image[where] += 0.5 * texture(*patch)
    z, _ = patch_energy(image[None, None], patch)
    grid = [side // p for side, p in zip(sides, patch, strict=True)]
    assert int(z.argmax()) == np.ravel_multi_index(cell, grid)
    detail = high_frequency_map(image[None, None])
    assert detail.shape == (1, 1, *sides) and detail.min() >= 0


def test_channels_are_averaged():
    image = random_image(1, 2, 16, 16)
    each = torch.cat([high_frequency_map(image[:, i : i + 1]) for i in range(2)], dim=1)
    torch.testing.assert_close(high_frequency_map(image), each.mean(dim=1, keepdim=True), rtol=0, atol=1e-5)
    swapped = patch_energy(image.flip(1), (4, 4))[0]
    torch.testing.assert_close(patch_energy(image, (4, 4))[0], swapped, rtol=0, atol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"gamma": 2.0}])
def test_stripes_of_equal_mm_weigh_equally(settings):
    """20 mm stripes along a 1 mm axis and along a 5 mm axis are the same detail."""
    sides, spacing = (80, 16), (1.0, 5.0)
    place = [torch.arange(side) * mm for side, mm in zip(sides, spacing, strict=True)]
    along_fine = torch.cos(2 * math.pi * place[0] / 20)[:, None].expand(sides)[None, None]
    along_thick = torch.cos(2 * math.pi * place[1] / 20)[None, :].expand(sides)[None, None]

    def weight(image, mm):
        return float(high_frequency_map(image, mm, margin=0, **settings).square().mean() / image.square().mean())

    assert weight(along_fine, spacing) == pytest.approx(weight(along_thick, spacing), rel=1e-4)
    # in voxels the thick axis would count far more
    assert weight(along_thick, None) > 5 * weight(along_fine, None)


def test_alternating_thick_slices_are_not_fine_detail():
    """Slices of 5 mm that alternate (10 mm a cycle) weigh as 10 mm stripes in plane, and less than 4 mm ones."""
    sides, spacing = (40, 40, 8), (1.0, 1.0, 5.0)
    x = torch.arange(40)

    def in_plane(mm):
        return torch.cos(2 * math.pi * x / mm).reshape(-1, 1, 1).expand(sides)[None, None]

    alternating = torch.cos(math.pi * torch.arange(8)).expand(sides)[None, None]

    def relative(image, mm):
        return float(high_frequency_map(image, mm, margin=0).square().mean() / image.square().mean())

    assert relative(alternating, spacing) == pytest.approx(relative(in_plane(10), spacing), rel=1e-4)
    assert relative(alternating, spacing) < 0.2 * relative(in_plane(4), spacing)
    assert relative(alternating, None) > relative(in_plane(4), None)


@pytest.mark.parametrize("sides, patch", [((48, 48), (8, 8)), ((24, 24, 24), (6, 6, 6))])
def test_margin_keeps_the_border_of_a_crop_from_outshining_texture(sides, patch):
    """A ramp has no edge, but its periodic continuation has one: without the mirror it beats a texture of 5 %."""
    ramp = torch.linspace(0, 1, sides[0]).reshape(-1, *[1] * (len(sides) - 1)).expand(sides).clone()
    centre = tuple(slice(2 * p, 3 * p) for p in patch)
    ramp[centre] += 0.05 * texture(*patch)
    image = ramp[None, None]
    grid = [side // p for side, p in zip(sides, patch, strict=True)]
    pool = torch.nn.functional.avg_pool2d if len(sides) == 2 else torch.nn.functional.avg_pool3d

    def border_over_texture(margin):
        energy = pool(high_frequency_map(image, margin=margin).square(), patch).reshape(grid)
        return float(torch.stack([energy[0].max(), energy[-1].max()]).max() / energy[(2,) * len(sides)])

    assert border_over_texture(0) > 1
    assert border_over_texture(4) < 1
    assert border_over_texture(4) < border_over_texture(0) / 3
    z, _ = patch_energy(image, patch)  # margin 4 is what the method uses
    assert int(z.argmax()) == np.ravel_multi_index((2,) * len(sides), grid)


@pytest.mark.parametrize("sides", [(3, 20), (16, 16, 1), (2, 2, 9)])
def test_margin_fits_short_sides(sides):
    detail = high_frequency_map(random_image(1, 1, *sides))
    assert detail.shape == (1, 1, *sides) and detail.isfinite().all()


def test_batch_equals_one_by_one():
    image = torch.cat([(i + 1) * head(16, 12, 10, seed=i) for i in range(3)])
    image[1] = 7.0  # a flat one beside others
    spacing = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 5.0], [1.0, 1.0, 5.0]])
    z, foreground = patch_energy(image, (4, 4, 4), spacing)
    for i in range(3):
        alone, inside = patch_energy(image[i : i + 1], (4, 4, 4), spacing[i])
        torch.testing.assert_close(z[i : i + 1], alone, rtol=0, atol=1e-3)
        assert torch.equal(foreground[i : i + 1], inside)


@pytest.mark.parametrize("sides, patch", [((8, 12), (4, 4)), ((9, 7, 5), (4, 3, 2))])
def test_voxel_mask_covers_whole_patches(sides, patch):
    grid = [-(-side // p) for side, p in zip(sides, patch, strict=True)]
    n_tokens = math.prod(grid)
    indices = draw_mask(torch.zeros(2, n_tokens), 0.5, 0.0, generator=seeded())
    mask = voxel_mask(indices, sides, patch)
    assert mask.shape == (2, 1, *sides) and mask.dtype == torch.bool
    masked = indices.to_map().reshape(2, *grid)
    for voxel in np.ndindex(*sides):
        token = tuple(v // p for v, p in zip(voxel, patch, strict=True))
        assert torch.equal(mask[(slice(None), 0, *voxel)], masked[(slice(None), *token)])


# --- the strategy and the transforms


def test_the_strategy_follows_its_beta():
    strategy = InverseFrequencyMask(4, spatial_dims=2, ratio=0.5, beta=0.0, stratify=False)
    assert strategy.patch_size == (4, 4)
    image = head(32, 32).expand(200, -1, -1, -1)
    z, _ = patch_energy(image, (4, 4))
    energy = []
    for beta in (0, 1, 4):
        strategy.set_beta(beta)
        indices = strategy(image, generator=seeded())
        energy.append(float(z.gather(1, indices.mask).mean()))
        expected = inverse_frequency_mask(image, (4, 4), 0.5, float(beta), stratify=False, generator=seeded())
        assert torch.equal(indices.mask, expected.mask)
    assert energy[0] < energy[1] < energy[2]


def scan(sides=(18, 16, 5), spacing=(1.0, 1.0, 5.0), seed: int = 0) -> MetaTensor:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-10, 5, 3]
    return MetaTensor(head(*sides, seed=seed)[0], affine=torch.tensor(affine))


def test_array_transform():
    image = scan()
    patch = (4, 4, 2)
    transform = RandInverseFrequencyMask(patch, ratio=0.6).set_random_state(0)
    mask = transform(image)
    assert isinstance(mask, MetaTensor) and mask.dtype == torch.uint8 and mask.shape == (1, 18, 16, 5)
    torch.testing.assert_close(mask.affine, image.affine)
    mask.meta["touched"] = True
    assert "touched" not in image.meta
    # one value in a patch, and as many patches as the ratio says (5 x 4 x 3 of them)
    corners = mask.as_tensor()[0, ::4, ::4, ::2]
    whole = corners
    for axis, p in enumerate(patch):
        whole = whole.repeat_interleave(p, dim=axis)
    assert torch.equal(mask.as_tensor()[0], whole[:18, :16, :5])
    assert set(mask.unique().tolist()) == {0, 1}
    assert int(corners.sum()) == round(0.6 * 60)
    # reproducible
    assert torch.equal(transform(image, randomize=False), mask)
    assert not torch.equal(transform(image), mask)
    assert torch.equal(transform.set_random_state(0)(image), mask)
    # 2D and arrays, one number for the patch
    assert RandInverseFrequencyMask(4)(np.random.RandomState(0).rand(2, 12, 16)).shape == (1, 12, 16)


def test_array_transform_reads_spacing_from_the_affine(monkeypatch):
    seen = []
    call = InverseFrequencyMask.__call__

    def spy(self, image, spacing, generator):
        seen.append(spacing)
        return call(self, image, spacing, generator)

    monkeypatch.setattr(InverseFrequencyMask, "__call__", spy)
    RandInverseFrequencyMask((4, 4, 2))(scan(spacing=(0.5, 1.5, 5.0)))
    np.testing.assert_allclose(seen[0], [0.5, 1.5, 5.0])


def test_dictionary_twin_equals_the_array_transform():
    data = {"image": scan(), "other": scan(seed=1), "label": 3}
    array = RandInverseFrequencyMask(4, ratio=0.6).set_random_state(5)
    twin = RandInverseFrequencyMaskd(["image", "other"], 4, ratio=0.6).set_random_state(5)
    result = twin(data)
    assert set(result) == {"image", "other", "label", "image_mask", "other_mask"}
    assert torch.equal(result["image_mask"], array(data["image"]))
    assert torch.equal(result["other_mask"], array(data["other"]))
    assert result["image"] is data["image"] and "image_mask" not in data
    named = RandInverseFrequencyMaskd("image", 4, mask_key_postfix="hidden")(data)
    assert "image_hidden" in named


def test_missing_keys():
    with pytest.raises(KeyError, match="other"):
        RandInverseFrequencyMaskd("other", 4)({"image": scan()})
    assert set(RandInverseFrequencyMaskd("other", 4, allow_missing_keys=True)({"image": scan()})) == {"image"}


def test_inside_compose():
    def masks(seed):
        pipeline = Compose([RandInverseFrequencyMaskd("image", 4)]).set_random_state(seed)
        return [pipeline({"image": scan()})["image_mask"] for _ in range(2)]

    first, again = masks(0), masks(0)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], masks(1)[0])


def test_indices_to_map():
    indices = MaskIndices(keep=torch.tensor([[0, 3]]), mask=torch.tensor([[1, 2, 4]]))
    assert indices.to_map().tolist() == [[False, True, True, False, True]]
