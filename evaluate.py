"""The loss of a trained GPT on a text, as one JSON object: python evaluate.py ckpt=latest split=val"""

import json
from pathlib import Path

from tinygpt import cli
from tinygpt.config import EvaluateConfig, UserError
from tinygpt.lean import lean_imports


def work(config: EvaluateConfig, run_dir: Path, overrides: list[str]) -> None:
    with lean_imports():  # torch, which --help does not wait for
        from tinygpt import checkpoint as ckpt
        from tinygpt.batches import validation_rows
        from tinygpt.corpus import cache_dir, data_dir
        from tinygpt.evaluate import evaluate
        from tinygpt.shards import prepare

    name, opened = ckpt.open_any(config.ckpt)
    ckpt.refuse_other_tokenizer(opened, overrides)
    device = ckpt.pick_device(config.device)
    model, tokenizer = ckpt.rebuild(opened, device, config.dtype)
    data = config.data or ckpt.stored_data(opened["tinygpt"])
    prepared = prepare(data, data_dir(config.data_dir), cache_dir(config.cache_dir), tokenizer)
    ckpt.check_vocabulary(opened, prepared.tokenizer)
    tokens = prepared.tokens(config.split)
    if len(tokens) < 2:
        raise UserError(f"the split {config.split} holds {len(tokens)} tokens", "use a longer text, or split=all")
    if config.rows == "openings" and tokens.documents is None:
        raise UserError(
            f"rows=openings needs documents, and the corpus {prepared.corpus} is one running text", "use rows=windows"
        )
    limit = data.val_tokens if config.split == "val" else None
    lengths = None if data.clean else prepared.tokenizer.byte_lengths()
    size = config.batch_size or validation_rows(model.config.block_size, model.vocab_size, device)
    how = {"batch_size": size, "limit": limit, "layout": data.layout, "rows": config.rows}
    metrics = evaluate(model, tokens, lengths, **how)
    where = {"checkpoint": name, "corpus": prepared.corpus, "sha256": prepared.sha256, "split": config.split}
    print(json.dumps({**metrics, **where, "rows": config.rows, "dtype": config.dtype}))


if __name__ == "__main__":
    cli.main("evaluate", EvaluateConfig, work, Path(__file__).parent / "conf")
