"""The tables of imdb.md, from what benchmarks/imdb.py and benchmarks/imdb_corpus.py measured."""

from results import RESULTS, place, read, table


def prepared() -> str:
    """Vocabulary and tokens of the prepared corpus, by kind of text."""
    result = read("imdb_corpus")
    rows = [
        (name, f"{way['vocabulary']:,}", *(f"{count:,}" for count in way["tokens"].values()), f"{way['seconds']:.0f}")
        for name, way in result["prepared"].items()
    ]
    head = ("text and tokens", "vocabulary", "training", "validation", "test", "seconds of processor time")
    return f"{table(head, rows)}\n\n{source('imdb_corpus')}"


def vocabulary() -> str:
    """The size of the cleaned vocabulary, by way to split."""
    found = read("imdb_corpus")["vocabulary"]
    chance = found["by_chance"]
    rows = [(f"`{name}`", f"{size:,}", f"{size - found['reference']:+,}") for name, size in found["by_recipe"].items()]
    span = f"{chance['mean']:,.0f} ({chance['min']:,.0f} to {chance['max']:,.0f}, standard deviation {chance['sd']:.0f})"
    rows.append((f"{chance['splits']} splits by chance", span, f"{chance['mean'] - found['reference']:+,.0f}"))
    return table(("training split, seed 42", "vocabulary", "against 39,270"), rows)


def padding() -> str:
    """Positions computed for each token that counts."""
    ways = read("imdb_corpus")["prepared"]["words, cleaned"]["padding"]
    rows = [(f"`model.block_size={T}`", *(f"{ratio:.2f}" for ratio in ratios.values())) for T, ratios in ways.items()]
    head = ("positions computed for each word, batches of 64", *next(iter(ways.values())))
    return table(head, rows)


def race() -> str:
    """Both recipes in equal time."""
    if not (RESULTS / "imdb.json").exists():
        return "Not measured yet."
    result = read("imdb")
    rows = []
    for name, run in result["runs"].items():
        counts = (f"{run[key]:,.0f}" for key in ("parameters", "steps", "tokens", "training_seconds"))
        losses = (f"{run[way]['loss']:.3f}, {run[way]['accuracy']:.2%}" for way in ("windows", "openings"))
        rows.append((f"`{name}`", *counts, *losses))
    head = ("loss and accuracy", "parameters", "steps", "tokens", "seconds", "all windows", "first 64 words of each review")
    how = "both at once, each on a core of its own" if result["together"] else "one after the other"
    first = next(iter(result["runs"].values()))
    seen = f"{first['windows']['tokens']:,} tokens in windows, {first['openings']['tokens']:,} in openings"
    return f"{table(head, rows)}\n\nSeed {result['seed']}, {how}; validated on {seen}. {source('imdb')}"


def source(name: str) -> str:
    return f"`benchmarks/results/{name}.json`: {place(read(name))}."
