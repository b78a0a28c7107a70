"""What the configs leave to named functions: checkpoints to go on from, schedules, metrics, handlers of one process."""

import csv
import json

import ignite.distributed as idist
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor
from monai.losses import DiceLoss
from monai.transforms import RandAdjustContrastd, RandAffined

from sspformer.engines import (
    History,
    LoadCheckpoint,
    PredictionPanel,
    Progress,
    SaveBestModel,
    SaveCheckpoint,
    SeedEpoch,
    SegmentationPanel,
    check_settings,
    check_sides,
    of_this_process,
    warmup_cosine,
)
from sspformer.metrics import reconstruction_metrics, surface_metrics
from sspformer.transforms import NoiseSampler

ITEMS = [{"image": "a.nii", "name": "a"}, {"image": "b.nii"}]


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for item in ITEMS:
        (tmp_path / item["image"]).write_text(item["image"])


def network():
    torch.manual_seed(0)
    return torch.nn.Linear(2, 1)


def trainer(output_dir, epochs=2, resume=True, data=ITEMS, **settings):
    """A training of nothing that counts its epochs in the network's bias."""
    net = network()
    engine = Engine(lambda engine, batch: net.bias.data.add_(1))
    engine.state.max_epochs = None
    load = LoadCheckpoint(output_dir, {"network": net}, data, settings, resume)
    load.attach(engine)
    SaveCheckpoint(output_dir, {"network": net}).attach(engine)
    start = net.bias.item()
    engine.run([0], max_epochs=epochs)
    return round(net.bias.item() - start, 4)


def test_a_training_goes_on_where_it_was(tmp_path):
    assert trainer(tmp_path, epochs=2, seed=0) == 2
    assert (tmp_path / "models/checkpoint.pt").is_file()
    assert trainer(tmp_path, epochs=5, seed=0) == 5  # two epochs of before, three new ones
    assert trainer(tmp_path, epochs=2, seed=0, resume="false") == 2  # as a command line says it
    record = json.loads((tmp_path / "models/checkpoint.json").read_text())
    assert [name for name, _ in record.pop("training data")] == ["a", "b.nii"] and len(record.pop("hashes")) == 2
    assert record == {"validation data": [], "pretrained": [], "parameters": [[1, 2], [1]], "seed": 0}


def contrast(gamma):
    return {"contrast": RandAdjustContrastd("image", 0.5, (0.7, gamma))}


@pytest.mark.parametrize(
    "before, now, said",
    [
        ({"seed": 0}, {"seed": 1}, "seed: 0 then, 1 now"),
        ({}, {"data": ITEMS[:1]}, "training data: without b.nii"),
        ({}, {"data": [*ITEMS, {"image": "a.nii", "name": "c"}]}, "training data: with c"),
        ({}, {"data": ITEMS[::-1]}, "training data: in another order"),
        ({}, {"data": [ITEMS[0], {**ITEMS[1], "target": 3}]}, "training data: other contents of b.nii"),
        ({"loss": DiceLoss(batch=True)}, {"loss": DiceLoss(batch=False)}, "loss: "),
        ({"noise": NoiseSampler(sigma=(0, 0.1))}, {"noise": NoiseSampler(sigma=(0, 0.2))}, "noise: "),
        ({"transforms": contrast(1.5)}, {"transforms": contrast(2.0)}, "transforms: "),
        (
            {"transforms": [RandAffined("image", 0.5, rotate_range=0.1)]},
            {"transforms": [RandAffined("image", 0.5, rotate_range=0.2)]},
            "transforms: ",
        ),
    ],
)
def test_other_settings_are_refused_and_the_same_ones_are_not(before, now, said, tmp_path):
    trainer(tmp_path, **before)
    trainer(tmp_path, epochs=3, **before)
    with pytest.raises(ValueError, match=f"{said}.*--output_dir .*--resume false"):
        trainer(tmp_path, **now)


def test_null_is_the_same_in_every_spelling(tmp_path):
    trainer(tmp_path, pretrained=None)
    trainer(tmp_path, pretrained="null", epochs=3)


