"""Images with label maps, and the scans to infer from: what users bring, what does not fit, and who is trained on."""

import csv
import json
import logging

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import PersistentDataset
from monai.data.utils import pickle_hashing
from monai.transforms import Compose
from test_data import PHI, dicom_series, oblique_affine

from sspformer import data
from sspformer.data import DatasetOptions, find_inputs
from sspformer.io import LoadScand
from sspformer.transforms import KeepOnlyAffined

SHAPE = (12, 10, 9)
AFFINE = np.array([[0, 0, 2.0, -9], [-1.5, 0.1, 0, 5], [0.1, 1.5, 0, 3], [0, 0, 0, 1]])  # oblique, axes P-S-R


def save(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def image(path, seed=0, **options):
    return save(path, np.random.default_rng(seed).integers(0, 1000, SHAPE).astype(np.int16), **options)


def label(path, values=(0, 1, 2), dtype=np.uint8, shape=SHAPE, **options):
    return save(path, np.resize(np.array(values, dtype), shape), **options)


def folder(root, cases=("p1", "p2", "p3", "p4"), images="images", labels="labels", suffix=""):
    for i, case in enumerate(cases):
        image(root / images / f"{case}{suffix}.nii.gz", i)
        label(root / labels / f"{case}.nii.gz")
    return root


def dataset_json(root, **content):
    (root / "dataset.json").write_text(json.dumps(content))
    return root / "dataset.json"


def pair(case, images="images", labels="labels"):
    return {"image": f"./{images}/{case}.nii.gz", "label": f"./{labels}/{case}.nii.gz"}


def names(items):
    return {item["name"] for item in items}


def rows(output_dir):
    with open(output_dir / "scans.csv", newline="") as file:
        return list(csv.DictReader(file))


def prepare_pairs(*args, **options):
    return data.prepare_pairs(DatasetOptions(*args, **options))


def prepare_test_pairs(*args, **options):
    return data.prepare_test_pairs(DatasetOptions(*args, **{"skip_unreadable": True, **options}))


def refused(dataset_dir, *args, **options):
    with pytest.raises(ValueError) as caught:
        prepare_pairs(dataset_dir, *args, **options)
    return str(caught.value)


@pytest.mark.parametrize("part", ["images", "labels"])
def test_a_corrected_file_is_not_taken_from_the_cache(part, tmp_path):
    folder(tmp_path / "set")

    def cached():
        items = prepare_pairs(tmp_path / "set", tmp_path / "out", val_fraction=0)["training"]
        keep = Compose([LoadScand(["image", "label"]), KeepOnlyAffined(["image", "label"])])
        options = {"hash_transform": pickle_hashing, "track_meta": True}
        dataset = PersistentDataset(items, keep, tmp_path / "cache", **options)
        return {item["name"]: item[part.removesuffix("s")].max().item() for item in dataset}

    first = cached()
    assert cached() == first and len(list((tmp_path / "cache").iterdir())) == 4
    label(tmp_path / "set" / part / "p2.nii.gz", (0, 3, 5))
    assert cached() == first | {"p2": 5} and len(list((tmp_path / "cache").iterdir())) == 5


def test_a_file_of_the_cache_that_was_cut_off_is_made_anew(tmp_path):
    items = prepare_pairs(folder(tmp_path / "set"), tmp_path / "out", val_fraction=0)["training"]
    keep = Compose([LoadScand(["image", "label"]), KeepOnlyAffined(["image", "label"])])

    def cached():
        return data.CachedDataset(items, keep, tmp_path / "cache")

    before = [item["image"].sum().item() for item in cached()]
    files = sorted((tmp_path / "cache").iterdir())
    whole = [file.read_bytes() for file in files]
    for file, length in zip(files, (0, 10, 2000, len(whole[3]) - 100), strict=True):
        file.write_bytes(file.read_bytes()[:length])
    with pytest.warns(UserWarning, match="is damaged .* made again"):
        assert [item["image"].sum().item() for item in cached()] == before
    assert [len(file.read_bytes()) for file in files] == [len(content) for content in whole]
    assert [item["image"].sum().item() for item in cached()] == before
    assert sorted((tmp_path / "cache").iterdir()) == files


@pytest.mark.parametrize("word", ["null", "None", None])
def test_the_command_lines_words_for_none(word, tmp_path):
    found = prepare_pairs(folder(tmp_path / "set"), tmp_path / "out", max_subjects=word, subject_pattern=word)
    assert len(found["training"]) + len(found["validation"]) == 4


# ---------------------------------------------------------------------------------------------------------------------
# What users bring
# ---------------------------------------------------------------------------------------------------------------------


def test_a_folder_of_images_and_labels(tmp_path):
    folder(tmp_path / "set")
    found = prepare_pairs(tmp_path / "set", tmp_path / "out", classes=3, val_fraction=0.25)
    assert [len(found[split]) for split in ("training", "validation", "test")] == [3, 1, 0]
    assert json.loads(json.dumps(found)) == found
    for item in found["training"] + found["validation"]:
        assert set(item) == {"image", "label", "subject", "name", "version"} and item["name"] == item["subject"]
        loaded = LoadScand(["image", "label"])(item)
        truth = nib.load(tmp_path / "set" / "labels" / f"{item['name']}.nii.gz")
        assert torch.equal(torch.as_tensor(loaded["label"])[0], torch.from_numpy(truth.get_fdata()).float())
        assert np.allclose(loaded["image"].affine, AFFINE) and np.allclose(loaded["label"].affine, AFFINE)
    row = rows(tmp_path / "out")[0]
    assert (row["labels"], row["orientation"], row["label_path"]) == ("0-2", "PSR", "labels/p1.nii.gz")


def test_folders_of_nnunet_with_its_test_split_and_class_names(tmp_path):
    folder(tmp_path, ("p_001", "p_002", "p_003"), "imagesTr", "labelsTr", "_0000")
    folder(tmp_path, ("p_004",), "imagesTs", "labelsTs", "_0000")
    image(tmp_path / "imagesTs" / "p_005_0000.nii.gz")
    dataset_json(tmp_path, channel_names={"0": "T1"}, labels={"background": 0, "both": [1, 2], "part": 2})
    found = prepare_pairs(tmp_path)
    assert [len(items) for items in found.values()] == [2, 1, 1]
    assert found["test"][0]["subject"] == "p_004" and found["test"][0]["name"] == "p_004_0000"
    label(tmp_path / "labelsTr" / "p_002.nii.gz", (0, 3))
    assert "labelsTr/p_002.nii.gz has unknown values 3 (the classes are 0-2; " in refused(tmp_path)
    label(tmp_path / "labelsTr" / "p_002.nii.gz")
    image(tmp_path / "imagesTr" / "p_002_0001.nii.gz")
    assert "p_002_0001.nii.gz: a further channel" in refused(tmp_path)


def test_the_lists_of_a_dataset_json_are_the_split(tmp_path):
    folder(tmp_path, ("p1", "p2", "p3", "p4", "p5"))
    lists = {"training": [pair("p1"), pair("p4") | {"subject": "x"}], "validation": [pair("p2")], "test": [pair("p3")]}
    file = dataset_json(tmp_path, **lists | {"test": [*lists["test"], "./images/p5.nii.gz"]})
    for path in (tmp_path, file):
        found = prepare_pairs(path, val_fraction=0.5, seed=1)
        assert [names(items) for items in found.values()] == [{"p1", "p4"}, {"p2"}, {"p3"}]
        assert {item["subject"] for item in found["training"]} == {"p1", "x"}


def test_an_empty_list_validation_means_none(tmp_path):
    folder(tmp_path)
    dataset_json(tmp_path, training=[pair(f"p{i}") for i in (1, 2, 3, 4)], validation=[])
    assert [len(items) for items in prepare_pairs(tmp_path, val_fraction=0.5).values()] == [4, 0, 0]


def test_validation_is_drawn_from_training_only(tmp_path):
    folder(tmp_path, ("p1", "p2", "p3", "p4", "p5"))
    dataset_json(tmp_path, training=[pair(f"p{i}") for i in (1, 2, 3, 4)], test=[pair("p5")])
    for seed in range(5):
        found = prepare_pairs(tmp_path, val_fraction=0.5, seed=seed)
        assert [len(items) for items in found.values()] == [2, 2, 1] and names(found["test"]) == {"p5"}
        assert found == prepare_pairs(tmp_path, val_fraction=0.5, seed=seed)


def test_a_dataset_json_of_nnunet_1_lists_images_without_channel(tmp_path):
    folder(tmp_path, ("p1", "p2"), suffix="_0000")
    dataset_json(tmp_path, training=[pair("p1"), pair("p2")], labels={"0": "background", "1": "a", "2": "b"})
    found = prepare_pairs(tmp_path, val_fraction=0)
    assert names(found["training"]) == {"p1_0000", "p2_0000"}


def test_one_subject_in_two_lists_is_warned_of(tmp_path, caplog):
    folder(tmp_path, ("p1_T1", "p1_T2", "p2"))
    dataset_json(tmp_path, training=[pair("p1_T1"), pair("p2")], test=[pair("p1_T2")])
    prepare_pairs(tmp_path, val_fraction=0)
    assert "has scans of p1 in training and in test" in caplog.text


def test_the_split_is_kept_as_a_data_set_also_of_a_single_subject(tmp_path):
    def again(first, output):
        found = prepare_pairs(tmp_path / output / "datalist.json", tmp_path / f"{output} again")
        assert {split: names(items) for split, items in found.items()} == first
        listed = [tmp_path / name / "datalist.json" for name in (output, f"{output} again")]
        assert listed[0].read_text() == listed[1].read_text()

    for output, cases in {"three": ("p1", "p2", "p3"), "one": ("p1_T1", "p1_T2")}.items():
        for val_fraction in (0, 0.5):
            root = folder(tmp_path / f"set of {output}", cases)
            found = prepare_pairs(root, tmp_path / f"{output} {val_fraction}", val_fraction=val_fraction, seed=1)
            again({split: names(items) for split, items in found.items()}, f"{output} {val_fraction}")
    assert found["training"] == found["validation"] and len(found["training"]) == 2
    assert names(prepare_test_pairs(tmp_path / "one 0.5" / "datalist.json")) == {"p1_T1", "p1_T2"}


def test_fewer_subjects_are_a_subset_of_more(tmp_path):
    folder(tmp_path, [f"p{i}_{scan}" for i in range(8) for scan in ("T1", "T2")])
    options = {"val_fraction": 0.25, "seed": 3, "output_dir": tmp_path / "out"}
    everything = prepare_pairs(tmp_path, **options)
    drawn = {n: prepare_pairs(tmp_path, max_subjects=n, **options) for n in (1, 2, 4, 6)}
    for n, found in drawn.items():
        assert found["validation"] == everything["validation"]
        assert len({item["subject"] for item in found["training"]}) == n and len(found["training"]) == 2 * n
    assert names(drawn[1]["training"]) < names(drawn[2]["training"]) < names(drawn[4]["training"])
    assert drawn[6] == everything
    others = [
        names(prepare_pairs(tmp_path, tmp_path / "out", max_subjects=2, seed=seed)["training"]) for seed in range(4)
    ]
    assert len(set(map(frozenset, others))) > 1
    assert "max_subjects must be from 1 to 6, the subjects to train on, got 7" in refused(
        tmp_path, max_subjects=7, **options
    )
    assert "max_subjects takes an integer of at least 1 or all, not 0" in refused(tmp_path, max_subjects=0, **options)


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit
# ---------------------------------------------------------------------------------------------------------------------


def test_all_mismatches_are_listed_at_once(tmp_path, caplog):
    root, out = folder(tmp_path / "set", ("good1", "good2")), tmp_path / "out"
    image(root / "images" / "unlabelled.nii.gz")
    label(root / "labels" / "orphan.nii.gz")
    for case, options in {
        "shape": {"shape": (10, 10, 9)},
        "shifted": {"affine": AFFINE + np.array([[0, 0, 0, 3.0]] + [[0] * 4] * 3)},
        "flipped": {"affine": AFFINE @ np.diag([1, 1, -1, 1])},
        "values": {"values": (0, 1, 7, 8, 9, 255)},
        "negative": {"values": (-1, 0, 1), "dtype": np.int16},
        "fraction": {"values": (0, 0.5, 1), "dtype": np.float32},
        "4d": {"shape": (*SHAPE, 3)},
        "two": {"shape": (12, 9, 9), "values": (0, 4)},
    }.items():
        image(root / "images" / f"{case}.nii.gz")
        label(root / "labels" / f"{case}.nii.gz", **options)
    image(root / "images" / "cut.nii.gz")
    cut = label(root / "labels" / "cut.nii.gz")
    cut.write_bytes(cut.read_bytes()[:-40])
    message = refused(root, out, classes=3)
    for text in (
        "11 of 13 images with label maps in",
        "images/unlabelled.nii.gz: its label map labels/unlabelled.nii.gz is missing",
        "labels/orphan.nii.gz: a label map without an image",
        "labels/shape.nii.gz has another shape: 10x10x9, the image 12x10x9",
        "labels/shifted.nii.gz has another affine: it lies up to 3 mm off the image\n",
        "labels/flipped.nii.gz has another affine: it lies up to 32 mm off the image, and its axes are PSL, the "
        "image's PSR",
        "labels/values.nii.gz has unknown values 7-9, 255 (the classes are 0-2; others need --class_names and "
        "--network_def#out_channels)",
        "labels/negative.nii.gz has unknown values -1 (",
        "labels/fraction.nii.gz: its values are not integers (such as 0.5)",
        "labels/4d.nii.gz: 4D (shape 12x10x9x3)",
        "labels/two.nii.gz has another shape: 12x9x9, the image 12x10x9; its label map labels/two.nii.gz has unknown "
        "values 4",
        "labels/cut.nii.gz: truncated or corrupt",
        "--data_options#skip_unreadable true",
    ):
        assert text in message
    assert "good" not in message
    assert sum("unusable" in row["status"] for row in rows(out)) == 11

    found = prepare_pairs(root, out, classes=3, skip_unreadable=True, val_fraction=0.5)
    assert names(found["training"]) | names(found["validation"]) == {"good1", "good2"}
    assert "Unusable: labels/orphan.nii.gz" in caplog.text


def test_what_fits_in_other_ways(tmp_path):
    """Float labels, a scaled one, a trailing side, a rounded affine, a subfolder and an uncompressed file."""
    folder(tmp_path, ("site/p1", "p2", "p3"))
    label(tmp_path / "labels" / "p2.nii.gz", dtype=np.float64, shape=(*SHAPE, 1), affine=AFFINE + 1e-3 * np.eye(4))
    (tmp_path / "labels" / "p3.nii.gz").unlink()
    scaled = nib.Nifti1Image(np.resize(np.array([0, 3, 6], np.int16), SHAPE), AFFINE)
    scaled.header.set_slope_inter(0.33333, 0)
    nib.save(scaled, tmp_path / "labels" / "p3.nii")
    with nib.openers.Opener(tmp_path / "labels" / "p3.nii", "r+b") as file:  # nibabel divides by the slope itself
        file.seek(352)
        file.write(np.resize(np.array([0, 3, 6], np.int16), SHAPE).tobytes(order="F"))
    found = prepare_pairs(tmp_path, classes={"0": "background", "1": "a", "2": "b"}, val_fraction=0)
    assert names(found["training"]) == {"p1", "p2", "p3"}
    loaded = LoadScand(["image", "label"])(next(item for item in found["training"] if item["name"] == "p3"))
    assert loaded["label"].unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype, top", [(np.int16, 100), (np.uint8, 10), (np.int16, 7)])
def test_floats_that_nibabel_squeezes_into_the_images_type_are_class_numbers(dtype, top, tmp_path):
    """`nib.Nifti1Image(floats, affine, image.header)`: nibabel scales them, and they come back a little off."""
    folder(tmp_path)
    classes = np.resize(np.arange(top + 1, dtype=np.float64), SHAPE)
    header = nib.Nifti1Image(np.zeros(SHAPE, dtype), AFFINE).header
    nib.save(nib.Nifti1Image(classes, AFFINE, header), tmp_path / "labels" / "p2.nii.gz")
    assert np.any(nib.load(tmp_path / "labels" / "p2.nii.gz").get_fdata() != classes)
    found = prepare_pairs(tmp_path, classes=top + 1, val_fraction=0)["training"]
    loaded = LoadScand(["image", "label"])(next(item for item in found if item["name"] == "p2"))
    assert np.array_equal(loaded["label"][0].numpy(), classes)


def test_a_map_of_probabilities_is_none_of_class_numbers(tmp_path):
    folder(tmp_path)
    soft = np.resize(np.linspace(0, 1, 50), SHAPE)
    header = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), AFFINE).header
    nib.save(nib.Nifti1Image(soft, AFFINE, header), tmp_path / "labels" / "p2.nii.gz")
    assert "not integers" in refused(tmp_path, classes=3)


