"""Lists of a dataset.json: the names that other tools use are known, everything else that lists scans is refused."""

import json

import numpy as np
import pytest
from odd_inputs import (
    accepted,
    assert_says,
    datalist,
    in_child,
    inputs,
    items_of,
    nifti,
    outcome,
    pairs,
    refused,
)

from sspformer.data import DatasetOptions, prepare_test_pairs

NAMES = [f"s{i}" for i in range(1, 7)]


@pytest.fixture
def folder(tmp_path):
    label = np.zeros((12, 12, 12), np.uint8)
    label[3:9, 3:9, 3:9] = 1
    for i, name in enumerate(NAMES):
        noise = np.random.default_rng(i).normal(100, 9, label.shape)
        nifti(tmp_path / "images" / f"{name}.nii.gz", (label * 500.0 + noise).astype(np.int16))
        nifti(tmp_path / "labels" / f"{name}.nii.gz", label)
    return tmp_path


def item(i, **more):
    return {"image": f"images/s{i}.nii.gz", "label": f"labels/s{i}.nii.gz", **more}


def listed(folder, content, encoding="utf-8"):
    path = folder / "list.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding=encoding)
    return path


def splits(function, path, **options):
    return {split: sorted(one["name"] for one in items) for split, items in accepted(function, path, **options).items()}


FOUR, TWO = [item(i) for i in range(1, 5)], [item(5), item(6)]
HELD_OUT = ("validation", "val", "valid", "Validation", "VAL")


@pytest.mark.parametrize("prepare", [datalist, pairs])
@pytest.mark.parametrize("name", HELD_OUT)
def test_names_of_the_validation_list(name, prepare, folder):
    found = splits(prepare, listed(folder, {"training": FOUR, name: TWO}))
    assert found["training"] == NAMES[:4] and found["validation"] == NAMES[4:]


@pytest.mark.parametrize("prepare", [datalist, pairs])
@pytest.mark.parametrize("name", ["training", "train", "Training", "TRAIN"])
def test_names_of_the_training_list(name, prepare, folder):
    found = splits(prepare, listed(folder, {name: FOUR, "validation": TWO}))
    assert found["training"] == NAMES[:4] and found["validation"] == NAMES[4:]


@pytest.mark.parametrize("name", ["test", "testing", "Test", "Testing"])
def test_names_of_the_test_list(name, folder):
    """MSD says test, Auto3DSeg testing."""
    path = listed(folder, {"training": FOUR, name: TWO})
    found = splits(datalist, path)
    assert sorted(found["training"] + found["validation"]) == NAMES[:4]
    tested = accepted(prepare_test_pairs, DatasetOptions(path))
    assert sorted(one["name"] for one in tested) == NAMES[4:]


@pytest.mark.parametrize("prepare", [datalist, pairs])
@pytest.mark.parametrize("kind", [int, str])
def test_the_folds_of_auto3dseg_are_its_split(kind, prepare, folder):
    """Fold 0 is for validation, as MONAI's datafold_read takes it; the same in prepare_pairs."""
    folds = [item(i, fold=kind(i % 3)) for i in range(1, 7)]
    found = splits(prepare, listed(folder, {"training": folds}))
    assert found["validation"] == ["s3", "s6"] and found["training"] == ["s1", "s2", "s4", "s5"]


def test_folds_of_some_items_or_beside_a_validation_list_are_refused(folder):
    refused(datalist, listed(folder, {"training": [item(1, fold=0), item(2)]}), says=["list.json", "fold"])
    both = {"training": [item(1, fold=0), item(2, fold=1)], "validation": [item(3)]}
    refused(datalist, listed(folder, both), says=["list.json", "fold"])


@pytest.mark.parametrize("prepare", [datalist, pairs])
@pytest.mark.parametrize("name", ["holdout", "trainings", "evaluation", "fold_0", "validation_1", "images", "data"])
def test_other_names_of_lists_are_refused_by_name(name, prepare, folder):
    refused(prepare, listed(folder, {"training": FOUR, name: TWO}), says=["list.json", name])


def test_two_names_of_one_list_are_refused(folder):
    refused(datalist, listed(folder, {"training": FOUR, "validation": [item(5)], "val": [item(6)]}), says="val")


def test_a_list_that_stands_twice_is_refused(folder):
    text = f'{{"training": {json.dumps(FOUR)}, "training": {json.dumps(TWO)}}}'
    refused(datalist, listed(folder, text), says=["list.json", "training", "twice"])


def test_what_else_a_dataset_json_of_msd_or_nnunet_says_is_no_list(folder):
    described = {
        "name": "Brain",
        "description": "x",
        "reference": "y",
        "licence": "CC",
        "release": "1.0",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "box"},
        "numTraining": 4,
        "numTest": 0,
        "channel_names": {"0": "T1"},
        "file_ending": ".nii.gz",
        "regions_class_order": [1],
        "overwrite_image_reader_writer": "NibabelIO",
    }
    found = splits(pairs, listed(folder, {**described, "training": FOUR, "test": []}))
    assert sorted(found["training"] + found["validation"]) == NAMES[:4]


STRINGS = {
    "training": "images",
    "validation": "images/s5.nii.gz",
    "test": "/",
}


@pytest.mark.parametrize("prepare", [datalist, pairs])
@pytest.mark.parametrize("name", STRINGS)
def test_a_string_or_mapping_where_a_list_belongs_is_refused(name, prepare, folder):
    for content in (
        {"image": "images/s5.nii.gz"},
        3,
        True,
        STRINGS[name],
    ):
        lists = {"training": FOUR, name: content}
        found = in_child(prepare, listed(folder, lists), seconds=4)
        assert found.named, f"{content}: {found.kind} {found.error} {found.value}"
        assert_says(found.error, ["list.json", name, "list"])


