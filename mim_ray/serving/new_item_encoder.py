"""POST /v1/items, RIM (paper Section 3.5): new items are encoded as they come, made durable, and rankable at once.

An item is acknowledged when its window segment is safely stored; rankers follow the window, and a thread folds it
into the Delta table every `serving.window_s`. Plain Python; new_item_app.py puts HTTP and Ray Serve around it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

from mim_ray.config.scenario import Data, Serving
from mim_ray.data.transforms import clean_title, content_hash
from mim_ray.encoders.item_encoder import ItemEncoder, encode_batch
from mim_ray.errors import ArtifactError, RequestError
from mim_ray.representation_center.known_content import Content, KnownContent
from mim_ray.representation_center.new_items import Push, store_new_items
from mim_ray.representation_center.snapshot import NO_TIME
from mim_ray.representation_center.table import EmbeddingTable
from mim_ray.representation_center.updates import segment_rows
from mim_ray.serving.background import repeat
from mim_ray.serving.messages import EncodedItem, NewItem, NewItemsRequest, NewItemsResponse
from mim_ray.serving.pictures import Pictures, TimeLimits

NEWER_SNAPSHOT_EVERY_S = 10.0
MAX_CLOCK_SKEW = timedelta(minutes=5)


@dataclass(frozen=True)
class _Content:
    """One item, checked and decoded."""

    item_id: str
    title: str | None
    pixels: np.ndarray | None  # (3, S, S) uint8
    category: str | None  # the first of several
    content_hash: str
    content_at: datetime
    is_dated: bool  # its caller sent content_at

    def replaces(self, known: Content) -> bool:
        """Whether this is other content than the known, or names another category, and is not older.

        Where the known category is not known, the caller's own content_at decides: later than what is known, the catalogue has
        changed something since, and the content it was not. Without it every feed that posts an item again and again would
        store it again after each snapshot.
        """
        at = _microseconds(self.content_at)
        if at < known.at or self.content_hash != known.hash:
            return at >= known.at
        if self.category is None:
            return False
        if known.category_known:
            return self.category != known.category
        return self.is_dated and at > known.at != NO_TIME


class NewItemEncoder:
    """Encodes items and stores them in the window.

    Attributes:
        check_release: raises where this encoder is not the release's; ReleaseCheck, where releases are followed.

    Args:
        encoder: makes the embeddings; its version must be that of the embeddings being served.
        center: URI with the table and the window.
        limits: what pictures and titles are taken.
        push: sends what was stored to the parameter machines; without it they find it in the window.
        serving: time limits, and where image URLs may lead. Default: the default settings.
    """

    def __init__(
        self,
        encoder: ItemEncoder,
        center: str,
        limits: Data,
        *,
        push: Push | None = None,
        serving: Serving | None = None,
    ) -> None:
        if encoder.encoder_version is None:
            raise ArtifactError("The encoder has no version: save it, and load it from there.")
        self.encoder_version = encoder.encoder_version
        self._encoder = encoder
        self._window = f"{center}/window"
        self._limits = limits
        self._push = push
        self.check_release: Callable[..., None] = lambda *, now=False: None
        self._pictures = Pictures(encoder.picture, limits, serving or Serving())
        self._known = KnownContent(
            EmbeddingTable(f"{center}/table"),
            self._window,
            self.encoder_version,
            line=f"{center}/snapshots/{self.encoder_version}",
        )
        self._lock = threading.Lock()  # one request at a time looks up, encodes and stores
        repeat(
            self,
            threading.Event(),
            "newer-snapshot",
            lambda: NEWER_SNAPSHOT_EVERY_S,
            NewItemEncoder.take_newer_snapshot,
        )

    def encode(self, request: NewItemsRequest) -> NewItemsResponse:
        """Encode and store what is new among the items; all of them or, where one is bad, none.

        Raises:
            RequestError: a picture that cannot be used, an item without content, an id twice, a time in the future.
            VersionMismatchError: this encoder is not the release's. UnavailableError: the pictures of others are decoded.
        """
        self.check_release()
        ids = [item.item_id for item in request.items]
        if len(set(ids)) < len(ids):  # before any picture is fetched or decoded
            raise RequestError("An item_id occurs twice in this request. Send each item once.", 422)
        now = datetime.now(UTC)
        left = self._pictures.time_limits()
        contents = [self._check(item, place, now, left) for place, item in enumerate(request.items)]
        with self._lock:
            self._known.refresh()
            known = self._known.current(ids)
            new = [content for content, old in zip(contents, known, strict=True) if content.replaces(old)]
            on_machines = self._store(new) if new else None
        if new:
            self.check_release(now=True)  # promoted meanwhile: these embeddings will not be ranked with
        changed = {content.item_id for content in new}
        return NewItemsResponse(
            items=[
                EncodedItem(
                    item_id=content.item_id,
                    encoder_version=self.encoder_version,
                    content_hash=content.content_hash,
                    changed=content.item_id in changed,
                    rankable=on_machines is not False or content.item_id not in changed,
                )
                for content in contents
            ]
        )

    def take_newer_snapshot(self) -> None:
        """Hold in memory no more than what came since the newest snapshot. A thread calls it."""
        newer = self._known.opened_again()
        if newer is not None:
            with self._lock:
                self._known = newer

    def _check(self, item: NewItem, place: int, now: datetime, left: TimeLimits) -> _Content:
        title = clean_title(item.title, self._limits.max_title_chars)
        if title is None and not item.image and not item.image_url:
            raise RequestError(f"items[{place}] has neither an image nor a title. Send at least one of them.", 422)
        content_at = now if item.content_at is None else item.content_at
        if content_at > now + MAX_CLOCK_SKEW:
            text = "lies in the future, so that later content could never replace it. Send the time of the change."
            raise RequestError(f"items[{place}].content_at {text}", 422)
        image, pixels = self._pictures.get(item, place, left)
        category = (item.category or "").partition("|")[0].strip() or None
        is_dated = item.content_at is not None
        return _Content(item.item_id, title, pixels, category, content_hash(title, image), content_at, is_dated)

    def _store(self, contents: Sequence[_Content]) -> bool | None:
        """One segment: durable when this returns; whether the parameter machines have it, None where there are none."""
        size = self._encoder.image_size
        images = np.zeros((len(contents), 3, size, size), np.uint8)
        has_image = np.array([content.pixels is not None for content in contents])
        for row, content in enumerate(contents):
            if content.pixels is not None:
                images[row] = content.pixels
        vectors = encode_batch(self._encoder, [content.title for content in contents], images, has_image)  # (n, D)
        if not np.isfinite(vectors).all():
            raise FloatingPointError(f"{self.encoder_version} gave an embedding that is no number")
        rows = segment_rows(
            [content.item_id for content in contents],
            vectors,
            content_hashes=[content.content_hash for content in contents],
            content_at=[content.content_at for content in contents],
            categories=[content.category for content in contents],
        )
        stored = store_new_items(self._window, rows, encoder_version=self.encoder_version, push=self._push)
        self._known.add(rows)
        return stored.on_machines


def _microseconds(at: datetime) -> int:
    return (at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
