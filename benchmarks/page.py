"""Write `docs/explanation/performance.md` and its plots from the figures in `benchmarks/results.json`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.relay_page import delays, relay_goals
from benchmarks.stage import ROOT

PAGE = ROOT / "docs" / "explanation" / "performance.md"
IMAGES = ROOT / "docs" / "images"
TEXT = Path(__file__).with_name("page.md")

NAMES = {
    "bare": "bare `websockets` loop that throws everything away",
    "decode": "receive and decode: every message a tick",
    "record": "receive, decode, number and pack into COPY rows",
    "record_by_library": "the same, every frame read by the library",
    "bare, uvloop": "bare loop on uvloop",
    "record, uvloop": "receive to COPY rows on uvloop",
    "ingestor": "`ingestor run`, default settings",
    "official_client": "official client, psycopg `executemany`",
    "asyncpg_executemany": "`websockets`, asyncpg `executemany`",
    "asyncpg_copy": "`websockets`, asyncpg `copy_records_to_table`",
    "cryptofeed": "`websockets`, cryptofeed's PostgreSQL backend",
    "by_psql": "`psql \\copy` of the prepared rows",
    "by_store": "store alone, the same rows",
    "by_spool": "the same rows from a spool",
    "broadcast": "`websockets.broadcast` of each message",
    "relay": "`ingestor relay`",
}


def write(results: dict[str, Any]) -> None:
    """Write the page and the plots."""
    parts = {
        "machine": _machine(results),
        "goals": _table(("goal", "target", "measured", ""), goals(results)),
        "receive": _rates(results["receive"], "bare"),
        "deflate": _rates(results["deflate"], "bare"),
        "end_to_end": _rates(results["end_to_end"], "bare"),
        "store": _rates(results["store"], "by_psql", cpu=False),
        "latency": _latency(results["latency"]),
        "filled": _rates(results["filled"], "0", first="rows in the table"),
        "loads": _rates(results["loads"], "1 symbol", first="load"),
        "copies": _rates(results["copies"], "none", first="duplicates"),
        "rollup": _rates(results["rollup"], "off", first="rollup"),
        "delays": _table(
            ("", "median", "90 %", "99 %", "longest", "recorder, a tick", "memory"), delays(results["relay"])
        ),
        "fan_out": _rates(results["relay"]["fan_out"], "broadcast"),
        "recorder": _rates(results["relay"]["recorder"], "no relay"),
        "profile": _profile(results["profile"]),
        "ceiling": _ceiling(results),
        "daemon": f"{results['end_to_end']['ingestor']['cpu'] * results['end_to_end']['ingestor']['rate'] / 1e6:.0%}",
        "server": f"{results['end_to_end']['ingestor']['server']:.0%}",
    }
    text = TEXT.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace(f"{{{name}}}", part)
    PAGE.write_text(text, encoding="utf-8")
    _plot(results)


def goals(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return each goal with its target, its measured value, and whether it was met."""
    end_to_end, receive, stored = results["end_to_end"], results["receive"], results["store"]
    bare, ours = end_to_end["bare"], end_to_end["ingestor"]
    found: list[tuple[str, str, str, bool]] = []

    def ratio(name: str, value: float, least: float, unit: str = "") -> None:
        found.append((name, f"≥ {least:g}{unit}", f"{value:.2f}{unit}", value >= least))

    ratio("receive and decode, of the bare loop", receive["decode"]["rate"] / receive["bare"]["rate"], 0.80)
    ratio("end to end, of the bare loop", ours["rate"] / bare["rate"], 0.60)
    found.append(
        ("end to end, ticks a second", "≥ 60,000", f"{ours['lowest']:,.0f} at least", ours["lowest"] >= 60_000)
    )
    for name, least in (
        ("official_client", 20),
        ("asyncpg_executemany", 5),
        ("asyncpg_copy", 1.5),
        ("cryptofeed", 10),
    ):
        ratio(f"end to end, of: {NAMES[name]}", ours["rate"] / end_to_end[name]["rate"], least, "×")
    ratio("store alone, of psql", stored["by_store"]["rate"] / stored["by_psql"]["rate"], 0.95)
    ratio("draining a spool, of store alone", stored["by_spool"]["rate"] / stored["by_store"]["rate"], 0.80)
    for rate, each in results["latency"].items():
        for name, key, most in (("median", "median", 55), ("99th percentile", "p99", 75)):
            value = each[key] * 1000
            found.append((f"{int(rate):,} ticks/s, {name}", f"≤ {most} ms", f"{value:.1f} ms", value <= most))
    value = ours["cpu"] / bare["cpu"]
    found.append(("processor time a tick, of the bare loop's", "≤ 1.6×", f"{value:.2f}×", value <= 1.6))
    steady = max(each["memory"] for each in results["latency"].values())
    for name, size, most in (
        ("memory at rest", ours["rest"], 60),
        ("memory at 10,000 ticks/s", steady, 120),
        ("memory with 500,000 ticks at once", ours["memory"], 120),
    ):
        found.append((name, f"≤ {most} MB", f"{size / 1e6:.0f} MB", size <= most * 1e6))
    deflate = results["deflate"]
    ratio("with permessage-deflate, of the bare loop", deflate["decode"]["rate"] / deflate["bare"]["rate"], 0.80)
    rollup = results["rollup"]
    ratio("beside the rollup, of without it", rollup["on"]["rate"] / rollup["off"]["rate"], 0.95)
    first = results["filled"]["0"]["rate"]
    for rows, each in list(results["filled"].items())[1:]:
        ratio(f"with {int(rows):,} rows in the table, of none", each["rate"] / first, 0.85)
    found += relay_goals(results["relay"])
    return [(name, target, measured, "met" if met else "**not met**") for name, target, measured, met in found]


