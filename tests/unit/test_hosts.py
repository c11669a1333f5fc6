from __future__ import annotations

import pytest

from ingestor.errors import ConfigurationError
from ingestor.settings import load_settings, normal_host
from ingestor.web.hosts import Hosts

POD = "10.244.1.7"


def accepts(host: str | None, *names: str, server: str = POD) -> bool:
    """Return whether a request on a connection to this address is accepted."""
    headers = [] if host is None else [(b"host", host.encode("latin-1"))]
    return Hosts(names).accept({"type": "http", "server": (server, 9464), "headers": headers})


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost.:80",
        "status.localhost:1",
        "127.0.0.1",
        "127.9.9.9:9464",
        "[::1]:9464",
        "[0:0:0:0:0:0:0:1]",
        "[::ffff:127.0.0.1]",
        f"{POD}:9464",
        POD,
    ],
)
def test_loopback_and_the_address_of_the_connection(host: str) -> None:
    """Loopback names and the connection's own address need no setting, for local clients and for probes of a pod."""
    assert accepts(host)


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "evil.example",
        "evil.example:9464",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "127.0.0.1@evil.example",
        "evil.example@127.0.0.1",
        "evil.example#127.0.0.1",
        "evil.example, 127.0.0.1",
        "127.0.0.1:80:evil.example",
        "localhost evil.example",
        "notlocalhost",
        "127.1",
        "2130706433",
        "0x7f000001",
        "10.244.1.8",
        "0.0.0.0",
        "[::]",
        "::1",
        "[evil.example]",
        "[::1",
        "localhost:port",
        "*",
        "\xe9vil.example",
    ],
)
def test_foreign_names(host: str | None) -> None:
    """Other names, with which a foreign page may point here, and invalid hosts are refused."""
    assert not accepts(host)


def test_allowed_names() -> None:
    """An allowed name may be written in any form; `*` allows all."""
    names = ("Ingestor-0.Ingestor.", "[FD00:0::1]", "0.0.0.0")
    for host in ("ingestor-0.ingestor:9464", "INGESTOR-0.INGESTOR.", "[fd00::1]:80", "0.0.0.0:9464"):
        assert accepts(host, *names)
    assert not accepts("ingestor-0", *names)
    assert accepts("evil.example", "*")
    assert accepts(None, "*")


def test_ipv4_mapped_addresses() -> None:
    """A socket for both families reports an IPv4 address in its IPv6 form."""
    assert accepts(POD, server=f"::ffff:{POD}")
    assert accepts("[fe80::1]", server="fe80::1%eth0")


def test_more_than_one_name() -> None:
    """A request with several names is refused."""
    headers = [(b"host", b"localhost"), (b"host", b"localhost")]
    assert not Hosts().accept({"type": "http", "server": None, "headers": headers})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        (" Ingress.example.org. ,10.0.0.1,", ("ingress.example.org", "10.0.0.1")),
        ("[::1],FD00::A,*", ("::1", "fd00::a", "*")),
    ],
)
def test_the_setting(text: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are separated by commas."""
    monkeypatch.setenv("INGESTOR_HTTP_HOSTS", text)
    assert load_settings().http_hosts == expected


@pytest.mark.parametrize("text", ["a.example:9464", "http://a.example", "a b", "*.example.org", "\xfcber.example"])
def test_invalid_values_of_the_setting(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports, URLs, patterns and names that no browser sends are refused."""
    monkeypatch.setenv("INGESTOR_HTTP_HOSTS", text)
    with pytest.raises(ConfigurationError, match="INGESTOR_HTTP_HOSTS: not a list of host names or addresses"):
        load_settings()


def test_hosts_are_normalised() -> None:
    assert [normal_host(text) for text in ("A.Example.", "[::FFFF:10.0.0.1]", "010.example")] == [
        "a.example",
        "10.0.0.1",
        "010.example",
    ]
