"""Runs that are killed end, when they are given again, as those that were not; beside those of tests/test_workflow.py,
test_inference.py and test_finetuning.py."""

import os
import signal
import subprocess
import time

import nibabel as nib
import numpy as np
import pytest
import torch
from odd_inputs import dicom_series, head, infer, labelled, load, rows, run, stand_in, start, tiny, wait_for

N_SCANS = 6


def killed(log, condition, *args, **overrides):
    """Starts a command, and kills it, with all its processes, once the condition holds."""
    process = start(log, *args, **overrides)
    wait_for(condition, process, log)
    assert process.poll() is None, "it ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def equal_files(first, second, pattern):
    """Voxels of the NIfTI files of two folders."""
    names = sorted(path.name for path in first.glob(pattern))
    assert names == sorted(path.name for path in second.glob(pattern)) and names
    for name in names:
        a, b = (np.asarray(nib.load(folder / name).dataobj) for folder in (first, second))
        assert np.array_equal(a, b), name


def test_inference_that_writes_dicom(tmp_path):
    """Killed while it writes: every series has its NIfTI and its DICOM in the end, and none is half."""
    hd = pytest.importorskip("highdicom")
    for i in range(N_SCANS):
        volume = head((20, 18, 16), seed=i).astype(np.uint16)
        dicom_series(tmp_path / "in" / f"s{i}", volume, patient=f"P{i}", series=f"1.2.3.{i + 1}")
    options = {"roi_size": [24, 24, 24], "dicom": "true", **stand_in(tmp_path)}
    whole, again = tmp_path / "whole", tmp_path / "again"
    killed(
        tmp_path / "log.txt",
        lambda: len(list(again.glob("*.dcm"))) >= 2,
        "inference",
        tmp_path / "in",
        again,
        **options,
    )
    assert len(list(again.glob("*.dcm"))) < N_SCANS, "it was killed too late to test anything"
    infer(tmp_path / "in", again, **options)
    infer(tmp_path / "in", whole, **options)
    equal_files(whole, again, "*.nii.gz")
    assert len(list(again.glob("*.dcm"))) == N_SCANS
    for path in again.glob("*.dcm"):
        seg, nifti_file = hd.seg.segread(path), again / f"{path.stem}.nii.gz"
        assert seg.pixel_array.sum() == np.asarray(nib.load(nifti_file).dataobj).sum()


def test_what_a_killed_inference_was_writing_goes(tmp_path):
    data, out = labelled(tmp_path / "data") / "images", tmp_path / "out"
    options = {"roi_size": [24, 24, 24], **stand_in(tmp_path)}
    out.mkdir()
    (out / "p1_seg.nii.gz.part").write_bytes(b"half")
    (out / "old_seg.nii.gz.part").write_bytes(b"half, of a scan that is gone")
    infer(data, out, **options)
    assert not list(out.glob("*.part"))


def test_evaluation(tmp_path):
    """Killed after its first pictures: the tables of the second run are those of one that was not killed."""
    data = labelled(tmp_path / "data", N_SCANS, shape=(40, 40, 40))
    options = {**stand_in(tmp_path), "roi_size": [24, 24, 24], "spacing": [2.0, 2.0, 2.0]}
    whole, again = tmp_path / "whole", tmp_path / "again"
    killed(
        tmp_path / "log.txt",
        lambda: (again / "scans.csv").exists(),
        "evaluate",
        data,
        again,
        **options,
    )
    for folder in (whole, again):
        run("evaluate", data, folder, **options)
    for name in ("metrics.csv", "summary.csv"):
        assert (whole / name).read_bytes() == (again / name).read_bytes()
    assert len(rows(again, "metrics.csv")) == N_SCANS and not list(again.rglob("*.part"))


def test_training_with_several_workers(tmp_path):
    """The workers end with the process that was killed, and the run goes on to the same weights."""
    data = labelled(tmp_path / "data", 4)
    options = {**tiny("train"), "epochs": 4, "crops_per_scan": 2, "val_interval": 4, "num_workers": 2}
    whole, again = tmp_path / "whole", tmp_path / "again"
    process = start(tmp_path / "log.txt", "train", data, again, **options)
    wait_for(lambda: (again / "history.csv").is_file() and rows(again, "history.csv"), process, tmp_path / "log.txt")
    children = children_of(process.pid)
    process.kill()
    process.wait()
    assert len(rows(again, "history.csv")) < 4, "it was killed too late to test anything"
    deadline = time.monotonic() + 30
    while any(map(is_alive, children)):
        assert time.monotonic() < deadline, "workers outlive the run that was killed"
        time.sleep(0.1)
    for folder in (again, whole):
        run("train", data, folder, **options)
    assert rows(again, "history.csv") == rows(whole, "history.csv")
    first, second = (torch.load(out / "models" / "model.pt", weights_only=True) for out in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def children_of(pid: int) -> list[int]:
    done = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().split(")")[-1].split()[0] != "Z"


def refused_while_it_runs(kind, data, out, tmp_path, options):
    """Starts a run, which stands still once it has the folder, and the same again; what the second says at its end."""
    first, log = start(tmp_path / "first.txt", kind, data, out, **options), tmp_path / "second.txt"
    lock = out / ".lock"
    wait_for(lambda: lock.is_file() and lock.read_text().strip(), first, tmp_path / "first.txt")
    first.send_signal(signal.SIGSTOP)
    second = start(log, kind, data, out, **options)
    assert second.wait(timeout=240) != 0
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=240) == 0, (tmp_path / "first.txt").read_text()[-3000:]
    said = log.read_text().strip().splitlines()[-1]
    assert said.startswith("error: ") and str(out) in said and str(first.pid) in said


def test_a_training_of_which_a_second_one_is_started(tmp_path):
    """It trains as if it were alone; the other ends with the reason."""
    data, out = labelled(tmp_path / "data"), tmp_path / "out"
    refused_while_it_runs("train", data, out, tmp_path, tiny("train"))
    run("train", data, tmp_path / "alone", **tiny("train"))
    assert rows(out, "history.csv") == rows(tmp_path / "alone", "history.csv")


def test_a_batch_of_which_a_second_one_is_started(tmp_path):
    """As a job that is queued twice: one writes all, the other ends with the reason; no output is half."""
    data, out = labelled(tmp_path / "data") / "images", tmp_path / "out"
    refused_while_it_runs("inference", data, out, tmp_path, {"roi_size": [24, 24, 24], **stand_in(tmp_path)})
    assert {row["status"] for row in rows(out, "inference.csv")} == {"written"}
    assert all(load(path).any() for path in out.glob("*.nii.gz"))
