"""Fine-tuning as users run it: ``python -m monai.bundle run training`` on labelled phantoms, killed and resumed, in two
processes, from weights that fit and weights that do not, and with the overlays of restoration."""

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.transforms import Compose

from sspformer.data import DatasetOptions, class_weights, prepare_pairs
from sspformer.engines import FreezeEncoder, SaveBestModel, layer_decay_groups
from sspformer.networks import SSPFormerDense, SSPFormerEncoder
from sspformer.options import is_null

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(BUNDLE.parent / "custom"),
    "PYTHONUNBUFFERED": "1",
    "CUDA_VISIBLE_DEVICES": "",  # two processes cannot share a GPU
    "OMP_NUM_THREADS": "1",  # as torchrun sets it; sums in another order would not be bit-equal
}
ENCODER = {"patch_size": 8, "dim": 48, "depth": 2, "num_heads": 2}
SETTINGS = {
    "bundle_root": BUNDLE,
    "device": "cpu",
    "amp": False,
    "num_workers": 0,
    "epochs": 2,
    "val_fraction": 0.34,
    "val_interval": 2,
    "batch_size": 2,
    "crops_per_scan": 2,
    "crop_size": [24, 24, 24],
    **{f"encoder#{name}": value for name, value in ENCODER.items()},
    "network_def#features": 8,
}
SEGMENTATION = {"class_names": ["ball", "box"], "spacing": [1.0, 1.0, 1.0], "network_def#out_channels": 3}
LONG = {"epochs": 12, "crops_per_scan": 4, "val_interval": 4, "learning_rate": 0.005}


def phantom(seed, shape=(32, 30, 28)):
    """A head with a bright ball (1) and a dim box (2), and noise."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(side) for side in shape), indexing="ij"), axis=-1)
    centre = np.array(shape) / 2 + rng.uniform(-1, 1, 3)
    head = (((grid - centre) / (np.array(shape) * 0.45)) ** 2).sum(-1) < 1
    label = np.zeros(shape, np.uint8)
    label[(np.abs(grid - centre + [6, 0, 0]) <= [2.5, 4.5, 4.5]).all(-1)] = 2
    label[((grid - centre - [5, 0, 0]) ** 2).sum(-1) < rng.uniform(20, 30)] = 1
    image = np.choose(label, [head * 500.0, 1000.0, 200.0]) + rng.normal(0, 20, shape)
    return image.clip(0).astype(np.int16), label


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Six subjects, ``images/`` and ``labels/``: four to train on, two for validation."""
    folder = tmp_path_factory.mktemp("phantoms")
    for i in range(6):
        for name, array in zip(("images", "labels"), phantom(i)):
            (folder / name).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.diag([1.0, 1, 1, 1])), folder / name / f"p{i}.nii.gz")
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """An encoder as pretraining leaves it, without the pretraining."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("pretrained") / "encoder.pt"
    torch.save(SSPFormerEncoder(3, 1, **ENCODER).state_dict(), path)
    return path


def configs(*overlays):
    return [str(BUNDLE / "configs" / name) for name in ("train.json", *overlays)]


def command(pairs, output, *overlays, launcher=(sys.executable,), **overrides):
    arguments = {**SETTINGS, **SEGMENTATION, "dataset_dir": pairs, "output_dir": output, **overrides}
    line = [*launcher, "-m", "monai.bundle", "run", "training", "--config_file", str(configs(*overlays))]
    for key, value in arguments.items():
        line += [f"--{key}", str(value) if isinstance(value, (str, Path)) else json.dumps(value)]
    return line


def run(pairs, output, *overlays, **overrides):
    return subprocess.run(
        command(pairs, output, *overlays, **overrides),
        cwd=output.parent,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=400,
    )


def stopped(n_epochs, stop, pairs, output, *overlays, **overrides):
    """Run it, send it the signal ``stop`` once ``history.csv`` has so many epochs, and return what it said."""
    line, log = command(pairs, output, *overlays, **overrides), output.with_suffix(".log")
    with log.open("w") as file:
        process = subprocess.Popen(line, cwd=output.parent, env=ENVIRONMENT, stdout=file, stderr=file)
        deadline = time.time() + 300
        while not ((output / "history.csv").is_file() and len(history(output)) >= n_epochs):
            assert process.poll() is None and time.time() < deadline, log.read_text()
            time.sleep(0.02)
        process.send_signal(stop)
        process.wait()
    assert len(history(output)) < overrides["epochs"], "it was stopped too late to test anything"
    return log.read_text()


def train(output, dataset, *overlays, at_epoch_end=None, **overrides):
    """The same workflow in this process, for a look inside; returns its parser."""
    workflow = ConfigWorkflow(
        config_file=configs(*overlays),
        run_id="training",
        logging_file=False,  # pytest's own goes on
        **{**SETTINGS, "bundle_root": str(BUNDLE), "dataset_dir": str(dataset), "output_dir": str(output), **overrides},
    )
    workflow.initialize()
    if at_epoch_end is not None:
        trainer = workflow.parser.get_parsed_content("train#trainer")
        network = workflow.parser.get_parsed_content("network")
        trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: at_epoch_end(trainer.state.epoch, network))
    workflow.run()
    workflow.finalize()
    return workflow.parser


def history(output):
    with (output / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(output, name):
    return [float(row[name]) for row in history(output) if row.get(name)]


def weights(output, name="model.pt"):
    return torch.load(output / "models" / name, weights_only=True)


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- the workflow


@pytest.fixture(scope="session")
def trained(pairs, encoder, tmp_path_factory):
    """A run long enough to learn, started from a folder that is not the bundle's."""
    output = tmp_path_factory.mktemp("trained") / "out"
    done = run(pairs, output, pretrained=encoder, **LONG)
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done.stdout + done.stderr


