"""The configuration reference, from the dataclasses that --help is made from and the YAML files of conf/."""

import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Any

from results import ROOT, said_of, setting, table

from tinygpt import config
from tinygpt.config import BUDGETS, REFUSED_TRAINER_ARGUMENTS, inner_schema
from tinygpt.help import group_choices, shown_default

CONF = ROOT / "conf"
KINDS = {int: "whole number", float: "number", str: "text", bool: "`true` or `false`"}
LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def schemas() -> dict[str, type]:
    """Each script's config: conf/train.yaml is TrainConfig."""
    return {path.stem: getattr(config, f"{path.stem.capitalize()}Config") for path in sorted(CONF.glob("*.yaml"), key=rank)}


def rank(path: Path) -> tuple[bool, str]:
    return path.stem != "train", path.stem


def scripts() -> str:
    """A section per script, a table per group; a group that was shown before is named only."""
    shown: dict[type, str] = {}
    return "\n\n".join(section(verb, schema, shown) for verb, schema in schemas().items())


def section(verb: str, schema: type, shown: dict[type, str]) -> str:
    own = [item for item in dataclasses.fields(schema) if not inner_schema(item)]
    parts = [f"## {verb}.py", (schema.__doc__ or "").strip(), keys(own, "")]
    for item in dataclasses.fields(schema):
        if inner := inner_schema(item):
            parts.append(group(inner, f"{item.name}.", f"{verb}.py", shown, item.metadata["help"]))
    return "\n\n".join(parts)


def group(kind: type, prefix: str, where: str, shown: dict[type, str], help: str) -> str:
    name = prefix.rstrip(".")
    if kind in shown:
        link = f"[those of {shown[kind]}](#{anchor(name, shown[kind])})"
        return f"### {name} ({where})\n\n{sentence(help)} The keys are {link}."
    shown[kind] = where
    own = [item for item in dataclasses.fields(kind) if not inner_schema(item)]
    parts = [f"### {name} ({where})", sentence(help), keys(own, prefix)]
    for item in dataclasses.fields(kind):
        if inner := inner_schema(item):
            parts.append(group(inner, f"{prefix}{item.name}.", where, shown, item.metadata["help"]))
    return "\n\n".join(parts)


def anchor(name: str, where: str) -> str:
    """As MkDocs makes it of the heading `name (where)`."""
    return f"{name}-{where}".replace(".", "")


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def keys(items: list[dataclasses.Field[Any]], prefix: str) -> str:
    rows = [(f"`{prefix}{i.name}`", plain(i.metadata["help"]), f"`{shown_default(i)}`", allowed(i)) for i in items]
    return table(("key", "meaning", "default", "allowed"), rows)


def plain(text: str) -> str:
    """Text in which Markdown finds neither tags nor escapes."""
    return text.replace("\\", "\\\\").replace("<", "&lt;")


def allowed(item: dataclasses.Field[Any]) -> str:
    """Type and limits of a field."""
    if choices := item.metadata.get("choices"):
        return ", ".join(f"`{choice}`" for choice in choices)
    limits = [f"{words} {number(item.metadata[key])}" for key, words in LIMITS.items() if key in item.metadata]
    kinds = [KINDS[kind] for kind in typing.get_args(item.type) or (item.type,) if kind in KINDS]
    if typing.get_origin(item.type) in (dict, list):
        kinds = ["settings by name" if typing.get_origin(item.type) is dict else f"a list: {kinds[0]}"]
    null = ["or null"] if types.NoneType in typing.get_args(item.type) else []
    return ", ".join([" ".join([*kinds, *limits[:1]]), *limits[1:], *null])


def number(value: float) -> str:
    return "2^63" if value == 2**63 else str(value)


def groups() -> str:
    """Every choice of every group, with what its file says and sets."""
    names: dict[str, list[str]] = {}
    for schema in schemas().values():
        names |= group_choices(schema, CONF)
    return "\n\n".join(f"### {name}\n\n{choices(name, found)}" for name, found in names.items() if name != "experiment")


def choices(name: str, found: list[str]) -> str:
    paths = [CONF / name / f"{choice}.yaml" for choice in found]
    return table(("choice", "what", "sets"), [(f"`{name}={p.stem}`", said_of(p), setting(p)) for p in paths])


def coded(advice: str) -> str:
    """`key=value (why)` with the key as code."""
    return re.sub(r"\S+=\S+", lambda found: f"`{found[0].rstrip(',')}`" + "," * found[0].endswith(","), advice)


def trainer() -> str:
    """Arguments of lightning.Trainer that have another name here, or none."""
    from tinygpt.trainer import OURS  # Lightning

    rows = [(f"`trainer.{name}`", coded(instead)) for name, instead in {**REFUSED_TRAINER_ARGUMENTS, **OURS}.items()]
    budgets = ", ".join(f"`trainer.{name}`" for name in BUDGETS)
    return f"The budget is exactly one of {budgets}.\n\n{table(('refused', 'say instead'), rows)}"
