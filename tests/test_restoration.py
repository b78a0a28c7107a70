"""Restoration: pairs made on the device, the loss, intensities and grids that come back, and the configs' overlays."""

from __future__ import annotations

import math
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.transforms import Compose, Invertd, Orientationd

from sspformer import kspace
from sspformer.engines import PrepareDegradedBatch, unpack_targets
from sspformer.losses import RestorationLoss
from sspformer.transforms import (
    BlendByNoiseLeveld,
    DataConsistencyd,
    FourierResampled,
    NoiseSampler,
    ResolutionSampler,
    ScaleByPercentilesd,
)

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"


def batch(sides=(20, 18, 16), spacing=(1.0, 1.0, 5.0), low=0.0):
    image = low + torch.rand(2, 1, *sides, generator=torch.Generator().manual_seed(0))
    affine = torch.diag(torch.tensor([*spacing, 1.0]))
    return list_data_collate([{"image": MetaTensor(i, affine=affine)} for i in image])


# --- pairs


def test_a_batch_has_the_degraded_image_and_the_clean_one_without_the_margin():
    data = batch()
    degraded, target, args, kwargs = PrepareDegradedBatch(ResolutionSampler(2.0), margin=3)(data, "cpu")
    assert args == () and kwargs == {} and set(target) == {"clean", "degraded", "factor"}
    assert target["factor"].shape == (2, 3) and target["factor"].max() == 2
    assert not isinstance(degraded, MetaTensor) and target["degraded"] is degraded
    assert torch.equal(target["clean"], data["image"].as_tensor()[..., 3:-3, 3:-3, 3:-3])
    assert degraded.shape == (2, 1, 14, 12, 10) and not torch.allclose(degraded, target["clean"])


def test_the_degradation_sees_the_margin_and_the_spacing():
    seen = []

    def degradation(image, spacing, generator, random_state):
        seen.append((image.shape, spacing))
        return image.cumsum(dim=2)

    data = batch()
    degraded, *_ = PrepareDegradedBatch(degradation, margin=2)(data, "cpu")
    assert seen[0][0] == data["image"].shape and torch.equal(seen[0][1], torch.tensor([[1.0, 1.0, 5.0]] * 2))
    expected = data["image"].as_tensor().cumsum(dim=2)[..., 2:-2, 2:-2, 2:-2]
    assert torch.equal(degraded, expected)


def test_a_margin_keeps_the_wrap_around_of_the_crop_outside():
    """A crop with a margin is degraded as the whole scan is there, a crop without one is not."""
    ramp = torch.linspace(0, 1, 128)
    scan = (ramp[:, None] + torch.sin(40 * ramp)[None]).clamp(min=0)[None, None]
    whole, *_ = PrepareDegradedBatch(ResolutionSampler(2.0, "isotropic"))({"image": scan}, "cpu")

    def error(margin):
        window = (..., slice(48 - margin, 80 + margin), slice(48 - margin, 80 + margin))
        crop, *_ = PrepareDegradedBatch(ResolutionSampler(2.0, "isotropic"), margin)({"image": scan[window]}, "cpu")
        return float((crop - whole[..., 48:80, 48:80]).square().mean().sqrt())

    assert error(16) < 0.2 * error(0)


def test_the_same_seed_prepares_the_same_batch():
    def draw(seed):
        return PrepareDegradedBatch(NoiseSampler()).set_random_state(seed)(batch(), "cpu")[0]

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    same = PrepareDegradedBatch(NoiseSampler(), seed=1)
    assert not torch.equal(same(batch(), "cpu")[0], same(batch(), "cpu")[0])  # and goes on drawing


def test_what_is_below_0_is_air():
    _, target, _, _ = PrepareDegradedBatch(ResolutionSampler(2.0))(batch(low=-0.5), "cpu")
    assert target["clean"].min() == 0


def test_margins_that_do_not_fit():
    with pytest.raises(ValueError, match="^margin must be 0 or more"):
        PrepareDegradedBatch(ResolutionSampler(), margin=-1)
    with pytest.raises(ValueError, match=r"used up by a margin of 8.*crop_size above 2"):
        PrepareDegradedBatch(ResolutionSampler(), margin=8)(batch(), "cpu")


def test_noise_leaves_no_kspace_to_keep():
    _, target, _, _ = PrepareDegradedBatch(NoiseSampler())(batch(), "cpu")
    assert set(target) == {"clean", "degraded"}


