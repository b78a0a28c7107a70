"""Privacy: nothing of a DICOM header is shown that does not match what its field may hold."""

import logging
import re

import pydicom
import pytest
from odd_inputs import ROOT, datalist, dicom_series, head, infer, inputs, outcome, stand_in
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement

PATIENT = "Doe^Jane"
WORDS = (PATIENT, "Doe", "Jane", "MRN4711", "19620914")
TAGS = {
    "Modality": b"\x08\x00\x60\x00CS",
    "SeriesNumber": b"\x20\x00\x11\x00IS",
    "PhotometricInterpretation": b"\x28\x00\x04\x00CS",
    "Manufacturer": b"\x08\x00\x70\x00LO",
    "SOPClassUID": b"\x08\x00\x16\x00UI",
    "SOPInstanceUID": b"\x08\x00\x18\x00UI",
    "SeriesInstanceUID": b"\x20\x00\x0e\x00UI",
    "Rows": b"\x28\x00\x10\x00US",
    "PixelSpacing": b"\x28\x00\x30\x00DS",
    "ImagePositionPatient": b"\x20\x00\x32\x00DS",
    "ImageOrientationPatient": b"\x20\x00\x37\x00DS",
    "NumberOfFrames": b"\x28\x00\x08\x00IS",
    "RescaleSlope": b"\x28\x00\x53\x10DS",
}


def series(folder, **elements):
    known = {
        "PatientName": PATIENT,
        "PatientID": "MRN4711",
        "PatientBirthDate": "19620914",
        "Manufacturer": "Scanner",
        "RescaleSlope": 1,
    }
    files = dicom_series(folder / "scans" / "s", head((12, 12, 12)).astype("uint16"), **{**known, **elements})
    return files


def assert_nothing_is_said(folder, caplog, capfd):
    """Of the patient, in any log, error, name or file of the preparation and of inference."""
    with caplog.at_level(logging.DEBUG):
        outcomes = [
            outcome(datalist, folder / "scans", folder / "out", skip_unreadable=True, val_fraction=0),
            outcome(datalist, folder / "scans", folder / "out2", val_fraction=0),
            outcome(inputs, folder / "scans"),
        ]
        if any(outcomes):
            outcomes.append(outcome(infer, folder / "scans", folder / "out3", **stand_in(folder)))
    printed = capfd.readouterr()
    texts = {"printed": printed.out + printed.err + caplog.text}
    texts |= {f"outcome {i}": found.error + repr(found.value) for i, found in enumerate(outcomes)}
    for path in folder.rglob("*"):
        if path.is_file() and "scans" not in path.parts:
            texts[str(path)] = path.read_bytes().decode("latin-1")
    for name, text in texts.items():
        for word in WORDS:
            at = re.search(rf"\b{re.escape(word)}", text)
            assert not at, f"{name} says {text[max(0, at.start() - 60) : at.end() + 20]!r}"


@pytest.mark.parametrize("field", TAGS)
def test_a_wrong_byte_in_a_length_shows_nobody(field, tmp_path, caplog, capfd):
    """The value then swallows the elements after it, the patient's among them."""
    files = series(tmp_path, NumberOfFrames=1)
    for path in files:
        content = bytearray(path.read_bytes())
        at = content.find(TAGS[field])
        if at < 0:
            pytest.skip(f"{field} is not written")
        content[at + 6] = 0xA0  # 160 bytes
        path.write_bytes(bytes(content))
    assert_nothing_is_said(tmp_path, caplog, capfd)


FIELDS = {
    "Modality": PATIENT,
    "PhotometricInterpretation": PATIENT,
    "RescaleSlope": PATIENT,
    "RescaleIntercept": PATIENT,
    "SeriesNumber": PATIENT,
    "NumberOfFrames": PATIENT,
    "SliceThickness": PATIENT,
    "SeriesInstanceUID": PATIENT,
    "SOPInstanceUID": PATIENT,
    "SOPClassUID": PATIENT,
    "StudyInstanceUID": PATIENT,
    "FrameOfReferenceUID": PATIENT,
    "SeriesDescription": PATIENT,
    "ProtocolName": PATIENT,
    "ConcatenationUID": PATIENT,
}


@pytest.mark.parametrize(
    "field",
    FIELDS,
)
def test_a_name_in_a_field_of_something_else_is_not_shown(field, tmp_path, caplog, capfd):
    for path in series(tmp_path):
        ds = pydicom.dcmread(path)
        ds[tag_for_keyword(field)] = DataElement(tag_for_keyword(field), "LO", FIELDS[field])
        ds.save_as(path)
    assert_nothing_is_said(tmp_path, caplog, capfd)


def test_a_transfer_syntax_is_not_quoted(tmp_path, caplog, capfd):
    for path in series(tmp_path):
        content = path.read_bytes()
        path.write_bytes(content.replace(b"1.2.840.10008.1.2.1\0", b"Doe^Jane.MRN4711.19\0"))
    assert_nothing_is_said(tmp_path, caplog, capfd)


def test_a_modality_that_is_none_of_mr_is_named(tmp_path):
    """What the field may hold is shown: the reason stays a help."""
    series(tmp_path, Modality="CT")
    found = outcome(datalist, tmp_path / "scans", val_fraction=0)
    assert not found and "CT" in found.error and found.named


def test_truncated_headers_show_nobody(tmp_path, caplog, capfd):
    files = series(tmp_path)
    for i, path in enumerate(files):
        path.write_bytes(path.read_bytes()[: 140 + 40 * i])
    assert_nothing_is_said(tmp_path, caplog, capfd)


def test_the_words_are_nowhere_in_this_checkouts_names():
    """Else a path would set the alarm off."""
    assert not [word for word in WORDS if word in str(ROOT)]
