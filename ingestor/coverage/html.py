"""The gap report as one self-contained page, without script or network, for screens of any size and for paper."""

from __future__ import annotations

from collections import defaultdict
from datetime import date
from html import escape
from importlib.resources import files
from zoneinfo import ZoneInfo

from ingestor.chart.geometry import TimeAxis
from ingestor.chart.palette import palette, with_fallbacks
from ingestor.coverage.report import STATUSES, Day, Gap, Report, Status, duration, in_minutes

MEANING: dict[Status, str] = {
    "open": "missed, and not filled yet",
    "backfilled": "missed, and filled with the provider's bars",
    "partial": "filled for some symbols only",
    "unfillable": "missed; the provider has nothing for it",
    "excluded": "the exchange itself did not trade",
}

CELL = 13
"""Pixels from one day of the heat map to the next."""

GAP_WIDTH = 3
"""The least width of a gap on a time line of 1,000 units: a gap of one second stays visible."""


def as_html(report: Report) -> str:
    """Return the whole page."""
    zone = ZoneInfo(report.timezone)
    style = palette() + "\n" + with_fallbacks(files(__package__).joinpath("page.css").read_text(encoding="utf-8"))
    body = "\n".join(
        (
            _head(report, zone),
            _cards(report),
            _heat_map(report),
            _time_lines(report, zone),
            _gaps(report, zone),
        )
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Coverage: {_percent(report.totals.percent)}</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _head(report: Report, zone: ZoneInfo) -> str:
    if report.days:
        span = f"{report.days[0].trading_day:%-d %B %Y} to {report.days[-1].trading_day:%-d %B %Y}"
    else:
        span = "no trading day"
    made = report.made_at.astimezone(zone)
    return (
        f"<h1>Coverage of the stream</h1>\n<p>{span}, {len(report.days):,} trading days</p>\n"
        f'<p class="faint">Times are those of {escape(report.timezone)}. As of {made:%-d %B %Y, %H:%M:%S %Z}.</p>'
    )


def _cards(report: Report) -> str:
    totals = report.totals
    cards = (
        ("covered or backfilled", _percent(totals.percent)),
        ("trading time", in_minutes(totals.trading)),
        ("covered", in_minutes(totals.covered)),
        ("missing", in_minutes(totals.missing)),
        ("backfilled of it", in_minutes(totals.backfilled)),
        ("gaps are open", f"{report.open_gaps:,} of {len(report.gaps):,}"),
    )
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{value}</b><span class="faint">{label}</span></div>' for label, value in cards)
        + "</div>"
    )


def _heat_map(report: Report) -> str:
    """Draw a square for each day, a column for each week and a block for each year."""
    years: dict[int, list[Day]] = defaultdict(list)
    for day in report.days:
        years[day.trading_day.year].append(day)
    keys = _keys(
        ("covered", "all covered"), ("backfilled", "all covered or backfilled"),
        ("step1", "≥ 99 %"), ("step2", "≥ 90 %"), ("step3", "≥ 50 %"), ("open", "less"),
    )  # fmt: skip
    blocks = "\n".join(_year(year, days) for year, days in sorted(years.items(), reverse=True))
    return f"<h2>Each day</h2>\n{keys}\n{blocks}"


def _keys(*keys: tuple[str, str]) -> str:
    items = "".join(f'<span><span class="key {name}"></span>{escape(label)}</span>' for name, label in keys)
    return f'<p class="faint keys">{items}</p>'


