"""Checks of settings, before any data are read."""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import operator
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from numbers import Real
from pydoc import ErrorDuringImport, locate
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS
from torch import nn

from ..options import SCHEMA

ABSENT = object()


def check_options(parser: ConfigParser, config_files: Sequence[str | os.PathLike] = ()) -> None:
    """Check the options of a config that is about to run, and bring their values to the form that the config uses.

    A plain value that nothing refers to is a misspelt option, or one of another workflow. An argument that a component
    does not have is misspelt, too. Names that begin with an underscore are left alone. Expressions ("$...") are not
    evaluated, and parts of components of other packages are theirs to check.

    Args:
        parser: of the config. "false", "null" or a path 2024 become False, None and "2024".
        config_files: those of the config, perhaps among others. A task may set options there that the workflow does
            not use, such as the epochs of its training in inference.

    Raises:
        ValueError: naming each option that is unknown, with the nearest known one; or whose value has the wrong type
            or is out of range, with what it takes.
    """
    config = parser.get()
    wrong = [*_unknown_entries(config, config_files), *_unknown_arguments(parser)]
    for name, option in SCHEMA.items():
        at, value, seen = name, _entry(config, name), set()
        while isinstance(value, str) and re.fullmatch(r"@\w[\w:#]*", value) and value not in seen:
            seen.add(value)
            at, value = value[1:], _entry(config, value[1:])
        if value is ABSENT or isinstance(value, str) and value[:1] in ("$", "@") or _is_foreign(config, name):
            continue
        try:
            read = option.takes.of(f"--{name}", _as_typed(name, value) if option.takes.is_text else value)
        except ValueError as error:
            wrong.append(str(error))
        else:
            if type(read) is not type(value) or read != value:
                _set(parser, at, read)
    low, high = config.get("min_spacing"), config.get("max_spacing")
    if not wrong and _is_plain([low, high]) and low and high and any(map(operator.gt, low, high)):
        wrong = [f"--min_spacing {low} is above --max_spacing {high}."]
    if wrong:
        raise ValueError("\n".join(wrong))


def _unknown_entries(config: Mapping, config_files: Sequence[str | os.PathLike]) -> Iterator[str]:
    contents = [ConfigParser.load_config_file(file) for file in config_files]
    contents = [
        content for content in contents if all(re.split("#|::", key.lstrip("+"))[0] in config for key in content)
    ]
    references = {one for part in (config, *contents) for one in _references(part)}  # an option may replace another's

    def is_used(name: str) -> bool:
        return any(f"{one}#".startswith(f"{name}#") or name.startswith(f"{one}#") for one in references)

    def look(entries: Mapping, at: str = "") -> Iterator[str]:
        for key, value in entries.items():
            name = f"{at}{key}"
            if str(key).startswith("_") or name in DEFAULT_MLFLOW_SETTINGS["configs"]:
                continue
            if not _is_plain(value):
                if isinstance(value, Mapping) and "_target_" not in value:
                    yield from look(value, f"{name}#")
            elif not is_used(name):
                if name not in SCHEMA:
                    yield f"--{name} is no option of these configs{_nearest(name, config)}."
                elif contents and not any(_entry(content, name) == value for content in contents):
                    yield f"--{name} {value!r} has no effect: it is an option of another workflow or task."

    yield from look(config)


def _unknown_arguments(parser: ConfigParser) -> Iterator[str]:
    for name, component in _components(parser.get()):
        target = component["_target_"]
        module = parser.locator.get_component_module_name(target)
        module = module[0] if isinstance(module, list) else module
        try:
            arguments = _arguments(locate(f"{module}.{target}" if module else target))
        except (
            AttributeError,
            TypeError,
            ValueError,
            ErrorDuringImport,
        ):  # none there, or written in C: MONAI will say
            continue
        for key in component:
            if arguments and not key.startswith("_") and key not in arguments:
                near = difflib.get_close_matches(key, arguments, 1)
                hint = f"; did you mean {near[0]}?" if near else "."
                yield f"--{name}#{key} is no argument of {target.rpartition('.')[2]}{hint}"


def _arguments(component: Any) -> set[str]:
    """Names of a component's arguments; none if it takes any."""
    names: set[str] = set()
    extends = component.__module__ in ("sspformer.losses", "sspformer.engines.inferers")  # and passes arguments on
    for one in inspect.getmro(component) if extends else [component]:
        parameters = inspect.signature(one).parameters
        names |= parameters.keys()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return names
    return set()


def _is_plain(value: Any) -> bool:
    """Whether an entry is a value, and no part of a workflow: no expression, reference, component or object."""
    if isinstance(value, (Mapping, list, tuple)):
        values = value.values() if isinstance(value, Mapping) else value
        return len(value) > 0 and "_target_" not in value and all(map(_is_plain, values))
    if isinstance(value, str):
        return not value.startswith(("$", "@"))
    return value is None or isinstance(value, (Real, os.PathLike))


