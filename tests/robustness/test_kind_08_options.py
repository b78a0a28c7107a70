"""Options are checked first thing, by name; unknown ones are refused with the nearest that is known."""

import json

import pytest
import torch
from monai.bundle import ConfigParser
from odd_inputs import (
    BUNDLE,
    CONFIGS,
    infer,
    labelled,
    nifti,
    option_of,
    outcome,
    pairs,
    refused,
    run,
    stand_in,
    tiny,
    workflow,
)

from sspformer.engines import check_options, fast_bfloat16
from sspformer.options import SCHEMA

NAN = float("nan")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return labelled(tmp_path_factory.mktemp("data"))


BAD = {
    "inference": [
        ("spacing", [0, 0, 0]),
        ("spacing", [NAN, 2, 2]),
        ("spacing", [-2, -2, -2]),
        ("spacing", "2"),
        ("spacing", [2, 2]),
        ("spacing", [2, "x", 2]),
        ("roi_size", [-1, 1, 1]),
        ("roi_size", [0, 64, 64]),
        ("roi_size", [64.5, 64, 64]),
        ("roi_size", [64, 64]),
        ("roi_size", 64),
        ("roi_size", [100000, 100000, 100000]),
        ("overlap", 1),
        ("overlap", -0.1),
        ("overlap", NAN),
        ("overlap", "much"),
        ("sw_batch_size", 0),
        ("sw_batch_size", -3),
        ("sw_batch_size", 1.5),
        ("num_workers", -1),
        ("num_workers", "many"),
        ("pictures", "perhaps"),
        ("overwrite", 3),
        ("dicom", "nay"),
        ("largest_component", "maybe"),
        ("amp", "often"),
        ("device", "gpu"),
        ("device", "cuda:99"),
        ("weights", ""),
        ("output_postfix", "../../x"),
        ("output_postfix", "/tmp/x"),
        ("output_postfix", "a/b"),
        ("output_postfix", ""),
        ("class_names", []),
        ("class_names", "bright"),
        ("dataset_dir", ""),
        ("output_dir", ""),
        ("task", "denoising"),
        ("factor", 2),
        ("target_spacing", 1.0),
    ],
    "train": [
        ("epochs", 0),
        ("epochs", -1),
        ("epochs", 1.5),
        ("epochs", NAN),
        ("epochs", "ten"),
        ("strip_prob", 7),
        ("strip_prob", -0.1),
        ("flip_prob", 1.01),
        ("flip_prob", NAN),
        ("batch_size", 0),
        ("crops_per_scan", 0),
        ("crops_per_scan", -1),
        ("val_fraction", 1),
        ("val_fraction", -0.1),
        ("val_fraction", NAN),
        ("val_interval", 0),
        ("max_val_scans", -1),
        ("max_subjects", 0),
        ("max_subjects", "some"),
        ("learning_rate", 0),
        ("learning_rate", -1e-3),
        ("learning_rate", NAN),
        ("learning_rate", float("inf")),
        ("layer_decay", 0),
        ("layer_decay", 1.5),
        ("weight_decay", -1),
        ("warmup_share", 2),
        ("max_grad_norm", 0),
        ("max_grad_norm", NAN),
        ("freeze_epochs", -1),
        ("seed", -1),
        ("seed", 1.5),
        ("seed", "x"),
        ("rotate_range", NAN),
        ("scale_range", -0.5),
        ("scale_range", 1),
        ("crop_size", [0, 0, 0]),
        ("spacing", [0, 0, 0]),
        ("skip_unreadable", "sometimes"),
        ("resume", "again"),
        ("subject_pattern", "(("),
        ("spatial_dims", 4),
        ("task", "denoising"),
    ],
    "pretrain": [
        ("epochs", 0),
        ("mask_ratio", 0),
        ("mask_ratio", 1),
        ("mask_ratio", NAN),
        ("beta", NAN),
        ("beta_warmup_share", -1),
        ("spacing_jitter", [2, 1]),
        ("spacing_jitter", [0, 1]),
        ("spacing_jitter", [1, NAN]),
        ("min_spacing", [3, 3, 3]),
        ("max_spacing", [0, 0, 0]),
        ("spacing", [-1, -1, -1]),
        ("image_size", [0, 96, 96]),
        ("learning_rate", -1),
        ("batch_size", "all"),
    ],
    "evaluate": [
        ("tolerance", -1),
        ("tolerance", NAN),
        ("max_pictures", -1),
        ("data_consistency", "maybe"),
        ("spacing", [0, 0, 0]),
        ("roi_size", [-1, 1, 1]),
        ("largest_component", 7),
        ("skip_unreadable", "x"),
    ],
}
REFUSED_ALREADY = {
    ("evaluate", "roi_size", 64),
    ("train", "val_fraction", 1),
}


