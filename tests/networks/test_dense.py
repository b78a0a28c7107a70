"""Segmentation and restoration: any size and channel count, the identity before training, both paths learn."""

import math

import pytest
import torch
from monai.losses import DiceCELoss

from sspformer.engines import layer_decay_groups
from sspformer.intensity import noise_level
from sspformer.networks import SSPFormerDense, SSPFormerEncoder, SSPFormerRestorer, load_pretrained
from sspformer.networks.decoder import halvings
from sspformer.networks.layers import fold, unfold
from sspformer.networks.restorer import finest_detail
from sspformer.options import is_null


def encoder(spatial_dims=3, in_channels=1, patch_size=8):
    torch.manual_seed(0)
    return SSPFormerEncoder(spatial_dims, in_channels, patch_size, dim=48, depth=2, num_heads=2)


def toy(spatial_dims=3, in_channels=1, patch_size=8, **kwargs):
    return SSPFormerDense(encoder(spatial_dims, in_channels, patch_size), **{"features": 8, **kwargs})


def restorer(spatial_dims=3, in_channels=1, patch_size=8, **kwargs):
    return SSPFormerRestorer(encoder(spatial_dims, in_channels, patch_size), **{"features": 8, "blocks": 1, **kwargs})


@pytest.mark.parametrize(
    "spatial_dims, patch, shape, in_channels, out_channels",
    [
        (3, 8, (17, 24, 9), 1, 3),
        (3, (8, 8, 2), (16, 20, 5), 2, 4),
        (2, 16, (40, 33), 3, 2),
        (2, (4, 1), (9, 5), 1, 2),
    ],
)
def test_any_size_patch_and_channels(spatial_dims, patch, shape, in_channels, out_channels):
    network = toy(spatial_dims=spatial_dims, patch_size=patch, in_channels=in_channels, out_channels=out_channels)
    assert network(torch.rand(2, in_channels, *shape)).shape == (2, out_channels, *shape)


@pytest.mark.parametrize("patch", [(8, 8, 8), (8, 8, 2), (16, 4), (4, 1)])
def test_halvings_use_up_the_patch(patch):
    product = [1] * len(patch)
    for step in halvings(patch):
        product = [a * b for a, b in zip(product, step)]
    assert tuple(product) == patch


def test_a_residual_network_starts_as_the_identity():
    image = torch.rand(1, 2, 12, 10, 7)
    network = restorer(in_channels=2, folded=False)
    assert torch.equal(network(image), image)
    network(image).sum().backward()
    assert network.head.weight.grad.abs().sum() > 0  # and can leave it


def test_depths_default_to_thirds_and_choose_the_tokens():
    assert SSPFormerDense(SSPFormerEncoder(size="tiny")).depths == (2, 4, 6)
    assert SSPFormerDense(SSPFormerEncoder(size="small")).depths == (4, 8, 12)
    network = toy(depths=(1,))
    for parameter in network.encoder.blocks[1].parameters():
        torch.nn.init.normal_(parameter)
    image = torch.rand(1, 1, 16, 16, 16)
    before = network(image)
    torch.nn.init.normal_(network.encoder.blocks[1].mlp[0].weight)
    assert torch.equal(network(image), before)  # the second block is not looked at


def test_hidden_tokens_end_in_the_encoders_output():
    network = toy()
    image = torch.rand(1, 1, 16, 16, 16)
    first, last = network.encoder.hidden_tokens(image, (1, 2))
    assert torch.equal(last, network.encoder(image)) and not torch.allclose(first, last)


@pytest.mark.parametrize("path", ["tokens", "detail"])
def test_each_path_alone_learns_what_it_can_know(path):
    """Coarse blocks from the tokens, thin lines from the convolutions."""
    network = toy(spatial_dims=2, patch_size=8, out_channels=2)
    frozen = network.stem if path == "tokens" else network.encoder
    frozen.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(4, 1, 32, 32, generator=generator)
    label = (image > 0.8).long()
    if path == "tokens":
        label = (torch.nn.functional.avg_pool2d(image, 8) > 0.5).repeat_interleave(8, 2).repeat_interleave(8, 3).long()
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(loss(network(image), label))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_a_wrong_construction_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="powers of 2"):
        toy(patch_size=6)
    with pytest.raises(ValueError, match="powers of 2"):
        restorer(patch_size=(8, 8, 3))
    with pytest.raises(ValueError, match="within 1 and 2"):
        toy(depths=(3,))
    with pytest.raises(ValueError, match=r"\(B, 1, H, W, D\), got \[1, 2, 8, 8, 8\]"):
        toy()(torch.rand(1, 2, 8, 8, 8))


