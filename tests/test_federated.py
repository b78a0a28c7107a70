"""A federation of two sites whose scans stay where they are: MONAI's ``MonaiAlgo`` drives pretraining and fine-tuning,
in this process and under NVFlare's simulator."""

import csv
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, FlStatistics
from monai.fl.utils.exchange_object import ExchangeObject

from sspformer.networks import SSPFormerDense, SSPFormerEncoder, load_pretrained

ROOT = Path(__file__).resolve().parents[1]
BUNDLE, EXAMPLE = ROOT / "bundle", ROOT / "examples" / "federated"
ENCODER = {"patch_size": 8, "dim": 48, "depth": 2, "num_heads": 2}
SETTINGS = {
    "device": "cpu",
    "amp": False,
    "num_workers": 0,
    "batch_size": 2,
    "crops_per_scan": 16,
    "val_fraction": 0.34,
    "learning_rate": 0.005,
}
PRETRAINING = {
    **SETTINGS,
    "crop_size": [24, 24, 24],
    **{f"encoder#{name}": value for name, value in ENCODER.items()},
}
NETWORK = {
    "class_names": ["ball"],
    "spacing": [1.0, 1.0, 1.0],
    "crop_size": [24, 24, 24],
    **{f"encoder#{name}": value for name, value in ENCODER.items()},
    **{"network_def#features": 8, "network_def#out_channels": 2},
}
SEGMENTATION = {**SETTINGS, **NETWORK, "pretrained": None}
STEPS = (16, 24)  # of each site in a round, an epoch: 2 and 3 scans, 16 crops each, 2 in a batch


def phantom(seed, shape=(32, 30, 28)):
    """A head with a bright ball (1), and noise."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(side) for side in shape), indexing="ij"), axis=-1)
    centre = np.array(shape) / 2 + rng.uniform(-1, 1, 3)
    head = (((grid - centre) / (np.array(shape) * 0.45)) ** 2).sum(-1) < 1
    label = (((grid - centre - [5, 0, 0]) ** 2).sum(-1) < rng.uniform(20, 30)).astype(np.uint8)
    image = np.choose(label, [head * 500.0, 1000.0]) + rng.normal(0, 20, shape)
    return image.clip(0).astype(np.int16), label


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders with ``images/`` and ``labels/``, of three subjects and of four: one of each is held out."""
    both = []
    for seeds in ([0, 1, 2], [3, 4, 5, 6]):
        folder = tmp_path_factory.mktemp("hospital")
        for seed in seeds:
            for name, array in zip(("images", "labels"), phantom(seed)):
                (folder / name).mkdir(exist_ok=True)
                nib.save(nib.Nifti1Image(array, np.diag([1.0, 1, 1, 1])), folder / name / f"p{seed}.nii.gz")
        both.append(folder)
    return both


