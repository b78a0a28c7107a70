"""Pretrained weights: into every network, from every kind of file; and what is refused, in clear words."""

import logging
import math
import os

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import UNet

from sspformer.networks import (
    SIZES,
    MaskedAutoencoder,
    SSPFormerDense,
    SSPFormerEncoder,
    load_pretrained,
    patchify,
    resize_patch_embedding,
)

TOY = {"dim": 24, "depth": 2, "num_heads": 2, "decoder_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2}


@pytest.fixture(autouse=True)
def small_tiny(monkeypatch):
    """The preset "tiny" as a toy, so that dense networks are small too."""
    monkeypatch.setitem(SIZES, "tiny", TOY)
    torch.manual_seed(0)


@pytest.fixture
def autoencoder():
    return MaskedAutoencoder(SSPFormerEncoder(patch_size=4))


def save(content, tmp_path, name="weights.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def encoder_of(network):
    return getattr(network, "encoder", network)


def assert_same_encoder(network, source):
    image = torch.rand(1, 1, 8, 8, 6)
    torch.testing.assert_close(encoder_of(network)(image), encoder_of(source)(image))


def dense(patch_size=4, out_channels=2):
    return SSPFormerDense(SSPFormerEncoder(patch_size=patch_size), out_channels, features=4)


@pytest.mark.parametrize(
    "build", [dense, lambda: SSPFormerEncoder(patch_size=4), lambda: MaskedAutoencoder(SSPFormerEncoder(patch_size=4))]
)
@pytest.mark.parametrize("kind", ["encoder", "model", "checkpoint"])
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "network.", "module._orig_mod.", "model.net."])
def test_every_file_fits_every_network(build, kind, wrapper, autoencoder, tmp_path):
    state = (autoencoder.encoder if kind == "encoder" else autoencoder).state_dict()
    state = {wrapper + name: value for name, value in state.items()}
    path = save({"network": state, "optimizer": {}} if kind == "checkpoint" else state, tmp_path)
    network = build()
    assert load_pretrained(network, path) is network
    assert_same_encoder(network, autoencoder)


@pytest.mark.parametrize("place", ["state_dict", "model"])
@pytest.mark.parametrize("wrapper", ["model.encoder.", "net.", "backbone."])
def test_an_encoder_inside_others_checkpoints(place, wrapper, autoencoder, tmp_path):
    state = {wrapper + name: value for name, value in autoencoder.encoder.state_dict().items()}
    path = save({place: {**state, "criterion.weight": torch.ones(2)}, "epoch": 3}, tmp_path)
    assert_same_encoder(load_pretrained(dense(), path), autoencoder)


@pytest.mark.parametrize("wrapper", ["", "model."])
def test_a_masked_autoencoder_comes_back_whole(wrapper, autoencoder, tmp_path):
    state = {wrapper + name: value for name, value in autoencoder.state_dict().items()}
    network = load_pretrained(MaskedAutoencoder(SSPFormerEncoder(patch_size=4)), save(state, tmp_path))
    for name, value in autoencoder.state_dict().items():
        assert torch.equal(network.state_dict()[name], value)


