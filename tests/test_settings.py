from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from governor import policy
from governor.policy import Limits, Policy
from governor.settings import NAMES, TABLE, TLS_FILES, Settings, SettingsError, base_url, load, load_for_stop

DEFAULTS: dict[str, str] = {
    "REDIS_HOST": "localhost",
    "REDIS_PORT": "6379",
    "REDIS_DB": "0",
    "REDIS_USERNAME": "",
    "REDIS_PASSWORD": "",
    "REDIS_TLS": "false",
    "REDIS_SENTINELS": "",
    "REDIS_SENTINEL_NAME": "mymaster",
    "GOV_REQUIRE_DURABLE": "false",
    "GOV_DURABILITY_ATTESTED": "false",
    "GOV_KEY_PREFIX": "quantum",
    "GOV_MAX_EXEC_PER_HOUR": "3",
    "GOV_MAX_EXEC_PER_5MIN": "2",
    "GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD": "5000",
    "GOV_MAX_REDUCE_QTY_PER_DAY": "0.02",
    "GOV_MAX_TOTAL_NOTIONAL_PER_DAY_USD": "off",
    "GOV_LIMITS_FILE": "",
    "GOV_KILL_SCORE_CRITICAL": "0.8",
    "GOV_MAX_PLAN_AGE_SEC": "60",
    "GOV_PERMIT_TTL_SEC": "60",
    "GOV_FALLBACK_QTY": "",
    "GOV_ENABLE_AUTO_DISARM": "true",
    "GOV_DISARM_ON_BURST_BREACH": "true",
    "GOV_DISARM_ON_UNPERMITTED_EXECUTION": "true",
    "GOV_DISARM_ON_ERROR_COUNT": "5",
    "GOV_ERROR_WINDOW_SEC": "3600",
    "GOV_THROTTLE_COOLDOWN_SEC": "300",
    "GOV_THROTTLE_MAX_EXEC_PER_5MIN": "1",
    "APPLY_CONFIG_PATH": "/etc/quantum/apply-layer.env",
    "APPLY_SERVICE": "quantum-apply-layer.service",
    "BINANCE_TESTNET_API_KEY": "",
    "BINANCE_TESTNET_API_SECRET": "",
    "BINANCE_BASE_URL": "https://testnet.binancefuture.com",
    "BINANCE_TIMEOUT_SEC": "2",
    "GOV_ALLOW_MAINNET": "false",
    "GOV_AUDIT_KEY": "",
    "METRICS_HOST": "127.0.0.1",
    "METRICS_PORT": "8044",
    "DASHBOARD_HOST": "127.0.0.1",
    "DASHBOARD_PORT": "8045",
    "DASHBOARD_BEHIND_PROXY": "false",
    "GOV_LOG_FORMAT": "",
    "GOV_LOG_LEVEL": "INFO",
    "GOV_JOURNAL_FSYNC": "interval",
    "GOV_LEASE_SEC": "3",
}
"""The contract's names and what they are when nobody sets them."""
LIMITS = (
    "GOV_MAX_EXEC_PER_HOUR",
    "GOV_MAX_EXEC_PER_5MIN",
    "GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD",
    "GOV_MAX_REDUCE_QTY_PER_DAY",
)
MAY_BE_OFF = (
    *LIMITS,
    "GOV_MAX_TOTAL_NOTIONAL_PER_DAY_USD",
    "GOV_KILL_SCORE_CRITICAL",
    "GOV_MAX_PLAN_AGE_SEC",
    "GOV_DISARM_ON_ERROR_COUNT",
    "GOV_THROTTLE_MAX_EXEC_PER_5MIN",
)
MAY_BE_EMPTY = (
    *("REDIS_USERNAME", "REDIS_PASSWORD", "GOV_LIMITS_FILE", "GOV_FALLBACK_QTY", "BINANCE_TESTNET_API_KEY"),
    *("BINANCE_TESTNET_API_SECRET", "GOV_AUDIT_KEY", "GOV_LOG_FORMAT", "REDIS_SENTINELS", "GOV_ARCHIVE_DIR"),
    "GOV_JOURNAL_DIR",
    "GOV_DISARM_SOCKET",
    *("GOV_ALERT_URLS", "GOV_ALERT_LINK"),
    "DASHBOARD_TOKEN_FILE",
    "DASHBOARD_ALLOWED_HOSTS",
    *TLS_FILES,
)
SECRETS = ("REDIS_PASSWORD", "BINANCE_TESTNET_API_KEY", "BINANCE_TESTNET_API_SECRET", "GOV_AUDIT_KEY", "GOV_ALERT_URLS")
ALERTS = {"GOV_ALERT_URLS": "json://127.0.0.1/", "GOV_ALERT_LINK": "https://ops.example/"}


def wrong(name: str, value: str) -> str:
    """The message a value is refused with."""
    with pytest.raises(SettingsError) as caught:
        load({name: value})
    return str(caught.value)


def in_policy(settings: Settings, name: str) -> Any:
    """What a decision sees of a variable."""
    if name in policy.SYMBOL_NAMES:
        return getattr(settings.policy.limits, policy.SYMBOL_NAMES[name][0])
    return getattr(settings.policy, policy.NAMES[name][0])


