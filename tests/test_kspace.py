"""Laws of ``sspformer.kspace``: energy, symmetry, physical frequency, filters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.signal
import torch

from sspformer import kspace

SHAPES = [(2, 3, 12, 10), (2, 1, 9, 7), (1, 2, 8, 10, 6), (2, 1, 7, 5, 9), (1, 1, 8, 8, 1)]


def random_image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def plane_wave(sides: tuple[int, ...], axis: int, cycles: int) -> torch.Tensor:
    """A cosine with a whole number of cycles along one axis, ``(1, 1, *sides)``."""
    shape = [1] * len(sides)
    shape[axis] = sides[axis]
    wave = torch.cos(2 * math.pi * cycles * torch.arange(sides[axis]) / sides[axis]).reshape(shape)
    return wave.expand(sides)[None, None].clone()


@pytest.mark.parametrize("shape", SHAPES)
def test_fourier_laws(shape):
    image = random_image(*shape)
    k = kspace.to_kspace(image)
    axes = kspace.spatial_axes(image)
    assert k.is_complex() and k.shape == image.shape

    # Parseval
    torch.testing.assert_close(k.abs().square().sum(axes), image.square().sum(axes), rtol=1e-5, atol=0)
    # Hermitian symmetry of a real image: K(-k) = conj K(k)
    mirrored = torch.roll(k.flip(axes), shifts=[1] * len(axes), dims=axes)
    torch.testing.assert_close(mirrored, k.conj().resolve_conj(), rtol=0, atol=1e-5)
    # zero frequency first: the sum over sqrt(number of voxels)
    zero = k[(..., *[0] * len(axes))]
    n_voxels = math.prod(image.shape[2:])
    torch.testing.assert_close(zero.real, image.sum(axes) / math.sqrt(n_voxels), rtol=1e-5, atol=1e-6)
    # channels and samples do not mix
    torch.testing.assert_close(kspace.to_kspace(image[-1:, -1:]), k[-1:, -1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(shape):
    image = random_image(*shape)
    back = kspace.to_image(kspace.to_kspace(image))
    torch.testing.assert_close(back.real, image, rtol=0, atol=1e-6)
    assert back.imag.abs().max() < 1e-6
    twisted = torch.polar(image, 6 * random_image(*shape, seed=1))
    torch.testing.assert_close(kspace.to_image(kspace.to_kspace(twisted)), twisted, rtol=0, atol=1e-6)


def test_magnitude_is_abs():
    value = torch.view_as_complex(torch.randn(2, 1, 6, 5, 2, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(kspace.magnitude(value), value.abs())
    assert torch.equal(kspace.magnitude(torch.zeros(1, 1, 2, 2, dtype=torch.complex64)), torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("shape", [(4,), (4, 4), (1, 4, 4), (1, 1, 2, 2, 2, 2)])
def test_only_batches_of_2d_and_3d(shape):
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        kspace.spatial_axes(torch.zeros(shape))


@pytest.mark.parametrize("spacing", [(1.0,), (1.0, 1.0, 1.0), [[1.0, 1.0]] * 3])
def test_spacing_of_the_wrong_shape(spacing):
    with pytest.raises(ValueError, match="spacing has shape"):
        kspace.as_spacing(spacing, torch.zeros(2, 1, 4, 4))


@pytest.mark.parametrize("sides", [(8, 6), (8, 6, 10)])
@pytest.mark.parametrize("anisotropic", [False, True])
def test_rho_runs_from_the_centre_to_the_corner(sides, anisotropic):
    spacing = (1.0, 2.0, 5.0)[: len(sides)] if anisotropic else None
    rho = kspace.radial_frequency(torch.zeros(1, 1, *sides), spacing)
    assert rho.shape == (1, 1, *sides)
    assert rho[(0, 0, *[0] * len(sides))] == 0
    assert rho.min() >= 0 and rho.max() <= 1 + 1e-6
    corner = rho[(0, 0, *[side // 2 for side in sides])]
    assert corner == rho.max() and abs(float(corner) - 1) < 1e-6
    # an odd grid stops short of its Nyquist frequency, by (n - 1) / n along each axis
    odd = kspace.radial_frequency(torch.zeros(1, 1, 9, 9))
    assert float(odd.max()) == pytest.approx(8 / 9, abs=1e-6)


@pytest.mark.parametrize("sides", [(8, 6), (9, 7), (8, 6, 10), (6, 8, 9)])
def test_half_grid_is_half_of_the_full_grid(sides):
    image = torch.zeros(2, 1, *sides)
    spacing = torch.tensor([[1.0, 2.0, 5.0], [0.7, 1.0, 3.0]])[:, : len(sides)]
    half = kspace.radial_frequency(image, spacing, half=True)
    full = kspace.radial_frequency(image, spacing)
    assert half.shape[-1] == sides[-1] // 2 + 1
    torch.testing.assert_close(half, full[..., : sides[-1] // 2 + 1])
    assert half.shape[2:] == torch.fft.rfftn(image, dim=kspace.spatial_axes(image)).shape[2:]


@pytest.mark.parametrize(
    "axis, sides, spacing",
    [(0, (60, 12), (1.0, 5.0)), (1, (60, 12), (1.0, 5.0)), (2, (60, 8, 12), (1.0, 1.0, 5.0))],
)
def test_a_wave_has_its_frequency_in_mm(axis, sides, spacing):
    # 60 mm along either axis, 20 mm a cycle: 0.05 / mm, whatever the voxels
    field_of_view = sides[axis] * spacing[axis]
    wave = plane_wave(sides, axis, cycles=round(field_of_view / 20))
    power = kspace.to_kspace(wave).abs().square()
    frequency = kspace.axis_frequency(wave, spacing, axis).abs().expand_as(power)
    assert float((frequency * power).sum() / power.sum()) == pytest.approx(1 / 20, rel=1e-5)
    f_max = math.sqrt(sum((0.5 / mm) ** 2 for mm in spacing))
    rho = kspace.radial_frequency(wave, spacing)
    assert float((rho * power).sum() / power.sum()) == pytest.approx(1 / 20 / f_max, rel=1e-5)


def test_axis_of_one_voxel_does_not_count():
    slab = kspace.radial_frequency(torch.zeros(1, 1, 8, 10, 1), (1.0, 2.0, 0.1))
    flat = kspace.radial_frequency(torch.zeros(1, 1, 8, 10), (1.0, 2.0))
    torch.testing.assert_close(slab[..., 0], flat)
    assert torch.equal(kspace.radial_frequency(torch.zeros(1, 1, 1, 1)), torch.zeros(1, 1, 1, 1))


def test_one_spacing_a_sample():
    image = random_image(3, 1, 8, 6, 10)
    spacing = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 5.0], [0.5, 2.0, 1.0]])
    batch = kspace.radial_frequency(image, spacing)
    for i in range(3):
        torch.testing.assert_close(batch[i : i + 1], kspace.radial_frequency(image[i : i + 1], spacing[i]))
    torch.testing.assert_close(batch[:1], kspace.radial_frequency(image[:1]))  # None is 1 mm
    for axis in range(3):
        for i in range(3):
            torch.testing.assert_close(
                kspace.axis_frequency(image, spacing, axis)[i : i + 1],
                kspace.axis_frequency(image[i : i + 1], spacing[i], axis),
            )
    # only ratios of spacings matter to rho
    torch.testing.assert_close(kspace.radial_frequency(image, 3.7 * spacing), batch)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 4.0])
def test_highpass(gamma):
    rho = torch.linspace(0, 1, 101)
    weight = kspace.highpass(rho, gamma)
    assert weight[0] == 0 and weight[-1] == 1 and (weight.diff() > 0).all()
    torch.testing.assert_close(weight, rho**gamma)


@pytest.mark.parametrize("gamma", [0, -1])
def test_highpass_rejects_what_is_not_above_zero(gamma):
    with pytest.raises(ValueError, match="gamma"):
        kspace.highpass(torch.linspace(0, 1, 5), gamma)


@pytest.mark.parametrize("shape", SHAPES)
def test_filter_image(shape):
    image = random_image(*shape)
    torch.testing.assert_close(kspace.filter_image(image, torch.ones(())), image, rtol=0, atol=1e-6)
    spacing = (1.0, 2.0, 5.0)[: len(shape) - 2]
    half = kspace.highpass(kspace.radial_frequency(image, spacing, half=True), 1.5)
    full = kspace.highpass(kspace.radial_frequency(image, spacing), 1.5)
    the_long_way = kspace.to_image(kspace.to_kspace(image) * full)
    assert the_long_way.imag.abs().max() < 1e-6
    torch.testing.assert_close(kspace.filter_image(image, half), the_long_way.real, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_lines", [1, 2, 5, 8, 9, 64])
def test_phase_encode_line_reads_from_the_most_negative_frequency(n_lines):
    line = kspace.phase_encode_line(n_lines).numpy()
    assert sorted(line) == list(range(n_lines))
    frequency = np.fft.fftfreq(n_lines)
    assert line[np.argmin(frequency)] == 0
    assert line[0] == n_lines // 2  # the centre of k-space is read in the middle of the scan
    in_order_of_reading = np.empty(n_lines)
    in_order_of_reading[line] = frequency
    np.testing.assert_array_equal(in_order_of_reading, np.fft.fftshift(frequency))


RESAMPLED = [((12, 10), (12, 10)), ((12, 9), (24, 5)), ((9, 12, 7), (18, 6, 7)), ((8, 6, 10), (7, 13, 40))]


@pytest.mark.parametrize("before, after", RESAMPLED)
def test_fourier_resample_is_scipys(before, after):
    image = random_image(2, 3, *before)
    expected = image.double().numpy()
    for axis, n in enumerate(after):
        expected = scipy.signal.resample(expected, n, axis=axis + 2)
    result = kspace.fourier_resample(image, after)
    assert result.dtype == torch.float32 and result.shape == (2, 3, *after)
    np.testing.assert_allclose(result.numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("sides", [(8, 6), (7, 9), (8, 7, 5)])
@pytest.mark.parametrize("more", [0, 1, 5, 12])
def test_down_after_up_is_the_identity(sides, more):
    image = random_image(1, 2, *sides)
    up = kspace.fourier_resample(image, [side + more for side in sides])
    torch.testing.assert_close(kspace.fourier_resample(up, sides), image, rtol=0, atol=2e-6)


@pytest.mark.parametrize("n, after", [(32, 48), (32, 15), (33, 66)])
def test_resampled_voxels_lie_at_n_over_n_of_the_old_ones(n, after):
    """The new affine is ``affine @ diag(n / n')``: voxel 0 keeps its place."""

    def wave(x, n):
        return torch.cos(2 * math.pi * 3 * x / n + 0.7)

    image = wave(torch.arange(n), n)[None, None, :, None].expand(1, 1, n, 4)
    result = kspace.fourier_resample(image, (after, 4))
    torch.testing.assert_close(result[0, 0, :, 0], wave(torch.arange(after) * n / after, n), rtol=0, atol=1e-5)


def test_fourier_resample_keeps_intensities_and_gradients():
    assert torch.allclose(kspace.fourier_resample(torch.full((1, 1, 6, 5), 3.0), (9, 2)), torch.tensor(3.0))
    image = random_image(1, 1, 6, 5).requires_grad_()
    kspace.fourier_resample(image, (9, 2)).sum().backward()
    assert torch.isfinite(image.grad).all()


@pytest.mark.parametrize("size", [(4,), (4, 4, 4), (0, 4)])
def test_fourier_resample_rejects_sizes_that_do_not_fit(size):
    with pytest.raises(ValueError, match="^size must be 2 sides"):
        kspace.fourier_resample(torch.zeros(1, 1, 4, 4), size)


@pytest.mark.parametrize("fine", [(16, 12, 20), (17, 15, 9), (8, 14, 21)])
@pytest.mark.parametrize("low", [(8, 6, 5), (7, 12, 9), (1, 5, 4)])
def test_data_consistency_keeps_the_measured_part_exactly(fine, low):
    pred, measured = random_image(2, 1, *fine), 1000 * random_image(2, 1, *low, seed=1)
    result = kspace.data_consistency(pred, measured)
    again = kspace.fourier_resample(result, low)
    assert float((again - measured).norm() / measured.norm()) < 1e-5
    # the rest is as predicted, and what is consistent already stays
    change = result - pred
    unchanged = change - kspace.fourier_resample(kspace.fourier_resample(change, low), fine)
    assert float(unchanged.norm() / change.norm()) < 1e-5
    torch.testing.assert_close(kspace.data_consistency(result, measured), result, rtol=0, atol=1e-2)


def test_data_consistency_rejects_a_finer_measurement():
    with pytest.raises(ValueError, match="no side of it may be the longer"):
        kspace.data_consistency(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 9))