def test_empty_label_maps_and_absent_classes_are_warned_of(tmp_path, caplog):
    folder(tmp_path)
    label(tmp_path / "labels" / "p2.nii.gz", (0,))
    found = prepare_pairs(tmp_path, tmp_path / "out", classes=6, val_fraction=0)
    assert len(found["training"]) == 4
    assert "empty (background only) for images/p2.nii.gz" in caplog.text
    assert "The classes 3-5 are in none of the 4 label maps" in caplog.text
    assert any(row["status"] == "usable; empty label map" for row in rows(tmp_path / "out"))


def test_wrong_places_and_arguments_are_explained(tmp_path):
    image(tmp_path / "flat" / "p1.nii.gz")
    assert "found no labelled images" in refused(tmp_path / "flat") and "dataset.json" in refused(tmp_path / "flat")
    assert "found no labelled images" in refused(tmp_path / "flat" / "p1.nii.gz")
    with pytest.raises(FileNotFoundError, match="Did you mean .*flat"):
        prepare_pairs(tmp_path / "flatt")
    folder(tmp_path / "set")
    assert "classes must be at least 2" in refused(tmp_path / "set", classes=1)
    assert "val_fraction takes a number in [0, 1), not 1" in refused(tmp_path / "set", val_fraction=1)
    file = dataset_json(tmp_path / "set", test=[pair("p1")])
    assert "nothing to train on in" in (message := refused(file)) and 'its list "training"' in message
    dataset_json(tmp_path / "set", training=[pair("p1"), pair("p9"), {"image": "images/p2.nii.gz"}])
    message = refused(file)
    assert "images/p9.nii.gz: no such file" in message and "images/p2.nii.gz: it has no label map" in message
    dataset_json(tmp_path / "set", training=[pair("p1")], test=[pair("p1")])
    assert "p1.nii.gz twice" in refused(file)
    file.write_text("{")
    assert "is not valid JSON" in refused(file)


