"""The saved pieces of a comparison as bars: ``python -m aserve.bench.plot FOLDER``; needs matplotlib."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

from aserve.bench import report

matplotlib.use("Agg")

from matplotlib import pyplot


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "build/bench")
    pieces = {name: piece for name, piece in report.load(folder).items() if "rows" in piece}
    if not pieces:
        print(f"no figures in {folder}", file=sys.stderr)
        return 1
    figure, axes = pyplot.subplots(
        1, len(pieces), figsize=(4.2 * len(pieces), 3.6), squeeze=False, constrained_layout=True
    )
    for axis, (name, piece) in zip(axes[0], pieces.items(), strict=True):
        systems = list(dict.fromkeys(row["system"] for row in piece["rows"]))
        sizes = sorted({row["n"] for row in piece["rows"]})
        width = 0.8 / len(systems)
        for number, system in enumerate(systems):
            rates = {row["n"]: row["tokens_per_s"] for row in piece["rows"] if row["system"] == system}
            places = [at + (number - (len(systems) - 1) / 2) * width for at in range(len(sizes))]
            bars = axis.bar(places, [rates.get(size, 0) for size in sizes], width, label=system)
            labels = [f"{rates[size]:.0f}" if size in rates else "" for size in sizes]
            axis.bar_label(bars, labels, fontsize=6, rotation=90, padding=2)
        axis.set_xticks(range(len(sizes)), [f"n={size}" for size in sizes])
        axis.set_title(report.TITLES[name], fontsize=9)
        axis.set_ylabel("output tokens/s, whole run", fontsize=8)
        axis.margins(y=0.15)
        axis.legend(fontsize=7)
    for suffix in ("svg", "png"):
        figure.savefig(folder / f"report.{suffix}", dpi=130)
    print(f"saved: {folder / 'report.svg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
