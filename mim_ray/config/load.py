"""YAML plus `section.key=value` overrides -> Scenario, or one ConfigError with all problems.

Order: defaults in scenario.py, then the YAML file, then the overrides from left to right.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mim_ray.config.scenario import Scenario
from mim_ray.errors import ConfigError
from mim_ray.object_store import carries_credentials

_SECRET_KEY = re.compile(r"(^|_)(access_key|secret|password|credentials?|session_token|api_key)(_|$)", re.IGNORECASE)


def scenario_names() -> list[str]:
    """Names of the scenarios that ship with the package."""
    folder = resources.files("mim_ray.config").joinpath("scenarios")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_scenario(config: str = "tiny", overrides: Sequence[str] = ()) -> Scenario:
    """The scenario named `config` (shipped, or a path to a YAML file) with `section.key=value` overrides.

    Raises:
        ConfigError: lists every unknown key (with the nearest valid one), wrong type and value out of range; or every
            setting that holds credentials, without its value.
    """
    values, source = _read_yaml(config)
    values.setdefault("name", Path(config).stem)
    problems: list[str] = []
    origin: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.append(f"{override!r} is not of the form section.key=value, from the command line.")
            continue
        try:
            value = yaml.safe_load(text) if text else None
        except yaml.YAMLError:
            value = text
        if not _set(values, key.split("."), value):
            problems.append(f"{key} = {text}: {key.split('.')[0]} is no section, from the command line.")
        origin[key] = "the command line"
    secrets = [_secret(key, origin, source) for key, value in _leaves(values, "") if _is_secret(key, value)]
    if secrets:  # only these: other messages might repeat the values
        raise ConfigError("\n".join(secrets))
    try:
        scenario = Scenario.model_validate(values)
    except ValidationError as error:
        problems += [_problem(detail, origin, source) for detail in error.errors()]
    if problems:
        raise ConfigError("\n".join(problems))
    return scenario


def scenario_from_cli(doc: str | None, argv: Sequence[str] | None = None) -> Scenario:
    """Read `--config NAME` and overrides from the command line; `--help` shows `doc`, `--keys` every setting.

    Raises:
        ConfigError: as load_scenario.
    """
    parser = argparse.ArgumentParser(
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Shipped scenarios: " + ", ".join(scenario_names()) + ".\n"
        "Every setting with its default and meaning: --keys. Example: csft.num_past_batches=4 run.root=/data/run1",
    )
    parser.add_argument("--config", default="tiny", metavar="NAME|FILE", help="scenario name or YAML file (tiny)")
    parser.add_argument("--keys", action="store_true", help="list every setting and leave")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that differ")
    args = parser.parse_intermixed_args(argv)
    if args.keys:
        print("\n".join(describe_keys()))
        sys.exit(0)
    return load_scenario(args.config, args.overrides)


def describe_keys() -> list[str]:
    """One line per setting: key, default, meaning."""
    return [f"{key} = {default!r}\n    {text}".rstrip() for key, default, text in _fields(Scenario, "")]


def _read_yaml(config: str) -> tuple[dict[str, Any], str]:
    path = Path(config)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise ConfigError(f"There is no scenario file {config}. Give a file that exists, or a shipped name.")
        text, source = path.read_text(), str(path)
    else:
        names = scenario_names()
        if config not in names:
            raise ConfigError(f"There is no scenario {config!r}{_nearest(config, names)} Shipped: {', '.join(names)}.")
        text = resources.files("mim_ray.config").joinpath("scenarios", f"{config}.yaml").read_text()
        source = f"scenarios/{config}.yaml"
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}. Correct the file.") from None
    if values is None:
        return {}, source
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold sections with keys, not a {type(values).__name__}.")
    return values, source


def _set(values: dict[str, Any], path: list[str], value: Any) -> bool:
    for part in path[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            return False
    values[path[-1]] = value
    return True


def _problem(detail: Any, origin: dict[str, str], source: str) -> str:
    key = ".".join(str(part) for part in detail["loc"])
    place = next((origin[name] for name in origin if name == key or key.startswith(name + ".")), source)
    if detail["type"] == "extra_forbidden":
        known = [name for name, _, _ in _fields(Scenario, "")]
        return f"{key} is not a setting{_nearest(key, known)} From {place}. `--keys` lists every setting."
    return f"{key} = {detail['input']!r}: {detail['msg']}, from {place}."


def _is_secret(key: str, value: Any) -> bool:
    return _SECRET_KEY.search(key.rpartition(".")[2]) is not None or (
        isinstance(value, str) and carries_credentials(value)
    )


def _secret(key: str, origin: dict[str, str], source: str) -> str:
    place = origin.get(key, source)
    return (
        f"{key} holds credentials, from {place}. A scenario is written into artifacts and logs: take them out and set "
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment."
    )


def _leaves(values: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(section.key, value) of everything in nested dicts and lists."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from _leaves(value, key)
    else:
        yield key, values


def _nearest(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else "."


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any, str]]:
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            yield from _fields(type(default), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", default, " ".join((field.description or "").split())