@pytest.mark.parametrize("kind", BAD)
def test_options_out_of_range_or_of_another_type_are_refused_by_name_before_anything_else(kind, data, tmp_path):
    """All in one test, which says how many are accepted: `initialize` alone, so nothing is read or trained."""
    settings = {k: v for k, v in tiny(kind).items() if "#" not in k} if kind in ("train", "pretrain") else {}
    wrong = []
    for name, value in BAD[kind]:
        if name == "image_size":
            name = option_of(kind, name) or "crop_size"
        known = option_of(kind, name) or name  # one that is gone is unknown, and refused by its name as well
        folders = {"dataset_dir": data, "output_dir": tmp_path / "out"}
        found = outcome(workflow, kind, **{**folders, **settings, known: value})
        if found or not found.named or name not in found.error:
            wrong.append(f"--{name} {value!r}: {'accepted' if found else f'{found.kind}: {found.error[:80]}'}")
    assert not wrong, f"{len(wrong)} of {len(BAD[kind])}:\n" + "\n".join(wrong)


GOOD = {
    "inference": [
        ("spacing", [1, 1.5, 2]),
        ("roi_size", [32, 48, 64]),
        ("overlap", 0),
        ("pictures", "true"),
        ("pictures", "no"),
        ("dicom", 0),
        ("largest_component", "False"),
        ("amp", "1"),
        ("num_workers", 2),
    ],
    "train": [
        ("max_subjects", "null"),
        ("max_subjects", "all"),
        ("max_subjects", None),
        ("pretrained", "none"),
        ("pretrained", "null"),
        ("cache_dir", "null"),
        ("val_fraction", 0),
        ("strip_prob", 0),
        ("seed", 2**31),
        ("resume", "no"),
        ("subject_pattern", "none"),
        ("learning_rate", 1),
    ],
    "pretrain": [("beta", 0), ("beta", -1), ("max_val_scans", 1), ("epochs", 1), ("noise", "null")],
    "evaluate": [("tolerance", 0), ("max_pictures", 0), ("skip_unreadable", "false")],
}


@pytest.mark.parametrize("kind", GOOD)
def test_options_in_range_pass_the_check(kind, data, tmp_path):
    for name, value in GOOD[kind]:
        if not (name := option_of(kind, name)):
            continue
        found = outcome(workflow, kind, data, tmp_path / "out", **{name: value})
        assert found, f"--{name} {value!r}: {found.error}"


MISSPELT = {
    "inference": {"spacin": "spacing", "roisize": "roi_size", "output_post": "output_postfix", "dataset": None},
    "train": {
        "epoch": "epochs",
        "batchsize": "batch_size",
        "learn_rate": "learning_rate",
    },
    "pretrain": {"mask_ration": "mask_ratio", "sed": "seed"},
    "evaluate": {"tolerence": "tolerance"},
}


@pytest.mark.parametrize(
    ("kind", "name", "meant"),
    [(kind, name, meant) for kind, names in MISSPELT.items() for name, meant in names.items() if meant],
)
def test_an_unknown_option_is_refused_with_the_nearest_known_one(kind, name, meant, data, tmp_path):
    refused(workflow, kind, data, tmp_path / "out", **{name: 1}, says=[name, meant])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("train", "network_def#featurs"),
        ("train", "loss_function#batchh"),
        ("pretrain", "noise#sigmma"),
    ],
)
def test_an_unknown_part_of_an_option_is_refused_by_name(kind, name, data, tmp_path):
    refused(workflow, kind, data, tmp_path / "out", **{name: 1}, says=name.split("#")[-1])


def checked(*names, argv=(), **overrides):
    """The config of a command, checked; `names` may be paths."""
    files = [str(CONFIGS / f"{name}.json") if isinstance(name, str) else str(name) for name in names]
    parser = ConfigParser()
    parser.read_config(files)
    parser.update(overrides)
    parser.parse()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", list(argv))
        check_options(parser, files)
    return parser


