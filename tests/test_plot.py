"""The what-if as a picture: drawn without a display, the same each time, and refused clearly where it cannot be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from governor.outcome import Outcome
from governor.plot import PlotUnavailableError, check_target, plot
from governor.whatif import WhatIf
from tests.spec import HOUR, MINUTE, market
from tests.test_whatif import Past, burst

SVG = "{http://www.w3.org/2000/svg}"


def outcome(past: Past | None = None, **overrides: str) -> Outcome:
    it = WhatIf(overrides or {"GOV_MAX_EXEC_PER_5MIN": "5"})
    it.feed((past or burst()).events)
    return it.finish()


def texts(path: Path) -> list[str]:
    return ["".join(each.itertext()).strip() for each in ET.parse(path).iter(f"{SVG}text")]  # noqa: S314 - our own


def test_a_picture_names_settings_panels_limits_units_states_and_the_time_zone(tmp_path: Path) -> None:
    plot(outcome(GOV_MAX_EXEC_PER_5MIN="5", GOV_MAX_TOTAL_NOTIONAL_PER_DAY_USD="9000"), tmp_path / "w.svg")
    found = texts(tmp_path / "w.svg")
    assert {
        "all symbols: notional of the UTC day", "BTCUSDT: notional of the UTC day", "USD", "time (UTC)", "recorded",
        "what if", "limit recorded off", "limit what if 9,000", "limit 5,000", "ARMED", "THROTTLED", "DISARMED",
    } <= set(found)  # fmt: skip
    assert any("GOV_MAX_EXEC_PER_5MIN=5" in text for text in found)


def test_states_are_told_apart_by_more_than_colour(tmp_path: Path) -> None:
    plot(outcome(), tmp_path / "w.svg")
    hatches = list(ET.parse(tmp_path / "w.svg").iter(f"{SVG}pattern"))  # noqa: S314 - our own
    assert len(hatches) >= 2


def test_a_png_is_one_and_is_large_enough_to_read(tmp_path: Path) -> None:
    path = tmp_path / "W.PNG"
    plot(outcome(), path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") == 1650


@pytest.mark.parametrize("name", ["w.svg", "w.png"])
def test_the_same_outcome_gives_the_same_bytes(tmp_path: Path, name: str) -> None:
    found = []
    for directory in ("a", "b"):
        (tmp_path / directory).mkdir()
        plot(outcome(), tmp_path / directory / name)
        found.append((tmp_path / directory / name).read_bytes())
    assert found[0] == found[1]


def test_a_symbol_that_was_never_priced_shows_its_quantity(tmp_path: Path) -> None:
    past = Past(credentials="false").plans("p1", close_qty="0.015")
    plot(outcome(past, GOV_MAX_REDUCE_QTY_PER_DAY="0.03"), tmp_path / "w.svg")
    found = texts(tmp_path / "w.svg")
    assert {"BTCUSDT: quantity of the UTC day", "base units", "limit recorded 0.02", "limit what if 0.03"} <= set(found)


def test_a_limit_far_above_all_that_was_moved_is_named_and_not_drawn(tmp_path: Path) -> None:
    past = Past().plans("p1", every=MINUTE, market=market("0.001", "1000"))
    plot(outcome(past, GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD="1000000"), tmp_path / "w.svg")
    found = texts(tmp_path / "w.svg")
    assert "limit what if 1,000,000" in found
    assert {"0.4", "0.6"} <= set(found)  # the axes still show what was moved: 0.75 USD


def test_a_history_without_events_and_one_of_an_instant_can_be_drawn(tmp_path: Path) -> None:
    plot(WhatIf({}).finish(), tmp_path / "empty.svg")
    plot(outcome(Past()), tmp_path / "instant.svg")
    assert "what if nothing changed" in texts(tmp_path / "empty.svg")
    assert "ARMED" in texts(tmp_path / "instant.svg")


def test_a_long_history_makes_a_picture_of_bounded_size(tmp_path: Path) -> None:
    past = Past(GOV_MAX_EXEC_PER_HOUR="off", GOV_MAX_EXEC_PER_5MIN="off", GOV_MAX_REDUCE_NOTIONAL_PER_DAY_USD="off")
    past.plans(*(f"p{i}" for i in range(1500)), every=HOUR // 4, market=market("0.001", "1000"))
    it = outcome(past, GOV_MAX_EXEC_PER_HOUR="1")
    assert all(len(panel.recorded) < 2000 for panel in it.series.panels)
    plot(it, tmp_path / "w.svg")
    assert (tmp_path / "w.svg").stat().st_size < 2_000_000


@pytest.mark.parametrize("name", ["w.pdf", "w", "svg", "w.svg.gz"])
def test_any_other_kind_of_file_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"expected a name ending in \.svg or \.png"):
        plot(outcome(), tmp_path / name)
    assert not (tmp_path / name).exists()


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotUnavailableError, match=r"the extra 'plot': pip install '\.\[plot\]'"):
        check_target(Path("w.svg"))


def test_nothing_imports_matplotlib_before_something_is_drawn() -> None:
    code = "import sys, governor.plot, governor.whatif; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