def test_it_learns_the_structures(trained):
    output, _ = trained
    assert len(history(output)) == LONG["epochs"]
    dice, loss = column(output, "dice"), column(output, "train_loss")
    assert len(dice) == LONG["epochs"] // LONG["val_interval"] and max(dice) > 0.75 and loss[-1] < 0.6 * loss[0]
    rate = column(output, "learning_rate")
    assert rate[0] == max(rate) and rate[-1] < 1e-3 * max(rate)


def test_what_a_run_leaves_behind(trained):
    output, log = trained
    SSPFormerDense(SSPFormerEncoder(**ENCODER), 3, features=8).load_state_dict(weights(output))  # strict
    for name in ("pictures/epoch_0012.png", "pictures/curves.png", "models/checkpoint.pt", "scans.csv"):
        assert (output / name).stat().st_size > 100, name
    assert list((output / "tensorboard").glob("events.*")) and not list((output / "models").glob("*.part"))
    assert "tensors of the encoder, from" in log and "encoder.pt" in log
    assert "Corrupt cache" not in log  # each scan is preprocessed once


def test_killed_and_resumed_equals_unkilled(trained, pairs, encoder, tmp_path):
    stopped(3, signal.SIGKILL, pairs, tmp_path / "out", pretrained=encoder, **LONG)
    done = run(pairs, tmp_path / "out", pretrained=encoder, **LONG)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on from" in done.stdout
    assert history(tmp_path / "out") == history(trained[0])
    assert equal(weights(tmp_path / "out"), weights(trained[0]))


@pytest.mark.parametrize(
    "name, overrides, said",
    [
        ("encodr.pt", {}, ["encodr.pt", "give an encoder.pt", "null to train from scratch"]),
        ("encoder.pt", {"encoder#dim": 96}, ["encoder.pt", "48", "96"]),
    ],
)
def test_weights_that_do_not_fit_stop_it_and_the_first_cause_names_the_fix(
    name, overrides, said, pairs, encoder, tmp_path
):
    with pytest.raises(RuntimeError) as caught:
        train(tmp_path, pairs, pretrained=str(encoder.with_name(name)), **{**SEGMENTATION, **overrides})
    cause = caught.value
    while cause.__cause__ is not None:
        cause = cause.__cause__
    assert all(words in str(cause) for words in said), cause
    assert not (tmp_path / "models/model.pt").exists()


@pytest.mark.parametrize("null", [None, "null"])
def test_from_scratch_only_the_head_learns_faster_and_no_validation_keeps_the_last_weights(
    null, pairs, tmp_path, caplog
):
    with caplog.at_level(logging.INFO):
        parser = train(tmp_path / "out", pairs, pretrained=null, epochs=1, val_fraction=0, **SEGMENTATION)
    assert "training starts from scratch" in caplog.text
    slow, fast = sorted({group["initial_lr"] for group in parser.get_parsed_content("optimizer").param_groups})
    assert fast == pytest.approx(10 * slow)
    assert equal(weights(tmp_path / "out"), parser.get_parsed_content("network").state_dict())