def test_targets_are_unpacked_of_batches_and_of_samples():
    degraded, target, _, _ = PrepareDegradedBatch(ResolutionSampler())(batch(), "cpu")
    output = {"image": degraded, "label": target, "pred": degraded}
    assert unpack_targets(output)["clean"] is target["clean"]
    samples = [unpack_targets(sample) for sample in decollate_batch(output)]
    assert len(samples) == 2 and torch.equal(samples[1]["degraded"], degraded[1])


# --- the k-space that was measured


def test_data_consistency_is_one_on_the_grid_of_the_scan_and_on_that_of_the_prediction():
    pred, clean = torch.rand(2, 1, 3, 12, 10, 16)
    factors = torch.tensor([2.0, 1.0, 4.0])
    low = kspace.fourier_resample(clean, (6, 10, 4))
    degraded = kspace.fourier_resample(low, (12, 10, 16))
    expected = kspace.data_consistency(pred, low)
    torch.testing.assert_close(kspace.data_consistency(pred, degraded, factors), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(kspace.data_consistency(degraded, degraded, factors), degraded, rtol=0, atol=1e-6)


def test_keeping_what_was_measured_only_lowers_the_error():
    """An orthogonal projection towards the truth, each sample with a factor of its own."""
    torch.manual_seed(0)
    clean, pred = torch.rand(2, 1, 16, 12, 20), torch.rand(2, 1, 16, 12, 20)
    degraded, target, _, _ = PrepareDegradedBatch(ResolutionSampler(), seed=1)({"image": clean}, "cpu")
    assert not torch.equal(*target["factor"])
    kept = kspace.data_consistency(pred, degraded, target["factor"])
    before, after, moved = ((a - b).square().flatten(1).sum(1) for a, b in ((pred, clean), (kept, clean), (kept, pred)))
    torch.testing.assert_close(after + moved, before)
    assert (moved > 0.01 * before).all()
    torch.testing.assert_close(kspace.data_consistency(kept, degraded, target["factor"]), kept)
    assert torch.equal(kept, unpack_targets({"pred": pred, "label": target}, "true")["pred"])
    samples = decollate_batch({"pred": pred, "label": target})
    torch.testing.assert_close(unpack_targets(samples[1], data_consistency=True)["pred"], kept[1])
    assert unpack_targets(samples[1], "false")["pred"] is samples[1]["pred"]
    del target["factor"]
    with pytest.raises(ValueError, match="^data_consistency is for lost resolution"):
        unpack_targets({"pred": pred, "label": target}, True)


def test_the_loss_does_not_see_what_was_measured():
    clean = torch.rand(2, 1, 40, 40, generator=torch.Generator().manual_seed(0))
    prepare, loss = PrepareDegradedBatch(ResolutionSampler(2.0, "isotropic"), margin=4), RestorationLoss(margin=4)
    degraded, target, _, _ = prepare({"image": clean}, "cpu")
    assert float(loss(degraded, target)) == pytest.approx(0, abs=1e-4)
    assert float(loss(target["clean"], target)) < -3  # in the margin nothing is predicted: not all of the error is gone
    wave = torch.hann_window(32) * torch.sin(torch.arange(32) * 0.4)
    wave = 0.5 * wave[:, None] * wave  # slower than the lines that were measured
    assert abs(float(loss(degraded + wave, target))) < 0.02
    blind = {name: target[name] for name in ("clean", "degraded")}
    assert float(loss(degraded + wave, blind)) > 0.3
    with pytest.raises(ValueError, match="^margin must be 0 or more"):
        RestorationLoss(margin=-1)


# --- the loss


def test_the_loss_is_minus_the_gain_in_psnr():
    clean = torch.rand(2, 1, 8, 8)
    degraded, pred = clean + torch.tensor([0.1, 0.01])[:, None, None, None], clean + 0.001
    loss = RestorationLoss(eps=1e-12)
    target = {"clean": clean, "degraded": degraded}
    assert float(loss(degraded, target)) == pytest.approx(0, abs=1e-5)
    assert float(loss(pred, target)) == pytest.approx(-(40 + 20) / 2, rel=1e-3)
    # every level counts alike: halving the error of one is worth 6 dB, however small it is
    for i in range(2):
        half = degraded.clone()
        half[i] = clean[i] + (degraded - clean)[i] / 2
        assert float(loss(half, target)) == pytest.approx(-20 * math.log10(2) / 2, rel=1e-3)


def test_the_loss_of_what_was_not_degraded_is_finite():
    clean = torch.zeros(1, 1, 4, 4)
    pred = clean.clone().requires_grad_()
    loss = RestorationLoss()(pred, {"clean": clean, "degraded": clean})
    loss.backward()
    assert loss == 0 and torch.isfinite(pred.grad).all()
    with pytest.raises(ValueError, match="^eps must be above 0"):
        RestorationLoss(0)


# --- intensities and grids


def scan(axcodes="LPS", sides=(12, 10, 8), scale=300.0) -> MetaTensor:
    """A MetaTensor as LoadScand gives it, voxels in any orientation."""
    turn = nib.orientations.axcodes2ornt(axcodes)
    affine = np.diag([1.5, 1.0, 5.0, 1.0]) @ nib.orientations.inv_ornt_aff(turn, sides)
    image = scale * (torch.rand(1, *sides, generator=torch.Generator().manual_seed(0)) - 0.02)
    return MetaTensor(image, affine=torch.from_numpy(affine), meta={"original_affine": affine.copy()})


def test_scaling_is_pure_and_comes_back():
    image = scan()
    scaling = ScaleByPercentilesd("image", lower=None, upper=95.0)
    scaled = scaling({"image": image})
    assert float(np.percentile(scaled["image"].numpy(), 95)) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(scaled["image"] / scaled["image"].max(), image / image.max())  # no offset, no clip
    assert scaled["image"].min() < 0 and scaled["image"].max() > 1
    torch.testing.assert_close(scaling.inverse(scaled)["image"].as_tensor(), image.as_tensor())
    # a gain of the scanner changes nothing
    torch.testing.assert_close(scaling({"image": image * 7})["image"].as_tensor(), scaled["image"].as_tensor())


def test_scaling_through_invertd_in_another_orientation():
    preprocessing = Compose([Orientationd("image", "RAS", labels=None), ScaleByPercentilesd("image", lower=None)])
    image = scan("PIR")
    data = list_data_collate([preprocessing({"image": image})])
    data["pred"] = 1.3 * data["image"]
    inverted = Invertd("pred", preprocessing, "image", nearest_interp=False)(decollate_batch(data)[0])["pred"]
    torch.testing.assert_close(inverted.as_tensor(), 1.3 * image.as_tensor(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(inverted.affine, image.affine)


def test_a_small_object_is_scaled_by_its_maximum_and_nothing_is_refused():
    image = torch.zeros(1, 20, 20, 20)
    image[0, 3, 3, 3] = 5
    assert ScaleByPercentilesd("image", lower=None)({"image": MetaTensor(image)})["image"].max() == 1
    reasons = {0.0: "^scan.nii: all voxels have the same value, 0", math.nan: "^scan.nii is no magnitude image"}
    for value, reason in reasons.items():
        empty = MetaTensor(torch.full((1, 4, 4, 4), value), meta={"filename_or_obj": "scan.nii"})
        with pytest.raises(ValueError, match=reason):
            ScaleByPercentilesd("image", lower=None)({"image": empty})
    with pytest.raises(ValueError, match="^upper must be"):
        ScaleByPercentilesd("image", lower=None, upper=0)


@pytest.mark.parametrize("axcodes", ["RAS", "LPS", "PIR", "SLA"])
def test_the_finer_grid_covers_the_same_field_of_view(axcodes):
    image = scan(axcodes)
    out = FourierResampled("image", factor=(2, 1, 3))({"image": image})
    fine = out["image"]
    assert fine.shape == (1, 24, 10, 24) and out["low"] is image
    expected = image.affine @ torch.diag(torch.tensor([1 / 2, 1, 1 / 3, 1], dtype=torch.float64))
    torch.testing.assert_close(fine.affine, expected)
    torch.testing.assert_close(fine[:, ::2, :, ::3].as_tensor(), image.as_tensor(), rtol=0, atol=1e-3)


def test_a_spacing_is_met_as_nearly_as_the_field_of_view_allows_and_no_axis_gets_coarser():
    image = scan("RAS")  # 12 x 10 x 8 voxels of 1.5 x 1 x 5 mm
    assert FourierResampled("image", spacing=1.0)({"image": image})["image"].shape == (1, 18, 10, 40)
    assert FourierResampled("image", spacing=(2, 0.7, 3.0))({"image": image})["image"].shape == (1, 12, 14, 13)
    assert FourierResampled("image", factor=1)({"image": image})["image"].shape == image.shape


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "give factor or target_spacing"),
        ({"factor": 2, "spacing": 1}, "give factor or target_spacing"),
        ({"factor": [2, 0.5, 1]}, "factor must be 1 or more"),
        ({"spacing": [1, 0, 1]}, "target_spacing must be above 0"),
        ({"factor": "abc"}, r"^factor must be a number, or three such as .*, got 'abc'"),
        ({"factor": [2, 2]}, r"^factor must be a number, or three such as .*, got \[2, 2\]"),
        ({"factor": 2, "spacing": "null"}, None),
        ({"factor": "none", "spacing": float("nan")}, "^target_spacing must be a number"),
    ],
)
def test_wrong_factors_and_spacings(settings, message):
    if message is None:  # as the command line says it
        assert FourierResampled("image", **settings).factor == (2, 2, 2)
        return
    with pytest.raises(ValueError, match=message):
        FourierResampled("image", **settings)