def _year(year: int, days: list[Day]) -> str:
    first = date(year, days[0].trading_day.month, 1)
    offset = first.weekday()

    def x(day: date) -> int:
        return 30 + ((day - first).days + offset) // 7 * CELL

    cells = "".join(
        f'<rect class="{_shade(day)}" x="{x(day.trading_day)}" y="{16 + day.trading_day.weekday() * CELL}" '
        f'width="{CELL - 2}" height="{CELL - 2}" rx="2">'
        f"<title>{day.trading_day:%a %-d %b %Y}: {_percent(day.percent)}, "
        f"{in_minutes(day.missing_minutes)} missing</title></rect>"
        for day in days
    )
    months = "".join(
        f'<text x="{x(date(year, month, 1))}" y="10">{date(year, month, 1):%b}</text>'
        for month in range(first.month, days[-1].trading_day.month + 1)
    )
    width = x(days[-1].trading_day) + 3 * CELL
    height = 16 + (1 + max(day.trading_day.weekday() for day in days)) * CELL
    return (
        f'<svg class="year" viewBox="0 0 {width} {height}" style="max-width: {width}px" role="img" '
        f'aria-label="Coverage of each day of {year}">{months}<text x="0" y="26">{year}</text>{cells}</svg>'
    )


def _shade(day: Day) -> str:
    percent = 100.0 if day.percent is None else day.percent
    if percent >= 100:
        return "covered" if day.missing_minutes == 0 else "backfilled"
    for name, least in (("step1", 99), ("step2", 90), ("step3", 50)):
        if percent >= least:
            return name
    return "open"


def _time_lines(report: Report, zone: ZoneInfo) -> str:
    gaps: dict[date, list[Gap]] = defaultdict(list)
    for gap in report.gaps:
        gaps[gap.trading_day].append(gap)
    keys = _keys(("covered", "covered"), *((status, f"{status}: {MEANING[status]}") for status in STATUSES))
    rows = "\n".join(
        f'<tr><td class="time">{day.trading_day:%a %-d %b %Y}</td>'
        f'<td class="time faint">{day.started_at.astimezone(zone):%H:%M}</td>'
        f'<td class="wide">{_line(day, gaps[day.trading_day], zone)}</td>'
        f'<td class="time faint">{day.ended_at.astimezone(zone):%H:%M}</td>'
        f'<td class="number">{_percent(day.percent)}</td></tr>'
        for day in reversed(report.days)
    )
    return f'<h2>Time lines</h2>\n<p class="faint">{keys}</p>\n<table class="lines"><tbody>\n{rows}\n</tbody></table>'


def _line(day: Day, gaps: list[Gap], zone: ZoneInfo) -> str:
    axis = TimeAxis.of([(day.started_at, day.ended_at, 1000)])
    places = ((gap, *axis.band(gap.started_at, gap.ended_at, GAP_WIDTH)) for gap in gaps)
    bars = "".join(
        f'<rect class="{gap.status}" x="{x:.1f}" width="{width:.1f}" height="15"><title>{_span(gap, zone)}: '
        f"{escape(gap.cause)} ({gap.status})</title></rect>"
        for gap, x, width in places
    )
    return (
        '<svg viewBox="0 0 1000 15" preserveAspectRatio="none">'
        f'<rect class="covered" width="1000" height="15" rx="2"></rect>{bars}</svg>'
    )


def _gaps(report: Report, zone: ZoneInfo) -> str:
    if not report.gaps:
        return "<h2>Gaps</h2>\n<p>None.</p>"
    rows = "\n".join(
        f'<tr><td class="time">{gap.trading_day:%a %-d %b %Y}</td><td class="time">{_span(gap, zone)}</td>'
        f'<td class="number">{duration(gap.duration)}</td><td>{escape(gap.cause)}</td>'
        f'<td class="status"><span class="key {gap.status}"></span>{gap.status}</td></tr>'
        for gap in reversed(report.gaps)
    )
    return (
        '<h2>Gaps</h2>\n<table class="gaps"><thead><tr><th>day</th><th>from, to</th><th class="number">length</th>'
        f"<th>cause</th><th>outcome</th></tr></thead><tbody>\n{rows}\n</tbody></table>"
    )


def _span(gap: Gap, zone: ZoneInfo) -> str:
    return f"{gap.started_at.astimezone(zone):%H:%M:%S} to {gap.ended_at.astimezone(zone):%H:%M:%S}"


def _percent(value: float | None) -> str:
    return "no trading time" if value is None else f"{value:.2f} %"
