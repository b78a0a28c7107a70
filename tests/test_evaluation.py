"""Metrics in mm, confidence intervals, pictures the right way round, and evaluation as users run it.

Networks of one layer stand in for trained ones, so that what the scores should be is known."""

import csv
import json
from pathlib import Path

import matplotlib.image
import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.engines import SupervisedEvaluator
from monai.metrics import PSNRMetric, SSIMMetric, compute_hausdorff_distance, compute_surface_dice
from monai.networks import one_hot
from monai.transforms import Orientation

from sspformer.data import class_names
from sspformer.engines import RestorationPanel, SegmentationPanel
from sspformer.metrics import (
    FittedSSIM,
    ForegroundPSNR,
    ForegroundSSIM,
    HausdorffDistance95,
    SurfaceDice,
    bootstrap_interval,
    summarize,
)
from sspformer.pictures import class_colors, curves, figure_to_array, restoration_panel, segmentation_panel

CONFIGS = Path(__file__).resolve().parents[1] / "bundle" / "configs"


def label_map(*boxes, spacing=(1.0, 2.0, 3.0), shape=(24, 20, 16)):
    labels = torch.zeros(1, *shape, dtype=torch.uint8)
    for value, box in enumerate(boxes, start=1):
        if box is not None:
            labels[(0, *(slice(*side) for side in box))] = value
    return MetaTensor(labels, affine=torch.diag(torch.tensor([*spacing, 1.0])))


BOX, SHIFTED = ((4, 12), (4, 12), (4, 12)), ((4, 12), (4, 12), (5, 13))
OTHER = ((14, 20), (4, 10), (4, 10))


def test_surface_metrics_are_in_mm():
    true, pred = label_map(BOX, OTHER), label_map(SHIFTED, OTHER)
    assert HausdorffDistance95(3)([pred], [true]).tolist() == [[3.0, 0.0]]  # one voxel of 3 mm
    close, far = (SurfaceDice(3, tolerance)([pred], [true])[0].tolist() for tolerance in (3.0, 1.0))
    assert close == [1.0, 1.0] and far[0] < 0.9 and far[1] == 1.0


def test_surface_metrics_are_those_of_monai_on_the_whole_image():
    generator = torch.Generator().manual_seed(0)
    true, pred = label_map(BOX, OTHER), label_map(SHIFTED, OTHER)
    pred[:] = torch.where(torch.rand(pred.shape, generator=generator) < 0.02, 2, pred.as_tensor())
    maps = [one_hot(labels.as_tensor()[None], 3) for labels in (pred, true)]
    hausdorff = compute_hausdorff_distance(*maps, percentile=95, spacing=(1, 2, 3))
    surface_dice = compute_surface_dice(*maps, [2.0, 2.0], spacing=(1, 2, 3), use_subvoxels=True)
    torch.testing.assert_close(HausdorffDistance95(3)([pred], [true]), hausdorff)
    torch.testing.assert_close(SurfaceDice(3, 2.0)([pred], [true]), surface_dice)


def test_structures_that_are_absent_or_missed():
    without, both = label_map(BOX, None), label_map(BOX, OTHER)
    for metric, of_missed in ((HausdorffDistance95(3), np.inf), (SurfaceDice(3, 1.0), 0.0)):
        assert torch.isnan(metric([both], [without])[0, 1]) and torch.isnan(metric([without], [without])[0, 1])
        assert metric([without], [both])[0, 1] == of_missed
    nothing = label_map()
    assert torch.isnan(HausdorffDistance95(3)([nothing], [nothing])).all()
    with pytest.raises(ValueError, match="affine"):
        SurfaceDice(3, 1.0)([both.as_tensor()], [both.as_tensor()])


