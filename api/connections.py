"""gunicorn's threaded worker, hardened against slow clients.

Its own gives a thread to every connection, for as long as the client takes to say what it wants; a few dozen silent
sockets then stop the whole API. Here the main loop collects what arrives, a connection gets a thread once its request
line and headers are complete, and nobody is waited for without end.
"""

from __future__ import annotations

import socket
import struct
import time
from collections import deque
from concurrent.futures import Future
from functools import partial
from selectors import EVENT_READ
from typing import Any

from gunicorn.workers.gthread import TConn, ThreadWorker

#: seconds for a request line and headers to arrive, and most bytes of them
HEAD_SECONDS, MAX_HEAD = 10.0, 64 * 1024
#: seconds of silence on a connection while a body is read or an answer is sent
SILENCE_SECONDS = 20
#: seconds that a closed connection is still drained, so that the client sees the answer and not a reset
LINGER_SECONDS = 2.0

#: seconds to read the unread rest of a body that is already here, so that the connection can be used again
_REST_SECONDS = 0.05
_CHUNK = 64 * 1024
_HEAD_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n"
    b"Content-Type: text/plain\r\nContent-Length: 30\r\n\r\nThe request head is too large."
)


class PatientWorker(ThreadWorker):  # type: ignore[misc]
    """Threads for complete request heads only. Sets `app.closing` when told to stop."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lingering: deque[TConn] = deque()

    def accept(self, listener: socket.socket) -> None:
        """Take a new connection and wait, on the poller, for what it wants."""
        try:
            client, address = listener.accept()
        except OSError:  # it went away again, or another process took it
            return
        # the kernel's own limits hold whatever mode gunicorn puts the socket into
        limit = struct.pack("ll", SILENCE_SECONDS, 0)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
        self.nr_conns += 1
        self._await_head(TConn(self.cfg, client, address, listener.getsockname()))

    def on_client_socket_readable(self, conn: TConn, client: socket.socket) -> None:
        """A kept connection speaks again: its next head is awaited like the first."""
        self.poller.unregister(client)
        self.keepalived_conns.remove(conn)
        self._await_head(conn)

    def _await_head(self, conn: TConn) -> None:
        conn.head = bytearray()
        conn.timeout = time.monotonic() + HEAD_SECONDS
        self.pending_conns.append(conn)
        self.poller.register(conn.sock, EVENT_READ, partial(self.on_pending_socket_readable, conn))

    def on_pending_socket_readable(self, conn: TConn, client: socket.socket) -> None:
        """Collect more of a head; hand the connection to a thread once it is complete."""
        try:
            data = client.recv(MAX_HEAD)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        conn.head += data
        complete = b"\r\n\r\n" in conn.head.lstrip(b"\r\n")
        if data and not complete and len(conn.head) < MAX_HEAD:
            return
        self.poller.unregister(client)
        self.pending_conns.remove(conn)
        if complete:
            conn.init()
            conn.parser.unreader.unread(bytes(conn.head))
            conn.data_ready = True
            self.enqueue_req(conn)
            return
        if data:
            client.send(_HEAD_TOO_LARGE)
        self._linger(conn)

    def finish_request(self, conn: TConn, fs: Future[Any]) -> None:
        """Keep the connection for the next request, or close it without waiting for the client."""
        if fs.cancelled() or fs.exception() is not None or not fs.result():
            self._linger(conn)
        else:
            super().finish_request(conn, fs)

    def _keepalive_after(self, conn: TConn, keepalive: bool) -> bool:
        if not keepalive:
            return False
        # a body that the application refused to read is not waited for
        return bool(conn.parser.finish_body(deadline=time.monotonic() + _REST_SECONDS))

    def _linger(self, conn: TConn) -> None:
        """Close our side now, and the connection once the client has done so too or time is up."""
        conn.timeout = time.monotonic() + LINGER_SECONDS
        try:
            conn.sock.setblocking(False)
            conn.sock.shutdown(socket.SHUT_WR)
            self.poller.register(conn.sock, EVENT_READ, partial(self._drain, conn))
        except (OSError, ValueError):  # the client was faster
            self.nr_conns -= 1
            conn.close()
            return
        self._lingering.append(conn)

    def _drain(self, conn: TConn, client: socket.socket) -> None:
        try:
            ended = not client.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            ended = True
        if ended:
            self._lingering.remove(conn)
            self._drop(conn)

    def _drop(self, conn: TConn) -> None:
        self.poller.unregister(conn.sock)
        self.nr_conns -= 1
        conn.close()

    def murder_pending(self) -> None:
        """Close connections whose time is up; at the end, also those that have asked for nothing yet."""
        now = time.monotonic()
        for waiting in (self.pending_conns, self._lingering):
            while waiting and waiting[0].timeout <= now:
                self._drop(waiting.popleft())
        if not self.alive:
            for conn in [conn for conn in self.pending_conns if not conn.head]:
                self.pending_conns.remove(conn)
                self._drop(conn)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Told to stop: whoever waits for something answers at once."""
        self.app.closing.set()
        super().handle_exit(sig, frame)
