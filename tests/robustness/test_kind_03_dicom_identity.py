"""Identity of DICOM: a copy is what has equal pixels and geometry; UIDs alone neither part nor join scans."""

import numpy as np
import pytest
from odd_inputs import accepted, datalist, dicom_series, head, inputs, items_of, load, nifti, refused, rows

ONE, TWO = (head(seed=seed).astype(np.uint16) for seed in (1, 2))
TWO[6:12] += 300
UID = "1.2.826.0.1.3680043.8.498.1"


def found_in(folder, **options):
    """Items of a data set, read, by subject: [(subject, voxels)]."""
    items = items_of(accepted(datalist, folder, val_fraction=0, **options))
    return [(item["subject"], load(item["image"])[0].numpy()) for item in items]


def assert_same(found, *volumes):
    """These volumes are what was found, in any order."""
    assert len(found) == len(volumes), [subject for subject, _ in found]
    for volume in volumes:
        assert any(np.array_equal(voxels, volume) for _, voxels in found)


def test_uids_that_start_at_1_for_each_patient_drop_nobody(tmp_path):
    for name, volume in (("P1", ONE), ("P2", TWO)):
        dicom_series(
            tmp_path / name, volume, patient=name, series=UID, elements_of=lambda k: {"SOPInstanceUID": f"{UID}.{k}"}
        )
    found = found_in(tmp_path)
    assert_same(found, ONE, TWO)
    assert len({subject for subject, _ in found}) == 2
    assert len(inputs(tmp_path)) == 2 and not any("reason" in item for item in inputs(tmp_path))


@pytest.mark.parametrize("shift", [0, 500])
def test_one_series_uid_of_two_patients_with_slices_of_their_own(shift, tmp_path):
    for i, (name, volume) in enumerate((("P1", ONE), ("P2", TWO))):
        dicom_series(
            tmp_path / name,
            volume,
            patient=name,
            series=UID,
            elements_of=lambda k, i=i: {"ImagePositionPatient": [-20, -20, 3 * k + i * shift]},
        )
    found = found_in(tmp_path)
    assert_same(found, ONE, TWO)
    assert len({subject for subject, _ in found}) == 2


@pytest.mark.parametrize("missing", [None, 9])
def test_an_original_and_a_defaced_copy_with_the_same_uids_are_never_mixed(missing, tmp_path):
    """Two scans of one subject or, where a slice of the copy is gone, the original and a reason that names the copy."""
    same = {"series": UID, "elements_of": lambda k: {"SOPInstanceUID": f"{UID}.{k}"}}
    dicom_series(tmp_path / "orig", ONE, **same)
    copy = dicom_series(tmp_path / "defaced", np.where(np.arange(24)[:, None, None] < 4, 0, ONE), **same)
    if missing is not None:
        copy[missing].unlink()
    faceless = np.where(np.arange(24)[:, None, None] < 4, 0, ONE)
    found = found_in(tmp_path, skip_unreadable=True, output_dir=tmp_path.parent / f"{tmp_path.name} out")
    if missing is None:
        assert_same(found, ONE, faceless)
    else:
        assert_same(found, ONE)
        said = [row["status"] for row in rows(tmp_path.parent / f"{tmp_path.name} out") if "unusable" in row["status"]]
        assert len(said) == 1
    assert len({subject for subject, _ in found}) == 1


@pytest.mark.parametrize("uid", [UID + ".7", None, ""])
def test_slices_of_one_sop_instance_uid_or_none_are_one_volume(uid, tmp_path):
    dicom_series(tmp_path / "P1", ONE, series=UID, SOPInstanceUID=uid)
    assert_same(found_in(tmp_path), ONE)


@pytest.mark.parametrize("number", [3, None])
def test_a_series_uid_for_each_slice_is_one_volume_or_one_reason(number, tmp_path):
    """As Canon's consoles write: joined by series number (as dcm2niix -m 2 does); without one there is one reason."""
    dicom_series(tmp_path / "P1", ONE, elements_of=lambda k: {"SeriesInstanceUID": f"{UID}.{k}"}, SeriesNumber=number)
    if number:
        assert_same(found_in(tmp_path), ONE)
    else:
        assert refused(datalist, tmp_path, says="SeriesInstanceUID").count("2D image") <= 1
    assert len(inputs(tmp_path)) == 1


