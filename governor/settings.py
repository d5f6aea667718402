"""Settings from the environment, read once, strictly.

Every variable is a row of TABLE; `docs/settings.md` is generated from it. A wrong value names the variable, its
value and what is allowed; an unknown `GOV_` name is told with the nearest known one.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from re import compile as regex
from typing import Any, Literal, NamedTuple

import msgspec

from governor import policy
from governor.hosts import TESTNET, check_base_url
from governor.policy import Policy

_unit = regex(r"[A-Za-z0-9@_.:\\][A-Za-z0-9@_.:\\-]{0,254}").fullmatch
_alert_url = regex(r"[A-Za-z][A-Za-z0-9+.-]*://\S+").fullmatch
_web = regex(r"https?://[^\s/]\S*").fullmatch
_host = regex(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]").fullmatch
_symbol = regex(r"[A-Z0-9_]{1,32}").fullmatch


class SettingsError(ValueError):
    """A variable that cannot be used; the message names it, its value and what is allowed."""


class Row(NamedTuple):
    """One variable."""

    name: str
    default: str
    help: str
    field: str | None = None
    """Field of Settings; None for what belongs to the policy."""
    read: Callable[[str], Any] = str
    secret: bool = False


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the program can be told from outside."""

    redis_host: str
    redis_port: int
    redis_db: int
    redis_username: str
    redis_password: str
    redis_tls: bool
    redis_tls_ca: Path | None
    """None: the authorities the system trusts."""
    redis_tls_cert: Path | None
    redis_tls_key: Path | None
    """None: it is in the certificate's file."""
    redis_sentinels: tuple[tuple[str, int], ...]
    """Host and port of each; none: `redis_host` is the server."""
    redis_sentinel_name: str
    require_durable: bool
    durability_attested: bool
    key_prefix: str
    apply_config_path: Path
    apply_service: str
    disarm_socket: Path | None
    """None: the process that disarms rewrites the file itself."""
    metrics_host: str
    metrics_port: int
    dashboard_host: str
    dashboard_port: int
    dashboard_token_file: Path | None
    """None: the dashboard only shows."""
    dashboard_allowed_hosts: tuple[str, ...]
    """Names, in lower case and without a port."""
    dashboard_behind_proxy: bool
    base_url: str
    binance_timeout_s: float
    awake_s: float
    api_key: str
    api_secret: str
    allow_mainnet: bool
    audit_key: str
    limits_file: str
    log_format: str
    log_level: str
    symbol_labels: int
    alert_urls: tuple[str, ...]
    """Where alerts are sent, as apprise writes it; none: nowhere."""
    alert_link: str
    alert_after_s: float
    """How long something has to be lost, or back, before that is told."""
    state_dir: Path
    """Where this program keeps files."""
    journal_dir: Path
    journal_fsync: Literal["interval", "always"]
    archive_dir: Path
    lease_s: float | None
    """Seconds within which a standby takes over; None: no lease, every governor reads plans."""
    checkpoint_events: int | None
    """Events after which a checkpoint is written; None: never."""
    checkpoint_s: float | None
    """Seconds after which one is written if anything happened; None: never."""
    policy: Policy
    texts: dict[str, str]
    """Settings that take part in a decision, by name: what SETTINGS_LOADED records."""
    symbol_texts: dict[str, dict[str, str]]
    digest: str
    effective: dict[str, str]
    """Every variable's effective text, secrets masked."""
    warnings: tuple[str, ...] = ()

    @property
    def chain_key(self) -> bytes | None:
        """Key of the event chain, if it is keyed."""
        return self.audit_key.encode() or None

    @property
    def own_journal(self) -> Path:
        """The account's directory in the journal's."""
        prefix = self.key_prefix
        return self.journal_dir / "".join(
            char if char.isalnum() or char in "-_" else f"%{ord(char):02x}" for char in prefix
        )

    @property
    def credentials(self) -> bool:
        """Whether the exchange can be asked."""
        return bool(self.api_key and self.api_secret)


def _port(value: str) -> int:
    number = policy.whole(1, 65535)(value)
    assert number is not None
    return number


def _own_port(value: str) -> int:
    number = policy.whole(0, 65535)(value)
    assert number is not None
    return number


def _db(value: str) -> int:
    number = policy.whole(0, 1_000_000)(value)
    assert number is not None
    return number


