"""The folder of the benchmarks, built of small files in the layouts of the downloads."""

from __future__ import annotations

import shutil
import tarfile
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from benchmarks import prepare_data
from benchmarks.common import read_csv, scans
from sspformer.data import class_names

IXI = np.array([[0, 0, 2, -80], [-2, 0, 0, 120], [0, 2, 0, -120], [0, 0, 0, 1.0]])  # axes P-S-R
RAW = "open_ms_data-master/longitudinal/raw"


def write(path: Path, voxels: np.ndarray, affine: np.ndarray = IXI) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def row_of(file: str, shape: str = "6x8x5", spacing: str = "2x2x2", split: str = "train") -> dict[str, str]:
    row = {"file": file, "split": split, "subject": "sub-02", "contrast": "T1", "shape": shape, "spacing_mm": spacing}
    return row | {"licence": "CC0-1.0", "attribution": "made up"}


@pytest.fixture
def voxels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 200, (6, 8, 5)).astype(np.uint8)


@pytest.mark.parametrize(
    ("file", "download", "name"),
    [
        ("heads/ds002748_sub-02_T1.nii.gz", "ds002748", "sub-02/anat/sub-02_T1w.nii.gz"),
        ("heads/ds000011_sub-02_T2.nii.gz", "ds000011", "ds000011_R2.0.1/sub-02/anat/sub-02_inplaneT2.nii.gz"),
        (
            "heads/openms-cross_patient19_T1c.nii.gz",
            "open_ms_data",
            "cross_sectional/MNI/patient19/T1POST_N4_noneck_reduced_winsor_regtoFLAIR_brain_N4_regtoMNI.nii.gz",
        ),
        (
            "heads/openms-long_patient01-study2_T1.nii.gz",
            "open_ms_data",
            "longitudinal/raw/patient01/study2_T1W.nii.gz",
        ),
        (
            "heads/openms-long_patient01-study2_FLAIR.nii.gz",
            "open_ms_data",
            "longitudinal/raw/patient01/study2_FLAIR.nii.gz",
        ),
        (
            "heads/isles22_sub-strokecase0001_ADC.nii.gz",
            "isles22",
            "ISLES-2022/sub-strokecase0001/ses-0001/dwi/sub-strokecase0001_ses-0001_adc.nii.gz",
        ),
        ("heads/niivue_M2208_T2.nii.gz", "niivue", "images/M2208_T2w.nii.gz"),
        ("heads/torchio_fernando_T2.nii.gz", "named", "heads/torchio_fernando_T2.nii.gz"),
        (
            "hippocampus/images/hippocampus_001.nii.gz",
            "msd_hippocampus",
            "Task04_Hippocampus/imagesTr/hippocampus_001.nii.gz",
        ),
    ],
)
@pytest.mark.parametrize("packed", ["folder", "tar", "zip"])
def test_a_scan_is_found_by_its_name_in_the_download_and_copied(tmp_path, voxels, file, download, name, packed):
    published = write(tmp_path / "source" / name, voxels)
    junk = published.with_name(f"._{published.name}")  # of a Mac, in the MSD's archive
    junk.write_bytes(b"junk")
    archive = tmp_path / f"source.{packed}"
    if packed == "folder":
        archive = tmp_path / "source"
    elif packed == "tar":
        with tarfile.open(archive, "w") as tar:
            tar.add(tmp_path / "source", arcname=".")
    else:
        with zipfile.ZipFile(archive, "w") as folder:
            for member in (junk, published):
                folder.write(member, member.relative_to(tmp_path / "source"))
    rows = [row_of(file)]
    missing = prepare_data.prepare({download: prepare_data.Download([archive])}, tmp_path / "out", rows)
    assert [want.file for want in missing] == [file.replace("images", "labels")] * ("hippocampus" in file)
    assert (tmp_path / "out" / file).read_bytes() == published.read_bytes()
    assert read_csv(tmp_path / "out" / "manifest.csv") == rows
    assert not list((tmp_path / "out").rglob("part_*"))


def test_ixi_and_its_labels_come_from_nichart(tmp_path, voxels):
    name, rows = "IXI013-HH-1212", [row_of("brain_structures/images/IXI013-HH-1212.nii.gz")]
    image = write(tmp_path / "IXI" / "t1" / f"{name}_T1.nii.gz", voxels)
    first = [min(codes) for codes in prepare_data.STRUCTURES.values()]
    last = [max(codes) for codes in prepare_data.STRUCTURES.values()]
    truth = np.random.default_rng(1).integers(0, 18, voxels.shape)
    regions = np.where(voxels % 2, np.array([2, *first])[truth], np.array([63, *last])[truth])  # 2, 63: of no structure
    mirrored = np.diag([-1.0, 1, 1, 1])
    mirrored[0, 3] = len(truth) - 1  # stored the other way round, at the same places
    write(tmp_path / "IXI" / "DLMUSE_seg" / f"{name}_T1_DLMUSE.nii.gz", regions[::-1].astype(np.uint8), IXI @ mirrored)

    labels = {"ixi_labels": prepare_data.Download([tmp_path / "IXI"])}
    assert len(prepare_data.prepare(labels, tmp_path / "out", rows)) == 2  # no grid to put the labels on
    both = labels | {"ixi": prepare_data.Download([tmp_path / "IXI"])}
    assert prepare_data.prepare(both, tmp_path / "out", rows) == []
    assert (tmp_path / "out" / rows[0]["file"]).read_bytes() == image.read_bytes()
    label = nib.load(tmp_path / "out" / rows[0]["file"].replace("images", "labels"))
    assert label.get_data_dtype() == np.uint8 and np.allclose(label.affine, IXI)
    assert np.array_equal(np.asarray(label.dataobj), truth)
    assert scans(tmp_path / "out", "train", "brain_structures/images")[0]["image"].endswith(rows[0]["file"])


