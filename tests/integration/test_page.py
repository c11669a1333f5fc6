"""The status page is tested in a real browser against a real daemon: its values, its looks, its failures."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect
from prometheus_client import CollectorRegistry

from ingestor.chart.palette import palette
from ingestor.coverage.report import STATUSES
from ingestor.model import Tick
from ingestor.service.daemon import Daemon
from ingestor.simulator.server import TOKEN, Simulator
from ingestor.telemetry.events import Telemetry
from ingestor.web.app import make_app
from ingestor.web.server import HttpServer
from tests.clocks import HANG_SECONDS
from tests.http import Window
from tests.nats_servers import running_cluster
from tests.processes import DaemonProcess
from tests.proxy import Proxy
from tests.recording import NOW, Market, recording, running, settings, stored
from tests.tools import need

VIEWS = ((360, "light"), (768, "dark"), (1440, "light"))
HOSTILE = "<img src=x onerror=alert(1)>"
BACKGROUNDS = {"light": "rgb(255, 255, 255)", "dark": "rgb(18, 22, 28)"}

CARD = """label => [...document.querySelectorAll(".card")]
    .find(card => card.querySelector("dt").textContent === label)?.querySelector("b").textContent"""
TOO_WIDE = """() => [...document.querySelectorAll("body *")]
    .filter(each => !each.closest(".scroll, .unseen") && each.getBoundingClientRect().right > innerWidth + 1)
    .map(each => each.outerHTML.slice(0, 80))"""
ENLARGED = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
NAMELESS = """() => [...document.querySelectorAll(
        "[role=img], [role=meter], [role=slider], [role=region], table, section, figure > figcaption")]
    .filter(each => {
        const name = each.getAttribute("aria-label")
            ?? document.getElementById(each.getAttribute("aria-labelledby"))?.textContent
            ?? (each.closest("section")?.querySelector("h2, h3")?.textContent || each.textContent);
        return !name?.trim();
    })
    .map(each => each.outerHTML.slice(0, 80))"""
HEADLESS = '() => document.querySelectorAll("thead th:not([scope=col])").length'
SILENT = """async () => {  // what the live region says while numbers change
    const said = document.querySelector("[role=status]");
    let changes = 0;
    const observer = new MutationObserver(() => { changes += 1 });
    observer.observe(said, { childList: true, characterData: true, subtree: true });
    await new Promise(resolve => setTimeout(resolve, 2200));
    observer.disconnect();
    return changes;
}"""


SENTENCE = """async (status) => {
    const { summarize } = await import("/summary.js");
    const { Zone } = await import("/format.js");
    return summarize(status, Date.parse(status.now), new Zone(status.timezone)).sentence;
}"""


@dataclass
class View:
    """A page at one width, with all errors in it."""

    page: Page
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", lambda message: self.faults.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("requestfailed", lambda request: self.faults.append(f"failed: {request.url}"))

    async def says(self, sentence: str) -> None:
        """Wait for a headline."""
        await expect(self.page.locator("#sentence")).to_have_text(re.compile(sentence), timeout=10_000)

    async def card(self, label: str, value: str) -> None:
        """Wait until a card has this value."""
        async with asyncio.timeout(HANG_SECONDS):
            while (found := await self.page.evaluate(CARD, label)) != value:
                assert found is not None, f"there is no card {label}"
                await asyncio.sleep(0.05)


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    """Start Debian's Chromium without a window."""
    path = need("chromium", package="chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        await browser.close()


async def view(browser: Browser, url: str, width: int = 768, scheme: str = "light") -> View:
    """Open the page."""
    dark = scheme == "dark"
    context = await browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", reduced_motion="reduce"
    )
    found = View(await context.new_page())
    await found.page.goto(url)
    return found


async def address(daemon: Daemon) -> str:
    """Return the page's address once the daemon listens."""
    async with asyncio.timeout(HANG_SECONDS):
        while not daemon.http.is_bound:
            await asyncio.sleep(0.01)
    return daemon.http.url


