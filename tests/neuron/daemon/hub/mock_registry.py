"""A registry that speaks the part of the Hugging Face API that a snapshot download uses."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


class MockRegistry:
    """Serves `files` of `repo`. Faults are scripted through attributes; `requests` collects "METHOD path"."""

    def __init__(self, repo: str, files: dict[str, bytes]) -> None:
        self.repo = repo
        self.files = files
        self.token: str | None = None
        self.status: int | None = None
        self.cut_once: dict[str, int] = {}
        self.sent_instead: dict[str, bytes] = {}
        self.stalls: dict[str, int] = {}
        """Files that come so far and then no further, until `released` is set or the server stops."""
        self.released = threading.Event()
        self.is_hub = False  # then it lists hashes, as the public hub does
        self.lies: dict[str, object] = {}
        """Members of the listing that are other than they should be."""
        self.etags: dict[str, str] = {}
        self.endless: dict[str, bytes] = {}
        """Paths whose answer repeats these bytes until whoever asked has had enough; no length is announced."""
        self.num_sent = 0
        self.redirects: dict[str, str] = {}
        self.requests: list[str] = []
        self.ranges: list[str] = []
        registry = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                registry._answer(self, with_body=False)

            def do_GET(self) -> None:
                registry._answer(self, with_body=True)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def fetched(self) -> list[str]:
        """Files whose content was asked for."""
        prefix = f"GET /{self.repo}/resolve/{SHA}/"
        return [line.removeprefix(prefix) for line in self.requests if line.startswith(prefix)]

    def _answer(self, request: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.requests.append(f"{request.command} {path}")
        if path in self.redirects:
            return self._send(request, 302, b"", with_body, {"location": self.redirects[path]})
        if with_body and path in self.endless:
            return self._send_without_end(request, self.endless[path])
        if self.status is not None:
            return self._send(request, self.status, b"{}", with_body)
        if self.token is not None and request.headers.get("authorization") != f"Bearer {self.token}":
            return self._send(request, 401, b'{"error": "who are you"}', with_body)
        if path == f"/api/models/{self.repo}":
            siblings = [self._sibling(name, data) for name, data in self.files.items()]
            listing = {"id": self.repo, "sha": SHA, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}
            return self._send(request, 200, json.dumps(listing | self.lies).encode(), with_body)
        name = path.removeprefix(f"/{self.repo}/resolve/{SHA}/")
        if name not in self.files:
            headers = {"x-error-code": "EntryNotFound" if path.startswith(f"/{self.repo}/") else "RepoNotFound"}
            return self._send(request, 404, b"{}", with_body, headers)
        data = self.files[name]
        headers = {"etag": f'"{self._etag(name, data)}"', "x-repo-commit": SHA, "accept-ranges": "bytes"}
        data = self.sent_instead.get(name, data)
        range_header = request.headers.get("range")
        if with_body and range_header:
            self.ranges.append(range_header)
            start = int(range_header.removeprefix("bytes=").split("-")[0])
            headers["content-range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self._send(request, 206, data[start:], with_body, headers)
        if with_body and name in self.stalls:
            request.send_response(200)
            request.send_header("content-length", str(len(data)))
            for key, value in headers.items():
                request.send_header(key, value)
            request.end_headers()
            request.wfile.write(data[: self.stalls[name]])
            request.wfile.flush()
            self.released.wait()
            request.close_connection = True
            return None
        if with_body and name in self.cut_once:
            request.send_response(200)
            request.send_header("content-length", str(len(data)))
            for key, value in headers.items():
                request.send_header(key, value)
            request.end_headers()
            request.wfile.write(data[: self.cut_once.pop(name)])
            request.wfile.flush()
            request.close_connection = True
            return None
        return self._send(request, 200, data, with_body, headers)

    def _send_without_end(self, request: BaseHTTPRequestHandler, part: bytes) -> None:
        request.send_response(self.status or 200)
        request.end_headers()
        request.close_connection = True
        with contextlib.suppress(OSError):
            while not self.released.is_set():
                request.wfile.write(part)
                self.num_sent += len(part)

    def _etag(self, name: str, data: bytes) -> str:
        if name in self.etags:
            return self.etags[name]
        if self.is_hub and name.endswith(".safetensors"):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data if self.is_hub else data).hexdigest()

    def _sibling(self, name: str, data: bytes) -> dict[str, object]:
        sibling: dict[str, object] = {"rfilename": name, "size": len(data)}
        if self.is_hub:
            sibling["blobId"] = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            if name.endswith(".safetensors"):
                sibling["lfs"] = {"sha256": self._etag(name, data), "size": len(data), "pointerSize": 134}
        return sibling

    @staticmethod
    def _send(
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        with_body: bool,
        headers: dict[str, str] | None = None,
    ) -> None:
        request.send_response(status)
        for key, value in (headers or {}).items():
            request.send_header(key, value)
        request.send_header("content-type", "application/json")
        request.send_header("content-length", str(len(body)))
        request.end_headers()
        if with_body:
            request.wfile.write(body)
