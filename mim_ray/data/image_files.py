"""Pictures that the items table names by `image_uri` instead of holding them.

Only files below one root (`data.images_root`, by default the folder of the tables) are read, with pyarrow's file systems:
a path relative to it, or a URI or absolute path that lies below it. Nothing is fetched over HTTP, and no name, `..` or
symbolic link leads out of the root: the table's author need not be trusted with what this machine can reach.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.fs as pafs

from mim_ray import artifacts
from mim_ray.config.scenario import Data
from mim_ray.data.transforms import BadImage

_READERS = 8  # at once, for stores with a latency


def images_root(settings: Data, data_root: str) -> str:
    """`data.images_root`, or the folder of the tables."""
    return data_root if settings.images_root is None else artifacts.absolute_uri(settings.images_root)


class ImageFiles:
    """Reads pictures below a root.

    Args:
        root: absolute URI of the folder. max_bytes: a larger file is not read.
    """

    def __init__(self, root: str, max_bytes: int) -> None:
        self._root, self._max_bytes = root.rstrip("/"), max_bytes
        self._filesystem, self._base = artifacts.filesystem(self._root)
        self._base = self._base.rstrip("/")

    def read(self, image: bytes | None, image_uri: str | None) -> bytes | None:
        """The bytes of an item's picture: `image` where it is given, else the file at `image_uri`, else None.

        Raises:
            BadImage: the file is not below the root, not there, or too large.
        """
        if image:
            return image
        if not image_uri or not image_uri.strip():
            return None
        path = self._path(image_uri.strip())
        try:
            with self._filesystem.open_input_file(path) as file:
                if file.size() > self._max_bytes:
                    raise BadImage("image too large", f"{file.size()} bytes, the limit is {self._max_bytes}")
                return file.read()
        except (OSError, ValueError) as error:
            raise BadImage("image_uri unreadable", f"{image_uri[:200]}: {str(error)[:200]}") from None

    def read_all(
        self, images: Sequence[bytes | None], image_uris: Sequence[str | None]
    ) -> list[bytes | BadImage | None]:
        """`read` for each item, several files at once; what could not be read is the BadImage itself."""

        def one(image: bytes | None, image_uri: str | None) -> bytes | BadImage | None:
            try:
                return self.read(image, image_uri)
            except BadImage as error:
                return error

        if not any(uri and not image for image, uri in zip(images, image_uris, strict=True)):
            return [image or None for image in images]
        with ThreadPoolExecutor(_READERS) as pool:
            return list(pool.map(one, images, image_uris))

    def _path(self, image_uri: str) -> str:
        """Where the file system has the file.

        Raises:
            BadImage: that is not below the root.
        """
        relative: str | None = image_uri
        if "://" in image_uri or image_uri.startswith("/"):
            bases = {self._root, self._base, f"file://{self._base}"}
            relative = next((image_uri[len(b) + 1 :] for b in bases if b and image_uri.startswith(f"{b}/")), None)
        if relative is not None:
            path = posixpath.normpath(f"{self._base}/{relative}")
            if path.startswith(f"{self._base}/") and self._stays_below(path):
                return path
        raise BadImage("image_uri outside data.images_root", f"{image_uri[:200]} is not below {self._root}")

    def _stays_below(self, path: str) -> bool:
        if not isinstance(self._filesystem, pafs.LocalFileSystem):
            return True  # object stores have no links
        return Path(path).resolve().is_relative_to(Path(self._base).resolve())
