"""What a killed run leaves behind goes with the next one; what another run is writing stays."""

import os
import subprocess
import sys

from odd_inputs import datalist, fails, infer, labelled, nifti, run, stand_in, tiny

DEAD = 2**22 - 7  # beyond what a process's number usually reaches


def dead_process():
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@fails("the part files of a killed run stay for good")
def test_the_parts_of_a_killed_training_go(tmp_path):
    data, output = labelled(tmp_path / "data"), tmp_path / "out"
    number = dead_process()
    left = [
        output / "cache" / f"abc.pt.{number}.part",
        output / "models" / f"checkpoint.pt.{number}.part",
        output / "models" / "checkpoint.pt.part",
        output / f"scans.csv.{number}.part",
        output / "pictures" / f"epoch_0001.png.{number}.part",
    ]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 100)
    run("train", data, output, **tiny("train"))
    assert not list(output.rglob("*.part"))


@fails("the part files of a killed run stay for good")
def test_the_parts_of_a_killed_inference_go(tmp_path):
    nifti(tmp_path / "in" / "a.nii.gz")
    output = tmp_path / "out"
    output.mkdir()
    for name in ("a_seg.nii.gz.part", f"a_seg.json.{dead_process()}.part", f"gone_seg.nii.gz.{DEAD}.part"):
        (output / name).write_bytes(b"x")
    infer(tmp_path / "in", output, **stand_in(tmp_path))
    assert not list(output.rglob("*.part"))


def test_files_of_the_user_that_end_alike_stay(tmp_path):
    """A browser's download, in the folder and elsewhere."""
    nifti(tmp_path / "in" / "a.nii.gz")
    (tmp_path / "out").mkdir()
    kept = [tmp_path / "in" / "b.nii.gz.part", tmp_path / "out" / "video.mp4.part"]
    for path in kept:
        path.write_bytes(b"x")
    infer(tmp_path / "in", tmp_path / "out", **stand_in(tmp_path))
    datalist(tmp_path / "in", tmp_path / "out", val_fraction=0)
    assert all(path.exists() for path in kept)


@fails("a cache that two runs share keeps the parts of the killed one")
def test_parts_of_a_living_process_in_a_shared_cache_stay(tmp_path):
    """Its own are still being written; those of a process that is gone, on this host, are not."""
    data, cache = labelled(tmp_path / "data"), tmp_path / "cache"
    cache.mkdir()
    living, dead = cache / f"a.pt.{os.getppid()}.part", cache / f"b.pt.{dead_process()}.part"
    for path in (living, dead):
        path.write_bytes(b"x")
    run("train", data, tmp_path / "out", cache_dir=str(cache), **tiny("train"))
    assert living.exists() and not dead.exists()
