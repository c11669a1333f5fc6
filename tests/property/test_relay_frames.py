"""The relay's frames of ticks are what a WebSocket library reads as the protocol's messages."""

from __future__ import annotations

import json
from datetime import datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st
from websockets.client import ClientProtocol
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from ingestor.batch import Row
from ingestor.clock import from_datetime
from ingestor.model import SECOND
from ingestor.relay.deflate import WINDOW_BITS, SharedDeflateFactory, deflated
from ingestor.relay.encoder import Encoder

INSTANTS = st.integers(min_value=0, max_value=4 * 10**15) | st.integers(0, 4 * 10**9).map(lambda at: at * SECOND)
SYMBOLS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=70_000) | st.sampled_from(
    ["AIR.NZ", 'A"\\', "é" * 40, "\N{GRINNING FACE}", "x" * 65_536]
)
ROWS = st.lists(
    st.tuples(
        INSTANTS,
        INSTANTS,
        st.floats(min_value=0, allow_nan=False, allow_infinity=False),
        st.integers(0, 2**63 - 1),
        st.integers(1, 2**31 - 1),
        SYMBOLS.map(str.encode),
    ),
    max_size=20,
)


def read(frames: bytes) -> list[str]:
    """Return the texts that a client's protocol reads."""
    client = ClientProtocol(parse_uri("ws://localhost/"), state=State.OPEN, max_size=None)
    client.receive_data(frames)
    texts = []
    for event in client.events_received():
        assert isinstance(event, Frame)
        texts.append(bytes(event.data).decode())
    assert client.state is State.OPEN
    return texts


@given(ROWS)
def test_a_library_reads_the_frames(rows: list[Row]) -> None:
    """Any tick comes back from its frame, also with its arrival, its number and a cursor."""
    encoder = Encoder("Pacific/Auckland")
    plain = [json.loads(text) for text in read(encoder.frames(rows))]
    full = [json.loads(text)["data"] for text in read(encoder.frames(rows, lambda index: f"cursor {index}"))]
    assert len(plain) == len(full) == len(rows)
    for index, (time, received_at, price, volume, occurrence, symbol) in enumerate(rows):
        data = plain[index]["data"]
        at = datetime.fromisoformat(data["date"])
        assert from_datetime(at) == time
        assert at.utcoffset() in {timedelta(hours=12), timedelta(hours=13)}
        assert plain[index] == {
            "type": "price",
            "data": {"date": data["date"], "price": price, "volume": volume, "symbol": symbol.decode()},
        }
        arrival = full[index].pop("received_at")
        assert from_datetime(datetime.fromisoformat(arrival)) == received_at
        assert full[index] == data | {"occurrence": occurrence, "cursor": f"cursor {index}"}


@given(st.lists(ROWS, max_size=5), st.data())
def test_a_library_reads_compressed_runs(runs: list[list[Row]], data: st.DataObject) -> None:
    """Compressed runs, with plain frames and the library's own compressed messages between them, are read unchanged."""
    client = ClientProtocol(parse_uri("ws://localhost/"), state=State.OPEN, max_size=None)
    client.extensions = [PerMessageDeflate(False, False, WINDOW_BITS, WINDOW_BITS)]
    _, library = SharedDeflateFactory().process_request_params([("server_max_window_bits", str(WINDOW_BITS))], [])
    encoder = Encoder("Pacific/Auckland")
    wire, expected = b"", []
    for rows in runs:
        frames = encoder.frames(rows)
        wire += deflated(frames) if data.draw(st.booleans()) else frames
        wire += Frame(Opcode.TEXT, b"price price price").serialize(mask=False, extensions=[library])
        expected += [*read(frames), "price price price"]
    client.receive_data(wire)
    assert [bytes(event.data).decode() for event in client.events_received() if isinstance(event, Frame)] == expected
    assert client.state is State.OPEN


def test_the_ticks_of_a_run_are_a_fraction_in_size() -> None:
    """A run of ticks takes less than a third; a tick alone stays as it is."""
    rows: list[Row] = [(number * SECOND, 0, 2.5 + number, 100 * number, 1, b"AIR.NZ") for number in range(100)]
    frames = Encoder("Pacific/Auckland").frames(rows)
    assert len(deflated(frames)) < len(frames) / 3
    alone = Encoder("Pacific/Auckland").frames(rows[:1])
    assert deflated(alone) == alone