# ---------------------------------------------------------------- defaults


def test_every_setting_of_the_contract_is_there_once_with_its_default() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert {row.name: row.default for row in TABLE if row.name in DEFAULTS} == DEFAULTS


def test_defaults_of_the_environment_and_of_a_decision_are_the_same() -> None:
    of_policy = {name: text for name, text in policy.DEFAULTS.items() if name != "credentials"}
    assert {row.name: row.default for row in TABLE if row.name in of_policy} == of_policy
    assert load({}).policy == Policy() == policy.from_texts({})


def test_every_row_belongs_to_a_field_or_to_the_policy_and_says_what_it_is_for() -> None:
    for row in TABLE:
        assert (row.field is None) == (row.name in policy.DEFAULTS), row.name
        assert row.help, row.name


def test_without_any_variable_everything_has_its_default() -> None:
    settings = load({})
    assert (settings.redis_host, settings.redis_port, settings.redis_db) == ("localhost", 6379, 0)
    assert (settings.redis_username, settings.redis_password, settings.redis_tls) == ("", "", False)
    assert (settings.redis_sentinels, settings.redis_sentinel_name) == ((), "mymaster")
    assert (settings.require_durable, settings.durability_attested) == (False, False)
    assert (settings.key_prefix, settings.audit_key, settings.limits_file) == ("quantum", "", "")
    assert settings.apply_config_path == Path("/etc/quantum/apply-layer.env")
    assert settings.apply_service == "quantum-apply-layer.service"
    assert (settings.metrics_host, settings.metrics_port, settings.symbol_labels) == ("127.0.0.1", 8044, 200)
    assert (settings.dashboard_host, settings.dashboard_port) == ("127.0.0.1", 8045)
    assert (settings.dashboard_token_file, settings.dashboard_allowed_hosts) == (None, ())
    assert not settings.dashboard_behind_proxy
    assert (settings.base_url, settings.binance_timeout_s) == ("https://testnet.binancefuture.com", 2.0)
    assert settings.awake_s == 0.05
    assert (settings.api_key, settings.api_secret, settings.credentials) == ("", "", False)
    assert (settings.allow_mainnet, settings.log_format, settings.log_level) == (False, "", "INFO")
    assert (settings.warnings, settings.symbol_texts) == ((), {})


def test_every_variable_reaches_its_field(tmp_path: Path) -> None:
    file = tmp_path / "limits.toml"
    file.write_text("")
    settings = load(
        {
            "REDIS_HOST": "redis.internal",
            "REDIS_PORT": "6380",
            "REDIS_DB": "7",
            "REDIS_USERNAME": "governor",
            "REDIS_PASSWORD": "word",
            "REDIS_TLS": "TRUE",
            "REDIS_SENTINELS": "one:26379,10.0.0.2:26380,[::1]:1",
            "REDIS_SENTINEL_NAME": "bot",
            "GOV_REQUIRE_DURABLE": "True",
            "GOV_DURABILITY_ATTESTED": "true",
            "GOV_KEY_PREFIX": "{quantum}",
            "GOV_LIMITS_FILE": str(file),
            "APPLY_CONFIG_PATH": "/tmp/x.env",  # noqa: S108 - nothing is written there
            "APPLY_SERVICE": "another.service",
            "BINANCE_TESTNET_API_KEY": "k",
            "BINANCE_TESTNET_API_SECRET": "s",
            "BINANCE_BASE_URL": "https://fapi.binance.com/",
            "BINANCE_TIMEOUT_SEC": "0.25",
            "BINANCE_AWAKE_MS": "7",
            "GOV_ALLOW_MAINNET": "True",
            "GOV_AUDIT_KEY": "audit",
            "METRICS_HOST": "0.0.0.0",  # noqa: S104 - nothing listens
            "METRICS_PORT": "0",
            "DASHBOARD_HOST": "::1",
            "DASHBOARD_PORT": "0",
            "DASHBOARD_TOKEN_FILE": "/nowhere/token",
            "DASHBOARD_ALLOWED_HOSTS": "Bot.example.org, [fd00::1]",
            "DASHBOARD_BEHIND_PROXY": "true",
            "GOV_METRICS_MAX_SYMBOLS": "3",
            "GOV_LOG_FORMAT": "JSON",
            "GOV_LOG_LEVEL": "debug",
        }
    )
    assert (settings.redis_host, settings.redis_port, settings.redis_db) == ("redis.internal", 6380, 7)
    assert (settings.redis_username, settings.redis_password, settings.redis_tls) == ("governor", "word", True)
    assert settings.redis_sentinels == (("one", 26379), ("10.0.0.2", 26380), ("::1", 1))
    assert settings.redis_sentinel_name == "bot"
    assert (settings.require_durable, settings.durability_attested) == (True, True)
    assert (settings.key_prefix, settings.audit_key, settings.limits_file) == ("{quantum}", "audit", str(file))
    assert settings.apply_config_path == Path("/tmp/x.env")  # noqa: S108 - nothing is written there
    assert settings.apply_service == "another.service"
    assert (settings.metrics_host, settings.metrics_port, settings.symbol_labels) == ("0.0.0.0", 0, 3)  # noqa: S104
    assert (settings.dashboard_host, settings.dashboard_port) == ("::1", 0)
    assert settings.dashboard_token_file == Path("/nowhere/token")
    assert settings.dashboard_allowed_hosts == ("bot.example.org", "[fd00::1]")
    assert settings.dashboard_behind_proxy
    assert (settings.base_url, settings.binance_timeout_s) == ("https://fapi.binance.com", 0.25)
    assert settings.awake_s == 0.007
    assert (settings.api_key, settings.api_secret, settings.credentials) == ("k", "s", True)
    assert (settings.allow_mainnet, settings.log_format, settings.log_level) == (True, "json", "DEBUG")
    assert settings.policy.credentials


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("GOV_MAX_EXEC_PER_HOUR", "7", 7),
        ("GOV_MAX_EXEC_PER_5MIN", "100000", 100_000),
        ("GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD", "12500.50", Decimal("12500.5")),
        ("GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD", "1e4", Decimal(10_000)),
        ("GOV_MAX_REDUCE_QTY_PER_DAY", "0.00000001", Decimal("0.00000001")),
        ("GOV_MAX_TOTAL_NOTIONAL_PER_DAY_USD", "9000", Decimal(9000)),
        ("GOV_KILL_SCORE_CRITICAL", "0.95", Decimal("0.95")),
        ("GOV_MAX_PLAN_AGE_SEC", "0.5", 500_000),
        ("GOV_PERMIT_TTL_SEC", "30", 30_000_000),
        ("GOV_FALLBACK_QTY", "0.001", Decimal("0.001")),
        ("GOV_ENABLE_AUTO_DISARM", "False", False),
        ("GOV_DISARM_ON_BURST_BREACH", "false", False),
        ("GOV_DISARM_ON_UNPERMITTED_EXECUTION", "FALSE", False),
        ("GOV_DISARM_ON_ERROR_COUNT", "1", 1),
        ("GOV_ERROR_WINDOW_SEC", "60", 60_000_000),
        ("GOV_THROTTLE_COOLDOWN_SEC", "1.5", 1_500_000),
        ("GOV_THROTTLE_MAX_EXEC_PER_5MIN", "0", 0),
    ],
)
def test_every_variable_of_a_decision_reaches_the_policy(name: str, text: str, value: object) -> None:
    settings = load({name: text})
    assert in_policy(settings, name) == value
    assert settings.texts[name] == settings.effective[name] == text


