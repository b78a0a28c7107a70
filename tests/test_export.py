"""Exports as users make them, with ``python -m monai.bundle`` and ``python -m sspformer.export``: TorchScript,
ONNX and torch.export give what the network gives on crops of a brain, in other batches and sizes than they were
exported with; and as much of TensorRT as needs no GPU."""

import csv
import json
import runpy
import sys
import types
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser, ConfigWorkflow
from nilearn import datasets

from sspformer.networks import (
    ExportedNetwork,
    ScanPredictor,
    SSPFormerEncoder,
    SSPFormerRestorer,
    export_network,
    read_weights,
)

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
#: overlays and weights of each task
TASKS = {
    "segmentation": ((), "models/model.pt"),
    "hippocampus": (("hippocampus",), "models/hippocampus/model.pt"),
    "denoising": (("restoration", "denoising"), "models/denoising/model.pt"),
    "super_resolution": (("restoration", "super_resolution"), "models/super_resolution/model.pt"),
}
#: batch and sides of the crops, multiples of the patch and others; not what the files are exported with
SHAPES = [(1, 64, 64, 64), (2, 32, 40, 32), (1, 60, 64, 62)]
ONNX_OPTIONS = (
    "{'input_names':['image'],'output_names':['pred'],'external_data':False,"
    "'dynamic_shapes':[{0:'batch',2:'x',3:'y',4:'z'}]}"
)


def monai_bundle(command, *arguments):
    """``python -m monai.bundle``, from the bundle's folder, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(BUNDLE)
        patch.setattr(sys, "argv", ["monai.bundle", command, *arguments])
        runpy.run_module("monai.bundle", run_name="__main__")


def export(command, task, path, *arguments):
    monai_bundle(
        *(command, "network_def", "--filepath", str(path), "--ckpt_file", TASKS[task][1]),
        *("--config_file", str(config_files(task)), *arguments),
    )
    return path


def config_files(task, *overlays):
    return [f"configs/{name}.json" for name in ("inference", *TASKS[task][0], *overlays)]


def network_of(task):
    """The network that the configs define, with the weights that ship."""
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / name) for name in config_files(task)])
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(BUNDLE / TASKS[task][1], weights_only=True))
    return network.eval()


@pytest.fixture(scope="session")
def heads():
    """ICBM 152 average brain at 1 and 2 mm, intensities 0 to 1, ``(1, 1, X, Y, Z)``."""
    scans = {mm: datasets.load_mni152_template(resolution=mm).get_fdata(dtype=np.float32) for mm in (1, 2)}
    return {
        mm: torch.from_numpy(scan / np.percentile(scan, 99.5)).clamp(0, 1)[None, None] for mm, scan in scans.items()
    }


def crops(heads, task, shape):
    """Input of the network: windows of the brain, as sharp and as noisy as the task expects them."""
    batch, *size = shape
    head = heads[2 if task == "segmentation" else 1]
    starts = [[side // 2 - crop // 2 - 6 * n for side, crop in zip(head.shape[2:], size)] for n in range(batch)]
    windows = torch.cat([head[:, :, i : i + size[0], j : j + size[1], k : k + size[2]] for i, j, k in starts])
    if task == "denoising":
        windows = windows + 0.05 * torch.randn(windows.shape, generator=torch.Generator().manual_seed(0))
    if task == "super_resolution":
        windows = F.interpolate(F.avg_pool3d(windows, 2), size, mode="trilinear")
    return windows


def assert_equal_networks(task, network, exported, heads):
    for shape in SHAPES:
        image = crops(heads, task, shape)
        with torch.no_grad():
            expected = network(image)
        actual = exported(image)
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
        if task in ("denoising", "super_resolution"):  # there is a residual, far larger than the tolerance
            assert (expected - image).abs().max() > 5e-3
        else:
            assert expected.argmax(1).unique().numel() >= 3


# TorchScript


@pytest.fixture(scope="session")
def scripted(tmp_path_factory):
    """Path of the TorchScript file of a task."""
    folder, done = tmp_path_factory.mktemp("torchscript"), {}

    def path(task):
        if task not in done:
            done[task] = export("ckpt_export", task, folder / f"{task}.ts", "--meta_file", "configs/metadata.json")
        return done[task]

    return path


@pytest.mark.parametrize("task", TASKS)
def test_torchscript_gives_what_the_network_gives(task, scripted, heads):
    module = torch.jit.load(scripted(task))
    weights = torch.load(BUNDLE / TASKS[task][1], weights_only=True)
    assert {value.dtype for value in weights.values()} == {torch.float16, torch.int64}  # half precision on disk
    assert {value.dtype for value in module.parameters()} == {torch.float32}
    assert all(torch.equal(value, weights[name].float()) for name, value in module.named_parameters())
    with torch.no_grad():
        assert_equal_networks(task, network_of(task), module, heads)


def test_torchscript_carries_the_configs(scripted):
    files = {f"{Path(name).stem}.json": "" for name in (*config_files("denoising"), "configs/metadata.json")}
    torch.jit.load(scripted("denoising"), _extra_files=files)
    for name, text in files.items():
        content, own = json.loads(text), json.loads((BUNDLE / "configs" / name).read_text())
        if name == "metadata.json":  # MONAI rewrites the # of its descriptions
            content, own = content["network_data_format"], own["network_data_format"]
        assert content == own
        assert str(BUNDLE.parent) not in str(text)


def test_tracing_holds_for_other_sizes_too(tmp_path, heads):
    """``--use_trace True``, as for TensorRT: neither the padding nor the positions are frozen."""
    path = export(
        "ckpt_export", "denoising", tmp_path / "t.ts", "--use_trace", "True", "--input_shape", "[1,1,32,32,32]"
    )
    with torch.no_grad():
        assert_equal_networks("denoising", network_of("denoising"), torch.jit.load(path), heads)


def test_the_network_takes_and_gives_what_the_metadata_say():
    monai_bundle(
        *("verify_net_in_out", "network_def", "--meta_file", "configs/metadata.json"),
        *("--config_file", "configs/inference.json"),
    )  # raises where they differ


# ONNX


@pytest.mark.parametrize("task", ["segmentation", "denoising", "super_resolution"])
def test_onnx_gives_what_the_network_gives(task, tmp_path, heads):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason='ONNX needs pip install "sspformer[export]"')
    import onnxruntime

    path = export(
        *("onnx_export", task, tmp_path / "model.onnx", "--use_trace", "True"),
        *("--input_shape", "[2,1,24,24,24]", "--converter_kwargs", ONNX_OPTIONS),
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,), (result,) = session.get_inputs(), session.get_outputs()
    channels = 18 if task == "segmentation" else 1
    assert (given.name, given.shape) == ("image", ["batch", 1, "x", "y", "z"])
    assert (result.name, result.shape) == ("pred", ["batch", channels, "x", "y", "z"])

    def exported(image):
        return torch.from_numpy(session.run(["pred"], {"image": image.numpy()})[0])

    assert_equal_networks(task, network_of(task), exported, heads)


# torch.export


@pytest.fixture(scope="session")
def segmentation_pt2(tmp_path_factory):
    """``python -m sspformer.export pt2``, from the bundle's folder, in this process."""
    path = tmp_path_factory.mktemp("torch_export") / "model.pt2"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(BUNDLE)
        patch.setattr(sys, "argv", ["sspformer.export", "pt2", "--filepath", str(path)])
        runpy.run_module("sspformer.export", run_name="__main__")
    return path


