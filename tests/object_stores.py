"""An S3 server on this machine (moto, over HTTP), and a proxy before it that injects faults.

    store = FaultyStore()
    store.rules.append(Rule("PUT", "part-000001.parquet", "lose reply"))

Actions of a rule:

    lose reply         the request is served, and the connection closed without a reply
    conflict           409 ConditionalRequestConflict; nothing is stored
    unavailable        503 SlowDown; nothing is stored
    flip               one bit of the body is flipped on its way to the store
    ignore condition   the request is served without its condition
    unknown condition  501 NotImplemented, where the request has a condition
    forbid             403 AccessDenied
    kill before        `kill` is called, and the request is not served
    kill after         the request is served, `kill` is called, and there is no reply
"""

from __future__ import annotations

import http.client
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

CONDITIONS = ("if-none-match", "if-match")
ERRORS = {
    "conflict": (409, "ConditionalRequestConflict"),
    "unavailable": (503, "SlowDown"),
    "unknown condition": (501, "NotImplemented"),
    "forbid": (403, "AccessDenied"),
}
TIMEOUT_S = 60


@dataclass
class Rule:
    """A fault of some requests.

    Attributes:
        method: Of the requests.
        name: How their keys end.
        action: See above.
        times: Requests to hit.
        skip: Requests to let pass before.
    """

    method: str
    name: str
    action: str
    times: int = 1
    skip: int = 0


@dataclass
class FaultyStore:
    """A bucket behind a proxy.

    Attributes:
        bucket: Its name.
        port: The port of the proxy.
        rules: The faults.
        kill: Ends the client, for rules that kill.
        requests: Method, key and status of every request served, None without a reply.
    """

    bucket: str
    port: int
    rules: list[Rule] = field(default_factory=list)
    kill: Callable[[], None] | None = None
    requests: list[tuple[str, str, int | None]] = field(default_factory=list)
    killed: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        """Return the URL of the bucket."""
        return f"s3://{self.bucket}"

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that lead a client to the proxy."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }

    def action_on(self, method: str, key: str, has_condition: bool) -> str | None:
        """Return the action on a request, and count it."""
        with self.lock:
            for rule in self.rules:
                needs = rule.action in ("ignore condition", "unknown condition", "conflict")
                if method != rule.method or not key.endswith(rule.name):
                    continue
                if (needs and not has_condition) or rule.times == 0:
                    continue
                if rule.skip:
                    rule.skip -= 1
                    continue
                rule.times -= 1
                return rule.action
        return None


@contextmanager
def s3_server() -> Iterator[int]:
    """Run an S3 server, and yield its port."""
    from moto.server import ThreadedMotoServer
    from werkzeug.serving import WSGIRequestHandler

    # Otherwise a reply in two packets takes 40 ms.
    WSGIRequestHandler.disable_nagle_algorithm = True

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@contextmanager
def faulty_store(bucket: str, server_port: int) -> Iterator[FaultyStore]:
    """Create a bucket, and run a proxy before its server."""
    request(server_port, "PUT", f"/{bucket}", b"", {})
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
    proxy.daemon_threads = True
    store = FaultyStore(bucket, proxy.server_address[1])
    vars(proxy).update(store=store, upstream=server_port)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield store
    proxy.shutdown()
    proxy.server_close()
    thread.join()


def request(
    port: int, method: str, path: str, body: bytes, headers: dict[str, str]
) -> tuple[int, list[tuple[str, str]], bytes]:
    """Send a request, and return status, headers and body of the reply."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request(method, path, body, headers)
        reply = connection.getresponse()
        return reply.status, reply.getheaders(), reply.read()
    finally:
        connection.close()


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    # one packet for headers and body
    wbufsize = -1

    def log_message(self, *arguments: Any) -> None:
        pass

    def _serve(self) -> None:
        store: FaultyStore = vars(self.server)["store"]
        key = self.path.partition("?")[0].removeprefix(f"/{store.bucket}/")
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = dict(self.headers.items())
        has_condition = any(name.lower() in CONDITIONS for name in headers)
        action = store.action_on(self.command, key, has_condition)
        if action in ERRORS:
            status, code = ERRORS[action]
            self._reply(status, [], f"<Error><Code>{code}</Code></Error>".encode())
            store.requests.append((self.command, key, status))
            return
        if action == "kill before":
            self._kill(store)
            return
        if action == "flip":
            middle = len(body) // 2
            body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]
        if action == "ignore condition":
            headers = {
                name: value for name, value in headers.items() if name.lower() not in CONDITIONS
            }
        upstream: int = vars(self.server)["upstream"]
        status, reply_headers, content = request(upstream, self.command, self.path, body, headers)
        if action == "kill after":
            self._kill(store)
            return
        if action == "lose reply":
            store.requests.append((self.command, key, None))
            self.close_connection = True
            return
        store.requests.append((self.command, key, status))
        self._reply(status, reply_headers, content)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _serve  # noqa: N815 - names of http.server

    def _kill(self, store: FaultyStore) -> None:
        assert store.kill is not None
        store.kill()
        store.killed.set()
        self.close_connection = True

    def _reply(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        left_out = ("connection", "transfer-encoding", "content-length")
        for name, value in headers:
            if name.lower() not in left_out:
                self.send_header(name, value)
        length = {name.lower(): value for name, value in headers}.get("content-length")
        self.send_header(
            "content-length", length if self.command == "HEAD" and length else str(len(content))
        )
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
