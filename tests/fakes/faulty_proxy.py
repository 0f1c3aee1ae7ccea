"""A TCP proxy on loopback that damages what passes through it."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Literal
from urllib.parse import urlsplit

#: damage to what the client sends: change a byte, end within the body, at most 1.3 MB/s; the last two to what it
#: receives; `hole` never answers, `busy` answers 503 and `broken` 500 by themselves
Fault = Literal["none", "flip", "cut", "trickle", "hole", "busy", "broken", "shorten", "drip"]
_DAMAGE_TO_ANSWER: dict[Fault, Fault] = {"shorten": "cut", "drip": "trickle"}
_DAMAGE_AT = 50_000


def _refusal(status: str, code: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>Please come back later</Message></Error>"
    return f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


_REFUSALS: dict[Fault, bytes] = {
    "busy": _refusal("503 Service Unavailable", "ServiceUnavailable"),
    "broken": _refusal("500 Internal Server Error", "InternalError"),
}


class FaultyProxy:
    """Stands before a server; set `fault` to choose what happens to connections that follow.

    `damage_at`: after how many bytes of a connection `flip`, `cut` and `shorten` strike.
    """

    def __init__(self, target: str, damage_at: int = _DAMAGE_AT) -> None:
        self._target = (str(urlsplit(target).hostname), urlsplit(target).port or 80)
        self._damage_at = damage_at
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._closed = threading.Event()
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.fault: Fault = "none"
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.reset()

    def reset(self) -> None:
        """End every connection that is open now, so that the present `fault` meets everybody."""
        for each in list(self._open):
            self._end(each)

    def _end(self, each: socket.socket) -> None:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()
        self._open.discard(each)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            # inherited by the connections: what is not read soon stands still at the sender
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
            while True:
                client, _ = self._listener.accept()
                self._open.add(client)
                self.connections += 1
                threading.Thread(target=self._serve, args=(client, self.fault), daemon=True).start()

    def _serve(self, client: socket.socket, fault: Fault) -> None:
        if fault == "hole":
            return
        with contextlib.suppress(OSError):
            if fault in _REFUSALS:
                client.recv(65_536)
                client.sendall(_REFUSALS[fault])
                client.shutdown(socket.SHUT_WR)
                client.settimeout(2.0)
                while client.recv(65_536):  # a reset would take the answer away from who still sends
                    pass
            else:
                self._connect(client, fault)
        self._end(client)

    def _connect(self, client: socket.socket, fault: Fault) -> None:
        server = socket.create_connection(self._target)
        self._open.add(server)
        answer = _DAMAGE_TO_ANSWER.get(fault, "none")
        back = threading.Thread(target=self._pump, args=(server, client, answer), daemon=True)
        back.start()
        self._pump(client, server, fault)
        back.join()
        self._end(server)

    def _pump(self, source: socket.socket, sink: socket.socket, fault: Fault) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                within = passed <= self._damage_at < passed + len(data)
                if within and fault == "flip":
                    at = self._damage_at - passed
                    data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
                if within and fault == "cut":
                    sink.sendall(data[: self._damage_at - passed])
                    break
                sink.sendall(data)
                passed += len(data)
                if fault == "trickle" and self._closed.wait(0.05):
                    break
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
