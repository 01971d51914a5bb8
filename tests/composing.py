"""Configs of command lines, composed as the scripts do it and, where there are hundreds, in a tenth of the time."""

import contextlib
import copy
import dataclasses
import functools
import io
import sys
from unittest import mock

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from scripts import ROOT, Done

from tinygpt import cli
from tinygpt.config import (
    EvaluateConfig,
    ExportConfig,
    PrepareConfig,
    SampleConfig,
    ServeConfig,
    TrainConfig,
    UserError,
    inner_schema,
)

CONF = ROOT / "conf"
SCHEMAS = {
    "train": TrainConfig,
    "prepare": PrepareConfig,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "serve": ServeConfig,
}


def compose(verb, *arguments, schema=None, conf=CONF):
    """The config of a command line; errors as the user's script would see them."""
    schema = schema or SCHEMAS[verb]
    cli.register(verb, schema)
    overrides = [cli.prepare_override(argument) for argument in cli.one_budget(list(arguments))]
    with explained(schema):
        return cli.compose(verb, schema, conf, overrides)


@contextlib.contextmanager
def explained(schema):
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise cli.explain(error, schema) from error


def said(verb, *argv, quick=True):
    """What a script says to a command line before it does any work; quick: groups are composed once, keys in a copy."""
    err = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [f"{verb}.py", *argv]),
        mock.patch.object(cli, "compose", changed if quick else cli.compose),
        mock.patch.object(cli, "register", REGISTER),
        mock.patch.object(cli, "run_hydra"),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main(verb, SCHEMAS[verb], lambda *_: None, CONF)
            code = 0
        except SystemExit as leaving:
            code = leaving.code
    return Done(code, "", err.getvalue())


def changed(verb, schema, conf, overrides):
    """As cli.compose, a tenth as slow."""
    groups = [override for override in overrides if override.split("=")[0] in GROUPS]
    config = copy.deepcopy(composed(verb, tuple(groups)))
    others = OverridesParser.create().parse_overrides([override for override in overrides if override not in groups])
    ConfigLoaderImpl._apply_overrides_to_config(others, config)
    return cli.to_schema(config, schema, overrides)


REGISTER = functools.cache(cli.register)
GROUPS = {path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_dir()}


@functools.cache
def composed(verb, groups):
    with hydra.initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return hydra.compose(config_name=verb, overrides=list(groups))


def fields_of(kind, prefix=""):
    for item in dataclasses.fields(kind):
        if inner := inner_schema(item):
            yield from fields_of(inner, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item
