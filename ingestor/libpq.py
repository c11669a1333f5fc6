"""The parameters that PostgreSQL's own client takes in a URL, in PG… variables and in a service file. Pure.

The driver sends each parameter that it does not know to the server as a setting, which refuses it. So each is honoured,
or accepted where its value asks for nothing else than what is done anyway, or refused by its name. What would make a
connection safer, and can't be had, is never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping

DRIVER = frozenset(
    """database dbname gsslib host krbsrvname passfile password port ssl_max_protocol_version
    ssl_min_protocol_version sslcert sslcrl sslkey sslmode sslnegotiation sslpassword sslrootcert user""".split()  # noqa: SIM905 - a list of words is easier to read than of literals
)
"""The driver does what they ask for."""

OURS = frozenset(
    """application_name connect_timeout fallback_application_name hostaddr load_balance_hosts options requiressl service
    servicefile ssl target_session_attrs""".split()  # noqa: SIM905 - as above
)
"""Done here, around the driver."""

_OFF = frozenset({"", "0"})

ACCEPTED: dict[str, frozenset[str] | None] = {
    "channel_binding": frozenset({"", "disable", "prefer"}),
    "client_encoding": None,  # between client and server only: the driver always speaks UTF-8
    "gssdelegation": _OFF,
    "gssencmode": frozenset({"", "disable", "prefer"}),
    "keepalives": None,  # the limits of time of every statement find a dead server earlier
    "keepalives_count": None,
    "keepalives_idle": None,
    "keepalives_interval": None,
    "max_protocol_version": None,  # the driver speaks 3.0, below each maximum
    "min_protocol_version": frozenset({"", "3.0"}),
    "oauth_client_id": frozenset({""}),
    "oauth_client_secret": frozenset({""}),
    "oauth_issuer": frozenset({""}),
    "oauth_scope": frozenset({""}),
    "oauth_ca_file": frozenset({""}),
    "replication": frozenset({"", "0", "false", "off", "no"}),
    "require_auth": frozenset({""}),
    "requirepeer": frozenset({""}),
    "scram_client_key": frozenset({""}),
    "scram_server_key": frozenset({""}),
    "sslcertmode": frozenset({"", "allow"}),
    "sslcompression": None,  # a permission, of which libraries make no use any more
    "sslcrldir": frozenset({""}),
    "sslkeylogfile": frozenset({""}),
    "sslsni": frozenset({"", "1"}),
    "tcp_user_timeout": None,
}
"""The values that ask for nothing else than what is done anyway; None where every value does."""

KEYWORDS = DRIVER | OURS | frozenset(ACCEPTED)

VARIABLES = {
    "PGAPPNAME": "application_name",
    "PGCHANNELBINDING": "channel_binding",
    "PGCLIENTENCODING": "client_encoding",
    "PGCONNECT_TIMEOUT": "connect_timeout",
    "PGDATABASE": "dbname",
    "PGGSSDELEGATION": "gssdelegation",
    "PGGSSENCMODE": "gssencmode",
    "PGGSSLIB": "gsslib",
    "PGHOST": "host",
    "PGHOSTADDR": "hostaddr",
    "PGKRBSRVNAME": "krbsrvname",
    "PGLOADBALANCEHOSTS": "load_balance_hosts",
    "PGMAXPROTOCOLVERSION": "max_protocol_version",
    "PGMINPROTOCOLVERSION": "min_protocol_version",
    "PGOPTIONS": "options",
    "PGPASSFILE": "passfile",
    "PGPASSWORD": "password",
    "PGPORT": "port",
    "PGREQUIREAUTH": "require_auth",
    "PGREQUIREPEER": "requirepeer",
    "PGREQUIRESSL": "requiressl",
    "PGSERVICE": "service",
    "PGSERVICEFILE": "servicefile",
    "PGSSLCERT": "sslcert",
    "PGSSLCERTMODE": "sslcertmode",
    "PGSSLCOMPRESSION": "sslcompression",
    "PGSSLCRL": "sslcrl",
    "PGSSLCRLDIR": "sslcrldir",
    "PGSSLKEY": "sslkey",
    "PGSSLMAXPROTOCOLVERSION": "ssl_max_protocol_version",
    "PGSSLMINPROTOCOLVERSION": "ssl_min_protocol_version",
    "PGSSLMODE": "sslmode",
    "PGSSLNEGOTIATION": "sslnegotiation",
    "PGSSLROOTCERT": "sslrootcert",
    "PGSSLSNI": "sslsni",
    "PGTARGETSESSIONATTRS": "target_session_attrs",
    "PGUSER": "user",
}
"""PGDATESTYLE, PGTZ, PGGEQO and PGLOCALEDIR change what psql shows; nothing that is read or written here."""

_CHOICES = {
    "load_balance_hosts": frozenset({"disable", "random"}),
    "target_session_attrs": frozenset({"any", "read-write", "read-only", "primary", "standby", "prefer-standby"}),
    "requiressl": frozenset({"0", "1"}),
    "ssl": frozenset({"true"}),
}


class ParameterError(ValueError):
    """A parameter must be removed or changed. The message names it, where it stands, and no value."""


def settled(given: Mapping[str, str], service: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return what holds: parameters of the URL before those of the service file, and these before variables.

    Raises ParameterError for what is unknown, and for what is known and can't be done.
    """
    variables = {keyword: environment[name] for name, keyword in VARIABLES.items() if environment.get(name)}
    names = {keyword: name for name, keyword in VARIABLES.items()}
    result = {**variables, **service, **given}
    for keyword, value in result.items():
        place = keyword if keyword in given else f"{keyword} (of the service file)"
        if keyword not in given and keyword not in service:
            place = names[keyword]
        _check(keyword, value, place)
    if result.get("ssl") or result.get("requiressl") == "1":
        result.setdefault("sslmode", "require")
    if result.get("sslrootcert") == "system" and result.setdefault("sslmode", "verify-full") != "verify-full":
        raise ParameterError("sslrootcert=system needs sslmode=verify-full")
    return result


def _check(keyword: str, value: str, place: str) -> None:
    if keyword not in KEYWORDS:
        raise ParameterError(
            f"{place} is not a parameter of PostgreSQL's clients: remove it; a setting of the server is written "
            "options=-c%20NAME%3DVALUE"
        )
    accepted = ACCEPTED.get(keyword)
    if accepted is not None and value not in accepted:
        raise ParameterError(f"remove {place}: the driver cannot do what it asks for")
    if value and value not in _CHOICES.get(keyword, {value}):
        raise ParameterError(f"{place} must be one of {', '.join(sorted(_CHOICES[keyword]))}")
    if keyword == "connect_timeout" and value and not value.strip().lstrip("+-").isdecimal():
        raise ParameterError(f"{place} must be a whole number of seconds")
