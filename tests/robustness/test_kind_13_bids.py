"""BIDS: raw anatomical images are the scans, all else comes by an option, and what is left out is listed."""

import json

import numpy as np
import pytest
from odd_inputs import accepted, datalist, head, inputs, items_of, nifti, refused, rows

ANATOMICAL = [
    "sub-01/anat/sub-01_T1w.nii.gz",
    "sub-01/anat/sub-01_acq-highres_T2w.nii.gz",
    "sub-02/ses-1/anat/sub-02_ses-1_FLAIR.nii.gz",
    "sub-02/ses-1/anat/sub-02_ses-1_PDw.nii.gz",
    "sub-03/anat/sub-03_T2starw.nii",
    "sub-03/anat/sub-03_inplaneT2.nii.gz",
]
OTHERS = {
    "derivatives/fmriprep/sub-01/anat/sub-01_desc-preproc_T1w.nii.gz": "derivatives",
    "derivatives/x/sub-02/func/sub-02_task-rest_stat-z_statmap.nii.gz": "derivatives",
    "derivatives/x/sub-02/anat/sub-02_from-T1w_to-MNI_mode-image_xfm.nii.gz": "derivatives",
    "sourcedata/sub-01/scan.nii.gz": "sourcedata",
    "code/example.nii.gz": "code",
    "sub-01/fmap/sub-01_phasediff.nii.gz": "fmap",
    "sub-01/fmap/sub-01_magnitude1.nii.gz": "fmap",
    "sub-01/perf/sub-01_cbf.nii.gz": "perf",
    "sub-01/perf/sub-01_m0scan.nii.gz": "perf",
    "sub-01/func/sub-01_task-rest_bold.nii.gz": "func",
    "sub-01/func/sub-01_task-rest_sbref.nii.gz": "func",
    "sub-02/ses-1/dwi/sub-02_ses-1_dwi.nii.gz": "dwi",
    "sub-02/ses-1/swi/sub-02_ses-1_part-phase_GRE.nii.gz": "swi",
    "sub-02/ses-1/anat/sub-02_ses-1_T1map.nii.gz": "map",
    "sub-02/ses-1/anat/sub-02_ses-1_part-phase_T2starw.nii.gz": "phase",
    "sub-03/anat/sub-03_mod-T1w_defacemask.nii.gz": "mask",
    "sub-03/pet/sub-03_pet.nii.gz": "pet",
}