def _timeout(value: str) -> float:
    micros = policy.seconds("0.05", "60")(value)
    assert micros is not None
    return micros / 1_000_000


def _awake_s(value: str) -> float:
    number = policy.whole(0, 1000)(value)
    assert number is not None
    return number / 1000


def _labels(value: str) -> int:
    number = policy.whole(1, 100_000)(value)
    assert number is not None
    return number


def _lease_s(value: str) -> float | None:
    micros = policy.seconds("0.5", "60", off=True)(value)
    return None if micros is None else micros / 1_000_000


def _checkpoint_s(value: str) -> float | None:
    micros = policy.seconds("1", "86400", off=True)(value)
    return None if micros is None else micros / 1_000_000


def _choice(*allowed: str) -> Callable[[str], str]:
    def read(value: str) -> str:
        if value.lower() not in [choice.lower() for choice in allowed]:
            raise ValueError("one of " + ", ".join(choice or "empty" for choice in allowed))
        return value.lower() if allowed[0].islower() or not allowed[0] else value.upper()

    return read


def _word(value: str) -> str:
    if not value or any(c.isspace() for c in value):
        raise ValueError("a name without spaces")
    return value


def _addresses(value: str) -> tuple[tuple[str, int], ...]:
    return tuple(_address(part) for part in value.split(",")) if value else ()


def _address(value: str) -> tuple[str, int]:
    host, _, port = value.rpartition(":")
    try:
        if _host(host):
            return host.strip("[]"), _port(port)
    except ValueError:
        pass
    raise ValueError("host:port, several separated by commas")


def _host_names(value: str) -> tuple[str, ...]:
    names = tuple(part.strip().lower() for part in value.split(",")) if value else ()
    if not all(map(_host, names)):
        raise ValueError("host names without a port, separated by commas")
    return names


def _service(value: str) -> str:
    if not _unit(value):
        raise ValueError("the name of a systemd unit")
    return value


def _credential(value: str) -> str:
    if any(not "!" <= char <= "~" for char in value):
        raise ValueError("printable ASCII without spaces")
    return value


def _alert_urls(value: str) -> tuple[str, ...]:
    urls = tuple(value.split())
    if (value and not urls) or not value.isascii() or not all(map(_alert_url, urls)):
        raise ValueError("URLs as apprise writes them, such as ntfy://ntfy.sh/topic, with spaces or lines between them")
    return urls


def _link(value: str) -> str:
    if value and not _web(value):
        raise ValueError("an address that begins with http:// or https://, or empty")
    return value


def _after_s(value: str) -> float:
    micros = policy.seconds("0", "3600")(value)
    assert micros is not None
    return micros / 1_000_000


def _path(value: str) -> Path:
    if not value.startswith("/"):
        raise ValueError("an absolute path")
    return Path(value)


def _socket(value: str) -> Path | None:
    if len(value.encode()) > 107:
        raise ValueError("a path of at most 107 bytes, as sockets have")
    return _path_or_none(value)


def _path_or_none(value: str) -> Path | None:
    return _path(value) if value else None


