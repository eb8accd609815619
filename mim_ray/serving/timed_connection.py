"""An HTTP connection that nobody can hold beyond a deadline, however slowly they talk.

A socket's timeout begins anew with every byte, and http.client reads a header or a chunk with as many waits as it likes. So
each single wait here, of connecting, TLS, sending, headers and body, gets only the time that is left. Resolving the host's
name is the exception: the standard library cannot end that.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
from typing import Any


class TimedConnection(http.client.HTTPConnection):
    """
    Args:
        port: None: that of the scheme.
        tls: None: http. deadline: as the attribute.

    Attributes:
        deadline: of time.monotonic(), at which whatever waits raises TimeoutError. Set it before each request.
    """

    def __init__(self, host: str, port: int | None, tls: ssl.SSLContext | None, deadline: float) -> None:
        if tls is not None:
            self.default_port = http.client.HTTPS_PORT  # not named in the Host header
        super().__init__(host, port)
        self._tls = tls
        self.deadline = deadline

    def connect(self) -> None:
        """To the first of the host's addresses that takes it.

        Raises:
            OSError: none did, or the certificate is not the host's.
        """
        sock = self._dialled()
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_hostname=self.host, do_handshake_on_connect=False)
                sock.settimeout(left(self.deadline))  # of the handshake as a whole
                sock.do_handshake()
        except BaseException:
            sock.close()
            raise
        self.sock: Any = _TimedSocket(sock, self)

    def _dialled(self) -> socket.socket:
        problem: OSError | None = None
        for family, kind, protocol, _, address in socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM):
            seconds = left(self.deadline)
            try:
                sock = socket.socket(family, kind, protocol)
            except OSError as error:  # no IPv6 here
                problem = error
                continue
            try:
                sock.settimeout(seconds)
                sock.connect(address)
                return sock
            except OSError as error:
                sock.close()
                problem = error
        raise problem or OSError(f"{self.host} has no address")


def left(deadline: float) -> float:
    """Seconds until `deadline`.

    Raises:
        TimeoutError: none.
    """
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the deadline is over")
    return seconds


class _TimedSocket:
    """What http.client uses of a socket."""

    def __init__(self, sock: socket.socket, connection: TimedConnection) -> None:
        self._sock, self._connection = sock, connection

    def sendall(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            self.wait_no_longer()
            rest = rest[self._sock.send(rest) :]  # of TLS one record

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self, self._sock.makefile("rb", buffering=0)))

    def close(self) -> None:
        self._sock.close()  # the kernel's, when no answer is read from it any more

    def wait_no_longer(self) -> None:
        self._sock.settimeout(left(self._connection.deadline))


class _TimedReader(io.RawIOBase):
    def __init__(self, sock: _TimedSocket, raw: io.RawIOBase) -> None:
        self._sock, self._raw = sock, raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.wait_no_longer()
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()
