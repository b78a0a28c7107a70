"""Another encoder in place of ours: MONAI's ViT pretrains, and its weights are fine-tuned, through one adapter."""

from __future__ import annotations

import logging

import pytest
import torch
from ignite.engine import Engine
from monai.losses import DiceCELoss
from monai.networks.nets import ViT
from torch import nn

from sspformer.engines import FreezeEncoder, SaveEncoder, layer_decay_groups
from sspformer.losses import MaskedReconstructionLoss
from sspformer.networks import (
    MaskedAutoencoder,
    SSPFormerDense,
    SSPFormerEncoder,
    SSPFormerRestorer,
    gather_tokens,
    load_pretrained,
    pad_to_patches,
    token_grid,
)
from sspformer.transforms import InverseFrequencyMask

pytest.importorskip("einops", reason="MONAI's ViT needs it")

SIDES = (16, 16, 16)
CENTRE = [torch.linspace(-1, 1, side) for side in SIDES]


class MonaiViT(nn.Module):
    """The protocol ``sspformer.networks.Encoder`` on MONAI's ``ViT``, which takes images of one size."""

    def __init__(self, sides=SIDES, patch_size=4, dim=48, depth=2) -> None:
        super().__init__()
        self.spatial_dims, self.in_channels, self.dim = len(sides), 1, dim
        self.patch_size = (patch_size,) * len(sides)
        vit = ViT(1, sides, self.patch_size, hidden_size=dim, mlp_dim=2 * dim, num_layers=depth, num_heads=2)
        self.patches, self.blocks, self.norm = vit.patch_embedding, vit.blocks, vit.norm

    def grid(self, image_size):
        return token_grid(image_size, self.patch_size)

    def embed(self, image):
        return self.patches(pad_to_patches(image, self.patch_size))

    def forward(self, image, ids_keep=None):
        tokens = self.embed(image)
        tokens = tokens if ids_keep is None else gather_tokens(tokens, ids_keep)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def hidden_tokens(self, image, depths):
        tokens, hidden = self.embed(image), []
        for block in self.blocks:
            hidden.append(tokens := block(tokens))
        hidden[-1] = self.norm(tokens)
        return [hidden[depth - 1] for depth in depths]


def images(n=2):
    """Striped balls of several sizes in air, and where they are."""
    x, y, z = torch.meshgrid(*CENTRE, indexing="ij")
    balls = torch.stack([x**2 + y**2 + z**2 < size for size in torch.linspace(0.4, 0.8, n)])[:, None]
    return balls * (0.6 + 0.4 * torch.sin(12 * x)), balls.long()


def losses_of(network, loss, n_steps=40, learning_rate=3e-3):
    """The loss, ``loss(network)``, of each step of a short training."""
    optimizer = torch.optim.AdamW(layer_decay_groups(network, learning_rate, layer_decay=0.75))
    losses = []
    for _ in range(n_steps):
        optimizer.zero_grad()
        error = loss(network)
        error.backward()
        optimizer.step()
        losses.append(error.item())
    return losses


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """``(file of the encoder, masked autoencoder)`` after a short pretraining, whose loss fell."""
    torch.manual_seed(0)
    network = MaskedAutoencoder(MonaiViT(), decoder_dim=48, decoder_depth=1, decoder_num_heads=2)
    image, _ = images()
    ids = InverseFrequencyMask(4)(image, generator=torch.Generator().manual_seed(0))
    loss = MaskedReconstructionLoss(4)
    target = {"image": image, "mask": ids.mask}
    losses = losses_of(network, lambda network: loss(network(image, ids.keep, ids.mask), target))
    assert losses[-1] < 0.5 * losses[0]

    path = tmp_path_factory.mktemp("models") / "encoder.pt"
    engine = Engine(lambda *_: None)
    SaveEncoder(network, str(path)).attach(engine)
    engine.run([0])
    return path, network


@pytest.mark.parametrize("whole", [False, True])
def test_the_pretrained_encoder_is_loaded_and_fine_tuned(whole, pretrained, tmp_path, caplog):
    path, autoencoder = pretrained
    if whole:  # the file of the autoencoder, its decoder included
        path = tmp_path / "model.pt"
        torch.save(autoencoder.state_dict(), path)
    torch.manual_seed(1)
    with caplog.at_level(logging.INFO, "sspformer"):
        network = load_pretrained(SSPFormerDense(MonaiViT(), features=8), path)
    assert f"all {len(autoencoder.encoder.state_dict())} tensors of the encoder" in caplog.text
    image, label = images()
    torch.testing.assert_close(network.encoder(image), autoencoder.encoder(image))

    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    losses = losses_of(network, lambda network: loss(network(image), label), n_steps=30)
    assert losses[-1] < 0.6 * losses[0]


def test_a_restorer_takes_it_too():
    network = SSPFormerRestorer(MonaiViT(), features=8, blocks=1)
    image, _ = images()
    assert torch.equal(network(image), image)
    torch.nn.init.normal_(network.head.weight)
    network(image).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.encoder.patches.parameters())


def test_learning_rates_fall_by_its_blocks_and_it_can_be_frozen():
    network = SSPFormerDense(MonaiViT(), features=8)
    rates = {id(p): group["lr"] for group in layer_decay_groups(network, 1.0, 0.5) for p in group["params"]}
    assert len(rates) == len(list(network.parameters()))
    encoder = network.encoder
    for part, rate in ((network.head, 10), (encoder.norm, 0.5), (encoder.blocks[1], 0.5), (encoder.blocks[0], 0.25)):
        assert {rates[id(parameter)] for parameter in part.parameters()} == {rate}
    assert {rates[id(parameter)] for parameter in encoder.patches.parameters()} == {0.125}

    engine, trainable = Engine(lambda *_: None), []
    FreezeEncoder(network, epochs=1).attach(engine)
    engine.add_event_handler("EPOCH_COMPLETED", lambda: trainable.append(encoder.norm.weight.requires_grad))
    engine.run([0], max_epochs=2)
    assert trainable == [False, True]


def test_weights_of_another_encoder_are_refused(pretrained, tmp_path):
    path, _ = pretrained
    with pytest.raises(ValueError, match="holds no SSPFormer encoder"):
        load_pretrained(SSPFormerDense(SSPFormerEncoder(patch_size=4)), path)
    with pytest.raises(ValueError, match="covers 31 of the encoder's 44 tensors: encoder.blocks.2"):
        load_pretrained(MonaiViT(depth=3), path)
    with pytest.raises(ValueError, match="patches.position_embeddings is missing or of another shape"):
        load_pretrained(MonaiViT(sides=(24, 16, 16)), path)
    torch.save(SSPFormerEncoder(dim=48, depth=2, num_heads=2).state_dict(), tmp_path / "ours.pt")
    with pytest.raises(ValueError, match="covers 10 of the encoder's 31 tensors: encoder.patches"):
        load_pretrained(MonaiViT(), tmp_path / "ours.pt")
