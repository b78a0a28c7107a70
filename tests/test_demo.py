"""The demonstration dataset: laws of the files it writes, and what it does with folders that are already there."""

import builtins
import json
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from monai.transforms import LoadImage

from sspformer.demo import LABELS, PROTOCOLS, make_demo_dataset, make_demo_head

N_SUBJECTS = 3


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    return Path(make_demo_dataset(tmp_path_factory.mktemp("demo") / "set", n_subjects=N_SUBJECTS))


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    return Path(make_demo_dataset(tmp_path_factory.mktemp("demo") / "set", n_subjects=2, seed=1))


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_last_subject_is_a_dicom_series_and_the_others_are_nifti(demo):
    assert [path.name for path in sorted((demo / "images").glob("*.nii.gz"))] == ["demo_01.nii.gz", "demo_02.nii.gz"]
    assert [path.name for path in (demo / "images").iterdir() if path.is_dir()] == ["demo_03"]
    assert len(list((demo / "labels").iterdir())) == N_SUBJECTS


@pytest.mark.parametrize("name", ["demo_01", "demo_02"])
def test_labels_lie_on_the_image_grid(demo, name):
    image, labels = (nib.load(demo / kind / f"{name}.nii.gz") for kind in ("images", "labels"))
    assert image.shape == labels.shape
    np.testing.assert_array_equal(image.affine, labels.affine)
    assert set(np.unique(labels.dataobj)) == set(LABELS.values())


def test_dicom_series_lies_on_the_label_grid(demo):
    image = LoadImage(reader="PydicomReader", image_only=True)(demo / "images" / "demo_03")
    labels = nib.load(demo / "labels" / "demo_03.nii.gz")
    assert tuple(image.shape) == labels.shape
    np.testing.assert_allclose(image.affine, labels.affine, atol=1e-4)
    tissue = np.asarray(labels.dataobj)
    assert image.numpy()[tissue == LABELS["white matter"]].mean() > 5 * image.numpy()[tissue == 0].mean()


def test_dicom_headers_are_valid(demo):
    slices = [pydicom.dcmread(path) for path in sorted((demo / "images" / "demo_03").iterdir())]
    assert {ds.Modality for ds in slices} == {"MR"}
    assert {ds.PatientID for ds in slices} == {"demo_03"}
    assert len({ds.SeriesInstanceUID for ds in slices}) == 1
    assert len({ds.SOPInstanceUID for ds in slices}) == len(slices)
    for ds in slices:
        assert ds.SOPClassUID == ds.file_meta.MediaStorageSOPClassUID == pydicom.uid.MRImageStorage
        assert ds.SOPInstanceUID == ds.file_meta.MediaStorageSOPInstanceUID
        assert pydicom.uid.UID(ds.SOPInstanceUID).is_valid
        assert ds.pixel_array.shape == (ds.Rows, ds.Columns)
    row, column = np.reshape(slices[0].ImageOrientationPatient, (2, 3)).astype(float)
    np.testing.assert_allclose([row @ row, column @ column, row @ column], [1, 1, 0], atol=1e-6)
    steps = np.diff([np.array(ds.ImagePositionPatient, float) for ds in slices], axis=0)
    np.testing.assert_allclose(
        steps, np.tile(np.cross(row, column) * slices[0].SliceThickness, (len(steps), 1)), atol=1e-5
    )


def test_tissues_differ_and_one_subject_has_inverted_contrast(demo):
    def grey_minus_white(name):
        image, labels = (np.asarray(nib.load(demo / kind / f"{name}.nii.gz").dataobj) for kind in ("images", "labels"))
        grey, white = (image[labels == LABELS[tissue]] for tissue in ("grey matter", "white matter"))
        return (grey.mean() - white.mean()) / np.hypot(grey.std(), white.std())

    assert grey_minus_white("demo_01") < -0.8  # T1: white matter is brighter
    assert grey_minus_white("demo_02") > 0.8  # T2: grey matter is brighter


def test_orientation_spacing_and_scale_vary(demo):
    first, second = (nib.load(demo / "images" / f"demo_{n:02d}.nii.gz") for n in (1, 2))
    assert nib.aff2axcodes(first.affine) != nib.aff2axcodes(second.affine)
    np.testing.assert_allclose(second.header.get_zooms(), (1, 1, 4))
    assert np.percentile(first.dataobj, 99.9) > 2 * np.percentile(second.dataobj, 99.9)
    assert len({p.axcodes for p in PROTOCOLS}) >= 6 and len({p.spacing for p in PROTOCOLS}) >= 5


