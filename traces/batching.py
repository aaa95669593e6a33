"""How requests share forward passes: fixed batches or lanes that are refilled, prompts in chunks, arrivals over time.

Where requests arrive over time, the order of the passes depends on how long each one takes. A clock then asks a
*scheduler* for one pass after the other; where the order is known beforehand, it is written down as a
:class:`~traces.workload.Workload`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from traces.arrivals import Arrivals
from traces.errors import InputError, unknown_name
from traces.limits import MOST_BATCH
from traces.schedule import by_sequence
from traces.schema import Array, Phase, Trace
from traces.workload import Step, Workload, lock_step

POISSON = "poisson"


class BatchSpec(BaseModel):
    """Which requests share forward passes, and when they are there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: PositiveInt = Field(default=1, le=MOST_BATCH, description="lanes: sequences that can be under way together")
    batching: Literal["lock-step", "continuous"] = Field(
        default="lock-step", description="continuous: a lane that has ended takes the next request at the next pass"
    )
    prefill_chunk: NonNegativeInt = Field(default=0, description="most tokens of a prefill pass; 0: whole prompts")
    arrivals: str | None = Field(default=None, description="poisson, or a CSV file of times; else all are there")
    rate_per_s: float | None = Field(
        default=None,
        ge=1e-6,
        le=1e6,
        allow_inf_nan=False,
        description="requests a second; recorded times are stretched to it",
    )
    seed: NonNegativeInt = Field(default=0, description="of the Poisson process")

    @classmethod
    def of(cls, **values: Any) -> BatchSpec:
        """Builds one; raises :class:`InputError` with one line for what is wrong."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise _fault(error) from error

    @model_validator(mode="after")
    def _rate_fits(self) -> BatchSpec:
        if self.arrivals == POISSON and self.rate_per_s is None:
            raise ValueError("rate_per_s must be given with poisson arrivals, got nothing")
        if self.arrivals is None and self.rate_per_s is not None:
            raise ValueError(f"rate_per_s must be left out without arrivals, got {self.rate_per_s:g}")
        return self

    def arrivals_for(self, requests: int) -> Arrivals | None:
        """When each of so many requests arrives; None where nothing is said of it."""
        if self.arrivals is None:
            return None
        if self.arrivals == POISSON:
            assert self.rate_per_s is not None, "checked when it was made"
            return Arrivals.poisson(self.rate_per_s, requests, np.random.default_rng(self.seed))
        recorded = Arrivals.read(Path(self.arrivals), requests)
        return recorded if self.rate_per_s is None else recorded.at_rate(self.rate_per_s)

    def about(self) -> dict[str, Any]:
        """What a record of a run says beside the order and the lanes; nothing where it is as ever."""
        said: dict[str, Any] = {"prefill_chunk": self.prefill_chunk} if self.prefill_chunk else {}
        if self.arrivals is not None:
            said |= {"arrivals": Path(self.arrivals).name, "rate_per_s": self.rate_per_s}
        return said | ({"seed": self.seed} if self.arrivals == POISSON else {})


def _fault(error: ValidationError) -> InputError:
    """The first complaint, worded as ``FIELD must RULE, got VALUE``."""
    first = error.errors()[0]
    field, rule = ".".join(map(str, first["loc"])), first["msg"].replace("Input should", "must")
    if first["type"] == "value_error":
        return InputError(rule.removeprefix("Value error, "))
    if first["type"] == "extra_forbidden":
        return unknown_name("field", field, BatchSpec.model_fields)
    return InputError(f"{field} {rule}, got {first['input']!r}")


@dataclass(frozen=True, eq=False)
class Requests:
    """The sequences of a trace as requests, in order of first appearance, which is that of their arrivals."""

    trace: Trace
    spec: BatchSpec
    arrivals: Arrivals | None  # None: every request is there when its turn comes

    @property
    def batch(self) -> int:
        """Lanes."""
        return self.spec.batch

    @property
    def context(self) -> int:
        """Tokens of the longest KV cache."""
        return int(self.trace.position.max()) + 1

    def scheduler(self) -> Lanes:
        """Says pass after pass what comes next; one serves one run."""
        return Lanes(self)

    def in_order(self) -> Workload:
        """The passes in the order in which they come when all requests are there from the beginning."""
        lanes = self.scheduler()
        while lanes.next(float("inf")) is not None:
            pass
        return lanes.ran()


def schedule_of(trace: Trace, spec: BatchSpec) -> Workload | Requests:
    """What is to be run: the passes where their order does not depend on the clock, else the requests.

    The n-th sequence of ``trace``, in order of first appearance, is the n-th request to arrive; how long it is, the
    trace says, and not the file of arrivals. Raises :class:`InputError` for arrivals that cannot be read, or are too
    few.
    """
    arrivals = spec.arrivals_for(len(by_sequence(trace).starts))
    if arrivals is None and spec.batching == "lock-step" and not spec.prefill_chunk:
        return lock_step(trace, spec.batch)
    requests = Requests(trace, spec, arrivals)
    return requests if arrivals is not None and arrivals.times_s.any() else requests.in_order()


def known_order(plan: Workload | Requests, policy: str) -> Workload:
    """``plan`` if its order is known beforehand; raises :class:`InputError` on behalf of ``policy`` if it is not."""
    if isinstance(plan, Requests):
        raise InputError(
            f"arrivals must be left out (or all be 0) for {policy}, which has to know the order of all that is to "
            f"come, got {plan.spec.arrivals}"
        )
    return plan


class Scheduler(ABC):
    """Says what a clock does next. ``arrival_s`` has the arrivals by sequence; who is missing arrives when begun."""

    arrival_s: Mapping[int, float]

    @abstractmethod
    def next(self, now_s: float) -> Step | float | None:
        """The next forward pass, or the time to wait for, later than ``now_s``, or None at the end.

        To be called when the pass before has ended, or the time has come.
        """


class InOrder(Scheduler):
    """Passes whose order is known."""

    def __init__(self, steps: Iterable[Step]) -> None:
        self.arrival_s = steps.arrival_s if isinstance(steps, Workload) else {}
        self._steps = iter(steps)

    def next(self, now_s: float) -> Step | float | None:
        return next(self._steps, None)


@dataclass(slots=True, eq=False)
class _Request:
    """A sequence, and how far it is."""

    sequence: int
    rows: Array  # int64, of the whole sequence
    prompt: int  # how many of them are the prompt's
    before: int  # tokens in its KV cache that come before the first row
    arrival_s: float
    done: int = 0  # rows that have been computed

    @property
    def ended(self) -> bool:
        return self.done == len(self.rows)

    @property
    def context(self) -> int:
        return self.before + self.done


class Lanes(Scheduler):
    """Forms the passes of requests over a number of lanes, first come, first served.

    In lock-step, all lanes take a request that has arrived, compute their prompts, then their tokens, and take new
    requests when all have ended. In continuous batching a lane takes the next request before the pass that follows its
    last one. Prompts go first, but no two prefill passes follow each other while a lane waits to decode: a long prompt
    in chunks holds nobody up for longer than one chunk (cf. Agrawal et al., Sarathi-Serve, OSDI 2024, where chunks and
    tokens share a pass; here they stay apart). A prefill pass computes at most ``prefill_chunk`` tokens, of as many
    prompts as fit, in the order in which the requests were taken, which is the order of lanes in every pass. The
    context of a pass counts all lanes of a batch in lock-step, and those that it computes in continuous batching.
    """

    def __init__(self, requests: Requests) -> None:
        self.steps: list[Step] = []
        self._trace, self._spec = requests.trace, requests.spec
        self._continuous = requests.spec.batching == "continuous"
        self._waiting = deque(_requests(requests))
        given = requests.arrivals is not None
        self.arrival_s = {one.sequence: one.arrival_s for one in self._waiting} if given else {}
        self._lanes: list[_Request] = []
        self._prefilled = False  # in the pass before

    def next(self, now_s: float) -> Step | float | None:
        self._refill(now_s)
        if not self._lanes:
            return self._waiting[0].arrival_s if self._waiting else None
        phase, parts = self._choose()
        self._prefilled = phase == Phase.PREFILL
        step = self._step(phase, parts)
        self.steps.append(step)
        return step

    def ran(self) -> Workload:
        """The passes so far."""
        spec = self._spec
        return Workload(self._trace, spec.batch, self.steps, spec.batching, self.arrival_s, spec.about())

    def _refill(self, now_s: float) -> None:
        going = [lane for lane in self._lanes if not lane.ended]
        if going and not self._continuous:
            return
        self._lanes = going
        while self._waiting and len(going) < self._spec.batch and self._waiting[0].arrival_s <= now_s:
            going.append(self._waiting.popleft())

    def _choose(self) -> tuple[Phase, list[tuple[_Request, int]]]:
        """The next pass: its phase, and how many tokens of whom."""
        prompts = [lane for lane in self._lanes if lane.done < lane.prompt]
        decoding = [lane for lane in self._lanes if lane.done >= lane.prompt and not lane.ended]
        if prompts and not (self._continuous and self._prefilled and decoding):
            return Phase.PREFILL, self._chunks(prompts)
        return Phase.DECODE, [(lane, 1) for lane in decoding]

    def _chunks(self, prompts: Sequence[_Request]) -> list[tuple[_Request, int]]:
        parts = [(lane, lane.prompt - lane.done) for lane in prompts]
        if not self._spec.prefill_chunk:
            return parts
        room, chunks = self._spec.prefill_chunk, []
        for lane, left in parts:
            if room:
                chunks.append((lane, min(left, room)))
                room -= chunks[-1][1]
        return chunks

    def _step(self, phase: Phase, parts: Sequence[tuple[_Request, int]]) -> Step:
        """The pass that computes ``parts``, which are counted as done."""
        chosen = [lane for lane, _ in parts]
        starts = tuple(lane.sequence for lane in chosen if not lane.done)
        under_way = sum(lane.done > 0 and not lane.ended for lane in self._lanes)
        rows = [lane.rows[lane.done : lane.done + count] for lane, count in parts]
        for lane, count in parts:
            lane.done += count
        return Step(
            index=len(self.steps),
            phase=phase,
            rows=rows[0] if len(rows) == 1 else np.concatenate(rows),
            sequences=tuple(lane.sequence for lane in chosen),
            tokens=tuple(count for _, count in parts),
            context=max(lane.context for lane in (chosen if self._continuous else self._lanes)),
            starts=starts,
            ends=tuple(lane.sequence for lane in chosen if lane.ended),
            others=under_way - (len(chosen) - len(starts)),
        )


def _requests(requests: Requests) -> list[_Request]:
    """The sequences of the trace, in order of first appearance, with their arrivals."""
    trace, order = requests.trace, by_sequence(requests.trace)
    rows = np.split(order.rows, order.starts[1:])
    prompts = np.add.reduceat(np.asarray(trace.phase)[order.rows] == Phase.PREFILL, order.starts, dtype=np.int64)
    first = order.rows[order.starts]
    times_s = np.zeros(len(rows)) if requests.arrivals is None else requests.arrivals.times_s
    columns = (np.asarray(trace.sequence)[first], prompts, np.asarray(trace.position)[first], times_s)
    sequence, prompt, before, arrival_s = [column.tolist() for column in columns]
    return [*map(_Request, sequence, rows, prompt, before, arrival_s)]
