"""What MONAI Label 0.8.5 does with the bundle, done without it: the overrides and calls of its tasks/infer/bundle.py
and tasks/train/bundle.py by their names. scripts/monailabel/check.py asks a real server."""

import json
import logging
import os
import re
import runpy
import shutil
import sys
import types
from pathlib import Path

import monai.bundle
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import decollate_batch, partition_dataset
from monai.transforms import Compose, SaveImaged
from nilearn.datasets import load_mni152_template

from sspformer.data import DatasetOptions, LazyDatalist, check_pairs, file_hashing
from sspformer.networks import SSPFormerDense, SSPFormerEncoder

ROOT = Path(__file__).resolve().parents[1]
ENCODER = {"patch_size": 8, "dim": 48, "depth": 2, "num_heads": 2}
#: Label cannot make the network small, so the copy of the bundle that is trained here has this in its train.json
SMALL = {
    **{"class_names": ["ball", "box"], "spacing": [1.0, 1.0, 1.0], "crop_size": [24, 24, 24], "batch_size": 2},
    **{"crops_per_scan": 2, "network_def#out_channels": 3, "network_def#features": 8, "amp": False},
    **{f"encoder#{name}": value for name, value in ENCODER.items()},
}


# --- inference, as BundleInferTask does it


def test_inference_gives_an_integer_label_with_the_scans_grid(tmp_path):
    head = load_mni152_template(resolution=4)
    axes = nib.orientations.axcodes2ornt(("P", "I", "R"))
    turn = nib.orientations.ornt_transform(nib.io_orientation(head.affine), axes)
    head = head.as_reoriented(turn)
    image = np.rint(head.get_fdata() * 900).astype(np.int16)
    scan = nib.Nifti1Image(image, head.affine)
    nib.save(scan, tmp_path / "scan.nii.gz")

    bundle_config = ConfigParser()  # __init__, _load_bundle_config
    bundle_config.read_config(str(ROOT / "bundle/configs/inference.json"))
    bundle_config.config.update({"bundle_root": str(ROOT / "bundle")})
    bundle_config.config["use_click"] = False
    network = bundle_config.get_parsed_content("network_def", instantiate=True)
    state = torch.load(ROOT / "bundle/models/model.pt")
    assert network.state_dict().keys() == state.keys()  # Label would only warn
    network.load_state_dict(state, strict=False)
    network.eval()
    # _update_device: a string; the parser has read the rest of the config by then
    bundle_config.ref_resolver.items["device"] = monai.bundle.ConfigItem(config="cpu", id="device")

    path = str(tmp_path / "scan.nii.gz")
    data = {"image": path, "image_path": path, "model": "sspformer_mri", "device": "cpu", "result_dtype": "uint8"}
    data |= {"model_filename": ["model.pt"], "description": "", "labels": {}}
    pre = bundle_config.get_parsed_content("preprocessing", instantiate=True)
    for transform in pre.transforms if isinstance(pre, Compose) else pre:  # run_transforms
        data = transform(data)
    inferer = bundle_config.get_parsed_content("inferer", instantiate=True)
    with torch.no_grad():
        data["pred"] = decollate_batch(inferer(data["image"][None], network))[0]
    post = bundle_config.get_parsed_content("postprocessing", instantiate=True)
    assert any(isinstance(transform, SaveImaged) for transform in post)
    for transform in post:
        if not isinstance(transform, SaveImaged):  # _filter_transforms
            data = transform(data)

    # Restored and Writer: shape and affine of the file
    assert tuple(data["pred"].shape) == (1, *scan.shape) and data["pred"].dtype == torch.uint8
    assert tuple(data["image"].meta["spatial_shape"]) == scan.shape
    np.testing.assert_allclose(data["image"].meta["original_affine"], scan.affine, atol=1e-4)
    classes = json.loads((ROOT / "bundle/configs/metadata.json").read_text())["network_data_format"]
    labels = {int(value) for value in classes["outputs"]["pred"]["channel_def"]}
    found = set(data["pred"].unique().tolist())
    assert found <= labels and len(found) > 12
    inside = image[data["pred"][0].numpy() > 0]
    assert (inside > 0).mean() > 0.95  # it lies on the head, not beside it