def test_unchanged_pairs_are_not_read_again(tmp_path, monkeypatch):
    folder(tmp_path / "set")
    first = prepare_pairs(tmp_path / "set", tmp_path / "out", classes=3)

    def fail(*_):
        raise AssertionError("was read again")

    fail.__name__ = "check_label"
    monkeypatch.setattr(data.check, "check_label", fail)
    assert prepare_pairs(tmp_path / "set", tmp_path / "out", classes=3) == first
    assert "p3.nii.gz has unknown values 2" in refused(tmp_path / "set", tmp_path / "out", classes=2)
    label(tmp_path / "set" / "labels" / "p3.nii.gz", (0, 1, 1, 1, 2))
    with pytest.raises(ValueError, match="p3.nii.gz: cannot be read"):
        prepare_pairs(tmp_path / "set", tmp_path / "out", classes=3)


# ---------------------------------------------------------------------------------------------------------------------
# What to evaluate on
# ---------------------------------------------------------------------------------------------------------------------


def test_the_test_list_is_evaluated_else_validation_else_all(tmp_path, caplog):
    folder(tmp_path)
    assert names(prepare_test_pairs(tmp_path)) == {"p1", "p2", "p3", "p4"}
    assert "including those that may have been trained on" in caplog.text
    caplog.clear()
    dataset_json(tmp_path, training=[pair("p1"), pair("p9")], validation=[pair("p2")])
    assert names(prepare_test_pairs(tmp_path, classes=3)) == {"p2"}
    dataset_json(tmp_path, training=[pair("p1")], validation=[pair("p2")], test=[pair("p3"), pair("p8"), pair("p4")])
    assert names(prepare_test_pairs(tmp_path, tmp_path / "out", classes=3)) == {"p3", "p4"}
    assert "Unusable: images/p8.nii.gz" in caplog.text and "trained on" not in caplog.text
    with pytest.raises(ValueError, match="p8.nii.gz: no such file"):
        prepare_test_pairs(tmp_path, skip_unreadable=False)


