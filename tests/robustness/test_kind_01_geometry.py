"""Geometry that cannot be: units are converted, what no scanner makes is refused with value and likely cause."""

import nibabel as nib
import numpy as np
import pytest
from monai.data import MetaTensor
from odd_inputs import (
    datalist,
    dicom_series,
    head,
    in_child,
    infer,
    inputs,
    items_of,
    load,
    nifti,
    refused,
    rows,
    stand_in,
)

from sspformer.io import save_like

PLAIN = head()


def affine_of(spacing, shape=PLAIN.shape, origin=None, axes=None):
    """With the middle of the scan at the origin, unless it is given; `axes` are multiplied from the left."""
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3) if axes is None else np.asarray(axes, float)) @ np.diag(spacing)
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) / 2) if origin is None else origin
    return affine


def shear(degrees):
    axes = np.eye(3)
    axes[:, 1] = [np.sin(np.deg2rad(degrees)), np.cos(np.deg2rad(degrees)), 0]
    return axes


READ = {
    "micro-MRI of 20 microns": {"spacing": (0.02, 0.02, 0.02), "shape": (110, 12, 10)},
    "thick slices": {"spacing": (0.4, 0.4, 12)},
    "a whole body": {"spacing": (80 / 12, 80 / 12, 19.5), "shape": (60, 40, 97)},
    "gantry tilt": {"spacing": (1, 1, 1), "axes": shear(25)},
    "a table that moved": {"spacing": (2, 2, 2), "origin": (-400, 300, -1800)},
    "left-handed": {"spacing": (2, 2, 2), "axes": np.diag([-1, 1, 1])},
}


@pytest.mark.parametrize("case", READ)
def test_real_geometry_is_read_as_nibabel_reads_it(case, tmp_path):
    options = dict(READ[case])
    shape = options.pop("shape", PLAIN.shape)
    affine = affine_of(shape=shape, **options)
    voxels = head(shape).astype(np.int16)
    path = nifti(tmp_path / "in" / "p1.nii.gz", voxels, affine)
    (item,) = inputs(path)
    (trained,) = datalist(tmp_path / "in", val_fraction=0)["training"]
    for image in (item["image"], trained["image"]):
        found = load(image)
        assert np.array_equal(found[0].numpy(), voxels) and np.allclose(found.affine, affine, atol=1e-4)


