"""Calls to parameter machines: one per shard in parallel, another replica where one fails or is slow, until a deadline."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayError

from mim_ray import artifacts
from mim_ray.config.scenario import ParameterMachines as Settings
from mim_ray.errors import ArtifactError
from mim_ray.representation_center.machine_tables import NOT_THERE, OTHER_RELEASE, Reply, joined_reply

NAMESPACE = "mim_ray"
AVOID_S = 1.0  # a replica that failed or was slow is asked last for this long
RETRY_S = 0.02


class MachineCalls:
    """The machines of one `state`, as a process reaches them."""

    def __init__(self, state: str, settings: Settings) -> None:
        self._state, self._settings = state, settings
        self._actors: dict[tuple[int, int], ActorHandle] = {}
        self._avoid: dict[tuple[int, int], float] = {}
        self._turn = itertools.count()

    def actor(self, shard: int, replica: int) -> ActorHandle:
        """
        Raises:
            ValueError: there is none.
        """
        if (shard, replica) not in self._actors:
            name = actor_name(self._state, shard, replica)
            self._actors[shard, replica] = ray.get_actor(name, namespace=NAMESPACE)
        return self._actors[shard, replica]

    def forget(self, shard: int, replica: int) -> None:
        """The machine is gone for good; another may have its name later."""
        self._actors.pop((shard, replica), None)

    def known(self) -> dict[tuple[int, int], ActorHandle]:
        """All that are there."""
        if len(self._actors) == self._settings.shards * self._settings.replicas:
            return dict(self._actors)
        for shard in range(self._settings.shards):
            for replica in range(self._settings.replicas):
                try:
                    self.actor(shard, replica)
                except ValueError:
                    continue
        return dict(self._actors)

    def ask(
        self,
        method: str,
        questions: Mapping[int, Any],
        serial: int | None,
        end: float,
        num_pieces: Callable[[Any], int] = lambda question: 0,
    ) -> tuple[dict[int, Reply], dict[int, str]]:
        """Call `method(serial, question)` on a machine of each shard.

        Args:
            questions: by shard. serial: the release to answer from; None: whichever is current.
            end: monotonic time of the deadline.
            num_pieces: of a question: how many pieces its vectors are to be sent in (`split_reply`); 0: with the reply.

        Returns:
            replies with content, or with OTHER_RELEASE where the machine has a newer one; the last problem of shards that
            have no reply.

        Raises:
            ArtifactError: the release does not have what is asked for.
        """
        replies: dict[int, Reply] = {}
        problems: dict[int, str] = {}
        running: dict[Any, tuple[int, int, float]] = {}  # call -> shard, replica, since
        pieces: dict[Any, list[Any]] = {}
        failed: dict[tuple[int, int], float] = {}  # not to be asked again before
        hedge_s = self._settings.hedge_ms / 1e3
        late = False
        while len(replies) < len(questions) and not late:
            for shard in questions.keys() - replies.keys():
                replica = self._next(shard, running, failed)
                if replica is not None:
                    try:
                        remote, num = getattr(self.actor(shard, replica), method), num_pieces(questions[shard])
                        if num:
                            call, *more = remote.options(num_returns=1 + num).remote(serial, questions[shard], num)
                            pieces[call] = more
                        else:
                            call = remote.remote(serial, questions[shard])
                        running[call] = shard, replica, time.monotonic()
                    except (RayError, ValueError) as error:
                        problems[shard] = self._note(shard, replica, error, failed)
            left = max(end - time.monotonic(), 0.0)
            late = left == 0.0  # one more look at what is running
            if not running:
                time.sleep(min(RETRY_S, left))
                continue
            all_first = not problems and len(running) == len(questions)
            ready, _ = ray.wait(list(running), num_returns=len(running) if all_first else 1, timeout=min(hedge_s, left))
            for call in ready:
                shard, replica, _ = running.pop(call)
                try:
                    reply = Reply(*ray.get(call))
                    if call in pieces and not reply.problem:
                        reply = joined_reply(reply, ray.get(pieces[call]))
                except RayError as error:
                    problems[shard] = self._note(shard, replica, error, failed)
                    continue
                if reply.problem == NOT_THERE:
                    raise ArtifactError(
                        f"Release {reply.release_id} on the parameter machines of {self._state} does not hold "
                        f"{_asked(questions[shard])}."
                    )
                if reply.problem and not (reply.problem == OTHER_RELEASE and reply.serial > (serial or 0)):
                    problems[shard] = self._note(shard, replica, reply.problem, failed)
                    continue
                replies.setdefault(shard, reply)
        return replies, problems

    def _next(
        self, shard: int, running: Mapping[Any, tuple[int, int, float]], failed: Mapping[tuple[int, int], float]
    ) -> int | None:
        """The replica to ask now; None while one that was asked may still answer soon, or there is none left."""
        now = time.monotonic()
        busy = {replica: since for place, replica, since in running.values() if place == shard}
        if any(now - since < self._settings.hedge_ms / 1e3 for since in busy.values()):
            return None
        for replica in busy:
            self._avoid[shard, replica] = now + AVOID_S
        turn, num = next(self._turn), self._settings.replicas
        left = [
            replica
            for replica in ((turn + place) % num for place in range(num))
            if replica not in busy and failed.get((shard, replica), 0.0) <= now
        ]
        return min(left, key=lambda replica: self._avoid.get((shard, replica), 0.0) > now, default=None)

    def _note(self, shard: int, replica: int, problem: object, failed: dict[tuple[int, int], float]) -> str:
        now = time.monotonic()
        failed[shard, replica], self._avoid[shard, replica] = now + RETRY_S, now + AVOID_S
        if isinstance(problem, ActorDiedError):
            self.forget(shard, replica)
        return str(problem).partition("\n")[0] or type(problem).__name__


def answers_of(calls: list[Any], timeout_s: float) -> tuple[list[Any], list[Any]]:
    """What calls answered in time, those that failed left out; and the calls that did not."""
    done, late = ray.wait(calls, num_returns=len(calls), timeout=timeout_s, fetch_local=False) if calls else ([], [])
    answers = []
    for call in done:
        with contextlib.suppress(RayError):  # the machine is away
            answers.append(ray.get(call))
    return answers, late


def actor_name(state: str, shard: int, replica: int) -> str:
    """Of the machine, in `NAMESPACE`."""
    return f"parameter-machine-{artifacts.fingerprint(state)}-s{shard}-r{replica}"


def _asked(question: Any) -> str:
    return repr(question) if isinstance(question, str) else " and ".join(repr(table) for table, *_ in question)
