"""The protocol of the study, second edition: arms, tasks, peers, comparisons. docs/study.md explains it."""

from __future__ import annotations

from benchmarks.common import ROOT

CONFIGS = ROOT / "benchmarks" / "study" / "configs"
PAGE = ROOT / "docs" / "study.md"  # gets the tables of the report
CURVES = ROOT / "docs" / "images" / "study_curves.png"


def torchio(name: str, **options) -> dict[str, object]:
    """A transform of TorchIO in a config."""
    return {"_target_": "benchmarks.study.artifacts.TorchIOd", "keys": "image", "name": name, **options}


#: arms of the pretraining, each with every seed: options of pretrain.json
ARMS: dict[str, list[str]] = {
    "random": ["--beta", "0.0"],
    "scheduled": ["--beta", "0.5"],
    "random_clean": ["--beta", "0.0", "--noise", "null"],
    "scheduled_clean": ["--beta", "0.5", "--noise", "null"],
}
MAIN = ("scratch", "random", "scheduled")  # on every task; the other arms are for a GPU
#: splits and folders of the pretraining
PRETRAINING = ({"training": ["train"], "validation": ["val"]}, ["heads/", "brain_structures/images/"])
EPOCHS = 200  # of the pretraining: 20 steps of 8 crops each
GRID = [2.0, 2.0, 2.0]  # mm; with patches of 4 voxels a token sees 8 mm
PRETRAIN = {
    "spacing": GRID,
    "min_spacing": GRID,
    "max_spacing": GRID,
    "encoder#patch_size": 4,
    "crop_size": [48, 48, 48],
    "batch_size": 8,
    "crops_per_scan": 1,
    "epochs": EPOCHS,
    "val_interval": 50,
    "learning_rate": 0.001,
}
#: how a start is fine-tuned
RECIPES = {
    "scratch": {"learning_rate": 0.002, "layer_decay": 1.0},
    "pretrained": {"learning_rate": 0.0015, "layer_decay": 0.65},
}
#: peers of the segmentation, from scratch: steps over ours
PEERS = {"segresnet": 4.0, "swinunetr": 4.0}
STAGES = ("pretrain", "segment", "restore", "robustness", "report")
#: differences in the report; True: primary, counted in the correction for the number of comparisons
COMPARISONS = (
    ("random", "scratch", True),
    ("scheduled", "random", True),
    ("scheduled", "scratch", False),
    ("scratch_8mm", "scratch", False),
    ("random", "scratch_8mm", False),
    ("random", "random_clean", False),
    ("scheduled", "scheduled_clean", False),
    *((peer, "scratch", False) for peer in (*PEERS, "cubic")),
)
#: where the primary ones are asked
PRIMARY = (
    ("brain_structures", 5),
    ("hippocampus", 10),
    ("denoising", "mean of all"),
    ("super_resolution", "mean of all"),
)
N_PRIMARY = 2 * len(PRIMARY)
SEEDS = (0, 1, 2)
#: segmentation: overlays, crops per step, steps, numbers of labelled subjects in the order of their worth, splits, and
#: the encoder's patch and the crop of starts that have tokens of 8 mm, where these are not the task's own
TASKS = {
    "brain_structures": {
        "overlays": [],
        "batch": 2,
        "steps": 2000,
        "labels": (5, 1, 20, 110),
        "splits": {"training": ["train"], "validation": ["val"], "test": ["test"]},
        "8 mm": {"encoder#patch_size": 4, "crop_size": [48, 48, 48]},
        "validation": 5,
    },
    "hippocampus": {
        "overlays": ["hippocampus"],
        "batch": 4,
        "steps": 400,
        "labels": (10, 50, 126),
        "splits": {"training": ["fold0", "fold1", "fold2"], "validation": ["fold3"], "test": ["fold4"]},
        "8 mm": {},  # patches of 8 voxels of 1 mm
        "validation": 41,
    },
}

LEVELS = (0.01, 0.05, 0.09, 0.15)  # of Rician noise, over the range up to the 99.5th percentile
DEGRADATIONS = ("isotropic x2", "isotropic x4")
#: restoration: options of the training and of the evaluation
RESTORATION = {
    "denoising": (
        {"epochs": 4, "crops_per_scan": 8},
        ["--levels", *map(str, LEVELS), "--peers", "--region", "48", "48", "40"],
    ),
    "super_resolution": (
        {"epochs": 3, "crops_per_scan": 64},
        ["--degradations", *DEGRADATIONS, "--region", "64", "64", "40"],
    ),
}
#: number of degradations in the evaluation
N_DEGRADATIONS = {"denoising": len(LEVELS), "super_resolution": len(DEGRADATIONS)}
EVERY = ("scratch", "scratch_8mm", *ARMS, *PEERS, "cubic")  # the order of the tables

#: the networks that segment scans with artifacts
ROBUSTNESS = ("hippocampus", 10)
#: artifacts of the test scans; our training draws none of those of TorchIO
ARTIFACTS = {
    "ghosting": torchio("RandomGhosting", num_ghosts=[4, 4], axes=[1], intensity=[1.0, 1.0]),
    "motion": torchio("RandomMotion", degrees=[4.0, 8.0], translation=[4.0, 8.0], num_transforms=2),
    "bias field": torchio("RandomBiasField", coefficients=[-0.5, 0.5], order=3),
    "spikes": torchio("RandomSpike", num_spikes=[2, 2], intensity=[0.5, 0.5]),
    "noise": {"_target_": "RandRicianNoised", "keys": "image", "prob": 1.0, "std": 0.08, "sample_std": False},
    "low resolution": {
        "_target_": "sspformer.transforms.RandReducedResolutiond",
        "keys": "image",
        "prob": 1.0,
        "factor": [2.5, 2.5],
    },
    "contrast": {"_target_": "RandAdjustContrastd", "keys": "image", "prob": 1.0, "gamma": [2.0, 2.0]},
}
#: the scaling of the bundle, which scans with artifacts go through again
RESCALING = {"_target_": "sspformer.transforms.ScaleByPercentilesd", "keys": "image", "lower": 0.5, "upper": 99.5}
#: the same artifacts for every network
ARTIFACT_OVERLAY = {"+initialize": ["$monai.utils.set_determinism(seed=0)"]}
