"""Inference on files as users have them: where predictions land, what their headers say, and what a bad file does.

Stand-in networks that look at one voxel make the right answer known: a threshold for segmentation, the identity for
restoration."""

import csv
import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from scipy.ndimage import affine_transform
from torch import nn

from sspformer import engines, kspace, pictures
from sspformer.data import find_inputs
from sspformer.demo import write_series
from sspformer.engines import ScansFailed
from sspformer.transforms import argmax_on_grid

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
CONFIG = str(BUNDLE / "configs" / "inference.json")
DENOISING, SUPER_RESOLUTION = (("restoration.json", f"{name}.json") for name in ("denoising", "super_resolution"))
PERMUTATIONS = list(itertools.permutations(range(3)))
ORIENTATIONS = [(order, signs) for order in PERMUTATIONS for signs in itertools.product((1, -1), repeat=3)]
SHAPE = (20, 24, 28)


def rotation(degrees):
    x, y, z = np.deg2rad(degrees)
    about_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    about_y = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    about_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    return about_x @ about_y @ about_z


def scan_affine(order, signs, spacing, degrees=(0, 0, 0)):
    """Voxels to mm: axis i of the file runs along axis order[i] of the body, forwards or backwards, turned."""
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis in range(3):
        affine[order[axis], axis] = signs[axis] * spacing[axis]
    affine[:3, :3] = rotation(degrees) @ affine[:3, :3]
    affine[:3, 3] = [-31.7, 12.3, 55.1]
    return affine


def phantom(shape=SHAPE):
    """A smooth blob off centre with a second one beside it, so that no flip or turn maps it onto itself; 0 to 1."""
    grid = np.stack(np.meshgrid(*(np.linspace(0, 1, n) for n in shape), indexing="ij"), -1)
    blob = np.exp(-((((grid - [0.4, 0.45, 0.55]) / [0.2, 0.26, 0.16]) ** 2).sum(-1)))
    return np.clip(blob + np.exp(-((((grid - [0.75, 0.25, 0.3]) / 0.12) ** 2).sum(-1))), 0, 1)


def write(folder, name, voxels, affine, qform=1, sform=1, kind=nib.Nifti1Image):
    image = kind(voxels, affine)
    image.set_qform(affine, qform)
    image.set_sform(affine, sform)
    folder.mkdir(exist_ok=True)
    nib.save(image, folder / f"{name}.nii.gz")


@pytest.fixture
def threshold(tmp_path):
    """A 1x1x1 convolution with which class 1 wins where the image is above 0.5; of names of its own, so nothing that
    suits the bundle's structures alone is on."""
    network = nn.Conv3d(1, 2, 1)
    network.load_state_dict(
        {"weight": torch.tensor([0.0, 2.0]).reshape(2, 1, 1, 1, 1), "bias": torch.tensor([0.0, -1])}
    )
    torch.save(network.half().state_dict(), tmp_path / "threshold.pt")
    return {
        "network_def": {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 2, "kernel_size": 1},
        "weights": str(tmp_path / "threshold.pt"),
        "class_names": ["bright"],
    }


def gain(folder, factor=1.0):
    """Weights of a network that multiplies the image by a factor."""
    torch.save({"weight": torch.full((1, 1, 1, 1, 1), factor)}, folder / "gain.pt")
    options = {"in_channels": 1, "out_channels": 1, "kernel_size": 1, "bias": False}
    return {"network_def": {"_target_": "torch.nn.Conv3d", **options}, "weights": str(folder / "gain.pt")}


def infer(scans, output, *overlays, **overrides):
    """The workflow as configured, in this process."""
    configs = [CONFIG, *(str(BUNDLE / "configs" / name) for name in overlays)]
    settings = {"bundle_root": str(BUNDLE), "dataset_dir": str(scans), "output_dir": str(output), **overrides}
    settings = {"device": "cpu", "amp": "false", **settings}  # as a command line gives it
    workflow = ConfigWorkflow(
        config_file=configs, run_id="inference", workflow_type="inference", logging_file=False, **settings
    )
    workflow.initialize()
    try:
        workflow.run()
        workflow.finalize()
    except RuntimeError as error:  # of MONAI's config parser
        raise error.__cause__ from None


