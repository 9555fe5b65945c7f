"""The server of the page, which only this machine reaches, and which itself reaches nothing."""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator

from misdirection.choices import PORT
from misdirection.directions.direction import Direction
from misdirection.errors import InputError
from misdirection.extras import needed_for
from misdirection.models.chat_model import ChatModel
from misdirection.playground.asking import Playground
from misdirection.playground.page import build
from misdirection.playground.panels import style
from misdirection.progress import notice

HOST = "127.0.0.1"


def play(chat: ChatModel, direction: Direction | None = None, *, port: int = PORT) -> None:
    """Serves a page on this machine where questions are put to a model, side by side with and without interventions.

    Ends when it is interrupted.

    Args:
        chat: a model, best with an adapter, whose base then answers, too.
        direction: of its base; without one nothing is ablated or steered.
        port: of 127.0.0.1.

    Raises:
        InputError: a port in use, a direction of another base model.
        MissingPackage: without the extra `play`.
    """
    with contextlib.suppress(KeyboardInterrupt), serving(Playground(chat, direction), port) as address:
        notice(f"playground: {address} (this machine only; Ctrl-C ends it)")
        threading.Event().wait()


def require_startable(port: int) -> None:
    """Raises as `play` does, without a model: a mistake shows before one is loaded."""
    with needed_for("play"):
        import gradio as _  # noqa: F401
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise InputError(f"port {port}: {error.strerror}: give another one as --port") from error


@contextlib.contextmanager
def serving(playground: Playground, port: int = PORT) -> Iterator[str]:
    """Serves the page for the length of the context, which is given its address."""
    require_startable(port)
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # A page of another site whose name is made to lead here (DNS rebinding) names that site as the host.
    own_name = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    blocks = build(playground)
    with _no_proxy():
        blocks.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            root_path="",
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            app_kwargs={"middleware": [own_name]},
            css=style(),
            quiet=True,
            inline=False,
            prevent_thread_lock=True,
        )
    try:
        yield f"http://{HOST}:{port}/"
    finally:
        blocks.close(verbose=False)


@contextlib.contextmanager
def _no_proxy() -> Iterator[None]:
    """A proxy is not asked for what is on this machine: Gradio looks whether its own server answers."""
    before = {name: os.environ.get(name) for name in ("NO_PROXY", "no_proxy")}
    os.environ.update(dict.fromkeys(before, ",".join(filter(None, {*before.values(), HOST}))))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