def test_subjects_differ_in_shape_and_stay_inside_the_field_of_view(demo):
    volumes = []
    for path in sorted((demo / "labels").iterdir()):
        labels = nib.load(path)
        tissue = np.asarray(labels.dataobj)
        volumes.append((tissue > 0).sum() * np.prod(labels.header.get_zooms()) / 1e6)
        for axis in range(3):
            assert not tissue.take([0, -1], axis).any()
    assert all(1.2 < litres < 2.6 for litres in volumes)
    assert np.ptp(volumes) > 0.02


def test_marker_says_what_it_is(demo):
    marker = json.loads((demo / "demo.json").read_text())
    assert "not real subjects" in marker["statement"] and "McConnell Brain Imaging Centre" in marker["licence"]
    assert set(marker["files"]) == _contents(demo).keys() - {"demo.json"}
    assert not [path for path in demo.parent.iterdir() if path != demo]  # no workspace is left behind


def test_a_complete_dataset_is_reused(small, monkeypatch):
    monkeypatch.setattr("sspformer.demo._load_template", lambda: pytest.fail("built again"))
    assert make_demo_dataset(small, n_subjects=2, seed=1) == str(small)


def test_a_damaged_dataset_is_rebuilt_byte_for_byte_and_another_seed_replaces_it(small, tmp_path):
    folder, expected = tmp_path / "set", _contents(small)
    shutil.copytree(small, folder)
    (folder / "labels" / "demo_02.nii.gz").unlink()
    (folder / "images" / "demo_01.nii.gz").write_bytes(b"")
    make_demo_dataset(folder, n_subjects=2, seed=1)
    assert _contents(folder) == expected

    make_demo_dataset(folder, n_subjects=2, seed=2)
    other = _contents(folder)
    assert other.keys() == expected.keys()
    assert other["images/demo_01.nii.gz"] != expected["images/demo_01.nii.gz"]
    assert json.loads(other["demo.json"])["seed"] == 2


def test_files_of_others_are_never_touched(small, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "scan.nii.gz").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"mine holds 1 file\(s\) that are not the demonstration dataset's.*scan"):
        make_demo_dataset(folder, n_subjects=2)
    assert _contents(folder) == {"scan.nii.gz": b"precious"}

    extra = small / "images" / "mine.nii.gz"
    extra.write_bytes(b"precious")
    try:
        with pytest.raises(ValueError, match="images/mine.nii.gz"):
            make_demo_dataset(small, n_subjects=3)
        assert extra.read_bytes() == b"precious"
    finally:
        extra.unlink()


def test_a_failed_build_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("sspformer.demo.write_series", fail)
    with pytest.raises(OSError, match="disk full"):
        make_demo_dataset(tmp_path / "set", n_subjects=2)
    assert not list(tmp_path.iterdir())


def test_without_nilearn_the_error_names_both_ways_out(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def no_nilearn(name, *args, **kwargs):
        if name.split(".")[0] == "nilearn":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_nilearn)
    with pytest.raises(ImportError, match=re.escape('pip install "sspformer[demo]"') + ".*--dataset_dir"):
        make_demo_dataset(tmp_path / "set")


@pytest.mark.parametrize("n_subjects", [-1, 0, 1])
def test_too_few_subjects_are_refused(tmp_path, n_subjects):
    with pytest.raises(ValueError, match=f"n_subjects is {n_subjects}"):
        make_demo_dataset(tmp_path / "set", n_subjects=n_subjects)


def test_the_head_of_the_demonstration_is_the_template_and_is_made_once(tmp_path):
    path = Path(make_demo_head(tmp_path / "new" / "head"))
    head = nib.load(path)
    assert (
        head.shape == (197, 233, 189) and np.allclose(head.header.get_zooms(), 1) and head.get_data_dtype() == np.uint8
    )
    assert [file.name for file in path.parent.iterdir()] == ["mni152.nii.gz"]
    before = path.stat().st_mtime_ns
    assert make_demo_head(tmp_path / "new" / "head") == str(path) and path.stat().st_mtime_ns == before