def test_an_exported_network_gives_what_the_network_gives(segmentation_pt2, heads):
    network, exported = network_of("segmentation"), ExportedNetwork(segmentation_pt2)
    with torch.no_grad():
        for shape in [(1, 64, 64, 64), (2, 32, 40, 48), (3, 16, 16, 16)]:
            image = crops(heads, "segmentation", shape)
            assert torch.equal(exported(image), network(image))
        with pytest.raises(AssertionError, match="Guard failed"):  # no multiple of the patch
            exported(crops(heads, "segmentation", (1, 60, 64, 62)))


@pytest.mark.parametrize("noise_scaled", [False, True])
def test_an_exported_restorer_gives_what_it_gave(noise_scaled, heads):
    """Small ones: the graph of a network as it ships takes 20 s."""
    encoder = SSPFormerEncoder(3, 1, 8, dim=48, depth=2, num_heads=2)
    network = SSPFormerRestorer(encoder, features=8, blocks=1, noise_scaled=noise_scaled).eval()
    torch.nn.init.normal_(network.head.weight)
    exported = export_network(network).module()
    with torch.no_grad():
        for shape in [(1, 48, 48, 48), (2, 32, 40, 48)]:
            image = crops(heads, "denoising", shape)
            assert torch.equal(exported(image), network(image))
            assert (network(image) - image).abs().max() > 1e-3


def test_exported_files_carry_the_configs_and_no_folder(segmentation_pt2):
    files = {"inference.json": "", "metadata.json": ""}
    torch.export.load(segmentation_pt2, extra_files=files)
    assert json.loads(files["inference.json"]) == json.loads((BUNDLE / "configs/inference.json").read_text())
    assert "channel_def" in files["metadata.json"]
    with zipfile.ZipFile(segmentation_pt2) as archive:
        assert not any(str(BUNDLE.parent).encode() in archive.read(name) for name in archive.namelist())


