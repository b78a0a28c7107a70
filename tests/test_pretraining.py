"""What ties the method into MONAI's engines: batches prepared on the device, reconstructions, handlers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.data import MetaTensor, list_data_collate

from sspformer.engines import (
    AutocastInferer,
    History,
    PrepareMaskedBatch,
    Reconstruct,
    SeedEpoch,
    find_checkpoint,
    save_atomically,
    weight_decay_groups,
)
from sspformer.losses import MaskedReconstructionLoss
from sspformer.networks import MaskedAutoencoder, SSPFormerEncoder, gather_tokens, patchify
from sspformer.options import flag
from sspformer.pictures import figure_to_array, reconstruction_panel
from sspformer.transforms import InverseFrequencyMask, MaskIndices, NoiseSampler, patch_energy


def toy():
    encoder = SSPFormerEncoder(patch_size=4, dim=48, depth=1, num_heads=2)
    return MaskedAutoencoder(encoder, decoder_dim=48, decoder_depth=1, decoder_num_heads=2)


def batch(sides=(16, 16, 16), spacing=(1.0, 1.0, 5.0)):
    image = torch.rand(2, 1, *sides, generator=torch.Generator().manual_seed(0))
    affine = torch.diag(torch.tensor([*spacing, 1.0]))
    return list_data_collate([{"image": MetaTensor(i, affine=affine)} for i in image])


def prepare(**kwargs):
    return PrepareMaskedBatch(InverseFrequencyMask(4), NoiseSampler(), **kwargs)


def test_a_batch_has_the_noisy_image_the_clean_target_and_the_indices():
    data = batch()
    noisy, target, args, kwargs = prepare()(data, "cpu")
    assert args == () and not isinstance(noisy, MetaTensor) and not isinstance(target["image"], MetaTensor)
    assert torch.equal(target["image"], data["image"].as_tensor()) and not torch.equal(noisy, target["image"])
    assert torch.equal(kwargs["ids_keep"], target["keep"]) and torch.equal(kwargs["ids_predict"], target["mask"])


def test_null_on_the_command_line_switches_the_noise_off():
    config = ConfigParser()
    config.read_config(Path(__file__).resolve().parents[1] / "bundle/configs/pretrain.json")
    config["noise"] = "null"  # MONAI drops options that are None, which the word None becomes
    noisy, target, _, _ = config.get_parsed_content("train#prepare_batch")(batch((24, 24, 24)), "cpu")
    assert torch.equal(noisy, target["image"])


def test_masks_are_scored_on_the_clean_image_with_the_spacing_of_the_affine():
    data, seen = batch(), []

    def last(image, spacing, generator):
        """A strategy of its own: all but the first quarter of the patches."""
        seen.append((image, spacing, generator))
        order = torch.arange(64).expand(2, 64)
        return MaskIndices(order[:, :16], order[:, 16:])

    _, target, _, kwargs = PrepareMaskedBatch(last, NoiseSampler())(data, "cpu")
    ((image, spacing, generator),) = seen
    assert torch.equal(image, data["image"].as_tensor()) and generator.device.type == "cpu"
    assert torch.equal(target["spacing"], torch.tensor([[1.0, 1.0, 5.0]] * 2)) and torch.equal(
        target["spacing"], spacing
    )
    assert torch.equal(kwargs["ids_predict"], torch.arange(16, 64).expand(2, 48))


def test_the_same_seed_prepares_the_same_batch():
    def draw(seed):
        noisy, target, _, _ = prepare().set_random_state(seed)(batch(), "cpu")
        return torch.cat([noisy.flatten(), target["mask"].flatten()])

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    same = prepare().set_random_state(1)
    assert not torch.equal(same(batch(), "cpu")[0], same(batch(), "cpu")[0])  # and goes on drawing


def test_reconstruction_keeps_visible_patches_and_puts_predictions_in_their_places():
    _, target, _, kwargs = prepare()(batch((17, 16, 18)), "cpu")
    network = toy()
    pred = torch.full((2, kwargs["ids_predict"].shape[1], 64), 7.0)
    out = Reconstruct(network)({"label": target, "pred": pred})
    assert out["reconstruction"].shape == target["image"].shape
    hidden = out["voxel_mask"]
    assert (out["reconstruction"][hidden] == 7).all()
    assert torch.equal(out["reconstruction"][~hidden], target["image"][~hidden])
    energy, _ = patch_energy(target["image"], (4, 4, 4), (1.0, 1.0, 5.0))
    energy = energy.gather(1, target["mask"])
    highest = energy.topk(out["true_high"].shape[1], dim=1).indices
    assert highest.shape[1] == energy.shape[1] // 4
    torch.testing.assert_close(out["true_high"], gather_tokens(out["true_masked"], highest))


def test_a_perfect_prediction_reconstructs_the_image_also_with_normalised_targets():
    _, target, _, _ = prepare()(batch(), "cpu")
    network = toy()
    true = gather_tokens(patchify(target["image"], (4, 4, 4)), target["mask"])
    for word in (False, "false"):  # as a command line gives it
        plain = Reconstruct(network, normalize_target=word)({"label": target, "pred": true})
        torch.testing.assert_close(plain["reconstruction"], target["image"])
    mean, std = true.mean(-1, keepdim=True), (true.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    normalised = Reconstruct(network, normalize_target=True)({"label": target, "pred": (true - mean) / std})
    torch.testing.assert_close(normalised["reconstruction"], target["image"])


def test_panel_shows_a_row_a_sample():
    _, target, _, _ = prepare()(batch(), "cpu")
    network = toy()
    out = Reconstruct(network)({"label": target, "pred": torch.zeros(2, target["mask"].shape[1], 64)})
    one = figure_to_array(reconstruction_panel(out, n_images=1))
    two = figure_to_array(reconstruction_panel(out, n_images=2, titles=["a", "b"]))
    masked = figure_to_array(reconstruction_panel(out, n_images=1, mask=InverseFrequencyMask(4)))
    assert masked.shape[1] > one.shape[1]  # one more column
    assert two.shape[0] > 1.7 * one.shape[0] and two.shape[1] == one.shape[1] and two.std() > 10


def test_a_network_overfits_one_batch_of_detail():
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 16)
    image = (torch.sin(20 * ramp)[:, None, None] * ramp[None, :, None] * torch.cos(9 * ramp)[None, None]).abs()
    image = image.expand(2, 1, 16, 16, 16)
    ids = InverseFrequencyMask(4)(image, generator=torch.Generator().manual_seed(0))
    network, loss = toy(), MaskedReconstructionLoss(4)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    errors = []
    for _ in range(150):
        error = loss(network(image, ids.keep, ids.mask), {"image": image, "mask": ids.mask, "keep": ids.keep})
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.2 * errors[0]


def test_autocast_inferer_runs_in_bfloat16_only_when_asked():
    layer, within = torch.nn.Linear(4, 4), []
    layer.register_forward_hook(lambda module, args, output: within.append(output.dtype))
    for enabled in (True, False, flag("false")):
        assert AutocastInferer(enabled)(torch.rand(1, 4), layer).dtype == torch.float32  # for losses and metrics
    assert within == [torch.bfloat16, torch.float32, torch.float32]


def test_only_matrices_decay():
    network = toy()
    decays, others = weight_decay_groups(network, 0.05)
    assert decays["weight_decay"] == 0.05 and others["weight_decay"] == 0
    assert {p.ndim for p in decays["params"]} == {2}
    assert len(decays["params"]) + len(others["params"]) == len(list(network.parameters()))
    assert any(p is network.mask_token for p in others["params"])


def test_an_epoch_draws_the_same_whatever_was_before_it():
    def draws(first_epoch):
        out = {}
        engine = Engine(lambda engine, _: out.setdefault(engine.state.epoch, (torch.rand(1).item(), np.random.rand())))
        SeedEpoch(3).attach(engine)
        engine.state.epoch = first_epoch
        engine.load_state_dict({"epoch_length": 1, "max_epochs": 4, "iteration": first_epoch})
        engine.run([0])
        return out

    whole, resumed = draws(0), draws(2)
    assert len({value for value in whole.values()}) == 4
    assert resumed == {epoch: whole[epoch] for epoch in (3, 4)}


def test_history_drops_the_epochs_that_a_resumed_run_repeats(tmp_path):
    def run(start, stop):
        engine = Engine(lambda engine, _: {"loss": torch.tensor(float(engine.state.epoch))})
        History(str(tmp_path)).attach(engine)
        engine.load_state_dict({"epoch_length": 2, "max_epochs": stop, "iteration": 2 * start})
        engine.run([0, 0])
        return (tmp_path / "history.csv").read_text()

    whole = run(0, 4)
    assert run(2, 4) == whole and whole.count("\n") == 5
    assert (tmp_path / "pictures" / "curves.png").is_file()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    engine = Engine(lambda engine, _: {"loss": torch.tensor(float("nan"))})
    History(str(tmp_path)).attach(engine)
    with pytest.raises(FloatingPointError, match="learning rate"):
        engine.run([0], max_epochs=1)


def test_a_kill_while_saving_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "models" / "checkpoint.pt"
    save_atomically({"a": torch.ones(1)}, path)

    def die(content, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        save_atomically({"a": torch.zeros(1)}, path)
    assert torch.load(path, weights_only=True)["a"] == 1


def test_a_checkpoint_is_found_only_for_the_run_it_belongs_to(tmp_path):
    path = str(tmp_path / "models" / "checkpoint.pt")
    assert find_checkpoint(path, True, {"seed": 0}) is None
    save_atomically({}, path)
    assert find_checkpoint(path, True, {"seed": 0}) == path
    with pytest.raises(ValueError, match="seed: 0 then, 1 now.*--resume false"):
        find_checkpoint(path, True, {"seed": 1})
    assert find_checkpoint(path, False, {"seed": 1}) is None
    assert find_checkpoint(path, True, {"seed": 1}) is None  # the old one is out of the way, but not lost
    assert (tmp_path / "models" / "checkpoint_previous.pt").is_file()


def test_events_of_the_engine_are_those_that_the_handlers_expect():
    """The order in ignite that resuming relies on: EPOCH_STARTED comes before the loader's iterator is made."""
    order = []

    class Loader:
        def __iter__(self):
            order.append("iterator")
            return iter([0])

    engine = Engine(lambda *_: None)
    engine.add_event_handler(Events.EPOCH_STARTED, lambda: order.append("started"))
    engine.run(Loader(), max_epochs=2, epoch_length=1)
    assert order == ["started", "iterator"] * 2
