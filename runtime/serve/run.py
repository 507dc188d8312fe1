"""A server in a process of its own: the socket, the signals, the end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
import webbrowser
from collections.abc import Callable
from types import FrameType

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from owl2.runtime.errors import ConfigError
from owl2.runtime.load import Loaded
from owl2.runtime.serve.app import SEND_SECONDS, ServedModel, ServeOptions, Server
from owl2.runtime.serve.residence import Residence

BACKLOG = 128
HEAD_SECONDS = 10.0
"""In which the head of a connection's first request must have arrived."""
STOPPING = (signal.SIGINT, signal.SIGTERM)
"""Signals that end a server as people want it."""


class StoppingServer(uvicorn.Server):
    """Tells the answers that it stops: uvicorn itself would wait for them, and then cut them."""

    def __init__(self, config: uvicorn.Config, handlers: Server) -> None:
        super().__init__(config)
        self._handlers = handlers

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping = asyncio.create_task(self._handlers.stop())
        await super().shutdown(sockets)
        await stopping


class HurriedProtocol(H11Protocol):
    """Closes connections that hold a file of the process and get nowhere.

    uvicorn ends those that wait for a request. Here those end, too, on which a request begins and does not go on, and
    those whose client takes nothing of what was written to it.
    """

    _requests: asyncio.TimerHandle | None = None
    _written: asyncio.TimerHandle | None = None
    _last: object = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._requests, self._written):
            if timer is not None:
                timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._written is not None:
            self._written.cancel()

    def _expect_request(self) -> None:
        """The next request must have come in a while; bytes of it do not make it longer."""
        if self._requests is not None:
            if self._last is self.cycle:
                return
            self._requests.cancel()
        self._last = self.cycle
        self._requests = self.loop.call_later(HEAD_SECONDS, self._close_without_request, self.cycle)

    def _close_without_request(self, cycle: object) -> None:
        if self.cycle is cycle and not self.transport.is_closing():
            self.transport.close()

    def _expect_reader(self, left: int) -> None:
        self._written = self.loop.call_later(SEND_SECONDS, self._leave_reader, left)

    def _leave_reader(self, before: int) -> None:
        left = self.transport.get_write_buffer_size()
        if left < before:
            self._expect_reader(left)
        else:
            self.transport.abort()


def run_server(
    model: ServedModel,
    load: Callable[[], Loaded],
    options: ServeOptions,
    host: str,
    port: int,
    tell: Callable[[str], None],
    *,
    open_page: bool = False,
) -> None:
    """Serve until SIGINT or SIGTERM; the model is loaded before the first request is taken.

    Args:
        model: that is served.
        load: loads it.
        options: limits.
        host: address to listen at.
        port: 0 for a free one.
        tell: a line for people.
        open_page: whether to open the browser.

    Raises:
        ConfigError: the address cannot be used.
        Owl2Error: the model cannot be loaded.
    """
    _allow_files()
    listening = _listen(host, port)
    with listening:
        residence = Residence(load, options.cache_bytes, options.idle_seconds, options.disk)
        with residence.use():
            pass
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        listening.listen(BACKLOG)
        handlers = Server(model, residence, options)
        config = uvicorn.Config(
            handlers.app(),
            http=HurriedProtocol,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=int(options.stop_seconds) + 5,
            backlog=BACKLOG,
        )
        server = StoppingServer(config, handlers)

        def stop(_number: int, _frame: FrameType | None) -> None:
            server.should_exit = True

        # uvicorn hears them while it runs and raises them again at its end, which is the end that was asked for.
        for number in STOPPING:
            signal.signal(number, stop)
        tell(f"{model.name} is at {address}, for OpenAI's clients at {address}/v1; Ctrl-C stops")
        if open_page:
            # In a thread: some browsers return when they end. They wait in the backlog until the server is up.
            threading.Thread(target=webbrowser.open, args=[address], daemon=True).start()
        try:
            server.run(sockets=[listening])
        finally:
            residence.close()  # also after a second Ctrl-C: caches go to the disk


def _allow_files() -> None:
    """Let the process have as many open files, connections among them, as the system allows."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host} is not an address of this machine: {error.strerror or error}") from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"cannot listen at {host} port {port}: {error.strerror or error}; give another --port"
        ) from error
    return listening