REFUSED = {
    "1e-10 mm": ({"spacing": (1e-10,) * 3}, "spacing"),
    "1e20 mm": ({"spacing": (1e20,) * 3, "origin": (0, 0, 0)}, "spacing"),
    "an axis of 0.001 mm": ({"spacing": (1, 1, 0.001)}, "spacing"),
    "an axis of 1000 mm": ({"spacing": (1, 1000, 1)}, "spacing"),
    "metres without the unit": ({"spacing": (0.001,) * 3}, ("metre", "meter", "unit")),
    "microns without the unit": ({"spacing": (1000.0,) * 3}, ("micron", "unit")),
    "an axis of 30 mm": ({"spacing": (1, 1, 30)}, "spacing"),
    "a field of view of 0.5 mm": ({"spacing": (0.02, 0.02, 0.02)}, "field of view"),
    "a field of view of 4 m": ({"spacing": (18, 2, 2), "shape": (222, 10, 10)}, "field of view"),
    "an origin at 1e30": ({"spacing": (2, 2, 2), "origin": (1e30, 0, 0)}, "origin"),
    "an origin at 50 m": ({"spacing": (2, 2, 2), "origin": (0, 0, 50_000)}, "origin"),
    "nearly singular axes": ({"spacing": (2, 2, 2), "axes": shear(89.5)}, ("axes", "shear")),
    "sheared axes": ({"spacing": (2, 2, 2), "axes": shear(70)}, ("axes", "shear")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_geometry_that_no_scanner_makes_is_refused_to_train_on_and_to_infer_from(case, tmp_path):
    options, says = REFUSED[case]
    options = dict(options)
    shape = options.pop("shape", PLAIN.shape)
    affine = affine_of(shape=shape, **options)
    path = nifti(tmp_path / "in" / "p1.nii.gz", head(shape).astype(np.int16))
    codes = {f"srow_{axis}": row for axis, row in zip("xyz", affine)}
    nifti(path, head(shape).astype(np.int16), sform_code=1, qform_code=0, **codes)
    refused(datalist, tmp_path / "in", says=["p1.nii.gz", says])
    (item,) = inputs(path)
    assert "reason" in item and any(word in item["reason"] for word in ((says,) if isinstance(says, str) else says))


@pytest.mark.parametrize(
    "header",
    [
        {"pixdim": [1, 1e-5, 1, 1, 0, 0, 0, 0]},
        {"pixdim": [1, 2, 2, 2000, 0, 0, 0, 0]},
        {"qoffset_x": 1e30},
        {"pixdim": [1, 0, 2, 2, 0, 0, 0, 0]},
        {"pixdim": [1, np.inf, 2, 2, 0, 0, 0, 0]},
        {"qoffset_y": np.nan},
    ],
    ids=str,
)
@pytest.mark.parametrize("qform", [0, 1])
def test_the_same_where_the_affine_comes_from_the_spacing(header, qform, tmp_path):
    if qform == 0 and not any(name.startswith("pixdim") for name in header):
        header = {**header, "sform_code": 1, "srow_x": [2, 0, 0, header.get("qoffset_x", np.nan)]}  # instead
    nifti(tmp_path / "p1.nii.gz", **{"sform_code": 0, "qform_code": qform, **header})
    refused(datalist, tmp_path, says=["p1.nii.gz", ("spacing", "origin")])
    (item,) = inputs(tmp_path)
    assert "reason" in item


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1), ("meter", 1e-3), ("micron", 1e3), (None, 1)])
def test_units_are_read_and_converted(unit, factor, tmp_path):
    affine = affine_of((2, 2, 3))
    stored = affine.copy()
    stored[:3] *= factor
    path = nifti(tmp_path / "in" / "p1.nii.gz", PLAIN.astype(np.int16), stored, units=unit)
    found = load(path)
    assert np.allclose(found.affine, affine, atol=1e-3) and np.array_equal(found[0].numpy(), PLAIN.astype(np.int16))
    assert np.allclose(found.meta["original_affine"], affine, atol=1e-3)
    datalist(tmp_path / "in", tmp_path / "out", val_fraction=0)
    assert rows(tmp_path / "out")[0]["spacing_mm"] == "2x2x3"


@pytest.mark.parametrize(("unit", "factor"), [("meter", 1e-3), ("micron", 1e3)])
def test_a_scan_in_other_units_is_segmented_as_in_mm(unit, factor, tmp_path):
    affine = affine_of((2, 2, 2))
    nifti(tmp_path / "in" / "mm.nii.gz", PLAIN, affine, units="mm")
    affine[:3] *= factor
    nifti(tmp_path / "in" / "other.nii.gz", PLAIN, affine, units=unit)
    found = in_child(infer, tmp_path / "in", tmp_path / "out", **stand_in(tmp_path), seconds=60)
    assert found, found.error
    assert {row["status"] for row in found.value.values()} == {"written"}, found.value
    labels = [np.asarray(load(tmp_path / "out" / f"{name}_seg.nii.gz")) for name in ("mm", "other")]
    assert labels[0].any() and np.array_equal(*labels)


def test_a_unit_that_cannot_be_is_named(tmp_path):
    """Spacing of 2, said to be metres: the unit is what is wrong."""
    nifti(tmp_path / "p1.nii.gz", units="meter")
    refused(datalist, tmp_path, says=["p1.nii.gz", ("metre", "meter")])


DICOM = {
    "PixelSpacing 1e-4": ({"PixelSpacing": [1e-4, 1e-4]}, "spacing"),
    "PixelSpacing 1000": ({"PixelSpacing": [1000, 1000]}, "spacing"),
    "PixelSpacing of one axis": ({"PixelSpacing": [2, 1e-3]}, "spacing"),
    "an origin at 1e8": ({"ImagePositionPatient": 1e8}, "origin"),
    "an origin at 50 m": ({"ImagePositionPatient": 5e4}, "origin"),
    "slices 200 mm apart": ({"distance": 200}, "spacing"),
    "slices 0.002 mm apart": ({"distance": 0.002}, "spacing"),
}


@pytest.mark.parametrize("case", DICOM)
def test_the_same_in_dicom(case, tmp_path):
    elements, says = DICOM[case]
    elements = dict(elements)
    distance, far = elements.pop("distance", 3), elements.pop("ImagePositionPatient", 0)
    dicom_series(
        tmp_path / "s",
        elements_of=lambda k: {"ImagePositionPatient": [far, 0, f"{k * distance:.6g}"]},
        SliceThickness=1,
        **elements,
    )
    refused(datalist, tmp_path, says=["DICOM series", says])


