"""What the Model Zoo's CI verifies: the metadata against its schema, the network against the metadata, the properties
of the workflows, and the bundle's unit test in the zoo's own form, on the bundle as it is packaged."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.apps.utils import download_url
from monai.bundle import ConfigWorkflow, verify_metadata, verify_net_in_out
from monai.utils import set_determinism

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "bundle/configs"
TASKS = (
    [],
    ["hippocampus"],
    *(["restoration", name] for name in ("denoising", "super_resolution")),
    *(["whole_scan", name] for name in ("classification", "regression")),
)
#: workflow type in MONAI's words, configs
WORKFLOWS = [
    *(("train", ["pretrain", *overlay]) for overlay in ([], ["pretrain_2d"], ["whole_network"])),
    *(("train", ["train", *overlay]) for overlay in (*TASKS, ["multi_gpu_train"])),
    *(("evaluation", ["train", *overlay, "evaluate"]) for overlay in TASKS),
    *(("inference", ["inference", *overlay]) for overlay in TASKS),
]


def test_metadata_fit_their_schema(tmp_path):
    """MONAI fetches the schema from the network; MONAI_META_SCHEMA names a copy of it for a machine without."""
    pytest.importorskip("jsonschema")
    if "MONAI_META_SCHEMA" in os.environ:
        shutil.copyfile(os.environ["MONAI_META_SCHEMA"], tmp_path / "schema.json")
    url = json.loads((CONFIGS / "metadata.json").read_text())["schema"]
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        download_url(url, tmp_path / "schema.json")
    except OSError as error:  # urllib's errors are such
        pytest.skip(f"the schema cannot be fetched: {error}")
    finally:
        socket.setdefaulttimeout(before)
    verify_metadata(meta_file=str(CONFIGS / "metadata.json"), filepath=tmp_path / "schema.json")


def test_the_network_takes_and_gives_what_the_metadata_say():
    files = {"meta_file": str(CONFIGS / "metadata.json"), "config_file": str(CONFIGS / "inference.json")}
    verify_net_in_out(net_id="network_def", device="cpu", bundle_root=str(CONFIGS.parent), **files)
    with pytest.raises(ValueError, match="channel number"):
        verify_net_in_out(net_id="network_def", device="cpu", **files, **{"network_def#out_channels": 3})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for part in ("images", "labels"):
        (folder / part).mkdir()
    ramp = np.arange(20 * 24 * 16).reshape(20, 24, 16)
    table = ["participant_id,group", *(f"subject{i},{i % 2}" for i in range(4))]
    (folder / "participants.tsv").write_text("\n".join(table))
    for i in range(4):
        nib.save(nib.Nifti1Image((ramp + i).astype(np.int16), np.eye(4)), folder / f"images/subject{i}.nii.gz")
        nib.save(nib.Nifti1Image((ramp % 3).astype(np.uint8), np.eye(4)), folder / f"labels/subject{i}.nii.gz")
    return folder


def test_no_config_is_forgotten():
    tested = {name for _, configs in WORKFLOWS for name in configs}
    # no workflow; needs TensorRT and an engine that was exported on the GPU; read by MONAI Deploy, see test_deploy.py
    others = {"metadata", "inference_trt", "deploy"}
    assert {path.stem for path in CONFIGS.glob("*.json")} - others == tested


@pytest.mark.parametrize(("workflow_type", "configs"), WORKFLOWS, ids=[" + ".join(configs) for _, configs in WORKFLOWS])
def test_workflows_have_the_properties_that_monai_expects(workflow_type, configs, data, tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        process_group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in {**process_group, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    workflow = ConfigWorkflow(
        config_file=[str(CONFIGS / f"{name}.json") for name in configs],
        workflow_type=workflow_type,
        logging_file=False,
        **{
            "bundle_root": str(CONFIGS.parent),
            "dataset_dir": str(data),
            "output_dir": str(tmp_path),
            "device": "cpu",
            **({"target": "group"} if "whole_scan" in configs else {}),
        },
    )
    workflow.initialize()
    try:
        assert workflow.check_properties() == []
    finally:
        workflow.finalize()
        set_determinism(None)


@pytest.mark.skipif(importlib.util.find_spec("parameterized") is None, reason="needs parameterized")
def test_the_unit_test_in_the_form_of_the_zoo(tmp_path):
    build = [
        sys.executable,
        ROOT / "scripts/build_bundle.py",
        "--output_dir",
        tmp_path,
        "--unpacked",
        tmp_path / "models",
    ]
    subprocess.run(build, check=True, capture_output=True)
    tests = tmp_path / "ci/unit_tests"
    tests.mkdir(parents=True)
    shutil.copy(ROOT / "tests/zoo/test_sspformer_mri.py", tests)
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)
    before = sorted((tmp_path / "models").rglob("*"))
    done = subprocess.run(
        [sys.executable, "-m", "unittest", "discover", "-s", tests],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    passed = re.search(r"^Ran [1-9]\d* tests? in .*\n\nOK$", done.stderr, re.MULTILINE)  # skips would stand after OK
    assert done.returncode == 0 and passed, done.stderr[-3000:]
    assert sorted((tmp_path / "models").rglob("*")) == before
