"""The settings: typed, immutable values.

Each setting is an environment variable with the prefix `INGESTOR_`. A `.env` file in the working directory is read
too; the environment takes precedence. Each secret can be in a file instead (`INGESTOR_TOKEN_FILE`).
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
import socket
import zoneinfo
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from ingestor.address import parse_database_address
from ingestor.errors import ConfigurationError
from ingestor.files import FileTextError, read_env, read_secret, unquoted
from ingestor.redaction import outside_text, register_password_file, register_secret, register_url, system_words

PREFIX = "INGESTOR_"
SECRETS = ("token", "database_url")

SHARED = {
    "calendar": "exchange_calendar",
    "exchange_timezone": "exchange_timezone",
    "coverage_lead": "coverage_lead",
    "coverage_tail": "coverage_tail",
    "coverage_margin": "coverage_margin",
    "stall_timeout": "stall_timeout",
}
"""Columns of `ingest.settings` and the settings copied to them. SQL holds durations as intervals."""

ANY_HOST = "*"

LEAST_RETENTION = 8 * 86_400.0
"""Seconds. Exceeds the widest window in which bars are recomputed from ticks: dropping ticks must not drop bars."""

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?", re.ASCII)
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, None: 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_HOST_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?", re.ASCII)
_SIZE = re.compile(r"(\d+)\s*(B|KiB|MiB|GiB)?", re.ASCII | re.IGNORECASE)
_SIZE_UNITS = {None: 1, "b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_duration(value: object) -> float:
    """Return seconds from `50ms`, `10s`, `5m`, `2h`, `14d`, or a plain number of seconds."""
    match = _DURATION.fullmatch(str(value).strip())
    if not match:
        raise ValueError("not a duration; write seconds, or 50ms, 10s, 5m, 2h, 14d")
    return float(match[1]) * _DURATION_UNITS[match[2]]


def parse_duration_or_off(value: object) -> float | None:
    """Return seconds as `parse_duration`, or None for `off`."""
    return None if value is None or str(value).strip().lower() == "off" else parse_duration(value)


def parse_size(value: object) -> int:
    """Return bytes from `65536`, `64KiB`, `64MiB` or `1GiB`."""
    match = _SIZE.fullmatch(str(value).strip())
    if not match:
        raise ValueError("not a size; write bytes, or 512KiB, 64MiB, 1GiB")
    return int(match[1]) * _SIZE_UNITS[match[2].lower() if match[2] else None]


def is_loopback(host: str | None) -> bool:
    """Return whether a host name or address is of this machine."""
    if host is None:
        return False
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def normal_host(text: str) -> str:
    """Return a host name in lower case without a final dot, or an address in its canonical form.

    Raises ValueError for any other text.
    """
    has_brackets = text.startswith("[") and text.endswith("]")
    host = text[1:-1] if has_brackets else text.removesuffix(".").lower()
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        if has_brackets or not _HOST_NAME.fullmatch(host):
            raise ValueError("neither a host's name nor an address") from None
        return host
    return str(getattr(address, "ipv4_mapped", None) or address)


def parse_hosts(value: object) -> Any:
    """Return host names and addresses from `a.example.org, 10.0.0.1, [::1]`, or `*` for all."""
    if not isinstance(value, str):
        return value
    names = [name.strip() for name in value.split(",") if name.strip()]
    try:
        return tuple(name if name == ANY_HOST else normal_host(name) for name in names)
    except ValueError:
        raise ValueError("not a list of host names or addresses; write a.example.org,10.0.0.1 without ports") from None


RELAY_QUERY = re.compile(r"meta=1(?:&from=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ))?", re.ASCII)
"""The query of the address of a relay that is recorded from, and from when on its record is wanted."""


def _check_endpoint(value: str, plain: str, form: str) -> str:
    """Return the URL of a service that receives the token; `plain` only for this machine. Raises ValueError."""
    secure = f"{plain}s"
    if "@" in value:  # anywhere: after a `/` in a password the rest looks like a path
        raise ValueError("must not contain a user or a password: it is recorded; write an @ in the path as %40")
    try:
        parts = urlsplit(value)
        valid = (parts.port is None or parts.port > 0) and value.isprintable() and " " not in value
    except ValueError:
        parts, valid = urlsplit(""), False
    if not valid or parts.scheme not in {plain, secure} or not parts.hostname:
        raise ValueError(f"not {form}")
    if parts.query or parts.fragment:
        raise ValueError("must not contain a query or a fragment: it is recorded")
    if parts.scheme == plain and not is_loopback(parts.hostname):
        raise ValueError(f"would send the token unencrypted; use {secure}:// ({plain}:// is for this machine only)")
    return value


def _check_stream_url(value: str) -> str:
    address, mark, query = value.partition("?")
    if mark and RELAY_QUERY.fullmatch(query) is None:
        address = value  # refused as any other query
    _check_endpoint(address, "ws", "a WebSocket address; write wss://HOST[:PORT]/PATH")
    return value


def _check_rest_url(value: str) -> str:
    return _check_endpoint(value, "http", "an HTTP address; write https://HOST[:PORT]").rstrip("/")


def _check_buffer_url(value: str | None) -> str | None:
    if value is None:
        return None
    if "@" in value:
        raise ValueError("must not contain a user or a password; write them to INGESTOR_BUFFER_CREDENTIALS_FILE")
    schemes = set()
    for each in value.split(","):
        try:
            parts = urlsplit(each.strip())
            valid = (parts.port is None or parts.port > 0) and parts.netloc.isprintable() and " " not in parts.netloc
        except ValueError:
            parts, valid = urlsplit(""), False
        if not valid or parts.scheme not in {"nats", "tls"} or not parts.hostname:
            raise ValueError("not a list of NATS servers; write nats://HOST[:PORT],… or tls://HOST[:PORT],…")
        if parts.path.strip("/") or parts.query or parts.fragment:
            raise ValueError("a NATS server has no path and no query; write nats://HOST[:PORT],…")
        schemes.add(parts.scheme)
    if len(schemes) > 1:
        raise ValueError("mixes nats:// and tls://: one of the servers would get everything unencrypted")
    return ",".join(each.strip().rstrip("/") for each in value.split(","))


def _check_stream_name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", value, re.ASCII):
        raise ValueError("must be 1 to 32 letters, digits, - or _: it is part of every subject")
    return value


def _check_database_url(value: SecretStr) -> SecretStr:
    parse_database_address(value.get_secret_value())
    return value


def _registered(register: Callable[[str], None]) -> BeforeValidator:
    """Return a validator that registers a secret for redaction before any other validator can fail."""

    def validate(value: object) -> object:
        register(value.get_secret_value() if isinstance(value, SecretStr) else str(value))
        return value

    return BeforeValidator(validate)


def _check_timezone(value: str) -> str:
    try:
        zoneinfo.ZoneInfo(value)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError("not a time zone of the IANA database, such as Pacific/Auckland") from None
    return value


def _check_retention(value: float | None) -> float | None:
    if value is not None and value < LEAST_RETENTION:
        raise ValueError("must be at least 8d, or off: the bars of the last seven days are recomputed from ticks")
    return value


def _check_secret_file(value: object) -> object:
    """Refuse a secret given instead of a path: errors name the path."""
    text = str(value)
    if re.match(r"(pk|tk)_|[a-z+]+:/", text):
        register_secret(text)
        register_url(text)
        raise ValueError("must be the path of a file, not the secret itself")
    return value


def _check_token(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[\x21-\x7e]{1,256}", value.get_secret_value()):
        raise ValueError("must be 1 to 256 visible ASCII characters")
    return value


Token = Annotated[SecretStr, _registered(register_secret), AfterValidator(_check_token)]
DatabaseUrl = Annotated[SecretStr, _registered(register_url), AfterValidator(_check_database_url)]
SecretFile = Annotated[Path, BeforeValidator(_check_secret_file)]
Seconds = Annotated[float, BeforeValidator(parse_duration)]
SecondsOrOff = Annotated[float | None, BeforeValidator(parse_duration_or_off)]
Bytes = Annotated[int, BeforeValidator(parse_size)]
Text = Annotated[str, Field(min_length=1, max_length=200)]
HostNames = Annotated[tuple[str, ...], BeforeValidator(parse_hosts)]


def _setting(default: str | int | None, description: str, **bounds: Any) -> Any:
    """Declare a setting: its default as written (`50ms`), its description, its bounds."""
    return Field(default, description=description, **bounds)


class Settings(BaseSettings):
    """Every setting with its default and description. Durations are in seconds, sizes in bytes."""

    model_config = SettingsConfigDict(
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        validate_default=True,
    )

    token: Token | None = _setting(None, "Financefeast token; only commands that talk to Financefeast need it")
    token_file: SecretFile | None = _setting(None, "file with the token, read again at each connection")
    stream_url: Annotated[str, AfterValidator(_check_stream_url)] = _setting(
        "wss://stream.financefeast.io/ws",
        "Stream API endpoint, or a relay's with ?meta=1; wss:// only, except on this machine",
    )
    rest_url: Annotated[str, AfterValidator(_check_rest_url)] = _setting(
        "https://api.financefeast.io", "REST API for backfill; https:// only, except on this machine"
    )
    database_url: DatabaseUrl | None = _setting(
        None,
        "PostgreSQL 15+ or TimescaleDB: postgresql://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=verify-full",
    )
    database_url_file: SecretFile | None = _setting(None, "file with the database URL")

    exchange_timezone: Annotated[str, AfterValidator(_check_timezone)] = _setting(
        "Pacific/Auckland", "time zone of dates that carry no offset"
    )
    exchange_calendar: Literal["XNZE", "always"] = _setting(
        "XNZE", "trading calendar: XNZE, or always (every minute of every day)"
    )
    coverage_lead: Seconds = _setting("1h", "time before the opening that counts as trading time", ge=0, le=43200)
    coverage_tail: Seconds = _setting("30m", "time after the close that counts as trading time", ge=0, le=43200)
    coverage_margin: Seconds = _setting(
        "5s", "allowed difference between the exchange's clock and ours; added to both ends of a gap", ge=0, le=60
    )

    batch_max_rows: int = _setting(5000, "ticks at which a batch is complete", ge=1, le=100_000)
    batch_max_delay: Seconds = _setting("50ms", "age at which a batch is complete", ge=0.001, le=10)
    heartbeat: Seconds = _setting("5s", "interval at which a quiet session is recorded", ge=0.05, le=30)
    occurrence_keys: int = _setting(
        200_000, "ticks remembered to distinguish equal trades from copies", ge=1, le=10_000_000
    )
    memory_max_bytes: Bytes = _setting(
        "64MiB", "limit of ticks waiting in memory; further ticks go to the spool", ge=2**20
    )
    spool_dir: Path = _setting(
        "~/.local/state/ingestor", "directory of the spool, on a local disk; each instance needs its own"
    )
    spool_max_bytes: Bytes = _setting(
        "1GiB", "limit of ticks waiting on disk; at the limit the stream is closed until there is room", ge=2**20
    )
    spool_after: Seconds = _setting("1s", "age at which an uncommitted batch goes to the spool", ge=0.01, le=60)
    write_timeout: Seconds = _setting(
        "10s", "time without progress after which a transaction is aborted and retried in smaller ones", ge=0.1, le=600
    )

    buffer_url: Annotated[str | None, AfterValidator(_check_buffer_url)] = _setting(
        None,
        "NATS servers of the replicated buffer between `ingestor run` and `ingestor write`, as "
        "nats://HOST:PORT,nats://… or tls://…; unset: the daemon writes to the database itself",
    )
    buffer_credentials_file: SecretFile | None = _setting(
        None, "file for the login at NATS: a .creds file, an NKey seed, USER:PASSWORD, or a token"
    )
    buffer_stream: Annotated[str, AfterValidator(_check_stream_name)] = _setting(
        "ingestor", "name of the JetStream stream, and first part of its subjects"
    )
    buffer_replicas: int = _setting(3, "NATS servers that keep a copy of each batch: 3, or 5", ge=1, le=5)
    write_http_port: int = _setting(
        9466,
        "port of the health and metrics of `ingestor write`, on INGESTOR_HTTP_HOST; 0: any free port",
        ge=0,
        le=65535,
    )

    ping_interval: Seconds = _setting("10s", "time between keepalive pings", ge=0.01, le=300)
    ping_timeout: Seconds = _setting("8s", "time limit for a pong", ge=0.01, le=300)
    stall_timeout: Seconds = _setting(
        "5m", "time without a tick in trading hours after which the stream is reconnected", ge=0.05, le=86400
    )
    reconnect_max_delay: Seconds = _setting("60s", "longest backoff between two connection attempts", ge=0.01, le=3600)
    stop_timeout: Seconds = _setting("20s", "time limit for writing the buffer when stopping", ge=1, le=600)
    instance: Text = Field(
        default_factory=socket.gethostname,
        description="name of this instance in the records (default: the host's name)",
    )

    http_host: Text = _setting(
        "127.0.0.1", "address of the status page, health and metrics; every client that reaches it can read them"
    )
    http_port: int = _setting(9464, "port of the status page, health and metrics; 0: any free port", ge=0, le=65535)
    http_hosts: HostNames = _setting(
        "", "further host names or addresses that requests may name, separated by commas; * for all"
    )

    relay_host: Text = _setting(
        "127.0.0.1", "address of the relay's stream; any other than loopback needs TLS, by files or by a proxy"
    )
    relay_port: int = _setting(5005, "port of the relay's stream; 0: any free port", ge=0, le=65535)
    relay_tls_cert: Path | None = _setting(None, "file with the relay's certificate and its chain (PEM)")
    relay_tls_key: Path | None = _setting(None, "file with the certificate's private key (PEM)")
    relay_behind_tls_proxy: bool = _setting(
        "off", "whether a proxy in front of the relay does TLS, so that the relay may listen without it"
    )
    relay_max_clients: int = _setting(200, "streams of the relay at once", ge=1, le=100_000)
    relay_client_buffer: Bytes = _setting(
        "256KiB", "bytes that may wait for a client of the relay before it is served from the database", ge=4096
    )
    relay_http_port: int = _setting(
        9465, "port of the relay's health and metrics, on INGESTOR_HTTP_HOST; 0: any free port", ge=0, le=65535
    )

    retention: Annotated[SecondsOrOff, AfterValidator(_check_retention)] = _setting(
        "off", "age at which `ingestor maintain` drops ticks; at least 8d, or off"
    )
    columnstore_after: SecondsOrOff = _setting(
        "14d", "age at which ticks go to the columnstore of TimescaleDB Community; at least 1d, or off", ge=86_400
    )

    rollup: bool = _setting("on", "whether the daemon stores bars while it records; off: only `ingestor maintain` does")

    log_level: Literal["debug", "info", "warning", "error"] = _setting("info", "debug, info, warning or error")
    log_format: Literal["auto", "json", "console"] = _setting(
        "auto", "json, console, or auto: console on a terminal, else json"
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_: PydanticBaseSettingsSource,
        **__: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Use `_Written` for both the environment and `.env`. Called by the library."""
        return init_settings, _Written(settings_cls)

    @model_validator(mode="after")
    def _each_secret_once(self) -> Settings:
        for name in SECRETS:
            if getattr(self, name) is not None and getattr(self, f"{name}_file") is not None:
                raise ValueError(f"{variable(name)} and {variable(name)}_FILE are both set; keep one")
        return self

    def read_token(self) -> str:
        """Return the token; a token file is read at each call, so that it can be rotated.

        Raises ConfigurationError, without the token, if it is missing or malformed.
        """
        return self._secret("token", register_secret, _check_token, "the Financefeast token")

    def read_database_url(self) -> str:
        """Return the database URL, from its file if one is set. Raises ConfigurationError."""
        return self._secret(
            "database_url", register_url, _check_database_url, "postgresql://USER:PASSWORD@HOST/DATABASE"
        )

    def read_buffer_url(self) -> str:
        """Return the servers of the replicated buffer. Raises ConfigurationError if there are none."""
        if self.buffer_url is None:
            raise ConfigurationError(
                f"{variable('buffer_url')} is not set. Set it to nats://HOST[:PORT],… for the replicated buffer; "
                "without one, `ingestor run` writes to the database itself."
            )
        return self.buffer_url

    def require(self, *secrets: str) -> None:
        """Raise ConfigurationError with one line for each of these settings that is missing or malformed."""
        problems: list[str] = []
        for name in secrets:
            try:
                getattr(self, f"read_{name}")()
            except ConfigurationError as error:
                problems += error.problems
        if problems:
            raise ConfigurationError(*problems)

    def state_path(self, name: str) -> Path:
        """Return the path of one of the daemon's own files in `spool_dir`. Raises ConfigurationError."""
        return _expanded("spool_dir", self.spool_dir) / name

    def _secret(self, name: str, register: Callable[[str], None], check: Any, what: str) -> str:
        value, file = getattr(self, name), getattr(self, f"{name}_file")
        if file is None:
            if value is None:
                raise ConfigurationError(
                    f"{variable(name)} is not set. Set it to {what}, or set {variable(name)}_FILE to a file with it."
                )
            return str(value.get_secret_value())
        shown = f"{variable(name)}_FILE: {outside_text(file)}"
        try:
            text = read_secret(_expanded(f"{name}_file", Path(file)))
        except FileTextError as exc:
            raise ConfigurationError(f"{shown} cannot be used: {exc}") from None
        except OSError as exc:
            raise ConfigurationError(f"{shown} cannot be read: {system_words(exc)}") from None
        register(text)
        try:
            return str(check(SecretStr(text)).get_secret_value())
        except ValueError as exc:
            raise ConfigurationError(
                f"{variable(name)}_FILE: the content of {outside_text(file)}: {outside_text(exc)}"
            ) from None