TABLE: tuple[Row, ...] = (
    Row("REDIS_HOST", "localhost", "Redis or Valkey server.", "redis_host", _word),
    Row("REDIS_PORT", "6379", "Its port.", "redis_port", _port),
    Row("REDIS_DB", "0", "Its database.", "redis_db", _db),
    Row("REDIS_USERNAME", "", "ACL user, if the server asks for one.", "redis_username"),
    Row("REDIS_PASSWORD", "", "Its password.", "redis_password", secret=True),
    Row("REDIS_TLS", "false", "Whether to speak TLS to it.", "redis_tls", policy.flag),
    Row("REDIS_TLS_CA", "", "File with certificates (PEM) of the authorities that may vouch for the server, such as "
        "your own. Empty: those the system trusts.", "redis_tls_ca", _path_or_none),
    Row("REDIS_TLS_CERT", "", "File with our own certificate (PEM), where the server asks for one.", "redis_tls_cert",
        _path_or_none),
    Row("REDIS_TLS_KEY", "", "File with its key; empty: it is in the same file.", "redis_tls_key", _path_or_none),
    Row("REDIS_SENTINELS", "", "Sentinels that know where the primary is; then REDIS_HOST and REDIS_PORT are not used. "
        "REDIS_TLS counts for them too; they are asked without a password.", "redis_sentinels", _addresses),
    Row("REDIS_SENTINEL_NAME", "mymaster", "What they call it.", "redis_sentinel_name", _word),
    Row("GOV_REQUIRE_DURABLE", "false", "Whether a start is refused on a server that does not keep what it is told: "
        "AOF off, or an eviction policy other than noeviction.", "require_durable", policy.flag),
    Row("GOV_DURABILITY_ATTESTED", "false", "The operator vouches for what the server does not tell, as managed ones "
        "that forbid CONFIG. What it tells is judged all the same.", "durability_attested", policy.flag),
    Row("GOV_KEY_PREFIX", "quantum", "First part of every key: the account's namespace. `{quantum}` for a cluster.",
        "key_prefix", _word),
    Row("GOV_MAX_EXEC_PER_HOUR", "3", "Executions of one symbol in any rolling hour."),
    Row("GOV_MAX_EXEC_PER_5MIN", "2", "Executions of one symbol in any five minutes; one more is a burst breach."),
    Row("GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD", "5000", "Notional of one symbol a UTC day, USD."),
    Row("GOV_MAX_REDUCE_QTY_PER_DAY", "0.02", "Quantity of one symbol a UTC day, base units; decides without a price."),
    Row("GOV_MAX_TOTAL_NOTIONAL_PER_DAY_USD", "off", "Notional over all symbols a UTC day, USD."),
    Row("GOV_LIMITS_FILE", "", "TOML file with limits of single symbols: a table a symbol, variables as above.",
        "limits_file"),
    Row("GOV_KILL_SCORE_CRITICAL", "0.8", "From this kill score on only CLOSE actions pass."),
    Row("GOV_MAX_PLAN_AGE_SEC", "60", "A plan older than this is stale."),
    Row("GOV_PERMIT_TTL_SEC", "60", "Life of a permit."),
    Row("GOV_FALLBACK_QTY", "", "Quantity assumed without credentials where the plan names none; empty: none is."),
    Row("GOV_ENABLE_AUTO_DISARM", "true", "Whether breaches disarm; otherwise they throttle."),
    Row("GOV_DISARM_ON_BURST_BREACH", "true", "Whether a burst breach disarms."),
    Row("GOV_DISARM_ON_UNPERMITTED_EXECUTION", "true", "Whether an execution nobody permitted disarms."),
    Row("GOV_DISARM_ON_ERROR_COUNT", "5", "Errors within the window that disarm; half of them throttle."),
    Row("GOV_ERROR_WINDOW_SEC", "3600", "The window errors are counted in."),
    Row("GOV_THROTTLE_COOLDOWN_SEC", "300", "How long a throttle lasts after its last new cause."),
    Row("GOV_THROTTLE_MAX_EXEC_PER_5MIN", "1", "Executions in five minutes where throttled."),
    Row("APPLY_CONFIG_PATH", "/etc/quantum/apply-layer.env", "The Apply Layer's environment file.",
        "apply_config_path", _path),
    Row("APPLY_SERVICE", "quantum-apply-layer.service", "Its systemd service.", "apply_service", _service),
    Row("GOV_DISARM_SOCKET", "", "Socket of root's helper, which can set the Apply Layer to dry run and nothing else. "
        "Empty: the Governor does it itself, as root or as a user who may.", "disarm_socket", _socket),
    Row("BINANCE_TESTNET_API_KEY", "", "Exchange credentials; without them quantity limits decide.", "api_key",
        _credential, secret=True),
    Row("BINANCE_TESTNET_API_SECRET", "", "The same.", "api_secret", _credential, secret=True),
    Row("BINANCE_BASE_URL", TESTNET, "Exchange. Testnet or loopback; mainnet only with GOV_ALLOW_MAINNET.", "base_url"),
    Row("BINANCE_TIMEOUT_SEC", "2", "The longest an answer of the exchange is waited for, a retry included.",
        "binance_timeout_s", _timeout),
    Row("BINANCE_AWAKE_MS", "50", "An exchange that usually answers sooner is waited for without letting the processor "
        "sleep, which takes its time to come back; 0: never. With one processor never, too.", "awake_s", _awake_s),
    Row("GOV_ALLOW_MAINNET", "false", "Allows the mainnet host.", "allow_mainnet", policy.flag),
    Row("GOV_AUDIT_KEY", "", "Key of the event chain: with it, nobody without it can rebuild the chain.", "audit_key",
        secret=True),
    Row("GOV_JOURNAL_DIR", "", "Where the daemon keeps its own copy of the events. Empty: a directory a server in "
        "`journal` in `$STATE_DIRECTORY`, else in `~/.local/state/quantum-governor`.", "journal_dir", _path_or_none),
    Row("GOV_JOURNAL_FSYNC", "interval", "`interval`: on disk within a second, a killed process loses nothing. "
        "`always`: what is about to be permitted is on disk before, for Redis on another machine.", "journal_fsync",
        _choice("interval", "always")),
    Row("GOV_ARCHIVE_DIR", "", "Where `governor archive` keeps its files, and every reader looks for what the stream "
        "no longer has. Empty: `archive` in `$STATE_DIRECTORY`, else in `~/.local/state/quantum-governor`.",
        "archive_dir", _path_or_none),
    Row("GOV_LEASE_SEC", "3", "Of several governors one is active; within this time of its end a standby takes over. "
        "off: all of them read plans.", "lease_s", _lease_s),
    Row("GOV_CHECKPOINT_EVENTS", "10000", "Events after which the daemon has a checkpoint written; a start reads the "
        "events behind it.", "checkpoint_events", policy.whole(10, 100_000_000, off=True)),
    Row("GOV_CHECKPOINT_SEC", "900", "Seconds after which it does so where fewer happened.", "checkpoint_s",
        _checkpoint_s),
    Row("METRICS_HOST", "127.0.0.1", "Where /metrics, /healthz and /readyz listen.", "metrics_host", _word),
    Row("METRICS_PORT", "8044", "Their port; 0 takes a free one.", "metrics_port", _own_port),
    Row("DASHBOARD_HOST", "127.0.0.1", "Where `governor dashboard` listens.", "dashboard_host", _word),
    Row("DASHBOARD_PORT", "8045", "Its port; 0 takes a free one.", "dashboard_port", _own_port),
    Row("DASHBOARD_TOKEN_FILE", "", "File with the token (at least 16 characters) a person logs in with there, to "
        "disarm and to re-arm. Empty: the dashboard only shows.", "dashboard_token_file", _path_or_none),
    Row("DASHBOARD_ALLOWED_HOSTS", "", "More names the dashboard may be asked for, separated by commas, such as a "
        "reverse proxy's; DASHBOARD_HOST and the names of loopback always may.", "dashboard_allowed_hosts",
        _host_names),
    Row("DASHBOARD_BEHIND_PROXY", "false", "Whether only a reverse proxy with TLS reaches the dashboard: its "
        "X-Forwarded-For is then believed, and cookies travel over https alone.", "dashboard_behind_proxy",
        policy.flag),
    Row("GOV_METRICS_MAX_SYMBOLS", "200", "Symbols with metrics of their own; the rest is `other`.", "symbol_labels",
        _labels),
    Row("GOV_ALERT_URLS", "", "Where the daemon sends alerts: apprise URLs, with spaces or lines between them "
        "(docs/alerting.md). Empty: nowhere.", "alert_urls", _alert_urls, secret=True),
    Row("GOV_ALERT_LINK", "", "Address that every alert ends with: your dashboard, or what to do at night.",
        "alert_link", _link),
    Row("GOV_ALERT_AFTER_SEC", "10", "How long Redis, the exchange or the journal has to be lost, or back, before an "
        "alert tells it.", "alert_after_s", _after_s),
    Row("GOV_LOG_FORMAT", "", "`json` or `console`; empty: console on a terminal, json otherwise.", "log_format",
        _choice("", "json", "console")),
    Row("GOV_LOG_LEVEL", "INFO", "`DEBUG`, `INFO`, `WARNING` or `ERROR`.", "log_level",
        _choice("DEBUG", "INFO", "WARNING", "ERROR")),
)  # fmt: skip
NAMES = tuple(row.name for row in TABLE)
TLS_FILES = ("REDIS_TLS_CA", "REDIS_TLS_CERT", "REDIS_TLS_KEY")


