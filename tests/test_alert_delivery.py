"""How alerts reach their targets: retried, in nobody's way, and nothing of a URL is shown. Real HTTP and SMTP."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from governor.alerts import answers
from governor.alerts.delivery import Delivery, Message, Target
from governor.alerts.targets import Sending, targets_of, without
from governor.settings import SettingsError
from tests.daemon import wait_for
from tests.receivers import HttpReceiver, MailReceiver

ROOT = Path(__file__).resolve().parent.parent
AT_ONCE_S = (0.0,)


class Service:
    """Takes, refuses or hangs, as it is told."""

    def __init__(self) -> None:
        self.takes = True
        self.refuses: set[str] = set()
        self.tried: list[str] = []
        self.bodies: list[str] = []
        self.answers = threading.Event()
        self.answers.set()

    def send(self, title: str, body: str, _tone: str) -> str | None:
        self.tried.append(title)
        self.answers.wait(20)
        if not self.takes or title in self.refuses:
            return "refused"
        self.bodies.append(body)
        return None


@pytest.fixture
def service() -> Iterator[Service]:
    one = Service()
    yield one
    one.answers.set()


@contextmanager
def target_of(service: Service, **options: object) -> Iterator[tuple[Target, Counter[str]]]:
    counted: Counter[str] = Counter()

    def count(result: str) -> None:
        counted[result] += 1

    one = Target(Sending("1 Test", service.send), count, **({"back_off_s": AT_ONCE_S} | options))  # type: ignore[arg-type]
    try:
        yield one, counted
    finally:
        service.answers.set()
        one.close()
        one.join(5)


def message(title: str) -> Message:
    return Message(title, f"{title} happened\n", "failure")


def test_alerts_arrive_in_their_order(service: Service) -> None:
    with target_of(service) as (target, counted):
        for n in range(20):
            target.put(message(str(n)))
        wait_for(lambda: counted["sent"] == 20)
        assert service.tried == [str(n) for n in range(20)]
        assert target.waiting == 0


def test_what_is_not_taken_is_tried_again_until_it_is(service: Service) -> None:
    service.takes = False
    with target_of(service) as (target, counted):
        target.put(message("a"))
        wait_for(lambda: counted["failed"] >= 3)
        service.takes = True
        wait_for(lambda: counted["sent"] == 1)
        assert service.bodies == ["a happened\n"]
        assert target.waiting == 0


def test_attempts_come_later_and_later(service: Service) -> None:
    service.takes = False
    with target_of(service, back_off_s=(0.0, 0.0, 60.0)) as (target, counted):
        target.put(message("a"))
        wait_for(lambda: counted["failed"] == 3)
        target.put(message("b"))
        assert (target.waiting, service.tried) == (2, ["a", "a", "a"])
        target.close()  # ends the wait
        target.join(5)
        assert sorted(service.tried[3:]) == ["a", "b"]


def test_one_that_a_service_refuses_holds_up_no_other(service: Service) -> None:
    service.refuses = {"poison"}
    with target_of(service) as (target, counted):
        target.put(message("poison"))
        target.put(message("b"))
        target.put(message("c"))
        wait_for(lambda: counted["sent"] == 2)
        assert [title for title in service.tried if title != "poison"] == ["b", "c"]
        assert target.waiting == 1


def test_what_is_too_old_is_dropped_and_the_next_one_says_so(service: Service) -> None:
    service.takes = False
    with target_of(service, oldest_s=0.2) as (target, counted):
        target.put(message("a"))
        target.put(message("b"))
        wait_for(lambda: counted["dropped"] == 2)
        service.takes = True
        target.put(message("c"))
        target.put(message("d"))
        wait_for(lambda: counted["sent"] == 2)
        assert service.bodies == ["c happened\n2 alerts before this one did not arrive.\n", "d happened\n"]


def test_more_than_may_wait_drop_the_oldest(service: Service) -> None:
    service.answers.clear()
    with target_of(service, most=3) as (target, counted):
        target.put(message("under way"))
        wait_for(lambda: service.tried)
        for title in "abcd":
            target.put(message(title))
        assert (target.waiting, counted["dropped"]) == (3, 2)
        service.answers.set()
        wait_for(lambda: target.waiting == 0)
        assert service.bodies == [
            "under way happened\n", "c happened\n2 alerts before this one did not arrive.\n", "d happened\n",
        ]  # fmt: skip


def test_one_that_hangs_is_in_nobodys_way_and_the_end_does_not_wait_for_it(service: Service) -> None:
    other, counted = Service(), Counter[str]()
    service.answers.clear()
    delivery = Delivery(
        [Sending("1 A", service.send), Sending("2 B", other.send)], lambda result: counted.update([result])
    )
    for n in range(50):
        delivery.put(message(str(n)))
    wait_for(lambda: counted["sent"] == 50)
    assert len(other.tried) == 50
    assert len(service.tried) == 1
    assert delivery.waiting == 50
    began = time.monotonic()
    delivery.close(0.2)
    assert time.monotonic() - began < 2


def test_the_end_tries_what_is_left_once_more(service: Service) -> None:
    service.takes = False
    delivery = Delivery([Sending("1 A", service.send)], lambda _result: None)
    delivery.put(message("a"))
    delivery.put(message("b"))
    wait_for(lambda: service.tried)
    service.takes = True
    delivery.close(5)
    assert service.bodies == ["a happened\n", "b happened\n"]
    assert delivery.waiting == 0


# ---------------------------------------------------------------- targets


def test_a_message_arrives_by_http_and_mail_as_it_was_written() -> None:
    title, body = "[quantum@vps1] DISARMED: <b> & ü", "What: *it* _is_ <i>so</i> \\n\nDo: `governor status`\n"
    with HttpReceiver() as web, MailReceiver() as mail:
        for target in targets_of([web.url, mail.url]):
            assert target.send(title, body, "failure") is None
        (post,) = web.posts
        assert (post["title"], post["message"], post["type"]) == (title, body.strip(), "failure")
        assert [(to, subject) for to, subject, _ in mail.mails] == [
            (["a@ops.example"], title), (["b@ops.example"], title),
        ]  # fmt: skip
        assert {text.replace("\r\n", "\n").strip() for _, _, text in mail.mails} == {body.strip()}


@contextmanager
def endless(part: bytes, every_s: float) -> Iterator[tuple[str, list[int]]]:
    """A webhook that takes what comes, and whose answer has hardly an end: its URL, and the bytes it got rid of."""
    sent = [0]

    def answer() -> None:
        one, _ = listening.accept()
        with one, contextlib.suppress(OSError):
            one.recv(65_536)
            one.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
            until = time.monotonic() + 8
            while not over.wait(every_s) and sent[0] < 100_000_000 and time.monotonic() < until:
                one.sendall(part)
                sent[0] += len(part)

    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield f"json://127.0.0.1:{listening.getsockname()[1]}/x", sent
        finally:
            over.set()
            thread.join()


@pytest.mark.parametrize(("part", "every_s"), [(b"x" * 1_000_000, 0.0), (b"x", 0.01)])
def test_an_answer_without_an_end_is_read_no_further_than_it_takes(
    monkeypatch: pytest.MonkeyPatch, part: bytes, every_s: float
) -> None:
    monkeypatch.setattr(answers, "WITHIN_S", 0.5)
    with endless(part, every_s) as (url, sent):
        (target,) = targets_of([url])
        began = time.monotonic()
        assert target.send("a", "b", "info") is None
        assert time.monotonic() - began < 5
        assert 0 < sent[0] < 30_000_000


def test_a_target_is_called_by_its_place_and_its_service_and_its_secret_is_not_shown() -> None:
    with HttpReceiver() as web:
        web.status = 500
        _, target = targets_of(["tgram://123456789:abcdefg_hijklmnopqrstuvwxyz012345678/12345", web.url])
        error = target.send("a", "b", "info")
    assert target.name == "2 JSON"
    assert error is not None
    assert "500" in error
    assert "hunter2" not in error


@pytest.mark.parametrize("tone", ["failure", "warning", "success", "info"])
def test_every_tone_is_one_that_apprise_takes(tone: str) -> None:
    with HttpReceiver() as web:
        (target,) = targets_of([web.url])
        assert target.send("a", "b", tone) is None  # type: ignore[arg-type]
        assert web.posts[0]["type"] == tone


def test_an_answer_is_shown_without_any_piece_of_the_url() -> None:
    url = "https://user:p%40ssw0rd@hooks.example/T000/SECRETTOKEN?key=abcd1234"
    told = without("401 for https://user:p@ssw0rd@hooks.example/T000/SecretToken?key=abcd1234\nno", url)
    assert not any(secret in told.lower() for secret in ("ssw0rd", "secrettoken", "abcd1234", "t000"))
    assert told.startswith("401 for ")


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("json://user:a-b-c-d-e-f@127.0.0.1/x", "a-b-c-d-e-f"),
        ("mailtos://me:p%40s%2Fw1@mail.example", "p@s/w1"),
        ("mailtos://me:p%40s%2Fw1@mail.example", "p%40s%2Fw1"),
        ("tgram://123456:AAE-x_y-zz_QQ/99", "AAE-x_y-zz_QQ"),
        ("json://127.0.0.1/a?+X-Token=q1-w2-e3", "q1-w2-e3"),
    ],
)
def test_a_secret_of_short_pieces_is_hidden_as_a_whole(url: str, secret: str) -> None:
    assert without(f"refused: '{secret}' is wrong", url) == "refused: '…' is wrong"


@pytest.mark.parametrize("url", ["nosuch://host/topic", "tgram://x", "mailto://"])
def test_a_url_apprise_cannot_use_is_refused_by_its_number_and_not_shown(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        targets_of(["json://127.0.0.1/", url + "?hunter2"])
    assert "number 2 of 2" in str(caught.value)
    assert "hunter2" not in str(caught.value)


LOOKS_LIKE = {
    "BOT_TOKEN": "123456789:abcdefg_hijklmnopqrstuvwxyz012345678",
    "CHAT_ID": "12345",
    "TOKEN_A": "T1JJ3T3L2",
    "TOKEN_B": "A1BRTD4JD",
    "TOKEN_C": "TIiajkdnlazkcOXrIdevi7FQ",
    "WEBHOOK_ID": "1" * 18,
    "WEBHOOK_TOKEN": "a" * 64,
}
"""What services want in the places of an example's words."""


