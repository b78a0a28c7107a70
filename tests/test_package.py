"""The zip of scripts/build_bundle.py: the same bytes from the same commit, and all that MONAI needs in an environment
of metadata.json's packages, with nothing of ours installed."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from filelock import FileLock
from nilearn.datasets import load_mni152_template

import sspformer

ROOT = Path(__file__).resolve().parents[1]
NAME = "sspformer_mri"
METADATA = json.loads((ROOT / "bundle/configs/metadata.json").read_text())
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")},
    "PYTHONDONTWRITEBYTECODE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
TRAINING = {
    **{"class_names": ["shell", "core"], "network_def#out_channels": 3, "crop_size": [32, 32, 32], "num_workers": 0},
    **{"epochs": 1, "batch_size": 2, "crops_per_scan": 1, "val_fraction": 0, "device": "cpu"},
}


def run(*command, cwd, **options):
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, **options
    )


def build(root, *arguments):
    return run(sys.executable, root / "scripts/build_bundle.py", *arguments, cwd=root.parent)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The zip, as one command builds it."""
    folder = tmp_path_factory.mktemp("dist")
    done = build(ROOT, "--output_dir", folder)
    assert done.returncode == 0, done.stderr
    return folder / f"{NAME}_v{METADATA['version']}.zip"


@pytest.fixture(scope="module")
def archive(package, tmp_path_factory):
    """What the zip was built from, as an unpacked source archive: no git, other times, and what runs leave behind."""
    root = tmp_path_factory.mktemp("archive")
    with zipfile.ZipFile(package) as file:
        for name in file.namelist():
            inside = Path(name).relative_to(NAME)
            target = Path("custom" if inside.parts[0] == "sspformer" else "bundle") / inside
            (root / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / target, root / target)
    for left in (
        "custom/sspformer/__pycache__/a.pyc",
        "bundle/output/model.pt",
        "bundle/demo_data/a.nii.gz",
        "bundle/eval/a",
    ):
        (root / left).parent.mkdir(parents=True, exist_ok=True)
        (root / left).write_text("left behind")
    (root / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/build_bundle.py", root / "scripts")
    return root


def test_the_same_files_give_the_same_bytes(package, archive, tmp_path):
    for root in (ROOT, archive):
        done = build(root, "--output_dir", tmp_path)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / package.name).read_bytes() == package.read_bytes()
    assert (archive / "bundle/output/model.pt").is_file()  # was there, and is not in the zip


def test_what_the_zip_holds(package, tmp_path):
    assert METADATA["version"] == next(iter(METADATA["changelog"])) == sspformer.__version__
    with zipfile.ZipFile(package) as file:
        names = file.namelist()
        contents = {name: file.read(name) for name in names}
    assert names == sorted(names) and all(name.startswith(f"{NAME}/") for name in names)
    folders = {name.split("/")[1] for name in names}
    assert folders == {"LICENSE", "configs", "docs", "models", "sspformer"}
    needed = (
        "configs/inference.json",
        "configs/inference_trt.json",
        "docs/README.md",
        "docs/data_license.txt",
        "models/model.pt",
        "sspformer/__init__.py",
        "sspformer/io/dicom_out.py",
    )
    assert {f"{NAME}/{name}" for name in needed} <= set(names)
    assert not [name for name in names if "__pycache__" in name or "/." in name]
    for name, content in contents.items():
        assert len(content) <= 25 * 1024**2, name
        machine = re.search(rb"(?<![\w.:/])/(home|root|Users|tmp|mnt|opt|work)/[\w.]", content)
        assert machine is None and str(ROOT).encode() not in content, f"{name} names a place on one machine"
    done = build(ROOT, "--output_dir", tmp_path, "--unpacked", tmp_path)
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / name).read_bytes() == content for name, content in contents.items())
    again = build(ROOT, "--output_dir", tmp_path, "--unpacked", tmp_path)
    assert again.returncode != 0 and "remove it" in again.stderr