def load(environ: Mapping[str, str] = os.environ, *, stopping: bool = False) -> Settings:
    """Read every setting.

    Args:
        environ: the variables.
        stopping: whether files of TLS may be unusable: then Redis is not reachable, and a stop works without it.

    Raises:
        SettingsError: the first variable that cannot be used.
    """
    credentials = _credentials(environ, STOPPING if stopping else NAMES)
    given = {row.name: environ.get(row.name, row.default) for row in TABLE} | credentials
    fields = {row.field: _read(row, given[row.name]) for row in TABLE if row.field is not None}
    if fields["redis_tls"] and not stopping:
        _check_tls_files(given)
    fields["archive_dir"] = archive = fields["archive_dir"] or state_directory(environ) / "archive"
    journal = fields["journal_dir"] or state_directory(environ) / "journal" / _server_name(fields)
    fields["journal_dir"] = journal
    fields["base_url"] = base_url(given["BINANCE_BASE_URL"], allow_mainnet=fields["allow_mainnet"])
    has_credentials = bool(given["BINANCE_TESTNET_API_KEY"] and given["BINANCE_TESTNET_API_SECRET"])
    texts = {name: given[name] for name in policy.DEFAULTS if name in given}
    texts["credentials"] = "true" if has_credentials else "false"
    by_symbol = limits_file("GOV_LIMITS_FILE", given["GOV_LIMITS_FILE"])
    try:
        the_policy = policy.from_texts(texts, by_symbol)
    except ValueError as error:
        raise SettingsError(str(error)) from None
    return Settings(
        **fields,
        state_dir=state_directory(environ),
        policy=the_policy,
        texts=texts,
        symbol_texts=by_symbol,
        digest=policy.digest(texts, by_symbol),
        effective={row.name: _masked(row, given[row.name]) for row in TABLE}
        | {"GOV_ARCHIVE_DIR": str(archive), "GOV_JOURNAL_DIR": str(journal)},
        warnings=(*_warnings(environ, credentials), *_no_burst(the_policy)),
    )