@pytest.fixture
def dataset(tmp_path):
    root = tmp_path / "ds000001"
    for i, name in enumerate([*ANATOMICAL, *OTHERS]):
        array = head((12, 12, 12), seed=i).astype(np.int16)
        if "bold" in name or "_dwi" in name:
            array = np.stack([array, array + 1], -1)
        if "xfm" in name:
            array = np.stack([array] * 3, -1)
        nifti(root / name, array)
    (root / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.8.0"}))
    return root


def images(lists, root):
    return sorted({str(item["image"]).removeprefix(f"{root}/") for item in items_of(lists)})


def test_the_raw_anatomical_images_of_a_bids_data_set_are_its_scans(dataset, tmp_path):
    assert images(accepted(datalist, dataset, tmp_path / "out"), dataset) == sorted(ANATOMICAL)


def test_what_is_left_out_is_listed_with_the_reason(dataset, tmp_path):
    accepted(datalist, dataset, tmp_path / "out", skip_unreadable=True)
    table = {row["path"]: row["status"] for row in rows(tmp_path / "out")}
    assert not [name for name in OTHERS if "left out" not in table.get(name, "")]


def test_all_else_comes_by_an_option(dataset, tmp_path):
    """`bids_suffixes`: "all" is what a folder that is no BIDS data set gives."""
    found = accepted(datalist, dataset, tmp_path / "out", skip_unreadable=True, bids_suffixes="all")
    names = images(found, dataset)
    assert set(ANATOMICAL) < set(names) and "sub-01/fmap/sub-01_magnitude1.nii.gz" in names


@pytest.mark.parametrize("part", ["sub-02", "sub-02/ses-1"])
def test_a_part_of_a_bids_data_set_is_one_too(part, dataset, tmp_path):
    """The description lies above the folder that is given."""
    wanted = sorted(name.removeprefix(f"{part}/") for name in ANATOMICAL if name.startswith(part))
    assert images(accepted(datalist, dataset / part, tmp_path / "out"), dataset / part) == wanted


def test_a_folder_of_derivatives_that_is_given_itself_is_taken(dataset, tmp_path):
    """Who names it means it: preprocessed T1w are a fine data set."""
    folder = dataset / "derivatives" / "fmriprep"
    assert len(items_of(accepted(datalist, folder, tmp_path / "out", val_fraction=0))) == 1


def test_a_datalist_is_taken_at_its_word(dataset, tmp_path):
    (tmp_path / "list.json").write_text(json.dumps({"training": [str(dataset / next(iter(OTHERS)))]}))
    assert len(items_of(accepted(datalist, tmp_path / "list.json", val_fraction=0))) == 1


def test_names_alone_make_no_bids_data_set(tmp_path):
    """Without dataset_description.json nothing is left out that was taken before."""
    for name in ("sub-01_T1w.nii.gz", "sub-01_cbf.nii.gz"):
        nifti(tmp_path / "in" / name)
    assert len(items_of(accepted(datalist, tmp_path / "in", val_fraction=0))) == 2


INTENTS = {
    "z-scores": (5, {}),
    "t-test": (3, {}),
    "p-values": (22, {}),
    "a correlation": (2, {}),
    "FSL's displacement field": (2006, {"volumes": 3}),
    "FSL's spline coefficients": (2007, {"volumes": 3}),
    "FSL's cosine coefficients": (2008, {"volumes": 3}),
    "a label map": (1002, {}),
    "names of structures": (1003, {}),
    "a displacement field": (1006, {"volumes": 3}),
    "colours": (2003, {"volumes": 3}),
}


@pytest.mark.parametrize("case", INTENTS)
def test_what_a_header_says_is_no_image_is_refused_with_what_it_is(case, tmp_path):
    """NIfTI's intent codes: statistics 2 to 24, labels 1002, vectors 1006, FSL's fields 2006 to 2009."""
    code, options = INTENTS[case]
    array = head((12, 12, 12)).astype(np.float32)
    if "volumes" in options:
        array = np.stack([array, array + 1, array - 1], -1)
    nifti(tmp_path / "p1.nii.gz", array, intent_code=code)
    refused(datalist, tmp_path, says="p1.nii.gz")
    (item,) = inputs(tmp_path)
    assert "reason" in item


def test_a_warp_without_an_intent_is_refused(tmp_path):
    """(X, Y, Z, 3) of numbers around 0: no magnitude has three volumes that are mostly below and above 0."""
    warp = np.random.default_rng(0).normal(0, 2, (12, 12, 12, 3)).astype(np.float32)
    nifti(tmp_path / "p1_warp.nii.gz", warp)
    refused(datalist, tmp_path, says=["p1_warp.nii.gz", ("displacement", "warp", "negative")])


def test_three_volumes_of_a_magnitude_are_a_series(tmp_path):
    nifti(tmp_path / "p1.nii.gz", np.stack([head((12, 12, 12), seed=i) for i in range(3)], -1))
    assert len(items_of(datalist(tmp_path, val_fraction=0))) == 3


def test_inference_lists_what_it_left_out(tmp_path, caplog):
    for name in ("a_T1.nii.gz", "b_brain_mask.nii.gz", "masks/c.nii.gz"):
        nifti(tmp_path / "in" / name)
    with caplog.at_level("INFO"):
        assert len(inputs(tmp_path / "in")) == 1
    assert "b_brain_mask.nii.gz" in caplog.text and "masks/c.nii.gz" in caplog.text


# --- neighbours


def test_the_layout_alone_makes_a_bids_data_set(dataset, tmp_path):
    (dataset / "dataset_description.json").unlink()
    assert images(accepted(datalist, dataset, tmp_path / "out"), dataset) == sorted(ANATOMICAL)


def test_several_data_sets_in_one_folder(dataset, tmp_path):
    nifti(tmp_path / "other" / "p1.nii.gz")
    found = images(accepted(datalist, tmp_path, val_fraction=0), tmp_path)
    assert found == sorted(["other/p1.nii.gz", *(f"{dataset.name}/{name}" for name in ANATOMICAL)])


@pytest.mark.parametrize("suffixes", [["FLAIR", "bold"], "FLAIR,bold", "FLAIR bold"])
def test_suffixes_choose_other_raw_images(suffixes, dataset):
    found = images(accepted(datalist, dataset, val_fraction=0, bids_suffixes=suffixes), dataset)
    assert found == ["sub-01/func/sub-01_task-rest_bold.nii.gz", "sub-02/ses-1/anat/sub-02_ses-1_FLAIR.nii.gz"]


@pytest.mark.parametrize("suffixes", [[], ["T1w*"], "../x", 3])
def test_odd_suffixes_are_refused(suffixes, dataset):
    refused(datalist, dataset, bids_suffixes=suffixes, says="bids_suffixes")


def test_a_folder_without_an_anatomical_image_says_what_to_do(dataset):
    refused(datalist, dataset / "sub-01" / "fmap", says=["bids_suffixes", "2 files left out"])


def test_freesurfers_folder_given_itself_is_taken(dataset):
    nifti(dataset / "derivatives" / "freesurfer" / "sub-01" / "mri" / "T1.nii.gz")
    assert len(items_of(accepted(datalist, dataset / "derivatives" / "freesurfer", val_fraction=0))) == 1


def test_inference_takes_the_same_images(dataset):
    assert sorted(item["source"] for item in inputs(dataset)) == sorted(ANATOMICAL)