# ---------------------------------------------------------------- wrong values


@pytest.mark.parametrize(
    ("name", "values", "allowed"),
    [
        ("REDIS_HOST", ["a b", ""], "a name without spaces"),
        ("REDIS_PORT", ["0", "65536", "-1", "6379.0", "six", "+1", "\uff11"], "a whole number from 1 to 65535"),
        ("REDIS_DB", ["-1", "x", "1000001"], "a whole number from 0 to 1000000"),
        ("REDIS_TLS", ["yes", "1", "on", " true"], "true or false"),
        (
            "REDIS_SENTINELS",
            ["one", "one:", ":26379", "one:0", "one:26379,", "one:26379, two:26379", "one:26379;two:26379", "a b:1"],
            "host:port, several separated by commas",
        ),
        ("REDIS_SENTINEL_NAME", ["", "a b"], "a name without spaces"),
        ("GOV_REQUIRE_DURABLE", ["yes", "1"], "true or false"),
        ("GOV_DURABILITY_ATTESTED", ["yes", "1"], "true or false"),
        ("GOV_KEY_PREFIX", ["", "a b", "a\n"], "a name without spaces"),
        (
            "GOV_MAX_EXEC_PER_HOUR",
            ["-1", "1.5", "3.0", "OFF", "none", "100001"],
            "a whole number from 0 to 100000 or off",
        ),
        ("GOV_MAX_EXEC_PER_5MIN", ["two", "2 "], "a whole number from 0 to 100000 or off"),
        (
            "GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD",
            ["-1", "NaN", "inf", "5,000", "5_000", "$1"],
            "a number of at least 0 or off",
        ),
        ("GOV_MAX_REDUCE_QTY_PER_DAY", ["-0.01", "1e400", "x"], "a number of at least 0 or off"),
        ("GOV_MAX_TOTAL_NOTIONAL_PER_DAY_USD", ["-1", "unlimited"], "a number of at least 0 or off"),
        ("GOV_KILL_SCORE_CRITICAL", ["-0.1", "high"], "a number of at least 0 or off"),
        ("GOV_MAX_PLAN_AGE_SEC", ["-1", "86401", "1m"], "seconds from 0 to 86400 or off"),
        ("GOV_PERMIT_TTL_SEC", ["1", "3601", "off", "NaN"], "seconds from 2 to 3600"),
        ("GOV_FALLBACK_QTY", ["0", "-1", "off", "x"], "a number"),
        ("GOV_ENABLE_AUTO_DISARM", ["no", "0"], "true or false"),
        ("GOV_DISARM_ON_BURST_BREACH", ["no", "0"], "true or false"),
        ("GOV_DISARM_ON_UNPERMITTED_EXECUTION", ["no", "0"], "true or false"),
        ("GOV_DISARM_ON_ERROR_COUNT", ["-1", "1001", "5.0"], "a whole number from 0 to 1000 or off"),
        ("GOV_ERROR_WINDOW_SEC", ["0", "86401", "off"], "seconds from 1 to 86400"),
        ("GOV_THROTTLE_COOLDOWN_SEC", ["0", "86401", "off"], "seconds from 1 to 86400"),
        ("GOV_THROTTLE_MAX_EXEC_PER_5MIN", ["-1", "x"], "a whole number from 0 to 100000 or off"),
        ("APPLY_CONFIG_PATH", ["", "apply.env", "~/apply.env"], "an absolute path"),
        ("APPLY_SERVICE", ["", "a b.service", "-x"], "the name of a systemd unit"),
        ("BINANCE_BASE_URL", ["", "x", "https://example.com"], "https://testnet.binancefuture.com"),
        ("BINANCE_TIMEOUT_SEC", ["0", "0.04", "61", "off"], "seconds from 0.05 to 60"),
        ("BINANCE_AWAKE_MS", ["-1", "1001", "0.5"], "a whole number from 0 to 1000"),
        ("GOV_ALLOW_MAINNET", ["yes", "1"], "true or false"),
        ("METRICS_HOST", ["", "a b"], "a name without spaces"),
        ("METRICS_PORT", ["-1", "65536", "http"], "a whole number from 0 to 65535"),
        ("DASHBOARD_HOST", ["", "a b"], "a name without spaces"),
        ("DASHBOARD_PORT", ["-1", "65536", "http"], "a whole number from 0 to 65535"),
        ("DASHBOARD_TOKEN_FILE", ["token", "~/token"], "an absolute path"),
        ("DASHBOARD_ALLOWED_HOSTS", ["a b", "one,,two", "host:8045"], "host names without a port"),
        ("DASHBOARD_BEHIND_PROXY", ["", "yes"], "true or false"),
        ("GOV_METRICS_MAX_SYMBOLS", ["0", "100001"], "a whole number from 1 to 100000"),
        ("GOV_LOG_FORMAT", ["xml"], "one of empty, json, console"),
        ("GOV_LOG_LEVEL", ["", "TRACE", "20"], "one of DEBUG, INFO, WARNING, ERROR"),
    ],
)
def test_a_wrong_value_names_the_variable_the_value_and_what_is_allowed(
    name: str, values: list[str], allowed: str
) -> None:
    for value in values:
        message = wrong(name, value)
        assert message.startswith(f"{name} is {value!r}, expected {allowed}"), value
        assert "\n" not in message


