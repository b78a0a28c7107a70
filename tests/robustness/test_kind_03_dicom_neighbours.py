"""Identity of DICOM, the neighbours: UIDs that are odd in other ways, in other folders."""

import numpy as np
import pydicom
import pytest
from odd_inputs import dicom_series, head, infer, rows, stand_in
from pydicom.uid import generate_uid

from sspformer.data import DatasetOptions, find_inputs, prepare_datalist
from sspformer.io import LoadScand

ONE, TWO = (head((12, 12, 12), seed=seed).astype(np.uint16) for seed in (1, 2))
SAME = {"series": "1.2.3", "patient": "", "elements_of": lambda k: {"SOPInstanceUID": f"1.2.3.{k}"}}


def found(folder):
    """The usable scans of a folder, each with its voxels; and the rows of scans.csv."""
    out = folder.parent / "out"
    items = prepare_datalist(DatasetOptions(folder, out, val_fraction=0, skip_unreadable=True))["training"]
    return [LoadScand()(item)["image"][0].numpy() for item in items], rows(out)


def assert_are(scans, *arrays):
    assert len(scans) == len(arrays)
    assert all(any(np.array_equal(scan, array) for scan in scans) for array in arrays)


def in_two_folders(folder, array, **elements):
    """A series over two folders, as disks are written."""
    for path in dicom_series(folder / "0001", array, **elements)[5:]:
        (folder / "0002").mkdir(exist_ok=True)
        path.rename(folder / "0002" / path.name)


def test_people_without_a_name_and_with_the_same_uids_are_two(tmp_path):
    dicom_series(tmp_path / "in" / "a", ONE, **SAME)
    dicom_series(tmp_path / "in" / "b", TWO, **SAME)
    scans, table = found(tmp_path / "in")
    assert_are(scans, ONE, TWO)
    assert all("UIDs" in row["status"] for row in table)


def test_slices_of_two_people_between_each_other_are_not_stacked(tmp_path):
    """Equal steps, half a step apart: together they would be an even stack of twice as many slices."""
    for i, array in enumerate((ONE, TWO)):
        places = {
            **SAME,
            "elements_of": lambda k, i=i: {
                "SOPInstanceUID": f"1.2.3.{k}",
                "ImagePositionPatient": [0, 0, 3 * k + 1.5 * i],
            },
        }
        dicom_series(tmp_path / "in" / "ab"[i], array, **places)
    assert_are(found(tmp_path / "in")[0], ONE, TWO)


def test_a_series_over_two_folders_and_its_defaced_copy(tmp_path):
    in_two_folders(tmp_path / "in" / "original", ONE, **SAME)
    in_two_folders(tmp_path / "in" / "defaced", TWO, **SAME)
    dicom_series(tmp_path / "in" / "copy of the original", ONE, **SAME)
    scans, table = found(tmp_path / "in")
    assert_are(scans, ONE, TWO)
    assert sum("12 duplicate files left out" in row["status"] for row in table) == 1


def test_half_a_series_is_never_a_scan_because_a_copy_differs(tmp_path):
    """Nothing says that the two folders belong together, so all is refused, once."""
    in_two_folders(tmp_path / "in", ONE, **SAME)
    dicom_series(tmp_path / "in" / "defaced", TWO, **SAME)
    dicom_series(tmp_path / "in" / "good", ONE, series="1.2.4")
    scans, table = found(tmp_path / "in")
    assert_are(scans, ONE)
    (reason,) = (row["status"] for row in table if row["status"].startswith("unusable"))
    assert "in/0001/001.dcm" in reason and "in/defaced/001.dcm" in reason


def test_copies_need_no_equal_uids(tmp_path):
    for folder in "ab":
        dicom_series(tmp_path / "in" / folder, ONE, elements_of=lambda k: {"SOPInstanceUID": generate_uid()})
    scans, table = found(tmp_path / "in")
    assert_are(scans, ONE)
    assert "12 duplicate files left out" in table[0]["status"]


def test_a_copy_with_another_rescaling_is_none(tmp_path):
    dicom_series(tmp_path / "in" / "a", ONE, **SAME)
    dicom_series(tmp_path / "in" / "b", ONE, **SAME, RescaleSlope=2, RescaleIntercept=0)
    assert_are(found(tmp_path / "in")[0], ONE, 2.0 * ONE)


def test_a_broken_copy_costs_no_scan(tmp_path):
    dicom_series(tmp_path / "in" / "a", ONE, **SAME)
    broken = dicom_series(tmp_path / "in" / "b", ONE, **SAME)[4]
    broken.write_bytes(broken.read_bytes()[:-50])
    scans, table = found(tmp_path / "in")
    assert_are(scans, ONE)
    assert "truncated" in table[-1]["status"]


@pytest.mark.parametrize(
    "uids", [("SeriesInstanceUID", "StudyInstanceUID"), ("SeriesInstanceUID", "FrameOfReferenceUID")]
)
def test_slices_with_more_uids_of_their_own_are_refused_once(uids, tmp_path):
    dicom_series(tmp_path / "in", ONE, elements_of=lambda k: {uid: generate_uid() for uid in uids})
    (item,) = find_inputs(tmp_path / "in")
    assert "SeriesInstanceUID of its own" in item["reason"]


def test_two_slices_are_not_joined(tmp_path):
    dicom_series(tmp_path / "in", ONE, only=[0, 5], elements_of=lambda k: {"SeriesInstanceUID": f"1.2.3.{k}"})
    (item,) = find_inputs(tmp_path / "in")
    assert "reason" in item


def test_single_images_of_several_series_stay_apart(tmp_path):
    own = {"elements_of": lambda k: {"SeriesInstanceUID": f"1.2.3.{k}", "SeriesNumber": k}}
    dicom_series(tmp_path / "in", ONE, only=[0, 5, 9], **own)
    assert len(find_inputs(tmp_path / "in")) == 3


def test_voxels_are_read_only_in_doubt(tmp_path, monkeypatch):
    dicom_series(tmp_path / "in" / "a", ONE, series="1.2.3", patient="A")
    dicom_series(tmp_path / "in" / "b", TWO, series="1.2.3", patient="B")
    monkeypatch.setattr("sspformer.data.series.hash_voxels", lambda files: pytest.fail(str(files)))
    assert len(find_inputs(tmp_path / "in")) == 2


def test_names_of_odd_series_numbers(tmp_path):
    """A number as long as a date is not shown."""
    for path in dicom_series(tmp_path / "in", ONE):
        ds = pydicom.dcmread(path)
        ds.SeriesNumber = 19620914
        ds.save_as(path)
    assert [item["name"] for item in find_inputs(tmp_path / "in")] == ["in_seriesx"]


@pytest.mark.parametrize(
    "uids", [{"SOPInstanceUID": "1.2.3.9"}, {"elements_of": lambda k: {"SeriesInstanceUID": f"1.2.3.{k}"}}]
)
def test_dicom_results_refer_to_no_series_with_such_uids(uids, tmp_path):
    """The NIfTI is right; a DICOM SEG could not say which slice is whose."""
    pytest.importorskip("highdicom")
    dicom_series(tmp_path / "in", ONE, **uids)
    (row,) = infer(tmp_path / "in", tmp_path / "out", dicom=True, **stand_in(tmp_path)).values()
    assert row["status"] == "failed" and "no result can refer to the series" in row["reason"]
    assert not list((tmp_path / "out").glob("*.dcm")) and list((tmp_path / "out").glob("*_seg.nii.gz"))
