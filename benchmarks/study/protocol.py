"""The protocol of the study, second edition: arms, tasks, peers, comparisons. docs/study.md explains it."""

from __future__ import annotations

from benchmarks.common import ROOT

CONFIGS = ROOT / "benchmarks" / "study" / "configs"
PAGE = ROOT / "docs" / "study.md"  # gets the tables of the report
CURVES = ROOT / "docs" / "images" / "study_curves.png"


def torchio(name: str, **options) -> dict[str, object]:
    """A transform of TorchIO in a config."""
    return {"_target_": "benchmarks.study.artifacts.TorchIOd", "keys": "image", "name": name, **options}


LARGE, SMALL = [64, 64, 64], [48, 48, 48]  # voxels of a crop
GRID = [2.0, 2.0, 2.0]  # mm
#: what all pretrainings share: options of pretrain.json
SHARED = {
    "spacing": GRID,
    "min_spacing": GRID,
    "max_spacing": GRID,
    "encoder#patch_size": 8,
    "crop_size": LARGE,
    "batch_size": 8,
    "crops_per_scan": 1,
    "learning_rate": 0.001,
    "beta": 0.0,
}
#: splits and folders of the pretraining
UNLABELLED = ({"training": ["train"], "validation": ["val"]}, ["heads/", "brain_structures/images/"])
#: the whole segmentation network is pretrained, 2,880 steps of 2 crops
WHOLE = {"epochs": 36, "batch_size": 2, "learning_rate": 0.0005}
#: the masks and the noise that are compared
ARMS: dict[str, dict] = {
    "random": WHOLE,
    "scheduled": WHOLE | {"beta": 0.5},
    "random_clean": WHOLE | {"noise": "null"},
    "scheduled_clean": WHOLE | {"beta": 0.5, "noise": "null"},
}
#: pretrainings, each with every seed: overlays, and options of pretrain.json beside ``SHARED``
PRETRAININGS: dict[str, tuple[list[str], dict]] = {
    **{arm: (["whole_network"], options) for arm, options in ARMS.items()},
    "tokens": ([], {"epochs": 300}),  # the encoder alone, 6,000 steps of 8 crops
    "tokens_8mm": ([], {"epochs": 85, "encoder#patch_size": 4, "crop_size": SMALL}),  # 1,700 steps
}
HEAD = "optimizer#params#head_factor"
FROM_SCRATCH = {"learning_rate": 0.002, "layer_decay": 1.0, HEAD: 10}
PRETRAINED = {"learning_rate": 0.002, "layer_decay": 0.65, HEAD: 10}
#: starts of a fine-tuning: the pretraining, and options of train.json
STARTS: dict[str, tuple[str | None, dict]] = {
    "scratch": (None, FROM_SCRATCH),
    **{arm: (arm, PRETRAINED) for arm in ARMS},
    "tokens": ("tokens", PRETRAINED),
    "tokens_8mm": ("tokens_8mm", PRETRAINED | {"encoder#patch_size": 4, "crop_size": SMALL}),
    "scratch_slow": (None, FROM_SCRATCH | {HEAD: 1}),
    "tokens_slow": ("tokens", PRETRAINED | {HEAD: 1}),
}
MAIN = ("scratch", "random", "scheduled")  # on every task; the other arms are for a GPU
#: contenders of the design, on the first task, judged on validation subjects alone
DESIGN = ("scratch", "random", "tokens", "tokens_8mm", "scratch_slow", "tokens_slow")
#: titles of starts, where they are not their names
TITLES = {
    "random_clean": "random, no noise",
    "scheduled_clean": "scheduled, no noise",
    "tokens_8mm": "tokens of 8 mm",
    "scratch_slow": "scratch, slow head",
    "tokens_slow": "tokens, slow head",
}
#: peers of the segmentation, from scratch: steps over ours
PEERS = {"segresnet": 4.0, "swinunetr": 4.0}
STAGES = ("pretrain", "segment", "robustness", "design", "restore", "report")
#: differences in the report; True: primary, counted in the correction for the number of comparisons
COMPARISONS = (
    ("random", "scratch", True),
    ("scheduled", "random", True),
    ("scheduled", "scratch", False),
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
#: how many subjects each of the four validations on the way sees
TASKS = {
    "brain_structures": {
        "overlays": [],
        "batch": 2,
        "steps": 1000,
        "labels": (5, 1, 20, 110),
        "splits": {"training": ["train"], "validation": ["val"], "test": ["test"]},
        "validation": 15,
    },
    "hippocampus": {
        "overlays": ["hippocampus"],
        "batch": 4,
        "steps": 400,
        "labels": (10, 50, 126),
        "splits": {"training": ["fold0", "fold1", "fold2"], "validation": ["fold3"], "test": ["fold4"]},
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
EVERY = ("scratch", *ARMS, *PEERS, "cubic")  # the order of the tables

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
