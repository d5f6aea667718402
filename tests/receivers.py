"""Where alerts arrive: real HTTP and SMTP servers on loopback, which can also refuse and hang."""

from __future__ import annotations

import json
import threading
from email import message_from_bytes
from email.policy import default
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from aiosmtpd.controller import Controller

from tests.daemon import wait_for
from tests.servers import _free_port


class HttpReceiver:
    """A webhook as `json://` calls it.

    Attributes:
        posts: what was posted, also where it was refused.
        status: what it answers.
    """

    def __init__(self) -> None:
        self.posts: list[dict[str, Any]] = []
        self.status = 200
        self._answers = threading.Event()
        self._answers.set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._answers.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """As GOV_ALERT_URLS has it; its last part is a secret."""
        return f"json://127.0.0.1:{self._server.server_port}/hooks/hunter2"

    @property
    def titles(self) -> list[str]:
        return [str(post["title"]) for post in self.posts]

    def hang(self) -> None:
        """Take what comes, and answer nothing until the end."""
        self._answers.clear()

    def told(self, *words: str, within_s: float = 10.0) -> dict[str, Any]:
        """Wait for a post whose title has these words behind account and host; the last one."""

        def found() -> list[dict[str, Any]]:
            return [post for post in self.posts if all(word in post["title"].partition("] ")[2] for word in words)]

        return wait_for(found, within_s=within_s, what=f"an alert with {words} among {self.titles}")[-1]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.posts.append(json.loads(body))
                receiver._answers.wait(30)
                try:
                    self.send_response(receiver.status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                except OSError:  # whoever asked is gone
                    pass

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name it has there
                pass

        return Handler


class MailReceiver:
    """A mail server that keeps what it is given.

    Attributes:
        mails: recipients, subject and text of each.
    """

    def __init__(self) -> None:
        self.mails: list[tuple[list[str], str, str]] = []
        self._controller = Controller(self, hostname="127.0.0.1", port=_free_port())

    def __enter__(self) -> Self:
        self._controller.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._controller.stop()

    @property
    def url(self) -> str:
        """As GOV_ALERT_URLS has it, two recipients with a comma between them."""
        return f"mailto://127.0.0.1:{self._controller.port}?from=governor@vps.example&to=a@ops.example,b@ops.example&format=text"

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802 - the name it has there
        mail = message_from_bytes(envelope.content, policy=default)
        body = mail.get_body(("plain",))
        self.mails.append((list(envelope.rcpt_tos), str(mail["Subject"]), body.get_content() if body else ""))
        return "250 OK"
