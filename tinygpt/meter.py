"""How far the tokenising of a corpus has come, on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tinygpt.pieces import Place

LARGE_TEXT = 50_000_000
"""Characters; a smaller text is tokenised without a word."""

LINE_SECONDS = 10.0


@contextmanager
def progress(total: int | None, documents: int | None, start: Place | None) -> Iterator[Callable[[Place], None]]:
    """What to call with each new place: a bar on stderr, in a log a line now and then; nothing for a small text.

    total: characters; None for a stream, of which so many `documents` are wanted, if that is known.
    """
    if total is not None and total < LARGE_TEXT:
        yield lambda _: None
        return
    unit, end = ("pieces", documents) if total is None else ("characters", total)
    if start:
        print(f"going on after {start['bytes'] / 1e6:,.0f} MB that are tokenised already", file=sys.stderr, flush=True)
    with _bar(unit, end, start) if sys.stderr.isatty() else _lines(unit, end, start) as show:
        yield show


@contextmanager
def _bar(unit: str, end: int | None, start: Place | None) -> Iterator[Callable[[Place], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("tokenising"), BarColumn(), TextColumn("{task.fields[done]}"), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=end, completed=start[unit] if start else 0, done="")
        yield lambda place: bar.update(task, completed=place[unit], done=_done(place, unit, end))


@contextmanager
def _lines(unit: str, end: int | None, start: Place | None) -> Iterator[Callable[[Place], None]]:
    began = last = time.monotonic()
    before = start["bytes"] if start else 0

    def show(place: Place) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LINE_SECONDS:
            last = now
            speed = (place["bytes"] - before) / 1e6 / (now - began)
            print(f"tokenising: {_done(place, unit, end)}, {speed:.1f} MB/s", file=sys.stderr, flush=True)

    yield show


def _done(place: Place, unit: str, end: int | None) -> str:
    amount = f"{place['bytes'] / 1e6:,.0f} MB"
    if unit == "pieces":
        return f"{place['pieces']:,} {f'of {end:,} ' if end else ''}documents, {amount}"
    assert end
    return f"{amount} ({100 * place['characters'] / end:.0f}%)"
