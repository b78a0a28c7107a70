"""The options of quickstart.sh, without a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "SSPFORMER_PYTHON": sys.executable}
sys.path.append(str(ROOT / "scripts"))
quickstart = pytest.importorskip("quickstart")


def test_help_needs_no_packages():
    environment = {**ENVIRONMENT, "PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1"}
    script = ROOT / "scripts" / "quickstart.py"
    line = [sys.executable, "-S", str(script), "--help"]  # without site-packages
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "--labels NAMES" in done.stdout, done.stderr
    by_bash = subprocess.run([str(ROOT / "quickstart.sh"), "-h"], capture_output=True, text=True, env=ENVIRONMENT)
    assert by_bash.stdout == done.stdout


@pytest.mark.parametrize(
    "words, said",
    [
        (["scans"], "'scans' is not an option: options are given as --KEY VALUE."),
        (["--epochs"], "--epochs needs a value."),
        (["--epochs", "--seed", "1"], "--epochs needs a value."),
        (["--epochs="], "--epochs needs a value."),
        (["--labels="], "--labels needs a value."),
        (["--dataset_dir", "nowhere"], "--dataset_dir 'nowhere' does not exist."),
        (["--output_dir", __file__], "is a file, not a folder."),
        (["--learnig_rate", "1"], "no entry 'learnig_rate'; did you mean --learning_rate?"),
        (["--output_di", "here"], "no entry 'output_di'; did you mean --output_dir?"),
        (["--encodr#size", "small"], "no entry 'encodr'; did you mean --encoder?"),
        (["--mask::gama::x", "1"], "no entry 'mask#gama'."),
        (["--qqqqqq", "1"], "no entry 'qqqqqq'."),
    ],
)
def test_what_is_refused(words, said, capsys):
    with pytest.raises(SystemExit) as caught:
        quickstart.parse(words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("quickstart.sh: error: ") and said in error


@pytest.mark.parametrize(
    "words", [["--epochs", "3", "--encoder#size=small"], ["--epochs=3", "--encoder#size", "small"]]
)
def test_options_of_the_pretraining(words, tmp_path):
    own, options = quickstart.parse([*words, "--dataset_dir", str(tmp_path), "--cache_dir", "cache"])
    assert own.dataset_dir == tmp_path and own.labels is None
    assert options == {"epochs": "3", "encoder#size": "small", "cache_dir": str(Path("cache").absolute())}
    assert quickstart.parse(["--learning_rate", "-1"])[1] == {"learning_rate": "-1"}


def test_the_demonstration_has_a_budget_for_each_task_and_configs_that_exist():
    assert quickstart.FINE_TUNING.keys() == quickstart.OVERLAYS.keys()
    for key in {*quickstart.PRETRAINING}:
        quickstart.check_name(key)
    for overlays in quickstart.OVERLAYS.values():
        assert all((quickstart.CONFIGS / f"{name}.json").is_file() for name in overlays)


def test_one_scan_is_a_held_out_one_and_none_of_4d(tmp_path):
    for name, shape in (("a", (8, 8, 8, 3)), ("b", (8, 8, 8)), ("c", (8, 8, 8))):
        nib.save(nib.Nifti1Image(np.ones(shape, np.int16), np.eye(4)), tmp_path / f"{name}.nii.gz")
    path = tmp_path / "datalist.json"
    lists = {"training": [{"image": "c.nii.gz"}], "validation": [{"image": "a.nii.gz"}, {"image": "b.nii.gz"}]}
    path.write_text(json.dumps(lists))
    assert json.loads(quickstart.one_scan(path).read_text()) == {"test": [{"image": "b.nii.gz"}]}
    path.write_text(json.dumps({"training": [{"image": "a.nii.gz"}]}))
    assert quickstart.one_scan(path) is None