@pytest.mark.parametrize("image", ["", ".", "..", "/", "images/.."])
def test_an_image_that_is_the_lists_own_folder_or_above_is_refused(image, folder):
    found = in_child(datalist, listed(folder, {"training": [item(1), {"image": image}]}), seconds=3)
    assert found.named, f"{found.kind} {found.error} {found.value}"
    assert_says(found.error, ["list.json", "image", "folder"])
    assert "twice" not in found.error


@pytest.mark.parametrize(
    "broken", [{"label": "labels/s1.nii.gz"}, {"image": None}, {"image": 3}, {"image": {"a": "b"}}, None, 3, []]
)
def test_items_without_an_image_are_refused(broken, folder):
    refused(datalist, listed(folder, {"training": [item(1), broken]}), says=["list.json", "image"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_read(encoding, folder):
    """As Notepad and PowerShell write it."""
    path = listed(folder, {"training": FOUR, "validation": TWO}, encoding)
    assert splits(datalist, path)["training"] == NAMES[:4]
    assert len(inputs(path)) == 6


def test_other_encodings_are_refused_by_name(folder):
    refused(datalist, listed(folder, {"training": FOUR}, "utf-16"), says="list.json")


@pytest.mark.parametrize("prepare", [datalist, pairs])
def test_a_scan_of_two_lists_is_refused(prepare, folder):
    lists = {"training": FOUR, "validation": [item(1)]}
    refused(prepare, listed(folder, lists), says=["list.json", "s1.nii.gz", "twice"])


@pytest.mark.parametrize("prepare", [datalist, pairs])
def test_a_scan_of_two_lists_in_another_spelling_is_refused(prepare, folder):
    """Trained on and validated on: `x/../images`, a link."""
    (folder / "link.nii.gz").symlink_to(folder / "images" / "s1.nii.gz")
    for other in ("labels/../images/s1.nii.gz", "link.nii.gz", str(folder / "images" / "s1.nii.gz")):
        lists = {"training": FOUR, "validation": [{**item(1), "image": other}]}
        refused(prepare, listed(folder, lists), says=["list.json", "twice"])


def test_null_and_empty_lists_mean_what_they_say(folder):
    assert splits(datalist, listed(folder, {"training": FOUR, "validation": []}))["validation"] == []
    assert len(splits(datalist, listed(folder, {"training": FOUR, "validation": None}))["validation"]) == 1
    refused(datalist, listed(folder, {"training": []}), says="training")


def test_a_datalist_that_a_run_left_is_one_for_the_next(folder):
    first = datalist(folder, folder.parent / f"{folder.name} out")
    path = folder.parent / f"{folder.name} out" / "datalist.json"
    assert datalist(path) == first


@pytest.mark.parametrize("content", ["", "null", "3", '"training"', "[]", "{}", '{"training": {}}', "{" * 2000, "\0"])
def test_other_json_is_refused_by_name(content, folder):
    found = outcome(datalist, listed(folder, content))
    assert not found and found.named and "list.json" in found.error


def test_all_items_are_found_for_inference(folder):
    assert len(inputs(listed(folder, {"training": FOUR, "test": TWO}))) == 6
    assert len(items_of(datalist(folder / "images", val_fraction=0.2))) == 6


# --- neighbours


@pytest.mark.parametrize("folds", [[1, 2, 3], [0, 1, None], [0, 1, -1], [0, 1, 0.5], [0, 1, "a"], [0, 1, True]])
def test_folds_that_do_not_say_what_is_held_out_are_refused(folds, folder):
    items = [item(i, fold=fold) for i, fold in enumerate(folds, 1)]
    refused(datalist, listed(folder, {"training": items}), says=["list.json", "fold"])


@pytest.mark.parametrize("prepare", [datalist, pairs])
@pytest.mark.parametrize(
    "content", [{"train_set": FOUR}, {"folds": {"0": FOUR, "1": TWO}}, {"dataset": {"a": {"b": TWO}}}]
)
def test_an_unknown_list_in_the_dataset_json_of_a_folder_is_refused_too(content, prepare, folder):
    """Else every scan of the folder would be trained on."""
    (folder / "dataset.json").write_text(json.dumps(content))
    refused(prepare, folder, says=["dataset.json", next(iter(content))])


def test_a_label_that_is_no_path_is_refused(folder):
    for label in (["labels/s1.nii.gz"], 3, {"a": "b"}, "labels/s1\0.nii.gz"):
        refused(pairs, listed(folder, {"training": [{**item(1), "label": label}]}), says=["list.json", "label"])


def test_items_without_a_subject_are_not_all_of_one(folder):
    items = [item(i, subject=None) for i in range(1, 7)]
    found = accepted(datalist, listed(folder, {"training": items}))
    assert len({one["subject"] for one in items_of(found)}) == 6


def test_label_maps_that_moved_are_said_to_have_moved_once(folder):
    (folder / "labels").rename(folder / "elsewhere")
    text = refused(pairs, listed(folder, {"training": FOUR}), says=["list.json", "label maps", "moved"])
    assert "no such file" not in text


def test_a_list_that_may_not_be_opened_or_is_a_folder_is_named(folder):
    (folder / "dataset.json").mkdir()
    assert len(items_of(accepted(datalist, folder / "images"))) == 6
    refused(datalist, folder / "dataset.json", says="dataset.json")