def test_learning_rates_fall_towards_the_first_layers():
    network = toy()
    groups = layer_decay_groups(network, 1.0, 0.5, weight_decay=0.1, head_factor=1.0)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rates) == len(list(network.parameters()))
    assert rates[id(network.head.weight)] == 1.0
    assert rates[id(network.encoder.blocks[1].mlp[0].weight)] == 0.5
    assert rates[id(network.encoder.blocks[0].mlp[0].weight)] == 0.25
    assert rates[id(network.encoder.patch_embedding.weight)] == 0.125
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decays[id(network.head.weight)] == 0.1 and decays[id(network.head.bias)] == 0.0
    assert len({group["lr"] for group in layer_decay_groups(network, 1.0, head_factor=1.0)}) == 1
    with pytest.raises(ValueError, match="layer_decay must be in"):
        layer_decay_groups(network, 1.0, 1.5)


def test_the_head_may_learn_faster():
    network = toy()
    groups = layer_decay_groups(network, 1.0, 0.5, weight_decay=0.1)  # as the network says
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert settings[id(network.head.weight)] == (10.0, 0.1) and settings[id(network.head.bias)] == (10.0, 0.0)
    found = {name: settings[id(p)][0] for name, p in network.named_parameters() if not name.startswith("head")}
    assert max(found.values()) == 1.0 and found["encoder.norm.weight"] == 0.5
    assert groups[0]["lr"] == 1.0  # what history.csv reports
    with pytest.raises(ValueError, match="head_factor must be above 0, got 0"):
        layer_decay_groups(network, 1.0, head_factor=0)
    del network.head
    with pytest.raises(ValueError, match="head_factor 10.0 is of a head, which SSPFormerDense lacks"):
        layer_decay_groups(network, 1.0)


def test_a_head_that_is_loaded_learns_as_the_decoder(tmp_path):
    torch.save(toy().state_dict(), tmp_path / "model.pt")
    assert load_pretrained(toy(), tmp_path / "model.pt").head_factor == 1.0
    assert load_pretrained(toy(out_channels=5), tmp_path / "model.pt").head_factor == 10.0


@pytest.mark.parametrize("value, null", [(None, True), ("null", True), ("None", True), ("encoder.pt", False)])
def test_words_for_none(value, null):
    assert is_null(value) is null


def test_the_noise_level_is_that_of_white_noise_and_of_little_else():
    generator = torch.Generator().manual_seed(0)
    smooth = torch.linspace(0, 1, 32)[:, None, None] * torch.linspace(0, 1, 32)[:, None] * torch.ones(32)
    for sigma in (0.01, 0.1):
        noisy = smooth + sigma * torch.randn(2, 1, 32, 32, 32, generator=generator)
        level = noise_level(noisy)
        assert level.shape == (2, 1, 1, 1, 1)
        torch.testing.assert_close(level, torch.full_like(level, sigma), rtol=0.05, atol=0)
    assert float(noise_level(smooth[None, None])) < 1e-3
    assert noise_level(torch.rand(1, 1, 5, 1)).shape == (1, 1, 1, 1)  # odd sides, and a single slice
    stripped = torch.zeros(1, 1, 32, 32, 32)
    stripped[..., :8] = 0.5 + 0.05 * torch.randn(32, 32, 8, generator=generator)
    torch.testing.assert_close(float(noise_level(stripped)), 0.05, rtol=0.05, atol=0)
    assert float(noise_level(torch.zeros(1, 1, 8, 8, 8))) == 0


@pytest.mark.parametrize("zeros", [0, 1, 2, 31, 32])
def test_the_noise_level_is_the_lower_median_of_what_is_not_zero(zeros):
    first = torch.randn(32, generator=torch.Generator().manual_seed(0))
    first[:zeros] = 0
    image = torch.stack([first, torch.zeros(32)], dim=-1).reshape(1, 1, 64)  # differences of pairs are first
    values = first[zeros:].abs() / math.sqrt(2)
    expected = values.median() if zeros < 32 else torch.tensor(0.0)
    torch.testing.assert_close(noise_level(image).reshape(()), expected / 0.6745)


