"""The command line: compose a config with Hydra, hold it to its schema, say what is wrong in one line.

Hydra and OmegaConf live here and, for sweeps, in multirun.py, and nowhere else in the package. A script hands over its
schema and what to do; what it gets back is a plain dataclass.
"""

import contextlib
import dataclasses
import difflib
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from tinygpt import launch, lock, multirun, sweep
from tinygpt.config import BUDGETS, UserError, all_keys, from_dict, inner_schema, nearest, shorten
from tinygpt.help import print_help
from tinygpt.kinds import describe
from tinygpt.ranks import give_way, is_first, launched
from tinygpt.search import EXAMPLE
from tinygpt.summary import read_summary, way_on
from tinygpt.sweep import remove_empty_above
from tinygpt.targets import refuse_calls

VERBATIM = ("prompt", "ckpt", "resume", "init_from", "out", "data.path", "gpt2", "api_key")
NULLABLE = ("resume", "init_from", "out", "data.path", "gpt2", "api_key")  # elsewhere null is a word like any other
OPEN_GROUPS = ("trainer", "logger", "callbacks")  # theirs: checked against signatures when they are built
MULTIRUN = ("-m", "--multirun", "hydra.mode=MULTIRUN")
HYDRA_FLAGS = (*MULTIRUN, "-c", "--cfg", "--resolve", "-p", "--package", "-i", "--info", "--version")

ELSEWHERE = {  # what other programs call it, where the letters are too far apart
    "optimizer.lr": ("learning_rate",),
    "data.global_batch_size": ("batch_size", "train_batch_size"),
    "data.micro_batch_size": ("per_device_train_batch_size", "device_batch_size"),
    "trainer.max_steps": ("max_iters", "num_iterations"),
    "trainer.max_epochs": ("epochs", "num_epochs", "num_train_epochs"),
    "trainer.val_check_interval": ("eval_interval", "eval_steps"),
    "model.block_size": ("context_length", "max_seq_length", "max_seq_len", "seq_len", "n_positions", "n_ctx"),
    "model.n_embd": ("hidden_size", "d_model", "dim"),
    "model.n_layer": ("num_layers", "num_hidden_layers", "depth"),
    "model.n_head": ("num_heads", "num_attention_heads"),
}

Work = Callable[[Any, Path, list[str]], float | None]


def main(verb: str, schema: type, work: Work, conf: Path) -> None:
    """Run a script: `work(config, run_dir, overrides)` with the composed config; exits with 2 on a UserError.

    Only `train` has a run directory and runs sweeps (-m); the others get the current folder.
    """
    argv = sys.argv[1:]
    debug = any(argument.lower() in ("debug=true", "debug=1") for argument in argv)
    with reporting(schema, debug):
        if "--help" in argv or "-h" in argv:
            print_help(verb, schema, conf)
            return
        refuse_unchosen(argv, schema)
        refuse_flags(argv, HYDRA_FLAGS if verb == "train" else ())
        refuse_removals(argv, schema)
        register(verb, schema)
        in_sweep = launch.JOB in os.environ  # whose launcher has prepared them
        overrides = argv if in_sweep else [prepare_override(argument) for argument in one_budget(argv)]
        if verb == "train" and is_sweep(argv):
            check_resume(argv, "hydra.sweep.dir")
            job, swept = SweepJob(schema, work, sys.argv[0]), [item for item in overrides if item not in MULTIRUN]
            sys.exit(multirun.run(job, conf, swept))
        elif verb == "train":
            overrides = [*overrides, *for_other_processes(argv)]
            check_resume(argv, "hydra.run.dir")
            if not any(argument.startswith("-") for argument in argv):
                compose(verb, schema, conf, overrides)  # what is wrong is said before there is a run directory
                refuse_in_use(argv)
            refuse_unswept(argv)
            run_hydra(verb, schema, work, conf, overrides)
        else:
            work(compose(verb, schema, conf, overrides), Path.cwd(), overrides)


