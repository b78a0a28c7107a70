"""Laws of the frequency-weighted noise (docs/method.md): moments, spectrum, ghosts, and the transforms around it.

Statistical tolerances are several standard errors of the estimate, with fixed seeds.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose
from scipy.special import jv

from sspformer import kspace
from sspformer.transforms import (
    NoiseSampler,
    PhysiologicalMotion,
    RandFrequencyWeightedNoise,
    RandFrequencyWeightedNoised,
    frequency_weighted_noise,
    noise_weight,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=seeded(seed))


def motion_of(
    displacement,
    frequency: float = 0.3,
    phase: float = 0.0,
    repetition_time: float = 1.0,
    modulation: float = 0.0,
    axis: int = 0,
) -> PhysiologicalMotion:
    """One sinusoid, one sample."""
    return PhysiologicalMotion(
        displacement=torch.tensor(displacement).reshape(1, 1, -1),
        frequency=torch.tensor([[frequency]]),
        phase=torch.tensor([[phase]]),
        repetition_time=torch.tensor([repetition_time]),
        modulation=torch.tensor([[modulation]]),
        axis=axis,
    )


def air_and_bright(*sides: int) -> torch.Tensor:
    """0 in the first half of the first axis, 1 in the second: intensity range 1."""
    image = torch.zeros(1, 1, *sides)
    image[:, :, sides[0] // 2 :] = 1
    return image


# --- nothing in, nothing out


@pytest.mark.parametrize("shape", [(2, 1, 16, 12), (1, 2, 9, 7), (2, 2, 8, 6, 7)])
def test_no_noise_returns_the_image(shape):
    image = random_image(*shape)
    n_axes = len(shape) - 2
    assert torch.equal(frequency_weighted_noise(image, sigma=0.0, alpha=1.0), image)
    still = PhysiologicalMotion(
        displacement=torch.zeros(shape[0], 2, n_axes),
        frequency=torch.full((shape[0], 2), 0.3),
        phase=torch.zeros(shape[0], 2),
        repetition_time=torch.ones(shape[0]),
        modulation=torch.zeros(shape[0], 2),
        axis=n_axes - 1,
    )
    torch.testing.assert_close(frequency_weighted_noise(image, 0.0, motion=still), image, rtol=0, atol=1e-6)


# --- the thermal part


@pytest.mark.parametrize("sides, sigma, scale", [((256, 256), 0.05, 1.0), ((32, 32, 48), 0.02, 300.0)])
def test_rician_moments(sides, sigma, scale):
    image = scale * air_and_bright(*sides)
    noisy = frequency_weighted_noise(image, sigma, generator=seeded())
    air, bright = noisy[image == 0], noisy[image > 0]
    # Rayleigh in air; at least 24576 voxels: standard error of the mean 0.33 %, so 1 % is three of them
    assert float(air.mean()) == pytest.approx(sigma * scale * math.sqrt(math.pi / 2), rel=0.01)
    assert float(air.std()) == pytest.approx(sigma * scale * math.sqrt(2 - math.pi / 2), rel=0.02)
    assert float(air.square().mean()) == pytest.approx(2 * (sigma * scale) ** 2, rel=0.03)
    # Gaussian where the signal is at least 20 sigma; standard error of the deviation 0.45 %
    assert float(bright.std()) == pytest.approx(sigma * scale, rel=0.02)
    # Rician mean: A + s^2 / 2A
    assert float(bright.mean()) == pytest.approx(scale * (1 + sigma**2 / 2), rel=4 * sigma / math.sqrt(bright.numel()))
    assert noisy.min() >= 0


@pytest.mark.parametrize("sides", [(96, 96), (20, 24, 22)])
@pytest.mark.parametrize("alpha", [-1.0, -0.5, 0.0, 1.0, 2.0])
def test_sigma_is_the_image_domain_deviation_whatever_alpha(sides, alpha):
    spacing = (1.0, 2.0, 5.0)[: len(sides)]
    rho = kspace.radial_frequency(torch.zeros(1, 1, *sides), spacing)
    assert float(noise_weight(rho, alpha).square().mean()) == pytest.approx(1, rel=1e-5)
    # low-pass noise has fewer independent samples: average several
    image = 10 + air_and_bright(*sides).expand(8, -1, *[-1] * len(sides))
    noisy = frequency_weighted_noise(image, 0.1, alpha, spacing, generator=seeded(1))
    assert float((noisy - image).square().mean().sqrt()) == pytest.approx(0.1, rel=0.02)


def test_eps0_must_be_positive():
    with pytest.raises(ValueError, match="eps0"):
        noise_weight(torch.ones(1, 1, 4, 4), 1.0, eps0=0.0)


@pytest.mark.parametrize("alpha", [1.0, -0.5])
@pytest.mark.parametrize("sides, spacing", [((96, 96), (1.0, 1.0)), ((96, 32), (1.0, 3.0)), ((32, 32, 16), (1, 1, 5))])
def test_noise_power_spectrum_follows_the_weight(alpha, sides, spacing):
    image = 10 + air_and_bright(*sides).expand(16, -1, *[-1] * len(sides))
    noise = frequency_weighted_noise(image, 0.01, alpha, spacing, generator=seeded(2)) - image
    power = kspace.to_kspace(noise).abs().square().mean(dim=0).flatten()
    rho = kspace.radial_frequency(image[:1], spacing)
    expected = noise_weight(rho, alpha).square().flatten() * 0.01**2

    which = (rho.flatten() * 12).long().clamp_max(11)
    count = torch.bincount(which, minlength=12)
    binned = torch.bincount(which, power, minlength=12) / count.clamp_min(1)
    predicted = torch.bincount(which, expected, minlength=12) / count.clamp_min(1)
    enough = count > 20
    assert enough.sum() >= 8
    # at least 16 samples of 10 independent modes in each bin: relative standard error below 0.08
    torch.testing.assert_close(binned[enough], predicted[enough], rtol=0.25, atol=0)
    slope, intercept = np.polyfit(predicted[enough].log(), binned[enough].log(), 1, w=count[enough].sqrt())
    assert slope == pytest.approx(1, abs=0.05)
    assert np.corrcoef(predicted[enough], binned[enough])[0, 1] > 0.99


def test_anisotropic_spacing_gives_equal_noise_at_equal_mm():
    # 64 mm along both axes; mode (k, 0) and mode (0, k) are the same wavelength, whatever the voxels
    sides, spacing = (64, 16), (1.0, 4.0)
    weight = noise_weight(kspace.radial_frequency(torch.zeros(1, 1, *sides), spacing), 1.0)[0, 0]
    torch.testing.assert_close(weight[:8, 0], weight[0, :8])
    isotropic = noise_weight(kspace.radial_frequency(torch.zeros(1, 1, *sides)), 1.0)[0, 0]
    assert isotropic[0, 7] > 2 * isotropic[7, 0]


# --- the physiological part


@pytest.mark.parametrize(
    "displacement, spacing, sides",
    [
        ((3.0, 0.0), (1.0, 1.0), (16, 12)),
        ((-2.0, 4.0), (1.0, 2.0), (16, 12)),
        ((2.0, -3.0, 10.0), (1.0, 1.5, 5.0), (8, 10, 6)),
        ((2.0, 1.0, 5.0), (1.0, 1.0, 5.0), (7, 9, 5)),
    ],
)
def test_constant_displacement_shifts_by_that_many_mm(displacement, spacing, sides):
    image = random_image(1, 2, *sides)
    voxels = [round(d / mm) for d, mm in zip(displacement, spacing, strict=True)]
    for axis in range(len(sides)):  # a motion that does not change knows no phase-encode axis
        motion = motion_of(displacement, frequency=0.0, phase=math.pi / 2, axis=axis)
        moved = frequency_weighted_noise(image, 0.0, spacing=spacing, motion=motion)
        expected = torch.roll(image, voxels, dims=kspace.spatial_axes(image))  # positive: towards higher index
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("cycles", [5, 11])
def test_ghosts_of_a_modulated_signal(axis, cycles):
    """``1 + m sin`` over the lines: two ghosts of m/2 of the image, ``f TR N`` voxels to either side."""
    sides = [12, 10, 8]
    sides[axis] = 32
    image = torch.zeros(1, 1, *sides)
    image[0, 0, 3, 2, 1] = 1
    repetition_time, n_lines = 0.5, 32
    frequency = cycles / (n_lines * repetition_time)
    motion = motion_of((0.0, 0.0, 0.0), frequency, 0.4, repetition_time, modulation=0.2, axis=axis)
    ghosted = frequency_weighted_noise(image, 0.0, motion=motion)
    expected = image.clone()
    for shift in (cycles, -cycles):
        expected = expected + 0.1 * torch.roll(image, shift, dims=2 + axis)
    torch.testing.assert_close(ghosted, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 2.0)])
def test_ghosts_of_a_single_sinusoidal_motion(axis, spacing):
    """Motion across the lines modulates the phase of wave k0 by ``beta = 2 pi k0 d``, so ghost n is ``J_n(beta)``."""
    across = 1 - axis
    sides = [64, 64]
    displacement = [0.0, 0.0]
    displacement[across] = 0.7
    waves = 8  # along the axis that moves; the object is one slab along the phase-encode axis
    index = torch.arange(64)
    wave = (1 + torch.cos(2 * math.pi * waves * index / 64)) / 2
    image = torch.zeros(1, 1, *sides)
    line, cycles, repetition_time = 20, 13, 0.8
    image.select(2 + axis, line)[:] = wave
    motion = motion_of(displacement, cycles / (64 * repetition_time), 0.3, repetition_time, axis=axis)
    ghosted = frequency_weighted_noise(image, 0.0, spacing=spacing, motion=motion)

    # ghost n of the slab is the wave at J_n(beta), as a cosine or a sine: read it from the energy of its line
    beta = 2 * math.pi * waves / (64 * spacing[across]) * 0.7
    energy = ghosted.square().sum(dim=2 + across)[0, 0]
    of_order = {n: float(energy[(line + n * cycles) % 64]) for n in (0, 1, -1, 2, -2)}
    amplitude = float(wave.sub(0.5).square().sum())
    for n in (1, -1, 2, -2):
        assert of_order[n] == pytest.approx(amplitude * float(jv(n, beta)) ** 2, rel=0.01)
    constant = float(64 * 0.25)
    assert of_order[0] == pytest.approx(constant + amplitude * float(jv(0, beta)) ** 2, rel=0.01)
    # and nowhere else: orders up to 2 hold all but the tail of the series
    ghosts = sorted((line + n * cycles) % 64 for n in (0, 1, -1, 2, -2))
    elsewhere = energy.sum() - energy[ghosts].sum()
    tail = amplitude * (1 - sum(float(jv(n, beta)) ** 2 for n in range(-2, 3)))
    assert float(elsewhere) == pytest.approx(tail, rel=0.02, abs=1e-5)
    torch.testing.assert_close(ghosted.square().sum(), image.square().sum())  # a change of phase keeps energy


def test_motion_in_mm_does_not_depend_on_the_voxels():
    # the same object, sampled in 1 mm and in 2 mm across the lines
    fine = torch.zeros(1, 1, 32, 64)
    fine[0, 0, 10] = 1 + torch.cos(2 * math.pi * 4 * torch.arange(64) / 64)
    coarse = fine[..., ::2]
    motion = motion_of((0.0, 1.3), 0.25, 0.2, 0.9)
    from_fine = frequency_weighted_noise(fine, 0.0, spacing=(1.0, 1.0), motion=motion)
    from_coarse = frequency_weighted_noise(coarse, 0.0, spacing=(1.0, 2.0), motion=motion)
    torch.testing.assert_close(from_fine[..., ::2], from_coarse, rtol=0, atol=1e-5)


# --- batches, channels, seeds


def test_parameters_of_each_sample_equal_one_by_one():
    image = random_image(3, 2, 10, 8, 6)
    spacing = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 5.0], [2.0, 1.0, 0.5]])
    sigma, alpha = torch.tensor([0.0, 0.05, 0.1]), torch.tensor([1.0, 0.0, -0.5])
    g = seeded(3)
    motion = PhysiologicalMotion(
        displacement=torch.randn(3, 2, 3, generator=g),
        frequency=torch.rand(3, 2, generator=g),
        phase=torch.rand(3, 2, generator=g) * 6,
        repetition_time=torch.rand(3, generator=g) + 0.2,
        modulation=torch.rand(3, 2, generator=g) * 0.2,
        axis=1,
    )
    for moves in (False, True):
        generator = seeded(4)
        batch = frequency_weighted_noise(image, sigma, alpha, spacing, motion if moves else None, generator=generator)
        generator = seeded(4)  # the noise of a batch is drawn sample by sample in turn
        noise = torch.randn(3, 2, 10, 8, 6, 2, generator=generator)
        for i in range(3):
            one = slice(i, i + 1)
            weight = noise_weight(kspace.radial_frequency(image[one], spacing[i]), float(alpha[i]))
            extent = image[i].amax(dim=(1, 2, 3)) - image[i].amin(dim=(1, 2, 3))
            thermal = torch.view_as_complex(noise[one].contiguous()) * weight * sigma[i] * extent.reshape(1, 2, 1, 1, 1)
            signal = kspace.to_kspace(image[one])
            if moves:
                fields = ("displacement", "frequency", "phase", "repetition_time", "modulation")
                alone = PhysiologicalMotion(*(getattr(motion, f)[one] for f in fields), axis=1)
                signal = signal * alone.kspace_factor(image[one], spacing[one])
                quiet = frequency_weighted_noise(image[one], 0.0, spacing=spacing[i], motion=alone)
                torch.testing.assert_close(quiet, kspace.to_image(signal).abs(), rtol=0, atol=1e-5)
            torch.testing.assert_close(batch[one], kspace.to_image(signal + thermal).abs(), rtol=0, atol=1e-5)


def test_each_channel_has_its_own_range_and_noise():
    image = torch.cat([5 + air_and_bright(48, 48), 500 + 100 * air_and_bright(48, 48)], dim=1)
    noise = frequency_weighted_noise(image, 0.1, generator=seeded()) - image
    deviation = noise.std(dim=(0, 2, 3))
    torch.testing.assert_close(deviation, torch.tensor([0.1, 10.0]), rtol=0.06, atol=0)  # standard error 1.5 %
    correlation = torch.corrcoef(noise[0].flatten(1))[0, 1]
    assert abs(float(correlation)) < 5 / 48


@pytest.mark.parametrize("motion_prob", [0.0, 1.0])
@pytest.mark.parametrize("sides", [(12, 10), (9, 8, 6)])
def test_sampler_is_reproducible(sides, motion_prob):
    image = random_image(2, 2, *sides)
    sampler = NoiseSampler(motion_prob=motion_prob)

    def draw(seed):
        return sampler(image, None, seeded(seed), np.random.RandomState(seed))

    first = draw(0)
    assert first.shape == image.shape and first.dtype == torch.float32
    assert first.min() >= 0 and first.isfinite().all()
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))


def test_sampler_draws_within_its_ranges(monkeypatch):
    drawn = []

    def record(image, **settings):
        drawn.append(settings)
        return image

    monkeypatch.setattr("sspformer.transforms.noise.frequency_weighted_noise", record)
    sampler = NoiseSampler(
        sigma=(0.02, 0.05), alpha=0.5, motion_prob=0.5, breathing=(1, 2), heartbeat=(0.2, 0.3), modulation=(0.1, 0.2)
    )
    random_state, generator = np.random.RandomState(0), seeded()
    image = torch.zeros(16, 1, 4, 4, 4)
    for _ in range(200):
        sampler(image, None, generator, random_state)
    sigma = torch.cat([d["sigma"] for d in drawn])
    assert 0.02 <= sigma.min() and sigma.max() <= 0.05
    assert float(sigma.mean()) == pytest.approx(0.035, abs=5 * 0.03 / math.sqrt(12 * 3200))
    assert all((d["alpha"] == 0.5).all() for d in drawn)
    moving = [d["motion"] for d in drawn if d["motion"] is not None]
    assert {len(m.frequency) for m in moving} == {8}  # always the same share of a batch
    assert {m.axis for m in moving} == {0, 1, 2}
    peak = torch.cat([m.displacement for m in moving]).norm(dim=-1)
    hertz = torch.cat([m.frequency for m in moving])
    modulation = torch.cat([m.modulation for m in moving])
    for name, values, (low, high) in [
        ("breathing", peak[:, 0], (1, 2)),
        ("heartbeat", peak[:, 1], (0.2, 0.3)),
        ("breathing Hz", hertz[:, 0], (0.2, 0.35)),
        ("heartbeat Hz", hertz[:, 1], (0.9, 1.6)),
        ("modulation", modulation, (0.05, 0.1)),
    ]:
        assert low - 1e-5 <= values.min() and values.max() <= high + 1e-5, name
        assert float(values.max() - values.min()) > 0.9 * (high - low), name


@pytest.mark.parametrize(
    "name, value",
    [
        ("sigma", -0.1),
        ("sigma", (0.2, 0.1)),
        ("sigma", (0.0, 2.0)),
        ("sigma", (0.0, 0.1, 0.2)),
        ("sigma", float("nan")),
        ("alpha", 9),
        ("motion_prob", 1.5),
        ("breathing", -1),
        ("heartbeat", (0, -1)),
        ("modulation", (0.0, 1.1)),
        ("repetition_time", -0.1),
    ],
)
def test_range_errors_name_the_argument(name, value):
    with pytest.raises(ValueError, match=f"^{name} must"):
        NoiseSampler(**{name: value})


# --- the transforms


def scan(spacing=(1.0, 1.0, 5.0), sides=(10, 8, 6), channels: int = 1, seed: int = 0) -> MetaTensor:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [-10, 5, 3]
    return MetaTensor(random_image(channels, *sides, seed=seed), affine=torch.tensor(affine))


def test_array_transform_keeps_the_metadata():
    image = scan(channels=2)
    before = image.clone()
    noisy = RandFrequencyWeightedNoise(sigma=0.1).set_random_state(0)(image)
    assert isinstance(noisy, MetaTensor) and noisy.shape == image.shape and noisy.dtype == torch.float32
    torch.testing.assert_close(noisy.affine, image.affine)
    assert torch.equal(image, before), "the input was changed"
    assert not torch.equal(noisy, image)
    noisy.meta["touched"] = True
    assert "touched" not in image.meta
    for plain in (np.random.RandomState(0).rand(1, 6, 5), torch.rand(1, 6, 5)):
        assert RandFrequencyWeightedNoise()(plain).shape == (1, 6, 5)


def test_array_transform_reads_spacing_from_the_affine(monkeypatch):
    seen = []
    monkeypatch.setattr(NoiseSampler, "__call__", lambda self, image, spacing, *_: seen.append(spacing) or image)
    transform = RandFrequencyWeightedNoise()
    transform(scan(spacing=(0.5, 1.5, 5.0)))
    transform(scan(spacing=(0.5, 1.5, 5.0))[..., 0])  # one slice: the first two axes
    np.testing.assert_allclose(seen[0], [0.5, 1.5, 5.0])
    np.testing.assert_allclose(seen[1], [0.5, 1.5])


def test_spacing_changes_the_noise():
    settings = dict(sigma=0.1, alpha=1.0, motion_prob=0.0)
    thin, thick = scan(spacing=(1.0, 1.0, 1.0)), scan(spacing=(1.0, 1.0, 5.0))
    assert torch.equal(thin.as_tensor(), thick.as_tensor())
    draw = [RandFrequencyWeightedNoise(**settings).set_random_state(0)(image).as_tensor() for image in (thin, thick)]
    assert not torch.allclose(*draw)


def test_array_transform_is_reproducible():
    image = scan()
    transform = RandFrequencyWeightedNoise()
    first = transform.set_random_state(7)(image)
    second = transform(image)
    assert torch.equal(transform(image, randomize=False), second)
    assert torch.equal(transform.set_random_state(7)(image), first)
    assert not torch.equal(first, second)


def test_negative_image_is_rejected():
    with pytest.raises(ValueError, match="before z-scoring"):
        RandFrequencyWeightedNoise()(scan() - 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.float64])
def test_prob_0_is_a_no_op(dtype):
    image = scan().mul(200).to(dtype)
    for result in (
        RandFrequencyWeightedNoise(prob=0.0)(image),
        RandFrequencyWeightedNoised("image", prob=0.0)({"image": image})["image"],
    ):
        assert result.dtype == torch.float32  # as when noise is applied, so that samples collate
        assert torch.equal(result, image.float())
        torch.testing.assert_close(result.affine, image.affine)


def test_prob_is_the_share_of_noisy_images():
    transform = RandFrequencyWeightedNoise(prob=0.3, sigma=0.1).set_random_state(0)
    image = scan(sides=(4, 4, 2))
    n_noisy = sum(not torch.equal(transform(image), image) for _ in range(300))
    assert abs(n_noisy - 90) < 4 * math.sqrt(300 * 0.3 * 0.7)


def test_dictionary_twin_equals_the_array_transform():
    image, other = scan(), scan(seed=1)
    array = RandFrequencyWeightedNoise(sigma=0.1).set_random_state(3)
    twin = RandFrequencyWeightedNoised(["image", "other"], sigma=0.1).set_random_state(3)
    data = {"image": image, "other": other, "label": 1}
    result = twin(data)
    assert torch.equal(result["image"], array(image))
    assert torch.equal(result["other"], array(other))
    assert result["label"] == 1
    assert data["image"] is image
    twins = RandFrequencyWeightedNoised(["a", "b"], sigma=0.1)({"a": image, "b": image})
    assert not torch.equal(twins["a"], twins["b"])  # noise of its own for each key


def test_missing_keys():
    data = {"image": scan()}
    with pytest.raises(KeyError, match="other"):
        RandFrequencyWeightedNoised(["image", "other"])(data)
    assert set(RandFrequencyWeightedNoised(["image", "other"], allow_missing_keys=True)(data)) == {"image"}


def test_inside_compose():
    image = scan()

    def noisy(seed):
        pipeline = Compose([RandFrequencyWeightedNoised("image", prob=0.9, sigma=0.1)]).set_random_state(seed)
        return [pipeline({"image": image})["image"] for _ in range(2)]

    first, second = noisy(0)
    again = noisy(0)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, noisy(1)[0])


def test_on_a_crop_sigma_is_a_fraction_of_the_whole_scans_range():
    crop = torch.full((1, 1, 32, 32, 32), 0.5)
    noisy = frequency_weighted_noise(crop, 0.02, generator=torch.Generator().manual_seed(0), intensity_range=1.0)
    assert abs(float((noisy - crop).std()) - 0.02) < 1e-3
    assert torch.equal(frequency_weighted_noise(crop, 0.02), crop)  # of its own range, which is 0


def test_log_sigma_draws_weak_and_strong_noise_alike():
    sampler = NoiseSampler(sigma=(0.001, 0.1), motion_prob=0.0, log_sigma=True, intensity_range=1.0)
    sigma = sampler._draw_sigma(4000, generator=torch.Generator().manual_seed(0), device="cpu")
    assert sigma.min() >= 0.001 and sigma.max() <= 0.1
    assert abs(float((sigma < 0.01).float().mean()) - 0.5) < 0.03
    with pytest.raises(ValueError, match="log_sigma needs sigma above 0"):
        NoiseSampler(sigma=(0.0, 0.1), log_sigma=True)


def test_a_share_that_is_no_whole_number_of_samples_is_rounded_at_random(monkeypatch):
    moving = []
    record = lambda image, **settings: moving.append(len(image) if settings["motion"] else 0) or image  # noqa: E731
    monkeypatch.setattr("sspformer.transforms.noise.frequency_weighted_noise", record)
    sampler, random_state = NoiseSampler(motion_prob=0.25), np.random.RandomState(0)
    for _ in range(400):
        sampler(torch.zeros(3, 1, 4, 4, 4), None, None, random_state)
    assert set(moving) == {0, 1} and abs(sum(moving) - 300) < 5 * math.sqrt(400 * 0.75 * 0.25)