def test_the_encoder_stays_bit_equal_while_it_is_frozen(pairs, encoder, tmp_path):
    pretrained, snapshots = torch.load(encoder, weights_only=True), {}

    def snapshot(epoch, network):
        snapshots[epoch] = {name: value.clone() for name, value in network.state_dict().items()}

    train(tmp_path, pairs, at_epoch_end=snapshot, pretrained=str(encoder), freeze_epochs=1, **SEGMENTATION)
    parts = {epoch: {n[8:]: v for n, v in s.items() if n[:8] == "encoder."} for epoch, s in snapshots.items()}
    assert equal(parts[1], pretrained)
    trainable = [name for name in pretrained if name != "layout"]
    assert not any(torch.equal(parts[2][name], pretrained[name]) for name in trainable)
    assert not torch.equal(snapshots[1]["head.weight"], snapshots[2]["head.weight"])


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_train_one_network_and_one_process_goes_on(pairs, encoder, tmp_path, caplog):
    output, settings = tmp_path / "out", {"pretrained": str(encoder), "epochs": 4, "val_interval": 1}
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    log = stopped(2, signal.SIGTERM, pairs, output, "multi_gpu_train.json", launcher=launcher, **settings)
    assert log.count("epoch 1/4: ") == 1, log  # one process reports
    row = history(output)[0]
    assert row["iteration"] == "2" and float(row["dice"]) >= 0  # 4 subjects, 2 crops each, in 2 batches of 2 on 2
    network = SSPFormerDense(SSPFormerEncoder(**ENCODER), 3, features=8)
    network.load_state_dict(weights(output))  # without the wrapper's "module."
    network.load_state_dict(weights(output, "checkpoint.pt")["network"])

    with pytest.raises(Exception) as caught:
        train(output, pairs, **settings, **SEGMENTATION)
    assert "batch_size: 4 then, 2 now" in str(caught.getrepr())  # another global batch is another run
    with caplog.at_level(logging.INFO):
        train(output, pairs, **{**settings, **SEGMENTATION, "batch_size": 4})
    assert "going on from" in caplog.text and [row["epoch"] for row in history(output)] == ["1", "2", "3", "4"]


# --- its parts


def test_classes_weigh_by_the_root_of_their_frequency(tmp_path):
    counts = np.array([700, 200, 100])
    label = np.repeat(np.arange(3), counts).astype(np.uint8).reshape(10, 10, 10)
    nib.save(nib.Nifti1Image(label, np.eye(4)), tmp_path / "label.nii.gz")
    items = [{"label": str(tmp_path / "label.nii.gz")}] * 3
    found = class_weights(items, 3).double().numpy()
    np.testing.assert_allclose(found / found[0], (counts / counts[0]) ** -0.5, rtol=1e-6)
    np.testing.assert_allclose(found @ counts / counts.sum(), 1, rtol=1e-6)
    np.testing.assert_allclose(class_weights(items, 3, power=0), 1, rtol=1e-6)
    np.testing.assert_allclose(class_weights(items, 3, power=1).numpy() * counts * 3, counts.sum(), rtol=1e-6)


def test_a_class_that_is_not_seen_weighs_as_the_rarest_that_is(tmp_path):
    labels = {"seen": [0] * 900 + [2] * 100, "left out": [0] * 900 + [1] * 99 + [3]}
    for name, label in labels.items():
        nib.save(nib.Nifti1Image(np.reshape(label, (10, 10, 10)).astype(np.uint8), np.eye(4)), tmp_path / f"{name}.nii")
    items = [{"label": str(tmp_path / f"{name}.nii")} for name in labels]
    weights = class_weights(items, 4, max_items=1)
    assert weights[1] == weights[2] == weights[3] == weights.max()
    np.testing.assert_allclose(weights[[0, 2]] @ torch.tensor([0.9, 0.1]), 1, rtol=1e-6)
    assert len(set(class_weights(items, 4).tolist())) == 4


def test_class_numbers_are_rounded_wherever_labels_are_read(tmp_path):
    """nibabel scales float labels into the integers of an image's header, and they come back beside their numbers."""
    numbers = np.arange(1000).reshape(10, 10, 10) % 10
    image = nib.Nifti1Image((100 * numbers).astype(np.int16), np.eye(4))
    label = nib.Nifti1Image(numbers.astype(np.float64), image.affine, image.header)
    for name, volume in (("images", image), ("labels", label)):
        (tmp_path / name).mkdir()
        nib.save(volume, tmp_path / name / "p1.nii.gz")
    stored = np.asarray(nib.load(tmp_path / "labels/p1.nii.gz").dataobj)
    assert (stored.astype(np.uint8) != numbers).any()

    def read(config, *overlays, entries):
        parser = ConfigParser()
        parser.read_config([str(BUNDLE / "configs" / name) for name in (config, *overlays)])
        parser.config |= {"spacing": [1.0, 1.0, 1.0], "bundle_root": str(BUNDLE)}
        return Compose([parser.get_parsed_content(entry) for entry in entries])(item)["label"][0].numpy()

    (item,) = prepare_pairs(DatasetOptions(tmp_path, classes=10, val_fraction=0))["training"]
    steps = [*(f"preprocessing#{i}" for i in range(4)), "storage#0"]
    training = read("train.json", entries=steps)
    evaluation = read("train.json", "evaluate.json", entries=["label_loading#0", "label_loading#1"])
    for label in (training, evaluation):
        assert label.dtype == np.uint8 and np.array_equal(label, numbers)
    torch.testing.assert_close(class_weights([item], 10), torch.ones(10))


