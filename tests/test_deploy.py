"""What the MONAI Deploy App SDK 4.0.0 does with configs/deploy.json, done without it: the calls of its
operators/monai_bundle_inference_operator.py by their names. scripts/deploy/check.py runs the SDK itself."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform
from test_data import dicom_series, oblique_affine

from sspformer.data import class_names
from sspformer.io import dicom_out, read_dicom

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundle"


@pytest.fixture
def parser(monkeypatch):
    """_read_directory_bundle_config: the metadata, then the named configs in one parser; the bundle is on sys.path."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(BUNDLE)  # whose package finds the names of the classes anywhere
    parser = ConfigParser()
    parser.read_meta(json.loads((BUNDLE / "configs/metadata.json").read_text()))
    parser.read_config([BUNDLE / f"configs/{name}.json" for name in ("inference", "deploy")])
    parser.parse()
    return parser


def test_its_transforms_are_those_of_inference(parser, tmp_path):
    """From the integers of a series to the input of the network, and from scores to a label map on the series' grid."""
    image = np.random.default_rng(0).integers(0, 900, (40, 24, 16)).astype(np.int16)
    files = dicom_series(tmp_path / "in", image, oblique_affine())
    _, affine, _ = read_dicom(files)
    meta = {"original_affine": affine, "affine": affine, "spatial_shape": np.array(image.shape)}  # _convert_from_image
    meta |= {"original_channel_dim": "no_channel", "space": "RAS"}
    loaded = MetaTensor.ensure_torch_and_prune_meta(torch.from_numpy(image), meta)

    pre, post = (parser.get_parsed_content(f"deploy_{name}processing") for name in ("pre", "post"))
    for compose in (pre, post):  # filter_compose, is_map_compose
        assert isinstance(compose, Compose) and isinstance(compose.transforms[0], MapTransform)
        compose.transforms = tuple(compose.transforms)
    given = pre({"image": loaded})["image"]
    own = Compose(parser.get_parsed_content("preprocessing"))({"image": [str(file) for file in files]})["image"]
    assert given.dtype == own.dtype == torch.float32
    assert torch.equal(given.affine, own.affine) and torch.equal(given.as_tensor(), own.as_tensor())

    scores = torch.rand((18, *given.shape[1:]), generator=torch.Generator().manual_seed(0))
    label = post({"pred": scores, "image": given})["pred"]
    expected = Compose(parser.get_parsed_content("invert"))({"pred": scores, "image": own})["pred"]
    assert label.shape == (1, *image.shape) and label.dtype == torch.uint8 and label.any()
    assert torch.equal(label.as_tensor(), expected.as_tensor())


def test_the_metadata_say_what_its_operators_ask(parser):
    metadata = parser["_meta_"]
    network = metadata["network_data_format"]
    assert metadata["modality"] == network["inputs"]["image"]["modality"] == "MR"
    assert network["inputs"]["image"]["type"] == network["outputs"]["pred"]["type"] == "image"  # known_io_data_types
    assert len({dicom_out.codes_of(name) for name in class_names(BUNDLE)}) == 17


def test_the_weights_load_into_its_network(parser):
    network = parser.get_parsed_content("network")  # _load_model_from_directory_bundle
    network.load_state_dict(torch.load(BUNDLE / "models/model.pt", map_location="cpu"), strict=True)
    assert parser.get_parsed_content("inferer").roi_size == [64, 64, 64]


def test_the_app_asks_for_the_versions_of_the_bundle():
    lines = (ROOT / "examples/deploy/requirements.txt").read_text().splitlines()
    asked = dict(line.split("==") for line in lines if not line.startswith("#"))
    metadata = json.loads((BUNDLE / "configs/metadata.json").read_text())
    assert f"version: {metadata['version']}\n" in (ROOT / "examples/deploy/app.yaml").read_text()
    assert asked["monai"] == metadata["monai_version"] and asked["torch"] == metadata["pytorch_version"]
    assert metadata["required_packages_version"].keys() - {"nilearn"} <= asked.keys()  # which only the demo needs