def report(output):
    with (Path(output) / "inference.csv").open(newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def assert_same_space(path, source):
    """Affine bit by bit, and all that a header says of it."""
    image, source = nib.load(path), nib.load(source)
    assert image.shape == source.shape
    assert image.affine.tobytes() == source.affine.tobytes()
    for field in ("qform_code", "sform_code", "quatern_b", "qoffset_x", "srow_x", "srow_y", "srow_z", "pixdim"):
        assert np.array_equal(image.header[field], source.header[field]), field
    assert image.header.get_xyzt_units() == source.header.get_xyzt_units()
    return image


@pytest.mark.parametrize("degrees", [(0, 0, 0), (11, -7, 23)])
def test_segmentation_of_all_orientations_on_the_same_voxels(degrees, tmp_path, threshold):
    voxels = (1000 * (phantom() > 0.3)).astype(np.int16)
    for i, (order, signs) in enumerate(ORIENTATIONS):
        codes = [(1, 1), (1, 0), (0, 2), (3, 4)][i % 4]
        write(tmp_path / "scans", f"scan{i}", voxels, scan_affine(order, signs, (2, 2, 2), degrees), *codes)
    infer(tmp_path / "scans", tmp_path / "out", roi_size=[24, 32, 32], **threshold)
    for i in range(48):
        image = assert_same_space(tmp_path / f"out/scan{i}_seg.nii.gz", tmp_path / f"scans/scan{i}.nii.gz")
        assert image.get_data_dtype() == np.uint8
        assert np.array_equal(np.asarray(image.dataobj), voxels > 0), ORIENTATIONS[i]


def test_segmentation_through_a_coarser_grid_of_oblique_anisotropic_scans(tmp_path, threshold):
    voxels = (1000 * np.clip(3 * phantom((48, 40, 14)) - 1, 0, 1)).astype(np.int16)  # a plateau, with soft borders
    truth = voxels > 500
    for i, (order, signs) in enumerate(ORIENTATIONS):
        affine = scan_affine(order, signs, (0.9, 1.1, 3.3), (11, -7, 23))
        write(tmp_path / "scans", f"scan{i}", voxels, affine)
    infer(tmp_path / "scans", tmp_path / "out", spacing=[1.5, 1.5, 1.5], roi_size=[40, 40, 40], **threshold)
    place = np.argwhere(truth).mean(0)
    for i in range(48):
        image = assert_same_space(tmp_path / f"out/scan{i}_seg.nii.gz", tmp_path / f"scans/scan{i}.nii.gz")
        labels = np.asarray(image.dataobj) > 0
        dice = 2 * (labels & truth).sum() / (labels.sum() + truth.sum())
        assert dice > 0.94, (ORIENTATIONS[i], dice)
        off = (np.argwhere(labels).mean(0) - place) * [0.9, 1.1, 3.3]
        assert np.linalg.norm(off) < 0.4, (ORIENTATIONS[i], off)  # mm; half a voxel of the network's grid is 0.75


@pytest.mark.parametrize("shear", [0, 0.2])
def test_labels_are_those_of_linear_interpolation_also_on_a_sheared_grid(shear):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(5, 9, 8, 7)).astype(np.float32)
    affine = scan_affine((0, 1, 2), (1, 1, 1), (2, 2, 2))
    target = scan_affine((2, 0, 1), (-1, 1, -1), (1.1, 0.7, 1.9), (20, 5, -9))
    target[0, 1] += shear
    target[:3, 3] = affine[:3, :3] @ [4, 3, 3] + affine[:3, 3] - target[:3, :3] @ [5, 6, 4]
    step = np.linalg.solve(affine, target)
    expected = np.stack(
        [affine_transform(s, step[:3, :3], step[:3, 3], (10, 12, 9), order=1, mode="nearest") for s in scores]
    )
    labels = argmax_on_grid(torch.from_numpy(scores), affine, (10, 12, 9), target, slab_voxels=2000).numpy()
    top = np.sort(expected, axis=0)
    clear = top[-1] - top[-2] > 1e-4
    assert clear.mean() > 0.99 and np.array_equal(labels[clear], expected.argmax(0)[clear])
    one_slice = argmax_on_grid(torch.from_numpy(scores[:, :1]), affine, (1, 8, 7), affine)
    assert np.array_equal(one_slice[0], scores[:, 0].argmax(0))


