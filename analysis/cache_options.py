"""The words of ``moetwin cache`` turned into what a replay takes; every mistake is told before the first replay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from analysis.cache_study import Choice
from sim.constants import constant_of
from sim.custom import load_policy
from sim.policies import EVICTION
from sim.policies.base import Calibration, EvictionPolicy
from sim.replay import Capacity, Feed, Settings
from sim.replay.calibration import TraceCalibration
from sim.replay.result import PHASES
from sim.replay.run import check_inputs, find_policy
from sim.replay.settings import Contract, Scope, Sequences, UseOrder
from traces import store
from traces.errors import InputError, unknown_name
from traces.schema import Trace
from traces.shipped import find_trace

ALL = "all"
DEFAULT_CAPACITY = "25%"


@dataclass(frozen=True)
class Request:
    """The options that more than one sub-command has, as they were given."""

    trace: str
    policies: str
    scope: str = "layer"
    contract: str = "atomic"
    order: str | None = None
    sequences: str = "carry"
    batch: int = 1
    warmup: int = 0
    seed: int = 0
    calibration: str | None = None
    policy_file: Sequence[str] = ()
    option: Sequence[str] = ()
    strict: bool = False


@dataclass(frozen=True, eq=False)
class Session:
    """What a request comes to: a trace to feed, policies to replay, and how."""

    feed: Feed
    choices: list[Choice]
    notes: list[str]
    calibration: Calibration | None
    settings: Settings  # but for the policy and its capacity
    name: str  # of the model and of the trace, as a title has them

    @classmethod
    def of(cls, request: Request) -> Session:
        """Reads the traces and the policies; raises :class:`InputError` for whatever is wrong with them."""
        settings = _settings(request)
        trace, changed = _read(request.trace)
        feed = Feed.of(trace, request.batch, request.warmup)
        calibration = None
        if request.calibration is not None:
            other, also = _read(request.calibration, "calibration")
            changed += also
            calibration = TraceCalibration.of(other, feed.trace, request.batch)
        choices, notes = choose(
            feed,
            request.policies,
            request.policy_file,
            request.option,
            calibration=calibration,
            strict=request.strict,
        )
        return cls(feed, choices, changed + notes, calibration, settings, name_of(feed.trace, request.trace))


def _read(name: str, field: str = "trace") -> tuple[Trace, list[str]]:
    """The trace, and what has to be told of it."""
    path = find_trace(name, field)
    trace = store.load(path)
    return trace, store.notes_on(trace, path)


def name_of(trace: Trace, given: str) -> str:
    """The model and the trace, which was ``given`` as a path or by its name, for titles."""
    return f"{trace.header.model}, trace {Path(given).name}"


_UNSET = Capacity(1, "slots", "")


def _settings(request: Request) -> Settings:
    contract = one_of("contract", request.contract, Contract)
    if request.order is not None and contract != "serial":
        raise InputError(f"order must be left out under the {contract} contract, got {request.order}")
    return Settings(
        policy="",
        capacity=_UNSET,
        scope=one_of("scope", request.scope, Scope),
        contract=contract,
        order=one_of("order", request.order or "as-routed", UseOrder),
        sequences=one_of("sequences", request.sequences, Sequences),
        seed=request.seed,
    )


def one_of(field: str, value: str, names: Any) -> Any:
    """``value`` when it is one of the names of a ``Literal``; raises :class:`InputError` with the near ones."""
    if value not in get_args(names):
        raise unknown_name(field, value, get_args(names))
    return value


def words(text: str, field: str) -> list[str]:
    """The entries of a list with commas, each once; raises :class:`InputError` when there is none."""
    found = [part.strip() for part in text.split(",")]
    if not all(found):
        raise InputError(f"{field} must be names or numbers with commas between them, got {text!r}")
    return list(dict.fromkeys(found))


def phases_of(text: str, trace: Trace) -> list[str]:
    """The phases to report; raises :class:`InputError` for one that the trace does not have."""
    wanted = words(text, "phases")
    for name in wanted:
        if name not in PHASES:
            raise unknown_name("phase", name, PHASES)
    present = set(np.flatnonzero(np.bincount(trace.phase)).tolist())
    for name in wanted:
        if present.isdisjoint(PHASES[name]):
            there = next(other for other, phases in PHASES.items() if other != "all" and not present.isdisjoint(phases))
            raise InputError(f"phase must be one that the trace has ({there}), got {name}")
    return wanted


def capacities_of(share: str | None, size: str | None, session: Session) -> list[Settings]:
    """The settings of each capacity: from ``--capacity``, or from ``--bytes``, but not both."""
    if share is not None and size is not None:
        raise InputError(f"bytes must not be given together with capacity, got {size} and {share}")
    header, scope = session.feed.trace.header, session.settings.scope
    if size is not None:
        found = [Capacity.bytes(text, header, scope) for text in words(size, "bytes")]
    else:
        found = [Capacity.slots(text, header, scope) for text in words(share or DEFAULT_CAPACITY, "capacity")]
    return [replace(session.settings, capacity=capacity) for capacity in found]


def choose(
    feed: Feed,
    names: str,
    files: Sequence[str],
    options: Sequence[str],
    *,
    calibration: Calibration | None,
    strict: bool,
) -> tuple[list[Choice], list[str]]:
    """The policies that ``names`` and ``files`` ask for, with their constants, and what to say of the choice.

    ``strict`` refuses gates in the place of scores. Raises :class:`InputError` for a policy or a constant that is
    unknown, for what a policy needs and does not get, and when there is no policy at all.
    """
    kinds, notes = _registered(feed, names, calibration=calibration, strict=strict) if names else ({}, [])
    for text in files:
        kind = load_policy(text)
        if kind.name in EVICTION or kind.name in kinds:
            raise InputError(f"policy_file must have a class with a name of its own, got {kind.name!r} in {text}")
        kinds[kind.name] = kind
    for kind in kinds.values():
        check_needs(feed, kind, calibration=calibration, strict=strict)
    guessing = [name for name, kind in kinds.items() if "scores" in kind.needs and feed.trace.scores is None]
    if guessing:
        notes.append(f"{', '.join(guessing)}: gates of the chosen experts instead of the router's scores, not recorded")
    if not kinds:
        raise InputError(f"policies must name at least one policy, got {names!r}")
    constants = _constants(kinds, options)
    return [Choice(name, kind, constants[name]) for name, kind in kinds.items()], notes


def _registered(
    feed: Feed, names: str, *, calibration: Calibration | None, strict: bool
) -> tuple[dict[str, type[EvictionPolicy]], list[str]]:
    wanted = words(names, "policies")
    if ALL not in wanted:
        return {name: find_policy(name) for name in wanted}, []
    kinds, without = {}, []
    for name, kind in EVICTION.items():
        try:
            check_needs(feed, kind, calibration=calibration, strict=strict)
            kinds[name] = kind
        except InputError as error:
            without.append(f"without {name}: {error}")
    return kinds, without


def check_needs(feed: Feed, kind: type[EvictionPolicy], *, calibration: Calibration | None, strict: bool) -> None:
    """Raises :class:`InputError` when ``kind`` needs what is not there."""
    if strict and "scores" in kind.needs and feed.trace.scores is None:
        raise InputError(f"trace must have the router's scores for {kind.name} (strict), got none")
    check_inputs(feed, kind, calibration)


def _constants(kinds: dict[str, type[EvictionPolicy]], options: Sequence[str]) -> dict[str, dict[str, Any]]:
    """All constants of each policy: its defaults, or what ``options`` say, as name=value or policy.name=value."""
    constants = {name: dict(kind.defaults) for name, kind in kinds.items()}
    for text in options:
        path, equals, value = text.partition("=")
        policy, dot, name = path.strip().rpartition(".")
        if not equals or not name:
            raise InputError(f"option must be name=value, got {text!r}")
        if dot and policy not in kinds:
            raise unknown_name("option's policy", policy, kinds)
        takers = [policy] if dot else [one for one in kinds if name in constants[one]]
        known = _known(constants, [policy] if dot else kinds)
        if name not in known:
            raise (
                unknown_name("option", name, known)
                if known
                else InputError(
                    f"option must be a constant of a policy that has one, got {text!r} for {', '.join(kinds)}"
                )
            )
        for taker in takers:
            constants[taker][name] = constant_of(constants[taker][name], value.strip(), path.strip())
    return constants


def _known(constants: dict[str, dict[str, Any]], policies: Iterable[str]) -> set[str]:
    return {name for policy in policies for name in constants[policy]}