@pytest.mark.parametrize("layout", ["two folders", "nested", "flat beside another"])
def test_a_true_copy_counts_once(layout, tmp_path):
    """Equal pixels, geometry and UIDs: one is taken, and the table says that there were two."""
    same = {"series": UID, "elements_of": lambda k: {"SOPInstanceUID": f"{UID}.{k}"}}
    dicom_series(tmp_path / "in" / "a", ONE, **same)
    for i, path in enumerate(dicom_series(tmp_path / "in" / ("a/b" if layout == "nested" else "b"), ONE, **same)):
        if layout == "flat beside another":
            path.rename(tmp_path / "in" / "a" / f"copy{i}.dcm")
    found = found_in(tmp_path / "in", output_dir=tmp_path / "out")
    assert_same(found, ONE)
    assert any("duplicate" in row["status"] or "cop" in row["status"] for row in rows(tmp_path / "out"))


def test_a_series_that_lies_in_several_folders_is_one(tmp_path):
    """As disks write them, so many files a folder: a folder alone does not part a series."""
    files = dicom_series(tmp_path / "0001", ONE, series=UID)
    for path in files[10:]:
        (tmp_path / "0002").mkdir(exist_ok=True)
        path.rename(tmp_path / "0002" / path.name)
    assert_same(found_in(tmp_path), ONE)


def test_two_series_in_one_folder_stay_two(tmp_path):
    dicom_series(tmp_path / "all", ONE, series=UID + ".1", SeriesNumber=1)
    for path in dicom_series(tmp_path / "other", TWO, series=UID + ".2", SeriesNumber=2):
        path.rename(tmp_path / "all" / f"b{path.name}")
    found = found_in(tmp_path)
    assert_same(found, ONE, TWO)
    assert len({subject for subject, _ in found}) == 1


def test_two_frames_of_reference_under_one_series_uid_are_two_scans(tmp_path):
    """The patient was moved between them; both lie in one folder."""
    dicom_series(tmp_path / "all", ONE, series=UID, FrameOfReferenceUID=UID + ".1")
    for path in dicom_series(tmp_path / "other", TWO, series=UID, FrameOfReferenceUID=UID + ".2"):
        path.rename(tmp_path / "all" / f"b{path.name}")
    assert_same(found_in(tmp_path), ONE, TWO)


def test_two_studies_under_one_series_uid_are_two_scans(tmp_path):
    dicom_series(tmp_path / "all", ONE, series=UID, StudyInstanceUID=UID + ".1")
    for path in dicom_series(tmp_path / "other", TWO, series=UID, StudyInstanceUID=UID + ".2"):
        path.rename(tmp_path / "all" / f"b{path.name}")
    assert_same(found_in(tmp_path), ONE, TWO)


def test_what_stays_ambiguous_is_refused_and_names_both_sides(tmp_path):
    """Same patient, study, series, frame, folder and places, other pixels: nothing says which slice is whose."""
    same = {"series": UID, "elements_of": lambda k: {"SOPInstanceUID": f"{UID}.{k}"}}
    dicom_series(tmp_path / "all", ONE, **same)
    for path in dicom_series(tmp_path / "other", TWO, **same):
        path.rename(tmp_path / "all" / f"b{path.name}")
    (tmp_path / "other").rmdir()
    refused(datalist, tmp_path, says=["all/001.dcm", "b001.dcm"])


@pytest.mark.parametrize("count", [2, 3])
def test_echoes_at_one_place_are_refused_with_the_reason(count, tmp_path):
    for i in range(count):
        for path in dicom_series(tmp_path / f"e{i}", ONE + i, series=UID, EchoNumbers=i):
            path.rename(tmp_path / f"{i}{path.name}")
    refused(datalist, tmp_path, says="several images at one slice position")


def test_a_nifti_converted_from_a_series_beside_it_belongs_to_the_same_subject(tmp_path):
    dicom_series(tmp_path / "series", ONE, patient="P77")
    nifti(tmp_path / "P77_T1.nii.gz", ONE)
    assert len({subject for subject, _ in found_in(tmp_path)}) == 1