class _Written(PydanticBaseSettingsSource):
    """The settings as written in the environment and in `.env`. An empty value counts as not set."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Not used: all fields are read at once."""
        raise NotImplementedError

    def __call__(self) -> dict[str, str]:
        """Return the values by field. Raises ConfigurationError with one line for each unreadable value."""
        found: dict[str, str] = {}
        problems: list[str] = []
        fields = {variable(name): name for name in Settings.model_fields}
        for name, text in _env_file().items():
            if text.strip() and name.upper() in fields:
                found[fields[name.upper()]] = text
        for name, text in os.environ.items():
            if not text.strip() or name.upper() not in fields:
                continue
            try:
                found[fields[name.upper()]] = unquoted(text)
            except FileTextError as error:
                problems.append(f"{name}: {error}")
        if problems:
            raise ConfigurationError(*problems)
        return found


def _env_file() -> dict[str, str]:
    """Return the variables of `.env`. Raises ConfigurationError."""
    try:
        Path(".env").stat()
    except OSError:  # no file, or the working directory is gone or may not be entered
        return {}
    try:
        return read_env(Path(".env"))
    except FileTextError as error:
        raise ConfigurationError(f".env cannot be used: {error}") from None
    except OSError as error:
        raise ConfigurationError(f".env cannot be read: {system_words(error)}") from None