async def test_the_page_agrees_with_the_metrics(writer_url: str, database: str, browser: Browser) -> None:
    """At three widths, light and dark, the numbers agree; no error, no overflow, no element without a name."""
    # With the usual heartbeat, a busy machine does not miss three of them.
    calm = {"heartbeat": "5s"}
    fast_steps = Telemetry(history_step=0.1)  # the charts have points after a moment, instead of ten seconds
    async with (
        Simulator(port=0, rate=0) as simulator,
        running(settings(simulator, writer_url, **calm), telemetry=fast_steps) as daemon,
    ):
        url = await address(daemon)
        await simulator.wait_connected()
        views = [await view(browser, url, *each) for each in VIEWS]
        market = Market(simulator)
        market.trade(1200)
        simulator.send([Tick(HOSTILE, NOW, 1.25, 77)])
        simulator.send_raw("{not JSON")
        market.sent += 1
        await stored(database, market)
        async with Window(url) as window:
            written = await window.metric("ingestor_ticks_written_total")
            sessions = await window.metric("ingestor_sessions_total")
            duplicates = await window.metric("ingestor_duplicates_total")
            _, status = await window.get("/status")
        assert written == 1201
        for each, (_, scheme) in zip(views, VIEWS, strict=True):
            page = each.page
            await each.says(r"^Streaming\. Every tick is being written\.$")
            await each.card("Ticks written", f"{written:,.0f}")
            await each.card("Connections", f"{sessions:,.0f}")
            await each.card("Duplicates", f"{duplicates:,.0f}")
            await each.card("Rejections", "1")
            await each.card("Waiting", "0 bytes")
            await each.card("Trading hours", "open")
            await expect(page.locator("#instance")).to_have_text(status["instance"])
            await expect(page.locator("#ticks tbody tr").first).to_contain_text(HOSTILE)
            await expect(page.locator("#ticks tbody tr")).to_have_count(20)
            await expect(page.locator("#reasons tbody tr")).to_have_count(1)
            assert await page.locator("tbody img, tbody script").count() == 0
            assert await page.title() == f"✓ Streaming · {status['instance']}"
            assert await page.locator("h1").count() == 1
            assert await page.evaluate(NAMELESS) == []
            assert await page.evaluate(HEADLESS) == 0
            assert await page.evaluate(ENLARGED) <= 0
            assert await page.evaluate(TOO_WIDE) == []
            assert await page.evaluate("getComputedStyle(document.body).backgroundColor") == BACKGROUNDS[scheme]
        changes, _, _ = await asyncio.gather(
            views[2].page.evaluate(SILENT),
            _keyboard_reads_the_charts(views[1].page),
            _page_without_scripts(browser, url),
        )
        assert changes == 0
        assert [each.faults for each in views] == [[]] * len(views)


async def _keyboard_reads_the_charts(page: Page) -> None:
    """Tab reaches the charts by the skip link; arrows read a point aloud; the table has the same points."""
    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.className") == "skip"
    for name in ("Ticks a second", "Wire to commit"):
        async with asyncio.timeout(HANG_SECONDS):
            while await page.evaluate("document.activeElement.getAttribute('aria-label')") != f"{name}, one point":
                await page.keyboard.press("Tab")
        await expect(page.locator(":focus")).to_have_attribute("aria-valuetext", re.compile(r"^\d\d:\d\d:\d\d: "))
        await page.keyboard.press("Home")
        await expect(page.locator(":focus")).to_have_attribute("aria-valuenow", "1")
    chart = page.locator("#rate svg")
    await expect(chart).to_have_attribute("aria-label", re.compile("^Ticks a second, last hour: typically .*, at most"))
    await page.locator("#points summary").press("Enter")
    await expect(page.locator("#points tbody tr").first).to_be_visible()


async def _page_without_scripts(browser: Browser, url: str) -> None:
    """Without scripts, the page names the endpoints with the same facts."""
    context = await browser.new_context(java_script_enabled=False)
    page = await context.new_page()
    await page.goto(url)
    await expect(page.locator(".noscript")).to_be_visible()
    assert await page.locator(".noscript a").all_inner_texts() == ["/status", "/metrics", "/readyz"]


