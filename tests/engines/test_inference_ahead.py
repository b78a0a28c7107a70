"""The next scan is read and predicted while one is written: the same results, in the same order, whatever fails."""

import logging
import threading
import time

import pytest
import torch
from ignite.engine import Events
from monai.data import DataLoader
from monai.inferers import SlidingWindowInferer
from torch import nn

from sspformer.engines import InferenceDataset, InferenceEvaluator, InferenceReport
from sspformer.networks import network_to_run

NAMES = "abc"


class Recorded(nn.Conv3d):
    """Keeps the batch sizes that it sees, and says when it has begun with a scan; a voxel of the scan is its number."""

    def __init__(self):
        super().__init__(1, 2, 3, padding=1)
        self.sizes, self.begun = [], [threading.Event() for _ in NAMES]

    def forward(self, windows):
        if not torch.compiler.is_compiling():
            self.sizes.append(len(windows))
            self.begun[round(float(windows.amax()))].set()
        return super().forward(windows)


def read(item):
    if item["name"] == item.get("bad"):
        raise ValueError("no scan")
    image = 0.1 * torch.rand(1, 12, 12, 12, generator=torch.Generator().manual_seed(1))
    image[0, 6, 6, 6] = NAMES.index(item["name"])
    return {"image": image, "name": item["name"]}


def evaluate(tmp_path, postprocess=None, bad="", windows=1, network=None, **settings):
    """Predictions by name, in the order in which they were written, the report and the network."""
    torch.manual_seed(0)
    network, written = network or Recorded(), {}

    def write(data):
        if postprocess:
            postprocess(data["name"], network)
        written[data["name"]] = data["pred"].clone()
        return data

    items = [{"image": f"{name}.nii.gz", "name": name, "bad": bad} for name in NAMES]
    report = InferenceReport(tmp_path)
    evaluator = InferenceEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(InferenceDataset(items, read), batch_size=1),
        network=network,
        inferer=SlidingWindowInferer(8, windows, 0.5),
        postprocessing=write,
        val_handlers=[report],
        **settings,
    )
    evaluator.run()
    return written, report, network


def test_results_are_those_of_one_scan_after_the_other_beside_a_bad_one(tmp_path):
    (ahead, report, _), (plain, plain_report, _) = (
        evaluate(tmp_path, bad="b", ahead=ahead) for ahead in (True, "false")
    )
    assert list(ahead) == list(plain) == ["a", "c"]
    assert all(torch.equal(ahead[name], plain[name]) for name in plain)
    for rows in (report.rows, plain_report.rows):
        assert [(row["name"], row["status"]) for row in rows] == [("a", "written"), ("b", "failed"), ("c", "written")]
        assert rows[1]["reason"] == "no scan"


@pytest.mark.parametrize("ahead", [True, False])
def test_the_network_begins_with_the_next_scan_and_no_more(ahead, tmp_path, monkeypatch):
    if not ahead:  # no memory for two
        monkeypatch.setattr("sspformer.engines.inference.free_memory", lambda: 0)

    def postprocess(name, network):
        if name == "a":
            assert network.begun[1].wait(10 if ahead else 0.2) is ahead
            time.sleep(0.2)
            assert not network.begun[2].is_set()

    _, report, _ = evaluate(tmp_path, postprocess)
    assert [row["status"] for row in report.rows] == ["written"] * 3, report.rows


def test_an_error_of_a_writer_stands_in_the_row_of_its_scan(tmp_path):
    def postprocess(name, network):
        if name == "a":
            assert network.begun[1].wait(10)
            raise OSError("disk full")

    written, report, _ = evaluate(tmp_path, postprocess)
    assert [row["reason"] for row in report.rows] == ["disk full", "", ""] and list(written) == ["b", "c"]


def test_what_is_finished_stays_when_a_batch_is_interrupted_and_no_thread_is_left(tmp_path):
    class Slow(Recorded):
        def forward(self, windows):
            time.sleep(0.1 * self.begun[1].is_set())
            return super().forward(windows)

    network = Slow()

    def postprocess(name, network):
        if name == "b":
            raise KeyboardInterrupt

    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path, postprocess, network=network)
    assert [line[:9] for line in (tmp_path / "inference.csv").read_text().splitlines()[1:]] == ["a,written"]
    assert not any(thread.name.startswith("network") for thread in threading.enumerate())
    assert len(network.sizes) < 3 * 8 and time.monotonic() - begin < 10  # a window is waited for, not a scan


def test_a_loader_that_dies_ends_the_batch(tmp_path, monkeypatch):
    def die(self, index):
        raise MemoryError("no room")

    monkeypatch.setattr(InferenceDataset, "__getitem__", die)
    with pytest.raises(MemoryError, match="no room"):
        evaluate(tmp_path)


