"""The compiled step does what MONAI's does, and does it without a compiler, too."""

import logging

import pytest
import torch
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.losses import DiceCELoss
from torch import nn

from sspformer.engines import GradientClipping, TrainStep


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


def test_a_word_that_is_none_of_the_three():
    with pytest.raises(ValueError, match="compile must be true, false or auto"):
        TrainStep(nn.Linear(1, 1), nn.MSELoss(), compile="sometimes")
