"""The two plots of a record of `peers`: samples a second over batch size, and how near each cell comes to its floor."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import Cell, Row

THROUGHPUT, FLOOR = "throughput.svg", "floor.svg"
ALT = {THROUGHPUT: "samples a second over batch size", FLOOR: "share of the floor in every cell"}

# Okabe and Ito's palette, which colour-blind readers can tell apart; ours are the two strong ones.
OURS = {"ours, fast": "#D55E00", "ours, NumPy": "#E69F00"}
PEERS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#000000")
MARKERS = "osD^vP"
GREY = "#666666"

STYLE = {
    "svg.hashsalt": "backprop_gpu",  # names within the file are the same each time
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}
APART = 0.075  # of a panel's height: two labels at the ends of lines


def shown() -> list[str]:
    """The lines of Markdown that show both."""
    return [f"![{ALT[name]}](benchmarks/records/{name})" for name in (THROUGHPUT, FLOOR)]


def draw(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """Write both plots as SVG, the same bytes from the same cells and the same matplotlib; where they are."""
    import matplotlib
    from matplotlib.figure import Figure

    written = []
    with matplotlib.rc_context(STYLE):
        for name, drawn in ((THROUGHPUT, throughput), (FLOOR, floor)):
            figure: Any = Figure(layout="constrained")
            drawn(figure, cells)
            figure.savefig(folder / name, metadata={"Date": None})
            written.append(folder / name)
    return written


# ------------------------------------------------------------------------------------------------------ throughput


def throughput(figure: Any, cells: Sequence[Cell]) -> None:
    """A panel for each network and optimizer, a line for each library."""
    networks = list(dict.fromkeys(cell.network for cell in cells))
    optimizers = list(dict.fromkeys(cell.optimizer for cell in cells))
    batches = sorted({cell.m for cell in cells})
    colours = _colours(cells)
    figure.set_size_inches(3.1 * len(networks) + 0.5, 2.7 * len(optimizers) + 0.3)
    axes = figure.subplots(len(optimizers), len(networks), sharex=True, sharey="col", squeeze=False)
    panels = []
    for i, optimizer in enumerate(optimizers):
        for j, network in enumerate(networks):
            here = [cell for cell in cells if (cell.network, cell.optimizer) == (network, optimizer)]
            panels.append((axes[i][j], lines(here, colours)))
            axes[i][j].set_title(f"{network}, {optimizer}", fontsize=9.5, loc="left")
            axes[i][j].set_xlabel("batch size" if i == len(optimizers) - 1 else "")
            axes[i][j].set_ylabel("" if j else "samples / s")
    for ax, drawn in panels:
        for name, points in drawn.items():
            ax.plot(*zip(*points, strict=True), color=colours[name], **_line(name, list(colours)))
        ax.set(xscale="log", yscale="log", xlim=(batches[0] / 1.3, batches[-1] * 6))
        _plain_ticks(ax, batches)
    figure.draw_without_rendering()  # lays out, so that labels know the scales
    for ax, drawn in panels:
        _label_ends(ax, {name: points[-1] for name, points in drawn.items()}, colours)


def lines(cells: Sequence[Cell], names: Iterable[str]) -> dict[str, list[tuple[int, float]]]:
    """(batch size, samples a second) of each of these that has a time in some cell, by batch size."""
    found = {
        name: sorted((cell.m, 1e6 * cell.m / row["us"]) for cell in cells if (row := _row(cell, name)))
        for name in names
    }
    return {name: points for name, points in found.items() if points}


def _row(cell: Cell, name: str) -> Row | None:
    return cell.ours.get(name.removeprefix("ours, ")) if name in OURS else cell.peers.get(name)


def _colours(cells: Sequence[Cell]) -> dict[str, str]:
    """The colour of each line, ours first."""
    peers = dict.fromkeys(name for cell in cells for name in cell.peers)
    return {**OURS, **dict(zip(peers, itertools.cycle(PEERS)))}


def _line(name: str, names: Sequence[str]) -> dict[str, Any]:
    """How a line is drawn, but for its colour: ours are bold."""
    marker = MARKERS[names.index(name) % len(MARKERS)]
    width, size, order = (2.2, 4.5, 3) if name in OURS else (1.2, 3.5, 2)
    return {"marker": marker, "linewidth": width, "markersize": size, "zorder": order}


def _plain_ticks(ax: Any, batches: Sequence[int]) -> None:
    """Batch sizes as they are, samples as 20 k or 1.5 M."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_xticks(batches, [str(m) for m in batches])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y / 1e6:g} M" if y >= 1e6 else f"{y / 1e3:g} k"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.grid(axis="y", color="#E5E5E5", linewidth=0.6)
    ax.set_axisbelow(True)


