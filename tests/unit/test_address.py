from __future__ import annotations

import inspect
from typing import Any
from urllib.parse import quote

import pytest
from asyncpg import connect_utils

from ingestor.address import AddressError, parse_database_address, proxy_url, redact_url, secrets_of

AZURE = "postgresql://user@server:PASSWORD@host/db"


def as_read_by_the_driver(url: str) -> tuple[list[tuple[str, int]], str, str, str]:
    """Return asyncpg's reading of hosts, user, password and database."""
    parse: Any = vars(connect_utils)["_parse_connect_dsn_and_args"]
    names = list(inspect.signature(parse).parameters)
    addresses, parameters, *_ = parse(**{**dict.fromkeys(names), "dsn": url})
    return addresses, parameters.user, parameters.password, parameters.database


@pytest.mark.parametrize(
    ("userinfo", "user", "password"),
    [
        ("user@server:PASSWORD", "user@server", "PASSWORD"),
        ("user%40server:p%40ss", "user@server", "p@ss"),
        ("u:p@ss@word", "u", "p@ss@word"),
        ("u:a:b", "u", "a:b"),
        ("u:100%", "u", "100%"),
        ("u:ü \"'\\\t", "u", "ü \"'\\\t"),
        ("u1:p1@h1,u2:p2", "u1", "p1@h1,u2:p2"),
        ("u:a%2Fb%3Fc%23d", "u", "a/b?c#d"),
        ("u:p;q[1]{2}|^`<>", "u", "p;q[1]{2}|^`<>"),
        ("u:x", "u", "x"),
    ],
)
def test_userinfo_ends_at_the_last_at(userinfo: str, user: str, password: str) -> None:
    """The driver reads the intended user and password, with one host and with several."""
    for hosts, read in (
        ("h1:5", [("h1", 5)]),
        ("h1:5,[::1]:6", [("h1", 5), ("::1", 6)]),
    ):
        url = f"postgresql://{userinfo}@{hosts}/d?sslmode=disable"
        address = parse_database_address(url)
        # Each host in an address of its own: newer Pythons refuse an IPv6 address behind another host.
        each = [as_read_by_the_driver(host.driver_url) for host in address.each_host()]
        assert each == [([host], user, password, "d") for host in read]
        assert address.shown.endswith(f":[hidden]@{hosts}/d?sslmode=disable")
        assert password in secrets_of(url)
        assert password not in repr(address)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:a/b@h/d",
        "postgresql://u:a?b@h/d",
        "postgresql://u:a#b@h/d",
        "postgresql://u@server:a/b@h/d",
        "postgresql://u@server:12/34@h/d",
        "postgresql://u@server:12?34@h/d",
        "postgresql://u@server:12?a=4@h/d",
        "postgresql://u:12?user=4@h",
        "postgresql://u:12#34@h/d",
        "postgresql://u:a b/c@h/d",
        "postgresql://u:secret",
        "postgresql://u@h/d?password=a&b=c",
        "postgresql://u@h/d?password=a&b",
        "postgresql://u@h:65536/d",
        "postgresql://u@h:x/d",
        "mysql://u:p@h/d",
        "secret",
    ],
)
def test_an_address_that_can_be_read_in_two_ways_is_refused(url: str) -> None:
    """An address is refused if a part of the password could be a host, a port, a database or an option."""
    with pytest.raises(AddressError) as caught:
        parse_database_address(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "read"),
    [
        ("postgres://h/d?user=a@b&password=x", ([("h", 5432)], "a@b", "x", "d")),
        ("postgresql+asyncpg://u:p@h/d", ([("h", 5432)], "u", "p", "d")),
        ("postgresql:///d?host=/tmp&user=a@b&password=x+y", (["/tmp/.s.PGSQL.5432"], "a@b", "x y", "d")),
        ("postgresql://u:p@%2Ftmp/d;x", (["/tmp/.s.PGSQL.5432"], "u", "p", "d;x")),
        ("postgresql://u@h/d?password=a#b", ([("h", 5432)], "u", "a#b", "d")),
        ("postgresql://u@[v:p@h/d", ([("h", 5432)], "u@[v", "p", "d")),
        ("postgresql://u:p@h:/d%40x?application_name=é", ([("h", 5432)], "u", "p", "d@x")),
    ],
)
def test_other_addresses(url: str, read: tuple[object, ...]) -> None:
    """All other forms of PostgreSQL's addresses are accepted."""
    assert as_read_by_the_driver(parse_database_address(url).driver_url) == read


