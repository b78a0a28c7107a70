"""Two runs in one folder: the second is refused, with the first's host and process; a killed run leaves no lock."""

import errno
import multiprocessing
import os
import signal
import socket
import time

import pytest
import torch
from odd_inputs import infer, labelled, load, nifti, refused, rows, run, stand_in, start, tiny, wait_for

from sspformer.engines import save_atomically
from sspformer.io import leave_folder, own_folder, ownership, replacing, save_like


def _part_of(path, pipe):
    with replacing(path) as part:
        part.write_text("child")
        pipe.send(str(part))
        pipe.recv()


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


def test_temporary_names_differ_between_hosts_of_one_file_system(tmp_path, monkeypatch):
    """Containers all have process 1."""
    names = set()
    for host in ("node1", "node2"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        monkeypatch.setattr(os, "uname", lambda host=host: os.uname_result(("Linux", host, "6", "1", "x86_64")))
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with replacing(tmp_path / "a.pt") as part:
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
        assert (tmp_path / "out" / ".lock").read_text() == "" and not in_another_process(tmp_path / "out")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, None])
def test_a_lock_ends_with_its_process_not_with_its_workers(end, tmp_path):
    """A worker that outlives the run by seconds, as those of a DataLoader do, does not lock out the next one."""
    ours, theirs = multiprocessing.get_context("fork").Pipe()

    def hold():
        own_folder(tmp_path)
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,))
        worker.start()
        theirs.send(worker.pid)
        time.sleep(0 if end is None else 20)
        os._exit(0)

    run_ = multiprocessing.get_context("fork").Process(target=hold)
    run_.start()
    worker = ours.recv()
    try:
        if end:
            text = refused(own_folder, tmp_path, says=[str(tmp_path), str(run_.pid), socket.gethostname()])
            assert "--output_dir" in text
            os.kill(run_.pid, end)
        run_.join()
        os.kill(worker, 0)
        own_folder(tmp_path)
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
    finally:
        os.kill(worker, signal.SIGKILL)
        leave_folder(tmp_path)


def _try(folder, queue):
    try:
        own_folder(folder)
        queue.put("")
    except ValueError as error:
        queue.put(str(error))


def in_another_process(folder):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=_try, args=(folder, queue))
    process.start()
    process.join()
    return queue.get()


def test_of_several_that_start_at_once_one_has_the_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    queue, barrier = context.SimpleQueue(), context.Barrier(4)
    processes = [context.Process(target=_hold_and_try, args=(tmp_path, queue, barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    said = sorted(queue.get() for _ in processes)
    for process in processes:
        process.join()
    winner = (tmp_path / ".lock").read_text().strip()
    assert said[0] == "" and all(winner in text for text in said[1:])
    assert winner.split()[1] in [str(process.pid) for process in processes]


def _hold_and_try(folder, queue, barrier):
    barrier.wait()
    _try(folder, queue)
    barrier.wait()  # until all have tried


def test_a_process_locks_each_folder_once_and_leaves_it(tmp_path, monkeypatch):
    """Two runs into two folders are none of each other's business; a folder is one, however it is spelled."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("a")
    for folder in ("a", "b", "a", tmp_path / "a", "link"):
        own_folder(folder)
    for folder in ("a", "b", "link"):
        assert str(os.getpid()) in in_another_process(folder)
    leave_folder("link")
    leave_folder("link")
    assert not in_another_process("a") and in_another_process("b")
    leave_folder("b")


def test_a_folder_that_was_deleted_meanwhile_is_locked_anew(tmp_path):
    own_folder(tmp_path / "a")
    (tmp_path / "a" / ".lock").unlink()
    own_folder(tmp_path / "a")
    assert in_another_process(tmp_path / "a")
    leave_folder(tmp_path / "a")


@pytest.mark.parametrize("missing", ["the module", "the system call", "the permission"])
def test_where_there_are_no_locks_a_warning_says_so(missing, tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    if missing == "the module":
        monkeypatch.setattr(ownership, "fcntl", None)
    elif missing == "the system call":
        monkeypatch.setattr(ownership.fcntl, "flock", no_locks)
    else:
        monkeypatch.setattr(os, "open", denied)
    with caplog.at_level("WARNING"):
        own_folder(tmp_path)
    assert str(tmp_path) in caplog.text and "cannot be locked" in caplog.text


def test_no_result_says_which_process_wrote_it(tmp_path):
    """gzip and torch keep the name of the file that they write to."""
    save_atomically({"a": torch.zeros(3)}, tmp_path / "a.pt")
    save_like(load(nifti(tmp_path / "in.nii.gz")), tmp_path / "a.nii.gz")
    for name in ("a.pt", "a.nii.gz"):
        assert b".part" not in (tmp_path / name).read_bytes()


def test_a_long_name_has_a_temporary_one(tmp_path):
    """Up to the longest that a file system takes."""
    path = tmp_path / ("x" * 248 + ".nii.gz")
    with replacing(path) as part:
        part.write_text("x")
    assert path.read_text() == "x"