def test_the_rate_rises_and_falls():
    optimizer = torch.optim.SGD(network().parameters(), lr=2.0)
    schedule, rates = warmup_cosine(optimizer, total_steps=100, warmup_share=0.1), []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.05 * 2) and rates[10] == max(rates) == 2
    assert np.all(np.diff(rates[:11]) > 0) and np.all(np.diff(rates[10:]) < 0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-6)


def test_history_has_the_rate_of_the_first_group(tmp_path):
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1], "lr": 0.1}, {"params": parameters[1:], "lr": 0.3}])
    engine = Engine(lambda engine, batch: {"loss": torch.tensor(1.0)})
    History(str(tmp_path), optimizer=optimizer, attributes={"beta": lambda: 0.5}).attach(engine)
    engine.run([0], max_epochs=1)
    with (tmp_path / "history.csv").open() as file:
        assert next(csv.DictReader(file)) == {
            **{"epoch": "1", "iteration": "1", "train_loss": "1.0"},
            **{"learning_rate": "0.1", "beta": "0.5"},
        }


def test_the_first_process_writes_and_the_others_do_not(monkeypatch, tmp_path):
    handlers = [
        *(SeedEpoch(0), SaveCheckpoint(tmp_path, {}), SaveBestModel(network(), tmp_path / "model.pt")),
        *(SegmentationPanel(str(tmp_path)), PredictionPanel(str(tmp_path)), History(str(tmp_path)), Progress()),
    ]
    assert of_this_process(handlers) == handlers
    monkeypatch.setattr(idist, "get_rank", lambda: 1)
    assert of_this_process(handlers) == handlers[:1]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"class_names": ["a"]}, "class_names has 1 names, .* set --network_def#out_channels 2"),
        ({"crop_size": [64, 64]}, r"crop_size needs one number for each of 3 axes, got \[64, 64\]"),
        ({"roi_size": 64}, "roi_size needs one number for each of 3 axes, got 64"),
        ({"class_names": None}, None),
    ],
)
def test_entries_that_do_not_fit_each_other(change, said):
    net = torch.nn.Module()
    net.head = torch.nn.Conv3d(1, 3, 1)
    fitting = {"class_names": ["a", "b"], "crop_size": [64] * 3, "roi_size": [64] * 3, "spacing": [1.0] * 3}
    check_settings(net, **fitting)
    if said is None:
        check_settings(net, **{**fitting, **change})  # no label map
        return
    with pytest.raises(ValueError, match=said):
        check_settings(net, **{**fitting, **change})


def test_a_crop_needs_as_many_sides_as_there_are_dimensions():
    check_sides([64, 64], 2)
    with pytest.raises(ValueError, match="crop_size .* has 3 sides, but spatial_dims is 2; .*pretrain_2d.json"):
        check_sides([64, 64, 64], 2)


def test_scores_of_an_evaluator_have_their_names():
    def scores(metrics, output):
        engine = Engine(lambda engine, batch: output)
        engine.state.metric_details = {}
        for name, metric in metrics.items():
            metric.attach(engine, name)
        return engine.run([0]).metrics

    label = torch.zeros(1, 8, 8, 8)
    label[:, 2:6, 2:6, 2:6] = 1
    sample = {"pred": MetaTensor(label, affine=torch.eye(4)), "label": MetaTensor(label, affine=torch.eye(4))}
    assert scores(surface_metrics(2, 1.0), [sample]) == {"surface_dice": 1.0, "hd95": 0.0}

    patches = torch.rand(1, 4, 8, generator=torch.Generator().manual_seed(0))
    image = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    output = {f"{of}_{part}": patches for of in ("pred", "true") for part in ("masked", "high")}
    output |= {"mean_masked": patches + 0.1, "reconstruction": image, "clean": image}
    found = scores(reconstruction_metrics(3), output)
    assert list(found) == ["masked_error", "high_frequency_error", "mean_prediction_error", "psnr", "ssim"]
    assert found["masked_error"] == found["high_frequency_error"] == 0 and found["ssim"] == pytest.approx(1)
    assert found["mean_prediction_error"] == pytest.approx(0.01, rel=1e-4)
