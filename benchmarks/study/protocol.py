"""The protocol of the study: arms, tasks, peers, comparisons. docs/study.md explains it."""

from __future__ import annotations

from benchmarks.common import ROOT

CONFIGS = ROOT / "benchmarks" / "study" / "configs"
PAGE = ROOT / "docs" / "study.md"  # gets the tables of the report
CURVES = ROOT / "docs" / "images" / "study_labels.png"


def torchio(name: str, **options) -> dict[str, object]:
    """A transform of TorchIO in a config."""
    return {"_target_": "benchmarks.study.artifacts.TorchIOd", "keys": "image", "name": name, **options}


#: arms of the pretraining: options of pretrain.json, and epochs over those of the other arms (hard: for equal time)
ARMS: dict[str, tuple[list[str], float]] = {
    "random": (["--beta", "0.0"], 1.0),
    "scheduled": (["--beta", "0.5"], 1.0),
    "hard": ([str(CONFIGS / "hard_patches.json"), "--beta", "0.5", "--beta_warmup_share", "1.0"], 0.7),
    "constant": (["--beta", "0.5", "--beta_warmup_share", "0.0"], 1.0),
    "hints": ([], 1.0),  # published rows alone, see RETIRED
    "falling": ([str(CONFIGS / "falling_beta.json"), "--beta", "0.5"], 1.0),
    "random_clean": (["--beta", "0.0", "--noise", "null"], 1.0),
    "scheduled_clean": (["--beta", "0.5", "--noise", "null"], 1.0),
    "random_long": (["--beta", "0.0"], 7.5),
    "scheduled_long": (["--beta", "0.5"], 7.5),
}
#: arms that can no longer run: ``hints`` revealed 5 % of the patches, drawn among those with the highest energy. It did
#: not help, and the option is gone
RETIRED = ("hints",)
RUNNABLE = tuple(arm for arm in ARMS if arm not in RETIRED)
LONG = ("random_long", "scheduled_long")  # pretrained with seed 0 alone; fine-tuned with every seed
ONCE = ("hard", "constant", "falling")  # in the reduced matrix with seed 0 alone, like the peers
#: splits and folders of the pretraining
PRETRAINING = ({"training": ["train"], "validation": ["val"]}, ["heads/", "brain_structures/images/"])
EPOCHS, CROP = 40, 64  # of the pretraining: 800 steps of 8 crops
#: peers of the segmentation, from scratch: time of a step over ours, which divides the number of steps
PEERS = {
    "segresnet": {"brain_structures": 1.25, "hippocampus": 1.36},
    "swinunetr": {"brain_structures": 5.0, "hippocampus": 3.4},
    "unetr": {"brain_structures": 1.6, "hippocampus": 2.7},
}
STAGES = ("pretrain", "segment", "restore", "robustness", "report")
MAIN = ("scratch", *LONG)  # on every task; in the reduced matrix the other arms run on SHORT_TASK alone
SHORT_TASK = "denoising"
ROBUSTNESS = ("hippocampus", 126)  # the networks that segment scans with artifacts
#: differences in the report; True: primary, counted in the correction for the number of comparisons
COMPARISONS = (
    ("scheduled_long", "scratch", True),
    ("scheduled_long", "random_long", True),
    ("random_long", "scratch", False),
    ("random", "scratch", False),
    ("scheduled", "scratch", False),
    ("scheduled", "random", False),
    ("hard", "random", False),
    ("constant", "random", False),
    ("hints", "random", False),
    ("falling", "random", False),
    ("falling", "scheduled", False),
    ("random", "random_clean", False),
    ("scheduled", "scheduled_clean", False),
    ("scheduled_clean", "random_clean", False),
    ("random_long", "random", False),
    ("scheduled_long", "scheduled", False),
    *((peer, "scratch", False) for peer in (*PEERS, "unet", "restormer", "cubic")),
)
N_PRIMARY = 16  # two primary ones for 6 numbers of labels in segmentation, for denoising and super-resolution
SEEDS = (0, 1, 2)
#: segmentation: overlays, crops per step, steps, numbers of labelled subjects, splits
TASKS = {
    "brain_structures": {
        "overlays": [],
        "batch": 2,
        "steps": 800,
        "labels": (5, 20, 110),
        "splits": {"training": ["train"], "validation": ["val"], "test": ["test"]},
    },
    "hippocampus": {
        "overlays": ["hippocampus"],
        "batch": 4,
        "steps": 400,
        "labels": (10, 50, 126),
        "splits": {"training": ["fold0", "fold1", "fold2"], "validation": ["fold3"], "test": ["fold4"]},
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
#: peers of the restoration: time of a step over ours, which divides the number of crops per scan, at least one
RESTORATION_PEERS = {
    "unet": {"denoising": 0.95, "super_resolution": 0.97},
    "restormer": {"denoising": 13.4, "super_resolution": 12.9},
}

EVERY = ("scratch", *ARMS, *PEERS, *RESTORATION_PEERS, "cubic")  # the order of the tables

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
