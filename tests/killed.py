"""Prepares a text and dies by SIGKILL at the k-th event on disk, for each k there is; then goes on. Run by test_prepare.py.

python killed.py TEXT CACHE        one line of JSON for each k: pieces done at the death, pieces encoded afterwards, files
"""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

from tinygpt import corpus, pieces, shards, writer
from tinygpt.config import DataConfig, TokenizerConfig
from tinygpt.shards import prepare

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.truncate", "os.rmdir")


def main(text, cache):
    corpus.CHUNK_SIZE, pieces.BATCH_CHARACTERS, writer.PART_BYTES, writer.SHARD_TOKENS = 300, 300, 1000, 700
    whole = finish(text, cache / "whole")
    moment = 1
    while die(text, cache / str(moment), moment):
        print(json.dumps({"moment": moment, "whole": whole, **finish(text, cache / str(moment))}))
        moment += 1


def die(text, cache, moment):
    """Whether the process was killed before it was done."""
    child = os.fork()
    if child == 0:
        kill_at(moment, str(cache))
        prepare_text(text, cache)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def kill_at(moment, cache):
    """The events are those of the audit hooks of Python (docs.python.org/3/library/audit_events.html), and fsync."""
    seen, fsync = 0, os.fsync

    def event(name, arguments):
        nonlocal seen
        if name in EVENTS and any(cache in str(argument) for argument in arguments):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    def synced(descriptor):
        fsync(descriptor)
        event("open", [cache])

    sys.addaudithook(event)
    os.fsync = synced


def finish(text, cache):
    """Prepare to the end: how many pieces were done, and are encoded now."""
    journals = list(cache.glob(".*.part/journal.json"))
    place = json.loads(journals[0].read_text()).get("place") if journals else None
    encoded, encoder = [], shards.encoder

    def counting(*arguments):
        encode = encoder(*arguments)

        def encode_and_count(batch):
            encoded.append(len(batch.pieces))
            return encode(batch)

        return encode_and_count

    shards.encoder = counting
    folder = prepare_text(text, cache).folder
    shards.encoder = encoder
    left = sorted(str(path.relative_to(cache)) for path in cache.iterdir())
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}
    return {"done": place["pieces"] if place else 0, "encoded": sum(encoded), "left": left, "files": digests}


def prepare_text(text, cache):
    config = DataConfig(corpus="text", path=str(text), tokenizer=TokenizerConfig("bpe", vocab_size=280))
    return prepare(config, cache, cache)


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not live on in a forked process
    main(Path(sys.argv[1]), Path(sys.argv[2]))