def _references(entry: Any) -> Iterator[str]:
    if isinstance(entry, (Mapping, list, tuple)):
        for part in entry.values() if isinstance(entry, Mapping) else entry:
            yield from _references(part)
    elif isinstance(entry, str) and entry.startswith(("$", "@")):
        yield from re.findall(r"@(\w+(?:#\w+)*)", entry.replace("::", "#"))


def _components(entry: Any, at: str = "") -> Iterator[tuple[str, Mapping]]:
    if isinstance(entry, Mapping) and isinstance(entry.get("_target_"), str):
        yield at, entry
    if isinstance(entry, (Mapping, list, tuple)):
        for key, part in entry.items() if isinstance(entry, Mapping) else enumerate(entry):
            yield from _components(part, f"{at}#{key}" if at else str(key))


def _entry(config: Any, name: str) -> Any:
    """An entry by its name, which in a file may stand as "a#b" or as b in a; much faster than the parser's ``get``."""
    name = name.replace("::", "#")
    if isinstance(config, Mapping) and name in config:
        return config[name]
    first, _, rest = name.partition("#")
    if isinstance(config, list) and first.isdigit() and int(first) < len(config):
        part = config[int(first)]
        return _entry(part, rest) if rest else part
    return _entry(config[first], rest) if isinstance(config, Mapping) and rest and first in config else ABSENT


def _has(config: Mapping, name: str) -> bool:
    return _entry(config, name) is not ABSENT


def _nearest(name: str, config: Mapping) -> str:
    """A hint at the option that is meant, which may stand in a part of the config."""
    known = {option.rpartition("#")[2]: option for option in SCHEMA if _has(config, option)}
    near = difflib.get_close_matches(name.rpartition("#")[2], known, 1)
    return f"; did you mean --{known[near[0]]}?" if near else ""


def _is_foreign(config: Mapping, name: str) -> bool:
    """Whether an option stands in a component of another package, which may use the name for something else."""
    parts = name.split("#")
    holders = [_entry(config, "#".join(parts[:i])) for i in range(1, len(parts))]
    targets = [str(holder.get("_target_", "")) for holder in holders if isinstance(holder, Mapping)]
    return any("." in target and target.split(".")[0] not in ("sspformer", "monai", "torch") for target in targets)


def _as_typed(name: str, value: Any) -> Any:
    """A number as the command line has it: 1_000, 1e3 and 00 are folders, too."""
    for word, following in itertools.pairwise([*sys.argv, ""]):
        key, equals, typed = word.partition("=")
        if key == f"--{name}" and isinstance(value, Real):
            try:
                typed = typed if equals else following
                return typed if ast.literal_eval(typed) == value else value
            except (SyntaxError, ValueError):
                continue
    return value


def _set(parser: ConfigParser, name: str, value: Any) -> None:
    """Set an entry of a config that runs, where ``parser[name] = value`` would forget all that is parsed."""
    name = parser.ref_resolver.normalize_id(name)
    holder, _, key = name.rpartition("::")
    parser[holder][key] = value
    if name in parser.ref_resolver.items:
        parser.ref_resolver.items[name].update_config(value)
    parser.ref_resolver.remove_resolved_content(name)


def check_sides(crop_size: Sequence[int], spatial_dims: int) -> None:
    """Raise unless ``crop_size`` has ``spatial_dims`` sides."""
    if len(crop_size) != spatial_dims:
        raise ValueError(
            f"crop_size {list(crop_size)} has {len(crop_size)} sides, but spatial_dims is {spatial_dims}; for 2D "
            "add the overlay: --config_file \"['configs/pretrain.json','configs/pretrain_2d.json']\"."
        )


def check_settings(
    network: nn.Module,
    class_names: Sequence[str] | None,
    crop_size: Sequence[int],
    roi_size: Sequence[int],
    spacing: Sequence[float],
) -> None:
    """Raise where entries of a config do not fit each other, before any data are read.

    Args:
        network: whose ``head``, if there is one, has an output channel for each class and for the background.
        class_names: of the labels from 1 on; None: the output is no label map.
        crop_size: sides of the crops in voxels, one for each of three axes.
        roi_size: sides of the sliding window in voxels.
        spacing: mm.
    """
    for name, value in {"crop_size": crop_size, "roi_size": roi_size, "spacing": spacing}.items():
        if not isinstance(value, Sequence) or len(value) != 3:
            raise ValueError(f"{name} needs one number for each of 3 axes, got {value}.")
    out_channels = getattr(getattr(network, "head", None), "out_channels", None)  # another network may have no head
    if class_names is not None and out_channels not in (None, len(class_names) + 1):
        raise ValueError(
            f"class_names has {len(class_names)} names, {len(class_names) + 1} channels with the background, but the "
            f"network has {out_channels}: set --network_def#out_channels {len(class_names) + 1}, or name the label "
            "values 1, 2, ... with --class_names."
        )
