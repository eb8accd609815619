"""The cache folder of this machine, $MIM_RAY_CACHE or ~/.cache/mim_ray: copies of remote files, indexes, stores.

    path = cache_folder() / "copies" / name
    note_use(path)                                # whenever it is opened
    drop_unused(path.parent.iterdir())            # when something new has come

All of it can be made again, so that the folder may be deleted at any time; who has a file mapped keeps it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

UNUSED_S = 30 * 86_400.0


def cache_folder() -> Path:
    """It may not be there yet."""
    return Path(os.environ.get("MIM_RAY_CACHE", Path.home() / ".cache" / "mim_ray"))


def note_use(path: Path) -> None:
    """A file or folder of the cache was used now."""
    with contextlib.suppress(FileNotFoundError):  # dropped by another process, which did not see that it is needed
        os.utime(path)


def drop_unused(entries: Iterable[Path]) -> None:
    """Remove the files and folders that nobody has used for `UNUSED_S`."""
    for path in entries:
        with contextlib.suppress(FileNotFoundError):  # another process was first
            if path.stat().st_mtime >= time.time() - UNUSED_S:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
