"""Pictures of strangers are decoded in a process of their own, which is ended when it takes too long or too much memory.

A picture of a few kilobytes can keep a decoder busy for minutes, and a thread cannot be ended; the codecs are C code that
reads hostile input. So the process (decode_child.py) has no secrets in its environment, writes no file, and a crash of it
costs one request. Between the two go JSON and bytes, no pickles.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np

from mim_ray.data.transforms import BadImage, PictureFormat
from mim_ray.errors import UnavailableError

logger = logging.getLogger("ray.serve")
START_TIMEOUT_S = 60.0
_LENGTH = struct.Struct(">I")


@dataclass
class TimeLeft:
    """What one request may still spend on its pictures, and as much again on waiting for the pictures of others: so that
    theirs never make its own too slow, nor hold it for long."""

    seconds: float
    waiting_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.waiting_s = self.seconds


class ImageDecoder:
    """One decoding process, started with the first picture (or `start`) and again after it had to be ended. Safe to use from several
    threads: they take turns.

    Args:
        max_bytes: larger pictures are refused before they are sent there.
        max_pixels: refused there from the header. The process gets the memory that pictures of this size need.
    """

    def __init__(self, max_bytes: int, max_pixels: int) -> None:
        self._max_bytes, self._max_pixels = max_bytes, max_pixels
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    @staticmethod
    @lru_cache
    def shared(max_bytes: int, max_pixels: int) -> ImageDecoder:
        """This process' decoder with these limits."""
        return ImageDecoder(max_bytes, max_pixels)

    def start(self) -> None:
        """Start the process now, and not with the first picture, for which others would wait.

        Raises:
            UnavailableError: it does not start.
        """
        with self._lock:
            self._running()

    def decode(self, data: bytes, picture: PictureFormat, left: TimeLeft) -> np.ndarray:
        """As data.transforms.decode_image: (3, S, S) uint8. Takes the time it needs from `left`.

        Raises:
            BadImage: as there; and "image too slow". UnavailableError: the pictures of others took all the time to wait, or the
                process does not start.
        """
        if len(data) > self._max_bytes:
            raise BadImage("image too large", f"{len(data)} bytes, the limit is {self._max_bytes}")
        header = {"picture": asdict(picture), "max_bytes": self._max_bytes, "max_pixels": self._max_pixels}
        with self._turn(left):
            process = self._running()
            start = time.monotonic()
            reply, late = _ask(process, header, data, left.seconds)
            left.seconds -= time.monotonic() - start
            if late or reply is None:
                self.close()
        if reply is not None:
            answer, pixels = reply
            if "reason" in answer:
                raise BadImage(answer["reason"], answer["detail"])
            return np.frombuffer(pixels, np.uint8).reshape(3, picture.size, picture.size).copy()
        if late:
            raise BadImage("image too slow", "the pictures of this request take too long to decode")
        logger.warning("a picture of %d bytes ended its decoder", len(data))
        raise BadImage("image corrupt", "decoding it failed, or took more memory than a picture may")

    def close(self) -> None:
        """End the process; the next picture starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    @contextmanager
    def _turn(self, left: TimeLeft) -> Iterator[None]:
        start = time.monotonic()
        taken = self._lock.acquire(timeout=max(0.0, left.waiting_s))
        left.waiting_s -= time.monotonic() - start
        if not taken:
            raise UnavailableError("Other pictures keep the image decoder busy. Send this one again.")
        try:
            yield
        finally:
            self._lock.release()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self.close()
            folder = str(Path(__file__).parents[2])
            command = [sys.executable, "-m", "mim_ray.serving.decode_child", str(2**30 + 24 * self._max_pixels)]
            env = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd="/")
            reply, _ = _ask(self._process, None, b"", START_TIMEOUT_S)
            if reply is None:
                self.close()
                raise UnavailableError(f"The image decoder did not start within {START_TIMEOUT_S:g} s. Try again.")
        return self._process


def _ask(
    process: subprocess.Popen[bytes], header: object, data: bytes, timeout_s: float
) -> tuple[tuple[dict[str, str], bytes] | None, bool]:
    """Send one message and wait for its answer.

    Returns:
        the answer, None where the process ended; and whether it was ended because the time was over.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    ended = threading.Event()

    def end() -> None:
        ended.set()
        process.kill()

    timer = threading.Timer(max(0.0, timeout_s), end)
    timer.start()
    try:
        if header is not None:
            send(process.stdin, header, data)
        reply = receive(process.stdout)
    except BrokenPipeError:
        reply = None
    finally:
        timer.cancel()
        timer.join()
    return reply, ended.is_set()


def send(stream: IO[bytes], header: object, data: bytes) -> None:
    """A message: lengths, JSON, bytes."""
    text = json.dumps(header).encode()
    stream.write(_LENGTH.pack(len(text)) + _LENGTH.pack(len(data)) + text)
    stream.write(data)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict, bytes] | None:
    """None where the other side has ended."""
    lengths = stream.read(2 * _LENGTH.size)
    if len(lengths) < 2 * _LENGTH.size:
        return None
    (num_text, num_data) = struct.unpack(">II", lengths)
    text, data = stream.read(num_text), stream.read(num_data)
    return (json.loads(text), data) if len(data) == num_data else None