def _label_ends(ax: Any, ends: Mapping[str, tuple[float, float]], colours: Mapping[str, str]) -> None:
    """Names beside the last points, moved apart where they would overlap."""
    to_axes = ax.transAxes.inverted()
    at = {name: to_axes.transform(ax.transData.transform(point)) for name, point in ends.items()}
    heights = spread_out({name: float(y) for name, (_, y) in at.items()})
    right = max((float(x) for x, _ in at.values()), default=0.0)
    for name, (x, y) in at.items():
        ax.annotate(
            name, (x, y), (right + 0.07, heights[name]), "axes fraction", "axes fraction", va="center",
            color=colours[name], fontweight="bold" if name in OURS else "normal", fontsize=8,
            arrowprops={"arrowstyle": "-", "color": colours[name], "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3},
        )  # fmt: skip


def spread_out(heights: Mapping[str, float], apart: float = APART) -> dict[str, float]:
    """Heights from 0 to 1 in the same order, `apart` from one another, near where they were."""
    names = sorted(heights, key=lambda name: heights[name])
    found: dict[str, float] = {}
    lowest = 0.0
    for name in names:
        found[name] = lowest = max(heights[name], lowest)
        lowest += apart
    highest = 1.0
    for name in reversed(names):
        found[name] = highest = min(found[name], highest)
        highest -= apart
    return found


# ----------------------------------------------------------------------------------------------------------- floor


def floor(figure: Any, cells: Sequence[Cell]) -> None:
    """A line for each cell, with a mark for ours and for the best peer; 100 % is the floor."""
    figure.set_size_inches(7.2, 0.28 * len(cells) + 1.1)
    ax = figure.subplots()
    marks = {**dict(zip(OURS, zip("Ds", OURS.values(), strict=True), strict=True)), "best peer": ("o", PEERS[0])}
    for y, cell in enumerate(cells):
        shares = {}
        for name in marks:
            share = cell.share(_row(cell, name) if name in OURS else cell.best_peer())
            if share is not None:
                shares[name] = share
        if shares:
            ax.plot([min(shares.values()), max(shares.values())], [y, y], color="#CCCCCC", linewidth=1.5, zorder=1)
        for name, share in shares.items():
            marker, colour = marks[name]
            ax.plot(share, y, marker=marker, color=colour, markersize=6, linestyle="none", zorder=2)
    _legend_above(ax, marks)
    ax.axvline(1, color=GREY, linewidth=0.8, linestyle=":")
    ax.set_yticks(range(len(cells)), [f"{cell.network} @ {cell.m} {cell.optimizer}" for cell in cells])
    ax.set(xlim=(0, None), ylim=(len(cells) - 0.4, -0.6), xlabel="floor / time of a step")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color="#E5E5E5", linewidth=0.6)
    ax.set_axisbelow(True)


def _legend_above(ax: Any, marks: Mapping[str, tuple[str, str]]) -> None:
    for name, (marker, colour) in marks.items():
        ax.plot([], [], marker=marker, color=colour, linestyle="none", markersize=6, label=name)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(marks), frameon=False, borderaxespad=0.2)
