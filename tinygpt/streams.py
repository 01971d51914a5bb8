"""Documents that stream from the Hugging Face hub, or from a folder of the same form, through the `datasets` library.

Nothing is kept on disk but the tokens that are made of them: what is read twice is downloaded twice.
"""

import gzip
import hashlib
import json
import logging
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt.config import DataConfig, UserError
from tinygpt.files import expanded, reading

if TYPE_CHECKING:
    from datasets import IterableDataset

State = dict[str, Any]


class Unreachable(UserError):
    """What was there a moment ago may be there again: what is done so far is kept."""


@dataclass(frozen=True)
class Stream:
    """One split of a data set, as its column of text."""

    path: str
    subset: str | None
    revision: str | None
    split: str
    column: str
    max_documents: int | None

    @classmethod
    def of(cls, config: DataConfig) -> "Stream":
        assert config.path
        folder = expanded(config.path)
        path = str(folder.absolute()) if folder.exists() else config.path
        return cls(path, config.subset, config.revision, config.hf_split, config.column, config.max_documents)

    @property
    def name(self) -> str:
        """The last part of its name or folder, as part of a file name."""
        return re.sub(r"[^\w.-]+", "_", Path(self.path).name)

    def fingerprint(self) -> str:
        """Changes with what is asked for, and with the files of a folder; a data set of the hub is taken not to change."""
        seen: list[Any] = [self.path, self.subset, self.revision, self.split, self.column, self.max_documents]
        if (folder := Path(self.path)).exists():
            with reading(folder):
                files = sorted(path for path in folder.rglob("*") if path.is_file())
                seen += [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()

    def read(self) -> Iterator[str]:
        """The documents from the first on."""
        return iter(self.open(None, 0))

    def open(self, state: State | None, count: int) -> "Documents":
        """The documents after those `count` that were read when the state was `state`."""
        with _reaching(self.path):
            dataset = self._load()
            if state:
                dataset.load_state_dict(state)
        return Documents(self, dataset, count)

    def _load(self) -> "IterableDataset":
        try:
            import datasets
        except ImportError as error:
            raise UserError("data=hf needs the datasets library", "pip install -c constraints.txt -e '.[hf]'") from error
        datasets.disable_progress_bars()
        for library in ("datasets", "huggingface_hub"):
            logging.getLogger(library).setLevel(logging.ERROR)  # they warn at each retry; the error says it all
        return datasets.load_dataset(self.path, self.subset, split=self.split, revision=self.revision, streaming=True)


class Documents:
    """The documents of a stream that are still to come; empty ones are left out."""

    def __init__(self, stream: Stream, dataset: "IterableDataset", count: int) -> None:
        self._stream, self._dataset, self._count = stream, dataset, count

    def __iter__(self) -> Iterator[str]:
        limit = self._stream.max_documents
        if limit is not None and self._count >= limit:
            return
        with _reaching(self._stream.path):
            for row in self._dataset:
                if text := self._text(row):
                    self._count += 1
                    yield text
                if self._count == limit:
                    return

    def _text(self, row: dict[str, Any]) -> str:
        if self._stream.column not in row:
            raise UserError(
                f"the data set {self._stream.path} has no column {self._stream.column}",
                f"name one with data.column=: {', '.join(row)}",
            )
        text = row[self._stream.column]
        if text is not None and not isinstance(text, str):
            raise UserError(
                f"the column {self._stream.column} of {self._stream.path} holds {type(text).__name__}, not text",
                f"name another with data.column=: {', '.join(row)}",
            )
        return text or ""

    def state(self) -> State:
        """Where the next document is."""
        state: State = self._dataset.state_dict()
        return state


@contextmanager
def _reaching(path: str) -> Iterator[None]:
    """Turn what may go wrong with a data set into a UserError."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError as error:  # theirs for a name that the hub does not know, too
        hint = "give the name of a public data set, or a folder of parquet or JSON-lines files; a private one: hf auth login"
        raise UserError(f"data.path={path} is no data set: {_line(error)}", hint) from error
    except (ValueError, RuntimeError) as error:
        hint = "data.hf_split=, data.subset= and data.revision= choose among what it has"
        if "scripts are no longer supported" in str(error):
            hint = "its files of data may be had with data.revision=refs/convert/parquet"
        raise UserError(f"the data set {path} cannot be read: {_line(error)}", hint) from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise Unreachable(f"a file of {path} is damaged: {_line(error)}", "get it again, then start again") from error
    except Exception as error:
        if not _of_the_network(error):
            raise
        hint = (
            "check the network and start again: what is done is kept; or download the data set elsewhere "
            f"(hf download --repo-type dataset {path}) and give its folder: data.path=FOLDER"
        )
        raise Unreachable(f"cannot reach the data set {path}: {_line(error)}", hint) from error


def _of_the_network(error: Exception) -> bool:
    """Its libraries have changed with the versions of `datasets`: they are known by name."""
    names = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(names & {"aiohttp", "httpcore", "httpx", "httpx2"})


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
