"""Two runs in one folder: the second is refused, with the first's host and process; a killed run leaves no lock."""

import multiprocessing
import os
import signal
import socket
import time

import pytest
import torch
from odd_inputs import fails, infer, labelled, nifti, refused, rows, run, stand_in, start, tiny, wait_for

from sspformer.engines import save_atomically
from sspformer.io import replacing


def _part_of(path, pipe):
    with replacing(path) as part:
        part.write_text("child")
        pipe.send(str(part))
        pipe.recv()


@fails("the temporary name is that of the file alone")
def test_two_processes_write_to_temporary_names_of_their_own(tmp_path):
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=_part_of, args=(tmp_path / "a.pt", theirs))
    child.start()
    try:
        other = ours.recv()
        with replacing(tmp_path / "a.pt") as part:
            part.write_text("parent")
            assert str(part) != other
        assert (tmp_path / "a.pt").read_text() == "parent"
    finally:
        ours.send("go on")
        child.join()
    assert (tmp_path / "a.pt").read_text() == "child" and not list(tmp_path.glob("*.part"))


@fails("the temporary name knows the process, not the host")
@pytest.mark.parametrize("shared", [False, True])
def test_temporary_names_differ_between_hosts_of_one_file_system(shared, tmp_path, monkeypatch):
    """Containers all have process 1."""
    names = set()
    for host in ("node1", "node2"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        monkeypatch.setattr(os, "uname", lambda host=host: os.uname_result(("Linux", host, "6", "1", "x86_64")))
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with replacing(tmp_path / "a.pt", **({"shared": True} if shared else {})) as part:
            part.write_text("x")
            names.add(part.name)
    assert len(names) == 2


def _write_often(path, number, pipe):
    errors, end = 0, time.monotonic() + 2
    while time.monotonic() < end:
        try:
            save_atomically({name: torch.full((200_000,), float(number)) for name in "abc"}, path)
        except Exception:
            errors += 1
    pipe.put(errors)


@fails("two processes write one temporary file", always=False)
def test_a_checkpoint_is_never_broken_or_mixed_while_two_processes_write_it(tmp_path):
    path, context = tmp_path / "checkpoint.pt", multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    writers = [context.Process(target=_write_often, args=(path, number, queue)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    broken = 0
    while any(writer.is_alive() for writer in writers):
        try:
            state = torch.load(path, weights_only=True)
            broken += len({float(value[place]) for value in state.values() for place in (0, -1)}) > 1
        except FileNotFoundError:
            pass
        except Exception:
            broken += 1
        time.sleep(0.005)
    assert broken == 0 and [queue.get() for _ in writers] == [0, 0]


FIRST = {"epochs": 12, "crops_per_scan": 8, "val_interval": 12}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A training that stands still after its first epoch: its folders and its process. That a killed one leaves no lock
    is tested in test_kill.py."""
    folder = tmp_path_factory.mktemp("first")
    data, output = labelled(folder / "data"), folder / "out"
    settings = {**tiny("train"), **FIRST}
    process = start(folder / "log.txt", "train", data, output, **settings)
    wait_for(lambda: (output / "history.csv").is_file() and rows(output, "history.csv"), process, folder / "log.txt")
    process.send_signal(signal.SIGSTOP)
    yield data, output, process
    process.kill()
    process.wait()


@fails("nothing says that another run writes here")
@pytest.mark.parametrize("kind", ["train", "pretrain", "evaluate", "inference"])
def test_a_second_run_in_the_folder_is_refused_with_host_and_process(kind, running, tmp_path):
    """Also of another kind: tables and weights of both would mix."""
    data, output, process = running
    if kind in ("train", "pretrain"):
        options = tiny(kind)
    else:
        options = {**stand_in(tmp_path), "roi_size": [24, 24, 24], "spacing": [2.0, 2.0, 2.0]}
    dataset = data / "images" if kind in ("pretrain", "inference") else data
    refused(run, kind, dataset, output, **options, says=[str(output), socket.gethostname(), str(process.pid)])


def test_runs_one_after_another_in_one_process_do_not_lock_each_other_out(tmp_path):
    nifti(tmp_path / "in" / "a.nii.gz")
    network = stand_in(tmp_path)
    for overwrite in (False, False, True):
        row = infer(tmp_path / "in", tmp_path / "out", overwrite=overwrite, **network)["a"]
        assert row["status"] in ("written", "already there")