def test_a_client_may_list_the_images_itself(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / folder / "scan.nii.gz" for folder in ("first", "second")]
    for path in paths:
        path.parent.mkdir()
        nib.save(nib.Nifti1Image(rng.random((24, 20, 16), dtype=np.float32), np.diag([2.0, 2, 2, 1])), path)
    workflow = monai.bundle.ConfigWorkflow(
        config_file=str(ROOT / "bundle/configs/inference.json"),
        logging_file=False,  # pytest's own goes on
        bundle_root=str(ROOT / "bundle"),
        dataset_dir="nowhere",
        output_dir=str(tmp_path / "out"),
        **{"dataset#data": [{"image": str(path)} for path in paths]},  # the property "dataset_data" of MONAI's bundles
    )
    for _ in range(2):  # nothing vouches for outputs of before
        workflow.initialize()
        workflow.run()
        workflow.finalize()
        written = sorted(path.name for path in (tmp_path / "out").glob("*.nii.gz"))
        assert written == ["scan-1_seg.nii.gz", "scan-2_seg.nii.gz"]
        assert (tmp_path / "out/inference.csv").read_text().count("written") == 2


# --- training, as BundleTrainTask does it


@pytest.fixture(scope="session")
def small_bundle(tmp_path_factory):
    """The bundle with a small network, and weights and encoder for it."""
    folder = tmp_path_factory.mktemp("label") / "sspformer_mri"
    shutil.copytree(ROOT / "bundle/configs", folder / "configs")
    (folder / "models/pretrained").mkdir(parents=True)
    parser = ConfigParser()
    parser.read_config(str(folder / "configs/train.json"))
    parser.update(SMALL)
    ConfigParser.export_config_file(parser.get(), str(folder / "configs/train.json"), indent=4)
    torch.manual_seed(0)
    network = SSPFormerDense(SSPFormerEncoder(**ENCODER), 3, features=8)
    torch.save({name: v.half() for name, v in network.state_dict().items()}, folder / "models/model.pt")
    torch.save(network.encoder.state_dict(), folder / "models/pretrained/encoder.pt")
    return folder


@pytest.fixture
def bundle(small_bundle, tmp_path, monkeypatch):
    shutil.copytree(small_bundle, tmp_path / "sspformer_mri")
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path / "sspformer_mri"


def save_label(folder, name, label, shift=0.0):
    affine = np.diag([-1.0, 1, 1, 1])
    affine[0, 3] = shift
    nib.save(nib.Nifti1Image(label, affine), folder / name)
    return str(folder / name)


@pytest.fixture
def datalist(tmp_path):
    """Three images and their labels in the types that annotators' tools write, the last with one structure alone."""
    items = []
    for i, dtype in enumerate([np.uint8, np.int16, np.float32]):
        label = np.zeros((32, 30, 28), dtype)
        label[6:14, 8:20, 8 + i : 20] = 2
        if i < 2:
            label[18:26, 8:20, 8 : 20 - i] = 1
        noise = np.random.default_rng(i).normal(0, 20, label.shape)
        image = (np.choose(label.astype(int), [100.0, 1000.0, 500.0]) + noise).clip(0).astype(np.int16)
        names = (f"scan{i}.nii.gz", f"label{i}.nii.gz")
        items.append({k: save_label(tmp_path, n, a) for k, n, a in zip(("image", "label"), names, (image, label))})
    return items


def train(bundle, datalist, run_id="run", device="cpu", max_epochs=1, val_split=0.2):
    """BundleTrainTask.__call__ without its options for several GPUs and MLflow."""
    train_ds, val_ds = partition_dataset(datalist, ratios=[(1 - val_split), val_split], shuffle=False)
    config = str(bundle / "configs/train.json")
    bundle_config = ConfigParser()
    bundle_config.read_config(config)
    bundle_config.config.update({"bundle_root": str(bundle)})
    train_handlers = bundle_config.get("train#handlers", [])
    assert not [t for t in train_handlers if t.get("_target_") == "CheckpointLoader"]  # else Label adds none
    load_path = str(bundle / "models/model.pt")
    loader = {"load_path": load_path, "load_dict": {"model": "$@network"}, "strict": False}
    train_handlers.insert(0, {"_target_": "CheckpointLoader", **loader})
    overrides = {
        "bundle_root": str(bundle),
        "train#trainer#max_epochs": max_epochs,
        "train#dataset#data": train_ds,
        "device": device,
        "train#handlers": train_handlers,
        "validate#dataset#data": val_ds,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "monailabel", types.ModuleType("monailabel"))  # Label's process has imported it
        monai.bundle.run(
            run_id=run_id,
            init_id=None,
            final_id=None,
            meta_file=str(bundle / "configs/metadata.json"),
            config_file=config,
            logging_file=False,  # pytest's own goes on
            **overrides,
        )


