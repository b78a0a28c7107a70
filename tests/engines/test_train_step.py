"""The compiled step does what MONAI's does, and does it without a compiler, too."""

import logging

import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import SupervisedTrainer
from monai.losses import DiceCELoss
from torch import nn

from sspformer.engines import GradientClipping, LoadCheckpoint, SaveCheckpoint, TrainStep
from sspformer.engines.checkpoints import save_network
from sspformer.networks import SSPFormerDense, SSPFormerEncoder, place


def train(update, steps=4, seed=0):
    """Weights and losses after a few steps on made-up label maps."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.GELU(), nn.Conv3d(4, 2, 1))
    loss_function = DiceCELoss(softmax=True, to_onehot_y=True)
    image = torch.rand(steps, 2, 1, 8, 8, 8)
    data = [{"image": x, "label": (x > 0.5).float()} for x in image]
    losses = []
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=1,
        train_data_loader=data,
        network=network,
        optimizer=torch.optim.AdamW(network.parameters(), lr=0.01),
        loss_function=loss_function,
        iteration_update=update and update(network, loss_function),
        train_handlers=[GradientClipping(network, 0.1)],
        decollate=False,
    )

    @trainer.on(Events.ITERATION_COMPLETED)
    def keep(engine):
        losses.append(float(engine.state.output["loss"]))

    trainer.run()
    return losses, torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize(
    "settings", [{"compile": False}, {"compile": "auto"}, {"compile": True, "backend": "aot_eager"}]
)
def test_a_step_is_that_of_monai(settings):
    losses, weights = train(lambda network, loss: TrainStep(network, loss, amp=False, **settings))
    wanted, wanted_weights = train(None)
    torch.testing.assert_close(losses, wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(weights, wanted_weights, atol=1e-6, rtol=0)


def test_where_compiling_fails_the_step_runs_as_it_is_and_says_why(caplog):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    with caplog.at_level(logging.WARNING, "sspformer"):
        losses, _ = train(lambda n, loss: TrainStep(n, loss, amp=False, compile=True, backend=broken))
    torch.testing.assert_close(losses, train(None)[0], atol=1e-6, rtol=0)
    assert "without torch.compile" in caplog.text and "no compiler here" in caplog.text
    assert caplog.text.count("without torch.compile") == 1


def test_under_bfloat16_the_loss_is_float32_and_near():
    losses, _ = train(lambda network, loss: TrainStep(network, loss, amp=True, compile=False))
    torch.testing.assert_close(losses, train(None)[0], atol=0.02, rtol=0)


def test_with_channels_last_a_network_is_the_same_and_its_training_goes_on(tmp_path):
    def made(channels_last):
        torch.manual_seed(0)
        network = SSPFormerDense(SSPFormerEncoder(patch_size=4, dim=48, depth=2, num_heads=2), 3, features=8)
        network = place(network, "cpu", channels_last)
        return network, torch.optim.AdamW(network.parameters(), lr=0.01, fused=True)

    def steps(network, optimizer, n):
        for _ in range(n):
            optimizer.zero_grad()
            network(image).square().mean().backward()
            optimizer.step()

    image = torch.rand(1, 1, 8, 8, 8)
    plain, other = made(None), made(True)
    assert other[0].head.weight.is_contiguous() and not other[0].fuse[0].conv.weight.is_contiguous()
    torch.testing.assert_close(other[0](image), plain[0](image))
    # a checkpoint of either goes on in the other
    for first, second in ((plain, made(True)), (other, made(None))):
        steps(*first, 2)
        engine = Engine(lambda engine, batch: None)
        save = SaveCheckpoint(tmp_path, dict(zip(("network", "optimizer"), first)))
        save(engine)
        (tmp_path / "models/checkpoint.json").write_text("{}")
        load = LoadCheckpoint.__new__(LoadCheckpoint)
        load.found, load.map_location = tmp_path / "models/checkpoint.pt", None
        load.load_dict = dict(zip(("network", "optimizer"), second))
        engine.state.max_epochs = 1
        load(engine)
        steps(*first, 2), steps(*second, 2)
        torch.testing.assert_close(second[0](image), first[0](image))
    save_network(other[0], tmp_path / "model.pt")
    assert all(value.is_contiguous() for value in torch.load(tmp_path / "model.pt").values())


def test_a_word_that_is_none_of_the_three():
    with pytest.raises(ValueError, match="compile must be true, false or auto"):
        TrainStep(nn.Linear(1, 1), nn.MSELoss(), compile="sometimes")