def test_an_image_that_is_not_changed_comes_back_bit_by_bit_in_all_orientations(tmp_path):
    rng = np.random.default_rng(0)
    for i, (order, signs) in enumerate(ORIENTATIONS):
        voxels = (phantom() * 900 + rng.integers(0, 100, SHAPE)).astype([np.int16, np.uint8, np.uint16][i % 3])
        affine = scan_affine(order, signs, (0.8, 1.2, 4), (11, -7, 23))
        write(tmp_path / "scans", f"scan{i}", voxels, affine, *[(1, 1), (1, 0), (0, 2), (3, 4)][i % 4])
    write(tmp_path / "scans", "neither", voxels, np.diag([2.0, 1.5, 1, 1]), 0, 0)
    write(tmp_path / "scans", "large", voxels, affine, kind=nib.Nifti2Image)
    infer(tmp_path / "scans", tmp_path / "out", *DENOISING, roi_size=[24, 32, 32], **gain(tmp_path))
    for name in [*(f"scan{i}" for i in range(48)), "neither", "large"]:
        source = nib.load(tmp_path / f"scans/{name}.nii.gz")
        image = assert_same_space(tmp_path / f"out/{name}_denoised.nii.gz", tmp_path / f"scans/{name}.nii.gz")
        assert image.get_data_dtype() == source.get_data_dtype() and type(image) is type(source)
        assert np.array_equal(np.asarray(image.dataobj), np.asarray(source.dataobj)), name


def test_types_of_restored_images(tmp_path):
    affine = np.diag([2.0, 2, 2, 1])
    bright = np.clip(phantom() * 260, 0, 255)
    write(tmp_path / "scans", "byte", bright.astype(np.uint8), affine)
    write(tmp_path / "scans", "double", bright.astype(np.float64), affine)
    scaled = nib.Nifti1Image(bright, affine)
    scaled.set_data_dtype(np.int16)  # nibabel then writes a scale factor
    nib.save(scaled, tmp_path / "scans" / "scaled.nii.gz")
    options = {"roi_size": [24, 32, 32], "blend_by_noise": [], **gain(tmp_path, 1.3)}
    infer(tmp_path / "scans", tmp_path / "out", *DENOISING, **options)
    images = {name: nib.load(tmp_path / f"out/{name}_denoised.nii.gz") for name in ("byte", "double", "scaled")}
    assert images["byte"].get_data_dtype() == np.uint8
    expected = np.clip(np.rint(bright.astype(np.uint8).astype(np.float32) * np.float32(1.3)), 0, 255)
    assert np.abs(np.asarray(images["byte"].dataobj) - expected).max() <= 1  # and not wrapped around at 256
    for name in ("double", "scaled"):
        assert images[name].get_data_dtype() == np.float32
        assert np.allclose(np.asarray(images[name].dataobj), 1.3 * bright, atol=0.01)


def test_denoising_leaves_a_quiet_scan_as_it_is(tmp_path):
    write(tmp_path / "scans", "quiet", (1000 * phantom()).astype(np.int16), np.diag([2.0, 2, 2, 1]))
    infer(tmp_path / "scans", tmp_path / "out", *DENOISING, roi_size=[24, 32, 32], **gain(tmp_path, 1.3))
    out = nib.load(tmp_path / "out/quiet_denoised.nii.gz")
    assert np.array_equal(np.asarray(out.dataobj), (1000 * phantom()).astype(np.int16))