def weights(bundle):
    return torch.load(bundle / "models/model.pt", weights_only=True)


def change(before, after):
    return max((after[name].float() - value.float()).abs().max().item() for name, value in before.items())


def first_cause(error):
    return error if error.__cause__ is None else first_cause(error.__cause__)


def messages(caplog, *parts):
    return [r.getMessage() for r in caplog.records if all(part in r.getMessage() for part in parts)]


@pytest.mark.parametrize("run_id", ["run", ""])  # 3D Slicer sends the latter: MONAI then evaluates the whole config
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"))],
)
def test_training_goes_on_from_the_bundles_weights_and_writes_them(bundle, datalist, run_id, device, caplog):
    before = weights(bundle)
    with caplog.at_level(logging.INFO):
        train(bundle, datalist[:2], run_id, device, max_epochs=2)
    assert len(messages(caplog, "Restored all variables", "models/model.pt")) == 1
    assert len(messages(caplog, "epoch 2/2")) == 1  # trained, and once
    after = weights(bundle)
    SSPFormerDense(SSPFormerEncoder(**ENCODER), 3, features=8).load_state_dict(after)  # strict
    assert 0 < change(before, after) < 0.01  # of a network that starts anew it would be far more
    assert sorted(path.name for path in (bundle / "models").glob("*.pt")) == ["model.pt"]  # Label offers each of them


def test_the_next_training_starts_from_there_and_a_held_out_label_judges_it(bundle, datalist, caplog):
    checkpoint = bundle / "output/segmentation/models/checkpoint.pt"  # of a run from the command line
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("of another run")
    train(bundle, datalist[:1])
    first = weights(bundle)
    caplog.clear()  # the first training's, if other tests have left the level at INFO
    with caplog.at_level(logging.INFO):
        train(bundle, datalist)  # two and one
    epoch = messages(caplog, "epoch 1/1")
    assert len(epoch) == 1 and "dice" in epoch[0]
    # what it starts from is judged before the first epoch, and stays unless an epoch is better
    texts = [record.getMessage() for record in caplog.records]
    start = next(i for i, text in enumerate(texts) if "weights written" in text)
    assert start < texts.index(epoch[0]) and "dice" in texts[start]
    dice = [float(text.rsplit(" ", 1)[1]) for text in messages(caplog, "weights written")]
    assert dice == sorted(dice) and change(first, weights(bundle)) < 0.01
    assert checkpoint.read_text() == "of another run"
    if len(dice) == 1:
        assert change(first, weights(bundle)) == 0


def test_a_label_map_that_does_not_fit_is_refused_by_name(bundle, datalist, tmp_path):
    before = weights(bundle)
    label = np.asarray(nib.load(datalist[0]["label"]).dataobj)
    save_label(tmp_path, "label0.nii.gz", label * 5)
    save_label(tmp_path, "label1.nii.gz", label, shift=3.0)
    with pytest.raises(RuntimeError) as caught:
        train(bundle, datalist)
    said = str(first_cause(caught.value))
    assert "2 of 3 images" in said and "unknown values 5, 10" in said and "3 mm off" in said
    assert "scan0.nii.gz" in said and "scan1.nii.gz" in said and "scan2.nii.gz" not in said
    assert change(before, weights(bundle)) == 0
    check_pairs(datalist[2:], DatasetOptions(tmp_path, classes=3))