# ---------------------------------------------------------------------------------------------------------------------
# What to infer from
# ---------------------------------------------------------------------------------------------------------------------


def test_inputs_of_a_folder(tmp_path, caplog):
    caplog.set_level(logging.INFO, "sspformer")
    root = tmp_path / "in"
    image(root / "my scan (1).nii.gz")
    image(root / "a" / "x.nii.gz")
    image(root / "b" / "X.nii")
    label(root / "a" / "x_seg.nii.gz")
    image(root / "out" / "x_denoised.nii.gz")
    save(root / "series.nii.gz", np.zeros((*SHAPE, 4), np.int16))
    save(root / "slice.nii.gz", np.zeros((9, 9, 1), np.int16))
    (root / "empty.nii.gz").write_bytes(b"")
    (root / "notes.txt").write_text("no scan")
    found = find_inputs(root, root / "out")
    assert json.loads(json.dumps(found)) == found
    assert [item["source"] for item in found] == sorted(item["source"] for item in found)
    usable = {item["source"]: item["name"] for item in found if "reason" not in item}
    assert usable == {"my scan (1).nii.gz": "my scan (1)", "a/x.nii.gz": "x_a", "b/X.nii": "X_b"}
    reasons = {item["source"]: item["reason"] for item in found if "image" not in item}
    assert reasons == {
        "series.nii.gz": "4D (shape 12x10x9x4): split it into 3D volumes first",
        "slice.nii.gz": "a 2D image",
        "empty.nii.gz": "empty file (0 bytes)",
    }
    assert "1 label maps" in caplog.text