async def test_the_page_shows_failures_and_recoveries(writer_url: str, database: str, browser: Browser) -> None:
    """After a cut of the stream, then of the database, headline, title and list of problems change."""
    async with Simulator(port=0, rate=0) as simulator, Proxy(simulator.stream_url) as stream, Proxy(writer_url) as wire:
        there = settings(simulator, wire.url, stream_url=stream.url, reconnect_max_delay="1s")
        async with running(there) as daemon:
            shown = await view(browser, await address(daemon))
            await shown.says(r"^Streaming\.")
            problems = shown.page.locator("#problems li")
            await expect(problems).to_have_count(0)

            stream.refuses = True
            stream.cut()
            await shown.says(r"^Not connected since \d\d:\d\d:\d\d: ")
            await expect(problems.first).to_contain_text("stream")
            await expect(shown.page).to_have_title(re.compile("^✕ Not connected"))
            await expect(shown.page.locator("#connections tbody tr").first).to_contain_text("closed")
            stream.refuses = False
            await shown.says(r"^Streaming\.")

            market = Market(simulator)
            before = await _read_after(daemon, None)
            wire.refuses = True
            wire.cut()
            market.trade()
            await shown.says(r"^The database has accepted no writes for .*(KiB|bytes) of ticks wait")
            await expect(problems.first).to_contain_text("database")
            await expect(shown.page.locator("#said")).to_contain_text("New ticks are kept")
            await expect(shown.page.locator("body")).not_to_contain_text("keeps up")
            wire.refuses = False
            await shown.says(r"^Streaming\.")
            await stored(database, market)
            await shown.card("Ticks written", "100")
            await expect(problems).to_have_count(0)
            await _read_after(daemon, before)
            assert shown.faults == []


async def _read_after(daemon: Daemon, before: datetime | None) -> datetime:
    """Return when coverage was read, if that differs from `before`: sooner than the next minute."""
    async with asyncio.timeout(HANG_SECONDS):
        while (found := daemon._coverage_monitor.coverage) is None or found.as_of == before:
            await asyncio.sleep(0.02)
    return found.as_of


class FakeDaemon:
    """A daemon that only has a status."""

    def __init__(self, status: dict[str, Any]) -> None:
        self._status = status

    def loops(self) -> dict[str, bool]:
        return {}

    def readiness(self) -> dict[str, Any]:
        return {"ready": True, "problems": []}

    def status(self) -> dict[str, Any]:
        return self._status


def _day_with_gaps(status: dict[str, Any]) -> dict[str, Any]:
    """Return the middle of 24 November in Auckland, with a gap of each outcome and a hostile cause."""
    opens = datetime(2026, 11, 23, 21, tzinfo=UTC)
    start, now, closes = (opens + timedelta(minutes=minutes) for minutes in (100, 200, 400))
    gaps = [
        {
            "trading_day": "2026-11-24",
            "started_at": (start + timedelta(minutes=10 * number)).isoformat(),
            "ended_at": (start + timedelta(minutes=10 * number, seconds=5.2)).isoformat(),
            "seconds": 5.2,
            "cause": HOSTILE,
            "status": outcome,
        }
        for number, outcome in enumerate(STATUSES, 1)
    ]
    day = {"trading_day": "2026-11-24", "started_at": start.isoformat(), "ended_at": now.isoformat()}
    minutes = {"trading_minutes": 100.0, "covered_minutes": 99.5, "missing_minutes": 0.5, "backfilled_minutes": 0.1}
    coverage = {**day, **minutes, "percent": 99.6, "open_gaps": 1, "as_of": now.isoformat(), "gaps": gaps}
    coverage["age_seconds"] = 200.0
    market = {"open": True, "trading_day": "2026-11-24", "opens_at": opens.isoformat(), "closes_at": closes.isoformat()}
    clock = {"ahead_seconds": -180.0, "error_seconds": 0.001, "is_wrong": True}
    streaming = {"stream": {**status["stream"], "state": "streaming"}, "ready": {"ready": True, "problems": []}}
    last = {**status["last"], "commit_at": now.isoformat()}
    begun, seen = (now - timedelta(hours=2)).isoformat(), (now - timedelta(minutes=6)).isoformat()
    relays = [
        {"instance": name, "clients": 3, "started_at": begun, "seen_at": seen, "listening": listening}
        for name, listening in (("dealing", True), (HOSTILE, False))
    ]
    return {
        **status,
        **streaming,
        "last": last,
        "now": now.isoformat(),
        "coverage": coverage,
        "market": market,
        "clock": clock,
        "relays": relays,
    }