def test_measured_kspace_survives_the_way_back_to_the_file():
    image = scan("PIR")
    preprocessing = Compose([Orientationd("image", "RAS", labels=None), ScaleByPercentilesd("image", lower=None)])
    data = preprocessing(FourierResampled("image", factor=(1, 2, 4))({"image": image}))
    data = list_data_collate([data])
    data["pred"] = data["image"] + 0.1 * torch.rand(data["image"].shape)
    way_back = [Invertd("pred", preprocessing, "image", nearest_interp=False), DataConsistencyd("pred")]
    pred = Compose(way_back)(decollate_batch(data)[0])["pred"]
    assert isinstance(pred, MetaTensor) and pred.shape == (1, 12, 20, 32)
    measured = kspace.fourier_resample(pred.as_tensor()[None], image.shape[1:])[0]
    assert float((measured - image.as_tensor()).norm() / image.as_tensor().norm()) < 1e-5
    other = {"pred": pred + 1, "low": image}
    assert DataConsistencyd("pred", enabled=False)(other)["pred"] is other["pred"]


# --- learning, through the overlays


@pytest.mark.parametrize("task", ["denoising", "super_resolution"])
@pytest.mark.parametrize("workflow", ["train", "evaluate", "inference"])
def test_overlays_set_what_all_three_configs_can_take(task, workflow):
    parser = ConfigParser()
    last = ["evaluate"] if workflow == "evaluate" else []
    names = ["inference" if workflow == "inference" else "train", "restoration", task, *last]
    parser.read_config([str(BUNDLE / f"configs/{name}.json") for name in names])
    parser["bundle_root"] = str(BUNDLE)
    parser["device"] = torch.device("cpu")
    assert parser.get_parsed_content("name") == task
    network = parser.get_parsed_content("network_def")
    image = torch.rand(1, 1, 16, 24, 20)
    assert torch.equal(network(image), image)  # restoration starts from its input
    assert not any("norm" in name for name, _ in network.stem.named_parameters())