def test_every_url_the_page_about_alerts_shows_is_one_that_apprise_can_use() -> None:
    rows = (ROOT / "docs" / "alerting.md").read_text().partition("| where | URL |")[2].partition("\n\n")[0]
    urls = re.findall(r"`(\w+://[^`]+)`", rows)
    assert len(urls) == 8
    filled = [re.sub("[A-Z]+_[A-Z]+", lambda word: LOOKS_LIKE[word[0]], url) for url in urls]
    assert [target.name.split(" ", 1)[1] for target in targets_of(filled)] == [
        "Telegram", "Slack", "Discord", "ntfy", "ntfy", "E-Mail", "E-Mail", "JSON",
    ]  # fmt: skip


def test_an_upgrade_is_refused_where_the_daemon_would_not_start_with_its_alerts(tmp_path: Path) -> None:
    (tmp_path / "GOV_ALERT_URLS").write_text("tgram://hunter2\n")
    settings = tmp_path / "governor.env"
    settings.write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "governor.deploying", "check", "--offline", settings],
        env={"CREDENTIALS_DIRECTORY": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 78
    assert "GOV_ALERT_URLS is (hidden)" in done.stderr
    assert "hunter2" not in done.stderr


def test_without_apprise_the_setting_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apprise", None)
    with pytest.raises(
        SettingsError, match=r"GOV_ALERT_URLS is set, expected .* pip install 'quantum-governor\[alerts\]'"
    ):
        targets_of(["json://127.0.0.1/"])
    assert targets_of([]) == []


@pytest.mark.parametrize("module", ["governor.daemon", "governor.cli", "governor.doctor"])
def test_nothing_of_apprise_is_imported_where_no_alerts_are_sent(module: str) -> None:
    look = f"import {module}, sys; from governor.alerts.targets import targets_of; targets_of(()); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True).stdout.split()
    assert {"apprise", "requests", "yaml", "markdown"}.isdisjoint(loaded)


def test_sending_leaves_no_thread_that_a_process_would_wait_for() -> None:
    look = (
        "import threading; from governor.alerts.targets import targets_of\n"
        "(one,) = targets_of(['json://127.0.0.1:9/'])\n"
        "assert one.send('a', 'b', 'info') is not None\n"
        "print(len(threading.enumerate()))"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("1\n", "")