def test_super_resolution_writes_the_affine_of_the_finer_grid(tmp_path):
    voxels = phantom((20, 24, 8)).astype(np.float32) * 900
    for i, (order, signs) in enumerate(ORIENTATIONS):
        write(tmp_path / "scans", f"scan{i}", voxels, scan_affine(order, signs, (1, 1.25, 4), (11, -7, 23)), 1, 2)
    options = {"roi_size": [32, 32, 32], **gain(tmp_path)}
    infer(tmp_path / "scans", tmp_path / "factor", *SUPER_RESOLUTION, factor=[1, 1, 4], **options)
    infer(tmp_path / "scans", tmp_path / "spacing", *SUPER_RESOLUTION, target_spacing=1.0, **options)
    for folder, shape in (("factor", (20, 24, 32)), ("spacing", (20, 30, 32))):
        for i in range(48):
            source = nib.load(tmp_path / f"scans/scan{i}.nii.gz")
            image = nib.load(tmp_path / f"{folder}/scan{i}_sr.nii.gz")
            assert image.shape == shape and image.get_data_dtype() == np.float32
            expected = source.affine @ np.diag([*(np.array(source.shape) / shape), 1])
            for affine in (image.affine, image.get_qform(), image.get_sform()):
                assert np.allclose(affine, expected, atol=1e-4)
            assert image.header["qform_code"] == 1 and image.header["sform_code"] == 2
            assert np.allclose(image.header.get_zooms(), nib.affines.voxel_sizes(expected), atol=1e-5)
            fine = np.asarray(image.dataobj)
            if folder == "factor":  # a voxel that was measured keeps its place and value
                assert np.allclose(fine[:, :, ::4], voxels, atol=0.01)


def test_data_consistency_keeps_what_was_measured(tmp_path):
    voxels = (phantom((20, 24, 8)) * 900).astype(np.int16)
    affine = scan_affine((2, 0, 1), (-1, 1, -1), (1, 1.25, 4), (11, -7, 23))
    write(tmp_path / "scans", "scan", voxels, affine)
    options = {"factor": [1.5, 1, 4], "data_consistency": True, **gain(tmp_path, 0.8)}
    infer(tmp_path / "scans", tmp_path / "out", *SUPER_RESOLUTION, **options)
    fine = torch.from_numpy(nib.load(tmp_path / "out/scan_sr.nii.gz").get_fdata(dtype=np.float32))
    measured = kspace.fourier_resample(fine[None, None], voxels.shape)[0, 0].numpy()
    assert np.linalg.norm(measured - voxels) < 1e-5 * np.linalg.norm(voxels)


def test_a_dicom_series_becomes_a_nifti_in_scanner_coordinates(tmp_path, threshold):
    affine = scan_affine((0, 1, 2), (-1, -1, 1), (2, 2, 2), (11, -7, 23))
    write_series(tmp_path / "series", "someone", (1000 * (phantom() > 0.3)).astype(np.uint16), affine, seed=0)
    infer(tmp_path / "series", tmp_path / "out", roi_size=[24, 32, 32], **threshold)
    (path,) = (tmp_path / "out").glob("*.nii.gz")
    image = nib.load(path)
    assert path.name.startswith("series") and path.name.endswith("_seg.nii.gz")
    assert int(image.header["qform_code"]) == int(image.header["sform_code"]) == 1
    mass = nib.affines.apply_affine(image.affine, np.argwhere(np.asarray(image.dataobj))).mean(0)
    expected = nib.affines.apply_affine(affine, np.argwhere(phantom() > 0.3)).mean(0)
    assert np.allclose(mass, expected, atol=0.02)


