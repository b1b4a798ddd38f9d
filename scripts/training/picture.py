"""The curves as a picture: picture.py RESULTS_JSON PNG, with a Python path that has matplotlib."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def draw(results: dict[str, Any], png: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for name, system in results["systems"].items():
        times, tokens, losses = zip(*system["curve"], strict=True)
        axes[0].plot(times, losses, label=name, linewidth=1.5)
        axes[1].plot([t / 1e6 for t in tokens], losses, label=name, linewidth=1.5)
    for axis, label in zip(axes, ("seconds", "million tokens, all nodes"), strict=True):
        axis.set_xlabel(label)
        axis.axhline(results["target"], color="grey", linewidth=0.8, linestyle=":")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("validation loss, nats per byte")
    axes[1].legend()
    plan = results["plan"]
    figure.suptitle(f"{plan['nodes']} nodes, {plan['link']}, {plan['parameters']:,} parameters")
    figure.savefig(png, dpi=130)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