@pytest.mark.parametrize("task, n_steps", [("denoising", 12), ("super_resolution", 30)])
def test_a_network_learns_to_restore_one_batch(task, n_steps):
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / f"configs/{name}.json") for name in ("train", "restoration", task)])
    parser["bundle_root"] = str(BUNDLE)
    prepare, loss = (parser.get_parsed_content(name) for name in ("prepare_batch#train", "loss_function"))
    torch.manual_seed(0)
    network = parser.get_parsed_content("network_def")
    side = 16 + 2 * prepare.margin
    x = torch.linspace(-1, 1, side)
    bright = (
        x[:, None, None] ** 2 + x[:, None] ** 2 + x**2 < 0.5 * torch.tensor([1.0, 0.6])[:, None, None, None]
    ).float()
    degraded, target, _, _ = prepare.set_random_state(0)({"image": bright[:, None]}, "cpu")
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    gains = []
    for _ in range(n_steps):
        error = loss(network(degraded), target)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        gains.append(-error.item())
    assert gains[0] == pytest.approx(0, abs=1e-4) and gains[-1] > 0.6, gains  # dB


def test_a_quiet_scan_is_left_as_it_is_and_a_noisy_one_is_not():
    generator = torch.Generator().manual_seed(0)
    leave = BlendByNoiseLeveld("pred", levels=(0.02, 0.04))
    for sigma, share in ((0.01, 0.0), (0.03, 0.5), (0.06, 1.0)):
        image = MetaTensor(0.5 + sigma * torch.randn(1, 48, 48, 48, generator=generator))
        pred = MetaTensor(torch.zeros(1, 48, 48, 48), affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])))
        out = leave({"image": image, "pred": pred})["pred"]
        assert torch.equal(out.affine, pred.affine) and not pred.any()
        torch.testing.assert_close(out.as_tensor(), (1 - share) * image.as_tensor(), atol=0.03, rtol=0)
        if share == 0:
            assert torch.equal(out.as_tensor(), image.as_tensor())
    with pytest.raises(ValueError, match="ascending"):
        BlendByNoiseLeveld(levels=(0.04, 0.02))