@pytest.mark.parametrize("name", [row.name for row in TABLE if row.name not in MAY_BE_EMPTY])
def test_an_empty_value_is_an_error_and_not_the_default(name: str) -> None:
    assert wrong(name, "").startswith(f"{name} is '', expected ")


@pytest.mark.parametrize("name", MAY_BE_EMPTY)
def test_where_empty_means_none_it_may_be_given_so(name: str) -> None:
    assert load({name: ""}) == load({})


@pytest.mark.parametrize("name", MAY_BE_OFF)
def test_off_switches_a_limit_off(name: str) -> None:
    assert in_policy(load({name: "off"}), name) is None


@pytest.mark.parametrize("name", MAY_BE_OFF)
def test_zero_means_none_allowed_and_not_off(name: str) -> None:
    value = in_policy(load({name: "0"}), name)
    assert value == 0
    assert value is not None


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_shown_nowhere(name: str) -> None:
    settings = load({name: "json://hunter2"})
    assert settings.effective[name] == "(set)"
    assert load({}).effective[name] == ""
    assert "hunter2" not in repr(
        (settings.effective, settings.texts, settings.policy, settings.warnings, settings.digest)
    )


def test_secrets_are_marked_as_such() -> None:
    assert {row.name for row in TABLE if row.secret} == set(SECRETS)


def test_effective_settings_are_the_texts_as_given() -> None:
    effective = load({"GOV_MAX_EXEC_PER_HOUR": "07", "GOV_LOG_LEVEL": "debug"}).effective
    assert tuple(effective) == NAMES
    assert (effective["GOV_MAX_EXEC_PER_HOUR"], effective["GOV_LOG_LEVEL"]) == ("07", "debug")
    assert effective["REDIS_PORT"] == "6379"


@pytest.mark.parametrize(
    ("key", "secret", "there"), [("k", "s", True), ("k", "", False), ("", "s", False), ("", "", False)]
)
def test_credentials_are_both_or_none(key: str, secret: str, there: bool) -> None:  # noqa: FBT001
    settings = load({"BINANCE_TESTNET_API_KEY": key, "BINANCE_TESTNET_API_SECRET": secret})
    assert settings.credentials == settings.policy.credentials == there
    assert settings.texts["credentials"] == str(there).lower()


# ---------------------------------------------------------------- unknown names


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("GOV_MAX_EXEC_PER_HOURS", "GOV_MAX_EXEC_PER_HOUR"),
        ("GOV_ENABLE_AUTODISARM", "GOV_ENABLE_AUTO_DISARM"),
        ("GOV_PERMIT_TTL", "GOV_PERMIT_TTL_SEC"),
        ("GOV_max_plan_age_sec", "GOV_MAX_PLAN_AGE_SEC"),
    ],
)
def test_an_unknown_name_is_warned_about_with_the_nearest_known_one(name: str, nearest: str) -> None:
    settings = load({name: "1"})
    assert settings.warnings == (f"{name} is no setting; did you mean {nearest}?",)
    assert settings.policy == Policy()