@contextlib.contextmanager
def reporting(schema: type, debug: bool) -> Iterator[None]:
    """Turn what went wrong into one `error:` line, a hint and an exit code."""
    try:
        yield
    except UserError as error:
        if debug:
            raise
        if error.code == 2:  # else it is about the other processes
            give_way()
        complain(error)
        sys.exit(error.code)
    except (HydraException, OmegaConfBaseException) as error:
        if debug:
            raise
        give_way()
        complain(explain(error, schema))
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone: `sample.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def complain(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr)
    if error.hint:
        print(f"hint: {error.hint}", file=sys.stderr)


def register(verb: str, schema: type) -> None:
    node = OmegaConf.structured(schema)
    for name in OPEN_GROUPS:
        if name in node:
            OmegaConf.set_struct(node[name], False)  # any argument of theirs works without `+`
    ConfigStore.instance().store(name=f"schema_{verb}", node=node)


def one_budget(argv: list[str]) -> list[str]:
    """A budget on the command line takes the place of the one in the config."""
    said = dict(argument.split("=", 1) for argument in argv if "=" in argument)
    given = [name for name in BUDGETS if said.get(f"trainer.{name}", "null") != "null"]
    if not given:
        return argv
    return [*argv, *(f"trainer.{name}=null" for name in BUDGETS if name not in given)]


def refuse_flags(argv: list[str], known: Sequence[str]) -> None:
    for argument in argv:
        if argument.startswith("-") and argument.partition("=")[0] not in known:
            raise UserError(f"there is no option {argument}", "settings are written key=value; --help shows them")
    of_cfg = next((argument for argument in argv if argument.startswith(("--resolve", "-p", "--package"))), None)
    if of_cfg and not any(argument.startswith(("-c", "--cfg")) for argument in argv):
        raise UserError(f"{of_cfg} is for --cfg", "python train.py --cfg job --resolve")


def refuse_removals(argv: list[str], schema: type) -> None:
    """`~callbacks.samples` leaves a node out; a key of ours has a value, always."""
    for argument in argv:
        key = argument[1:].partition("=")[0]
        if argument.startswith("~") and not key.startswith(tuple(f"{name}." for name in OPEN_GROUPS)):
            if key not in all_keys(schema):
                raise unknown_key(key, schema)
            raise UserError(f"{argument}: {key} cannot be taken away", f"give it another value: {key}=...")


def refuse_unchosen(argv: list[str], schema: type) -> None:
    """A group that is null unless chosen has no keys before it is."""
    for item in dataclasses.fields(schema):
        inside = [argument for argument in argv if argument.lstrip("+").startswith((f"{item.name}.", f"{item.name}/"))]
        chosen = any(argument.lstrip("+").startswith(f"{item.name}=") for argument in argv)
        if inner_schema(item) and item.default is None and inside and not chosen:
            raise UserError(f"{inside[0]} needs {item.name}=...", f"choose it first: {item.name}=text, for example")


def check_resume(argv: list[str], key: str) -> None:
    """resume=auto looks for the run where this one would go: that must be the same place each time."""
    if "resume=auto" in argv and not any(argument.startswith(f"{key}=") for argument in argv):
        raise UserError("resume=auto needs a fixed directory", f"name it: {key}=outputs/NAME")


def refuse_in_use(argv: list[str]) -> None:
    """A run directory that another process trains in stays as it is."""
    if is_first():
        for argument in argv:
            if argument.startswith("hydra.run.dir="):
                lock.refuse_in_use(Path(argument.partition("=")[2].strip("'\"")))


def prepare_override(argument: str) -> str:
    """Quote values that are taken verbatim, so that Hydra's grammar and OmegaConf's `${` leave them alone."""
    key, separator, value = argument.partition("=")
    if not separator or key not in VERBATIM or (value == "null" and key in NULLABLE):
        return argument
    return f"{key}={quote(value)}"


def quote(value: str) -> str:
    """A string of Hydra's grammar that composes to exactly `value`."""
    # Backslashes count only where they precede a quote or an interpolation: there each is doubled.
    value = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
    value = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", value)
    value = re.sub(r"(\\+)\Z", lambda match: match[1] * 2, value)
    return f"'{value}'"


def compose(verb: str, schema: type, conf: Path, overrides: list[str]) -> Any:
    with hydra.initialize_config_dir(config_dir=str(conf.resolve()), version_base="1.3"):
        with multirun.composing(conf, overrides):
            composed = hydra.compose(config_name=verb, overrides=overrides, return_hydra_config=True)
        refuse_calls(multirun.plain(composed.hydra))
        with open_dict(composed):
            del composed["hydra"]
        return to_schema(composed, schema, overrides)


def to_schema(config: DictConfig, schema: type, overrides: Sequence[str]) -> Any:
    """The dataclass of a config composed with `overrides`; UserError for a key that `+` smuggled past the schema."""
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    refuse_unknown(plain, schema, "")
    refuse_trusting(plain, overrides)
    return from_dict(schema, {str(key): value for key, value in plain.items()})


def refuse_trusting(values: dict[Any, Any], overrides: Sequence[str]) -> None:
    """Whom to trust is said by the user, not by a recipe that came from elsewhere."""
    if values.get("allow_targets") and not any(argument.startswith("allow_targets=") for argument in overrides):
        raise UserError(
            f"allow_targets={values['allow_targets']} is in a file of the config", "it counts on the command line alone"
        )


def refuse_unknown(values: dict[Any, Any], schema: type, prefix: str) -> None:
    fields = {item.name: item for item in dataclasses.fields(schema)}
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"there is no key {prefix}{name}", nearest(str(name), list(fields), prefix))
        if isinstance(value, dict) and (inner := inner_schema(fields[name])):
            refuse_unknown(value, inner, f"{prefix}{name}.")


def for_other_processes(argv: list[str]) -> list[str]:
    """Of several processes only the first has a run directory: theirs would carry other times. Lightning tells those that
    it starts where it is."""
    if is_first() or "hydra.output_subdir=null" in argv:
        return []
    elsewhere = [] if any(argument.startswith("hydra.run.dir=") for argument in argv) else ["hydra.run.dir=."]
    return [*elsewhere, "hydra.output_subdir=null", f"hydra.job_logging.handlers.file.filename={os.devnull}"]


def run_hydra(verb: str, schema: type, work: Work, conf: Path, overrides: list[str]) -> None:
    """Hydra's own main: it makes the run directory and writes .hydra/ and train.log."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach `reporting` as they are
    logging.raiseExceptions = False  # a train.log that cannot be written is no reason to print tracebacks
    given, errors, single = sys.argv, list[Exception](), launch.JOB not in os.environ

    def job(config: DictConfig) -> float | None:
        sys.argv = given  # what Lightning starts the other processes of a run with
        settings, run_dir = HydraConfig.get(), Path(HydraConfig.get().runtime.output_dir)
        try:
            task, again = list(settings.overrides.task), OmegaConf.select(config, "resume") == "auto"
            with run_directory(run_dir, keep=not single, again=again, say=single):
                return work(to_schema(config, schema, task), run_dir, task)
        except Exception as error:  # raised again below: Hydra would print a line of its own before ours
            errors.append(error if single else failed(error, schema, run_dir, list(settings.overrides.task)))
            return None

    try:
        sys.argv = [given[0], *overrides]
        hydra.main(version_base="1.3", config_path=str(conf.resolve()), config_name=verb)(job)()
    except HydraException:
        raise  # some are OSErrors too
    except OSError as error:  # the job's own are in `errors`
        raise UserError(f"the run directory cannot be written: {error}", "choose another hydra.run.dir") from error
    finally:
        sys.argv = given
    if errors:
        raise errors[0]


@contextlib.contextmanager
def run_directory(run_dir: Path, keep: bool, again: bool = False, say: bool = False) -> Iterator[None]:
    """The folder of a run: an interrupted one says how to go on, one that has left nothing of its own goes again."""
    first = is_first()
    try:
        yield
    except SystemExit:
        if first and say and (run_dir / "checkpoints" / "last.ckpt").exists():
            print(f"interrupted; {way_on(run_dir, again)}", file=sys.stderr)
        raise
    finally:
        if first and not keep:
            remove_if_bare(run_dir)


def remove_if_bare(run_dir: Path) -> None:
    """Remove a run directory that holds nothing but what Hydra wrote, and the folders of its date if empty."""
    if not run_dir.is_dir() or {p.name for p in run_dir.iterdir()} - {".hydra", "train.log"}:
        return
    if Path.cwd().is_relative_to(run_dir.resolve()):  # hydra.run.dir=. is the user's own folder
        return
    for handler in [h for h in logging.root.handlers if isinstance(h, logging.FileHandler)]:
        logging.root.removeHandler(handler)  # it would open train.log again
        handler.close()
    shutil.rmtree(run_dir, ignore_errors=True)
    remove_empty_above(run_dir)


# Sweeps


def is_sweep(argv: list[str]) -> bool:
    others = [argument for argument in argv if argument.startswith("-") and argument not in MULTIRUN]
    return not others and any(argument in MULTIRUN for argument in argv)


def refuse_unswept(argv: list[str]) -> None:
    found = next((item for item in argv if item.lstrip("+").startswith(("sweep=", "sweep."))), None)
    if found and launch.JOB not in os.environ:
        raise UserError(f"{found} is for several runs, which need -m", f"for example: {EXAMPLE}")


@dataclasses.dataclass
class SweepJob:
    """What a launcher calls for each job of a sweep, after a journey by pickle where it has processes of its own.

    What a job does wrong is written down in its folder, and the other jobs go on.
    """

    schema: type
    work: Work
    script: str

    def __call__(self, config: DictConfig) -> None:
        logging.raiseExceptions = False  # as in run_hydra
        settings, run_dir = HydraConfig.get(), Path(HydraConfig.get().runtime.output_dir)
        overrides = list(settings.overrides.task)
        with run_directory(run_dir, keep=not config.dry_run):
            if config.dry_run:
                self.work(to_schema(config, self.schema, overrides), run_dir, overrides)
                return
            sweep.begin(run_dir)
            try:
                self.train(config, run_dir, overrides)
            except Exception as error:
                self.complain(failed(error, self.schema, run_dir, overrides))

    def train(self, config: DictConfig, run_dir: Path, overrides: list[str]) -> None:
        settings = to_schema(config, self.schema, overrides)
        if (count := launch.processes(settings.trainer)) < 2 or launched():
            self.work(settings, run_dir, overrides)
            return
        code = launch.torchrun(self.script, overrides, run_dir, count)
        if code and "error" not in read_summary(run_dir):  # which the first process writes, if it can
            raise Ended(code, run_dir)

    @staticmethod
    def complain(error: Exception) -> None:
        if isinstance(error, UserError):
            complain(error)
        else:
            logging.getLogger("tinygpt").error("%s", error, exc_info=error)


class Ended(UserError):
    """A process of a job has ended and has not written down why."""

    def __init__(self, code: int, run_dir: Path) -> None:
        super().__init__(f"a process has ended with exit code {code}", f"see what it has said, and {run_dir / 'train.log'}")
        self.code = 2 if code == 2 else 1


def failed(error: Exception, schema: type, run_dir: Path, overrides: list[str]) -> Exception:
    """The error of a sweep's job, written down in its folder, in the user's words and with the job's number."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        error = explain(error, schema)
    if is_first():
        reason = " ".join(str(error).split()) or type(error).__name__
        again = isinstance(error.__cause__, OSError)  # no room, no network: not its settings' fault
        sweep.fail(run_dir, overrides, reason, error.code if isinstance(error, UserError) else 1, again)
    if isinstance(error, UserError):
        error.args = (f"job {run_dir.name}: {error}",)
    return error


def explain(error: Exception, schema: type) -> UserError:
    """What Hydra or OmegaConf found wrong, in the user's words."""
    text = "\n".join(str(e) for e in chain(error))
    if isinstance(error, MissingConfigException) and (found := re.search(r"find '([^']+)'", text)):
        return unknown_choice(found[1], text)
    if isinstance(error, OverrideParseException):
        return UserError(
            f"cannot read {error.override}", "write key=value; quote what holds , [ ] { } ( ) or spaces: 'key=\"a, b\"'"
        )
    if found := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(found[1], schema)
    if found := re.search(r"full_key: (\S+)", text):
        return wrong_value(found[1], text, schema)
    return UserError(" ".join(text.splitlines()[:2]), "see --help for the keys and their values")


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def unknown_choice(path: str, text: str) -> UserError:
    group, _, name = path.rpartition("/")
    choices = re.findall(r"^\t(\S+)$", text, flags=re.MULTILINE)
    if not choices:
        return UserError(f"there is no {path}", "see --help for the groups and their choices")
    return UserError(f"there is no {group}={name}", nearest(name, choices, f"{group}="))


def wrong_value(key: str, text: str, schema: type) -> UserError:
    """What a key was given and what it takes; where it was given it in a file, what OmegaConf says."""
    key = key.partition("[")[0]
    given = [value for name, _, value in (argument.partition("=") for argument in sys.argv[1:]) if name.lstrip("+") == key]
    kind = kind_of(key, schema)
    hint = "see --help for its meaning"
    if given and kind is not None:
        return UserError(f"{key}={shorten(given[-1])} is not {describe(kind)}", hint)
    reason = re.search(r"^(?:Value|Cannot|Incompatible|Invalid|Non optional).*", text, flags=re.MULTILINE)
    return UserError(f"{key}: {reason[0] if reason else text.splitlines()[0]}", hint)


def kind_of(key: str, schema: type) -> Any:
    """The annotation of a dotted key; None where there is no such key."""
    head, _, rest = key.partition(".")
    for item in dataclasses.fields(schema):
        if item.name == head:
            inner = inner_schema(item)
            return item.type if not rest else kind_of(rest, inner) if inner else None
    return None


def unknown_key(key: str, schema: type) -> UserError:
    """With the nearest key of the schema as the hint; where none is near, those of the group that it would be in."""
    if key.split(".")[0] == "hydra":
        return UserError(f"there is no key {key}", "of Hydra's own keys, hydra.run.dir and hydra.sweep.dir are used most")
    known = all_keys(schema)
    meant = next((ours for ours, theirs in ELSEWHERE.items() if key.rpartition(".")[2] in theirs), "")
    if meant and "trainer" in known:  # a script that trains
        return UserError(f"there is no key {key}", f"did you mean {meant}?")
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    group = key.rpartition(".")[0]
    beside = [name for name in known if name.rpartition(".")[0] == group]
    return UserError(f"there is no key {key}", nearest(key, close or beside or all_keys(schema)))
