"""Writes the parts of the docs and the README that come from the code and from benchmarks/results.

Such a part stands between `<!-- generated: NAME -->` and `<!-- end -->`; PARTS says what makes it.

    python docs/generate.py            rewrite what is out of date
    python docs/generate.py --check    change nothing; exit with 1 if something is
"""

import argparse
import re
import sys
from collections.abc import Callable

import imdb
import reference
import results
import shapes
from results import ROOT

PARTS: dict[str, Callable[[], str]] = {
    "configuration": reference.scripts,
    "groups": reference.groups,
    "trainer": reference.trainer,
    "experiments": results.experiments,
    "measured": results.measured,
    "speed": results.speed,
    "ablation": results.ablation,
    "measured-on": results.measured_on,
    "seeds": results.seeds,
    "sample": results.sample,
    "serving": results.serving,
    "generation": results.generation,
    "preparation": results.preparation,
    "reliability": results.reliability,
    "overfit": results.overfit,
    "letters": shapes.letters,
    "imdb-prepared": imdb.prepared,
    "imdb-vocabulary": imdb.vocabulary,
    "imdb-padding": imdb.padding,
    "imdb-race": imdb.race,
    "shapes": shapes.steps,
    "parameters": shapes.parameters,
}
MARKED = re.compile(r"(?P<start><!-- generated: (?P<name>\S+) -->\n).*?(?P<end><!-- end -->)", flags=re.DOTALL)


def generated(text: str) -> str:
    """`text` with every marked part as it should be now."""
    return MARKED.sub(lambda part: f"{part['start']}\n{PARTS[part['name']]().strip()}\n\n{part['end']}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a part is out of date")
    check = parser.parse_args().check
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        if (new := generated(text)) != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if not check:
                path.write_text(new, encoding="utf-8")
    for name in stale:
        print(f"{'out of date' if check else 'written'}: {name}")
    if check and stale:
        sys.exit("run: python docs/generate.py")


if __name__ == "__main__":
    main()