@pytest.fixture(scope="module")
def client():
    """The example's own module."""
    spec = importlib.util.spec_from_file_location("client", EXAMPLE / "client.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def history(output):
    with (output / "history.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def copy(state):
    return {name: value.detach().clone() for name, value in state.items()}


def average(states):
    return {name: sum(n * s[name] for s, n in zip(states, STEPS)) / sum(STEPS) for name in states[0]}


def difference(first, second):
    assert set(first) == set(second)
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def federate(client, config, folders, output, rounds, **options):
    """Rounds over the sites, without NVFlare; returns the global weights, and what they scored at each site before
    every round and at the end."""
    sites, started, scores = [], [[], []], [[], []]
    for i, folder in enumerate(folders):
        options |= {"dataset_dir": str(folder), "epochs": rounds}
        site = client.site(str(BUNDLE), [f"configs/{config}"], str(output / f"site-{i + 1}"), 1, **options)
        site.initialize({ExtraItems.CLIENT_NAME: f"site-{i + 1}"})

        def keep(engine, kept=started[i]):  # the weights as the first batch of an epoch meets them
            kept.append(copy(engine.network.state_dict()))

        site.trainer.add_event_handler(Events.EPOCH_STARTED, keep)
        sites.append(site)

    weights = copy(sites[0].get_weights().weights)
    assert difference(weights, sites[1].get_weights().weights) == 0  # one seed
    for _ in range(rounds):
        states = []
        for i, site in enumerate(sites):
            scores[i].append(dict(site.evaluate(ExchangeObject(weights=weights)).metrics))
            before = len(started[i])
            site.train(ExchangeObject(weights=weights))
            assert difference(started[i][before], weights) == 0
            trained = site.get_weights()
            assert trained.statistics[FlStatistics.NUM_EXECUTED_ITERATIONS] == STEPS[i]
            states.append(copy(trained.weights))
        assert difference(*states) > 0.01  # each learned from its own scans
        weights = average(states)
    for i, site in enumerate(sites):
        scores[i].append(dict(site.evaluate(ExchangeObject(weights=weights)).metrics))
        site.finalize()
    return weights, scores


def assert_schedule_spans_the_rounds(output):
    """Two rounds of an epoch: half the way after the first, zero after the second."""
    first, second = (row["learning_rate"] for row in history(output))
    assert 0.4 < first / SETTINGS["learning_rate"] < 0.6 and second < 1e-3 * first


@pytest.fixture(scope="module")
def pretrained(client, folders, tmp_path_factory):
    """Two rounds of pretraining: the folder, the global weights, and what these scored at each site."""
    output = tmp_path_factory.mktemp("pretrained")
    return output, *federate(client, "pretrain.json", folders, output, rounds=2, **PRETRAINING)


def test_two_sites_pretrain_one_encoder(pretrained, tmp_path):
    output, weights, scores = pretrained
    for i, of_site in enumerate(scores, start=1):
        before, middle, after = (score["masked_error"] for score in of_site)
        assert middle < 0.5 * before and after < 0.5 * before
        assert_schedule_spans_the_rounds(output / f"site-{i}")
        assert [row["beta"] for row in history(output / f"site-{i}")] == [0, 0.5]

    torch.save(weights, tmp_path / "global.pt")
    network = load_pretrained(SSPFormerDense(SSPFormerEncoder(**ENCODER), 3, features=8), tmp_path / "global.pt")
    of_encoder = {name.removeprefix("encoder."): w for name, w in weights.items() if name.startswith("encoder.")}
    assert difference(network.encoder.state_dict(), of_encoder) == 0


def test_another_federation_in_the_same_folders_starts_from_its_own_weights(client, folders, pretrained):
    output, weights, _ = pretrained
    assert (output / "site-1/models/checkpoint.pt").is_file()
    again, _ = federate(client, "pretrain.json", folders, output, rounds=1, **PRETRAINING)  # asserts it
    assert difference(again, weights) > 0.01


def test_two_sites_fine_tune_one_network(client, folders, tmp_path):
    weights, scores = federate(client, "train.json", folders, tmp_path, rounds=2, **SEGMENTATION)
    for i, of_site in enumerate(scores, start=1):
        before, _, after = (score["dice"] for score in of_site)
        assert after > max(0.4, before)
        assert_schedule_spans_the_rounds(tmp_path / f"site-{i}")
        best = torch.load(tmp_path / f"site-{i}" / "global/models/model.pt", weights_only=True)
        assert set(best) == set(weights)

    # evaluate.json scores the weights that MonaiAlgo brings, and not those of a file
    evaluation = MonaiAlgo(
        str(BUNDLE),
        config_train_filename=None,
        config_evaluate_filename=["configs/train.json", "configs/evaluate.json"],
        eval_kwargs={
            "dataset_dir": str(tmp_path / "site-1/datalist.json"),  # its held-out scan
            "output_dir": str(tmp_path / "scores"),
            "weights": str(tmp_path / "none.pt"),
            "device": "cpu",
            "amp": False,
            **NETWORK,
        },
    )
    evaluation.initialize({ExtraItems.CLIENT_NAME: "site-1"})
    metrics = evaluation.evaluate(ExchangeObject(weights=weights)).metrics
    assert metrics["dice"] == pytest.approx(scores[0][-1]["dice"], abs=0.02)


def test_the_simulation_refuses_what_it_would_replace_or_cannot_find(folders, tmp_path):
    pytest.importorskip("nvflare", reason="NVFlare is not installed")
    simulate = runpy.run_path(str(EXAMPLE / "simulate.py"))["simulate"]
    for name, instead in {"epochs": "--rounds", "dataset_dir": "--dataset_dirs", "resume": "--pretrained"}.items():
        with pytest.raises(ValueError, match=f"--{name} .*{instead}"):
            simulate(folders, str(tmp_path / "out"), **{name: 3})
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        simulate([folders[0], tmp_path / "nowhere"], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_failing_site_is_named_with_its_log(folders, tmp_path):
    """The second has no scans; the folder of the cache is given from the folder of the command."""
    pytest.importorskip("nvflare", reason="NVFlare is not installed")
    for name in ("empty", "cache"):
        (tmp_path / name).mkdir()
    line = [sys.executable, str(EXAMPLE / "simulate.py"), "--dataset_dirs", f"{folders[0]},empty"]
    line += ["--output_dir", "out"]
    for name, value in {**PRETRAINING, "cache_dir": "cache"}.items():
        line += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "custom")}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert json.loads((tmp_path / "out/site-1.json").read_text())["cache_dir"] == str(tmp_path / "cache")
    log = tmp_path / "out/nvflare/sspformer/site-2/log.txt"
    assert done.returncode != 0 and str(log) in done.stderr.splitlines()[-1], done.stderr
    assert str(tmp_path / "empty") in log.read_text()


def test_nvflare_simulates_two_sites(folders, pretrained, tmp_path):
    pytest.importorskip("nvflare", reason="NVFlare is not installed")
    line = [sys.executable, str(EXAMPLE / "simulate.py"), "--dataset_dirs", ",".join(map(str, folders))]
    line += ["--output_dir", str(tmp_path)]
    for name, value in PRETRAINING.items():
        line += [f"--{name}", json.dumps(value)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "custom")}
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr

    weights = torch.load(tmp_path / "global.pt", weights_only=True)
    checkpoints = [tmp_path / f"site-{i}/models/checkpoint.pt" for i in (1, 2)]
    last = [torch.load(path, weights_only=True)["network"] for path in checkpoints]
    assert difference(weights, average(last)) < 1e-6 < difference(*last)
    for i in (1, 2):
        assert_schedule_spans_the_rounds(tmp_path / f"site-{i}")

    # the same as without NVFlare
    of_rounds = (tmp_path / "nvflare/sspformer/server/simulate_job/metrics/round_metrics.jsonl").read_text()
    for round_, text in enumerate(of_rounds.splitlines()):
        for site in json.loads(text)["sites"]:
            score = {metric["name"]: metric["value"] for metric in site["metrics"]}["masked_error"]
            assert score == pytest.approx(pretrained[2][int(site["name"][-1]) - 1][round_]["masked_error"], rel=1e-3)
    assert difference(weights, pretrained[1]) < 1e-3