@pytest.mark.parametrize(
    ("names", "override"),
    [
        (["inference"], {"epochs": 5}),
        (["inference", "hippocampus"], {"batch_size": 3}),  # the overlay sets 8 for training
        (["train"], {"overwrite": True}),
        (["pretrain"], {"roi_size": [32, 32, 32]}),
    ],
    ids=str,
)
def test_an_option_of_another_workflow_is_refused(names, override):
    refused(checked, *names, **override, says=[*override, str(*override.values())])


@pytest.mark.parametrize(
    ("names", "override"),
    [
        (["train"], {"validate#max_scan": 3}),
        (["train"], {"data_options#skip_unreadble": True}),
        (["pretrain"], {"lr_scheduler#warmup": 0.1}),
        (["inference"], {"inferer#overlapp": 0.1}),
        (["inference"], {"datset_dir": "scans"}),
    ],
    ids=str,
)
def test_neighbours_of_misspelt_options(names, override):
    refused(checked, *names, **override, says=[*override, "did you mean"])


def test_a_wrong_option_writes_nothing(data, tmp_path):
    refused(workflow, "pretrain", data, tmp_path / "out", epochs=0, says=["--epochs", "not 0", "at least 1"])
    assert not list(tmp_path.iterdir())


def test_what_advanced_users_and_clients_pass_is_known():
    """MONAI's tracking, MONAI Label's BundleTrainTask, the properties of MonaiAlgo, and parts of components."""
    checked("train", run_name="mine", experiment_name="e", tracking_uri="http://host", **{"encoder#size": "small"})
    items = [{"image": "a.nii.gz", "label": "b.nii.gz"}]
    lists = {"train#dataset#data": items, "validate#dataset#data": items, "train#trainer#max_epochs": 3}
    loader = {"_target_": "CheckpointLoader", "load_path": "model.pt", "load_dict": {"model": "$@network"}}
    checked("train", device="cpu", **lists, **{"train#handlers": [{**loader, "strict": False}]})
    checked("pretrain", **{"train#trainer#max_epochs": 3, "encoder#dim": 48, "save_execute_config": False})
    checked("inference", **{"dataset#data": [{"image": "a.nii.gz"}], "handlers": [], "_note": "mine"})


def test_an_overlay_of_the_users_may_set_options_of_training_in_inference(tmp_path):
    overlay = tmp_path / "mine.json"
    overlay.write_text(json.dumps({"epochs": 40, "batch_size": 8, "class_names": ["ball"]}))
    checked("inference", overlay)
    overlay.write_text(json.dumps({"epoch": 40}))
    refused(checked, "train", overlay, says=["epoch", "epochs"])


def test_an_option_may_make_another_one_idle(tmp_path):
    """The name of a task is in the default of output_dir, and crop_size is that of roi_size."""
    sides = {"crop_size": [48, 48, 48], "roi_size": [32, 32, 32]}
    network = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 1, "kernel_size": 1}
    for overlays in ([], ["restoration", "denoising"], ["restoration", "super_resolution"]):
        checked("inference", *overlays, output_dir=str(tmp_path), name="mine", **sides)
        checked("inference", *overlays, output_dir=str(tmp_path), network_def=network)


def test_words_and_numbers_become_what_the_config_uses():
    words = {"resume": "no", "pretrained": "none", "epochs": 3.0, "data_options#max_subjects": "all", "output_dir": 7}
    parser = checked("train", **words)
    assert {name: parser[name] for name in words} == {
        **{"resume": False, "pretrained": None, "epochs": 3, "data_options#max_subjects": None, "output_dir": "7"}
    }
    assert parser.get_parsed_content("cache_dir") == "7/cache" and isinstance(parser["epochs"], int)
    typed = checked("inference", output_dir=1000, argv=["monai.bundle", "run", "--output_dir", "1_000"])
    assert typed["output_dir"] == "1_000"  # what MONAI's command line reads as 1000
    assert checked("inference", output_postfix=0, argv=["--output_postfix=00"])["output_postfix"] == "00"


def test_an_encoder_of_the_users_may_call_its_own_arguments_so():
    checked("train", encoder={"_target_": "my_encoder.MyEncoder", "patch_size": 8, "size": 12})


def test_entries_that_an_overlay_of_the_users_adds_are_no_misspelling(data, tmp_path):
    overlay = tmp_path / "mine.json"
    overlay.write_text(json.dumps({"my_sides": [24, 24, 24], "roi_size": "@my_sides"}))
    found = outcome(workflow, "inference", data, tmp_path / "out", str(overlay))
    assert found, found.error


