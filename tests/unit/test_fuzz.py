"""Each target of the fuzzing finds a defect that is built in."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ingestor.backfill.client import RestClient
from ingestor.buffer.spool import Spool
from ingestor.model import Reason
from ingestor.stream.connection import FeedConnection
from ingestor.stream.decoder import Decoder, Refused
from tests.fuzz import decoder, page, rest, spool, wire
from tests.fuzz.__main__ import Run, Watchdog, fuzz
from tests.fuzz.target import Case, Counts, Target, dice

MOST = 300


async def tried(target: Target, directory: Path, cases: int = MOST) -> Counts:
    """Run a target's first cases."""
    async with target(directory) as case:
        return await all_of(case, cases)


async def all_of(case: Case, cases: int = MOST) -> Counts:
    counts: Counts = Counter()
    for number in range(cases):
        counts += await case(dice(1, "self-test", number))
    return counts


@pytest.mark.parametrize("target", [wire.target, decoder.target])
async def test_a_sound_part_passes(target: Target, tmp_path: Path) -> None:
    """Without a defect nothing is found, and the cases have inputs."""
    assert (await tried(target, tmp_path, cases=4))["messages"] > 20


async def test_a_message_that_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wire's cases find a connection that loses one of several messages."""
    attach = FeedConnection.attach

    def forgetful(self: FeedConnection, handler: Any, *others: Any) -> None:
        def handle(payloads: Sequence[bytes], binary: bool) -> None:
            handler(payloads[:-1] if len(payloads) > 2 else payloads, binary)

        attach(self, handle, *others)

    monkeypatch.setattr(FeedConnection, "attach", forgetful)
    with pytest.raises(AssertionError, match=r"received|handed on"):
        await tried(wire.target, tmp_path)


async def test_a_tick_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder's cases find a fast path that refuses what the complete one reads."""
    decode = Decoder.decode

    def picky(self: Decoder, frame: bytes, *others: Any, **more: Any) -> Any:
        return Refused(Reason.VOLUME_INVALID) if b"5000" in frame else decode(self, frame, *others, **more)

    monkeypatch.setattr(Decoder, "decode", picky)
    with pytest.raises(AssertionError, match="by the complete path"):
        await tried(decoder.target, tmp_path)


async def test_a_bar_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers' cases find a client that accepts a high below the low."""
    minutes = RestClient.minutes

    async def credulous(self: RestClient, *arguments: Any) -> Any:
        found: Any = await minutes(self, *arguments)
        return replace(found, bars=tuple(replace(bar, high=bar.low - 1) for bar in found.bars))

    monkeypatch.setattr(rest, "_compressed", rest._plain)  # which would be found first if it had no limit
    monkeypatch.setattr(RestClient, "minutes", credulous)
    with pytest.raises(AssertionError, match="cannot be"):
        await tried(rest.target, tmp_path)


async def test_a_batch_that_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files' cases find a spool that silently leaves out a batch."""
    read = Spool.read

    def hasty(self: Spool, *limits: int) -> Any:
        return read(self, *limits)[-1:]

    monkeypatch.setattr(Spool, "read", hasty)
    with pytest.raises(AssertionError, match="queue"):
        await tried(spool.target, tmp_path)


async def test_a_request_that_is_not_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's cases find a server that keeps a client waiting."""
    monkeypatch.setattr(page, "ANSWER_TIMEOUT", 0.1)

    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            request = await reader.read(1000)
            if b"/healthz" in request:
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                await writer.drain()
            elif b"/status" in request:
                await over.wait()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with page.testing(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/") as case:
        with pytest.raises(AssertionError, match="neither answered nor closed"):
            await all_of(case)
    server.close()
    over.set()
    await asyncio.sleep(0.05)


async def test_a_failing_case_can_be_repeated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A failing case is reported with the command that repeats it alone, with the same result."""

    @asynccontextmanager
    async def target(directory: Path) -> AsyncIterator[Case]:
        async def case(chance: random.Random) -> Counts:
            assert chance.random() < 0.6
            return Counter(tries=1)

        yield case

    run = Run("this", seed=7)
    await fuzz(run, target, 60, tmp_path, Watchdog(), only=None)
    (failed,) = run.failures
    assert run.cases == failed + 1 == run.counts["tries"] + 1
    assert f"FUZZ_SEED=7 FUZZ_CASE=this:{failed} make fuzz" in capsys.readouterr().out
    again = Run("this", seed=7)
    await fuzz(again, target, 60, tmp_path, Watchdog(), only=failed)
    assert (again.failures, again.cases) == ([failed], 1)
