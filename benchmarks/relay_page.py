"""The relay's part of the performance page: its goals, and its tables."""

from __future__ import annotations

from typing import Any, NamedTuple


class Goal(NamedTuple):
    """A goal with its target, as texts, and whether the measured value meets it."""

    name: str
    target: str
    measured: str
    is_met: bool


def relay_goals(relay: dict[str, Any]) -> list[Goal]:
    """Return the relay's goals."""
    delay, fan_out, replay, stuck = relay["delay"], relay["fan_out"], relay["replay"], relay["stuck"]
    found = []
    for name, key, most in (("median", "median", 3), ("99th percentile", "p99", 10)):
        value = delay[key] * 1000
        found.append(
            Goal(f"relay: commit to 50 clients, {name}", f"≤ {most} ms", f"{value:.1f} ms", is_met=value <= most)
        )
    rate, single = fan_out["relay"]["rate"], fan_out["broadcast"]["rate"]
    for name, value, least, form in (
        ("relay: messages a second to 50 clients", rate, 500_000, "{:,.0f}"),
        ("relay: the same, of `websockets.broadcast`", rate / single, 3, "{:,.0f}×"),
        ("relay: replay to one client, ticks a second", replay["rate"], 100_000, "{:,.0f}"),
    ):
        found.append(Goal(name, f"≥ {form.format(least)}", form.format(value), is_met=value >= least))
    for name, value in (
        ("delay", stuck["beside"]["median"] / stuck["without"]["median"]),
        ("recorder's processor time", stuck["beside"]["recorder_cpu"] / stuck["without"]["recorder_cpu"]),
    ):
        found.append(Goal(f"relay: {name} beside 20 stuck clients", "≤ 1.05×", f"{value:.2f}×", is_met=value <= 1.05))
    memory = (delay["memory"] - delay["rest"]) / 50
    found.append(Goal("relay: memory at rest", "≤ 80 MB", _megabytes(delay["rest"]), is_met=delay["rest"] <= 80e6))
    found.append(Goal("relay: memory of a client", "≤ 0.5 MB", f"{memory / 1e6:.2f} MB", is_met=memory <= 0.5e6))
    value = relay["recorder"]["a relay without clients"]["rate"] / relay["recorder"]["no relay"]["rate"]
    found.append(Goal("recorder beside a relay, of without", "≥ 0.95", f"{value:.2f}", is_met=value >= 0.95))
    return found


def delays(relay: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table of delays."""
    subjects = {
        "50 clients": relay["delay"],
        "10 clients": relay["stuck"]["without"],
        "10 clients beside 20 stuck ones": relay["stuck"]["beside"],
    }
    return [
        [
            name,
            *(f"{each[key] * 1000:.1f} ms" for key in ("median", "p90", "p99", "max")),
            f"{each['recorder_cpu']:.1f} µs",
            _megabytes(each["memory"]),
        ]
        for name, each in subjects.items()
    ]


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.0f} MB"
