from __future__ import annotations

from pathlib import Path

import pytest

from ingestor.stream.accepted_token import AcceptedToken


def test_remembers_endpoint_and_token(tmp_path: Path) -> None:
    """Endpoint and token must both match; another object on the same file knows them too."""
    AcceptedToken(tmp_path / "accepted").write("wss://a/ws", "pk_1")
    accepted = AcceptedToken(tmp_path / "accepted")
    assert accepted.matches("wss://a/ws", "pk_1")
    assert not accepted.matches("wss://b/ws", "pk_1")
    assert not accepted.matches("wss://a/ws", "pk_2")


def test_the_last_one_counts(tmp_path: Path) -> None:
    """A new token replaces the old one; the same one changes nothing."""
    accepted = AcceptedToken(tmp_path / "accepted")
    accepted.write("wss://a/ws", "pk_1")
    before = (tmp_path / "accepted").read_bytes()
    accepted.write("wss://a/ws", "pk_1")
    assert (tmp_path / "accepted").read_bytes() == before
    accepted.write("wss://a/ws", "pk_2")
    assert not accepted.matches("wss://a/ws", "pk_1")


def test_holds_no_secret(tmp_path: Path) -> None:
    """Neither token nor endpoint can be read from the file, which only its owner may read."""
    AcceptedToken(tmp_path / "accepted").write("wss://a/ws", "pk_secret")
    text = (tmp_path / "accepted").read_text()
    assert "pk_secret" not in text
    assert "wss" not in text
    assert (tmp_path / "accepted").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("content", [None, b"", b"x", b"zz:zz", b"\xff", b"00" * 32 + b":" + b"0" * 128])
def test_a_damaged_file_means_no(tmp_path: Path, content: bytes | None) -> None:
    """A missing or damaged file matches no token, and can be written again."""
    accepted = AcceptedToken(tmp_path / "accepted")
    if content is not None:
        (tmp_path / "accepted").write_bytes(content)
    assert not accepted.matches("wss://a/ws", "pk_1")
    accepted.write("wss://a/ws", "pk_1")
    assert accepted.matches("wss://a/ws", "pk_1")
