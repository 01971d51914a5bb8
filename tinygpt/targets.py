"""Objects from YAML: the one place where a `_target_` becomes a call.

Recipes travel, so a target must lie in a package that is known to hold callbacks, loggers or trainers, must be the kind
of thing that its place is for, and its arguments are checked against its signature before anything runs.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from itertools import accumulate
from typing import Any, get_type_hints

from tinygpt.config import UserError, nearest, shorten
from tinygpt.kinds import describe, fits

ALLOWED = ("lightning", "tinygpt", "torchmetrics", "torch.nn", "torch.optim", "torch.profiler", "torch.distributed.fsdp")
"""Where a target may lie. Of torch these parts alone: others compile, load or start what they are told to."""
EXTRAS = ("tensorboard",)  # of ours, for loggers of theirs
REFUSED = ("lightning.pytorch.cli", "lightning.fabric.cli")


def build(node: dict[str, Any], key: str, kind: type | None = None, allow: Sequence[str] = (), **injected: Any) -> Any:
    """Call the node's `_target_` with its other entries, and with those of `injected` that its signature takes.

    key names the node in messages; kind and allow are as for `check_node`. Raises UserError for a target that is not
    allowed, a wrong name or type, or refused arguments.
    """
    target, arguments = check_node(node, key, kind, allow)
    accepted = inspect.signature(target).parameters
    arguments = {name: nested(value, f"{key}.{name}", allow) for name, value in arguments.items()}
    arguments |= {name: value for name, value in injected.items() if name in accepted}
    return call(target, arguments, key)


def check_node(
    node: Any, key: str, kind: type | None = None, allow: Sequence[str] = (), ignore: Sequence[str] = ()
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What a node's `_target_` names, and the arguments for it; UserError as for `build`, but nothing is called.

    kind: the class that the target must be, or whose instance it must return; None for a node inside another. allow:
    packages beside ALLOWED. ignore: entries that are no arguments.
    """
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        raise UserError(f"{key} has no _target_", f"say which class: {key}._target_=tinygpt.callbacks.EMA, for example")
    target = find_target(node["_target_"], key, (*ALLOWED, *allow))
    if not is_of(target, kind):
        what = f"is no {kind.__name__}" if kind else "cannot stand inside another"
        raise UserError(f"{key}._target_={node['_target_']} {what}", "check the name")
    arguments = {name: value for name, value in node.items() if name not in ("_target_", *ignore)}
    check_arguments(target, arguments, key)
    for name, value in arguments.items():
        if is_node(value):
            check_node(value, f"{key}.{name}", None, allow)
    return target, arguments


def is_node(value: Any) -> bool:
    return isinstance(value, dict) and "_target_" in value


def nested(value: Any, key: str, allow: Sequence[str]) -> Any:
    return build(value, key, None, allow) if is_node(value) else value


def within(path: str, packages: Sequence[str]) -> bool:
    return any(path == package or path.startswith(f"{package}.") for package in packages)


def find_target(path: str, key: str, allowed: Sequence[str]) -> Callable[..., Any]:
    """What a dotted path names. Raises UserError where that is not allowed, not there, or no class or function."""
    module, _, name = path.rpartition(".")
    if not within(module, allowed) or within(module, REFUSED):
        raise UserError(
            f"{key}._target_={path} is not allowed",
            f"use the name of a class from one of: {', '.join(allowed)}; allow_targets=[PACKAGE] trusts another",
        )
    try:
        target = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key}._target_={path} cannot be found: {error}", "check the name") from error
    # What a module has imported for itself (subprocess.Popen) could do anything.
    home = str(getattr(target, "__module__", ""))
    if not within(home, allowed) or within(home, REFUSED) or not (inspect.isclass(target) or inspect.isfunction(target)):
        raise UserError(f"{key}._target_={path} is not a class of {module.split('.')[0]}", "check the name")
    return target


def is_of(target: Callable[..., Any], kind: type | None) -> bool:
    """Whether the target is a class of this kind, or a function that says it returns one.

    Inside another node, where nothing is said of the kind, it must be a class; one of ours only if it extends one of theirs.
    """
    made = target if inspect.isclass(target) else hints_of(target).get("return")
    if kind is not None:
        return inspect.isclass(made) and issubclass(made, kind)
    if not inspect.isclass(target):
        return False
    packages = [base.__module__.split(".")[0] for base in inspect.getmro(target)]
    return packages[0] != "tinygpt" or bool({"lightning", "torch", "torchmetrics"} & set(packages))


def hints_of(target: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function, or of a class's constructor; none where they cannot be told."""
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError, AttributeError):
        return {}


def check_arguments(target: Callable[..., Any], arguments: dict[str, Any], key: str) -> None:
    """UserError for a name that the target does not take, or a value that is not what its annotation asks for."""
    accepted = inspect.signature(target).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    for name in arguments:
        if name not in accepted and not open_ended:
            raise UserError(f"there is no key {key}.{name}", nearest(name, list(accepted), f"{key}."))
    check_types(accepted, hints_of(target), arguments, key)


def check_types(
    accepted: Mapping[str, inspect.Parameter], hints: dict[str, Any], arguments: dict[str, Any], key: str
) -> None:
    for name, value in arguments.items():
        default = accepted[name].default if name in accepted else None
        if name in hints and value is not default and not is_node(value) and not fits(value, hints[name]):
            raise UserError(f"{key}.{name}={shorten(value)} is not {describe(hints[name])}", "see what its class takes")


def call(target: Callable[..., Any], arguments: dict[str, Any], key: str) -> Any:
    try:
        return target(**arguments)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        reason = str(error).strip().partition("\n")[0]
        extra = next((f"pip install -c constraints.txt -e '.[{name}]'" for name in EXTRAS if name in reason), None)
        raise UserError(f"{key} needs a package that is not installed: {reason}", extra or "install it with pip") from error
    except Exception as error:  # whatever a foreign constructor refuses its arguments with
        raise UserError(f"{key}: {' '.join(str(error).split())[:300]}", "check its arguments") from error


def refuse_calls(settings: dict[str, Any]) -> None:
    """UserError where Hydra's own settings name what it would call before anything of ours is asked."""
    if settings.get("callbacks"):
        raise UserError("hydra.callbacks is not used here", "callbacks=... names Lightning's")
    for name in ("job_logging", "hydra_logging"):
        for key, value in called(settings.get(name), f"hydra.{name}"):
            raise UserError(f"{key}={shorten(value)} is not allowed", "classes of the logging package are")


def called(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """What a logging configuration calls beyond the logging package, or may by another name (`${...}`)."""
    if isinstance(node, dict):
        for name, value in node.items():
            ours = re.fullmatch(r"logging\.(handlers\.)?[A-Z]\w*", str(value))
            foreign = name in ("()", "_target_") or (name == "class" and not ours)
            yield from [(f"{path}.{name}", value)] if foreign else called(value, f"{path}.{name}")
    elif isinstance(node, list):
        for value in node:
            yield from called(value, path)
    elif isinstance(node, str) and is_interpolation(node.strip()):
        yield path, node


def is_interpolation(text: str) -> bool:
    """Whether the text is one `${...}` and nothing else: what may turn out to be more than a text."""
    depths = list(accumulate({"{": 1, "}": -1}.get(letter, 0) for letter in text[1:-1]))
    return text.startswith("${") and text.endswith("}") and all(depth > 0 for depth in depths)
