"""What the pages say can be done: files, links and pictures exist, commands name configs and options that there are."""

import ast
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from pydoc import locate

import nibabel as nib
import numpy as np
import pytest
from monai.bundle import ConfigParser

import sspformer

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundle"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(BUNDLE / "docs/README.md", ROOT / "benchmarks/README.md"),
]
#: options of ``monai.bundle``'s commands that are no entries of a config
OF_MONAI = {
    *("config_file", "meta_file", "logging_file", "tracking", "tracking_uri", "experiment_name", "run_name"),
    *("net_id", "filepath", "ckpt_file", "input_shape", "use_trace", "use_onnx", "converter_kwargs", "precision"),
    *("dynamic_batchsize", "bundle_root"),
}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def without_code(text):
    return FENCED.sub("", text)


def blocks(page, *languages):
    return [code for language, code in FENCED.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(page):
    """Commands of MONAI in a page's blocks of code, as lists of words."""
    for block in blocks(page, "", "bash"):
        for line in block.replace("\\\n", " ").split("\n"):
            if "monai.bundle" in line and " -c " not in line:
                yield shlex.split(line, comments=True)


def options(words):
    """Name: value of what begins with ``--`` after ``monai.bundle``."""
    words = words[words.index("monai.bundle") :]
    return {word[2:]: value for word, value in zip(words, [*words[1:], ""]) if word.startswith("--")}


def config_files(value):
    """Files of the bundle; a config of the reader's own, ``/path/to/NAME``, is left out."""
    names = ast.literal_eval(value) if value.startswith("[") else [value]
    return [BUNDLE / name[name.index("configs/") :] for name in names if "configs/" in name or "/path/to/" not in name]


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


def merged(files):
    """Entries of configs, as MONAI merges them."""
    parser = ConfigParser()
    parser.read_config([str(file) for file in files])
    return {**parser.get(), "_meta_": json.loads((BUNDLE / "configs/metadata.json").read_text())}


def has(entries, name):
    """Whether an option sets an entry: it exists, or is an argument of the component that it is in."""
    entry = entries
    for part in name.split("#"):
        if isinstance(entry, str) and entry.startswith("@"):
            return has(entries, f"{entry[1:]}#{name.partition('#')[2]}")
        if isinstance(entry, list):
            entry = entry[int(part)] if int(part) < len(entry) else None
        elif isinstance(entry, dict) and part in entry:
            entry = entry[part]
        elif isinstance(entry, dict) and "_target_" in entry:
            component = locate(entry["_target_"])
            arguments = inspect.signature(component).parameters if component else {part}
            return part == "_disabled_" or part in arguments
        else:
            return False
    return True


@pytest.fixture(scope="module")
def workflows():
    """Entries of each list of configs that some page names."""
    lists = {tuple(config_files(options(words).get("config_file", "[]"))) for page in PAGES for words in commands(page)}
    lists |= {(BUNDLE / "configs/train.json", BUNDLE / f"configs/{name}.json") for name in ("hippocampus", "evaluate")}
    restoration = BUNDLE / "configs/restoration.json", BUNDLE / "configs/super_resolution.json"
    lists |= {(BUNDLE / f"configs/{name}.json", *restoration) for name in ("train", "inference")}
    return [merged(files) for files in sorted(lists) if files and all(file.is_file() for file in files)]


@each_page
def test_commands_name_configs_and_options_that_there_are(page):
    for words in commands(page):
        given = options(words)
        if "config_file" not in given:
            continue
        files = config_files(given["config_file"])
        assert [file for file in files if not file.is_file()] == []
        entries = merged(files)
        for name in given.keys() - OF_MONAI:
            assert has(entries, name), f"--{name} is no entry of {given['config_file']}"


@each_page
def test_options_in_the_text_exist(page, workflows):
    if page.name == "CHANGELOG.md":  # which names those that are gone
        return
    text = without_code(page.read_text(encoding="utf-8"))
    others = OF_MONAI | {"help", "studies", "host", "conf"}  # the last three are MONAI Label's
    for script in (ROOT / "benchmarks").rglob("*.py"):
        others |= set(re.findall(r'"--(\w+)"', script.read_text()))
    simulate = (ROOT / "examples/federated/simulate.py").read_text()
    others |= set(re.findall(r"^    (\w+): .*[,=]", simulate, re.MULTILINE))
    names = re.findall(r"`--([A-Za-z_]\w*(?:#\w+)*)", text)
    unknown = [name for name in names if name not in others and not any(has(entries, name) for entries in workflows)]
    assert unknown == []


@each_page
def test_links_and_pictures_exist(page):
    text = without_code(page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if page.parent == BUNDLE / "docs":
            assert BUNDLE in file.parents, f"{target} is not in the bundle"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", without_code(file.read_text(encoding="utf-8")), re.MULTILINE)
            assert anchor in map(slug, headings), target


@each_page
def test_files_named_in_the_text_exist(page):
    if page.name == "CHANGELOG.md":  # which names those that are gone
        return
    named = re.findall(
        r"(?<![\w/.])((?:benchmarks|custom|docs|examples|scripts|tests)/[\w/.]*\w)", page.read_text(encoding="utf-8")
    )
    missing = {name for name in named if not (ROOT / name).exists() and not list(ROOT.glob(f"{name}*"))}
    assert not missing


@each_page
def test_lines_fit(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


def test_the_readmes_are_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
    assert len((BUNDLE / "docs/README.md").read_bytes()) <= 12_000


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"]({page.name})" in index, page.name


@pytest.mark.parametrize("name", ["docs/python.md", "CONTRIBUTING.md"])
def test_python_examples_run(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    namespace = {"__name__": "example"}
    for block in blocks(ROOT / name, "python"):
        exec(compile(block, name, "exec"), namespace)


def test_examples_of_other_packages_are_python_and_name_what_there_is():
    """TorchIO and Lightning are in no environment of the tests; the blocks were run by hand."""
    others = blocks(ROOT / "docs/python.md", "py")
    assert len(others) == 2
    for block in others:
        names = {node.id for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name)}
        used = {name for name in names if name.startswith(("SSPFormer", "load_"))}
        assert all(hasattr(sspformer.networks, name) for name in used)


def test_the_mask_of_the_example_pretrains(tmp_path):
    page = ROOT / "CONTRIBUTING.md"
    (tmp_path / "checkerboard.py").write_text(blocks(page, "python")[0])
    (tmp_path / "checkerboard.json").write_text(blocks(page, "json")[0])
    for i in range(2):
        voxels = np.random.default_rng(i).integers(0, 1000, (20, 24, 16)).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / f"scan{i}.nii.gz")
    settings = {"dataset_dir": tmp_path, "output_dir": tmp_path / "out", "crop_size": "[16,16,16]", "epochs": 1}
    configs = [str(BUNDLE / "configs/pretrain.json"), str(tmp_path / "checkerboard.json")]
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", str(configs)]
    command += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    command += ["--crops_per_scan", "1", "--val_fraction", "0.5", "--device", "cpu", "--num_workers", "0"]
    paths = os.pathsep.join([str(ROOT / "custom"), str(tmp_path)])
    done = subprocess.run(command, cwd=BUNDLE, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out/models/pretrained/encoder.pt").is_file()
    assert "nan" in (tmp_path / "out/history.csv").read_text()  # this mask has no beta


def test_the_version_is_the_same_everywhere():
    version = sspformer.__version__
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
    assert re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
