"""The README's benchmark tables and plots, made from the records in benchmarks/records/: no figure is typed by hand.

    python -m benchmarks.report           writes README.md and the plots (they take the extra `plot`)
    python -m benchmarks.report --check   writes nothing; prints a diff and exits with 1 where README disagrees

A table stands between the lines `<!-- benchmarks: KIND -->` and `<!-- end -->`; KIND is one of peers, time_to_accuracy
and bench. It is made of the newest record of its kind, the file KIND-*.json with the latest date. `*` marks a figure
whose repetitions spread by more than 10 %.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from backprop_gpu.errors import BackpropGPUError, DataError

from . import plots

ROOT = Path(__file__).resolve().parent.parent
LABELS = {"textbook": "textbook NumPy", "sklearn": "scikit-learn", "torch": "PyTorch", "jax": "JAX"}
RULES = {"sgd": "SGD", "adam": "Adam"}
SPREAD = 0.1  # above which a figure is flagged
SECTION = re.compile(r"<!-- benchmarks: (?P<kind>\w+) -->\n(?P<text>.*?)<!-- end -->", re.DOTALL)

Row = Mapping[str, Any]
Record = Mapping[str, Any]


# --------------------------------------------------------------------------------------------------------- records


def newest(kind: str, folder: Path) -> tuple[Path, Record] | None:
    """The record of this kind with the latest date, and where it is; None without one. DataError for one not JSON."""
    found = [(path, _read(path)) for path in sorted(folder.glob(f"{kind}-*.json"))]
    return max(found, key=lambda entry: entry[1]["conditions"]["date"], default=None)


def _read(path: Path) -> Record:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise DataError(f"{path.name} is not JSON: {e}", "take the benchmark again, or remove the file") from e


class Cell:
    """The rows of a network, batch size and optimizer: `ours` by "NumPy" and "fast", `peers` each library's best."""

    def __init__(self, cell: Row, rows: Sequence[Row]) -> None:
        self.layers, self.m, self.optimizer = cell["layers"], cell["m"], RULES[cell["optimizer"]]
        timed = [row for row in rows if "us" in row and "rejected" not in row]
        self.ours = {name: row for row in timed if (name := ours(row))}
        self.floor = next((row for row in timed if is_floor(row)), None)
        self.peers: dict[str, Row] = {}
        for row in sorted(timed, key=lambda row: row["us"]):
            if not ours(row) and not is_floor(row):
                self.peers.setdefault(LABELS[row["library"]], row)
        self.untimed = [row for row in rows if "us" not in row or "rejected" in row]

    @property
    def network(self) -> str:
        """Its widths, "784-100-10"."""
        return "-".join(map(str, self.layers))

    def best_peer(self) -> Row | None:
        """The quickest row that is not ours."""
        return min(self.peers.values(), key=lambda row: row["us"], default=None)

    def ratio(self, name: str) -> float | None:
        """The best peer's time over ours, within the same repetition: the median. None where either is missing."""
        peer = self.best_peer()
        return ratio(peer, self.ours[name]) if peer and name in self.ours else None

    def share(self, row: Row | None) -> float | None:
        """The floor's time over that of a row, within the same repetition: the median."""
        return ratio(self.floor, row) if self.floor and row else None


def ours(row: Row) -> str | None:
    """ "NumPy" or "fast" for this package's own rows, None for others."""
    if row["library"] != "backprop_gpu" or is_floor(row):
        return None
    return {"numpy": "NumPy", "fast": "fast"}[row["program"]]


def is_floor(row: Row) -> bool:
    """Whether it is the floor: a step's products and memory traffic alone."""
    return row["program"] == "floor"