def test_handlers_see_the_scan_at_hand(tmp_path):
    seen = []

    class Handler:
        def attach(self, engine):
            engine.add_event_handler(Events.ITERATION_STARTED, lambda e: seen.append(e.state.batch["name"][0]))
            engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: seen.append(e.state.output[0]["pred"].shape))

    items = [{"image": f"{name}.nii.gz", "name": name} for name in NAMES]
    evaluator = InferenceEvaluator(
        device="cpu",
        val_data_loader=DataLoader(InferenceDataset(items, read), batch_size=1),
        network=nn.Conv3d(1, 3, 1),
        val_handlers=[Handler()],
    )
    for _ in range(2):  # an evaluator runs again
        seen.clear()
        evaluator.run()
        assert seen == [x for name in NAMES for x in (name, (3, 12, 12, 12))]


@pytest.mark.parametrize("windows", [1, 3])
def test_a_compiled_network_sees_one_size_of_batch(windows, tmp_path, caplog):
    counts = []

    def backend(graph, inputs):
        counts.append(next(x.shape[0] for x in inputs if x.ndim == 5 and x.shape[1] == 1 and x.shape[-1] == 8))
        return graph.forward

    torch._dynamo.reset()
    with caplog.at_level(logging.INFO, "sspformer"):
        compiled, report, _ = evaluate(
            tmp_path, windows=windows, network=plain_conv(), compile=True, compile_kwargs={"backend": backend}
        )
    plain, *_ = evaluate(tmp_path, windows=windows, network=plain_conv(), compile="auto")
    assert counts == [windows] and "the network is compiled" in caplog.text  # 8 windows are no multiple of 3
    for name in NAMES:
        torch.testing.assert_close(compiled[name], plain[name], atol=1e-6, rtol=1e-5)
    assert [row["status"] for row in report.rows] == ["written"] * 3


def plain_conv():
    torch.manual_seed(0)
    return nn.Conv3d(1, 2, 3, padding=1)


def test_where_compiling_fails_the_network_runs_as_it_is(tmp_path, caplog):
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    compiled, *_ = evaluate(tmp_path, network=plain_conv(), compile=True, compile_kwargs={"backend": broken})
    plain, *_ = evaluate(tmp_path, network=plain_conv(), compile=False)
    assert all(torch.equal(compiled[name], plain[name]) for name in NAMES)
    assert caplog.text.count("the network runs without torch.compile") == 1 and "no compiler here" in caplog.text
    with pytest.raises(ValueError, match="compile must be true, false or auto"):
        evaluate(tmp_path, compile="sometimes")


def test_an_exported_network_is_not_compiled(tmp_path, caplog):
    scripted = torch.jit.trace(plain_conv(), torch.rand(1, 1, 8, 8, 8))
    assert network_to_run(scripted, "model_trt.ts", "cpu") is scripted
    with caplog.at_level(logging.INFO, "sspformer"):
        evaluate(tmp_path, network=scripted, compile=True)
    assert "compile" not in caplog.text


def test_a_compiled_network_that_fails_later_runs_as_it_is(tmp_path, caplog):
    graphs = []

    def broken_later(graph, inputs):
        if graphs.append(graph) or len(graphs) > 1:
            raise RuntimeError("not this size")
        return graph.forward

    torch._dynamo.reset()
    network = plain_conv()
    run = {"compile": True, "compile_kwargs": {"backend": broken_later, "dynamic": False}}
    evaluator = InferenceEvaluator(
        device="cpu", val_data_loader=[1], network=network, inferer=SlidingWindowInferer(8), **run
    )
    images = [torch.rand(1, 1, side, side, side) for side in (8, 9, 8)]
    with torch.no_grad():
        for image in images:
            torch.testing.assert_close(evaluator._window(image), network(image))
    assert caplog.text.count("from here on the network runs without torch.compile") == 1
    assert "not this size" in caplog.text and len(graphs) == 2


def test_where_many_windows_do_not_fit_one_is_taken_at_a_time(tmp_path, caplog):
    class Small(Recorded):
        def forward(self, windows):
            if len(windows) > 1:
                self.sizes.append(len(windows))
                raise torch.OutOfMemoryError("no room for many")
            return super().forward(windows)

    def small():
        torch.manual_seed(0)
        return Small()

    few, report, network = evaluate(tmp_path, windows=4, network=small())
    one, *_ = evaluate(tmp_path, windows=1, network=small())
    assert all(torch.equal(few[name], one[name]) for name in NAMES) and network.sizes.count(4) == 1
    assert [row["status"] for row in report.rows] == ["written"] * 3
    assert caplog.text.count("no memory for 4 windows at a time") == 1
