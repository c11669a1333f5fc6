"""The parameters of libpq, from the URL, PG… variables and the service file. Pure.

The driver sends an unknown parameter to the server as a setting, and the server refuses it. So each parameter is
honoured, or accepted if its value changes nothing, or refused by name. A security parameter that cannot be honoured is
never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping

DRIVER = frozenset(
    """database dbname gsslib host krbsrvname passfile password port ssl_max_protocol_version
    ssl_min_protocol_version sslcert sslcrl sslkey sslmode sslnegotiation sslpassword sslrootcert user""".split()  # noqa: SIM905 - a list of words is easier to read than of literals
)
"""Parameters that the driver implements."""

OURS = frozenset(
    """application_name connect_timeout fallback_application_name hostaddr load_balance_hosts options requiressl service
    servicefile ssl target_session_attrs""".split()  # noqa: SIM905 - as above
)
"""Parameters that this package implements around the driver."""

_OFF = frozenset({"", "0"})

ACCEPTED: dict[str, frozenset[str] | None] = {
    "channel_binding": frozenset({"", "disable", "prefer"}),
    "client_encoding": None,  # between client and server only: the driver always speaks UTF-8
    "gssdelegation": _OFF,
    "gssencmode": frozenset({"", "disable", "prefer"}),
    "keepalives": None,  # statement timeouts detect a dead server earlier
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
    "sslcompression": None,  # only a permission, which libraries no longer use
    "sslcrldir": frozenset({""}),
    "sslkeylogfile": frozenset({""}),
    "sslsni": frozenset({"", "1"}),
    "tcp_user_timeout": None,
}
"""The values that change nothing; None if no value does."""

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
"""PGDATESTYLE, PGTZ, PGGEQO and PGLOCALEDIR change only what psql shows."""

_CHOICES = {
    "load_balance_hosts": frozenset({"disable", "random"}),
    "target_session_attrs": frozenset({"any", "read-write", "read-only", "primary", "standby", "prefer-standby"}),
    "requiressl": frozenset({"0", "1"}),
    "ssl": frozenset({"true"}),
}


class ParameterError(ValueError):
    """A parameter must be removed or changed. The message names it and its place, not its value."""


def settled(given: Mapping[str, str], service: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """Merge the parameters: the URL takes precedence over the service file, and that over variables.

    Raises ParameterError for an unknown parameter and for one that cannot be honoured.
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
        raise ParameterError(f"remove {place}: the driver does not support this value")
    if value and value not in _CHOICES.get(keyword, {value}):
        raise ParameterError(f"{place} must be one of {', '.join(sorted(_CHOICES[keyword]))}")
    if keyword == "connect_timeout" and value and not value.strip().lstrip("+-").isdecimal():
        raise ParameterError(f"{place} must be a whole number of seconds")
