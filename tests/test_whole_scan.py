"""Classification and regression of whole scans as users run them: train, evaluate, infer, from the command line."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from sspformer.networks import ScanPredictor, SSPFormerEncoder

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(BUNDLE.parent / "custom"), "CUDA_VISIBLE_DEVICES": ""}
ENCODER = {"dim": 48, "depth": 2, "num_heads": 2}
SETTINGS = {
    "bundle_root": str(BUNDLE),
    "device": "cpu",
    "amp": False,
    "num_workers": 0,
    "spacing": [1.0, 1.0, 1.0],
    "crop_size": [32, 32, 32],
    **{f"encoder#{name}": value for name, value in ENCODER.items()},
}
TRAINING = {
    "epochs": 12,
    "val_interval": 6,
    "val_fraction": 0.25,
    "freeze_epochs": 12,  # features of a random encoder suffice here
    "learning_rate": 0.03,
    "pretrained": "null",
    **{"crops#sampler#prob": 0.0, "crops#sampler#margin": 0.0},
    **{f"crops#augmentation#{name}#prob": 0.0 for name in ("contrast", "bias_field", "noise")},
}
OVERLAYS = {"training": ["train"], "evaluating": ["train"], "inference": ["inference"]}


@pytest.fixture(scope="module")
def bids(tmp_path_factory):
    """Twelve subjects whose heads hold a bright ball: it grows with their age, and a large one is of class F."""
    folder = tmp_path_factory.mktemp("bids")
    shape = np.array([32, 30, 28])
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1) - shape / 2
    rows = [["participant_id", "age", "sex"]]
    for i in range(12):
        rng, radius = np.random.default_rng(i), 3 + 0.3 * i + (i >= 6)
        image = 500 * (((grid / shape / 0.42) ** 2).sum(-1) < 1) + 500 * ((grid**2).sum(-1) < radius**2)
        image = (image + rng.normal(0, 10, shape)).clip(0).astype(np.int16)
        (folder / f"sub-{i:02d}").mkdir()
        nib.save(nib.Nifti1Image(image, np.eye(4)), folder / f"sub-{i:02d}" / f"sub-{i:02d}_T1w.nii.gz")
        rows.append([f"sub-{i:02d}", round(10 * radius), "MF"[i >= 6]])
    with (folder / "participants.tsv").open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(rows)
    return folder


def configs(workflow, task):
    names = [*OVERLAYS[workflow], "whole_scan", task] + ["evaluate"] * (workflow == "evaluating")
    return [str(BUNDLE / "configs" / f"{name}.json") for name in names]


def run(workflow, task, dataset, output, **options):
    """In a process of its own; returns its exit status and what it said."""
    line = [sys.executable, "-m", "monai.bundle", "run", workflow, "--config_file", str(configs(workflow, task))]
    for name, value in {**SETTINGS, "dataset_dir": dataset, "output_dir": output, **options}.items():
        line += [f"--{name}", str(value) if isinstance(value, (str, Path)) else json.dumps(value)]
    done = subprocess.run(line, cwd=output.parent, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
    return done.returncode, done.stdout + done.stderr


def train(task, dataset, output, **options):
    """In this process; returns the parser."""
    workflow = ConfigWorkflow(
        config_file=configs("training", task),
        run_id="training",
        logging_file=False,
        **{**SETTINGS, **TRAINING, "dataset_dir": str(dataset), "output_dir": str(output), **options},
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    return workflow.parser


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(bids, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "out"
    status, log = run("training", "classification", bids, output, target="sex", **TRAINING)
    assert status == 0, log
    return output


def test_it_learns_the_classes_and_says_so(trained):
    history = read(trained / "history.csv")
    assert float(history[-1]["train_loss"]) < 0.3 < float(history[0]["train_loss"])
    assert float(history[-1]["auc"]) == 1 and {"balanced_accuracy", "accuracy"} <= history[-1].keys()
    assert (trained / "pictures/epoch_0012.png").stat().st_size > 1000
    assert json.loads((trained / "models/checkpoint.json").read_text())["class_names"] == ["F", "M"]


def test_an_evaluation_knows_the_classes_and_gives_intervals(trained, bids, tmp_path):
    table, weights = bids / "participants.tsv", trained / "models/model.pt"
    status, log = run(
        "evaluating",
        "classification",
        trained / "datalist.json",
        tmp_path / "out",
        targets=table,
        target="sex",
        weights=weights,
    )
    assert status == 0, log
    truth = {row["participant_id"]: row["sex"] for row in csv.DictReader(table.open(), delimiter="\t")}
    rows = read(tmp_path / "out/metrics.csv")
    assert sorted(truth[row["subject"]] for row in rows) == ["F", "F", "M", "M"]  # a quarter of each class
    for row in rows:
        assert row["target"] == truth[row["subject"]]
        shares = {name: float(row[f"probability of {name}"]) for name in "FM"}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3) and row["prediction"] == max(shares, key=shares.get)
    summary = {row["metric"]: row for row in read(tmp_path / "out/summary.csv")}
    assert summary.keys() == {"auc", "balanced_accuracy", "accuracy"}
    right = sum(row["prediction"] == row["target"] for row in rows) / 4
    assert float(summary["accuracy"]["value"]) == right
    assert all(float(row["ci_low"]) <= float(row["value"]) <= float(row["ci_high"]) for row in summary.values())
    content = json.loads((tmp_path / "out/summary.json").read_text())
    assert content["subjects"] == 4 and content["target"] == "sex" and content["weights"] == str(weights)
    assert (tmp_path / "out/pictures/predictions.png").stat().st_size > 1000


def test_inference_goes_on_after_a_bad_file_and_where_it_stopped(trained, bids, tmp_path):
    scans, output, weights = tmp_path / "scans", tmp_path / "out", trained / "models/model.pt"
    scans.mkdir()
    for i in (0, 11):
        name = f"sub-{i:02d}_T1w.nii.gz"
        (scans / name).write_bytes((bids / name[:6] / name).read_bytes())
    (scans / "broken.nii.gz").write_text("no scan")
    status, log = run("inference", "classification", scans, output, weights=weights)
    assert status == 1 and "1 of 3 scans failed" in log
    rows = {row["name"]: row for row in read(output / "predictions.csv")}
    assert rows["broken"]["status"] == "failed" and rows["broken"]["prediction"] == "" and rows["broken"]["reason"]
    assert [rows[f"sub-{i}_T1w"]["prediction"] for i in ("00", "11")] == ["M", "F"]
    assert rows["sub-00_T1w"]["source"] == "sub-00_T1w.nii.gz"

    (scans / "broken.nii.gz").unlink()
    (output / "predictions/sub-11_T1w.csv").unlink()
    status, log = run("inference", "classification", scans, output, weights=weights)
    assert status == 0, log
    again = {row["name"]: row for row in read(output / "predictions.csv")}
    assert {name: row["status"] for name, row in again.items()} == {
        "sub-00_T1w": "already there",
        "sub-11_T1w": "written",
    }
    columns = [name for name in again["sub-00_T1w"] if name.startswith("pr")]
    assert len(columns) == 3
    for name, row in again.items():
        assert [row[column] for column in columns] == [rows[name][column] for column in columns]


def test_regression_learns_in_the_unit_of_the_target_and_goes_the_same_way(bids, tmp_path):
    parser = train("regression", bids, tmp_path / "out", target="age")
    history = read(tmp_path / "out/history.csv")
    assert float(history[-1]["train_loss"]) < 0.3 < float(history[0]["train_loss"])
    network = parser.get_parsed_content("network_def")
    assert 20 <= float(network.target_mean) <= 75 and 10 < float(network.target_std) < 25
    weights = tmp_path / "out/models/model.pt"
    fresh = ScanPredictor(SSPFormerEncoder(**ENCODER), 1)
    fresh.load_state_dict(torch.load(weights, weights_only=True))
    given = {"targets": bids / "participants.tsv", "target": "age", "weights": weights}
    status, log = run("evaluating", "regression", tmp_path / "out/datalist.json", tmp_path / "eval", **given)
    assert status == 0, log
    rows = read(tmp_path / "eval/metrics.csv")
    error = np.mean([abs(float(row["target"]) - float(row["prediction"])) for row in rows])
    summary = {row["metric"]: row for row in read(tmp_path / "eval/summary.csv")}
    assert summary.keys() == {"r2", "mae"} and float(summary["mae"]["value"]) == pytest.approx(error, rel=1e-3)
    status, log = run("inference", "regression", tmp_path / "out/datalist.json", tmp_path / "infer", weights=weights)
    assert status == 0, log
    inferred = {row["name"]: float(row["prediction"]) for row in read(tmp_path / "infer/predictions.csv")}
    for row in rows:
        assert inferred[row["name"]] == pytest.approx(float(row["prediction"]), rel=1e-4)


def test_a_frozen_encoder_stays_bit_identical_and_is_what_the_head_is_standardised_with(bids, tmp_path):
    torch.manual_seed(1)
    pretrained = SSPFormerEncoder(**ENCODER).state_dict()
    torch.save(pretrained, tmp_path / "encoder.pt")
    options = {"pretrained": str(tmp_path / "encoder.pt"), "epochs": 2, "freeze_epochs": 2, "target": "age"}
    options["crops#sampler#flip_prob"] = 0.0
    parser = train("regression", bids, tmp_path / "out", **options)
    network, dataset = (parser.get_parsed_content(name) for name in ("network_def", "train#dataset"))
    assert all(torch.equal(value, pretrained[name]) for name, value in network.encoder.state_dict().items())
    assert network.head.weight.abs().sum() > 0
    with torch.no_grad():
        pooled = torch.cat([network.pool(torch.as_tensor(item["image"]).float()[None]) for item in dataset])
    torch.testing.assert_close(network.token_mean, pooled.mean(0), rtol=1e-3, atol=1e-4)


def test_errors_come_before_training(bids, tmp_path):
    with pytest.raises(RuntimeError) as caught:
        train("classification", bids, tmp_path / "out", target="seks")
    cause = caught.value
    while cause.__cause__ is not None:
        cause = cause.__cause__
    assert "no column 'seks'; did you mean 'sex'?" in str(cause) and not (tmp_path / "out/models").exists()
