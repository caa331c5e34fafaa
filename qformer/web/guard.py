"""What stands before the page: only its routes, no file but uploads, no request too large, nothing from another host."""

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

FILE, JOIN = "/gradio_api/file=", "/gradio_api/queue/join"
EXACT = {"/", "/config", "/config/", "/theme.css", "/gradio_api/theme.css", "/favicon.ico", "/gradio_api/app_id",
         "/gradio_api/info", "/gradio_api/startup-events", "/gradio_api/upload", "/gradio_api/upload_progress",
         JOIN, "/gradio_api/queue/data", "/gradio_api/queue/status", "/gradio_api/cancel",
         "/gradio_api/reset", "/gradio_api/reset/"}  # fmt: skip
BEGINNINGS = ("/assets/", "/static/", "/gradio_api/heartbeat/", FILE)
FORM_BYTES = 1_000_000  # of what the page sends beside uploads, and around one
# The browser too refuses what is not from here; Gradio's scripts are written into the page.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
# Gradio's template names itself for other sites, a manifest that is not served, and addresses as examples for programs.
FOREIGN = re.compile(
    rb'<(?:meta|link)\b[^>]*(?:property|name|rel)="(?:og:|twitter:|manifest)[^>]*>|https://[\w.]+/gradio-app/[\w./-]+'
)


class Guard:
    """The application behind a list of what the page needs; everything else is 404.

    Args:
        uploads: the folder that files are served from, links followed.
        max_bytes: of an upload.
    """

    def __init__(self, application: Application, uploads: Path, max_bytes: int):
        self.application, self.uploads, self.max_bytes = application, uploads.resolve(), max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.application(scope, receive, send)
            return
        status = 404 if scope["type"] != "http" else self.refusal(scope)
        if status is None and scope["path"] == JOIN:
            body = await _whole_body(receive)
            receive = _again(body, receive)
            status = None if self.names_uploads_alone(body) else 403
        if status is not None:
            await _refuse(scope, send, status)
        elif scope["path"] == "/":
            plain = [(key, value) for key, value in scope["headers"] if key != b"accept-encoding"]
            await self.application({**scope, "headers": plain}, receive, _Page(send))
        else:
            await self.application(scope, receive, _with_headers(send))

    def refusal(self, scope: Scope) -> int | None:
        """The status of a request that is not passed on; None for one that is."""
        path = scope["path"]
        if path not in EXACT and not path.startswith(BEGINNINGS):
            return 404
        if path.startswith(FILE) and not self._is_upload(path.removeprefix(FILE)):
            return 404
        if scope["method"] in ("GET", "HEAD"):
            return None
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return 411
        most = FORM_BYTES + (self.max_bytes if path == "/gradio_api/upload" else 0)
        return 413 if int(length) > most else None

    def names_uploads_alone(self, body: bytes) -> bool:
        """Whether every file that a form names was uploaded: Gradio would copy any file of this machine for one that was not."""
        try:
            parts = [json.loads(body)]
        except (ValueError, RecursionError):
            return False
        while parts:
            part = parts.pop()
            if isinstance(part, dict):
                if "path" in part and part["path"] is not None and not self._is_upload(part["path"]):
                    return False
                parts.extend(part.values())
            elif isinstance(part, list):
                parts.extend(part)
        return True

    def _is_upload(self, name: Any) -> bool:
        try:
            path = Path(name).resolve()
            return name.startswith("/") and path.is_relative_to(self.uploads) and path.is_file()
        except (OSError, TypeError, ValueError):  # a name too long, with a zero byte, or none
            return False


class _Page:
    """Sends on the page's HTML once it is whole, without its references to other hosts."""

    def __init__(self, send: Send):
        self.send, self.start, self.body = send, None, b""

    start: MutableMapping[str, Any] | None

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.start = message
            return
        self.body += message.get("body", b"")
        if message.get("more_body", False):
            return
        body = FOREIGN.sub(b"", self.body)
        assert self.start is not None
        kept = [(key, value) for key, value in self.start["headers"] if key.lower() != b"content-length"]
        length = (b"content-length", str(len(body)).encode())
        await self.send({**self.start, "headers": [*kept, length, *HEADERS]})
        await self.send({"type": "http.response.body", "body": body})


async def _whole_body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _again(body: bytes, receive: Receive) -> Receive:
    """Receives a body that has been read already, and then what comes."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> MutableMapping[str, Any]:
        return waiting.pop() if waiting else await receive()

    return receive_again


def _with_headers(send: Send) -> Send:
    async def send_on(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *HEADERS]}
        await send(message)

    return send_on


async def _refuse(scope: Scope, send: Send, status: int) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    text = {
        403: b"it names a file that was not uploaded",
        404: b"there is nothing here",
        411: b"its length is missing",
        413: b"it is too large",
    }[status]
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text})
