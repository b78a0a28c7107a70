"""Layers, encoder and masked autoencoder: what they see, what they do not, and that they learn."""

import pytest
import torch

from sspformer.networks import (
    SIZES,
    Attention,
    InstanceNorm,
    MaskedAutoencoder,
    RotaryPosition,
    SSPFormerEncoder,
    gather_patches,
    gather_tokens,
    pad_to_patches,
    patchify,
    unpatchify,
)
from sspformer.networks.layers import LayerNorm, attend, rotate
from sspformer.transforms import InverseFrequencyMask


def toy(spatial_dims=3):
    torch.manual_seed(0)
    encoder = SSPFormerEncoder(spatial_dims, patch_size=4, dim=48, depth=2, num_heads=2)
    return MaskedAutoencoder(encoder, decoder_dim=48, decoder_depth=2, decoder_num_heads=2)


@pytest.mark.parametrize("shape, patch", [((8, 12), (4, 3)), ((8, 12, 6), (4, 3, 2))])
def test_patchify_round_trip_and_order(shape, patch):
    image = torch.rand(2, 3, *shape)
    patches = patchify(image, patch)
    grid = [side // p for side, p in zip(shape, patch)]
    assert torch.equal(unpatchify(patches, grid, patch), image)
    # the token after the first lies one patch further along the last axis
    second = image[(slice(None), slice(None), *[slice(0, p) for p in patch[:-1]], slice(patch[-1], 2 * patch[-1]))]
    assert torch.equal(patches[:, 1], second.flatten(1))
    index = torch.rand(2, len(patches[0])).argsort(dim=1)[:, :3]
    assert torch.equal(gather_patches(image, patch, index), gather_tokens(patches, index))


def test_padding_repeats_the_border_at_the_end():
    image = torch.rand(1, 1, 5, 8)
    padded = pad_to_patches(image, (4, 4))
    assert padded.shape[2:] == (8, 8)
    assert torch.equal(padded[:, :, :5], image)
    assert torch.equal(padded[:, :, 7], image[:, :, 4])
    assert pad_to_patches(image, (5, 4)) is image  # no kernel where nothing is to be padded


@pytest.mark.parametrize("grid", [(5, 4), (3, 4, 2)])
def test_rotary_attention_depends_on_relative_position_only(grid):
    position = RotaryPosition(head_dim=24, spatial_dims=len(grid))
    larger = [side + 3 for side in grid]
    q, k = torch.randn(2, 24)
    rotation, shifted = position(grid), position(larger)
    start = torch.tensor([3] * len(grid))
    strides = torch.tensor([int(torch.tensor(larger[i + 1 :]).prod()) for i in range(len(grid))])
    coordinates = torch.cartesian_prod(*[torch.arange(side) for side in grid])
    moved = shifted[:, (coordinates + start) @ strides]
    n = len(coordinates)

    def scores(r):
        return rotate(q.expand(1, 1, n, 24), r) @ rotate(k.expand(1, 1, n, 24), r).transpose(-1, -2)

    torch.testing.assert_close(scores(rotation), scores(moved), atol=1e-4, rtol=1e-4)
    assert scores(rotation).std() > 1e-2  # and it does depend on it


def test_rotations_are_exact_under_autocast():
    position = RotaryPosition(head_dim=64, spatial_dims=3)
    with torch.autocast("cpu", torch.bfloat16):
        low = position((32, 32, 32))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, position((32, 32, 32)), atol=1e-6, rtol=0)


def test_attention_equals_the_formula():
    torch.manual_seed(0)
    attention = Attention(24, 2)
    x = torch.randn(1, 5, 24)
    rotation = RotaryPosition(12, 2)((1, 5))
    q, (k, v) = attention.q(x), attention.kv(x).chunk(2, -1)
    heads = []
    for h in range(2):
        qh, kh, vh = (t[..., 12 * h : 12 * h + 12] for t in (q, k, v))
        weights = (rotate(qh, rotation) @ rotate(kh, rotation).transpose(-1, -2) / 12**0.5).softmax(-1)
        heads.append(weights @ vh)
    torch.testing.assert_close(attention(x, rotation), attention.proj(torch.cat(heads, -1)))


