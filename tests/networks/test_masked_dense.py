"""Pretraining of the whole segmentation network: from visible patches alone, and into the networks of the tasks."""

import pytest
import torch

from sspformer.networks import MaskedDense, SSPFormerDense, SSPFormerEncoder, SSPFormerRestorer, load_pretrained
from sspformer.transforms import MaskIndices, voxel_mask

TOY = {"dim": 32, "depth": 3, "num_heads": 2, "patch_size": 4}


@pytest.mark.parametrize("shape", [(16, 16, 12), (20, 14)])
def test_it_predicts_from_visible_patches_alone_and_all_of_it_learns(shape):
    torch.manual_seed(0)
    network = MaskedDense(SSPFormerEncoder(len(shape), **TOY)).eval()
    image, grid = torch.rand(2, 1, *shape), network.encoder.encoder.grid(shape)
    n = torch.tensor(grid).prod().item()
    order = torch.stack([torch.randperm(n) for _ in range(2)])
    keep, hidden = order[:, : n // 4].sort(dim=1).values, order[:, n // 4 :].sort(dim=1).values
    pred = network(image, keep, hidden)
    assert pred.shape == (2, n - n // 4, 4 ** len(shape))
    mask = voxel_mask(MaskIndices(keep, hidden), shape, (4,) * len(shape))
    changed = torch.where(mask, torch.rand_like(image), image)
    torch.testing.assert_close(network(changed, keep, hidden), pred)
    torch.testing.assert_close(network(image, keep, hidden[:, 1:3]), pred[:, 1:3])
    pred.sum().backward()
    still = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert not still - {f"encoder.encoder.blocks.{n}.attention.kv.bias" for n in range(3)}


def test_a_network_that_sees_the_mask_overfits_a_batch():
    torch.manual_seed(0)
    network = MaskedDense(SSPFormerEncoder(**TOY))
    image = torch.rand(1, 1, 2, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3).repeat_interleave(4, 4)
    keep, hidden = torch.arange(2)[None], torch.arange(2, 8)[None]
    wanted = image.unfold(2, 4, 4).unfold(3, 4, 4).unfold(4, 4, 4).reshape(1, 8, 64)[:, 2:]
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (network(image, keep, hidden) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 * wanted.var()


@pytest.mark.parametrize("file", ["encoder.pt", "checkpoint.pt"])
def test_segmentation_takes_all_but_its_head_and_restoration_what_it_has(tmp_path, file):
    torch.manual_seed(0)
    network = MaskedDense(SSPFormerEncoder(in_channels=2, **TOY))  # its head has two channels, as of two classes
    torch.save(network.encoder.state_dict(), tmp_path / "encoder.pt")
    torch.save({"network": network.state_dict()}, tmp_path / "checkpoint.pt")
    tuned = SSPFormerDense(SSPFormerEncoder(in_channels=2, **TOY), out_channels=2)
    head = tuned.head.weight.clone()
    load_pretrained(tuned, tmp_path / file)
    assert torch.equal(tuned.head.weight, head) and tuned.head_factor == SSPFormerDense.head_factor
    wanted = network.encoder.state_dict()
    assert all(torch.equal(wanted[name], value) for name, value in tuned.state_dict().items() if name[:4] != "head")
    restorer = load_pretrained(SSPFormerRestorer(SSPFormerEncoder(in_channels=2, **TOY)), tmp_path / file)
    assert torch.equal(restorer.encoder.norm.weight, network.encoder.encoder.norm.weight)
    assert torch.equal(restorer.encoder.patch_embedding.weight, network.encoder.encoder.patch_embedding.weight)