def test_every_unknown_name_is_warned_about_and_names_of_others_are_not() -> None:
    warnings = load(
        {"GOV_ZZZ": "", "GOV_AAA": "1", "PATH": "/bin", "HOME": "/", "REDIS_URL": "x", "GOVERNMENT": "x"}
    ).warnings
    assert [warning.split()[0] for warning in warnings] == ["GOV_AAA", "GOV_ZZZ"]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TLS_FILES])
def test_a_known_name_is_not_warned_about(name: str) -> None:
    value = (DEFAULTS | ALERTS).get(
        name, "/x" if name.endswith(("_DIR", "_SOCKET", "_FILE")) and name != "GOV_LIMITS_FILE" else "200"
    )
    assert load({name: value}).warnings == ()


# ---------------------------------------------------------------- limits of single symbols


def with_file(tmp_path: Path, content: str | bytes, **more: str) -> Settings:
    file = tmp_path / "limits.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load({"GOV_LIMITS_FILE": str(file)} | more)


def test_a_symbol_has_limits_of_its_own_and_the_accounts_for_the_rest(tmp_path: Path) -> None:
    settings = with_file(
        tmp_path,
        """
        [DOGEUSDT]
        GOV_MAX_REDUCE_QTY_PER_DAY = 250000
        GOV_MAX_EXEC_PER_HOUR = "off"

        [BTCUSDT_261225]
        GOV_MAX_EXEC_PER_5MIN = 0
        """,
        GOV_MAX_EXEC_PER_5MIN="4",
    )
    assert settings.policy.of("DOGEUSDT") == Limits(per_hour=None, per_5min=4, qty_per_day=Decimal(250_000))
    assert settings.policy.of("BTCUSDT_261225") == Limits(per_5min=0)
    assert settings.policy.of("BTCUSDT") == settings.policy.limits == Limits(per_5min=4)
    assert settings.symbol_texts["DOGEUSDT"] == {"GOV_MAX_REDUCE_QTY_PER_DAY": "250000", "GOV_MAX_EXEC_PER_HOUR": "off"}


@pytest.mark.parametrize("name", LIMITS)
def test_every_limit_of_a_symbol_may_stand_in_the_file_quoted_or_not(tmp_path: Path, name: str) -> None:
    plain, quoted = (with_file(tmp_path, f"[BTCUSDT]\n{name} = {text}") for text in ("7", '"7"'))
    assert plain.policy == quoted.policy
    assert plain.digest == quoted.digest
    assert getattr(plain.policy.of("BTCUSDT"), policy.SYMBOL_NAMES[name][0]) == 7


