"""The network for whole scans: laws, and that it learns."""

import pytest
import torch
from torch import nn

from sspformer.losses import StandardizedMSELoss
from sspformer.networks import ScanPredictor, SSPFormerEncoder

SMALL = {"patch_size": 4, "dim": 24, "depth": 2, "num_heads": 2}


def predictor(spatial_dims=3, out_channels=2, in_channels=1, **kwargs):
    torch.manual_seed(0)
    network = ScanPredictor(SSPFormerEncoder(spatial_dims, in_channels, **SMALL), out_channels, **kwargs)
    nn.init.normal_(network.head.weight)  # it starts at 0
    return network.eval()


def scans(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(2, 1, 12, 16, 9), (3, 1, 20, 15), (2, 2, 8, 8, 8)])
def test_one_output_for_each_scan_of_any_size_scripted_and_not(shape):
    network = predictor(len(shape) - 2, 3, shape[1])
    image = scans(*shape)
    out = network(image)
    assert out.shape == (shape[0], 3)
    torch.testing.assert_close(torch.jit.script(network)(image), out)
    torch.testing.assert_close(network(image[:1]), out[:1])  # other scans of the batch do not matter


def test_what_is_dark_does_not_matter():
    network, image = predictor(), scans(1, 1, 16, 16, 16)
    image[..., :8] *= 0.1
    other = image.clone()
    other[..., :8] = 0.01
    assert torch.equal(network(image), network(other))
    bright = image.clone()
    bright[..., 8:] *= 0.9
    assert not torch.allclose(network(image), network(bright))
    assert not torch.allclose(predictor(visible=1.0)(image), predictor(visible=1.0)(other))


def test_before_training_it_predicts_the_mean_of_the_targets():
    network = ScanPredictor(SSPFormerEncoder(**SMALL), 1)
    image, targets = scans(6, 1, 8, 8, 8), torch.tensor([[20.0], [30], [40], [50], [60], [80]])
    network.standardize(network.pool(image), targets)
    torch.testing.assert_close(network(image), targets.mean().expand(6, 1))
    pooled = (network.pool(image) - network.token_mean) / network.token_std
    torch.testing.assert_close(pooled.mean(0), torch.zeros(24), atol=1e-4, rtol=0)
    torch.testing.assert_close(pooled.std(0, correction=0), torch.ones(24), atol=1e-4, rtol=0)


def fit(scale=1.0, shift=0.0, steps=40):
    """Trains on the mean brightness of a part of each scan; returns the losses, the predictions and the targets."""
    torch.manual_seed(0)
    network, loss_function = ScanPredictor(SSPFormerEncoder(**SMALL), 1), None
    image = scans(12, 1, 12, 12, 12) * torch.linspace(0.5, 1, 12)[:, None, None, None, None]
    targets = scale * image[:, 0, 4:8].mean(dim=(1, 2, 3))[:, None] + shift
    network.standardize(network.pool(image).detach(), targets)
    loss_function = StandardizedMSELoss(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        loss = loss_function(network(image), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, network(image).detach(), targets


def test_it_learns_and_the_unit_of_the_targets_changes_nothing_else():
    losses, pred, targets = fit()
    assert losses[0] == pytest.approx(1, abs=1e-4) and losses[-1] < 0.05  # at first the variance, in units of itself
    _, scaled, _ = fit(scale=200.0, shift=-7.0)
    torch.testing.assert_close(scaled, 200 * pred - 7, rtol=1e-2, atol=1e-2)


def test_a_single_subject_and_a_constant_token_divide_by_nothing():
    network = ScanPredictor(SSPFormerEncoder(**SMALL), 1)
    network.standardize(torch.ones(1, 24), torch.ones(1, 1))
    assert network(scans(1, 1, 8, 8, 8)).isfinite().all()


@pytest.mark.parametrize("visible", [0.0, 1.1, -0.5])
def test_share_out_of_range(visible):
    with pytest.raises(ValueError, match=r"visible must be in \(0, 1\]"):
        ScanPredictor(SSPFormerEncoder(**SMALL), visible=visible)
