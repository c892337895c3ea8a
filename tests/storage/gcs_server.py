"""Google Cloud Storage for tests: the part of its JSON API that tensorstore's driver speaks.

The emulators that packages bring do not honour conditions on the upload that tensorstore makes
(uploadType=media), which is what locks rest on. So this one: get (whole, ranges, conditions on the
generation), media upload with conditions, delete with conditions, list with pages, buckets that are
not there (404) and tokens that are not valid (401). In memory, on loopback.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 100  # Google's is 1,000; small, so that lists do have pages.


class GcsServer(ThreadingHTTPServer):
    """Serves buckets; used as a context manager."""

    daemon_threads = True

    def __init__(self, *buckets: str, token: str | None = None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, dict[str, tuple[int, bytes]]] = {name: {} for name in buckets}
        self.token, self.mutex, self.generation = token, threading.Lock(), 1000
        self.requests = 0
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that went away is no error of the server's."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet
    server: GcsServer

    def log_message(self, *_):
        pass

    def _reply(self, code, body=b"", headers=()):
        self.send_response(code)
        for name, value in headers:
            self.send_header(name, value)
        if code not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if code not in (204, 304):
            self.wfile.write(body)

    def _error(self, code, message):
        self._reply(code, json.dumps({"error": {"code": code, "message": message}}).encode())

    def _parse(self):
        parts = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        path = parts.path.removeprefix("/upload").removeprefix("/storage/v1/b/")
        bucket, _, rest = path.partition("/o")
        self.bucket, self.key = unquote(bucket), unquote(rest.removeprefix("/"))
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        self.server.requests += 1
        token = self.server.token
        if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
            self._error(401, "Invalid Credentials")
            return False
        if self.bucket not in self.server.objects:
            self._error(404, "The specified bucket does not exist.")
            return False
        return True

    def _unmet(self, generation):
        """The status of a condition that is not met; 0 if all are."""
        match, differ = self.query.get("ifGenerationMatch"), self.query.get("ifGenerationNotMatch")
        if match is not None and int(match) != generation:
            return 412
        return 304 if differ is not None and int(differ) == generation else 0

    def do_GET(self):
        if not self._parse():
            return
        objects = self.server.objects[self.bucket]
        if not self.key:
            self._list(objects)
            return
        with self.server.mutex:
            generation, data = objects.get(self.key, (0, b""))
        unmet = self._unmet(generation)
        if unmet or not generation:
            self._error(unmet or 404, f"No such object: {self.bucket}/{self.key}")
            return
        headers = [("x-goog-generation", str(generation))]
        if self.query.get("alt") != "media":
            about = {"name": self.key, "generation": str(generation), "size": str(len(data))}
            self._reply(200, json.dumps(about).encode(), headers)
            return
        wanted = self.headers.get("Range")
        if wanted is None:
            self._reply(200, data, headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, len(data) - int(last))
        stop = min(len(data), int(last) + 1) if first and last else len(data)
        if start >= len(data):
            self._reply(416, b"", [("Content-Range", f"bytes */{len(data)}")])
            return
        headers.append(("Content-Range", f"bytes {start}-{stop - 1}/{len(data)}"))
        self._reply(206, data[start:stop], headers)

    def _list(self, objects):
        with self.server.mutex:
            names = sorted(objects)
        token = self.query.get("pageToken")
        start = bytes.fromhex(token).decode() if token else self.query.get("startOffset", "")
        end = self.query.get("endOffset")
        prefix = self.query.get("prefix", "")
        names = [n for n in names if n >= start and n.startswith(prefix) and not (end and n >= end)]
        page = {"items": [{"name": name, "size": "1"} for name in names[:PAGE]]}
        if len(names) > PAGE:
            # tensorstore sends it back as it is: a "+" of a name would come as a space.
            page["nextPageToken"] = names[PAGE].encode().hex()
        self._reply(200, json.dumps(page).encode())

    def do_POST(self):
        if not self._parse():
            return
        if self.query.get("uploadType") != "media":
            self._error(400, f"uploadType {self.query.get('uploadType')} is not served here")
            return
        objects, name = self.server.objects[self.bucket], self.query["name"]
        with self.server.mutex:
            unmet = self._unmet(objects.get(name, (0, b""))[0])
            if not unmet:
                self.server.generation += 1
                generation = self.server.generation
                objects[name] = (generation, self.body)
        if unmet:
            self._error(412, "At least one of the pre-conditions you specified did not hold.")
            return
        self._reply(200, json.dumps({"name": name, "generation": str(generation)}).encode())

    def do_DELETE(self):
        if not self._parse():
            return
        objects = self.server.objects[self.bucket]
        with self.server.mutex:
            there = objects.get(self.key, (0, b""))[0]
            unmet = self._unmet(there)
            if not unmet and there:
                del objects[self.key]
        if unmet or not there:
            self._error(unmet or 404, "No such object, or a condition that did not hold.")
            return
        self._reply(204)
