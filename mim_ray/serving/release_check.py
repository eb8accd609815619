"""The new-item encoder under a release: it encodes nothing with another encoder version than the release's."""

from __future__ import annotations

import time

from mim_ray.representation_center.release import check_versions, read_release


class ReleaseCheck:
    """
    Args:
        center: whose release counts. every_s: it is looked at no more often.
    """

    def __init__(self, center: str, encoder_version: str | None, every_s: float) -> None:
        self._center, self._encoder_version, self._every_s = center, encoder_version, every_s
        self._good_until = float("-inf")

    def __call__(self, *, now: bool = False) -> None:
        """
        Args:
            now: look, however short ago that was done last.

        Raises:
            VersionMismatchError: another encoder version was promoted: what this one makes would not be ranked with.
        """
        if not now and time.monotonic() < self._good_until:
            return
        release = read_release(self._center)
        if release is not None:
            check_versions(
                release.encoder_version,
                self._encoder_version,
                expected_by=f"Release {release.number} of {self._center}",
                found_in="this replica of the new-item encoder, until the other one is open,",
            )
        self._good_until = time.monotonic() + self._every_s