def _machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return (
        f"Measured on {results['made_at'][:10]} in {results['minutes']:.0f} minutes: {machine['cores']} cores "
        f"({machine['processor']}) shared by generator, daemon and PostgreSQL; Python {machine['python']}, {versions}. "
        f"The generator alone sends {results['generator']:,.0f} ticks a second."
    )


def _ceiling(results: dict[str, Any]) -> str:
    """Return how many times as fast as two of the other clients psql's COPY of prepared rows is."""
    psql = results["store"]["by_psql"]["rate"]
    found = {name: psql / results["end_to_end"][name]["rate"] for name in ("official_client", "cryptofeed")}
    return (
        f"even `psql`, which only copies prepared rows into the same table, is {found['official_client']:.1f} times as "
        f"fast as the official client, and {found['cryptofeed']:.1f} times as fast as cryptofeed."
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _rates(measured: dict[str, dict[str, float]], base: str, first: str = "", *, cpu: bool = True) -> str:
    rows = []
    for name, each in measured.items():
        row = [
            NAMES.get(name, f"{int(name):,}" if name.isdigit() else name),
            f"{each['rate']:,.0f}",
            f"{each['lowest']:,.0f} to {each['highest']:,.0f}",
            f"{each['rate'] / measured[base]['rate']:.2f}",
        ]
        rows.append([*row, f"{each['cpu']:.2f}"] if cpu else row)
    head = [first, "ticks/s", "runs", "ratio"]
    return _table([*head, "µs of processor a tick"] if cpu else head, rows)


def _latency(latency: dict[str, dict[str, float]]) -> str:
    rows = [
        [
            f"{int(rate):,}",
            *(f"{each[name] * 1000:.1f} ms" for name in ("median", "p90", "p99", "max")),
            f"{each['cpu']:.1%}",
            f"{each['memory'] / 1e6:.0f} MB",
        ]
        for rate, each in latency.items()
    ]
    return _table(["ticks/s", "median", "90 %", "99 %", "longest", "processor", "memory"], rows)


def _profile(profile: dict[str, Any]) -> str:
    rows = [[f"`{name}`", f"{share:.1%}"] for name, share in profile["own"].items()]
    return _table([f"function ({profile['samples']:,} samples)", "own time"], rows)


def _plot(results: dict[str, Any]) -> None:
    """Draw the rates of all clients, and the delays."""
    import matplotlib as mpl  # noqa: PLC0415 - only `make bench` has it

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "ingestor", "font.size": 10, "font.family": "sans-serif"})
    from matplotlib import pyplot as plt  # noqa: PLC0415

    clients = {name: each["rate"] for name, each in results["end_to_end"].items()}
    clients = dict(sorted(clients.items(), key=lambda item: item[1]))
    figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
    colours = ["#2a6fb0" if name == "ingestor" else "#a8a8a8" for name in clients]
    bars = axes.barh([NAMES[name].replace("`", "") for name in clients], list(clients.values()), color=colours)
    axes.bar_label(bars, [f"{rate:,.0f}" for rate in clients.values()], padding=4)
    axes.set_xlabel("ticks a second, from the wire to committed rows (the bare loop: thrown away)", loc="right")
    axes.set_xlim(right=max(clients.values()) * 1.15)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(IMAGES / "performance-ways.svg", metadata={"Date": None})

    figure, axes = plt.subplots(figsize=(9, 2.8), layout="constrained")
    latency = results["latency"]
    for shift, (name, label) in enumerate((("median", "median"), ("p99", "99th percentile"))):
        places = [number + 0.38 * shift for number in range(len(latency))]
        bars = axes.barh(places, [each[name] * 1000 for each in latency.values()], height=0.36, label=label)
        axes.bar_label(bars, fmt="%.0f ms", padding=4)
    axes.set_yticks([number + 0.19 for number in range(len(latency))], [f"{int(rate):,} ticks/s" for rate in latency])
    axes.axvline(50, color="#888", linestyle=":", label="batch delay")
    axes.set_xlabel("milliseconds from a tick's sending to its commit")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(IMAGES / "performance-delay.svg", metadata={"Date": None})
