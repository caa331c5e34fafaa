"""The page served: adapters loaded, the folder embedded, one process that listens on one address."""

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qformer.messages import one_line
from qformer.web.adapters import SEARCH, Adapters
from qformer.web.desk import Desk
from qformer.web.folder import PictureFolder
from qformer.web.guard import Guard
from qformer.web.uploads import Limits

logger = logging.getLogger(__name__)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Address:
    """Where the page listens, port 0 = any that is free; and where it keeps uploads, a temporary folder for None."""

    host: str
    port: int
    uploads: Path | None = None


def serve(
    paths: Sequence[str], address: Address, limits: Limits, *,
    folder: Path | None, cache: Path, device: str | None, frames: int | None,
) -> None:  # fmt: skip
    """Serve the page until it is interrupted.

    Args:
        paths: of the adapters.
        folder: of pictures to search.
        cache: where their embeddings are kept.
        frames: of a clip; None = 8.

    Raises: ValueError when Gradio is not installed, the address is taken, or an adapter or the folder cannot be used.
    """
    for option, value in (
        ("upload-mb", limits.megabytes),
        ("megapixels", limits.megapixels),
        ("video-s", limits.video_s),
    ):
        if not value > 0:
            raise ValueError(f"--max-{option} {value}: expected more than 0")
    listening = _listen(address)
    with tempfile.TemporaryDirectory(prefix="qformer-web-") as scratch:
        uploads = address.uploads or Path(scratch)
        uploads.mkdir(parents=True, exist_ok=True)
        _prepare_gradio(uploads)
        adapters = Adapters.load(paths, device=device, max_pixels=limits.max_pixels, frames=frames)
        pictures = None if folder is None else PictureFolder(folder, cache)
        for name in adapters.able(SEARCH) if pictures else ():
            assert pictures is not None
            if broken := pictures.embed(name, adapters.models[name]):
                logger.warning("%s: %d of %d images cannot be read", folder, broken, len(pictures.names))
        _run(build_application(Desk(adapters, limits, uploads, pictures), address.host), listening)


def build_application(desk: Desk, host: str) -> Any:
    """The page behind its guard, as an ASGI application. `_prepare_gradio` comes before."""
    import gradio
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from qformer.web.page import build_page
    from qformer.web.style import CSS

    fonts = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    theme = gradio.themes.Default(
        primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=["ui-monospace", "monospace"]
    )
    application = FastAPI(openapi_url=None)
    if host in LOOPBACK:  # so that no page elsewhere reaches this one under a name of its own
        application.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    gradio.mount_gradio_app(
        application, build_page(desk), "/", footer_links=[], run_history=False, show_error=False, ssr_mode=False,
        enable_monitoring=False, mcp_server=False, pwa=False, theme=theme, css=CSS, max_file_size=desk.limits.max_bytes,
    )  # fmt: skip
    return Guard(application, desk.uploads, desk.limits.max_bytes)


def _prepare_gradio(uploads: Path) -> None:
    """Where Gradio keeps files, and that it asks nobody anything; before it is imported.

    Raises: ValueError when it is not installed.
    """
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", GRADIO_TEMP_DIR=str(uploads.resolve()))
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"the page is made with Gradio, which cannot be imported ({one_line(error)}): pip install 'qformer[web]'"
        ) from None


def _listen(address: Address) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        return socket.create_server((address.host, address.port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--host {address.host} --port {address.port} cannot be listened on ({one_line(error)}); "
            "give another --port, or --port 0 for any that is free"
        ) from None


def _run(application: Any, listening: socket.socket) -> None:
    import uvicorn

    host, port = listening.getsockname()[:2]
    print(f"the page is at http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that uploads are deleted then too
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=3)).run([listening])
