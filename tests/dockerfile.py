"""The Dockerfile's steps without an engine: each stage is a folder, RUN is a shell in it, COPY copies what the context has.

What differs from a real build: the base image is this machine with this Python, paths of the image (/opt, /app, /build) lie
below the stage's folder, and users and owners are not made. With `borrow`, pip installs nothing: it looks whether the files
it was given are there, and lends the virtual environment the packages of this one.
"""

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

KNOWN = ("ARG", "CMD", "COPY", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "USER", "WORKDIR")
INSIDE = re.compile(r"(?<![\w./:-])/(opt|app|build)\b")

PIP = """#!{python}
import pathlib, subprocess, sys
arguments = sys.argv[1:]
files = [after for option, after in zip(arguments, arguments[1:]) if option in ("-r", "-c")]
for file in files:
    pathlib.Path(file).read_text()
find = "import sysconfig; print(sysconfig.get_path('purelib'))"
site = subprocess.run(["python", "-c", find], capture_output=True, text=True, check=True).stdout.strip()
if not site.startswith({root!r}):
    sys.exit(f"pip would install into {{site}}, not into the image")
pathlib.Path(site, "borrowed.pth").write_text({site!r})
"""


class StepError(Exception):
    """A step that fails, as the build would."""


@dataclass
class Image:
    """A stage: its folder, and what its instructions have set."""

    root: Path
    workdir: str = "/"
    env: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)  # USER, CMD, ...: the last one holds

    def inside(self, text: str) -> str:
        """`text` with the image's paths as they are here."""
        return INSIDE.sub(lambda match: f"{self.root}{match[0]}", text)

    def path(self, name: str) -> Path:
        return self.root / (Path(self.workdir) / name).relative_to("/")


def instructions(text: str):
    """(name, the rest) of each logical line."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for line in re.sub(r"\\\n", " ", lines).splitlines():
        if line.strip():
            name, _, rest = line.strip().partition(" ")
            if name not in KNOWN:
                raise StepError(f"{name} is not known here")
            yield name, rest.strip()


def build(text: str, context: Path, folder: Path, borrow: bool = True) -> Image:
    """The last stage of the Dockerfile `text`; raises StepError where a step fails."""
    tools = make_tools(folder, borrow)
    given: dict[str, str] = {}  # ARGs before the first FROM
    stages: dict[str, Image] = {}
    image = None
    for name, rest in instructions(text):
        if name == "FROM":
            source, _, alias = substitute(rest, given).partition(" AS ")
            if not re.fullmatch(r"python:3\.\d+-slim\S*", source):
                raise StepError(f"the base image {source} is not a slim Python")
            image = stages[alias or "last"] = Image(folder / f"stage{len(stages)}")
            image.root.mkdir()
            image.env = {"PATH": f"{tools}:{os.defpath}", "HOME": str(image.root), "LANG": "C.UTF-8"}
        elif image is None:
            given |= [rest.split("=", 1)] if "=" in rest else []
        else:
            step(image, stages, name, rest, context, borrow)
    return image


def step(image: Image, stages: dict[str, Image], name: str, rest: str, context: Path, borrow: bool) -> None:
    if name in ("ARG", "ENV"):
        image.env |= dict(pair.split("=", 1) for pair in shlex.split(image.inside(substitute(rest, image.env))))
    elif name == "WORKDIR":
        image.workdir = rest
        image.path(".").mkdir(parents=True, exist_ok=True)
    elif name == "RUN":
        shell(image, rest.replace("-m venv", "-m venv --without-pip") if borrow else rest, borrow)
    elif name == "COPY":
        copy(image, stages, shlex.split(rest), context)
    else:
        image.settings[name] = rest


def substitute(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda match: values[match[1]], text)


def shell(image: Image, command: str, borrow: bool) -> None:
    pip = {} if borrow else {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    done = subprocess.run(
        ["/bin/sh", "-ec", image.inside(command)], cwd=image.path("."), env=pip | image.env, capture_output=True, text=True
    )
    if done.returncode:
        raise StepError(f"RUN {command}\n{done.stdout}\n{done.stderr}")


def copy(image: Image, stages: dict[str, Image], words: list[str], context: Path) -> None:
    *sources, target = [word for word in words if not word.startswith("--")]
    origin = next((stages[word.removeprefix("--from=")] for word in words if word.startswith("--from=")), None)
    for pattern in sources:
        if origin:
            found = [origin.path(pattern)]
        else:
            found = [path for path in sorted(context.glob(pattern)) if not ignored(path, context)]
        if not found or not all(path.exists() for path in found):
            raise StepError(f"COPY: there is no {pattern}")
        for path in found:
            if path.is_dir():
                skip = None if origin else lambda at, names: {name for name in names if ignored(Path(at) / name, context)}
                shutil.copytree(path, image.path(target), symlinks=True, ignore=skip, dirs_exist_ok=True)
            else:
                shutil.copy(path, image.path(target))


def ignored(path: Path, context: Path) -> bool:
    """Whether .dockerignore keeps `path` out: of the patterns that match it or a folder that it is in, the last holds."""
    name = path.relative_to(context)
    names = [name.as_posix(), *(parent.as_posix() for parent in name.parents if parent.name)]
    out = False
    for line in (context / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#") and any(matches(each, pattern) for each in names):
            out = not line.startswith("!")
    return out


def matches(name: str, pattern: str) -> bool:
    """Docker's patterns, as far as ours go: **/ is any folder, * is within one."""
    deep = pattern.removeprefix("**/")
    parts = name.split("/")[-deep.count("/") - 1 :] if deep != pattern else name.split("/")
    wanted = deep.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def make_tools(folder: Path, borrow: bool) -> Path:
    """A folder for PATH: this Python without this virtual environment, and no users."""
    tools = folder / "tools"
    tools.mkdir()
    (tools / "python").symlink_to(getattr(sys, "_base_executable", sys.executable))
    for name in ("useradd", "chown"):
        (tools / name).write_text("#!/bin/sh\n")
    if borrow:
        site = sysconfig.get_path("purelib")
        (tools / "pip").write_text(PIP.format(python=sys.executable, root=str(folder), site=site))
    for tool in tools.iterdir():
        if not tool.is_symlink():
            tool.chmod(0o755)
    return tools