def test_a_bad_file_is_reported_and_a_second_run_goes_on_where_the_first_stopped(tmp_path, threshold):
    scans, out = tmp_path / "scans", tmp_path / "out"
    for name in ("a", "c"):
        write(scans, name, (1000 * phantom()).astype(np.int16), np.diag([2.0, 2, 2, 1]))
    whole = (scans / "a.nii.gz").read_bytes()
    (scans / "b.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ScansFailed, match="1 of 3 scans failed:\n.*b.nii.gz.*truncated") as caught:
        infer(scans, out, pictures=True, **threshold)
    assert isinstance(caught.value, RuntimeError)  # an ordinary one, which a program can catch
    assert [row["name"] for row in caught.value.rows] == ["b"] and caught.value.total == 3
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # from another process
    assert {name: row["status"] for name, row in report(out).items()} == {"a": "written", "b": "failed", "c": "written"}
    assert (out / "pictures/a_seg.png").stat().st_size > 1000

    before = (out / "a_seg.nii.gz").stat().st_mtime_ns
    (out / "c_seg.nii.gz").rename(out / "c_seg.nii.gz.part")  # as a kill would leave it
    (scans / "b.nii.gz").write_bytes(whole)
    infer(scans, out, **threshold)
    rows = report(out)
    assert (rows["a"]["status"], rows["b"]["status"], rows["c"]["status"]) == ("already there", "written", "written")
    assert (out / "a_seg.nii.gz").stat().st_mtime_ns == before and not list(out.glob("*.part"))
    infer(scans, out, **threshold)  # nothing is left to do
    infer(scans, out, overwrite=True, **threshold)
    assert (out / "a_seg.nii.gz").stat().st_mtime_ns > before
    os.utime(threshold["weights"], (1, 1))  # another model: its predictions are not those that are there
    infer(scans, out, **threshold)
    assert {row["status"] for row in report(out).values()} == {"written"}


def test_an_output_counts_as_done_only_for_the_same_scan_and_options(tmp_path, threshold):
    voxels = (1000 * phantom()).astype(np.int16)
    for subject in ("sub1", "sub2"):
        (tmp_path / subject).mkdir()
        write(tmp_path / subject, "T1", voxels, np.diag([2.0, 2, 2, 1]))
    out, picture = tmp_path / "out", tmp_path / "out/pictures/T1_seg.png"

    def status(subject="sub1", **options):
        infer(tmp_path / subject / "T1.nii.gz", out, **{**threshold, **options})
        last = (out / "T1_seg.nii.gz").stat().st_mtime_ns
        is_new, status.last = last != status.last, last
        return is_new

    status.last = 0
    assert status() and not status()
    with pytest.raises(ScansFailed, match=r"T1_seg.nii.gz is there already, made from .*sub1.T1.nii.gz: give another"):
        status("sub2")
    assert report(out)["T1"]["status"] == "failed" and not status()
    assert status(largest_component=True) and not status(largest_component="true") and status()
    assert status(pictures=True) and picture.is_file() and not status(pictures=True) and not status()
    write(tmp_path / "sub1", "T1", voxels // 2, np.diag([2.0, 2, 2, 1]))  # another scan of that name
    assert status()
    assert status(pictures=True)  # that of the scan before is no picture of this one
    assert status("sub2", overwrite=True) and not status("sub2")


def test_an_output_beside_a_file_that_is_no_record_of_ours_is_left_alone(tmp_path, threshold):
    scans, out = tmp_path / "scans", tmp_path / "out"
    foreign = {
        "a": b'{"SkullStripped": false}',
        "b": b'{"source": ',
        "c": b"[1]",
        "d": b"\xff\xfe",
        "e": b'{"source": ""}',
    }
    out.mkdir()
    for name in [*foreign, "f"]:
        write(scans, name, (1000 * phantom()).astype(np.int16), np.diag([2.0, 2, 2, 1]))
    for name, content in foreign.items():
        (out / f"{name}_seg.json").write_bytes(content)
        (out / f"{name}_seg.nii.gz").write_bytes(b"of somebody")
    with pytest.raises(
        ScansFailed, match=r"5 of 6 scans failed:\n.*a_seg.nii.gz is there already, and a_seg.json beside"
    ):
        infer(scans, out, **threshold)
    assert {name: row["status"] for name, row in report(out).items()} == {
        **dict.fromkeys(foreign, "failed"),
        "f": "written",
    }
    for name, content in foreign.items():
        assert (out / f"{name}_seg.json").read_bytes() == content
        assert (out / f"{name}_seg.nii.gz").read_bytes() == b"of somebody"
    infer(scans, out, overwrite=True, **threshold)
    infer(scans, out, **threshold)
    assert nib.load(out / "a_seg.nii.gz").shape == SHAPE


def test_names_are_shown_only_of_a_network_with_as_many_classes_and_a_failing_picture_costs_nothing(
    tmp_path, threshold, monkeypatch, caplog
):
    seen = []

    def panel(samples):
        pred = samples[0]["pred"]
        seen.append((pred.meta["class_names"], samples[0]["image"].shape, pred))
        raise OSError("disk full")

    monkeypatch.setattr(pictures, "segmentation_panel", panel)
    voxels = (1000 * (phantom() > 0.3)).astype(np.int16)
    write(tmp_path / "scans", "a", voxels, scan_affine((2, 0, 1), (-1, 1, -1), (1, 2, 2), (11, -7, 23)))
    for names in (["bright"], ["bright", "dark"]):
        infer(tmp_path / "scans", tmp_path / "out", pictures=True, **{**threshold, "class_names": names})
        assert report(tmp_path / "out")["a"]["status"] == "written"
    assert [names for names, *_ in seen] == [
        ["bright"],
        ["structure 1"],
    ] and "no picture of a: disk full" in caplog.text
    _, shape, drawn = seen[0]
    written = np.asarray(nib.load(tmp_path / "out/a_seg.nii.gz").dataobj)
    assert shape == (1, *SHAPE) and np.array_equal(drawn[0], written) and written.any()  # on the file's grid


def test_pictures_of_restoration_show_before_and_after_on_the_scale_of_the_file(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(pictures, "restoration_panel", lambda samples: seen.extend(samples) or 1 / 0)
    write(tmp_path / "scans", "a", (1000 * phantom()).astype(np.int16), scan_affine((2, 0, 1), (-1, 1, -1), (1, 2, 2)))
    for overlays, as_predicted in ((DENOISING, {}), (SUPER_RESOLUTION, {"data_consistency": False})):
        options = {"blend_by_noise": [], **as_predicted, **gain(tmp_path, 1.5)}
        infer(tmp_path / "scans", tmp_path / "out", *overlays, pictures=True, **options)
        before, after = seen[-1]["image"], seen[-1]["pred"]
        assert torch.allclose(1.5 * before.as_tensor(), after.as_tensor(), atol=0.1) and before.max() > 900
        assert torch.equal(before.affine, after.affine)


def test_weights_that_do_not_fit_are_refused_before_the_first_scan(tmp_path, threshold):
    write(tmp_path / "scans", "a", phantom().astype(np.float32), np.diag([2.0, 2, 2, 1]))
    with pytest.raises(ValueError, match=r"weight is \(2, 1, 1, 1, 1\) in the file and \(1, .*overlay"):
        infer(tmp_path / "scans", tmp_path / "out", **{**threshold, "network_def": gain(tmp_path)["network_def"]})
    with pytest.raises(FileNotFoundError, match="nowhere.pt: train"):
        infer(tmp_path / "scans", tmp_path / "out", **{**threshold, "weights": "nowhere.pt"})
    with pytest.raises(ValueError, match="data_consistency true is for super-resolution"):
        infer(tmp_path / "scans", tmp_path / "out", *DENOISING, data_consistency="true", **gain(tmp_path))
    (tmp_path / "bad.pt").write_bytes(b"PK no weights")
    with pytest.raises(ValueError, match="bad.pt is damaged"):
        infer(tmp_path / "scans", tmp_path / "out", **{**threshold, "weights": str(tmp_path / "bad.pt")})


def test_weights_of_a_checkpoint_of_other_classes_of_another_task_and_of_a_diverged_training(tmp_path):
    def network(*overlays, **options):
        parser = ConfigParser()
        parser.read_config([CONFIG, *(str(BUNDLE / "configs" / name) for name in overlays)])
        parser.config["encoder"].update({"dim": 24, "depth": 3, "num_heads": 2})
        parser.config["network_def"].update({"features": 4, **options})
        return parser.get_parsed_content("network_def")

    path, own = tmp_path / "model.pt", network()
    torch.save({"network": own.half().state_dict(), "epoch": 3}, path)
    other = network()
    engines.StrictCheckpointLoader(other, path)()
    assert all(torch.equal(value, own.state_dict()[name].to(value)) for name, value in other.state_dict().items())
    with pytest.raises(ValueError, match=r"18 output.*network 4: .*#out_channels 18 and --class_names .* 17 labels"):
        engines.StrictCheckpointLoader(network(out_channels=4), path)()
    tasks = [DENOISING, SUPER_RESOLUTION]
    for task, wrong in (tasks, tasks[::-1]):
        torch.save(network(*task).state_dict(), path)
        engines.StrictCheckpointLoader(network(*task), path)()
        with pytest.raises(ValueError, match="are of another model: .*Add the overlay"):
            engines.StrictCheckpointLoader(network(*wrong), path)()
    torch.nn.init.constant_(own.head.bias, float("nan"))
    torch.save(own.state_dict(), path)
    with pytest.raises(ValueError, match="NaN or infinite in 1 of its tensors, such as head.bias"):
        engines.StrictCheckpointLoader(other, path)()


def test_one_scan_of_a_datalist(tmp_path):
    affine = np.diag([2.0, 2, 2, 1])
    for name in ("a", "b"):
        write_series(tmp_path / "series" / name, name, (1000 * phantom()).astype(np.uint16), affine, seed=ord(name))
    items = find_inputs(tmp_path / "series")
    assert len(items) == 2
    (tmp_path / "one.json").write_text(json.dumps({"test": [{"image": items[1]["image"]}]}))
    (item,) = find_inputs(tmp_path / "one.json")
    assert item["image"] == items[1]["image"]


def test_windows_blend_to_the_whole_and_scores_are_float32():
    image = torch.rand(1, 1, 40, 30, 20)
    inferer = engines.AutocastSlidingWindowInferer(roi_size=(16, 16, 24), overlap=0.5, mode="gaussian", enabled=False)
    assert torch.allclose(inferer(image, lambda window: 2 * window), 2 * image, atol=1e-5)
    inferer = engines.AutocastSlidingWindowInferer(roi_size=(16, 16, 24), sw_batch_size=4, overlap=0.25)
    seen = []

    def network(window):
        out = nn.functional.conv3d(window, torch.ones(1, 1, 1, 1, 1))
        seen.append(out.dtype)
        return out

    assert inferer(image, network).dtype == torch.float32 and set(seen) == {torch.bfloat16}


def test_the_parts_that_monai_label_takes_work_on_their_own(tmp_path, threshold):
    voxels = (1000 * (phantom() > 0.3)).astype(np.int16)
    write(tmp_path, "scan", voxels, scan_affine((2, 0, 1), (-1, 1, -1), (2, 2, 2), (11, -7, 23)))
    parser = ConfigParser()
    parser.read_config(CONFIG)
    parser.config.update({"bundle_root": str(BUNDLE), "device": "cpu", **threshold})
    path = str(tmp_path / "scan.nii.gz")
    data = {"image": path, "image_path": path, "label": "x"}
    for transform in parser.get_parsed_content("preprocessing", instantiate=True):
        data = transform(data)
    network = parser.get_parsed_content("network_def", instantiate=True)
    network.load_state_dict(torch.load(threshold["weights"], weights_only=True))
    inferer = parser.get_parsed_content("inferer", instantiate=True)
    with torch.no_grad():
        data["pred"] = inferer(data["image"][None], network)[0]
    for transform in parser.get_parsed_content("postprocessing", instantiate=True):
        if type(transform).__name__ != "SaveLikeInputd":  # a SaveImaged, which MONAI Label leaves out
            data = transform(data)
    assert data["pred"].shape == (1, *SHAPE) and data["pred"].dtype == torch.uint8
    assert np.array_equal(data["pred"][0], voxels > 0)
    assert data["pred"].affine.numpy().tobytes() == nib.load(path).affine.tobytes()


def test_the_command_line(tmp_path, threshold):
    write(tmp_path / "scans", "a", (1000 * phantom()).astype(np.int16), np.diag([2.0, 2, 2, 1]))
    (tmp_path / "scans" / "broken.nii.gz").write_bytes(b"")
    line = [sys.executable, "-m", "monai.bundle", "run", "infer", "--config_file", "configs/inference.json"]
    for key, value in {"dataset_dir": tmp_path / "scans", "output_dir": tmp_path / "out", **threshold}.items():
        line += [f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value)]
    environment = {**os.environ, "PYTHONPATH": str(BUNDLE.parent / "custom")}
    done = subprocess.run(line, cwd=BUNDLE, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "broken.nii.gz" in done.stderr.splitlines()[-1]
    assert (tmp_path / "out/a_seg.nii.gz").is_file()
