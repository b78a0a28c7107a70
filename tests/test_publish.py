"""The bundle as scripts/publish.py prepares it for the Hugging Face Hub and the Model Zoo, and as MONAI fetches it from
there. The Hub's client is a stub, with the signatures of the real one where huggingface_hub is installed."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import monai.bundle
import pytest
import torch
from monai.apps.utils import download_url
from monai.bundle import ConfigParser

from sspformer.networks import SSPFormerDense, SSPFormerEncoder, load_weights

try:
    import huggingface_hub
except ImportError:
    huggingface_hub = None

pytest.importorskip("safetensors", reason="needs safetensors: pip install safetensors")

ROOT = Path(__file__).resolve().parents[1]
NAME = "sspformer_mri"
REPO = f"owner/{NAME}"
VERSION = json.loads((ROOT / "bundle/configs/metadata.json").read_text())["version"]


def publish(*arguments):
    subprocess.run([sys.executable, ROOT / "scripts/publish.py", *arguments], check=True, capture_output=True)


def files(folder):
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def upload(tmp_path_factory):
    """What is uploaded to the Hub."""
    folder = tmp_path_factory.mktemp("hub")
    publish("hub", folder)
    return folder / NAME


@pytest.fixture
def hub(upload, monkeypatch):
    """A Hub that holds the upload as the tags 0.0.1 and ``VERSION``."""

    def list_repo_refs(repo_id, **_):
        assert repo_id == REPO
        return SimpleNamespace(tags=[SimpleNamespace(name="0.0.1"), SimpleNamespace(name=VERSION)], branches=[])

    def snapshot_download(repo_id, *, revision, local_dir, **_):
        assert (repo_id, revision) == (REPO, VERSION)
        return shutil.copytree(upload, local_dir)

    calls = {"list_repo_refs": list_repo_refs, "snapshot_download": snapshot_download}
    if huggingface_hub is not None:
        calls = {name: create_autospec(getattr(huggingface_hub, name), side_effect=calls[name]) for name in calls}
    monkeypatch.setattr(monai.bundle.scripts, "huggingface_hub", SimpleNamespace(**calls))


def test_download_takes_the_newest_version_from_the_hub(hub, upload, tmp_path):
    monai.bundle.download(NAME, source="huggingface_hub", repo=REPO, bundle_dir=tmp_path)
    assert files(tmp_path / NAME).keys() == files(upload).keys()


def test_load_downloads_and_gives_the_weights_that_ship(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT / "bundle")
    where = {"source": "huggingface_hub", "repo": REPO, "bundle_dir": tmp_path, "version": VERSION}
    network = monai.bundle.load(NAME, workflow_type="inference", device="cpu", **where)
    weights = torch.load(tmp_path / NAME / "models/model.pt", weights_only=True)
    state = network.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], value.to(state[name].dtype)) for name, value in weights.items())


def test_safetensors_are_the_same_weights(hub, upload, tmp_path, caplog):
    """To MONAI and to us, in a copy whose model.pt could not be read."""
    shutil.copytree(upload, tmp_path / NAME)
    (tmp_path / NAME / "models/model.pt").write_bytes(b"")
    model_file = "models/model.safetensors"
    networks = [SSPFormerDense(SSPFormerEncoder(3, 1, 8, size="tiny"), out_channels=18) for _ in range(3)]
    load_weights(networks[0], upload / "models/model.pt")
    load_weights(networks[1], upload / model_file)
    assert "model.safetensors is a safetensors file, without check sums" in caplog.text
    monai.bundle.load(NAME, networks[2], bundle_dir=tmp_path, model_file=model_file, device="cpu")
    for name, value in networks[0].state_dict().items():
        assert all(torch.equal(value, network.state_dict()[name]) for network in networks[1:])
    names = {name for name in files(upload) if name.endswith(".pt")}
    assert len(names) == 5 and all(Path(upload, name).with_suffix(".safetensors").is_file() for name in names)


def test_the_model_card(upload):
    yaml = pytest.importorskip("yaml")
    _, front, text = (upload / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(front)
    assert (card["license"], card["library_name"]) == ("cc-by-sa-4.0", "monai")
    assert "CC BY-SA 4.0" in (upload / "docs/data_license.txt").read_text()
    results = {result["dataset"]["type"]: result["metrics"][0]["value"] for result in card["model-index"][0]["results"]}
    metrics = json.loads((upload / "configs/metadata.json").read_text())["eval_metrics"]
    assert results == {"ixi": metrics["mean_dice"], "msd-task04": metrics["hippocampus_mean_dice"]}
    pictures = [part.split(")")[0] for part in text.split("](")[1:]]
    assert pictures and all((upload / name).is_file() for name in pictures)


@pytest.mark.skipif(huggingface_hub is None, reason="needs huggingface_hub: pip install huggingface_hub")
def test_the_client_reads_the_model_card(upload):
    card = huggingface_hub.ModelCard.load(upload / "README.md")
    assert card.data.model_name == NAME and len(card.data.eval_results) == 2


def test_the_zoo_finds_what_its_pull_request_leaves_out(upload, tmp_path):
    """As download_large_files of the zoo's ci/utils.py does it, which checks the hashes."""
    publish("zoo", tmp_path, "--url", upload.as_uri())
    bundle = tmp_path / NAME
    assert max(path.stat().st_size for path in files(bundle).values()) <= 1024**2
    parser = ConfigParser()
    parser.read_config(bundle / "large_files.yml")
    for entry in parser.get()["large_files"]:
        download_url(filepath=bundle / entry.pop("path"), progress=False, **entry)
    (bundle / "large_files.yml").unlink()
    assert files(bundle).keys() == {name for name in files(upload).keys() - {"README.md"} if ".safetensors" not in name}
    sums = (bundle / "models/SHA256SUMS").read_text().split()
    for digest, name in zip(sums[::2], sums[1::2], strict=True):
        assert hashlib.sha256((bundle / "models" / name).read_bytes()).hexdigest() == digest