def test_learning_rates_fall_towards_the_first_layer():
    network = SSPFormerDense(SSPFormerEncoder(**ENCODER), features=4)
    groups = layer_decay_groups(network, 1.0, 0.5, 0.1)
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(settings) == len(list(network.parameters()))
    found = {name: settings[id(p)] for name, p in network.named_parameters()}
    assert found["head.weight"] == (10, 0.1) and found["head.bias"] == (10, 0)
    assert found["encoder.norm.weight"] == (0.5, 0) and found["encoder.blocks.1.attention.q.weight"] == (0.5, 0.1)
    assert found["encoder.blocks.0.attention.q.weight"] == (0.25, 0.1)
    assert found["encoder.patch_embedding.weight"] == (0.125, 0.1)
    with pytest.raises(ValueError, match=r"layer_decay must be in \(0, 1\], got 0"):
        layer_decay_groups(network, 1.0, 0)


@pytest.mark.parametrize("value, expected", [(None, True), ("null", True), ("None", True), ("encoder.pt", False)])
def test_what_a_command_line_says_for_none(value, expected):
    assert is_null(value) is expected


def validation(values, handler, key="dice"):
    """An evaluator that finds these values, one a run, of a network whose weight is the number of the run."""
    evaluator = Engine(lambda engine, batch: None)
    evaluator.state.key_metric_name, evaluator.state.metrics = key, {}
    evaluator.metric_cmp_fn = lambda current, best: current > best
    handler.attach(evaluator)
    for i, value in enumerate(values):
        handler.network.weight.data.fill_(i)
        evaluator.state.metrics[key] = value
        evaluator.run([0])


def test_the_best_model_is_kept_not_the_last_also_over_a_resume(tmp_path):
    def handler():
        return SaveBestModel(torch.nn.Linear(1, 1), tmp_path / "model.pt")

    def saved():
        return torch.load(tmp_path / "model.pt", weights_only=True)["weight"].item()

    first = handler()
    validation([0.2, 0.8, 0.5], first)
    assert saved() == 1 and first.state_dict() == {"best": 0.8}
    resumed = handler()
    resumed.load_state_dict(first.state_dict())
    validation([0.7, 0.6], resumed)
    assert saved() == 1
    validation([0.7, 0.6, 0.9], resumed)
    assert saved() == 2 and resumed.best == 0.9


@pytest.mark.parametrize(
    "values, kept, best",
    [
        ([float("nan"), 0.2, 0.1], 1, 0.2),  # no validation scan had the structure at first
        ([float("nan"), float("nan")], 1, None),
        ([0.2, float("nan")], 0, 0.2),
        ([0.0, 0.0, 0.0], 2, 0.0),  # the last of equals
    ],
)
def test_a_score_that_is_none_or_stays_the_same_does_not_keep_the_first_model(values, kept, best, tmp_path):
    handler = SaveBestModel(torch.nn.Linear(1, 1), tmp_path / "model.pt")
    validation(values, handler)
    assert torch.load(tmp_path / "model.pt", weights_only=True)["weight"].item() == kept and handler.best == best


def test_freezing_refuses_a_negative_number():
    with pytest.raises(ValueError, match="freeze_epochs must be 0 or more, got -1"):
        FreezeEncoder(SSPFormerDense(SSPFormerEncoder(**ENCODER), features=4), -1)


# --- restoration

LEVELS = ("degradation", "val_degradation")


@pytest.mark.parametrize(
    "task, overrides",
    [
        # weak noise takes longer to gain from
        ("denoising", {"crop_size": [32] * 3, **{f"{name}#sigma": [0.05, 0.15] for name in LEVELS}}),
        ("super_resolution", {"crop_size": [48] * 3, "margin": 4}),
    ],
)
def test_the_overlays_of_restoration_learn_to_gain(task, overrides, pairs, tmp_path):
    output = tmp_path / "out"
    settings = {**LONG, "epochs": 8, "crops_per_scan": 6, "val_interval": 8, "roi_size": [24] * 3, **overrides}
    train(output, pairs / "images", "restoration.json", f"{task}.json", pretrained=None, **settings)
    loss = column(output, "train_loss")  # minus the gain in dB; some draws have little to gain
    assert np.mean(loss[-3:]) < min(loss[0], -0.3)
    assert column(output, "psnr")[-1] > column(output, "psnr_of_input")[-1]
    assert (output / "models/model.pt").is_file() and (output / "pictures/epoch_0008.png").is_file()