@pytest.mark.parametrize("option", ["dataset_dir", "output_dir"])
def test_paths_that_look_like_numbers_work(option, tmp_path, monkeypatch):
    """The command line makes numbers of them."""
    monkeypatch.chdir(tmp_path)
    nifti(tmp_path / "2024" / "a.nii.gz")
    folders = {"dataset_dir": tmp_path / "2024", "output_dir": tmp_path / "out", option: 2024}
    if option == "output_dir":
        folders["dataset_dir"] = nifti(tmp_path / "in" / "a.nii.gz").parent
    options = {"roi_size": [24, 24, 24], **stand_in(tmp_path)}
    found = outcome(run, "inference", folders["dataset_dir"], folders["output_dir"], **options)
    assert found, f"{found.kind}: {found.error}"
    assert list(tmp_path.rglob("a_seg.nii.gz"))


@pytest.mark.parametrize("postfix", ["../../evil", "x/../../../evil", "/tmp/evil"])
def test_the_postfix_cannot_leave_the_folder(postfix, tmp_path):
    nifti(tmp_path / "a" / "in" / "s.nii.gz")
    options = {"roi_size": [24, 24, 24], "output_postfix": postfix, **stand_in(tmp_path)}
    before = {path for path in tmp_path.rglob("*")}
    found = outcome(run, "inference", tmp_path / "a" / "in", tmp_path / "a" / "out", **options)
    written = [path for path in set(tmp_path.rglob("*")) - before if path.is_file() and "out" not in path.parts]
    assert not found and found.named and "output_postfix" in found.error and not written


@pytest.mark.parametrize("postfix", [5, "v2", "seg.v2", ""])
def test_other_postfixes_are_names(postfix, tmp_path):
    nifti(tmp_path / "in" / "s.nii.gz")
    found = outcome(infer, tmp_path / "in", tmp_path / "out", output_postfix=postfix, **stand_in(tmp_path))
    if postfix == "":
        assert not found and "output_postfix" in found.error
    else:
        assert (tmp_path / "out" / f"s_{postfix}.nii.gz").exists()


def test_all_none_and_null_mean_no_limit(data, tmp_path):
    for word in ("all", "none", "null", None):
        found = outcome(pairs, data, tmp_path / "out", max_subjects=word, val_fraction=0)
        assert found and len(found.value["training"]) == 3, f"{word}: {found.error}"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"val_fraction": 1}, "val_fraction"),
        ({"val_fraction": -0.1}, "val_fraction"),
        ({"max_subjects": 0}, "max_subjects"),
        ({"max_subjects": 99}, "max_subjects"),
        ({"min_size": 1}, "min_size"),
        ({"val_fraction": NAN}, "val_fraction"),
        ({"val_fraction": "half"}, "val_fraction"),
        ({"max_subjects": 1.5}, "max_subjects"),
        ({"max_subjects": "some"}, "max_subjects"),
        ({"seed": "x"}, "seed"),
        ({"num_workers": "x"}, "num_workers"),
        ({"num_workers": -5}, "num_workers"),
        ({"subject_pattern": "(("}, "subject_pattern"),
        ({"skip_unreadable": "perhaps"}, "skip_unreadable"),
        ({"classes": "2"}, "classes"),
    ],
    ids=str,
)
def test_options_of_the_data_set_are_refused_by_name(options, says, data, tmp_path):
    refused(pairs, data, **options, says=says)


def test_the_docs_list_every_option_of_a_schema():
    """One schema of name, type, range, default and one sentence; docs/options.md is made from it."""
    from sspformer import options

    schema = getattr(options, "SCHEMA", None)
    assert schema is not None, "sspformer.options.SCHEMA"
    page = next((path for path in (BUNDLE.parent / "docs").glob("*.md") if path.stem == "options"), None)
    assert page is not None
    text = page.read_text()
    assert all(f"--{name}" in text for name in schema)


def test_a_device_is_taken_where_pytorch_finds_it(monkeypatch):
    """Apple's GPU and others, which no test has: the choice alone."""
    taken = SCHEMA["device"].takes
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device takes cpu, or a device that PyTorch finds.*not 'mps'"):
        taken.of("--device", "mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [taken.of("--device", device) for device in ("mps", "cpu", "cuda:1")] == ["mps", "cpu", "cuda:1"]
    assert not fast_bfloat16("mps") and not fast_bfloat16(torch.device("mps"))  # some of its kernels are float32 alone
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs/inference.json"))
    parser["device"] = "mps"
    assert parser.get_parsed_content("amp") is False
