"""What works around MONAI: errors on the command line and in a program, and how MONAI Label is recognised."""

import importlib.machinery
import sys
import types

import pytest
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset
from monai.transforms import Compose

from sspformer.compat import from_monai_label, original_error, print_cause_last
from sspformer.data import DatasetOptions, prepare_datalist
from sspformer.engines import ScansFailed
from sspformer.io import LoadScand


def as_program(monkeypatch, name):
    """As if the process had been started with ``python -m name``; None: with a script."""
    spec = None if name is None else importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


def failing_loader(num_workers):
    data = Dataset([{"image": "gone.nii.gz"}], Compose([LoadScand("image")]))
    return list(DataLoader(data, num_workers=num_workers))


def failing_config(path):
    network = f"$sspformer.networks.load_pretrained(sspformer.networks.SSPFormerEncoder(), '{path}')"
    config = {"imports": ["$import sspformer"], "optimizer": {"_target_": "torch.optim.SGD", "params": network}}
    ConfigParser(config).get_parsed_content("optimizer")


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "fail, said",
    [
        (failing_config, "error: {path} is damaged or holds more than weights"),
        (lambda path: prepare_datalist(DatasetOptions(path)), "error: the datalist {path} is not valid JSON"),
        (lambda path: failing_loader(0), "error: cannot read the scan gone.nii.gz: no such file"),
        (lambda path: failing_loader(1), "error: cannot read the scan gone.nii.gz: no such file"),
        (lambda path: interrupted(), None),
    ],
)
def test_an_error_ends_with_what_to_do(fail, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.json").write_text("{")
    as_program(monkeypatch, "monai.bundle.__main__")
    monkeypatch.setattr(sys, "__excepthook__", lambda *_: None)
    print_cause_last()
    try:
        fail(tmp_path / "bad.json")
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(said.format(path=tmp_path / "bad.json")) if said else not lines


@pytest.mark.parametrize("program", [None, "pytest.__main__", "monai.bundle_of_mine"])
def test_a_program_that_imports_the_package_keeps_its_own_hook(program, monkeypatch):
    as_program(monkeypatch, program)
    own = sys.excepthook
    print_cause_last()
    assert sys.excepthook is own


def test_scans_that_failed_are_listed_without_a_traceback(monkeypatch, capsys):
    as_program(monkeypatch, "monai.bundle.__main__")
    print_cause_last()
    row = {"name": "a", "source": "a.nii.gz", "reason": "truncated"}
    report = types.SimpleNamespace(finish=lambda: (_ for _ in ()).throw(ScansFailed([row], 3)))
    with pytest.raises(RuntimeError) as caught:
        ConfigParser({"report": report, "finalize": "$@report.finish()"}).get_parsed_content("finalize")
    assert isinstance(original_error(caught.value), ScansFailed)
    sys.excepthook(caught.type, caught.value, caught.tb)
    assert capsys.readouterr().err == "\n1 of 3 scans failed:\n  a.nii.gz: truncated\n"


def test_monai_label_is_recognised_by_its_process_or_its_config(monkeypatch):
    items = [{"image": "a.nii.gz", "label": "b.nii.gz"}]
    assert not from_monai_label(items)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "monailabel", types.ModuleType("monailabel"))
        assert from_monai_label(items)
    configs = "['/bundle/configs/monailabel_train.json','/bundle/configs/multi_gpu_train.json']"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["__main__.py", "run", "run", "--config_file", configs])
        assert from_monai_label(items)
    with pytest.raises(ValueError, match="no labelled image to train on"):
        from_monai_label([])
