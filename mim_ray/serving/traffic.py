"""A/B tests online: users are dealt out to arms, an arm's service ranks for them, and what was shown is logged.

A user's arm follows from a hash of the experiment's name and the user's id: every replica knows it without asking, it stays
while the arms and their weights stay, and it has nothing to do with the arms of another experiment.

An arm that cannot be opened is missing: its users get what everybody gets, as users of no arm, so that nothing is counted for it
that it did not rank. It is tried again about every minute.
"""

from __future__ import annotations

import hashlib
import logging
import random
import threading
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple, Protocol

from mim_ray.ciubm.export import Ranker
from mim_ray.config import Scenario
from mim_ray.config.scenario import Arm, Serving
from mim_ray.serving.background import repeat
from mim_ray.serving.exposures import Exposures, shown_now
from mim_ray.serving.messages import RankRequest, RankResponse
from mim_ray.serving.query import QueryVector
from mim_ray.serving.served import Served

logger = logging.getLogger("ray.serve")
RETRY_S = 60.0  # how often a missing arm is tried again


class Ranks(Protocol):
    """A RankingService."""

    default_features: Counter[str]
    degraded_answers: Counter[str]

    @property
    def model(self) -> Ranker: ...

    @property
    def waits(self) -> bool: ...

    def is_short(self, request: RankRequest) -> bool: ...

    def rank(self, request: RankRequest, query: QueryVector | None = None) -> RankResponse: ...


class Chosen(NamedTuple):
    """What ranks for a user, and the arm that it counts for: None without arms, and where the user's arm is missing."""

    service: Ranks
    arm: str | None


class Traffic:
    """
    Args:
        arms: those that do not rank with what is served to everybody else. open_service: opens one of them.
        exposures: None logs nothing.
    """

    def __init__(
        self,
        serving: Serving,
        arms: Mapping[str, Served],
        open_service: Callable[[Served], Ranks],
        exposures: Exposures | None,
    ) -> None:
        self._weights = {name: arm.weight for name, arm in serving.arms.items()}
        self._experiment, self._exposed_items = serving.experiment, serving.exposed_items
        self._arms, self._open_service = dict(arms), open_service
        self._services: dict[str, Ranks] = {}  # replaced, never changed: requests read it beside `open_missing`
        self._problems: dict[str, str] = {}
        self._stop = threading.Event()
        self.exposures = exposures

    @classmethod
    def open(
        cls, serving: Serving, served: Served, arms: Mapping[str, Served], open_service: Callable[[Served], Ranks]
    ) -> Traffic:
        """With all arms that can be opened; the others are tried again until `stop`, or until nobody holds it.

        Args:
            served: names the representation center. arms: from `arms_of`.
        """
        log = bool(serving.arms) if serving.log_exposures is None else serving.log_exposures
        traffic = cls(serving, arms, open_service, Exposures.open(served.center, serving) if log else None)
        traffic.open_missing()
        if traffic.missing:
            every_s = lambda: RETRY_S * random.uniform(0.8, 1.2)  # noqa: E731 - replicas drift apart
            repeat(traffic, traffic._stop, "missing-arms", every_s, Traffic.open_missing)
        return traffic

    @property
    def services(self) -> Collection[Ranks]:
        """Of the arms that have one of their own."""
        return self._services.values()

    @property
    def missing(self) -> list[str]:
        """Names of the arms that cannot be opened."""
        return [name for name in self._arms if name not in self._services]

    def open_missing(self) -> None:
        """Try the missing arms once. One that cannot be opened, for whatever reason, stays missing, and the log says why: a
        replica that dies must come back for all other users."""
        for name in self.missing:
            try:
                service = self._open_service(self._arms[name])
            except Exception as error:  # noqa: BLE001
                reason = str(error) or type(error).__name__
                if reason != self._problems.get(name):
                    logger.error("The arm %s cannot be served; its users are in no arm meanwhile: %s", name, reason)
                self._problems[name] = reason
                continue
            self._services = {**self._services, name: service}
            if self._problems.pop(name, None) is not None:
                logger.warning("The arm %s is served now.", name)
        if not self.missing:
            self._stop.set()

    def stop(self) -> None:
        """Try missing arms no more."""
        self._stop.set()

    def arm_of(self, user_id: str) -> str | None:
        """That the user belongs to, missing or not."""
        return arm_of(user_id, self._experiment, self._weights)

    def choose(self, user_id: str, everybody: Ranks) -> Chosen:
        """What ranks for the user: the service of their arm, which is `everybody`'s where the arm has none of its own or is missing."""
        arm = self.arm_of(user_id)
        if arm not in self._arms:
            return Chosen(everybody, arm)
        service = self._services.get(arm)
        return Chosen(everybody, None) if service is None else Chosen(service, arm)

    def rank(self, request: RankRequest, chosen: Chosen, query: QueryVector | None = None) -> RankResponse:
        """Rank with what was chosen for the request's user, and log what is shown."""
        answer = chosen.service.rank(request, query)
        if chosen.arm is not None:
            answer = answer.model_copy(update={"arm": chosen.arm})
        if self.exposures is not None:
            number = "" if answer.release is None else f"@{answer.release}"
            items = [item.item_id for item in answer.items]
            self.exposures.add(
                shown_now(
                    answer.request_id,
                    request.user_id,
                    chosen.arm,
                    answer.model_version + number,
                    items,
                    self._exposed_items,
                )
            )
        return answer


def arm_of(user_id: str, experiment: str, weights: Mapping[str, float]) -> str | None:
    """The user's arm: a share of the users that is proportional to its weight; None without arms."""
    digest = hashlib.blake2b(f"{experiment}\0{user_id}".encode(), digest_size=8).digest()
    left = int.from_bytes(digest) / 2**64 * sum(weights.values())
    name = None
    for name, weight in weights.items():  # noqa: B007 - the last one where rounding leaves something
        left -= weight
        if left < 0:
            break
    return name


def arms_of(scenario: Scenario, served: Served) -> dict[str, Served]:
    """What the arms serve that name a variant or a release; the others rank with what is served, as releases come and go.

    Raises:
        MimRayError: an arm's release is not there.
    """
    named = {name: arm for name, arm in scenario.serving.arms.items() if arm != Arm(weight=arm.weight)}
    return {name: Served.of_arm(scenario, arm, served) for name, arm in named.items()}