def _expanded(field: str, path: Path) -> Path:
    """Return a path with `~` expanded. Raises ConfigurationError for a user without a home directory."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ConfigurationError(
            f"{variable(field)}: ~ stands for no directory, because this user has no home directory. "
            f"Set {variable(field)} to a path that begins with /."
        ) from None


def variable(field: str) -> str:
    """Return the environment variable of a setting."""
    return f"{PREFIX}{field.upper()}"


def load_settings(**overrides: Any) -> Settings:
    """Read the environment and `.env`. Raises ConfigurationError with one line for each problem."""
    _register_environment()
    try:
        return Settings(**overrides)
    except ValidationError as exc:
        raise ConfigurationError(*(_problem(error) for error in exc.errors(include_input=False))) from None


def plain_words(message: str) -> str:
    """Return a message of pydantic or typer in the wording of our own messages."""
    message = re.sub(r"^(Value error|Assertion failed), ", "", message)
    return re.sub(r"^Input should be (.*?)(, unable to .*)?$", r"must be \1", message)


def _problem(error: Any) -> str:
    message = plain_words(error["msg"])
    if not error["loc"]:
        return str(message)
    return f"{variable(str(error['loc'][0]))}: {message[:1].lower()}{message[1:]}"


def _register_environment() -> None:
    """Register for redaction the passwords that libraries read themselves: of proxies and of the database."""
    for name, value in os.environ.items():
        if name.lower().endswith("_proxy") and value and value != "*":
            register_url(value if "://" in value else f"http://{value}")
    register_secret(os.environ.get("PGPASSWORD", ""))
    home = Path(os.environ.get("HOME", "/nonexistent"))
    register_password_file(Path(os.environ.get("PGPASSFILE") or home / ".pgpass"))
    register_password_file(Path(os.environ.get("PGSERVICEFILE") or home / ".pg_service.conf"))


def require_nats() -> None:
    """Raise ConfigurationError if the library for INGESTOR_BUFFER_URL is not installed."""
    if importlib.util.find_spec("nats") is None:
        raise ConfigurationError(
            f"{variable('buffer_url')} needs a package that is not installed. Run: pip install 'ingestor[nats]'"
        )


def unknown_variables() -> list[str]:
    """Return the variables with our prefix that no setting has: probably misspelled."""
    known = {variable(name) for name in Settings.model_fields}
    return sorted(name for name in {*os.environ, *_env_file()} if name.startswith(PREFIX) and name not in known)


def written_default(field: str) -> str:
    """Return a setting's default as written; empty if it has none."""
    info = Settings.model_fields[field]
    return "" if info.default_factory or info.default is None else str(info.default)