def test_the_structures_are_those_of_the_bundle():
    assert list(prepare_data.STRUCTURES) == class_names(str(prepare_data.ROOT / "bundle"))


def test_an_original_scan_of_ixi_becomes_2_mm_and_8_bit(tmp_path):
    fine = np.diag([-0.9375, 0.9375, 1.2, 1.0])  # axes L-A-S here, P-S-R in the result
    ramp = np.broadcast_to(np.arange(32.0)[:, None, None], (32, 32, 10)).astype(np.float32)
    write(tmp_path / "IXI-T1" / "IXI013-HH-1212-T1.nii.gz", ramp, fine)
    rows = [row_of("brain_structures/images/IXI013-HH-1212.nii.gz", "15x6x15")]
    prepare_data.prepare({"ixi": prepare_data.Download([tmp_path / "IXI-T1"])}, tmp_path / "out", rows)
    image = nib.load(tmp_path / "out" / rows[0]["file"])
    assert image.get_data_dtype() == np.uint8 and nib.aff2axcodes(image.affine) == ("P", "S", "R")
    assert prepare_data.problem_of(tmp_path / "out" / rows[0]["file"], rows[0]) == ""
    result = image.get_fdata()
    assert result.mean() == pytest.approx(ramp.mean(), abs=0.2)
    # every voxel keeps its place: the ramp grows to the left, by a voxel of 0.9375 mm
    places = nib.affines.apply_affine(image.affine, np.argwhere(np.ones(result.shape)))
    assert np.allclose(result.ravel(), -places[:, 0] / 0.9375, atol=0.6)


def test_a_dicom_series_becomes_one_file(tmp_path):
    pydicom = pytest.importorskip("pydicom")
    source = Path(pydicom.data.get_testdata_file("MR_small.dcm"))
    series = tmp_path / "dcm_qa_decubitus" / "In" / "HFS" / "2_t1_fl2d_sag"
    series.mkdir(parents=True)
    for number in range(3):
        ds = pydicom.dcmread(source)
        ds.SOPInstanceUID, ds.InstanceNumber = f"1.2.{number + 1}", number + 1
        ds.ImagePositionPatient = [*ds.ImagePositionPatient[:2], ds.ImagePositionPatient[2] + 4 * number]
        ds.save_as(series / f"{number}.dcm")
    rows = [row_of("heads/dcmqa-decubitus_crlab_T1-HFS.nii.gz", "64x64x3", "0.312x0.312x4")]
    downloads = {"dcm_qa_decubitus": prepare_data.Download([tmp_path / "dcm_qa_decubitus"])}
    assert prepare_data.prepare(downloads, tmp_path / "out", rows) == []
    image = nib.load(tmp_path / "out" / rows[0]["file"])
    assert image.shape == (64, 64, 3) and image.header.get_zooms()[2] == pytest.approx(4)


def test_what_differs_and_what_is_missing_is_said(tmp_path, voxels, capsys):
    rows = [row_of("heads/niivue_M2208_T2.nii.gz", "6x8x9"), row_of("heads/ds002748_sub-02_T1.nii.gz")]
    rows.append(row_of("other/sct-errsm30_cervical_T1.nii.gz"))  # no benchmark reads it
    write(tmp_path / "niivue" / "M2208_T2w.nii.gz", voxels)
    missing = prepare_data.prepare({"niivue": prepare_data.Download([tmp_path / "niivue"])}, tmp_path / "out", rows)
    prepare_data.report(missing, rows)
    said = capsys.readouterr().out
    assert "heads/niivue_M2208_T2.nii.gz: shape 6x8x5 in place of 6x8x9\n" in said
    assert "niivue: 1 of 1 files" in said and "ds002748: 0 of 1 files\n  missing ds002748_sub-02_T1.nii.gz" in said
    assert "needed by restoration" in said and "sct" not in said
    assert read_csv(tmp_path / "out" / "manifest.csv") == rows[:1]
    # a later call keeps what is there
    write(tmp_path / "ds" / "sub-02" / "anat" / "sub-02_T1w.nii.gz", voxels)
    shutil.rmtree(tmp_path / "niivue")
    prepare_data.prepare({"ds002748": prepare_data.Download([tmp_path / "ds"])}, tmp_path / "out", rows)
    assert read_csv(tmp_path / "out" / "manifest.csv") == rows[:2]


def test_every_scan_that_a_benchmark_reads_has_a_download():
    rows = read_csv(prepare_data.SPLITS)
    wanted = prepare_data.wanted_files(rows)
    assert {want.download for want in wanted} == set(prepare_data.DOWNLOADS)
    read = [row["file"] for row in rows if row["file"].split("/")[0] in ("heads", "hippocampus", "brain_structures")]
    assert {want.row["file"] for want in wanted} == set(read) and len(wanted) == len(read) + 208 + 150
    assert len({want.file for want in wanted}) == len(wanted)


def test_a_path_that_is_no_download_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no archive")
    for path in (tmp_path / "notes.txt", tmp_path / "absent.tar"):
        with pytest.raises(SystemExit, match="neither a folder nor a tar or zip archive"):
            prepare_data.Download([path])