def test_inputs_of_one_file_and_of_nothing(tmp_path):
    path = image(tmp_path / "mask.nii.gz")  # named like a label map, but asked for
    assert find_inputs(path, tmp_path) == [{"name": "mask", "source": "mask.nii.gz", "image": str(path)}]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no scan in .*none"):
        find_inputs(tmp_path / "none")
    with pytest.raises(ValueError, match="output_dir .* is dataset_dir itself"):
        find_inputs(tmp_path, tmp_path)


def test_names_stay_unique_and_begin_with_the_stem(tmp_path):
    for path in ("x.nii", "x.nii.gz", "a/x.nii.gz", "a/b/x.nii.gz", "c/b/x.nii.gz", "X-2.nii.gz"):
        image(tmp_path / path)
    found = find_inputs(tmp_path)
    assert len({item["name"].lower() for item in found}) == len(found) == 6
    for item in found:
        stem = item["source"].rpartition("/")[2].split(".")[0]
        assert item["name"].startswith(stem)


def test_voxels_that_are_no_numbers_are_refused_when_read(tmp_path):
    array = np.ones(SHAPE, np.float32)
    array[0, 0, :2] = np.nan, np.inf
    [item] = find_inputs(save(tmp_path / "nan.nii.gz", array))
    with pytest.raises(ValueError, match="nan.nii.gz: 2 voxels are NaN or infinite"):
        LoadScand()(item)


