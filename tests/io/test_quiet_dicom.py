"""pydicom's warnings quote the header: they are silenced while it is read, and only then."""

import logging
import threading
import warnings

import pydicom
import pytest

from sspformer.data.series import dicom_header
from sspformer.io import quiet_dicom

NAME = "Doe^Jane"


@pytest.fixture
def file(tmp_path):
    """A file whose StudyInstanceUID holds a name, which is no UID."""
    ds = pydicom.dcmread(pydicom.data.get_testdata_file("MR_small.dcm"))
    with quiet_dicom():
        ds.StudyInstanceUID = NAME
        ds.save_as(tmp_path / "file")
    return tmp_path / "file"


def settings():
    return [logging.getLogger(name).level for name in ("pydicom", "highdicom")], list(warnings.filters)


def test_a_header_that_is_no_standard_reaches_no_log(file, caplog):
    with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
        warnings.simplefilter("always")
        before = settings()
        head = dicom_header([file])
        assert settings() == before and not caught and NAME not in caplog.text
        assert head["study"] and NAME not in str(head)
        pydicom.dcmread(file).get("StudyInstanceUID")
    assert NAME in str([warning.message for warning in caught]) and NAME in caplog.text  # else this tests nothing


def test_the_last_thread_to_leave_restores_the_settings(file):
    before, entered, leave = settings(), threading.Event(), threading.Event()

    @quiet_dicom()
    def read():
        entered.set()
        leave.wait(10)

    thread = threading.Thread(target=read)
    thread.start()
    assert entered.wait(10)
    during = settings()
    dicom_header([file])
    assert settings() == during != before
    leave.set()
    thread.join()
    assert settings() == before