async def test_the_day_and_its_gaps(writer_url: str, browser: Browser) -> None:
    """The time line shows the whole trading day; each gap is on it, in its text and in a row of the list."""
    async with recording(writer_url) as (_, daemon), Window(await address(daemon)) as window:
        _, status = await window.get("/status")
    server, closing = HttpServer("127.0.0.1", 0), asyncio.Event()
    server.bind()
    task = asyncio.create_task(server.serve(make_app(FakeDaemon(_day_with_gaps(status)), CollectorRegistry(), closing)))
    try:
        shown = await view(browser, server.url, 360)
        page = shown.page
        await expect(page.locator("#coverage-title")).to_have_text("Coverage today, Tuesday 24 November")
        await expect(page.locator(".gaps tbody tr")).to_have_count(len(STATUSES))
        await expect(page.locator(".gaps tbody tr").last).to_contain_text("11:50:00")
        await expect(page.locator(".gaps tbody tr").last).to_contain_text(f"5.2 s{HOSTILE}{STATUSES[0]}")
        spans = page.locator(".day span")
        assert await spans.evaluate_all("all => all.map(each => each.className)") == ["covered", *STATUSES]
        assert await spans.evaluate_all("all => all.slice(0, 2).map(each => each.style.left)") == ["25%", "27.5%"]
        assert await page.locator(".hours span").all_inner_texts() == ["10:00", "12:00", "14:00", "16:40"]
        await expect(page.locator("#coverage-summary")).to_have_text(re.compile(r"As of 13:20:00, 3 min 20 s ago\.$"))
        label = re.compile("99.60 % covered or backfilled, 5 gaps")
        await expect(page.locator(".day")).to_have_attribute("aria-label", label)
        await expect(page.locator("#relays-note")).to_have_text("1 listens, with 3 clients.")
        assert await page.locator("#relays tbody tr").all_inner_texts() == [
            "dealing\t3\t11:20:00\tlistens",
            f"{HOSTILE}\t–\t11:20:00\tsilent since 13:14:00",
        ]
        await shown.says("this machine's clock is 3 min 0 s behind the database's, and coverage lacks that time")
        await shown.card("Clock", "! 3 min 0 s")
        assert await page.evaluate(TOO_WIDE) == []
        await _headline_agrees_with_panels(page, _day_with_gaps(status))
        assert shown.faults == []
    finally:
        closing.set()
        server.stop()
        await task


async def _headline_agrees_with_panels(page: Page, status: dict[str, Any]) -> None:
    """An open stream is never shown as lost, nor a failing database as written to."""
    since = (datetime.fromisoformat(status["now"]) - timedelta(seconds=20)).isoformat()
    problems = [
        {"check": check, "since": since, "detail": detail}
        for check, detail in (
            ("stream", "No ticks: 5 messages were rejected, most of them as not_json."),
            ("database", "Connection refused."),
            ("spool", "No space left on device."),
        )
    ]
    found = {}
    for state in ("streaming", "waiting"):
        for chosen in (each for size in range(4) for each in combinations(problems, size)):
            names = [problem["check"] for problem in chosen]
            if state == "waiting" and "stream" not in names:
                continue  # for a waiting stream this is always a problem
            made_up = {
                **status,
                "stream": {**status["stream"], "state": state, "detail": None},
                "ready": {"ready": not chosen, "problems": chosen},
                "clock": None,
            }
            found[state, *names] = await page.evaluate(SENTENCE, made_up)
    for (state, *names), sentence in found.items():
        assert ("Not connected" in sentence) == (state == "waiting"), sentence
        assert ("Connected, but no message of the last 20 s is a tick" in sentence) == (
            state == "streaming" and "stream" in names
        ), sentence
        assert ("database" in sentence) == ("database" in names), sentence
        assert ("Every tick is being written" in sentence) == (not names), sentence


