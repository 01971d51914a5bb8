"""Objects from YAML: the one place where a `_target_` becomes a call.

Recipes travel, so a target must lie in a package that is known to hold callbacks, loggers or trainers, and its arguments
are checked against its signature before anything runs.
"""

import inspect
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from tinygpt.config import UserError, nearest

ALLOWED = ("lightning", "tinygpt", "torch", "torchmetrics")


def build(node: dict[str, Any], key: str, **injected: Any) -> Any:
    """Call the node's `_target_` with its other entries, and with those of `injected` that its signature takes.

    key names the node in messages. Raises UserError for a target outside ALLOWED, a wrong name or refused arguments.
    """
    target, arguments = check_node(node, key)
    accepted = inspect.signature(target).parameters
    arguments = {name: nested(value, f"{key}.{name}") for name, value in arguments.items()}
    arguments |= {name: value for name, value in injected.items() if name in accepted}
    return call(target, arguments, key)


def check_node(node: Any, key: str, ignore: Sequence[str] = ()) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What a node's `_target_` names, and the arguments for it; UserError as for `build`, but nothing is called."""
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        raise UserError(f"{key} has no _target_", f"say which class: {key}._target_=tinygpt.callbacks.EMA, for example")
    target = find_target(node["_target_"], key)
    arguments = {name: value for name, value in node.items() if name not in ("_target_", *ignore)}
    accepted = inspect.signature(target).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        check_names(arguments, list(accepted), key)
    return target, arguments


def nested(value: Any, key: str) -> Any:
    return build(value, key) if isinstance(value, dict) and "_target_" in value else value


def find_target(path: str, key: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    if module.split(".")[0] not in ALLOWED:
        raise UserError(f"{key}._target_={path} is not allowed", f"use a class from one of: {', '.join(ALLOWED)}")
    try:
        target = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key}._target_={path} cannot be found: {error}", "check the name") from error
    # A function (torch.load), or what a module has imported for itself (subprocess.Popen), could do anything.
    home = str(getattr(target, "__module__", "")).split(".")[0]
    if home not in ALLOWED or not (inspect.isclass(target) or (home == "tinygpt" and callable(target))):
        raise UserError(f"{key}._target_={path} is not a class of {module.split('.')[0]}", "check the name")
    return target  # type: ignore[no-any-return]


def check_names(arguments: dict[str, Any], accepted: list[str], key: str) -> None:
    for name in arguments:
        if name not in accepted:
            raise UserError(f"there is no key {key}.{name}", nearest(name, accepted, f"{key}."))


def call(target: Callable[..., Any], arguments: dict[str, Any], key: str) -> Any:
    try:
        return target(**arguments)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"{key} needs a package that is not installed: {error}", "install it with pip") from error
    except Exception as error:  # whatever a foreign constructor refuses its arguments with
        raise UserError(f"{key}: {' '.join(str(error).split())[:300]}", "check its arguments") from error
