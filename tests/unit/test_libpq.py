from __future__ import annotations

import pytest

from ingestor.libpq import ACCEPTED, DRIVER, KEYWORDS, OURS, VARIABLES, ParameterError, settled

CLIENT = """host hostaddr port dbname user password passfile require_auth channel_binding connect_timeout
client_encoding options application_name fallback_application_name keepalives keepalives_idle keepalives_interval
keepalives_count tcp_user_timeout replication gssencmode sslmode requiressl sslnegotiation sslcompression sslcert sslkey
sslkeylogfile sslpassword sslcertmode sslrootcert sslcrl sslcrldir sslsni requirepeer ssl_min_protocol_version
ssl_max_protocol_version min_protocol_version max_protocol_version krbsrvname gsslib gssdelegation scram_client_key
scram_server_key service target_session_attrs load_balance_hosts oauth_issuer oauth_client_id oauth_client_secret
oauth_scope""".split()  # noqa: SIM905 - as the client's manual lists them

REFUSED = {
    "channel_binding": "require",
    "gssdelegation": "1",
    "gssencmode": "require",
    "min_protocol_version": "3.2",
    "oauth_client_id": "x",
    "oauth_client_secret": "x",
    "oauth_issuer": "x",
    "oauth_scope": "x",
    "oauth_ca_file": "x",
    "replication": "database",
    "require_auth": "scram-sha-256",
    "requirepeer": "postgres",
    "scram_client_key": "x",
    "scram_server_key": "x",
    "sslcertmode": "require",
    "sslcrldir": "/x",
    "sslkeylogfile": "/x",
    "sslsni": "0",
}


def test_every_parameter_of_the_client_has_its_place() -> None:
    """A parameter is the driver's, implemented here, accepted without effect, or refused by its name."""
    assert set(CLIENT) <= KEYWORDS
    assert not DRIVER & OURS | (DRIVER | OURS) & set(ACCEPTED)
    assert set(VARIABLES.values()) <= KEYWORDS
    assert {name for name, values in ACCEPTED.items() if values is not None} == set(REFUSED)
    names = {keyword: variable for variable, keyword in VARIABLES.items()}
    for keyword, value in REFUSED.items():
        for accepted in ACCEPTED[keyword] or ():
            settled({keyword: accepted}, {}, {})
        for given, service, environment, place in (
            ({keyword: value}, {}, {}, keyword),
            ({}, {keyword: value}, {}, "of the service file"),
            ({}, {}, {names.get(keyword, ""): value}, names.get(keyword)),
        ):
            if place is not None:
                with pytest.raises(ParameterError, match=f"remove {keyword}|remove {place}"):
                    settled(given, service, environment)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"authtype": "x"}, "authtype is not a parameter"),
        ({"statement_timeout": "1"}, "options=-c%20NAME%3DVALUE"),
        ({"connect_timeout": "soon"}, "connect_timeout must be"),
        ({"target_session_attrs": "master"}, "target_session_attrs must be one of"),
        ({"load_balance_hosts": "yes"}, "load_balance_hosts must be one of"),
        ({"sslrootcert": "system", "sslmode": "require"}, "needs sslmode=verify-full"),
    ],
)
def test_invalid_parameters_are_named(given: dict[str, str], words: str) -> None:
    """An unknown parameter and a wrong value are refused with the remedy; the value is not shown."""
    with pytest.raises(ParameterError) as caught:
        settled(given, {}, {})
    assert words in str(caught.value)


def test_precedence() -> None:
    """The URL precedes the service file, which precedes the environment; older TLS parameters are read too."""
    environment = {"PGOPTIONS": "e", "PGAPPNAME": "e", "PGREQUIRESSL": "1", "PGHOST": "", "PGTZ": "x"}
    found = settled({"options": "u"}, {"options": "s", "port": "1"}, environment)
    assert found == {"options": "u", "port": "1", "application_name": "e", "requiressl": "1", "sslmode": "require"}
    assert settled({"ssl": "true"}, {}, {})["sslmode"] == "require"
    assert settled({"sslrootcert": "system"}, {}, {})["sslmode"] == "verify-full"
