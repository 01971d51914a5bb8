"""Docker without an engine: the Dockerfile's steps run in a clean folder, its command serves, its health check tells.

A real build is in the weekly workflow. What is not tried here is in docs/docker.md.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import dockerfile
import pytest
import yaml
from scripts import ROOT

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))


def start(image, words, **options):
    """A command of the image, in its folder and with its environment."""
    return subprocess.Popen(
        [image.inside(word) for word in words],
        cwd=image.path("."),
        env=image.env,
        text=True,
        start_new_session=True,
        **options,
    )


def run(image, words):
    process = start(image, words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


def command(image, name, port):
    """CMD or HEALTHCHECK of the image, with a free port in place of its own."""
    words = image.settings[name]
    return json.loads(words[words.index("[") :].replace("8000", str(port)))


def look(image):
    """What one sees of an image without waiting for torch: each verb's help, with the groups of conf/."""
    assert image.settings["USER"].split(":")[0] not in ("", "0", "root")
    assert image.path(command(image, "CMD", 8000)[1]).exists()
    code, prefix, _ = run(image, ["python", "-c", "import sys; print(sys.prefix)"])
    assert (code, prefix.strip()) == (0, image.inside("/opt/tinygpt"))
    for verb, words in (("train", "groups (group=choice):"), ("serve", "keys (key=value):")):
        code, stdout, stderr = run(image, ["python", f"{verb}.py", "--help"])
        assert code == 0, stderr
        assert words in stdout


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return dockerfile.build(TEXT, ROOT, tmp_path_factory.mktemp("docker"))


def test_the_image_holds_what_it_needs_and_nothing_else(image):
    look(image)
    kept = {path.name for path in image.path(".").iterdir()} - {"__pycache__"}
    verbs = {path.name for path in ROOT.glob("*.py")}
    assert kept == {"conf", "tinygpt", "outputs", "data", "LICENSE", *verbs}
    assert {"train.py", "serve.py"} <= verbs
    code, where, _ = run(image, ["python", "-c", "import tinygpt; print(tinygpt.__file__)"])
    assert (code, where.strip()) == (0, str(image.path("tinygpt/__init__.py")))


def test_its_command_serves_and_its_health_check_tells(image, tiny_run):
    pytest.importorskip("fastapi")
    shutil.copytree(tiny_run, image.path("outputs/latest"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    check = command(image, "HEALTHCHECK", port)
    assert run(image, check)[0] != 0  # nobody serves yet
    server = start(image, [*command(image, "CMD", port), "gpt2=null"], stderr=subprocess.PIPE)
    try:
        end = time.monotonic() + 90
        while run(image, check)[0] != 0:
            assert server.poll() is None, server.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.2)
        assert run(image, [word.replace("/health", "/helth") for word in check])[0] != 0
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.communicate(timeout=30)


@pytest.mark.parametrize(
    ("step", "instead"),
    [
        ("COPY conf conf", ""),
        ("COPY tinygpt tinygpt", ""),
        ("COPY *.py LICENSE ./", "COPY LICENSE ./"),
        ("COPY constraints.txt requirements.lock ./", "COPY constraints.txt ./"),
        ("-r requirements.lock", "-r requirements.txt"),
        ("RUN python -m venv /opt/tinygpt", ""),
        ("COPY --from=build /opt/tinygpt /opt/tinygpt", ""),
        ("--from=build /opt/tinygpt", "--from=build /opt/gpt"),
        ("USER 1000:1000", "USER 0"),
        ('"serve.py"', '"server.py"'),
        ("FROM python:", "FROM pyhton:"),
        ("EXPOSE 8000", "EXPOSED 8000"),
    ],
)
def test_a_broken_step_breaks_it(tmp_path, step, instead):
    assert step in TEXT
    with pytest.raises((dockerfile.StepError, AssertionError)):
        look(dockerfile.build(TEXT.replace(step, instead), ROOT, tmp_path))


def test_the_lock_holds_what_the_image_needs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["serve"], *project["optional-dependencies"]["hf"]]
    locked = re.findall(r"^([\w.-]+)==", (ROOT / "requirements.lock").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {re.match(r"[\w.-]+", name)[0].lower() for name in needed} <= {name.lower() for name in locked}


def test_the_dockerfile_passes_hadolint():
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_compose_trains_first_and_serves_to_this_machine_alone():
    train, serve = COMPOSE["services"]["train"], COMPOSE["services"]["serve"]
    assert serve["depends_on"] == {"train": {"condition": "service_completed_successfully"}}
    assert serve["ports"] == ["127.0.0.1:8000:8000"]
    assert serve["command"] == command_of("CMD")
    assert train["entrypoint"] == ["python", "train.py"]
    for service in (train, serve):
        mounted = dict(volume.split(":") for volume in service["volumes"])
        assert mounted == {"outputs": "/app/outputs", "data": "/app/data"}
        assert set(mounted) == set(COMPOSE["volumes"])
        assert service["build"] == "."


def command_of(name):
    (rest,) = [rest for found, rest in dockerfile.instructions(TEXT) if found == name]
    return json.loads(rest)


def test_compose_is_what_compose_takes():
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    done = subprocess.run([docker, "compose", "config", "--quiet"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_steps_with_everything_installed(tmp_path):
    """The same with real pip: downloads torch and a hundred packages."""
    image = dockerfile.build(TEXT, ROOT, tmp_path, borrow=False)
    look(image)
    small = ("model.n_layer=1", "model.n_embd=16", "trainer.max_steps=2", "data.val_tokens=2000")
    code, stdout, stderr = run(image, ["python", "train.py", *small])
    assert code == 0, stderr
    assert "best val loss" in stdout
    code, _, stderr = run(image, ["python", "-c", "import tinygpt.serve"])
    assert code == 0, stderr
    size = sum(path.stat().st_size for path in image.root.rglob("*") if path.is_file() and not path.is_symlink())
    print(f"{size / 1e9:.2f} GB above the base image")
