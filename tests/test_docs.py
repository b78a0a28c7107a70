"""What the pages say can be done: files, links and pictures exist, commands name configs and options that there are."""

import ast
import json
import re
import shlex
from pathlib import Path

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


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(page):
    """Commands of MONAI in a page's blocks of code, as lists of words."""
    for block in re.findall(r"^```(?:bash)?\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").split("\n"):
            if "monai.bundle" in line and " -c " not in line:
                yield shlex.split(line, comments=True)


def options(words):
    """Name: value of what begins with ``--`` after ``monai.bundle``."""
    words = words[words.index("monai.bundle") :]
    return {word[2:]: value for word, value in zip(words, [*words[1:], ""]) if word.startswith("--")}


def config_files(value):
    names = ast.literal_eval(value) if value.startswith("[") else [value]
    return [BUNDLE / name[name.index("configs/") :] for name in names]


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


@each_page
def test_commands_name_configs_and_options_that_there_are(page):
    for words in commands(page):
        given = options(words)
        if "config_file" not in given:
            continue
        files = config_files(given["config_file"])
        assert all(file.is_file() for file in files), f"{words}: no such config"
        parser = ConfigParser()
        parser.read_config([str(file) for file in files])
        entries = {**parser.get(), "_meta_": json.loads((BUNDLE / "configs/metadata.json").read_text())}
        for name in given.keys() - OF_MONAI:
            entry = entries
            for part in name.split("#"):
                entry = entry[int(part)] if isinstance(entry, list) else entry
                known = isinstance(entry, dict) and (part in entry or part == "_disabled_" or "_target_" in entry)
                assert known or not isinstance(entry, dict), f"--{name} is no entry of {given['config_file']}"
                entry = entry.get(part) if isinstance(entry, dict) else entry


@each_page
def test_options_in_the_text_exist(page):
    known = set(OF_MONAI)
    for config in (BUNDLE / "configs").glob("*.json"):
        known |= {key.partition("#")[0].lstrip("+") for key in json.loads(config.read_text())}
    scripts = [ROOT / "quickstart.sh", *(p for d in ("benchmarks", "scripts") for p in (ROOT / d).rglob("*.py"))]
    for script in scripts:
        known |= set(re.findall(r'"--(\w+)"', script.read_text())) | set(re.findall(r"^ +(\w+)\)", script.read_text()))
    known |= set(re.findall(r"^    (\w+): .*[,=]", (ROOT / "examples/federated/simulate.py").read_text(), re.MULTILINE))
    known |= {"conf", "studies", "host", "labels", "help", "logdir", "c", "no-verify"}  # of other programs
    for option in re.findall(r"`--([A-Za-z_]+)", without_code(page.read_text(encoding="utf-8"))):
        if page.name != "CHANGELOG.md":  # which names those that are gone
            assert option in known, f"--{option}"


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
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.S | re.M):
        exec(compile(block, name, "exec"), namespace)


def test_the_version_is_the_same_everywhere():
    version = sspformer.__version__
    assert re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
    assert re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