@pytest.mark.parametrize(
    ("url", "each"),
    [
        ("postgresql://u:p@a:1,[::1]:2/d?x=y", ["postgresql://u:p@a:1/d?x=y", "postgresql://u:p@[::1]:2/d?x=y"]),
        (
            "postgresql:///d?host=a,b&port=1,2",
            ["postgresql:///d?host=a&port=1", "postgresql:///d?host=b&port=2"],
        ),
        ("postgresql:///d?host=a,b&port=1", ["postgresql:///d?host=a&port=1", "postgresql:///d?host=b&port=1"]),
        ("postgresql:///d?host=a,b", ["postgresql:///d?host=a", "postgresql:///d?host=b"]),
        ("postgresql:///d?host=a,b&port=1,2,3", ["postgresql:///d?host=a,b&port=1,2,3"]),
        ("postgresql://h/d", ["postgresql://h/d"]),
    ],
)
def test_each_host(url: str, each: list[str]) -> None:
    """A URL is split into one for each host, in either place, and keeps everything else."""
    assert [address.driver_url for address in parse_database_address(url).each_host()] == each


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:secret@h:5/d", "postgresql://u:[hidden]@h:5/d"),
        (AZURE, "postgresql://user@server:[hidden]@host/db"),
        ("postgresql://u:x@h1,h2:2/d", "postgresql://u:[hidden]@h1,h2:2/d"),
        ("postgres://u:s/e#c?r@et@h1:1,h2:2/d", "postgresql://u:[hidden]@h1:1,h2:2/d"),
        ("postgresql://u@h/d?sslmode=require&password=secret&x=1", "postgresql://[hidden]"),
        (
            "postgresql://u@h/d?sslmode=require&password=secret&sslpassword=s&passfile=/p",
            "postgresql://u@h/d?sslmode=require&password=[hidden]&sslpassword=[hidden]&passfile=[hidden]",
        ),
        ("postgresql://u@h/d?pass%77ord=secret", "postgresql://u@h/d?pass%77ord=[hidden]"),
        ("postgresql:///d?host=/run/postgresql", "postgresql:///d?host=/run/postgresql"),
        ("postgresql://h:5/d", "postgresql://h:5/d"),
        ("postgresql://someone:secret", "postgresql://[hidden]"),
        ("secret", "postgresql://[hidden]"),
    ],
)
def test_redact_url(url: str, shown: str) -> None:
    """No password is shown, however malformed the URL and however short the password."""
    assert redact_url(url) == shown


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://u:p@proxy:3128", "http://u:p@proxy:3128"),
        ("http://u@corp:p@ss/w:rd?#%@proxy:3128/", f"http://u%40corp:{quote('p@ss/w:rd?#%', safe='')}@proxy:3128"),
        ("HTTP://key@proxy", "http://key:@proxy"),
        ("u:p@proxy:3128", "http://u:p@proxy:3128"),
        ("socks5h://[::1]:1080", "socks5h://[::1]:1080"),
        ("http://ü:ß@bücher.example", "http://%C3%BC:%C3%9F@xn--bcher-kva.example"),
    ],
)
def test_proxies(text: str, url: str) -> None:
    """A proxy's userinfo ends at the last @, too; nothing ambiguous may follow the host."""
    assert proxy_url(text) == url
    assert proxy_url(url) == url


@pytest.mark.parametrize(
    "text", ["http://u:p@", "http://u:p@h:99999", "http://u:p@h/path", "ftp://u:p@h", "://u:p@h", "http://u:p@\u2100.h"]
)
def test_invalid_proxies(text: str) -> None:
    """The error contains no part of the address."""
    with pytest.raises(AddressError) as caught:
        proxy_url(text)
    assert "u:p" not in str(caught.value)