def test_a_wrapper_around_the_encoder_only(autoencoder, tmp_path):
    state = {f"encoder._orig_mod.{name}": value for name, value in autoencoder.encoder.state_dict().items()}
    assert_same_encoder(load_pretrained(dense(), save(state, tmp_path)), autoencoder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted(dtype, tmp_path):
    source = dense().to(dtype)
    network = load_pretrained(dense(), save(source.state_dict(), tmp_path))
    assert all(value.dtype == torch.float32 for value in network.parameters())
    torch.testing.assert_close(network.encoder.blocks[0].mlp[0].weight, source.encoder.blocks[0].mlp[0].weight.float())


def test_none_trains_from_scratch(caplog):
    network = dense()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with caplog.at_level(logging.INFO, "sspformer"):
        assert load_pretrained(network, None) is network
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert "from scratch" in caplog.text


def rows_of(caplog):
    """{(part, what happened): tensors} of the table."""
    rows = {}
    for line in caplog.messages[-1].splitlines()[2:]:
        part, tensors, _, what, *why = line.split(maxsplit=4)
        rows[part, "not loaded" if what == "not" else what] = int(tensors)
    return rows


def test_the_table_accounts_for_every_tensor(autoencoder, tmp_path, caplog):
    path = save(autoencoder.state_dict(), tmp_path)
    network = dense()
    with caplog.at_level(logging.INFO, "sspformer"):
        load_pretrained(network, path)
    rows = rows_of(caplog)
    n_encoder = len(autoencoder.encoder.state_dict())
    assert f"all {n_encoder} tensors of the encoder" in caplog.text
    assert sum(n for (_, what), n in rows.items() if what == "loaded") == n_encoder
    assert sum(n for (_, what), n in rows.items() if what in ("loaded", "skipped")) == len(autoencoder.state_dict())
    assert sum(n for (_, what), n in rows.items() if what in ("loaded", "not loaded")) == len(network.state_dict())
    assert "for pretraining only" in caplog.text


def test_a_model_of_another_task_gives_its_decoder_but_not_its_head(tmp_path, caplog):
    source, network = dense(out_channels=5), dense(out_channels=3)
    head = network.head.weight.clone()
    with caplog.at_level(logging.INFO, "sspformer"):
        load_pretrained(network, save(source.state_dict(), tmp_path))
    for name, value in network.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(value, source.state_dict()[name]), name
    assert torch.equal(network.head.weight, head)
    assert rows_of(caplog)["head", "skipped"] == 2
    assert "head.weight: (5, 4, 1, 1, 1) in the file, (3, 4, 1, 1, 1) here" in caplog.text


@pytest.mark.parametrize("channels", [2, 4])
def test_one_channel_repeated_in_n_gives_the_same_tokens(channels, autoencoder, tmp_path):
    path = save(autoencoder.encoder.state_dict(), tmp_path)
    network = load_pretrained(SSPFormerEncoder(in_channels=channels, patch_size=4), path)
    image = torch.rand(1, 1, 8, 8, 8)
    tokens = autoencoder.encoder(image)
    torch.testing.assert_close(network(image.repeat(1, channels, 1, 1, 1)), tokens)

    path = save(network.state_dict(), tmp_path)  # and back
    again = load_pretrained(SSPFormerEncoder(patch_size=4), path)
    torch.testing.assert_close(again(image), tokens)


def test_channels_of_unknown_correspondence_are_refused(tmp_path):
    path = save(SSPFormerEncoder(in_channels=2, patch_size=4).state_dict(), tmp_path)
    with pytest.raises(ValueError, match="2 channels, the network in_channels 3"):
        load_pretrained(SSPFormerEncoder(in_channels=3, patch_size=4), path)


def smooth_image(shape, cycles=0.4):
    """Waves of a few directions, sampled at the centres of ``shape`` voxels over one field of view: mean 1."""
    axes = [(torch.arange(side) + 0.5) / side for side in shape]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    waves = torch.tensor([[1.0, 0.3, -0.5], [-0.2, 0.9, 0.4], [0.1, -0.6, 1.0]])[:, : len(shape)] * cycles
    return 1 + 0.3 * torch.cos(2 * math.pi * grid @ waves.T + torch.arange(3.0)).sum(-1)


@pytest.mark.parametrize(
    "patch, new", [((8, 8, 8), (4, 4, 4)), ((8, 8, 8), (16, 16, 4)), ((8, 8), (3, 5)), ((4, 4), (6, 8))]
)
def test_resized_patches_keep_the_tokens_of_a_smooth_image(patch, new):
    weight = torch.randn(32, math.prod(patch))
    grid = [3] * len(patch)
    resized = resize_patch_embedding(weight, (1, *patch), (1, *new))
    assert resized.shape == (32, math.prod(new))

    def tokens(weight, patch):
        image = smooth_image([g * p for g, p in zip(grid, patch)])[None, None]
        return patchify(image, patch) @ weight.T

    before, after = tokens(weight, patch), tokens(resized, new)
    assert (after - before).norm() < 0.03 * before.norm()


def test_resized_patches_are_the_old_embedding_of_resized_images():
    weight = torch.randn(16, 2 * 6 * 4)
    resized = resize_patch_embedding(weight, (2, 6, 4), (2, 9, 3))
    image = torch.rand(5, 2, 9, 3)
    old = F.interpolate(image, size=(6, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(image.flatten(1) @ resized.T, old.flatten(1) @ weight.T, atol=1e-5, rtol=1e-4)


def test_another_patch_size_is_resized(autoencoder, tmp_path, caplog):
    path = save(autoencoder.state_dict(), tmp_path)
    with caplog.at_level(logging.INFO, "sspformer"):
        network = load_pretrained(dense(patch_size=(8, 8, 2)), path)
    assert rows_of(caplog)["encoder.patch_embedding", "resized"] == 1
    assert "1 channel of 4 x 4 x 4 voxels in the file, 1 channel of 8 x 8 x 2 voxels here" in caplog.text
    fine, coarse = smooth_image((16, 16, 4)), smooth_image((8, 8, 8))
    with torch.no_grad():
        tokens, resized = autoencoder.encoder(coarse[None, None]), network.encoder(fine[None, None])
    assert (resized - tokens).norm() < 0.05 * tokens.norm()


def test_pretrained_tokens_survive_training_on(autoencoder, tmp_path):
    """The loaded weights are the network's own parameters: they get gradients and change."""
    network = load_pretrained(dense(), save(autoencoder.state_dict(), tmp_path))
    network(torch.rand(1, 1, 8, 8, 8)).square().mean().backward()
    assert all(p.grad is not None and p.requires_grad for p in network.encoder.patch_embedding.parameters())


# what is refused


@pytest.mark.parametrize("patch", [4, 8])
def test_2d_and_3d_do_not_mix(patch, tmp_path):
    flat = SSPFormerEncoder(spatial_dims=2, patch_size=8)  # 64 voxels, as 4 x 4 x 4
    path = save(flat.state_dict(), tmp_path)
    with pytest.raises(ValueError, match="2D images, the network one of 3D"):
        load_pretrained(dense(patch_size=patch), path)
    with pytest.raises(RuntimeError, match="layout"):  # nor without load_pretrained
        SSPFormerEncoder(patch_size=4).load_state_dict(flat.state_dict())


def test_other_heads_are_refused(tmp_path):
    path = save(SSPFormerEncoder(patch_size=4, num_heads=1).state_dict(), tmp_path)
    with pytest.raises(ValueError, match="num_heads=1"):
        load_pretrained(dense(), path)
    other = SSPFormerEncoder(patch_size=4, num_heads=1)  # whose tensors have the same shapes
    with pytest.raises(RuntimeError, match="weights are of . attention heads.*, the network of 1"):
        other.load_state_dict(SSPFormerEncoder(patch_size=4).state_dict())
    assert other.layout[0] == 1


def test_files_without_a_layout_load(autoencoder, tmp_path):
    state = autoencoder.state_dict()
    del state["encoder.layout"]
    MaskedAutoencoder(SSPFormerEncoder(patch_size=4)).load_state_dict(state)
    assert_same_encoder(load_pretrained(dense(), save(state, tmp_path)), autoencoder)


def test_another_size_names_the_preset_and_changes_nothing(tmp_path):
    small = SSPFormerEncoder(patch_size=4, size="small").state_dict()
    network = dense()
    before = network.encoder.norm.weight.clone()
    with pytest.raises(ValueError, match="width 384 and 12 blocks, .* width 24 and 2 blocks: .* size 'small'"):
        load_pretrained(network, save(small, tmp_path))
    assert torch.equal(network.encoder.norm.weight, before)
    odd = SSPFormerEncoder(patch_size=4, dim=24, depth=3, num_heads=2).state_dict()
    with pytest.raises(ValueError, match="dim=24 and depth=3"):
        load_pretrained(network, save(odd, tmp_path))


@pytest.mark.parametrize("missing", ["norm.weight", "blocks.1.mlp.0.bias", "patch_embedding.bias"])
def test_less_than_the_whole_encoder_is_refused(missing, autoencoder, tmp_path):
    state = autoencoder.encoder.state_dict()
    del state[missing]
    n = len(state)
    network = dense()
    before = network.encoder.patch_embedding.weight.clone()
    with pytest.raises(ValueError, match=f"covers {n} of the encoder's {n + 1} tensors: encoder.{missing}"):
        load_pretrained(network, save(state, tmp_path))
    assert torch.equal(network.encoder.patch_embedding.weight, before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value, autoencoder, tmp_path):
    state = {name: value.clone() for name, value in autoencoder.state_dict().items()}
    state["encoder.blocks.1.mlp.0.weight"][0, 0] = value
    network = dense()
    before = network.encoder.norm.weight.clone()
    with pytest.raises(ValueError, match="NaN or infinite in 1 of its tensors.*encoder.blocks.1.mlp.0.weight"):
        load_pretrained(network, save(state, tmp_path))
    assert torch.equal(network.encoder.norm.weight, before)


def test_files_of_other_projects_are_refused(tmp_path):
    names = ("patch_embedding.position_embeddings", "blocks.0.mlp.linear1.weight", "blocks.0.attn.qkv.weight")
    vit = {name: torch.zeros(3) for name in names}  # of MONAI's ViT, which needs einops
    with pytest.raises(ValueError, match="no SSPFormer encoder: it has 'blocks.0.*another project's blocks"):
        load_pretrained(dense(), save(vit, tmp_path))
    with pytest.raises(ValueError, match="no SSPFormer encoder"):
        load_pretrained(dense(), save({"blocks.0.attn.qkv.weight": torch.zeros(3)}, tmp_path))


class Payload:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_pickled_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="holds more than weights"):
        load_pretrained(dense(), save({"network": Payload()}, tmp_path))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [b"", b"not weights", "half"])
def test_damaged_files_are_refused(content, autoencoder, tmp_path):
    path = save(autoencoder.state_dict(), tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(ValueError, match="weights.pt is damaged"):
        load_pretrained(dense(), path)


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.zeros(3), {}])
def test_files_without_a_state_dict_are_refused(content, tmp_path):
    with pytest.raises(ValueError, match="holds no state dict"):
        load_pretrained(dense(), save(content, tmp_path))


def test_missing_files_and_other_networks_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights at .*nowhere.pt.*or null"):
        load_pretrained(dense(), tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match="got UNet"):
        load_pretrained(UNet(3, 1, 2, (4, 8), (2,)), tmp_path / "nowhere.pt")