def test_layer_norm_in_bfloat16_has_sums_in_float32():
    norm = LayerNorm(256)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = (50 + torch.randn(3, 7, 256)).bfloat16()
    low, full = norm._in_type_of(x), norm(x.float())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), full, atol=0.03, rtol=0.02)
    x = x.float()
    assert torch.equal(norm(x), torch.nn.functional.layer_norm(x, (256,), norm.weight, norm.bias))


@pytest.mark.parametrize("shape, stock", [((9, 12), torch.nn.InstanceNorm2d), ((9, 4, 6), torch.nn.InstanceNorm3d)])
def test_instance_norm_is_pytorchs_and_its_form_for_onnx_equals_it(shape, stock):
    x = 3 + torch.rand(2, 5, *shape)
    norm, other = InstanceNorm(5, eps=1e-3), stock(5, affine=True, eps=1e-3)
    state = {"weight": torch.rand(5), "bias": torch.rand(5)}
    norm.load_state_dict(state), other.load_state_dict(state)
    assert torch.equal(norm(x), other(x))
    torch.testing.assert_close(norm._by_axis(x), other(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size, millions", [("tiny", 5), ("small", 22), ("base", 86)])
def test_presets_have_the_size_they_claim(size, millions):
    with torch.device("meta"):
        encoder = SSPFormerEncoder(size=size)
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(millions * 1e6, rel=0.06)
    assert set(SIZES) == {"tiny", "small", "base"}


def test_the_decoder_grows_with_the_encoder():
    with torch.device("meta"):
        for size, row in SIZES.items():
            network = MaskedAutoencoder(SSPFormerEncoder(size=size))
            assert network.decoder_embedding.out_features == row["decoder_dim"]
            assert len(network.decoder_blocks) == row["decoder_depth"]
            assert network.decoder_blocks[0].attention.num_heads == row["decoder_num_heads"]
        wide = MaskedAutoencoder(SSPFormerEncoder(dim=1024, num_heads=16), decoder_depth=1)
        assert wide.decoder_embedding.out_features == SIZES["base"]["decoder_dim"] and len(wide.decoder_blocks) == 1


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 17, 9), (1, 16, 16, 16), (2, 9, 17, 30)])
def test_encoder_takes_any_size_and_channels(shape):
    channels, *sides = shape
    encoder = SSPFormerEncoder(len(sides), channels, patch_size=8, dim=48, depth=1, num_heads=2)
    tokens = encoder(torch.rand(2, *shape))
    assert tokens.shape == (2, int(torch.tensor(encoder.grid(sides)).prod()), 48)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_only_visible_patches_reach_the_network(spatial_dims):
    net = toy(spatial_dims).eval()
    image = torch.rand(2, 1, *[10] * spatial_dims)
    ids = InverseFrequencyMask(4, spatial_dims)(image, generator=torch.Generator().manual_seed(0))
    pred = net(image, ids.keep, ids.mask)
    patches = patchify(pad_to_patches(image, net.patch_size), net.patch_size)
    assert pred.shape == gather_tokens(patches, ids.mask).shape

    noise = torch.rand_like(patches).scatter(1, ids.keep[..., None].expand(-1, -1, patches.shape[2]), 0)
    garbled = unpatchify(patches + noise, net.encoder.grid(image.shape[2:]), net.patch_size)
    torch.testing.assert_close(net(garbled, ids.keep, ids.mask), pred)
    changed = unpatchify(patches + 0.1, net.encoder.grid(image.shape[2:]), net.patch_size)
    assert not torch.allclose(net(changed, ids.keep, ids.mask), pred)