def test_numbers_of_the_file_keep_every_digit(tmp_path: Path) -> None:
    settings = with_file(tmp_path, "[A]\nGOV_MAX_REDUCE_QTY_PER_DAY = 12345678901234567.12345678\n")
    assert settings.policy.of("A").qty_per_day == Decimal("12345678901234567.12345678")


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert with_file(tmp_path, "# none yet\n").policy == load({}).policy


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[BTCUSDT]\nGOV_MAX_EXEC_PER_HOUR = -1", "limits of BTCUSDT: GOV_MAX_EXEC_PER_HOUR is '-1', expected a whole"),
        ("[BTCUSDT]\nGOV_MAX_EXEC_PER_HOUR = ''", "limits of BTCUSDT: GOV_MAX_EXEC_PER_HOUR is '', expected a whole"),
        ("[BTCUSDT]\nGOV_MAX_EXEC_PER_HOUR = true", "GOV_MAX_EXEC_PER_HOUR is 'True', expected a whole number"),
        ("[BTCUSDT]\nGOV_MAX_REDUCE_QTY_PER_DAY = nan", "expected a number of at least 0 or off"),
        ("[BTCUSDT]\nGOV_MAX_REDUCE_QTY_PER_DAY = [1]", "expected a number of at least 0 or off"),
        ("[BTCUSDT]\nMAX_EXEC = 1", "'MAX_EXEC' is no limit, expected one of GOV_MAX_EXEC_PER_HOUR, "),
        ("[BTCUSDT]\nGOV_KILL_SCORE_CRITICAL = 1", "'GOV_KILL_SCORE_CRITICAL' is no limit, expected one of "),
        ("GOV_MAX_EXEC_PER_HOUR = 1", "expected a table [SYMBOL]"),
        ("[btcusdt]\nGOV_MAX_EXEC_PER_HOUR = 1", "[btcusdt] is no symbol"),
        ("['BTC-USDT']\nGOV_MAX_EXEC_PER_HOUR = 1", "[BTC-USDT] is no symbol"),
        ("[BTCUSDT", "expected a readable TOML file"),
        ("[BTCUSDT]\n[BTCUSDT]", "expected a readable TOML file"),
        (b"\xff\xfe", "expected a readable TOML file"),
    ],
)
def test_a_limits_file_that_cannot_be_used_says_where_and_why(
    tmp_path: Path, content: str | bytes, problem: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        with_file(tmp_path, content)
    assert problem in str(caught.value)


@pytest.mark.parametrize("path", ["missing.toml", "."])
def test_a_limits_file_that_cannot_be_read_is_an_error(tmp_path: Path, path: str) -> None:
    message = wrong("GOV_LIMITS_FILE", str(tmp_path / path))
    assert message.startswith(f"GOV_LIMITS_FILE is {str(tmp_path / path)!r}, expected a readable TOML file: ")


# ---------------------------------------------------------------- the exchange's address


@pytest.mark.parametrize(
    ("url", "used"),
    [
        ("https://testnet.binancefuture.com", "https://testnet.binancefuture.com"),
        ("https://testnet.binancefuture.com/", "https://testnet.binancefuture.com"),
        ("https://testnet.binancefuture.com:443", "https://testnet.binancefuture.com:443"),
        ("HTTPS://TestNet.BinanceFuture.com", "https://testnet.binancefuture.com"),
        ("https://demo-fapi.binance.com", "https://demo-fapi.binance.com"),
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080"),
        ("http://localhost:8080/", "http://localhost:8080"),
        ("https://localhost", "https://localhost"),
        ("http://[::1]:8080", "http://[::1]:8080"),
        ("http://[::1]", "http://[::1]"),
    ],
)
def test_testnets_and_loopback_may_be_asked(url: str, used: str) -> None:
    assert base_url(url, allow_mainnet=False) == base_url(url, allow_mainnet=True) == used
    assert load({"BINANCE_BASE_URL": url}).base_url == used


@pytest.mark.parametrize(
    "url",
    [
        "",
        "testnet.binancefuture.com",
        "//testnet.binancefuture.com",
        "http://testnet.binancefuture.com",
        "ftp://testnet.binancefuture.com",
        "file://localhost/etc/passwd",
        "https://testnet.binancefuture.com.",
        "https://testnet.binancefuture.com:8443",
        "https://testnet.binancefuture.com:",
        "https://testnet.binancefuture.com:0443",
        "https://testnet.binancefuture.com:99999",
        "https://testnet.binancefuture.com:x",
        "https://testnet.binancefuture.com/fapi",
        "https://testnet.binancefuture.com/?x=1",
        "https://testnet.binancefuture.com/#x",
        "https://testnet.binancefuture.com\\@evil.com",
        "https://evil.com\\testnet.binancefuture.com",
        "https://user@testnet.binancefuture.com",
        "https://user:word@testnet.binancefuture.com",
        "https://:word@testnet.binancefuture.com",
        "https://@testnet.binancefuture.com",
        "https://testnet.binancefuture.com@evil.com",
        "https://testnet.binancefuture.com:443@evil.com",
        "https://evil.com/testnet.binancefuture.com",
        "https://evil.com#testnet.binancefuture.com",
        "https://xtestnet.binancefuture.com",
        "https://x.testnet.binancefuture.com",
        "https://testnet.binancefuture.com.evil.com",
        "https://testnet.binancefuture。com",
        "https://testnet%2ebinancefuture.com",
        "https://binancefuture.com",
        "https://api.binance.com",
        "https://fapi.binance.com.evil.com",
        "https://fapi.binance.com@evil.com",
        "https://evil.com@fapi.binance.com",
        "http://fapi.binance.com",
        "https://fapi.binance.com:80",
        "http://127.0.0.1.evil.com",
        "http://127.1",
        "http://0.0.0.0",
        "http://localhost.",
        "http://localhost.evil.com",
        "http://user@localhost",
        "http://[::1].evil.com",
        "http://evil.com[::1]",
        "http://[::1%25eth0]",
        "http://[::1",
        "http://[::]",
        "http://[::ffff:127.0.0.1]",
        "http://2130706433",
        "https://",
        "https://testnet .binancefuture.com",
    ],
)
def test_no_other_address_may_be_asked_not_even_with_the_mainnet_allowed(url: str) -> None:
    for allow_mainnet in (False, True):
        with pytest.raises(SettingsError) as caught:
            base_url(url, allow_mainnet=allow_mainnet)
        message = str(caught.value)
        assert message.startswith("BINANCE_BASE_URL is '")
        assert ", expected https://testnet.binancefuture.com, " in message


@pytest.mark.parametrize(
    "url", ["https://fapi.binance.com", "https://FAPI.binance.com/", "https://fapi.binance.com:443"]
)
def test_the_mainnet_needs_the_switch(url: str) -> None:
    assert "https://fapi.binance.com needs GOV_ALLOW_MAINNET=true" in wrong("BINANCE_BASE_URL", url)
    settings = load({"BINANCE_BASE_URL": url, "GOV_ALLOW_MAINNET": "true"})
    assert settings.base_url.startswith("https://fapi.binance.com")


def test_the_switch_alone_does_not_lead_to_the_mainnet() -> None:
    assert load({"GOV_ALLOW_MAINNET": "true"}).base_url == "https://testnet.binancefuture.com"


# ---------------------------------------------------------------- the digest


def test_the_digest_of_the_same_settings_is_the_same() -> None:
    settings = load({})
    backwards = dict(reversed(settings.texts.items()))
    assert load({"PATH": "/bin"}).digest == policy.digest(backwards, {}) == settings.digest
    assert len(settings.digest) == 16


CHANGES = {
    "GOV_MAX_EXEC_PER_HOUR": "4",
    "GOV_MAX_EXEC_PER_5MIN": "off",
    "GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD": "5001",
    "GOV_MAX_REDUCE_QTY_PER_DAY": "0.03",
    "GOV_MAX_TOTAL_NOTIONAL_PER_DAY_USD": "1",
    "GOV_KILL_SCORE_CRITICAL": "0.9",
    "GOV_MAX_PLAN_AGE_SEC": "61",
    "GOV_PERMIT_TTL_SEC": "61",
    "GOV_FALLBACK_QTY": "1",
    "GOV_ENABLE_AUTO_DISARM": "false",
    "GOV_DISARM_ON_BURST_BREACH": "false",
    "GOV_DISARM_ON_UNPERMITTED_EXECUTION": "false",
    "GOV_DISARM_ON_ERROR_COUNT": "6",
    "GOV_ERROR_WINDOW_SEC": "3601",
    "GOV_THROTTLE_COOLDOWN_SEC": "301",
    "GOV_THROTTLE_MAX_EXEC_PER_5MIN": "2",
}


def test_every_variable_of_a_decision_changes_the_digest() -> None:
    assert CHANGES.keys() == policy.DEFAULTS.keys() - {"credentials"}
    digests = {load({name: value}).digest for name, value in CHANGES.items()}
    credentials = load({"BINANCE_TESTNET_API_KEY": "k", "BINANCE_TESTNET_API_SECRET": "s"}).digest
    assert len({load({}).digest, credentials, *digests}) == len(CHANGES) + 2


def test_limits_of_a_symbol_change_the_digest(tmp_path: Path) -> None:
    digests = {
        with_file(tmp_path, f"[{symbol}]\nGOV_MAX_EXEC_PER_HOUR = {limit}").digest
        for symbol in ("BTCUSDT", "ETHUSDT")
        for limit in (1, 2)
    }
    assert len({load({}).digest, *digests}) == 5


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in policy.DEFAULTS and "BINANCE_TESTNET" not in name]
)
def test_no_other_variable_changes_the_digest(tmp_path: Path, name: str) -> None:
    other = {"GOV_LIMITS_FILE": "", "GOV_LOG_LEVEL": "ERROR", "BINANCE_BASE_URL": "https://demo-fapi.binance.com"}
    switched = {
        "REDIS_TLS": "true",
        "GOV_ALLOW_MAINNET": "true",
        "GOV_LOG_FORMAT": "json",
        "GOV_JOURNAL_FSYNC": "always",
    }
    switched |= {"REDIS_SENTINELS": "one:1", "GOV_REQUIRE_DURABLE": "true", "GOV_DURABILITY_ATTESTED": "true"}
    switched |= dict.fromkeys(("APPLY_CONFIG_PATH", "GOV_ARCHIVE_DIR", "GOV_JOURNAL_DIR", "GOV_DISARM_SOCKET"), "/x")
    switched |= {"DASHBOARD_TOKEN_FILE": "/x", "DASHBOARD_BEHIND_PROXY": "true"}
    switched |= dict.fromkeys(TLS_FILES, "/x") | ALERTS
    assert load({name: (other | switched).get(name, "17")}).digest == load({}).digest


