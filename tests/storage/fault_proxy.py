"""A proxy in front of a storage server that does what networks and servers do on bad days."""

import http.client
import random
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# 500, 503 and expired (403) are answers without asking the server; lost: the server does what it
# should, but the answer is an error; cut: the connection breaks in the middle of the answer; slow:
# the answer comes late; hang: it does not come.


class FaultProxy(ThreadingHTTPServer):
    """Passes requests on, with faults: drawn at `rate`, or those of `script` first.

    Attributes:
        requests: how many there were.
        script: faults of the next requests whose method and path `matches`.
        count: fault -> how often it was done.
    """

    daemon_threads = True

    def __init__(self, target, rate=0.0, kinds=("500", "503", "lost", "cut", "slow"), seed=0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(target)
        self.rate, self.kinds, self.random = rate, kinds, random.Random(seed)
        self.script: list[str] = []
        self.matches = lambda method, path: True
        self.count: dict[str, int] = {}
        self.requests = 0
        self.mutex = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self, method, path):
        with self.mutex:
            fault = None
            self.requests += 1
            if self.script and self.matches(method, path):
                fault = self.script.pop(0)
            elif self.rate and self.random.random() < self.rate:
                fault = self.random.choice(self.kinds)
            if fault:
                self.count[fault] = self.count.get(fault, 0) + 1
            return fault

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A connection that was cut on purpose is no error of the proxy's."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    server: FaultProxy

    def log_message(self, *_):
        pass

    def _pass(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.next_fault(self.command, self.path)
        if fault in ("500", "503"):
            self._answer(int(fault), [], b"<Error><Code>SlowDown</Code></Error>")
            return
        if fault == "expired":
            text = b"<Error><Code>ExpiredToken</Code><Message>It has expired.</Message></Error>"
            self._answer(403, [], text)
            return
        if fault == "hang":
            time.sleep(30)
            self._break()
            return
        target = self.server.target
        onward = http.client.HTTPConnection(target.hostname, target.port, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "connection"}
        onward.request(self.command, self.path, body, headers)
        reply = onward.getresponse()
        data = reply.read()
        kept = [(k, v) for k, v in reply.getheaders() if k.lower() not in _OWN]
        length = reply.getheader("Content-Length")
        onward.close()
        if fault == "lost":
            self._answer(503, [], b"<Error><Code>SlowDown</Code></Error>")
        elif fault == "cut":
            self._answer(reply.status, kept, data[: len(data) // 2], len(data) or 1)
            self._break()
        else:
            if fault == "slow":
                time.sleep(0.3)
            head = length if self.command == "HEAD" else None
            self._answer(reply.status, kept, data, head)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass

    def _answer(self, status, headers, data, length=None):
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            self.wfile.write(data)
        self.wfile.flush()

    def _break(self):
        # Without lingering, closing sends a reset.
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.connection.close()
        self.close_connection = True


_OWN = ("connection", "transfer-encoding", "content-length", "server", "date")
