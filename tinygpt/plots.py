"""curves.png: training and validation loss against tokens, from a run's metrics.csv."""

from pathlib import Path

from tinygpt.loggers import read_metrics


def draw_curves(metrics: Path, target: Path, title: str) -> None:
    """Draw `metrics` (a metrics.csv) to `target` (a PNG), the best validation loss marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    rows = read_metrics(metrics)
    train = [(int(row["tokens"]), float(row["train/loss"])) for row in rows if row["train/loss"]]
    val = [(int(row["tokens"]), float(row["val/loss"])) for row in rows if row["val/loss"]]
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="#9ab8d8", linewidth=1, label="train (one batch)")
    if val:
        axes.plot(*zip(*val, strict=True), color="#c8501e", linewidth=1.8, marker="o", markersize=3, label="validation")
        best = min(val, key=lambda point: point[1])
        axes.plot(*best, color="#c8501e", marker="*", markersize=14, linestyle="none", label=f"best {best[1]:.4f}")
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=title)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if train or val:
        axes.legend(frameon=False)
    figure.savefig(target)
