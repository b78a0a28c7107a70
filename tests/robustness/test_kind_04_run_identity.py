"""Identity of a run: it goes on only with the data that it began with, known by their contents."""

import numpy as np
import pytest
import torch
from odd_inputs import fails, head, labelled, nifti, refused, rows, run, tiny


def trained(kind, data, output, **options):
    run(kind, data if kind == "train" else data / "images", output, **{**tiny(kind), **options})
    return output


def other_scans(data):
    labelled(data, 3, seed=50)


def corrected_labels(data):
    for path in sorted((data / "labels").iterdir()):
        nifti(path, (head((24, 24, 24), seed=int(path.name[1])) > 300).astype(np.uint8))


def one_scan_more_noisy(data):
    nifti(data / "images" / "p1.nii.gz", head((24, 24, 24), seed=1, noise=90).astype(np.int16))


CHANGES = [
    ("train", other_scans),
    ("train", corrected_labels),
    ("train", one_scan_more_noisy),
    ("pretrain", other_scans),
]


@fails("a run is known by the names of its scans alone")
@pytest.mark.parametrize(("kind", "change"), CHANGES, ids=lambda value: getattr(value, "__name__", value))
def test_a_run_on_other_data_of_the_same_names_is_refused(kind, change, tmp_path):
    """In the old folder, whether it is complete or was killed: neither the old model nor a mixture of both."""
    data, output = labelled(tmp_path / "data"), tmp_path / "out"
    trained(kind, data, output)
    checkpoint = (output / "models" / "checkpoint.pt").read_bytes()
    change(data)
    refused(trained, kind, data, output, says=[("data", "scans"), "--output_dir", "--resume false"])
    assert (output / "models" / "checkpoint.pt").read_bytes() == checkpoint
    trained(kind, data, output, resume="false")
    assert (output / "models" / "checkpoint.pt").read_bytes() != checkpoint


@fails("the pretrained weights are known by their path alone")
def test_other_pretrained_weights_under_the_same_name_are_refused(tmp_path):
    data, output = labelled(tmp_path / "data"), tmp_path / "out"
    trained("pretrain", data, tmp_path / "encoder")
    encoder = tmp_path / "encoder" / "models" / "pretrained" / "encoder.pt"
    trained("train", data, output, pretrained=str(encoder))
    state = torch.load(encoder, weights_only=True)
    torch.save({name: value + 0.01 if value.is_floating_point() else value for name, value in state.items()}, encoder)
    refused(trained, "train", data, output, pretrained=str(encoder), says=["pretrained", "--resume false"])


def test_the_same_data_go_on_also_from_another_folder(tmp_path, caplog):
    """What is not changed is not refused: the same command again, and scans that were moved with their folder."""
    data, output = labelled(tmp_path / "data"), tmp_path / "out"
    trained("train", data, output)
    with caplog.at_level("INFO"):
        trained("train", data, output)
    assert "this run is complete" in caplog.text
    assert len(rows(output, "history.csv")) == 1


def test_other_settings_are_refused_by_name(tmp_path):
    data, output = labelled(tmp_path / "data"), tmp_path / "out"
    trained("train", data, output)
    refused(trained, "train", data, output, seed=5, says=["seed", "--output_dir", "--resume false"])
    labelled(data, 4)
    refused(trained, "train", data, output, says=["data", "--output_dir"])