# ---------------------------------------------------------------------------------------------------------------------
# DICOM
# ---------------------------------------------------------------------------------------------------------------------


def test_inputs_of_dicom_series(tmp_path):
    array = np.random.default_rng(0).integers(0, 1000, SHAPE).astype(np.int16)
    dicom_series(tmp_path / "head scan", array, series="1.2.3.4")
    dicom_series(tmp_path / "head scan", array + 1, series="1.2.3.5")
    found = find_inputs(tmp_path)
    assert [item["name"] for item in found] == ["head scan_series4", "head scan_series5"]
    assert {item["source"] for item in found} == {"head scan"}
    assert not any(word in json.dumps(found) for word in PHI)
    for item, expected in zip(found, (array, array + 1), strict=True):
        assert np.array_equal(LoadScand()(item)["image"][0], expected)
    assert [item["source"] for item in find_inputs(tmp_path / "head scan")] == ["head scan"] * 2


def test_a_dicom_series_with_a_label_map_on_its_grid(tmp_path):
    for case in ("p1", "p2"):
        dicom_series(tmp_path / "images" / case, series=f"1.2.{case[1]}", patient_id=case)
        label(tmp_path / "labels" / f"{case}.nii.gz", affine=oblique_affine())
    listed = dataset_json(
        tmp_path, training=[{"image": f"images/{case}", "label": f"labels/{case}.nii.gz"} for case in ("p1", "p2")]
    )
    by_list = prepare_pairs(listed, classes=3, val_fraction=0)["training"]
    listed.unlink()
    assert prepare_pairs(tmp_path, classes=3, val_fraction=0)["training"] == by_list
    for item in by_list:
        loaded = LoadScand(["image", "label"])(item)
        assert np.allclose(loaded["image"].affine, loaded["label"].affine, atol=1e-5)
    label(tmp_path / "labels" / "p2.nii.gz", affine=oblique_affine() @ np.diag([1, -1, 1, 1]))
    assert "labels/p2.nii.gz has another affine" in refused(tmp_path, classes=3)
