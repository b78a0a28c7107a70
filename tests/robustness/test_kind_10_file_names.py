"""One bad file never stops the others: names that are no UTF-8, too long or odd, pipes, devices, closed folders."""

import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest
from odd_inputs import (
    accepted,
    datalist,
    dicom_series,
    head,
    in_child,
    infer,
    inputs,
    items_of,
    nifti,
    pairs,
    refused,
    rows,
    stand_in,
)

NAMES = {
    "latin-1": b"M\xfcller_T1.nii.gz",
    "bytes that are no text": b"\xff\xfe_T1.nii.gz",
    "utf-8": "Müller_頭.nii.gz".encode(),
    "a new line": b"a\nb.nii.gz",
    "spaces": b" a b .nii.gz",
    "quotes and commas": b"a\",'b;c.nii.gz",
    "a dash": b"--dataset_dir.nii.gz",
    "percent and dollar": b"%s $HOME {x}.nii.gz",
    "an expression": b"$@network.nii.gz",
    "a formula": b"=1+1.nii.gz",
    "an escape": b"\x1b[31mred.nii.gz",
    "very long": b"x" * 240 + b".nii.gz",
    "as long as can be": b"x" * 248 + b".nii.gz",
    "two suffixes": b"a.nii.nii.gz",
    "a suffix of upper case": b"A.NII.GZ",
}


def with_name(folder, name, **options):
    path = nifti(folder / "x.nii.gz", **options)
    os.rename(path, os.fsencode(folder) + b"/" + name)


@pytest.mark.parametrize("case", NAMES)
def test_an_odd_name_costs_at_most_its_own_scan(case, tmp_path):
    """In inference, and again when the batch goes on; the good scans are written."""
    scans = tmp_path / "in"
    with_name(scans, NAMES[case])
    for name in ("0_before", "zz_after"):
        nifti(scans / f"{name}.nii.gz")
    network = stand_in(tmp_path)
    for _ in range(2):
        table = infer(scans, tmp_path / "out", **network)
        assert len(table) == 3
        for name in ("0_before", "zz_after"):
            assert table[name]["status"] in ("written", "already there")
            assert (tmp_path / "out" / f"{name}_seg.nii.gz").exists()
        (odd,) = (row for name, row in table.items() if name not in ("0_before", "zz_after"))
        assert odd["status"] in ("written", "already there") or odd["reason"]


@pytest.mark.parametrize("case", NAMES)
def test_an_odd_name_is_trained_on_or_named(case, tmp_path):
    with_name(tmp_path / "in", NAMES[case])
    nifti(tmp_path / "in" / "p2.nii.gz")
    found = accepted(datalist, tmp_path / "in", tmp_path / "out", skip_unreadable=True)
    assert "p2" in [item["name"] for item in items_of(found)]
    assert len(rows(tmp_path / "out")) == 2


def test_names_that_differ_in_case_or_form_stay_two(tmp_path):
    """Outputs on a file system that does not tell them apart would be one."""
    for name in ("Scan", "scan"):
        nifti(tmp_path / "in" / f"{name}.nii.gz")
    names = [item["name"].lower() for item in inputs(tmp_path / "in")]
    assert len(set(names)) == 2


def pipe(path):
    os.mkfifo(path)


def unix_socket(path):
    where = os.getcwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(where)


def endless(path):
    path.symlink_to("/dev/zero")


def blocking(path):
    path.symlink_to("/dev/tty")


def folder(path):
    path.mkdir()


def broken_link(path):
    path.symlink_to(path.parent / "gone.nii.gz")


def link_to_itself(path):
    path.symlink_to(path)


THINGS = (pipe, unix_socket, endless, blocking, folder, broken_link, link_to_itself)


@pytest.mark.parametrize("name", ["thing.nii", "thing.nii.gz", "thing.dcm", "thing"])
@pytest.mark.parametrize("make", THINGS)
def test_what_is_no_file_is_no_scan_and_stops_nothing(make, name, tmp_path):
    nifti(tmp_path / "in" / "good1.nii.gz")
    make(tmp_path / "in" / name)
    for function, options in ((datalist, {"skip_unreadable": True, "val_fraction": 0}), (inputs, {})):
        found = in_child(function, tmp_path / "in", **options, seconds=4)
        assert found, f"{function.__name__}: {found.kind} {found.error}"
        items = found.value if isinstance(found.value, list) else items_of(found.value)
        good = [item["name"] for item in items if "reason" not in item]
        assert good == ["good1"]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (pipe, ("pipe", "no file", "not a file")),
        (broken_link, ("does not exist", "no such file")),
        (folder, ("no scan", "no usable scan")),
    ],
)
def test_what_is_no_file_is_refused_by_name_when_it_is_the_data_set_itself(make, says, tmp_path):
    make(tmp_path / "one.nii.gz")
    for function in (datalist, inputs):
        found = in_child(function, tmp_path / "one.nii.gz", seconds=4)
        text = found.error or " ".join(item.get("reason", "") + item["source"] for item in found.value)
        assert found or found.named, f"{found.kind}: {found.error}"
        assert "one.nii.gz" in text and any(word in text for word in says), text


