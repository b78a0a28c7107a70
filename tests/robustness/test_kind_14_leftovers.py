"""What a killed run leaves behind goes with the next one; what another run is writing stays."""

import os
import socket
import subprocess
import sys

from odd_inputs import datalist, infer, labelled, nifti, run, stand_in, tiny

from sspformer.io import leave_folder, own_folder, ownership

DEAD = 2**22 - 7  # beyond what a process's number usually reaches


def dead_process():
    """The number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


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


def test_parts_of_a_living_process_in_a_shared_cache_stay(tmp_path):
    """Its own are still being written; those of a process that is gone, on this host, are not."""
    data, cache = labelled(tmp_path / "data"), tmp_path / "cache"
    cache.mkdir()
    living, dead = cache / f"a.pt.{os.getppid()}.part", cache / f"b.pt.{dead_process()}.part"
    for path in (living, dead):
        path.write_bytes(b"x")
    run("train", data, tmp_path / "out", cache_dir=str(cache), **tiny("train"))
    assert living.exists() and not dead.exists()


def test_temporary_names_of_today_are_known(tmp_path):
    """Those of this host by their process; what another host or process may be writing stays for a day."""
    host, cache, output = socket.gethostname(), tmp_path / "cache", tmp_path / "out"
    names = {
        f"a.pt.{host}.{dead_process()}.part": False,
        f"a.pt.{host}.{os.getppid()}.part": True,
        f"b.pt.{host}x.{dead_process()}.part": True,
        f"0123456789abcdef.{host}.{dead_process()}.part": False,  # of a long name
        "c.pt.node7.lab.org.12.part": True,
        "video.mp4.part": True,
        "disk.7.part": True,
        "a.nii.gz.part": True,  # a download, of which we write none
    }
    for folder in (cache, output, output / "models"):
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).write_bytes(b"x")
    own_folder(output, cache)
    leave_folder(output)
    for folder in (cache, output, output / "models"):
        assert {path.name for path in folder.glob("*.part")} == {name for name, stays in names.items() if stays}
    for path in (output / "c.pt.node7.lab.org.12.part", output / f"a.pt.{host}.{os.getppid()}.part"):
        os.utime(path, (0, 0))
    os.utime(output / "video.mp4.part", (0, 0))
    own_folder(output)
    leave_folder(output)
    assert not list(output.glob("[ac].pt*")) and (output / "video.mp4.part").exists()


def test_a_half_dicom_series_goes_as_a_whole(tmp_path):
    part = tmp_path / f"a_denoised.{socket.gethostname()}.{dead_process()}.part"
    part.mkdir()
    (part / "001.dcm").write_bytes(b"x")
    own_folder(tmp_path)
    leave_folder(tmp_path)
    assert not part.exists()


def test_without_a_lock_nothing_is_deleted(tmp_path, monkeypatch):
    part = tmp_path / f"a.pt.{dead_process()}.part"
    part.write_bytes(b"x")
    monkeypatch.setattr(ownership, "fcntl", None)
    own_folder(tmp_path)
    assert part.exists()
