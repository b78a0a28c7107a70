"""The losses: each weight and option does what it says."""

import pytest
import torch
from monai.losses import DiceCELoss

from sspformer.losses import BalancedDiceCELoss, MaskedReconstructionLoss, normalize_patches
from sspformer.networks import gather_tokens, patchify
from sspformer.transforms import InverseFrequencyMask


def batch(seed=0, sides=(16, 16, 16), spacing=(1.0, 1.0, 1.0)):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(2, 1, *sides, generator=generator)
    ids = InverseFrequencyMask(4)(image, generator=generator)
    target = {"image": image, "mask": ids.mask, "keep": ids.keep, "spacing": torch.tensor([spacing] * 2)}
    return target, gather_tokens(patchify(image, (4, 4, 4)), ids.mask)


def test_perfect_prediction_is_zero_and_a_constant_error_its_square():
    target, masked = batch()
    assert MaskedReconstructionLoss(4, spectral_weight=1.0)(masked, target) == 0
    assert MaskedReconstructionLoss(4)(masked + 0.1, target).item() == pytest.approx(0.01, rel=1e-4)


def test_spectral_term_sees_detail_more_than_shading():
    target, masked = batch()
    spectral = MaskedReconstructionLoss(4, spectral_weight=1.0)
    plain = MaskedReconstructionLoss(4)
    checker = torch.tensor([1.0, -1.0]).repeat(32).expand_as(masked) * 0.1
    shading = torch.full_like(masked, 0.1)
    extra = [(spectral(masked + error, target) - plain(masked + error, target)).item() for error in (checker, shading)]
    assert plain(masked + checker, target).item() == pytest.approx(plain(masked + shading, target).item(), rel=1e-4)
    assert extra[0] > 2 * extra[1] > 0


def test_spectral_term_is_the_masked_error_where_the_filter_is_one(monkeypatch):
    target, masked = batch()
    monkeypatch.setattr("sspformer.kspace.highpass", lambda rho, gamma: torch.ones_like(rho))
    pred = masked + torch.randn(masked.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    plain = MaskedReconstructionLoss(4)(pred, target)
    torch.testing.assert_close(MaskedReconstructionLoss(4, spectral_weight=1.0)(pred, target), 2 * plain)


def test_normalised_target_ignores_brightness_and_contrast_of_a_patch():
    target, masked = batch()
    loss = MaskedReconstructionLoss(4, normalize_target=True)
    normalised, mean, std = normalize_patches(masked)
    torch.testing.assert_close(normalised * std + mean, masked)
    assert loss(normalised, target).item() == pytest.approx(0, abs=1e-10)
    brighter = {**target, "image": 3 * target["image"] + 2}
    assert loss(normalised, brighter).item() == pytest.approx(0, abs=1e-4)


def test_gradient_is_finite_and_reaches_every_prediction():
    target, masked = batch(sides=(16, 16, 16))
    pred = torch.zeros_like(masked, requires_grad=True)
    MaskedReconstructionLoss(4, spectral_weight=0.5)(pred, target).backward()
    assert pred.grad.isfinite().all() and (pred.grad.abs().sum(-1) > 0).all()


def test_errors():
    target, masked = batch()
    with pytest.raises(ValueError, match="spectral_weight must be 0 or more, got -1"):
        MaskedReconstructionLoss(4, spectral_weight=-1)
    with pytest.raises(ValueError, match="got 47 predicted patches for 48 masked ones"):
        MaskedReconstructionLoss(4)(masked[:, 1:], target)


OPTIONS = [{}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"lambda_ce": 0.5}]


@pytest.mark.parametrize("options", [{"include_background": False, "batch": True}, *OPTIONS])
def test_cross_entropy_alone_weighs_the_classes_with_all_options_of_monai(options):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 6, 6, 6, generator=generator)
    label = torch.randint(3, (2, 1, 6, 6, 6), generator=generator)
    options = {"to_onehot_y": True, "softmax": True, **options}
    torch.testing.assert_close(
        BalancedDiceCELoss([1, 1, 1], **options)(logits, label), DiceCELoss(**options)(logits, label)
    )
    weight = torch.tensor([0.5, 2.0, 5.0])
    if "batch" in options:
        compiled = BalancedDiceCELoss(weight, **options)
        torch.testing.assert_close(compiled.in_one_graph(logits, label), compiled(logits, label))
    ours, monai = BalancedDiceCELoss(weight, **options), DiceCELoss(weight=weight, **options)
    torch.testing.assert_close(ours.ce(logits, label), monai.ce(logits, label))
    torch.testing.assert_close(ours.dice(logits, label), DiceCELoss(**options).dice(logits, label))