def ratio(of: Row, to: Row) -> float:
    """Median over the repetitions of one row's time over the other's; they were taken in turn."""
    pairs = zip(of["times_us"], to["times_us"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def cells(record: Record) -> list[Cell]:
    """The cells of a record of `peers`, in its order."""
    grouped: dict[str, list[Row]] = {}
    for row in record["rows"]:
        grouped.setdefault(json.dumps(row["cell"], sort_keys=True), []).append(row)
    return [Cell(rows[0]["cell"], rows) for rows in grouped.values()]


# ---------------------------------------------------------------------------------------------------------- tables


def peers(record: Record, link: str) -> str:
    """Microseconds of a training step in every cell, beside each peer's best program."""
    found = cells(record)
    libraries = list(dict.fromkeys(name for cell in found for name in cell.peers))
    head = [
        "network",
        "batch",
        "optimizer",
        "ours, NumPy",
        "ours, fast",
        *libraries,
        "best peer / ours",
        "floor / ours",
    ]
    body = []
    for cell in found:
        mine = [cell.ours.get(name) for name in ("NumPy", "fast")]
        body.append([
            cell.network, str(cell.m), cell.optimizer, *map(_us, mine), *map(_us, map(cell.peers.get, libraries)),
            _both(cell.ratio("NumPy"), cell.ratio("fast"), "{:.2f}"),
            _both(*map(cell.share, mine), "{:.0%}"),
        ])  # fmt: skip
    means = [
        f"**{geometric_mean(ratios):.2f}** ({name})"
        for name in ("NumPy", "fast")
        if (ratios := [r for cell in found if (r := cell.ratio(name)) is not None])
    ]
    lines = [table(head, body), ""]
    if means:
        lines.append(f"Geometric mean of best peer / ours: {', '.join(means)}. Above 1 ours is quicker.")
    lines.append("Microseconds a step; where two figures stand, NumPy alone / with `fast`; `*`: spread above 10 %.")
    lines += [*untimed(found), conditions(record, link), "", *plots.shown()]
    return "\n".join(lines)


def untimed(found: Sequence[Cell]) -> list[str]:
    """A line for each reason why rows have no time, with the cells it holds for; all of them in few words."""
    where: dict[str, list[str]] = {}
    for cell in found:
        for row in cell.untimed:
            reason = next((f"{key}: {row[key]}" for key in ("rejected", "error", "missing") if key in row), "not timed")
            where.setdefault(f"{LABELS.get(row['library'], 'ours')}, {row['program']} ({reason})", []).append(
                f"{cell.network} @ {cell.m} {cell.optimizer}"
            )
    return [
        f"Without a time: {row} in {'all cells' if len(at) == len(found) else ', '.join(at)}."
        for row, at in where.items()
    ]


def time_to_accuracy(record: Record, link: str) -> str:
    """Seconds to the goal, of warm processes and of cold starts."""
    rows = record["rows"]
    mine = min((row["median"] for row in rows if row["library"] == "backprop_gpu" and "median" in row), default=None)
    goal = f"{100 * record['goal']:g} %"
    head = ["library", "threads", f"seconds to {goal}", "min to max", "of ours", "failures", "cold start, s"]
    body, told = [], []
    for row in rows:
        name = f"{row['library']}, {row['program']}"
        if "n" not in row:
            reason = next(f"{key}: {row[key]}" for key in ("rejected", "error", "missing") if key in row)
            told.append(f"Without a time: {name} ({reason}).")
            continue
        seconds, reach, of_ours = "never", "", ""
        if "median" in row:
            seconds, reach = f"{row['median']:.2f}{_star(row)}", f"{row['min']:.2f} to {row['max']:.2f}"
            of_ours = f"{row['median'] / mine:.2f}" if mine else ""
        failures = f"{row['failures']} of {row['n']}"
        body.append([name, str(row["threads"]), seconds, reach, of_ours, failures, _cold(row["cold"])])
    recipe = record["recipe"]
    widths, rates = "-".join(map(str, recipe["layers"])), ", ".join(f"{lr:g}" for lr in recipe["rates"])
    what = (
        f"{widths}, batches of {recipe['batch_size']}, {recipe['optimizer']} at {rates}, an epoch each. Median over "
        "the seeds that reached the goal; `*`: spread above 10 %."
    )
    return "\n".join([table(head, body), "", what, *told, conditions(record, link)])


def _cold(cold: Row) -> str:
    failed = f" ({cold['failures']} of {cold['n']} failed)" if cold["failures"] else ""
    return (f"{cold['median']:.2f}{_star(cold)}" if "median" in cold else "never") + failed


def bench(record: Record, link: str) -> str:
    """What `backprop-gpu bench --json` says, a row a run."""
    head = ["network", "batch", "optimizer", "us a step", "samples/s", "GFLOP/s", "floor / ours"]
    body = []
    for row in record["rows"]:
        us = f"{_digits(row['step_us'])}{'*' if row['step_spread'] > SPREAD else ''}"
        share = "" if row["floor_share"] is None else f"{row['floor_share']:.0%}"
        rates = [f"{row['samples_per_second']:.0f}", f"{row['gflops']:.0f}", share]
        body.append(["-".join(map(str, row["layers"])), str(row["batch_size"]), row["optimizer"], us, *rates])
    return "\n".join([table(head, body), "", conditions(record, link)])


TABLES: dict[str, Callable[[Record, str], str]] = {
    "peers": peers, "time_to_accuracy": time_to_accuracy, "bench": bench
}  # fmt: skip


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def conditions(record: Record, link: str) -> str:
    """On what it was measured, when, how often, and how to do it again."""
    c = record["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in c["versions"].items() if version)
    return (
        f"{c['cpu']}, {len(c['affinity'])} cores; {versions}; {c['date'][:10]}, n = {repetitions(record)}; repeated by "
        f"`{c['command']}` ([record]({link}))."
    )


def repetitions(record: Record) -> str:
    """How many times each figure was taken, "9" or "7 to 9"."""
    counts = {row.get("n", len(row.get("times_us", ()))) for row in record["rows"]} - {0}
    return " to ".join(str(n) for n in sorted({min(counts), max(counts)})) if counts else "0"


def geometric_mean(values: Sequence[float]) -> float:
    """The n-th root of their product."""
    return statistics.geometric_mean(values)


def _us(row: Row | None) -> str:
    """Microseconds, with a star where they spread; empty without a row."""
    if row is None:
        return ""
    return f"{_digits(row['us'])}{_star(row)}"


def _digits(us: float) -> str:
    return f"{us:.{0 if us >= 100 else 1}f}"


def _star(row: Row) -> str:
    return "*" if row.get("noisy", row["spread"] > SPREAD) else ""


def _both(numpy: float | None, fast: float | None, form: str) -> str:
    """Two figures with a slash, what is missing left out."""
    return " / ".join(form.format(x) for x in (numpy, fast) if x is not None)


# ---------------------------------------------------------------------------------------------------------- README


def sections(folder: Path) -> Iterator[tuple[str, str]]:
    """(kind, text) for every kind of table that there is a record of."""
    for kind, made in TABLES.items():
        if found := newest(kind, folder):
            yield kind, made(found[1], f"benchmarks/records/{found[0].name}")


def filled(readme: str, texts: Mapping[str, str]) -> str:
    """README with each text between its markers, "Not measured yet." between those of a kind without one.

    DataError for markers that are open or of an unknown kind, and for a text whose markers are missing.
    """
    there = [match["kind"] for match in SECTION.finditer(readme)]
    if readme.count("<!-- benchmarks:") != len(there) or not set(there) <= TABLES.keys():
        raise DataError(
            "a section of benchmarks in README.md has no end, or is of an unknown kind",
            f"write `<!-- benchmarks: KIND -->`, a line, `<!-- end -->`; KIND is one of {', '.join(TABLES)}",
        )
    for kind in texts:
        if there.count(kind) != 1:
            raise DataError(
                f"README.md has {there.count(kind)} sections for the records of {kind}",
                f"have one, from a line `<!-- benchmarks: {kind} -->` to a line `<!-- end -->`",
            )

    def section(match: re.Match[str]) -> str:
        kind = match["kind"]
        return f"<!-- benchmarks: {kind} -->\n{texts.get(kind, 'Not measured yet.')}\n<!-- end -->"

    return SECTION.sub(section, readme)


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write README and plots, or check README; 1 where it does not agree or a record cannot be read."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, print a diff where README disagrees")
    args = parser.parse_args(argv)
    folder, path = root / "benchmarks" / "records", root / "README.md"
    before = path.read_text(encoding="utf-8")
    try:
        after = filled(before, dict(sections(folder)))
    except BackpropGPUError as e:
        print(e, file=sys.stderr)
        return 1
    if args.check:
        diff = difflib.unified_diff(before.splitlines(), after.splitlines(), "README.md", "the records", lineterm="")
        print("\n".join(diff), end="")
        return int(before != after)
    path.write_text(after, encoding="utf-8")
    if found := newest("peers", folder):
        plots.draw(cells(found[1]), folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
