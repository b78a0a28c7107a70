"""``--tracking mlflow``: what MLflow holds after pretraining, fine-tuning, evaluation and inference on phantoms is what
the runs' own files say."""

import csv
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import run

from sspformer.compat import original_error

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # before its import
mlflow = pytest.importorskip("mlflow", reason="MLflow is not installed")

CONFIGS = Path(__file__).resolve().parents[1] / "bundle" / "configs"
ENCODER = {f"encoder#{name}": value for name, value in {"patch_size": 8, "dim": 48, "depth": 2}.items()}
COMMON = {"bundle_root": str(CONFIGS.parent), "device": "cpu", "amp": False, "num_workers": 0}
SEGMENTATION = {
    "class_names": ["ball"],
    "spacing": [1.0, 1.0, 1.0],
    "crop_size": [24, 24, 24],
    "encoder#num_heads": 2,
    "network_def#features": 8,
    "network_def#out_channels": 2,
}
SUBJECT = "Doe"  # in every file's name


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Three subjects with a bright ball: two to train on, one held out."""
    folder = tmp_path_factory.mktemp("pairs")
    grid = np.stack(np.meshgrid(*[np.arange(28)] * 3, indexing="ij"), axis=-1)
    for i in range(3):
        label = ((grid - 12 - i) ** 2).sum(-1) < 30
        image = 800 * label + np.random.default_rng(i).integers(0, 100, label.shape)
        for name, array in (("images", image.astype(np.int16)), ("labels", label.astype(np.uint8))):
            (folder / name).mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, np.eye(4)), folder / name / f"{SUBJECT}{i}.nii.gz")
    return folder


def track(workflow, configs, output, **options):
    """As ``python -m monai.bundle run`` does."""
    settings = {**COMMON, **ENCODER, "output_dir": str(output), **options}
    files = [str(CONFIGS / name) for name in configs]
    run(run_id=workflow, config_file=files, logging_file=False, tracking="mlflow", **settings)


def tracked(output):
    """MLflow's client, and the run that it holds."""
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{output}/mlruns.db")
    (logged,) = client.search_runs(client.get_experiment_by_name("monai_experiment").experiment_id)
    assert logged.info.status == "FINISHED"
    assert SUBJECT.encode() not in (output / "mlruns.db").read_bytes()
    return client, logged


def values(client, logged, name):
    return {metric.step: metric.value for metric in client.get_metric_history(logged.info.run_id, name)}


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_config_is_logged(client, logged, **expected):
    (artifact,) = client.list_artifacts(logged.info.run_id)
    text = Path(client.download_artifacts(logged.info.run_id, artifact.path)).read_text()
    assert SUBJECT not in text
    config = json.loads(text)
    assert {name: config[name] for name in expected} == expected


def assert_training_is_logged(client, logged, output):
    history = rows(output / "history.csv")
    assert len(history) == 2
    loss, rate = values(client, logged, "train_loss"), values(client, logged, "lr_group_0")
    steps = int(history[0]["iteration"])
    assert sorted(loss) == sorted(rate) == [*range(1, 2 * steps + 1)]
    for epoch, row in enumerate(history, start=1):
        of_epoch = [loss[step] for step in range((epoch - 1) * steps + 1, epoch * steps + 1)]
        assert np.isclose(np.mean(of_epoch), float(row["train_loss"]), rtol=1e-5)
    validated = set(history[0]) - {"epoch", "iteration", "train_loss", "learning_rate", "beta"}
    assert validated
    for name in validated:
        assert values(client, logged, name) == {int(row["epoch"]): float(row[name]) for row in history}, name
    assert logged.data.params == {"max_epochs": "2", "epoch_length": str(steps)}
    assert rate[1] > rate[2 * steps]


def test_pretraining(pairs, tmp_path):
    options = {"crop_size": [24, 24, 24], "epochs": 2, "val_fraction": 0.34, "encoder#num_heads": 2}
    track("training", ["pretrain.json"], tmp_path, dataset_dir=str(pairs / "images"), **options)
    client, logged = tracked(tmp_path)
    assert_training_is_logged(client, logged, tmp_path)
    assert_config_is_logged(client, logged, epochs=2, learning_rate=0.0005)


def test_fine_tuning_evaluation_and_inference(pairs, tmp_path):
    output, scores, results = (tmp_path / name for name in ("output", "scores", "results"))
    options = {"epochs": 2, "val_fraction": 0.34, "pretrained": "null", **SEGMENTATION}
    track("training", ["train.json"], output, dataset_dir=str(pairs), **options)
    client, logged = tracked(output)
    assert_training_is_logged(client, logged, output)
    assert_config_is_logged(client, logged, epochs=2, crop_size=[24, 24, 24])

    options = {"weights": str(output / "models/model.pt"), **SEGMENTATION}
    track("evaluating", ["train.json", "evaluate.json"], scores, dataset_dir=str(output / "datalist.json"), **options)
    client, logged = tracked(scores)
    (held_out,) = rows(scores / "metrics.csv")  # rounded
    for name in ("dice", "surface_dice", "hd95"):
        assert np.isclose(values(client, logged, name)[1], float(held_out[name]), rtol=1e-3), name

    broken = pairs / "images" / f"{SUBJECT}9.nii.gz"
    broken.write_bytes((pairs / "images" / f"{SUBJECT}0.nii.gz").read_bytes()[:500])
    with pytest.raises(RuntimeError) as caught:
        track("inference", ["inference.json"], results, dataset_dir=str(pairs / "images"), **options)
    assert "1 of 4 scans failed" in str(original_error(caught.value))
    client, logged = tracked(results)
    assert (logged.data.metrics["written"], logged.data.metrics["failed"]) == (3, 1)
    seconds = sum(float(row["seconds"]) for row in rows(results / "inference.csv"))
    assert np.isclose(logged.data.metrics["seconds"], seconds)
    assert_config_is_logged(client, logged, weights=str(output / "models/model.pt"))