STOPPING = ("REDIS_HOST", "REDIS_PORT", "REDIS_DB", "REDIS_USERNAME", "REDIS_PASSWORD", "REDIS_TLS", "REDIS_TLS_CA",
            "REDIS_TLS_CERT", "REDIS_TLS_KEY", "REDIS_SENTINELS", "REDIS_SENTINEL_NAME", "GOV_KEY_PREFIX",
            "APPLY_CONFIG_PATH", "APPLY_SERVICE", "GOV_DISARM_SOCKET", "GOV_AUDIT_KEY", "GOV_LOG_FORMAT")  # fmt: skip
"""What a stop by hand needs: nothing else that is wrong may keep a person from it."""


def load_for_stop(environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings a disarm by hand needs; whatever else is wrong has its default.

    Raises:
        SettingsError: one of those is wrong.
    """
    return load({name: value for name, value in environ.items() if name in STOPPING or name in _SYSTEMD}, stopping=True)


def _check_tls_files(given: Mapping[str, str]) -> None:
    """With a file that cannot be used nothing connects, and the client would not tell which one it was.

    Raises:
        SettingsError: one of them.
    """
    import ssl  # noqa: PLC0415 - slow to load, and most do without

    authorities, own, key = (given[name] for name in TLS_FILES)
    if key and not own:
        raise SettingsError(f"REDIS_TLS_KEY is {key!r} without REDIS_TLS_CERT, expected both or neither")
    for name in TLS_FILES:
        try:
            if given[name]:
                Path(given[name]).read_bytes()
        except OSError as error:
            raise SettingsError(f"{name} is {given[name]!r}, expected a readable file: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        if authorities:
            context.load_verify_locations(authorities)
    except ssl.SSLError as error:
        raise SettingsError(
            f"REDIS_TLS_CA is {authorities!r}, expected certificates in PEM: {error.reason or error}"
        ) from None
    try:
        if own:
            context.load_cert_chain(own, key or None, password="")  # without one, OpenSSL would ask the terminal
    except ssl.SSLError as error:
        raise SettingsError(
            f"REDIS_TLS_CERT is {own!r} and REDIS_TLS_KEY is {key!r}, expected a certificate and its key in PEM, "
            f"without a passphrase: {error.reason or error}"
        ) from None


def _server_name(fields: Mapping[str, Any]) -> str:
    """A directory a server, so that no journal is taken for that of another one, which would look emptied."""
    name = (
        fields["redis_sentinel_name"] if fields["redis_sentinels"] else f"{fields['redis_host']}_{fields['redis_port']}"
    )
    return "".join(char if char.isalnum() or char in "._-" else "_" for char in f"{name}_{fields['redis_db']}")


_SYSTEMD = ("CREDENTIALS_DIRECTORY", "STATE_DIRECTORY", "HOME")


def state_directory(environ: Mapping[str, str]) -> Path:
    """Where this program keeps files: what systemd gives it, else below the user's home."""
    given = environ.get("STATE_DIRECTORY", "").partition(":")[0]
    return Path(given) if given else Path(environ.get("HOME") or "/root") / ".local/state/quantum-governor"


def _credentials(environ: Mapping[str, str], wanted: Sequence[str]) -> dict[str, str]:
    """Secrets that systemd (LoadCredential=) put into files named like their variables."""
    directory = environ.get("CREDENTIALS_DIRECTORY")
    found: dict[str, str] = {}
    for row in TABLE if directory else ():
        file = Path(directory or "", row.name)
        if row.secret and row.name in wanted and file.exists():
            try:
                found[row.name] = file.read_text().strip()
            except (OSError, ValueError) as error:
                raise SettingsError(f"{row.name}: expected a readable text file {file}: {error}") from None
    return found


def base_url(url: str, *, allow_mainnet: bool) -> str:
    """A base URL that may be asked: an allow-listed host over https, or loopback.

    Raises:
        SettingsError: any other.
    """
    try:
        return check_base_url(url, allow_mainnet=allow_mainnet)
    except ValueError as error:
        raise SettingsError(f"BINANCE_BASE_URL is {error}") from None


def _read(row: Row, value: str) -> Any:
    try:
        return row.read(value)
    except ValueError as error:
        shown = "(hidden)" if row.secret else repr(value)
        raise SettingsError(f"{row.name} is {shown}, expected {error}") from None


def _masked(row: Row, value: str) -> str:
    return ("(set)" if value else "") if row.secret else value


def limits_file(name: str, path: str) -> dict[str, dict[str, str]]:
    """Limits of single symbols from a TOML file: by symbol, then by variable name. No path: none.

    Args:
        name: the variable or option that names the file, for the message.
        path: the file.

    Raises:
        SettingsError: it cannot be read, or holds something else.
    """
    if not path:
        return {}
    try:
        tables = tomllib.loads(Path(path).read_text(), parse_float=Decimal)
    except (OSError, ValueError) as error:
        raise SettingsError(f"{name} is {path!r}, expected a readable TOML file: {error}") from None
    found: dict[str, dict[str, str]] = {}
    for symbol, table in tables.items():
        if not isinstance(table, dict):
            raise SettingsError(f"{name} {path!r}: {symbol} = {table!r}, expected a table [SYMBOL]")
        if not _symbol(symbol):
            raise SettingsError(f"{name} {path!r}: [{symbol}] is no symbol, expected A-Z, 0-9 and _")
        found[symbol] = {name: str(value) for name, value in table.items()}
    return found


def _no_burst(rules: Policy) -> list[str]:
    return [
        f"GOV_MAX_EXEC_PER_5MIN is {limits.per_5min}{where}, not below GOV_MAX_EXEC_PER_HOUR ({limits.per_hour}): the "
        "hour's limit is met first, so a burst never disarms"
        for where, limits in (("", rules.limits), *((f" for {name}", one) for name, one in rules.by_symbol.items()))
        if limits.per_hour is not None and limits.per_5min is not None and limits.per_5min >= limits.per_hour
    ]


def _warnings(environ: Mapping[str, str], credentials: Mapping[str, str]) -> list[str]:
    found = [
        f"{name} is in the environment and a credential of the service: the credential is used"
        for name, value in credentials.items()
        if environ.get(name, value) != value
    ]
    given = {**environ, **credentials}
    if bool(given.get("BINANCE_TESTNET_API_KEY")) != bool(given.get("BINANCE_TESTNET_API_SECRET")):
        found.append(
            "only one of BINANCE_TESTNET_API_KEY and BINANCE_TESTNET_API_SECRET is set: the exchange is not asked, "
            "quantity limits decide"
        )
    tls = [name for name in TLS_FILES if given.get(name)]
    if tls and not policy.flag(given.get("REDIS_TLS", "false")):
        found.append(f"{tls[0]} is set and REDIS_TLS is false: nothing is encrypted")
    for name in sorted(environ):
        if name.startswith("GOV_") and name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0)
            found.append(f"{name} is no setting; did you mean {near[0]}?" if near else f"{name} is no setting")
    return found
