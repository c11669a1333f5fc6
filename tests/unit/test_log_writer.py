from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingestor.telemetry.log_writer import LogWriter
from ingestor.telemetry.standard_streams import LineStream

SMALLEST_PIPE = 4096


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Return a pipe of one page."""
    ends = os.pipe()
    fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, SMALLEST_PIPE)
    yield ends
    for end in ends:
        with contextlib.suppress(OSError):
            os.close(end)


def line(number: int) -> bytes:
    """Return a line of fixed length, of which forty fill the pipe."""
    return f"{number:099}\n".encode()


def read(end: int, last: bytes) -> list[bytes]:
    """Read lines until one begins with these bytes."""
    text = b""
    while not (text.endswith(b"\n") and text.splitlines(keepends=True)[-1].startswith(last)):
        text += os.read(end, 65536)
    return text.splitlines(keepends=True)


def test_lines_arrive_in_order(pipe: tuple[int, int]) -> None:
    """All lines arrive in order, although they are more than the pipe holds."""
    writer = LogWriter(pipe[1])
    for number in range(200):
        writer.write(line(number))
    assert read(pipe[0], line(199)) == [line(number) for number in range(200)]
    writer.drain(30)
    assert writer.lines_dropped == 0


def test_a_stopped_reader_costs_only_lines(pipe: tuple[int, int]) -> None:
    """The oldest lines are kept; a resumed reader gets them, the number of lost ones, and the later ones."""
    writer = LogWriter(pipe[1], max_bytes=10_000, report=lambda count: writer.write(f"gap {count}\n".encode()))
    for number in range(1000):
        writer.write(line(number))
    *kept, gap = read(pipe[0], b"gap")
    assert kept == [line(number) for number in range(len(kept))]
    assert 100 <= len(kept) <= 150
    assert gap == b"gap %d\n" % writer.lines_dropped == b"gap %d\n" % (1000 - len(kept))
    writer.write(b"next\n")
    assert read(pipe[0], b"next\n") == [b"next\n"]


def test_the_number_of_lost_lines_is_logged_in_their_place(pipe: tuple[int, int]) -> None:
    """The number is in plain words, for commands without a log."""
    # Without space in the pipe the writer's thread can't free the queue between two lines, however slow the machine is.
    os.write(pipe[1], b"." * (SMALLEST_PIPE - 1) + b"\n")
    writer = LogWriter(pipe[1], max_bytes=1000)
    for number in range(100):
        writer.write(line(number))
    _, *kept, last = read(pipe[0], b"ingestor: ")
    assert kept == [line(number) for number in range(10)]
    assert last == b"ingestor: 90 lines were dropped here, because they could not be written\n"


def test_one_long_line_is_written(pipe: tuple[int, int]) -> None:
    """A line longer than the limit of the queue, such as a traceback, is written."""
    writer = LogWriter(pipe[1], max_bytes=100)
    writer.write(b"Traceback" * 500 + b"\n")
    assert read(pipe[0], b"Trace") == [b"Traceback" * 500 + b"\n"]
    assert writer.lines_dropped == 0


def test_a_descriptor_that_another_process_made_nonblocking(pipe: tuple[int, int]) -> None:
    """Lines stay intact if a write accepts a part or nothing."""
    os.set_blocking(pipe[1], False)
    writer = LogWriter(pipe[1], max_bytes=10**6)
    text = [bytes([65 + number]) * 9_999 + b"\n" for number in range(8)]
    for each in text:
        writer.write(each)
    found = b""
    while len(found) < 80_000:
        found += os.read(pipe[0], 1000)
    assert found == b"".join(text)
    assert not os.get_blocking(pipe[1])


def test_a_full_disk_and_a_closed_descriptor_cost_only_lines(tmp_path: Path) -> None:
    """Lost lines are counted; once there is space, the number is reported."""
    target = os.open("/dev/full", os.O_WRONLY)
    writer = LogWriter(target)
    writer.write(b"one\ntwo\n")
    writer.drain(30)
    assert writer.lines_dropped == 2
    with (tmp_path / "log").open("wb") as log:
        os.dup2(log.fileno(), target)
    writer.write(b"three\n")
    writer.drain(30)
    assert (tmp_path / "log").read_bytes().splitlines()[0] == b"three"
    assert b"2 lines were dropped" in (tmp_path / "log").read_bytes()
    os.close(target)
    writer.write(b"four\n")
    writer.drain(30)
    assert writer.lines_dropped == 3


def test_a_closed_reader_costs_only_lines(pipe: tuple[int, int]) -> None:
    os.close(pipe[0])
    writer = LogWriter(pipe[1])
    writer.write(line(0))
    writer.drain(30)
    assert writer.lines_dropped == 1


def test_a_line_that_was_cut_short_does_not_spoil_the_next_one(pipe: tuple[int, int], tmp_path: Path) -> None:
    """The next line begins on a line of its own."""
    writer = LogWriter(pipe[1])
    writer.write(b"x" * 9_000 + b"\n")
    assert os.read(pipe[0], 1000) == b"x" * 1000
    os.close(pipe[0])
    writer.drain(30)
    with (tmp_path / "log").open("wb") as log:
        os.dup2(log.fileno(), pipe[1])
    writer.write(b"next\n")
    writer.drain(30)
    assert (tmp_path / "log").read_bytes().startswith(b"\nnext\n")


def test_a_process_without_a_thread_continues(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines wait for the next writer that gets a thread."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    writer = LogWriter(pipe[1])
    with monkeypatch.context() as full:
        full.setattr(threading.Thread, "start", refuse)
        writer.write(line(0))
    writer.write(line(1))
    assert read(pipe[0], line(1)) == [line(0), line(1)]


def test_drain_does_not_wait_for_a_reader_that_never_reads(pipe: tuple[int, int]) -> None:
    writer = LogWriter(pipe[1])
    for number in range(100):
        writer.write(line(number))
    writer.drain(0.01)
    assert read(pipe[0], line(99))[-1] == line(99)


def test_lines_of_threads_stay_apart(pipe: tuple[int, int]) -> None:
    """Lines of several threads stay apart although each is written in pieces."""
    stream = LineStream(LogWriter(pipe[1], max_bytes=10**6), pipe[1])
    start = threading.Barrier(4)

    def talk(name: str) -> None:
        start.wait()
        for _ in range(200):
            print(name * 10, end="", file=stream)
            print(name * 10, file=stream)

    threads = [threading.Thread(target=talk, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    found = b""
    while found.count(b"\n") < 800:
        found += os.read(pipe[0], 65536)
    for thread in threads:
        thread.join()
    assert {*found.splitlines()} == {name.encode() * 20 for name in "abcd"}


def test_a_prompt_needs_no_end_of_line(pipe: tuple[int, int]) -> None:
    """`flush` writes an unfinished line; characters that can't be encoded are escaped."""
    stream = LineStream(LogWriter(pipe[1]), pipe[1], "ascii")
    stream.write("really? ü\udc80")
    stream.flush()
    assert os.read(pipe[0], 100) == b"really? \\xfc\\udc80"
    assert not stream.isatty()
    assert stream.fileno() == pipe[1]
