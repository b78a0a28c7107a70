"""The cache of the check: what is kept of a run that is stopped, and between threads."""

import json
import threading

import nibabel as nib
import numpy as np
import pytest

from sspformer import data
from sspformer.data import DatasetOptions, cache, prepare_datalist


@pytest.fixture
def scans(tmp_path):
    for i in range(6):
        voxels = np.random.default_rng(i).integers(0, 99, (9, 9, 9)).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / f"p{i}.nii")
    return tmp_path


def test_what_a_stopped_run_has_read_is_not_read_again(scans, tmp_path, monkeypatch):
    check, read = data.check.check_nifti, []

    def stop_at_p3(files, *args):
        if files[0].name == "p3.nii":
            raise KeyboardInterrupt
        read.append(files[0].name)
        return check(files, *args)

    stop_at_p3.__name__ = "check_nifti"
    monkeypatch.setattr(data.check, "check_nifti", stop_at_p3)
    options = DatasetOptions(scans, tmp_path / "out", num_workers=1)
    with pytest.raises(KeyboardInterrupt):
        prepare_datalist(options)
    stopped = list(read)
    assert {"p0.nii", "p1.nii", "p2.nii"} <= set(stopped)
    assert len(json.loads((tmp_path / "out" / "scan_check.json").read_text())) == len(stopped)
    monkeypatch.setattr(data.check, "check_nifti", (spy := lambda *args: read.append(args[0][0].name) or check(*args)))
    spy.__name__ = "check_nifti"
    prepare_datalist(options)
    assert sorted(read) == [f"p{i}.nii" for i in range(6)]


def test_a_stopped_run_loses_nothing_of_earlier_ones(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("x")
    with cache.CheckCache(tmp_path) as checks:
        first = {name: checks.get(lambda files: {"path": str(files[0])}, [tmp_path / name]) for name in "ab"}
    with pytest.raises(KeyboardInterrupt), cache.CheckCache(tmp_path):
        raise KeyboardInterrupt
    with cache.CheckCache(tmp_path) as checks:
        assert checks.get(lambda files: {"path": "read again"}, [tmp_path / "a"]) == first["a"]
    assert list(json.loads((tmp_path / "scan_check.json").read_text()).values()) == [first["a"]]  # nobody asked for b


def test_a_killed_run_keeps_what_threads_read_before(tmp_path, monkeypatch):
    """Nothing ends a killed run, so results are saved while it goes on; half a file never replaces a whole one."""
    monkeypatch.setattr(cache, "SAVE_EVERY", 0.0)
    files = [tmp_path / f"{i}" for i in range(40)]
    for file in files:
        file.write_text("x")
    checks = cache.CheckCache(tmp_path / "out")

    def name(files):
        return {"name": files[0].name}

    def read(part):
        for file in part:
            checks.get(name, [file])

    threads = [threading.Thread(target=read, args=(files[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stored = json.loads((tmp_path / "out" / "scan_check.json").read_text())
    assert sorted(result["name"] for result in stored.values()) == sorted(file.name for file in files)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["scan_check.json"]
