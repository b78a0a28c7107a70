"""Identity of a run: it goes on only with the data that it began with, known by their contents."""

import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from odd_inputs import head, labelled, nifti, refused, rows, run, tiny


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


def test_corrected_labels_of_a_validation_scan_are_refused_by_name(tmp_path):
    """They choose the best weights."""
    data, output = labelled(tmp_path / "data"), tmp_path / "out"
    trained("train", data, output)
    (name,) = [row["path"] for row in rows(output) if row["split"] == "validation"]
    name = Path(name).name.removesuffix(".nii.gz")
    label = data / "labels" / f"{name}.nii.gz"
    nifti(label, np.roll(np.asarray(nib.load(label).dataobj), 1, axis=0))
    text = refused(trained, "train", data, output, says=["--output_dir", "--resume false"])
    assert f"validation data: other contents of {name})" in text


def test_a_label_map_of_the_same_size_and_time_is_another_one(tmp_path):
    """As an archive with times of its own restores it; without compression all label maps have one size."""
    data, output = labelled(tmp_path / "data"), tmp_path / "out"
    for path in sorted((data / "labels").iterdir()):
        nifti(data / "labels" / path.name.removesuffix(".gz"), np.asarray(nib.load(path).dataobj))
        path.unlink()
    trained("train", data, output)
    label = data / "labels" / "p0.nii"
    before = label.stat()
    nifti(label, np.roll(np.asarray(nib.load(label).dataobj), 1, axis=0))
    os.utime(label, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert label.stat().st_size == before.st_size
    refused(trained, "train", data, output, says=["data: other contents of p0", "--resume false"])


def test_data_that_moved_or_were_touched_are_the_same(tmp_path, caplog):
    data, output = labelled(tmp_path / "data"), tmp_path / "out"
    trained("train", data, output)
    weights = (output / "models" / "model.pt").read_bytes()
    for path in data.rglob("*.nii.gz"):
        os.utime(path)
    shutil.copytree(data, tmp_path / "elsewhere" / "data")
    for place in (data, tmp_path / "elsewhere" / "data"):
        caplog.clear()
        with caplog.at_level("INFO"):
            trained("train", place, output)
        assert "this run is complete" in caplog.text and "reading 6 files" in caplog.text
    assert (output / "models" / "model.pt").read_bytes() == weights
    caplog.clear()
    with caplog.at_level("INFO"):
        trained("train", place, output)
    assert "this run is complete" in caplog.text and "files to their ends" not in caplog.text


def test_the_pretrained_weights_may_move(tmp_path, caplog):
    data, output = labelled(tmp_path / "data"), tmp_path / "out"
    trained("pretrain", data, tmp_path / "encoder")
    encoder = tmp_path / "encoder" / "models" / "pretrained" / "encoder.pt"
    trained("train", data, output, pretrained=str(encoder))
    encoder.rename(tmp_path / "another.pt")
    with caplog.at_level("INFO"):
        trained("train", data, output, pretrained=str(tmp_path / "another.pt"))
    assert "this run is complete" in caplog.text
    refused(trained, "train", data, output, pretrained=None, says=["pretrained", "--resume false"])


@pytest.mark.parametrize("record", ["names alone", "half of it", "none"])
def test_a_checkpoint_whose_data_are_not_known_is_refused(record, tmp_path):
    """As of an earlier version."""
    data, output = labelled(tmp_path / "data"), tmp_path / "out"
    trained("train", data, output)
    file = output / "models" / "checkpoint.json"
    content = json.loads(file.read_text())
    if record == "names alone":
        names = [name for name, _ in content["training data"]]
        file.write_text(json.dumps({**content, "training data": names, "pretrained": "encoder.pt"}))
    elif record == "half of it":
        file.write_text(file.read_text()[:100])
    else:
        file.unlink()
    word = "earlier version" if record == "names alone" else ".json"
    refused(trained, "train", data, output, says=[word, "checkpoint.pt", "--output_dir", "--resume false"])
    trained("train", data, output, resume="false")
    assert (output / "models" / "checkpoint_previous.pt").is_file()