def test_what_is_recorded_of_the_settings_decides_the_same_again(tmp_path: Path) -> None:
    settings = with_file(tmp_path, '[BTCUSDT]\nGOV_MAX_EXEC_PER_HOUR = "off"', **CHANGES)
    assert policy.from_texts(settings.texts, settings.symbol_texts) == settings.policy
    assert policy.digest(settings.texts, settings.symbol_texts) == settings.digest


# -- secrets as files ----------------------------------------------------------------------------------------------


def test_a_secret_may_be_a_credential_of_the_service_and_that_one_is_used(tmp_path: Path) -> None:
    (tmp_path / "GOV_AUDIT_KEY").write_text("from the file\n")
    (tmp_path / "GOV_MAX_EXEC_PER_HOUR").write_text("9")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    settings = load(environ)
    assert (settings.audit_key, settings.effective["GOV_AUDIT_KEY"], settings.warnings) == (
        "from the file",
        "(set)",
        (),
    )
    assert settings.policy.limits.per_hour == 3, "only secrets are read from there"
    both = load(environ | {"GOV_AUDIT_KEY": "left over"})
    assert both.audit_key == "from the file"
    (warning,) = both.warnings
    assert warning.startswith("GOV_AUDIT_KEY is in the environment and a credential of the service")
    assert load_for_stop(environ).audit_key == "from the file"


def test_exchange_credentials_may_come_as_files_and_one_alone_is_told(tmp_path: Path) -> None:
    (tmp_path / "BINANCE_TESTNET_API_KEY").write_text("k")
    (tmp_path / "BINANCE_TESTNET_API_SECRET").write_text("s")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert load(environ).credentials
    assert load(environ).warnings == ()
    (tmp_path / "BINANCE_TESTNET_API_SECRET").unlink()
    assert "only one of" in load(environ).warnings[0]