@pytest.mark.parametrize("make", [pipe, broken_link, folder])
def test_a_label_map_that_is_no_file_fails_its_pair_alone(make, tmp_path):
    for name in ("p1", "p2"):
        nifti(tmp_path / "images" / f"{name}.nii.gz")
        nifti(tmp_path / "labels" / f"{name}.nii.gz", (head() > 500).astype(np.uint8))
    (tmp_path / "labels" / "p1.nii.gz").unlink()
    make(tmp_path / "labels" / "p1.nii.gz")
    found = in_child(pairs, tmp_path, skip_unreadable=True, val_fraction=0, seconds=5)
    assert found, f"{found.kind}: {found.error}"
    assert [item["name"] for item in items_of(found.value)] == ["p2"]


@pytest.fixture
def open_folder():
    """A folder that anybody may read, below folders that anybody may enter."""
    path = Path(tempfile.mkdtemp(prefix="sspformer-"))
    path.chmod(0o755)
    yield path
    for here, _, _ in os.walk(path):
        os.chmod(here, 0o755)
    shutil.rmtree(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("closed", ["file", "folder"])
def test_what_may_not_be_read_is_named_and_stops_nothing(closed, open_folder):
    nifti(open_folder / "in" / "good1.nii.gz")
    path = nifti(open_folder / "in" / "closed" / "bad2.nii.gz")
    (path if closed == "file" else path.parent).chmod(0)
    found = in_child(datalist, open_folder / "in", skip_unreadable=True, val_fraction=0, user=65534)
    assert found, f"{found.kind}: {found.error}"
    assert [item["name"] for item in items_of(found.value)] == ["good1"]
    found = in_child(datalist, open_folder / "in", val_fraction=0, user=65534)
    assert not found and found.named and "closed" in found.error and "ermission" in found.error
    found = in_child(inputs, open_folder / "in", user=65534)
    assert sorted("reason" in item for item in found.value) == [False, True]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_closed_dicom_file_without_a_suffix_is_named(open_folder):
    """It may be a slice of a scan: without it the rest would be another scan."""
    dicom_series(open_folder / "in" / "a")
    (path,) = dicom_series(open_folder / "in" / "b", only=[3])
    path.rename(path.with_name("IM0004")).chmod(0)
    found = in_child(inputs, open_folder / "in", user=65534)
    assert sorted(item.get("reason", "")[-17:] for item in found.value) == ["", "Permission denied"]


def test_dicom_in_folders_whose_names_are_no_utf_8(tmp_path):
    """Two scans of the same UIDs, which differ: what is said of them can be printed and written."""
    for i, name in enumerate((b"M\xfcller", b"\xff\xfe")):
        dicom_series(tmp_path / "x", head(seed=i).astype(np.uint16))
        (tmp_path / "in").mkdir(exist_ok=True)
        os.rename(tmp_path / "x", os.fsencode(tmp_path / "in") + b"/" + name)
    dicom_series(tmp_path / "in" / "good", series="1.2.9")
    found = accepted(datalist, tmp_path / "in", tmp_path / "out", val_fraction=0)
    assert len(items_of(found)) == len(rows(tmp_path / "out")) == 3
    table = infer(tmp_path / "in", tmp_path / "out2", **stand_in(tmp_path))
    assert [row["status"] for row in table.values()] == ["written"] * 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_an_output_folder_that_may_not_be_written_is_refused_by_name(open_folder):
    nifti(open_folder / "in" / "good1.nii.gz")
    (open_folder / "out").mkdir(mode=0o555)
    found = in_child(datalist, open_folder / "in", open_folder / "out", val_fraction=0, user=65534)
    assert not found and "out" in found.error and "ermission" in found.error


def test_a_folder_that_links_to_itself_ends(tmp_path):
    nifti(tmp_path / "a" / "good1.nii.gz")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    found = in_child(datalist, tmp_path, val_fraction=0, seconds=5)
    assert found and len(items_of(found.value)) == 1


def test_a_path_with_a_zero_byte_is_refused():
    refused(datalist, "a\0b", says="")


def test_the_mode_of_a_file_that_is_written_is_that_of_the_user(tmp_path):
    nifti(tmp_path / "in" / "good1.nii.gz")
    datalist(tmp_path / "in", tmp_path / "out", val_fraction=0)
    mode = stat.S_IMODE((tmp_path / "out" / "scans.csv").stat().st_mode)
    assert mode & 0o600 == 0o600
