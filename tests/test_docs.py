"""The docs: the site builds without a warning, what is generated is up to date, and every command is one that works."""

import html.parser
import itertools
import re
import runpy
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from scripts import ROOT, run_inside
from test_conf import compose
from test_readme import commands_of

from tinygpt.multirun import written
from tinygpt.preflight import preflight

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
OURS = ("index", "train", "sweeps", "recipes", "model", "configuration", "coming-from", "faq")
COMMANDS = sorted({line for page in PAGES for line in commands_of(page)})
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
SCRIPTS = {line: shlex.split(line) for line in COMMANDS if re.match(r"python \w+\.py", line)}
TINY_TEXT = "it's, a=[text].txt"  # what tiny_home's run was trained on
LOCAL = re.compile(r"(?!https?:|//)")


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it; a warning is an error."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def test_the_site_builds_strictly_and_holds_every_page(site):
    assert {page.stem for page in PAGES} <= {path.stem for path in site.glob("*.html")}
    assert not list(site.glob("*.py"))


class Requests(html.parser.HTMLParser):
    """What a browser would fetch for a page."""

    def __init__(self):
        super().__init__()
        self.urls = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video"):
            self.urls += [given["src"]] if given.get("src") else []
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "modulepreload", "preconnect"):
            self.urls.append(given["href"])


def test_no_page_asks_another_machine_for_anything(site):
    for path in set(site.glob("*.html")) - {site / "404.html"}:  # that one is shown by a server: its links begin with /
        page = Requests()
        page.feed(path.read_text(encoding="utf-8"))
        assert len(page.urls) > 2
        for url in page.urls:
            assert LOCAL.match(url), f"{path.name} fetches {url}"
            assert (path.parent / url.split("#")[0].split("?")[0]).exists(), f"{path.name}: {url}"


@pytest.mark.parametrize("picture", sorted(DOCS.rglob("*.png")), ids=lambda path: path.stem)
def test_pictures_are_small_and_shown(picture):
    assert picture.stat().st_size < (150_000 if picture.parent.name == "figures" else 1_000_000)
    name = picture.relative_to(DOCS).as_posix()
    assert any(name in page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "README.md"]), f"no page shows {name}"


# What is generated


@pytest.fixture(scope="module")
def generate():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        yield runpy.run_path(str(DOCS / "generate.py"))


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.stem)
def test_generated_parts_are_up_to_date(path, generate):
    text = path.read_text(encoding="utf-8")
    assert generate["generated"](text) == text, "run: python docs/generate.py"


def test_every_part_that_can_be_generated_is_used(generate):
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert set(re.findall(r"<!-- generated: (\S+) -->", text)) == set(generate["PARTS"])


def test_the_shapes_are_those_of_the_modules(generate):
    from tinygpt.config import ModelConfig

    watch = generate["shapes"].watch
    seen = watch(ModelConfig(n_layer=1, n_head=4, n_kv_head=2, n_embd=8, block_size=6), 10, 3)
    assert seen["q"] == (3, 4, 6, 2)
    assert seen["k"] == seen["v"] == (3, 2, 6, 2)
    assert seen["scores"] == (3, 4, 6, 6)
    assert seen["active"] == (3, 6, 32)
    assert seen["logits"] == (3, 6, 10)
    assert seen["loss"] == ()


# The commands


def test_the_docs_show_commands():
    assert len(SCRIPTS) > 20


@pytest.mark.parametrize("line", [*SCRIPTS, *(line for line in commands_of(ROOT / "README.md") if "pip" not in line)])
def test_no_shell_changes_a_command(line):
    """zsh looks for files of such a name, bash writes a brace twice."""
    assert not re.search(r"[\[\](){}*?]", QUOTED.sub("", line.partition(" #")[0])), line


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_make_targets_exist(line):
    target = line.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("line", [line for line in COMMANDS if re.match(r"python (\w+/)+\w+\.py", line)])
