"""A/B tests online: users are dealt out to arms, an arm's service ranks for them, and what was shown is logged.

A user's arm follows from a hash of the experiment's name and the user's id: every replica knows it without asking, it stays
while the arms and their weights stay, and it has nothing to do with the arms of another experiment.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Protocol

from mim_ray.ciubm.export import Ranker
from mim_ray.config import Scenario
from mim_ray.config.scenario import Arm, Serving
from mim_ray.errors import MimRayError
from mim_ray.serving.exposures import Exposures, shown_now
from mim_ray.serving.messages import RankRequest, RankResponse
from mim_ray.serving.query import QueryVector
from mim_ray.serving.served import Served

logger = logging.getLogger("ray.serve")


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


class Traffic:
    """
    Args:
        services: of the arms that do not rank with what is served to everybody else. exposures: None logs nothing.
    """

    def __init__(self, serving: Serving, services: Mapping[str, Ranks], exposures: Exposures | None) -> None:
        self._weights = {name: arm.weight for name, arm in serving.arms.items()}
        self._experiment, self._exposed_items = serving.experiment, serving.exposed_items
        self._services = dict(services)
        self.exposures = exposures

    @classmethod
    def open(
        cls, serving: Serving, served: Served, arms: Mapping[str, Served], open_service: Callable[[Served], Ranks]
    ) -> Traffic:
        """
        Args:
            served: names the representation center. arms: from `arms_of`.
        """
        log = bool(serving.arms) if serving.log_exposures is None else serving.log_exposures
        return cls(
            serving,
            {
                name: service
                for name, other in arms.items()
                if (service := _open(name, other, open_service)) is not None
            },
            Exposures.open(served.center, serving) if log else None,
        )

    @property
    def services(self) -> Collection[Ranks]:
        """Of the arms that have one of their own."""
        return self._services.values()

    def arm_of(self, user_id: str) -> str | None:
        return arm_of(user_id, self._experiment, self._weights)

    def service_of(self, arm: str | None, everybody: Ranks) -> Ranks:
        """What ranks for an arm's users."""
        return everybody if arm is None else self._services.get(arm, everybody)

    def rank(self, request: RankRequest, everybody: Ranks, query: QueryVector | None = None) -> RankResponse:
        """Rank with the service of the user's arm, which is `everybody`'s where the arm has none of its own."""
        arm = self.arm_of(request.user_id)
        answer = self.service_of(arm, everybody).rank(request, query)
        if arm is not None:
            answer = answer.model_copy(update={"arm": arm})
        if self.exposures is not None:
            number = "" if answer.release is None else f"@{answer.release}"
            items = [item.item_id for item in answer.items]
            self.exposures.add(
                shown_now(
                    answer.request_id, request.user_id, arm, answer.model_version + number, items, self._exposed_items
                )
            )
        return answer


def _open(name: str, served: Served, open_service: Callable[[Served], Ranks]) -> Ranks | None:
    """None, and a line in the log, where it cannot be opened: a replica that dies must come back for all other users."""
    try:
        return open_service(served)
    except MimRayError as error:
        logger.error("The arm %s cannot be served; its users get what everybody gets: %s", name, error)
        return None


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
