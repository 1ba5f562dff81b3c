"""A local server that speaks the chat-completions protocol, and fails in the ways real ones do."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[list[dict[str, str]]], Any]
"""Messages to a text; to an `int` (a status without a body), `bytes` (a body that is no completion) or a
`float` (seconds of silence before the connection is closed)."""


class JudgeServer(ThreadingHTTPServer):
    """Remembers requests and answers with `answer(messages)`."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.requests: list[dict[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body | {"path": self.path, "key": self.headers.get("Authorization")})
        answer = self.server.answer(body["messages"])
        if isinstance(answer, float):
            time.sleep(answer)
            return
        if isinstance(answer, int):
            self._send(answer, b"", "text/plain")
        elif isinstance(answer, bytes):
            self._send(200, answer, "application/json" if answer.startswith(b"{") else "text/html")
        else:
            message = {"role": "assistant", "content": answer}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            whole = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": choices}
            self._send(200, json.dumps(whole).encode(), "application/json")

    def _send(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def serving(answer: Answer) -> Iterator[JudgeServer]:
    """A running server."""
    with JudgeServer(answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