@pytest.mark.parametrize(
    ("elements", "says"),
    [
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "ImageOrientationPatient"),
        ({"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}, "ImageOrientationPatient"),
        ({"PixelSpacing": [0, 2]}, "PixelSpacing"),
        ({"PixelSpacing": None}, "PixelSpacing"),
    ],
)
def test_dicom_geometry_that_is_refused_already(elements, says, tmp_path):
    dicom_series(tmp_path / "s", **elements)
    refused(datalist, tmp_path, says=["DICOM series", says])


@pytest.mark.parametrize(
    ("overlays", "options", "says"),
    [
        (["super_resolution.json"], {"target_spacing": 0.0005}, "target_spacing"),
        (["super_resolution.json"], {"factor": 4000}, "factor"),
        ([], {"spacing": [0.0005, 0.0005, 0.0005]}, "spacing"),
    ],
    ids=["target_spacing", "factor", "spacing"],
)
def test_a_size_after_resampling_that_does_not_fit_is_refused_before_it_is_allocated(overlays, options, says, tmp_path):
    """With the option's name, and the size: of the message, or of each scan's reason."""
    nifti(tmp_path / "in" / "p1.nii.gz", PLAIN)
    network = stand_in(tmp_path, 1 if overlays else 2)
    found = in_child(infer, tmp_path / "in", tmp_path / "out", *overlays, **network, **options, seconds=60)
    reason = found.value["p1"]["reason"] if found else found.error
    assert says in reason and any(word in reason for word in ("GB", "TB", "memory", "voxels", "range")), reason
    assert "DefaultCPUAllocator" not in reason and found.grown < 1 << 30


def test_a_scan_that_resampling_makes_one_voxel_is_refused_with_the_option(tmp_path):
    """2.4 mm at the network's 2 mm: no label can come of it. Large voxels are well."""
    for name, spacing in {"small": 0.1, "large": 15.0}.items():
        nifti(tmp_path / "in" / f"{name}.nii.gz", PLAIN, affine_of((spacing,) * 3))
    found = infer(tmp_path / "in", tmp_path / "out", **stand_in(tmp_path))
    assert found["large"]["status"] == "written" and load(tmp_path / "out" / "large_seg.nii.gz").any()
    assert found["small"]["status"] == "failed" and "spacing" in found["small"]["reason"]


def test_items_of_a_folder_with_one_bad_geometry_name_it_alone(tmp_path):
    nifti(tmp_path / "good1.nii.gz")
    nifti(tmp_path / "bad2.nii.gz", pixdim=[1, 0, 2, 2, 0, 0, 0, 0], sform_code=0, qform_code=1)
    assert [item["name"] for item in items_of(datalist(tmp_path, val_fraction=0, skip_unreadable=True))] == ["good1"]


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1), ("meter", 1e-3), ("micron", 1e3)])
@pytest.mark.parametrize("step", [1, 2])
def test_results_are_written_in_the_unit_of_the_file(unit, factor, step, tmp_path):
    """On its grid with its affine bit by bit; on a finer grid, too, qform and sform are in its unit."""
    affine = affine_of((2, 2, 3))
    affine[:3] *= factor
    path = nifti(tmp_path / "p1.nii.gz", PLAIN, affine, units=unit, qform_code=1, sform_code=2)
    image = load(path)
    fine = MetaTensor(image.as_tensor().repeat_interleave(step, 3), image.affine @ np.diag([1, 1, 1 / step, 1.0]))
    fine.meta["filename_or_obj"] = str(path)
    save_like(fine, tmp_path / "out.nii.gz")
    source, result = nib.load(path), nib.load(tmp_path / "out.nii.gz")
    assert result.header.get_xyzt_units()[0] == unit
    for found, stored in ((result.get_qform(), source.get_qform()), (result.get_sform(), source.get_sform())):
        assert np.allclose(found, stored @ np.diag([1, 1, 1 / step, 1]), rtol=1e-5, atol=1e-6 * factor)
    assert step > 1 or np.array_equal(result.affine, source.affine)
    assert np.allclose(load(tmp_path / "out.nii.gz").affine, fine.affine, atol=1e-3)