def test_a_network_for_whole_scans_is_exported_for_its_sides():
    """A share of its patches is part of the graph."""
    network = ScanPredictor(SSPFormerEncoder(3, 1, 8, depth=2, dim=48, num_heads=2), out_channels=2).eval()
    torch.nn.init.normal_(network.head.weight)
    exported = export_network(network, [2, 1, 32, 40, 24]).module()
    image = torch.rand(3, 1, 32, 40, 24)
    with torch.no_grad():
        assert torch.equal(exported(image), network(image))


def test_what_is_no_exported_network_is_refused_by_name(segmentation_pt2, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.pt2: write it with"):
        ExportedNetwork(tmp_path / "gone.pt2")
    (tmp_path / "other.pt2").write_bytes((BUNDLE / "models/model.pt").read_bytes())
    with pytest.raises(ValueError, match="other.pt2 is no network of torch.export, or damaged"):
        ExportedNetwork(tmp_path / "other.pt2")
    with pytest.raises(ValueError, match="model.pt2 is a network of torch.export, of which .* has the weights"):
        read_weights(segmentation_pt2, "")


# in place of the network, in the bundle's own workflow


def infer(folder, output, *overlays, **overrides):
    workflow = ConfigWorkflow(
        config_file=[str(BUNDLE / name) for name in config_files("segmentation", *overlays)],
        **{"workflow_type": "inference", "run_id": "inference", "logging_file": False, "bundle_root": str(BUNDLE)},
        **{"dataset_dir": str(folder), "output_dir": str(output), "device": "cpu", "inferer#overlap": 0, **overrides},
    )
    workflow.initialize()
    workflow.run()
    workflow.finalize()
    with (output / "inference.csv").open(newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["written"]
    return np.asarray(nib.load(output / "brain_seg.nii.gz").dataobj)


def test_an_exported_network_runs_in_the_workflow(scripted, segmentation_pt2, heads, tmp_path, monkeypatch):
    """``inference_trt.json`` with TorchScript where the engine of TensorRT would be, and without its overlay."""
    brain = crops(heads, "segmentation", (1, 64, 64, 64))[0, 0].numpy()
    (tmp_path / "scans").mkdir()
    nib.save(nib.Nifti1Image(brain, np.diag([2.0, 2.0, 2.0, 1.0])), tmp_path / "scans" / "brain.nii.gz")
    expected = infer(tmp_path / "scans", tmp_path / "network", amp=False)
    assert len(np.unique(expected)) > 10

    path = str(scripted("segmentation"))
    options = {"weights": path, "network_def": "$torch.jit.load(@weights)", "load_weights": "false"}
    assert np.array_equal(infer(tmp_path / "scans", tmp_path / "ts", amp=False, **options), expected)

    assert np.array_equal(
        infer(tmp_path / "scans", tmp_path / "pt2", amp=False, weights=str(segmentation_pt2)), expected
    )

    monkeypatch.setitem(sys.modules, "torch_tensorrt", types.ModuleType("torch_tensorrt"))  # it needs a GPU
    assert np.array_equal(infer(tmp_path / "scans", tmp_path / "trt", "inference_trt", weights=path), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="would compile an engine, where TensorRT is installed")
def test_the_command_for_tensorrt_comes_as_far_as_the_gpu(tmp_path):
    arguments = ["--precision", "fp32", "--input_shape", "[1,1,64,64,64]", "--dynamic_batchsize", "[1,4,8]"]
    with pytest.raises(Exception, match="Cannot find any GPU devices"):
        export("trt_export", "segmentation", tmp_path / "t.ts", *arguments, "--use_onnx", "True", "--use_trace", "True")


@pytest.mark.parametrize("task", TASKS)
def test_the_overlay_for_tensorrt_replaces_what_it_means_to(task):
    overlay = json.loads((BUNDLE / "configs/inference_trt.json").read_text())
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / name) for name in config_files(task)])
    before = parser.get()
    assert before["handlers"][0]["path"] == "@weights"  # what load_weights disables
    assert "@load_weights" in before["handlers"][0]["_disabled_"]
    assert {key.lstrip("+").split("#")[0] for key in overlay} <= before.keys()
    parser = ConfigParser()
    parser.read_config([str(BUNDLE / name) for name in config_files(task, "inference_trt")])
    after = parser.get()
    assert after["imports"] == [*before["imports"], "$import torch_tensorrt"]
    assert after["handlers"] == before["handlers"] and after["load_weights"] is False
    assert {key for key in before if before[key] != after[key]} == {key.lstrip("+").split("#")[0] for key in overlay}