def test_a_noise_scaled_residual_is_in_units_of_the_noise():
    network = restorer(noise_scaled=True)
    torch.nn.init.ones_(network.head.bias)
    image = torch.rand(1, 1, 16, 16, 16)
    torch.testing.assert_close(network(image), image + noise_level(image))
    flat = torch.full((1, 1, 16, 16, 16), 0.5)  # no noise: next to nothing is added
    torch.testing.assert_close(network(flat), flat, rtol=0, atol=2e-4)


def test_the_convolutions_of_a_residual_network_see_the_detail_in_units_of_the_residual():
    seen = []
    for scale in (1.0, 0.1):
        network = restorer(residual_scale=scale, folded=False)
        network.stem[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        image = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
        network(image)
    assert torch.equal(seen[0][:, :1], image) and torch.equal(seen[1][:, :1], image)
    torch.testing.assert_close(seen[0][:, 1:], 2 * (finest_detail(image) / 2).asinh())  # edges are compressed
    torch.testing.assert_close(seen[1][:, 1:], 2 * (5 * finest_detail(image)).asinh())


@pytest.mark.parametrize("shape", [(2, 2, 8, 9), (1, 1, 8, 6, 5)])
def test_the_finest_detail_is_what_a_local_mean_takes_away(shape):
    ramp = torch.arange(shape[2], dtype=torch.float32).reshape(-1, *[1] * (len(shape) - 3)).expand(shape)
    detail = finest_detail(ramp)
    torch.testing.assert_close(detail[:, :, 1:-1], torch.zeros_like(detail[:, :, 1:-1]), rtol=0, atol=1e-5)
    assert float(finest_detail(torch.ones(shape)).abs().max()) < 1e-6  # at the borders too


@pytest.mark.parametrize("factor", [[2, 2, 2], [2, 2, 1], [1, 4]])
def test_folding_keeps_every_voxel_at_its_place(factor):
    image = torch.rand(2, 3, *[8] * len(factor))
    folded = fold(image, factor)
    assert folded.shape == (2, 3 * math.prod(factor), *(8 // n for n in factor))
    assert torch.equal(unfold(folded, factor), image)
    place = (slice(None), slice(None), *(slice(0, None, n) for n in factor))
    assert torch.equal(folded[:, :: math.prod(factor)], image[place])  # first channel of each: first voxel


@pytest.mark.parametrize("spatial_dims, patch", [(3, 8), (3, (8, 8, 2)), (2, 16)])
def test_a_folded_network_with_blocks_takes_any_size_and_learns(spatial_dims, patch):
    network = restorer(spatial_dims, patch_size=patch)
    image = torch.rand(1, 1, *(17, 24, 9)[:spatial_dims])
    assert torch.equal(network(image), image)
    torch.nn.init.normal_(network.head.weight)
    network(image).square().sum().backward()
    for part in (network.head, *network.fuse, *network.stem, *network.upsample, network.encoder.blocks):
        assert all(parameter.grad.abs().sum() > 0 for parameter in part.parameters() if parameter.ndim > 1)
    with pytest.raises(ValueError, match="^folded needs patches"):
        restorer(patch_size=2)
    with pytest.raises(ValueError, match="^blocks must be 1 or more"):
        restorer(blocks=0)


def test_weights_of_one_residual_are_not_those_of_another():
    """Their tensors have the same shapes; their units differ."""
    denoising, other = restorer(noise_scaled=True), restorer(residual_scale=0.05)
    with pytest.raises(RuntimeError, match="noise_unit"):
        other.load_state_dict(denoising.state_dict())
    assert other.state_dict()["intensity_unit"] == pytest.approx(0.05)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_residual_networks_take_half_precision_and_thin_images(dtype):
    for noise_scaled in (False, True):
        network = restorer(noise_scaled=noise_scaled).to(dtype)
        for shape in ((1, 1, 16, 16, 16), (1, 1, 16, 16, 1)):
            assert network(torch.rand(shape).to(dtype)).dtype == dtype


def test_segmentation_has_no_blocks_and_sees_the_image_alone():
    names = [name for name, _ in toy().named_parameters()]
    assert not any("layers" in name for name in names)
    assert toy().stem[0].conv.in_channels == 1