def test_encoding_visible_tokens_is_encoding_an_image_of_them_alone():
    """Visible tokens do not see the masked ones: all of them visible is the plain encoder."""
    encoder = toy().encoder.eval()
    image = torch.rand(1, 1, 8, 8, 8)
    every = torch.arange(8)[None]
    torch.testing.assert_close(encoder(image, every), encoder(image))
    permutation = torch.randperm(8)[None]
    torch.testing.assert_close(encoder(image, permutation), encoder(image)[:, permutation[0]])


def test_one_mask_token_for_all_is_a_token_for_each():
    net = toy()
    image = torch.rand(2, 1, 16, 16, 16)
    ids = InverseFrequencyMask(4)(image)
    torch.nn.init.normal_(net.mask_token)
    pred = net(image, ids.keep, ids.mask)
    net.mask_token = torch.nn.Parameter(net.mask_token.detach().expand(*ids.mask.shape, -1).clone())
    torch.testing.assert_close(pred, net(image, ids.keep, ids.mask))


def test_a_prediction_does_not_depend_on_what_else_is_asked_for():
    net = toy().eval()
    image = torch.rand(1, 1, 12, 12, 12)
    ids = InverseFrequencyMask(4)(image, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(net(image, ids.keep, ids.mask[:, :3]), net(image, ids.keep, ids.mask)[:, :3])


def test_one_set_of_weights_serves_all_image_sizes():
    net = toy()
    for sides in ((8, 8, 8), (12, 9, 20)):
        ids = InverseFrequencyMask(4)(torch.rand(1, 1, *sides))
        net(torch.rand(1, 1, *sides), ids.keep, ids.mask).sum().backward()


def test_bfloat16_is_close_to_float32():
    net = toy().eval()
    image = torch.rand(1, 1, 16, 16, 16)
    ids = InverseFrequencyMask(4)(image, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = net(image, ids.keep, ids.mask)
    full = net(image, ids.keep, ids.mask)
    assert low.dtype == torch.bfloat16
    assert (low.float() - full).pow(2).mean() < 1e-3 * full.pow(2).mean()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_equals_cpu():
    net = toy().eval()
    image = torch.rand(1, 1, 16, 16, 16)
    ids = InverseFrequencyMask(4)(image)
    cuda = net.cuda()(image.cuda(), ids.keep.cuda(), ids.mask.cuda()).cpu()
    torch.testing.assert_close(cuda, net.cpu()(image, ids.keep, ids.mask), atol=1e-3, rtol=1e-3)


def test_errors_name_the_argument_and_the_value():
    with pytest.raises(ValueError, match="huge.*|tiny, small, base.*huge"):
        SSPFormerEncoder(size="huge")
    with pytest.raises(ValueError, match="spatial_dims.*4"):
        SSPFormerEncoder(spatial_dims=4)
    with pytest.raises(ValueError, match="num_heads"):
        SSPFormerEncoder(dim=50, num_heads=4)
    with pytest.raises(ValueError, match=r"\[1, 2, 8, 8, 8\]"):
        toy().encoder(torch.rand(1, 2, 8, 8, 8))


@pytest.mark.parametrize("keys", [12, 700])  # as two products, and as one kernel
def test_training_in_bfloat16_on_a_cpu_has_the_gradients_of_float32(keys):
    torch.manual_seed(0)
    full = [torch.randn(2, 3, n, 16, requires_grad=True) for n in (20, keys, keys)]
    half = [value.detach().bfloat16().requires_grad_() for value in full]
    wanted = torch.nn.functional.scaled_dot_product_attention(*full)
    found = attend(*half)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, atol=0.03, rtol=0.03)
    weight = torch.randn_like(wanted)
    (wanted * weight).sum().backward()
    (found.float() * weight).sum().backward()
    for value, reference in zip(half, full, strict=True):
        error = (value.grad.float() - reference.grad).norm() / reference.grad.norm()
        assert error < 0.02
    half = [value.detach() for value in half]  # the weights that ship give the voxels that they gave
    assert torch.equal(attend(*half), torch.nn.functional.scaled_dot_product_attention(*half))