def test_a_file_over_25_mib_is_refused(archive, tmp_path):
    large = archive / "bundle/models/large/model.pt"
    large.parent.mkdir()
    with large.open("wb") as file:
        file.truncate(25 * 1024**2 + 1)
    done = build(archive, "--output_dir", tmp_path)
    shutil.rmtree(large.parent)
    assert done.returncode != 0 and f"{NAME}/models/large/model.pt: 25.0 MiB" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def bundle(package, tmp_path_factory):
    """The zip unpacked into an empty folder."""
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(package) as file:
        file.extractall(folder)
    yield folder / NAME
    with zipfile.ZipFile(package) as file:  # runs leave nothing in the bundle
        inside = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert inside == set(file.namelist())


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """An interpreter that has the packages of metadata.json and what these need, and nothing else."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "clean"  # one for all workers
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").is_file():
            folder.mkdir(exist_ok=True)
            install(folder)
            (folder / "complete").touch()
    return folder / "bin/python"


def install(folder):
    """Make that interpreter, or skip where pip cannot."""
    python = folder / "bin/python"
    pins = {
        "monai": METADATA["monai_version"],
        "numpy": METADATA["numpy_version"],
        **METADATA["required_packages_version"],
    }
    pip = [python, "-m", "pip", "-q", "--disable-pip-version-check", "install", "--only-binary", ":all:"]
    for command in (
        [sys.executable, "-m", "venv", folder],
        [*pip, f"torch=={METADATA['pytorch_version']}"],
        [*pip, *(f"{name}=={version}" for name, version in pins.items())],
    ):
        try:
            done = run(*command, cwd=folder, timeout=900)
        except subprocess.TimeoutExpired:
            pytest.skip(f"took more than 15 minutes: {' '.join(map(str, command[1:]))}")
        if done.returncode != 0:
            probe = [python, "-m", "pip", "download", "--no-deps", "--retries", "0", "--timeout", "20", "-d", "probe"]
            if run(*probe, "fire", cwd=folder).returncode != 0:
                pytest.skip(f"pip reaches no index here: {done.stderr[-300:]}")
            if "No matching distribution found for torch==" in done.stderr:
                pytest.skip(f"no torch {METADATA['pytorch_version']} for this platform: {done.stderr[-300:]}")
            pytest.fail(f"the packages of metadata.json cannot be installed: {done.stderr[-2000:]}")
    assert "No module named 'sspformer'" in run(python, "-c", "import sspformer", cwd=folder).stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A head, and a folder with labelled phantoms."""
    folder = tmp_path_factory.mktemp("data")
    nib.save(load_mni152_template(resolution=3), folder / "head.nii.gz")
    x, y, z = np.ogrid[-1:1:32j, -1:1:36j, -1:1:28j]
    radius = np.sqrt(x**2 + y**2 + z**2)
    label = (radius < 0.8).astype(np.uint8) + (radius < 0.4)
    random = np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for i in range(2):
        image = (300.0 * label + random.normal(100, 20, label.shape)).astype(np.int16)
        for part, array in (("images", image), ("labels", label)):
            nib.save(nib.Nifti1Image(array, np.diag([2.0, 2, 2, 1])), folder / part / f"phantom{i}.nii.gz")
    return folder


def options(**entries):
    return [
        part
        for name, value in entries.items()
        for part in (f"--{name}", value if isinstance(value, Path) else str(value))
    ]


def check_head(output_dir, data):
    scan, result = nib.load(data / "head.nii.gz"), nib.load(output_dir / "head_seg.nii.gz")
    assert result.shape == scan.shape and np.allclose(result.affine, scan.affine)
    litres = np.count_nonzero(result.dataobj) * np.prod(result.header.get_zooms()) / 1e6
    assert 1.0 < litres < 2.5 and len(np.unique(result.dataobj)) == 18
    return np.asarray(result.dataobj)