@pytest.mark.parametrize("run_id", ["run", ""])
def test_training_without_a_label_says_so(bundle, run_id):
    with pytest.raises(RuntimeError, match="from_monai_label") as caught:
        train(bundle, [], run_id)
    assert "there is no labelled image to train on" in str(first_cause(caught.value))


def test_a_label_map_that_is_saved_anew_is_read_anew(datalist, tmp_path):
    before = file_hashing(datalist[0])
    assert before == file_hashing(dict(datalist[0])) != file_hashing(datalist[1])
    label = np.asarray(nib.load(datalist[0]["label"]).dataobj)
    save_label(tmp_path, "label0.nii.gz", label[::-1].copy())
    os.utime(datalist[0]["label"], ns=(0, 1))  # whatever the clock of the file system
    assert file_hashing(datalist[0]) != before


def test_a_datalist_that_nobody_asks_for_is_not_made():
    made = []
    lists = LazyDatalist(lambda folder: made.append(folder) or {"training": [1], "validation": []}, "nowhere")
    assert not made
    assert dict(lists) == {"training": [1], "validation": []} and len(lists) == 2 and made == ["nowhere"]


@pytest.mark.parametrize("own_lists", [False, True])
def test_a_run_on_a_data_set_leaves_the_bundles_weights_alone(bundle, datalist, tmp_path, own_lists):
    for item in datalist[:2]:
        for folder, path in (("images", item["image"]), ("labels", item["label"])):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "data" / folder / Path(path).name.replace("label", "scan"))
    before = (bundle / "models/model.pt").read_bytes()
    settings = {"dataset_dir": str(tmp_path / "data"), "output_dir": str(tmp_path / "out"), "epochs": 1}
    if own_lists:
        settings |= {"train#dataset#data": datalist[:2], "validate#dataset#data": datalist[2:]}
    config = str(bundle / "configs/train.json")
    monai.bundle.run("training", config_file=config, logging_file=False, bundle_root=str(bundle), **settings)
    assert (tmp_path / "out/models/model.pt").is_file() and (bundle / "models/model.pt").read_bytes() == before


# --- another of our weights, as a bundle of its own


def test_a_bundle_of_an_overlay_has_its_network_weights_and_labels(tmp_path):
    target = tmp_path / "sspformer_hippocampus"
    main = runpy.run_path(str(ROOT / "scripts/overlay_bundle.py"))["main"]
    main(ROOT / "bundle", "hippocampus", target)
    metadata = json.loads((target / "configs/metadata.json").read_text())
    names = ["background", "anterior hippocampus", "posterior hippocampus"]
    assert list(metadata["network_data_format"]["outputs"]["pred"]["channel_def"].values()) == names
    for workflow in (["train"], ["train", "evaluate"], ["inference"]):
        parser = ConfigParser()
        parser.read_config([str(target / f"configs/{name}.json") for name in workflow])
        parser["bundle_root"] = str(target)
        network = parser.get_parsed_content("network_def")
        network.load_state_dict(torch.load(target / "models/model.pt", weights_only=True))
        assert parser.get_parsed_content("class_names") == names[1:] and not parser.get_parsed_content("whole_head")
        assert parser.get_parsed_content("spacing") == [1.0, 1.0, 1.0]
    assert "eval_metrics" not in metadata and metadata["label_classes"] == ", ".join(names[1:])
    of_networks = {name: text for name, text in metadata.items() if not name.endswith("_config")}
    assert not re.search("17|T1|super-resolution,", json.dumps({**of_networks, "references": [], "changelog": {}}))
    assert [path.name for path in (target / "docs").iterdir()] == ["data_license.txt"]
    configs = {path.stem for path in (target / "configs").glob("*.json")}
    assert {"train", "inference", "evaluate", "metadata", "multi_gpu_train"} <= configs
    assert not configs & {"hippocampus", "restoration", "denoising", "super_resolution", "whole_scan", "regression"}
    with pytest.raises(SystemExit, match="denoising.json is no segmentation"):
        main(ROOT / "bundle", "denoising", tmp_path / "denoising")
    with pytest.raises(SystemExit, match="kidney.json does not exist.*: denoising, hippocampus, "):
        main(ROOT / "bundle", "kidney", tmp_path / "kidney")
