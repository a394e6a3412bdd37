"""A socket between rank 0 and another rank, over which messages go whole, each behind its length."""

from __future__ import annotations

import hmac
import socket
import struct
import threading
from contextlib import suppress
from typing import Any

from autodeploy.distributed.messages import Hello, Message, decode, encode

LENGTH = struct.Struct("!Q")
LARGEST_HELLO = 4096
"""Bytes of the first message, which anybody may send who finds the port."""
PATIENCE = 5.0
"""Seconds that somebody who has connected has for the first message."""


class Channel:
    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self._lock = threading.Lock()
        if connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _notice_dead_machines(connected)

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: Message) -> None:
        self.send_encoded(encode(message))

    def send_encoded(self, content: bytes) -> None:
        with self._lock:
            self.socket.sendall(LENGTH.pack(len(content)) + content)

    def receive(self, limit: int = 1 << 40) -> Any:
        """The next message. Raises ConnectionError when the other side is gone, ValueError for what is no message."""
        (length,) = LENGTH.unpack(self._exactly(LENGTH.size))
        if length > limit:
            raise ValueError(f"a message of {length} bytes where {limit} are allowed")
        return decode(self._exactly(length))

    def _exactly(self, length: int) -> bytearray:
        content = bytearray(length)
        view = memoryview(content)
        while view:
            if not (received := self.socket.recv_into(view)):
                raise ConnectionResetError("the other side has closed the connection")
            view = view[received:]
        return content

    def hang_up(self) -> None:
        """Whoever reads, on either side, finds that it is over."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.hang_up()
        self.socket.close()


def _notice_dead_machines(connected: socket.socket) -> None:
    """The other side need not say that it ends: its machine may lose its power."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 5), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4)):
        connected.setsockopt(socket.IPPROTO_TCP, option, value)


def accept(listener: socket.socket, token: str) -> tuple[Channel, Hello]:
    """The next rank that connects; whoever does not know the token is turned away. Raises TimeoutError as the listener does."""
    while True:
        connected, _ = listener.accept()
        channel = Channel(connected)
        connected.settimeout(PATIENCE)
        with suppress(OSError, ValueError):
            hello = channel.receive(LARGEST_HELLO)
            if isinstance(hello, Hello) and hmac.compare_digest(hello.token.encode(), token.encode()):
                connected.settimeout(None)
                return channel, hello
        channel.close()