def test_errors_in_air_do_not_count_over_the_foreground():
    clean = torch.zeros(1, 24, 24, 24)
    clean[:, 6:18, 6:18, 6:18] = 0.5 + 0.5 * torch.rand(1, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    in_air, everywhere = clean.clone(), clean + 0.1
    in_air[:, :, :, 0] += 0.3
    assert torch.isinf(ForegroundPSNR()([in_air], [clean])) and ForegroundSSIM(win_size=5)([in_air], [clean]) > 0.9999
    assert torch.isfinite(PSNRMetric(1.0)([in_air], [clean]))
    torch.testing.assert_close(ForegroundPSNR()([everywhere], [clean]), torch.tensor([[20.0]]))
    blurred = torch.nn.functional.avg_pool3d(clean, 3, 1, 1)
    assert ForegroundSSIM(win_size=5)([blurred], [clean]) < 0.9


@pytest.mark.parametrize("n_slices", [1, 4, 7, 12])
def test_the_window_of_ssim_fits_a_thin_slab(n_slices):
    clean = torch.rand(1, 1, 20, 24, n_slices, generator=torch.Generator().manual_seed(0))
    worse = (clean + 0.3 * clean.flip(2)).clamp(max=1)
    window = {1: 1, 4: 3}.get(n_slices, 7)
    expected = SSIMMetric(3, win_size=(7, 7, window))(worse, clean)
    torch.testing.assert_close(FittedSSIM(win_size=7)(worse, clean), expected)
    for metric in (FittedSSIM(win_size=7), ForegroundSSIM(win_size=7)):
        assert metric(clean, clean).item() == pytest.approx(1) and 0 < metric(worse, clean).item() < 0.95


def test_the_confidence_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        low, high = bootstrap_interval(rng.normal(0.8, 0.1, 30), n_resamples=1000, seed=seed)
        hits += low < 0.8 < high
    assert 180 <= hits <= 199  # 95 % of 200, a little less for so few subjects
    scores = rng.normal(0.8, 0.1, 400)
    low, high = bootstrap_interval(scores)
    assert bootstrap_interval(scores) == (low, high)
    assert high - low == pytest.approx(2 * 1.96 * scores.std() / 20, rel=0.1)
    assert np.isnan(bootstrap_interval(scores[:1])).all()


def test_a_summary_leaves_out_what_is_not_finite_and_says_so():
    summary = summarize(np.array([1.0, 2.0, 6.0, np.inf, np.nan]))
    assert (summary["n"], summary["mean"], summary["median"], summary["infinite"]) == (3, 3.0, 2.0, 1)
    assert np.isnan(summarize(np.array([np.nan]))["mean"])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def test_pictures_are_as_radiologists_look_whatever_the_axes_of_the_file():
    affine = torch.diag(torch.tensor([2.0, 2.0, 4.0, 1.0]))
    image = MetaTensor(torch.rand(1, 24, 20, 12, generator=torch.Generator().manual_seed(0)), affine=affine)
    labels = torch.zeros(1, 24, 20, 12)
    labels[:, 16:20, 6:14, 4:8] = 1  # on the person's right
    sample = {"image": image, "pred": MetaTensor(labels, affine=affine), "label": MetaTensor(labels, affine=affine)}
    picture = figure_to_array(segmentation_panel([sample], ["structure"]))
    red, green, blue = np.moveaxis(picture[: picture.shape[0] * 2 // 3].astype(int), -1, 0)
    columns = np.flatnonzero(((red - green) > 60).sum(axis=0))  # the colour of the first structure
    first = columns[columns < picture.shape[1] // 6]  # the axial slice with the truth
    assert len(first) and first.mean() < 0.45 * picture.shape[1] / 6

    turn = Orientation("PSR", labels=None)
    turned = {key: turn(volume) for key, volume in sample.items()}
    assert np.array_equal(figure_to_array(segmentation_panel([turned], ["structure"])), picture)
    before = {"image": image, "pred": image * 0.9, "label": {"clean": image.as_tensor()}}
    turned = {"image": turn(image), "pred": turn(image * 0.9), "label": {"clean": turn(image).as_tensor()}}
    pair = [figure_to_array(restoration_panel([sample])) for sample in (before, turned)]
    assert np.array_equal(*pair)


def test_pictures_of_what_users_have():
    image, name = torch.rand(1, 20, 18, 16), "a"
    scores = torch.rand(4, 20, 18, 16)
    one = segmentation_panel([{"image": image, "pred": scores, "name": name}])
    assert len(one.axes) == 3 and [text.get_text() for text in one.legends[0].get_texts()][0] == "label 1"
    two = segmentation_panel([{"image": image, "pred": scores, "label": scores.argmax(0)[None], "name": name}] * 2)
    assert len(two.axes) == 12 and "mean Dice 1.000" in two.axes[0].get_ylabel()
    assert len(segmentation_panel([{"image": image, "pred": torch.zeros(1, 20, 18, 16)}], ["x"]).axes) == 3
    assert len(segmentation_panel([{"image": image[..., 0], "pred": scores[..., 0]}]).axes) == 1
    finer = MetaTensor(torch.rand(1, 20, 18, 32), affine=torch.diag(torch.tensor([1, 1, 0.5, 1])))
    assert len(restoration_panel([{"image": MetaTensor(image), "pred": finer}]).axes) == 4
    assert len(restoration_panel([{"image": image, "pred": image}]).axes) == 6
    assert len(set(class_colors(20))) == 20


def test_curves_draw_whatever_columns_there_are():
    rows = [{"epoch": i, "train_loss": 1.0 / i, "learning_rate": 0.1} for i in range(1, 4)]
    rows[-1] |= {"mean_dice": 0.8, "dice_of_input": 0.1, "psnr": 30.0, "something": 1.0}
    figure = curves(rows)
    assert [axis.get_title() for axis in figure.axes] == ["loss", "Dice", "PSNR, dB", "something"]
    assert figure.axes[0].get_yscale() == "log" and len(figure.axes[1].lines) == 2
    assert len(curves([{**row, "a": 1, "b": 2, "c": 3, "d": 4} for row in rows]).axes) == 8
    assert curves([{"epoch": 1, "train_loss": -3.0}]).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("decollate", [True, False])
def test_panels_of_a_training(tmp_path, decollate):
    image = torch.rand(2, 1, 12, 12, 12)
    batches = [{"image": image, "label": (image > 0.5).float(), "name": ["a", "b"]}] * 2
    network = torch.nn.Conv3d(1, 2, 1)
    handlers = [SegmentationPanel(str(tmp_path), ["bright"], n_images=3)]
    evaluator = SupervisedEvaluator("cpu", batches, network, decollate=decollate, val_handlers=handlers)
    evaluator.run(7)

    def prepare(batch, *_, **__):
        return batch["image"], {"clean": batch["image"]}

    handlers = [RestorationPanel(str(tmp_path), n_images=2, separate=True)]
    network = torch.nn.Conv3d(1, 1, 1)
    SupervisedEvaluator("cpu", batches, network, prepare_batch=prepare, decollate=decollate, val_handlers=handlers).run(
        1
    )
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["a.png", "b.png", "epoch_0007.png"]
    assert matplotlib.image.imread(tmp_path / "pictures" / "epoch_0007.png").std() > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# The bundle's evaluate.json
# ---------------------------------------------------------------------------------------------------------------------


def ellipsoids(n_classes, shape=(36, 30, 22)):
    """Nested label map of 0 to ``n_classes``."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    radius = np.sqrt(((grid / np.array([0.9, 0.85, 0.8]).reshape(3, 1, 1, 1)) ** 2).sum(axis=0))
    return np.sum([radius < 1 - 0.3 * i for i in range(n_classes)], axis=0).astype(np.int16)


def evaluate(tmp_path, *overlays, **overrides):
    settings = {
        "device": "cpu",
        "num_workers": 0,
        "roi_size": [16, 16, 16],
        "amp": False,
        "bundle_root": CONFIGS.parent,
        "initialize": [],  # it looks at the head of our network
        "output_dir": tmp_path / "out",
    }
    files = [str(CONFIGS / name) for name in ("train.json", *overlays, "evaluate.json")]
    settings = {
        name: str(value) if isinstance(value, Path) else value for name, value in (settings | overrides).items()
    }
    monai.bundle.run(run_id="evaluating", config_file=files, **settings)
    out = Path(settings["output_dir"])
    tables = []
    for name in ("metrics.csv", "summary.csv"):
        with (out / name).open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    return *tables, json.loads((out / "summary.json").read_text())


def test_segmentation_is_scored_on_the_labels_own_grid(tmp_path):
    affine = np.array([[0, 0, -2.5, 20], [-1.5, 0, 0, 30], [0, 1.5, 0, -10], [0, 0, 0, 1.0]])  # posterior, up, left
    for name in ("images", "labels"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for i, n_classes in enumerate((3, 3, 2)):
        labels = ellipsoids(n_classes)
        nib.save(nib.Nifti1Image(labels * 300, affine), tmp_path / f"data/images/p{i}.nii.gz")
        nib.save(nib.Nifti1Image(labels.astype(np.uint8), affine), tmp_path / f"data/labels/p{i}.nii.gz")
    nib.save(
        nib.Nifti1Image(labels[1:].astype(np.uint8), affine), tmp_path / "data/labels/p3.nii.gz"
    )  # does not fit its image
    nib.save(nib.Nifti1Image(labels * 300, affine), tmp_path / "data/images/p3.nii.gz")

    levels = torch.tensor([0, 1, 2, 3]) / 3  # the class whose level is the nearest has the largest score
    torch.save({"weight": 2 * levels.reshape(4, 1, 1, 1, 1), "bias": -(levels**2)}, tmp_path / "model.pt")
    conv = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 4, "kernel_size": 1}
    rows, summary, report = evaluate(
        tmp_path,
        dataset_dir=tmp_path / "data",
        weights=tmp_path / "model.pt",
        network_def=conv,
        class_names=["outer", "middle", "inner"],
    )
    assert [(row["name"], row["structure"]) for row in rows[:4]] == [
        ("p0", structure) for structure in ("mean", "outer", "middle", "inner")
    ]
    assert len(rows) == 12 and all(float(row["dice"]) > 0.85 for row in rows[:8])
    assert all(float(row["hd95"]) <= 2.5 and float(row["surface_dice"]) > 0.95 for row in rows[:8])
    assert rows[-1] == {"name": "p2", "subject": "p2", "structure": "inner", "dice": "", "surface_dice": "", "hd95": ""}
    inner = next(row for row in summary if (row["metric"], row["structure"]) == ("dice", "inner"))
    scores = [float(row["dice"]) for row in rows if row["structure"] == "inner" and row["dice"]]
    assert inner["n"] == "2" and float(inner["mean"]) == pytest.approx(np.mean(scores), abs=1e-4)
    assert float(inner["ci_low"]) <= float(inner["mean"]) <= float(inner["ci_high"])
    assert report["subjects"] == 3 and report["tolerance_mm"] == 2.0
    pictures = sorted(path.name for path in (tmp_path / "out/pictures").iterdir())
    assert pictures == ["p0.png", "p1.png", "p2.png"]
    assert "p3" in (tmp_path / "out/scans.csv").read_text()


def write_scans(folder, n_slices):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for i, n in enumerate(n_slices):
        image = (ellipsoids(3, (36, 30, n)) * 300 + rng.random((36, 30, n))).astype(np.float32)
        nib.save(nib.Nifti1Image(image, np.diag([1.0, 1, 1.5, 1])), folder / f"p{i}.nii.gz")


def test_restoration_is_scored_beside_its_input(tmp_path):
    write_scans(tmp_path / "data", (22, 22))
    kernel = torch.full((1, 1, 3, 3, 3), 0.5 / 26)
    kernel[..., 1, 1, 1] = 0.5
    torch.save({"weight": kernel, "bias": torch.zeros(1)}, tmp_path / "model.pt")
    conv = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 1, "kernel_size": 3, "padding": 1}
    rows, summary, report = evaluate(
        tmp_path,
        *("restoration.json", "denoising.json"),
        dataset_dir=tmp_path / "data",
        weights=tmp_path / "model.pt",
        network_def=conv,
        **{"val_degradation#sigma": 0.15},
    )
    assert [row["name"] for row in rows] == ["p0", "p1"] and report["name"] == "denoising"
    for row in rows:
        assert float(row["sigma"]) == pytest.approx(0.15)
        assert float(row["psnr"]) > float(row["psnr_of_input"])
        gain = float(row["psnr"]) - float(row["psnr_of_input"])
        assert float(row["psnr_gain"]) == pytest.approx(gain, abs=2e-3)
    assert "ssim_gain" in [row["metric"] for row in summary]
    assert sorted(path.name for path in (tmp_path / "out/pictures").iterdir()) == ["p0.png", "p1.png"]


def test_scans_of_one_person_count_once(tmp_path):
    write_scans(tmp_path / "data", (20, 20, 20))
    for i, name in enumerate(("sub-a_T1w", "sub-a_T2w", "sub-b_T1w")):
        (tmp_path / f"data/p{i}.nii.gz").rename(tmp_path / f"data/{name}.nii.gz")
    torch.save({"weight": torch.full((1, 1, 1, 1, 1), 0.9)}, tmp_path / "model.pt")
    conv = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 1, "kernel_size": 1, "bias": False}
    options = {"dataset_dir": tmp_path / "data", "weights": tmp_path / "model.pt", "network_def": conv}
    rows, summary, report = evaluate(tmp_path, "restoration.json", "denoising.json", **options)
    assert (report["scans"], report["subjects"]) == (3, 2) and len(rows) == 3
    first, second, other = (float(row["psnr"]) for row in rows)
    psnr = next(row for row in summary if row["metric"] == "psnr")
    assert psnr["n"] == "2" and first != second
    assert float(psnr["mean"]) == pytest.approx(((first + second) / 2 + other) / 2, abs=1e-3)


def test_thin_slabs_are_scored_and_the_factors_said(tmp_path):
    write_scans(tmp_path / "data", (5, 22, 2))
    torch.save({"weight": torch.ones(1, 1, 1, 1, 1)}, tmp_path / "model.pt")
    conv = {"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 1, "kernel_size": 1, "bias": False}
    rows, summary, report = evaluate(
        tmp_path,
        *("restoration.json", "super_resolution.json"),
        dataset_dir=tmp_path / "data",
        weights=tmp_path / "model.pt",
        network_def=conv,
    )
    assert report["subjects"] == 3 and "sigma" not in rows[0]
    gains = [float(row[name]) for row in rows for name in ("psnr_gain", "ssim_gain", "ssim_foreground_gain")]
    assert np.abs(gains).max() < 1e-3  # the network gives back its input
    assert next(row["n"] for row in summary if row["metric"] == "ssim_foreground") == "3"
    factors = [[float(factor) for factor in row["factor"].split("x")] for row in rows]
    assert all(len(axes) == 3 and 2 <= max(axes) <= 4 and len(set(axes) - {1.0}) == 1 for axes in factors)
    assert len({max(axes) for axes in factors}) == 3


def test_class_names_are_those_of_the_metadata():
    metadata = json.loads((CONFIGS / "metadata.json").read_text())
    channels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert class_names(CONFIGS.parent) == [channels[str(i)] for i in range(1, len(channels))]