def test_a_credential_that_cannot_be_read_names_variable_and_file(tmp_path: Path) -> None:
    (tmp_path / "GOV_AUDIT_KEY").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match=f"GOV_AUDIT_KEY.*{tmp_path}"):
        load({"CREDENTIALS_DIRECTORY": str(tmp_path)})


def test_no_other_credential_keeps_a_person_from_stopping(tmp_path: Path) -> None:
    (tmp_path / "GOV_AUDIT_KEY").write_text("key")
    (tmp_path / "GOV_ALERT_URLS").write_text("no URL at all")
    (tmp_path / "BINANCE_TESTNET_API_KEY").write_bytes(b"\xff\xfe")
    assert load_for_stop({"CREDENTIALS_DIRECTORY": str(tmp_path)}).audit_key == "key"


def test_alerts_go_to_urls_with_spaces_or_lines_between_them(tmp_path: Path) -> None:
    (tmp_path / "GOV_ALERT_URLS").write_text("ntfy://ntfy.sh/one,two\n\nmailto://u:p@mail.example?to=a@b.cc,d@e.ff\n")
    settings = load({"CREDENTIALS_DIRECTORY": str(tmp_path), "GOV_ALERT_AFTER_SEC": "2.5"})
    assert settings.alert_urls == ("ntfy://ntfy.sh/one,two", "mailto://u:p@mail.example?to=a@b.cc,d@e.ff")
    assert settings.effective["GOV_ALERT_URLS"] == "(set)"
    assert settings.alert_after_s == 2.5
    assert load({}).alert_urls == ()


@pytest.mark.parametrize("value", ["ntfy.sh/topic", "ntfy://", " ", "json://a secret", "json://gehe\u00efm"])
def test_what_is_no_url_for_alerts_is_refused_without_being_shown(value: str) -> None:
    assert wrong("GOV_ALERT_URLS", value).startswith("GOV_ALERT_URLS is (hidden), expected URLs as apprise writes them")


@pytest.mark.parametrize("value", ["ops.example", "ftp://ops.example", "https://", "https://ops example"])
def test_a_link_for_alerts_is_an_address_of_the_web(value: str) -> None:
    assert wrong("GOV_ALERT_LINK", value).startswith(f"GOV_ALERT_LINK is {value!r}, expected an address")


def test_files_are_kept_where_systemd_says_else_below_the_users_home() -> None:
    assert load({"STATE_DIRECTORY": "/var/lib/g:/var/lib/h"}).archive_dir == Path("/var/lib/g/archive")
    assert load({"HOME": "/home/anna"}).archive_dir == Path("/home/anna/.local/state/quantum-governor/archive")
    given = load({"STATE_DIRECTORY": "/var/lib/g", "GOV_ARCHIVE_DIR": "/srv/archive"})
    assert given.archive_dir == Path("/srv/archive")
    assert given.effective["GOV_ARCHIVE_DIR"] == "/srv/archive"


def test_a_stop_by_hand_finds_the_server_the_daemon_is_on() -> None:
    environ = {name: "true" if name == "REDIS_TLS" else "17" for name in NAMES if name.startswith("REDIS_")}
    environ |= {"REDIS_SENTINELS": "one:26379", "GOV_KEY_PREFIX": "{bot}", **dict.fromkeys(TLS_FILES, "/x")}
    whole, stopping = load(environ, stopping=True), load_for_stop(environ | {"GOV_MAX_EXEC_PER_HOUR": "wrong"})
    for row in TABLE:
        if row.name.startswith("REDIS_") or row.name == "GOV_KEY_PREFIX":
            assert row.field is not None
            assert getattr(stopping, row.field) == getattr(whole, row.field) != getattr(load({}), row.field), row.name


def test_a_journal_belongs_to_one_server_unless_its_place_is_given() -> None:
    here = {"STATE_DIRECTORY": "/var/lib/g"}
    assert load(here).journal_dir == Path("/var/lib/g/journal/localhost_6379_0")
    assert load(here | {"REDIS_HOST": "::1", "REDIS_DB": "2"}).journal_dir == Path("/var/lib/g/journal/__1_6379_2")
    watched = here | {"REDIS_SENTINELS": "a:1,b:2", "REDIS_SENTINEL_NAME": "main"}
    assert load(watched).journal_dir == Path("/var/lib/g/journal/main_0")
    given = load(here | {"GOV_JOURNAL_DIR": "/srv/journal"})
    assert (given.journal_dir, given.effective["GOV_JOURNAL_DIR"]) == (Path("/srv/journal"), "/srv/journal")


@pytest.mark.parametrize(
    ("hour", "burst", "warned"),
    [("3", "2", False), ("3", "3", True), ("3", "5", True), ("off", "5", False), ("3", "off", False)],
)
def test_a_burst_limit_that_can_never_be_met_is_warned_about(hour: str, burst: str, warned: bool) -> None:  # noqa: FBT001
    warnings = load({"GOV_MAX_EXEC_PER_HOUR": hour, "GOV_MAX_EXEC_PER_5MIN": burst}).warnings
    assert any("a burst never disarms" in warning for warning in warnings) == warned