async def test_the_page_shows_a_stopped_daemon(writer_url: str, browser: Browser, tmp_path: Path) -> None:
    """Without an answer the page shows no old number as current, reports the daemon as gone, and recovers."""
    async with Simulator(port=0, rate=0) as simulator:
        log = tmp_path / "log"
        environment = {
            "token": TOKEN,
            "stream_url": simulator.stream_url,
            "database_url": writer_url,
            "exchange_calendar": "always",
            "spool_dir": tmp_path / "spool",
        }
        daemon = DaemonProcess(log, **environment)
        daemon.start()
        try:
            await simulator.wait_connected()
            url = json.loads(next(line for line in log.read_text().splitlines() if "http_listening" in line))["url"]
            shown = await view(browser, url)
            await shown.says(r"^Streaming\.")
            daemon.kill()
            await shown.says(r"^No status from the daemon since \d\d:\d\d:\d\d\.")
            await expect(shown.page).to_have_title(re.compile(r"^\? No status"))
            await expect(shown.page.locator("body")).to_have_attribute("data-lost", "true")
            daemon = DaemonProcess(log, **environment, http_port=int(url.rstrip("/").rpartition(":")[2]))
            daemon.start()
            await shown.says(r"^Streaming\.")
            await expect(shown.page.locator("body")).to_have_attribute("data-lost", "false")
        finally:
            daemon.end()


def _colours(style: str) -> dict[str, str]:
    return dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{3,6})\b", style))


def _schemes() -> dict[str, dict[str, str]]:
    """Return the colours of both schemes by name."""
    light: dict[str, str] = {}
    dark: dict[str, str] = {}
    for style in (palette(), files("ingestor.web").joinpath("static", "page.css").read_text(encoding="utf-8")):
        for media, block in re.findall(r"(@media \(prefers-color-scheme: dark\) \{\s*)?:root \{([^}]*)\}", style):
            (dark if media else light).update(_colours(block))
    return {"light": light, "dark": light | dark}


def _channels(colour: str) -> list[float]:
    digits = colour.removeprefix("#")
    digits = "".join(each * 2 for each in digits) if len(digits) == 3 else digits
    return [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]


def _luminance(channels: list[float]) -> float:
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: list[float], other: list[float]) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(scheme: str) -> None:
    """Each text colour has a contrast of at least 4.5 with each of its backgrounds, and each sign one of 3."""
    colours = {name: _channels(value) for name, value in _schemes()[scheme].items()}
    pairs = [("ink", "paper"), ("ink", "card"), ("faint", "paper"), ("faint", "card"), ("care", "card")]
    assert {pair: value for pair in pairs if (value := _contrast(*(colours[name] for name in pair))) < 4.5} == {}
    for tone in ("good", "busy", "care", "bad", "unknown"):
        ground = [0.09 * mine + 0.91 * other for mine, other in zip(colours[tone], colours["paper"], strict=True)]
        assert _contrast(colours["ink"], ground) >= 4.5, tone
        assert _contrast(colours[tone], ground) >= 3, tone


async def test_the_page_shows_the_replicated_buffer(writer_url: str, browser: Browser, tmp_path: Path) -> None:
    """With a replicated buffer, the page shows what waits in it, and whether all copies are in step."""
    async with running_cluster(tmp_path / "nats") as cluster:
        buffer = {"buffer_url": cluster.url, "buffer_replicas": 1}
        async with recording(writer_url, **buffer) as (_, daemon), asyncio.timeout(HANG_SECONDS):
            shown = await view(browser, await address(daemon))
            facts = shown.page.locator("#spool")
            await expect(facts).to_contain_text("copies in step1 of 1", timeout=1000 * HANG_SECONDS)
            await expect(facts).to_contain_text(re.compile(r"in NATS[\d,]+ messages?, "))
            assert shown.faults == []
