"""Who may call: API keys, each with a name and scopes, in a file or an environment variable that hold hashes only.

    python -m mim_ray.serving.keys new --name shop --scopes rank,write

One line per key: `shop rank,write sha256:9f86d0…`; `#` starts a comment, and one name may have several lines, so that a
new key works beside the old one while callers change over. The file is read again when it changes.

SHA-256 without salt is right here, though it would be wrong for passwords: a key has 256 random bits, so no guessing and
no table of hashes comes near it, and a slow hash would only let strangers keep the CPU busy.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mim_ray.config.scenario import Serving
from mim_ray.errors import ConfigError

logger = logging.getLogger("ray.serve")
VARIABLE = "MIM_RAY_API_KEYS"
SCOPES = ("rank", "write", "admin")
LOOK_EVERY_S = 1.0
MAX_KEY_CHARS = 512

OPEN, PAGE = "open", "page"
"""For everyone; for everyone on this machine, and for admin where others can reach the app."""
PATHS: tuple[tuple[str, str], ...] = (
    ("/v1/rank", "rank"),
    ("/v1/similar/*", "rank"),
    ("/v1/search", "rank"),
    ("/v1/search/*", "rank"),
    ("/v1/items", "write"),
    ("/v1/events", "write"),
    ("/healthz", OPEN),
    ("/readyz", OPEN),
    ("/v1/items/healthz", OPEN),
    ("/v1/items/readyz", OPEN),
    ("/docs", PAGE),
    ("/docs/*", PAGE),
    ("/redoc", PAGE),
    ("/openapi.json", PAGE),
    ("/v1/items/docs", PAGE),
    ("/v1/items/docs/*", PAGE),
    ("/v1/items/openapi.json", PAGE),
    ("*", "admin"),  # metrics, versions, and whatever nobody has listed
)


def needed_scope(path: str) -> str:
    """The scope of the first entry of PATHS that fits; a `*` stands for any rest that is not empty."""
    for pattern, scope in PATHS:
        if path == pattern or (pattern.endswith("*") and path.startswith(pattern[:-1]) and path != pattern[:-1]):
            return scope
    return "admin"


@dataclass(frozen=True)
class ApiKey:
    """`digest` is the SHA-256 of the key; the key itself is stored nowhere."""

    name: str
    scopes: frozenset[str]
    digest: bytes


@dataclass(frozen=True)
class Refusal:
    """Why a request may not pass. `challenge` is the value of WWW-Authenticate."""

    status: int
    sentence: str
    challenge: str


def new_key(name: str, scopes: Sequence[str]) -> tuple[str, str]:
    """A new random key, and the line that lets it in.

    Raises:
        ConfigError: a name or scope that the file could not hold.
    """
    key = "mim_" + secrets.token_urlsafe(32)
    line = f"{name} {','.join(scopes)} sha256:{_digest(key).hex()}"
    parse_keys(line, "the arguments")
    return key, line


def parse_keys(text: str, source: str) -> tuple[ApiKey, ...]:
    """
    Args:
        text: lines; in an environment variable `;` may separate them too.
        source: for the message.

    Raises:
        ConfigError: lines that are no keys (all of them, without their values: one may hold a key by mistake), or none.
    """
    keys, problems = [], []
    for number, line in enumerate(re.split(r"[\n;]", text), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        problem = _problem(words)
        if problem is None:
            scopes = frozenset(words[1].split(","))
            keys.append(ApiKey(words[0], scopes, bytes.fromhex(words[2].removeprefix("sha256:"))))
        else:
            problems.append(f"line {number} {problem}")
    if problems:
        raise ConfigError(
            f"{source} is no list of API keys: {'; '.join(problems)}. Each line is NAME SCOPES sha256:HEX, as "
            "python -m mim_ray.serving.keys new --name shop --scopes rank,write prints it."
        )
    if not keys:
        raise ConfigError(
            f"{source} holds no API key. Make one with python -m mim_ray.serving.keys new --name shop --scopes rank,write."
        )
    return tuple(keys)


class KeyRing:
    """The keys that are let in now. Safe to use from several threads.

    Args:
        path: file of keys; it is looked at no more than once in LOOK_EVERY_S and read again when it has changed. Where it
            cannot be used any more, the keys that were read last stay, and the log says so once.
        variable: lines that are let in too; those of an environment variable, which cannot change.

    Raises:
        ConfigError: the file cannot be read, is no list of keys, or can be written by everyone.
    """

    def __init__(self, path: str | None, variable: str | None) -> None:
        self._path = None if path is None else Path(path).expanduser()
        self._fixed = () if variable is None else parse_keys(variable, VARIABLE)
        self._lock = threading.Lock()
        self._seen: tuple[int, ...] = ()
        self._looked_at = time.monotonic()
        self._keys = self._fixed
        if self._path is not None:
            self._seen = _signature(self._path)
            self._keys = self._fixed + _read(self._path)

    @classmethod
    def of(cls, serving: Serving) -> KeyRing | None:
        """The keys of serving.keys_file and of the environment; None where neither is set.

        Raises:
            ConfigError: as above; or serving.require_keys is set and there are none.
        """
        variable = os.environ.get(VARIABLE) or None
        if serving.keys_file is None and variable is None:
            if serving.require_keys:
                raise ConfigError(
                    f"This app must check API keys, but it has none: serving.keys_file is not set, and {VARIABLE} is not "
                    f"set in this process. Name a file that every node has, or set {VARIABLE} where Ray is started."
                )
            return None
        return cls(serving.keys_file, variable)

    def authorize(self, path: str, headers: Iterable[tuple[bytes, bytes]], *, exposed: bool) -> Refusal | None:
        """None where a request may pass.

        Args:
            headers: as ASGI gives them: lower-case names.
            exposed: others than this machine can send requests.
        """
        scope = needed_scope(path)
        if scope == OPEN or (scope == PAGE and not exposed):
            return None
        scope = "admin" if scope == PAGE else scope
        sent = _credentials(headers)
        if not sent:
            text = "This endpoint needs an API key. Send it as Authorization: Bearer KEY, or as X-API-Key: KEY."
            return Refusal(401, text, 'Bearer realm="mim_ray"')
        if len(sent) > 1:
            text = "This request brings several API keys. Send one."
            return Refusal(401, text, 'Bearer realm="mim_ray", error="invalid_request"')
        key = self.find(sent.pop())
        if key is None:
            text = "This API key is not known here. It may have been replaced: ask whoever runs this service for a new one."
            return Refusal(401, text, 'Bearer realm="mim_ray", error="invalid_token"')
        if scope not in key.scopes:
            may = ", ".join(one for one in SCOPES if one in key.scopes)
            text = f"This API key has the scopes {may}, and this endpoint needs {scope}. Use a key that has it."
            challenge = f'Bearer realm="mim_ray", error="insufficient_scope", scope="{scope}"'
            return Refusal(403, text, challenge)
        return None

    def find(self, presented: bytes) -> ApiKey | None:
        """The entry of a key, found in a time that does not tell which it is or how much of it is right."""
        self._look()
        digest = hashlib.sha256(presented).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _look(self) -> None:
        now = time.monotonic()
        if self._path is None or now - self._looked_at < LOOK_EVERY_S:
            return
        if not self._lock.acquire(blocking=False):
            return  # another thread is reading it
        try:
            self._looked_at = now
            signature = _signature(self._path)
            if signature != self._seen:
                self._seen = signature  # also when it is broken: the log says so once
                self._keys = self._fixed + _read(self._path)
                logger.info("API keys were read again: %d are let in", len(self._keys))
        except ConfigError as error:
            logger.error("API keys stay as they were: %s", error)
        finally:
            self._lock.release()


def _problem(words: Sequence[str]) -> str | None:
    if len(words) != 3:
        return f"has {len(words)} words instead of 3"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", words[0]):
        return "has a name that is not 1 to 64 letters, digits, dots, dashes or underscores"
    if not set(words[1].split(",")) <= set(SCOPES):
        return f"has scopes other than {', '.join(SCOPES)} (separated by commas, without spaces)"
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", words[2]):
        return "does not end in sha256: and 64 hexadecimal digits (the key itself must not be in here)"
    return None


def _credentials(headers: Iterable[tuple[bytes, bytes]]) -> set[bytes]:
    """The keys that a request brings; those too long to be one are cut, so that hashing them costs nothing."""
    sent = set()
    for name, value in headers:
        if name == b"x-api-key":
            sent.add(value.strip()[:MAX_KEY_CHARS])
        elif name == b"authorization" and value[:7].lower() == b"bearer ":
            sent.add(value[7:].strip()[:MAX_KEY_CHARS])
    return sent - {b""}


def _signature(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_size, found.st_ino)


def _read(path: Path) -> tuple[ApiKey, ...]:
    try:
        if path.stat().st_mode & stat.S_IWOTH:
            raise ConfigError(f"Everyone can write to {path}, and so let themselves in. Run chmod o-w {path}.")
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(f"The API keys {path} cannot be read: {reason}. Check serving.keys_file.") from None
    return parse_keys(text, str(path))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `new`."""
    parser = argparse.ArgumentParser(prog="python -m mim_ray.serving.keys", description="API keys of the serving apps.")
    new = parser.add_subparsers(required=True).add_parser("new", help="print a new key, and the line that lets it in")
    new.add_argument("--name", required=True, help="who will use it; shown in no answer and no log")
    new.add_argument("--scopes", required=True, help="of rank, write, admin; separated by commas")
    given = parser.parse_args(arguments)
    try:
        key, line = new_key(given.name, given.scopes.split(","))
    except ConfigError as error:
        parser.error(str(error))
    print(f"The key, shown this once; give it to {given.name}:\n  {key}\n")
    print(f"Its line for serving.keys_file or {VARIABLE}:\n  {line}")


if __name__ == "__main__":
    main()
