"""Write the tables of options in docs/ from ``sspformer.options.SCHEMA``, with the defaults of the configs.

python scripts/options_page.py
"""

import json
import re
from pathlib import Path

from monai.bundle import ConfigParser

from sspformer.options import SCHEMA

ROOT = Path(__file__).resolve().parents[1]
ALL = ROOT / "docs/options.md"
TASKS = (["restoration", "super_resolution"], ["restoration", "denoising"], ["whole_scan", "regression"])
#: configs that have the options of a section; the first that has one says its default
SECTIONS = {
    "All workflows": [["pretrain"]],
    "Training": [["pretrain"], ["train"]],
    "Pretraining": [["pretrain"]],
    "Fine-tuning": [["train"], *(["train", *task] for task in TASKS)],
    "Evaluation": [["train", "evaluate"], *(["train", *task, "evaluate"] for task in TASKS)],
    "Inference": [["inference"], *(["inference", *task] for task in TASKS)],
}
#: pages whose tables have some of the options
PAGES = {"pretrain": ["pretrain"], "finetune": ["train"], "classification": ["train", "whole_scan", "classification"]}


def read(names: list[str]) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(ROOT / f"bundle/configs/{name}.json") for name in names])
    return parser


def default(name: str, parser: ConfigParser) -> str:
    value = parser[name]
    if isinstance(value, dict):
        return ""
    if isinstance(value, str) and value.startswith("$"):
        path = re.fullmatch(r"\$@(\w+) \+ '/([\w./]+)'", value)
        return f"`{path[2]}` in `{path[1]}`" if path else "computed"
    if isinstance(value, str):
        return f"`{value.removeprefix('@').replace('::', '#')}`"
    text = json.dumps(value, separators=(",", ":"))
    return f'`"{text}"`' if isinstance(value, list) else f"`{text}`"


def section(title: str) -> str:
    """A table with all options of a section."""
    parsers = [read(names) for names in SECTIONS[title]]
    lines = ["| option | takes | default | meaning |", "| --- | --- | --- | --- |"]
    for name, option in SCHEMA.items():
        if option.section == title:
            defaults = [default(name, parser) for parser in parsers if name in parser]
            shown = "; ".join(dict.fromkeys(defaults)) if title == "Training" else defaults[0]
            lines.append(f"| `--{name}` | {option.takes.text} | {shown} | {option.text} |")
    return "\n".join(lines) + "\n"


def page(path: Path) -> str:
    """What a page should be."""
    text = path.read_text(encoding="utf-8")
    if path == ALL:
        return re.sub(r"(?m)^(## (.*)\n\n)(\|.*\n)+", lambda match: match[1] + section(match[2]), text)
    parser = read(PAGES[path.stem])
    return re.sub(
        r"(?m)^\| `--([\w#]+)` \|.*$",
        lambda match: f"| `--{match[1]}` | {default(match[1], parser)} | {SCHEMA[match[1]].text} |",
        text,
    )


def pages() -> list[Path]:
    return [ALL, *(ROOT / f"docs/{name}.md" for name in PAGES)]


if __name__ == "__main__":
    for path in pages():
        path.write_text(page(path), encoding="utf-8")