def test_inference_from_the_command_line(python, bundle, data, tmp_path):
    command = [python, "-m", "monai.bundle", "run", "inference"]
    head = {"dataset_dir": data / "head.nii.gz", "device": "cpu", "inferer#overlap": 0.25}
    done = run(*command, *options(config_file="configs/inference.json", output_dir=tmp_path / "in", **head), cwd=bundle)
    assert done.returncode == 0, done.stderr
    where = {"config_file": bundle / "configs/inference.json", "bundle_root": bundle, "output_dir": "out"}
    done = run(*command, *options(**where, **head), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (check_head(tmp_path / "in", data) == check_head(tmp_path / "out", data)).all()


@pytest.mark.parametrize("inside", [True, False], ids=["in the bundle", "elsewhere"])
def test_a_training_step_from_the_command_line(python, bundle, data, tmp_path, inside):
    where = (
        {"config_file": "configs/train.json"}
        if inside
        else {"config_file": bundle / "configs/train.json", "bundle_root": bundle}
    )
    settings = options(**where, **TRAINING, dataset_dir=data, output_dir=tmp_path / "out")
    command = [python, "-m", "monai.bundle", "run", "training", *settings]
    done = run(*command, cwd=bundle if inside else tmp_path)
    assert done.returncode == 0, done.stderr
    assert "all 89 tensors of the encoder" in done.stdout and "epoch 1/1: iteration 1" in done.stdout
    assert (tmp_path / "out/models/model.pt").is_file()


WORKFLOW = """
import json, sys
from monai.bundle import create_workflow

workflow_type, bundle, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
name = {"train": "train", "infer": "inference"}[workflow_type]
workflow = create_workflow(
    config_file=f"{bundle}/configs/{name}.json", workflow_type=workflow_type, bundle_root=bundle, **options
)
missing = workflow.check_properties()
assert not missing, missing
workflow.run()
workflow.finalize()
"""


def test_create_workflow_infers_and_trains(python, bundle, data, tmp_path):
    head = {"dataset_dir": str(data / "head.nii.gz"), "output_dir": "out", "device": "cpu", "inferer#overlap": 0.25}
    done = run(python, "-c", WORKFLOW, "infer", bundle, json.dumps(head), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check_head(tmp_path / "out", data)
    settings = {**TRAINING, "dataset_dir": str(data), "output_dir": "trained"}
    done = run(python, "-c", WORKFLOW, "train", bundle, json.dumps(settings), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "trained/models/model.pt").is_file()


LOAD = """
import sys
from pathlib import Path

bundle = Path(sys.argv[1])
sys.path.insert(0, str(bundle))  # the one line: load() has no other way to the package

import torch
from monai.bundle import load

from sspformer.networks import SSPFormerDense, SSPFormerEncoder

network = load(bundle.name, bundle_dir=bundle.parent, device="cpu")
other = SSPFormerDense(SSPFormerEncoder(), out_channels=3)
other = load(bundle.name, bundle_dir=bundle.parent, device="cpu", model_file="models/hippocampus/model.pt", model=other)
for loaded, name in ((network, "model.pt"), (other, "hippocampus/model.pt")):
    weights = torch.load(bundle / "models" / name, weights_only=True)
    assert type(loaded).__name__ == "SSPFormerDense" and loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(loaded.state_dict()[key], value.float()) for key, value in weights.items())
network.eval()
with torch.no_grad():
    print(tuple(network(torch.rand(1, 1, 32, 32, 32)).shape))

# one step of training
before, target = next(network.parameters()).clone(), torch.ones(1, 32, 32, 32).long()
torch.nn.functional.cross_entropy(network.train()(torch.rand(1, 1, 32, 32, 32)), target).backward()
torch.optim.SGD(network.parameters(), lr=0.01).step()
assert not torch.equal(next(network.parameters()), before)
"""


def test_load_gives_networks_that_infer_and_train(python, bundle, tmp_path):
    done = run(python, "-c", LOAD, bundle, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "(1, 18, 32, 32, 32)"
