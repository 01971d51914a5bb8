"""`--help`: every key with its meaning and default, and the choices of every group, without importing torch."""

import dataclasses
from pathlib import Path

from tinygpt.config import inner_schema

EXAMPLES = {
    "train": (
        "python train.py",
        "python train.py data=text data.path=my.txt",
        "python train.py experiment=shakespeare_char_cpu",
        "python train.py model=llama_nano optimizer.lr=3e-3 trainer.max_steps=500",
        "python train.py -m model=nano,llama_nano optimizer.lr=1e-3,3e-3",
        'python train.py -m sweep=optuna "optimizer.lr=tag(log,interval(1e-4,1e-2))" model.n_layer=1,2,4',
    ),
    "prepare": (
        "python prepare.py data=text data.path=my.txt data/tokenizer=gpt2",
        "python prepare.py data=tinystories data.max_documents=100000",
    ),
    "sample": (
        'python sample.py ckpt=latest prompt="To be" temperature=0.8 top_k=50',
        "python sample.py ckpt=latest interactive=true",
    ),
    "export": (
        "python export.py ckpt=latest format=hf out=my-model",
        "python export.py ckpt=outputs/run1 format=safetensors out=my-model",
    ),
    "evaluate": (
        "python evaluate.py ckpt=latest split=val",
        "python evaluate.py ckpt=latest data=text data.path=my.txt",
    ),
    "serve": (
        "python serve.py ckpt=latest",
        "python serve.py 'ckpt={custom:outputs/a,other:outputs/b}' port=8080",
    ),
}


def print_help(verb: str, schema: type, conf: Path) -> None:
    print(f"{(schema.__doc__ or '').strip()}\n\nusage: python {verb}.py [key=value ...]\n")
    print("\n".join(f"  {line}" for line in EXAMPLES[verb]))
    if groups := group_choices(schema, conf):
        print("\ngroups (group=choice):")
        print("\n".join(f"  {name:<16} {', '.join(choices)}" for name, choices in groups.items()))
    print("\nkeys (key=value):")
    for line in key_lines(schema, ""):
        print(line)


def group_choices(schema: type, conf: Path) -> dict[str, list[str]]:
    """Every folder of conf/ that this script's schema has a place for, and the files in it."""
    names = {item.name for item in dataclasses.fields(schema)}
    names |= {"experiment"} if "trainer" in names else set()
    groups = {}
    for folder in sorted(path for path in conf.rglob("*") if path.is_dir()):
        group = folder.relative_to(conf).as_posix()
        if group.split("/")[0] in names:
            groups[group] = sorted(file.stem for file in folder.glob("*.yaml"))
    return groups


def key_lines(schema: type, prefix: str) -> list[str]:
    lines = []
    for item in dataclasses.fields(schema):
        kind = inner_schema(item)
        if kind:
            lines += ["", f"  {prefix}{item.name}: {item.metadata['help']}", *key_lines(kind, f"{prefix}{item.name}.")]
        else:
            lines.append(f"  {prefix + item.name:<32} {item.metadata['help']} {default_text(item)}".rstrip())
    return lines


def default_text(item: dataclasses.Field[object]) -> str:
    choices = item.metadata.get("choices")
    return f"[{shown_default(item)}" + (f"; one of {', '.join(choices)}]" if choices else "]")


def shown_default(item: dataclasses.Field[object]) -> str:
    """The default as one would type it; a newline as \\n."""
    made = item.default_factory
    value = item.default if made is dataclasses.MISSING else made()
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return shown.strip(chr(39)) or repr("")