def test_other_scripts_exist_and_know_their_options(line, monkeypatch, capsys):
    path, *options = shlex.split(line)[1:]
    text = (ROOT / path).read_text(encoding="utf-8")
    for option in options:
        assert not option.startswith("--") or f'"{option}"' in text, option


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_home):
    """A folder as a reader has it: a text, some books, a run."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "books").mkdir()
    for name in ("my.txt", "books/one.txt", TINY_TEXT):
        shutil.copy(tiny_home / TINY_TEXT, folder / name)
    shutil.copytree((tiny_home / "outputs" / "latest").resolve(), folder / "outputs" / "latest")
    shutil.copytree(folder / "outputs" / "latest", folder / "outputs" / "mine")
    return folder


@pytest.mark.parametrize("line", SCRIPTS)
def test_every_command_is_one_that_the_scripts_take(line, home, generate):
    """Configs are composed and held to their schemas, callbacks and loggers found; what is quick runs."""
    verb, arguments = Path(SCRIPTS[line][1]).stem, SCRIPTS[line][2:]
    quick = verb in ("sample", "evaluate") and {"ckpt=latest", "ckpt=outputs/mine"} & set(arguments)
    if quick or "--help" in arguments:
        tokens = ["max_new_tokens=3"] if verb == "sample" and "--help" not in arguments else []
        done = run_inside(verb, *arguments, *tokens, cwd=home, stdin="the\nquit\n", env={"TINYGPT_CACHE_DIR": "cache"})
        assert done.code == 0, done.stderr
        assert done.stdout.strip()
        return
    for job in jobs(arguments):
        config = compose(verb, *job, schema=generate["reference"].schemas()[verb])
        if verb == "train":
            preflight(replace(config, trainer={**config.trainer, "accelerator": "cpu"}))
            assert config.data.corpus != "text" or list(home.glob(config.data.path)), "no such text in the test's folder"


def jobs(arguments):
    """The arguments of each job: of a sweep (-m), every combination of the values."""
    if "-m" not in arguments:
        return [arguments]
    overrides = OverridesParser.create().parse_overrides([item for item in arguments if item != "-m"])
    return itertools.product(*([values(override) for override in overrides if not override.is_hydra_override()]))


def values(override):
    """As overrides; of an interval its ends."""
    value = override.value()
    ends = (value.start, value.end) if isinstance(value, IntervalSweep) else None
    return [f"{override.get_key_element()}={end}" for end in ends] if ends else written(override)


def python_of(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in OURS if python_of(DOCS / f"{name}.md")])
def test_the_python_of_the_docs_works(name, home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    for code in python_of(DOCS / f"{name}.md"):
        exec(code, {})
        assert capsys.readouterr().out.strip()


def test_the_recipe_of_one_s_own_composes(tmp_path):
    """The YAML of the FAQ, as a file of conf/experiment."""
    (text,) = re.findall(
        r"^```yaml\n(.*?)^```", (DOCS / "faq.md").read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    conf = shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (conf / "experiment" / "mine.yaml").write_text(text, encoding="utf-8")
    config = compose("train", "experiment=mine", conf=conf)
    assert (config.data.path, config.model.n_layer, config.trainer["max_epochs"]) == ("my.txt", 6, 3)


def named_keys():
    """Keys in backticks, anywhere in our pages: `model.n_layer`, `data.path=my.txt`; whole commands among them."""
    for name in OURS:
        for code in re.findall(r"`([^`\n]+)`", (DOCS / f"{name}.md").read_text(encoding="utf-8")):
            yield from re.findall(
                r"(?<![\w./+-])((?:model|data|optimizer)\.[a-z_]+(?:\.[a-z_]+)?)(?![\w/(]|\.\w|\.\*)", code
            )


def test_keys_named_in_the_text_exist():
    from tinygpt.config import TrainConfig, all_keys

    found, known = set(named_keys()), set(all_keys(TrainConfig))
    theirs = {
        "model.optimizer.lr",
        "model.scheduler",
        "model.compile",
        "data.batch_size",
        "data.train_data_path",
        "model.py",
    }
    assert len(found) > 20
    assert found - known <= theirs, "a key that does not exist"
