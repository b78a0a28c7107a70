"""Intensities that are no magnitude: restoration gives them back on their own scale, or refuses with the reason."""

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser
from monai.transforms import Compose
from odd_inputs import (
    datalist,
    head,
    infer,
    labelled,
    load,
    nifti,
    outcome,
    overlays_of,
    run,
    stand_in,
    tiny,
    unblended,
)

PLAIN = head(noise=0) + 20 * np.random.default_rng(0).random((24, 22, 20), np.float32)
TASKS = {"denoising.json": "denoised", "super_resolution.json": "sr"}
MAGNITUDE = ("magnitude", "negative")


def restored(folder, task, scans, **options):
    """`inference.csv`, and the results, of a network that makes everything 1.3 times as bright."""
    for name, array in scans.items():
        nifti(folder / "in" / f"{name}.nii.gz", array)
    options = {**unblended(), "data_consistency": False, **stand_in(folder, 1, 1.3), **options}
    if task == "super_resolution.json":
        options["factor"] = 1
    table = infer(folder / "in", folder / "out", task, **options)
    files = {name: folder / "out" / f"{name}_{TASKS[task]}.nii.gz" for name in scans}
    return table, {name: load(file)[0].numpy() for name, file in files.items() if file.exists()}


SCALES = {
    "1000 times as large": (1e3, 0),
    "in [0, 0.001]": (1e-6, 0),
    "at 1e33": (1e30, 0),
    "at 1e-33": (1e-36, 0),
    "z-scored": (1 / PLAIN.std(), -PLAIN.mean() / PLAIN.std()),
    "offset by -500": (1.0, -500.0),
    "offset by -2000": (1.0, -2000.0),
    "slightly below 0": (1.0, -100.0),
    "in [-1, 1]": (2 / PLAIN.max(), -1.0),
    "in [-2, -1]": (1 / PLAIN.max(), -2.0),
    "offset by 4000": (1.0, 4000.0),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("case", SCALES)
def test_an_affine_scale_is_brought_to_a_magnitude_and_back_or_refused(case, task, tmp_path):
    slope, shift = SCALES[case]
    table, found = restored(tmp_path, task, {"plain": PLAIN, "scaled": (slope * PLAIN + shift).astype(np.float32)})
    assert table["plain"]["status"] == "written"
    if table["scaled"]["status"] == "failed":
        assert any(word in table["scaled"]["reason"] for word in MAGNITUDE), table["scaled"]["reason"]
        return
    expected = slope * found["plain"].astype(float) + shift
    assert np.abs(found["scaled"] - expected).max() < 0.02 * slope * PLAIN.max()


def test_a_signed_integer_scan_is_not_clipped_at_the_end_of_its_type(tmp_path):
    """Stored with an offset, in [-32768, ...]: brighter by 1.3 must not leave the air at the end of the type."""
    table, found = restored(tmp_path, "denoising.json", {"low": (55 * PLAIN - 32000).astype(np.int16)})
    if table["low"]["status"] == "failed":
        assert any(word in table["low"]["reason"] for word in MAGNITUDE)
        return
    assert (found["low"] <= -32768).mean() < 0.01


@pytest.mark.parametrize(
    "task",
    [
        "denoising.json",
        "super_resolution.json",  # at a factor of 1 the measured k-space is put back whole
    ],
)
def test_air_at_0_within_the_range_is_restored_within_the_range_or_refused(task, tmp_path):
    """Air at 0 and dark tissue below it: no affine map makes a magnitude of it. With the weights that ship."""
    noisy = head(noise=60)
    inside = PLAIN > 100
    z = np.where(inside, (noisy - noisy[inside].mean()) / noisy[inside].std(), 0).astype(np.float32)
    nifti(tmp_path / "in" / "z.nii.gz", z)
    factor = {"factor": 1} if task == "super_resolution.json" else {}
    table = infer(tmp_path / "in", tmp_path / "out", task, roi_size=[48, 48, 48], **factor)
    if table["z"]["status"] == "failed":
        assert any(word in table["z"]["reason"] for word in MAGNITUDE), table["z"]["reason"]
        return
    out, room = load(tmp_path / "out" / f"z_{TASKS[task]}.nii.gz"), 0.25 * np.ptp(z)
    assert z.min() - room < float(out.min()) and float(out.max()) < z.max() + room
    assert np.abs(out[0].numpy()[~inside]).mean() < 0.1  # air stays air


@pytest.mark.parametrize(
    ("value", "overlays"),
    [(value, overlays) for value in (0, -5, 1000) for overlays in ((), ("denoising.json",))],
)
def test_a_scan_of_one_value_is_refused_by_inference_too(value, overlays, tmp_path):
    nifti(tmp_path / "in" / "flat.nii.gz", np.full((24, 22, 20), value, np.float32))
    table = infer(tmp_path / "in", tmp_path / "out", *overlays, **stand_in(tmp_path, 1 if overlays else 2))
    assert table["flat"]["status"] == "failed"
    assert "same value" in table["flat"]["reason"]


@pytest.mark.parametrize(
    ("slope", "shift"),
    [(1, 0), (1e-3, 0), (0.004, -1.7), (1.0, -1024), (-1.0, 5000), (1e34, 0), (1e-38, 0)],
    ids=str,
)
def test_segmentation_is_the_same_on_any_affine_scale(slope, shift, tmp_path):
    """The README's "any intensity scale"; an inverted scan is only to end well."""
    arrays = {"plain": PLAIN, "scaled": (slope * PLAIN + shift).astype(np.float32)}
    for name, array in arrays.items():
        nifti(tmp_path / "in" / f"{name}.nii.gz", array)
    table = infer(tmp_path / "in", tmp_path / "out", **stand_in(tmp_path))
    if table["scaled"]["status"] == "failed":
        assert slope < 1e-30 or slope > 1e30, table["scaled"]["reason"]
        return
    plain, scaled = (load(tmp_path / "out" / f"{name}_seg.nii.gz").numpy() for name in arrays)
    assert slope < 0 or (plain != scaled).mean() < 0.002


def preprocessed(config, *overlays, image):
    parser = ConfigParser()
    parser.read_config(overlays_of(config, *overlays))
    parser.config["keys"] = ["image"]
    return Compose(parser.get_parsed_content("preprocessing"))({"image": str(image)})["image"].numpy()


@pytest.mark.parametrize("overlay", TASKS)
@pytest.mark.parametrize("case", ["z-scored", "offset by -500"])
def test_training_of_restoration_sees_the_same_as_of_the_magnitude_or_refuses(case, overlay, tmp_path):
    slope, shift = SCALES[case]
    plain = nifti(tmp_path / "plain1.nii.gz", PLAIN)
    scaled = nifti(tmp_path / "scaled2.nii.gz", (slope * PLAIN + shift).astype(np.float32))
    found = outcome(preprocessed, "train.json", overlay, image=scaled)
    if not found:
        assert found.named and any(word in found.error for word in MAGNITUDE)
        return
    expected = preprocessed("train.json", overlay, image=plain)
    assert np.abs(found.value - expected).max() < 0.02 and found.value.min() > -0.02


def test_evaluation_of_a_z_scored_scan_scores_as_the_magnitude_or_leaves_it_out(tmp_path):
    scores = {}
    for name in ("plain", "z-scored"):
        slope, shift = SCALES[name] if name in SCALES else (1, 0)
        nifti(tmp_path / name / "p1.nii.gz", (slope * PLAIN + shift).astype(np.float32))
        options = {**stand_in(tmp_path, 1, 0.9), **unblended(), "roi_size": [24, 24, 24]}
        out = tmp_path / f"out {name}"
        found = outcome(run, "evaluate", tmp_path / name, out, "denoising.json", max_pictures=0, **options)
        if name == "z-scored" and not found:
            assert found.named and any(word in found.error for word in MAGNITUDE), found.error
            return
        assert found, found.trace
        text = (out / "metrics.csv").read_text().splitlines()
        scores[name] = dict(zip(text[0].split(","), text[1].split(",")))
    for key in ("psnr", "psnr_of_input"):
        column = next(name for name in scores["plain"] if name.startswith(key))
        assert abs(float(scores["plain"][column]) - float(scores["z-scored"][column])) < 0.1


@pytest.mark.parametrize(
    "header",
    [
        {"scl_slope": np.nan, "scl_inter": 0},
        {"scl_slope": 0, "scl_inter": 7},
        {"scl_slope": -1, "scl_inter": 900},
        {"scl_slope": np.inf, "scl_inter": 0},
        {"scl_slope": 1, "scl_inter": np.nan},
        {"scl_slope": 1e38, "scl_inter": 0},
    ],
    ids=str,
)
def test_scale_factors_are_those_of_nibabel_or_refused_by_name(header, tmp_path):
    path = nifti(tmp_path / "p1.nii.gz", **header)
    found = outcome(datalist, tmp_path, val_fraction=0)
    if found:
        expected = np.asarray(nib.load(path).dataobj, np.float32)
        assert np.array_equal(load(path)[0].numpy(), expected)
    else:
        assert found.named and "p1.nii.gz" in found.error


def test_pretraining_takes_any_affine_scale(tmp_path):
    """It clips between percentiles: z-scored scans train as others do."""
    folder = labelled(tmp_path / "data", 3) / "images"
    for path in sorted(folder.iterdir()):
        array = load(path)[0].numpy()
        nifti(path, ((array - array.mean()) / array.std()).astype(np.float32))
    run("pretrain", folder, tmp_path / "out", **tiny("pretrain"))
    assert (tmp_path / "out" / "models" / "checkpoint.pt").exists()
