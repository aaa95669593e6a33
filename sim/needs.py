"""Whether a trace, or a model that decodes, gives what the policies of a system ask for."""

from __future__ import annotations

from sim.costs import Costs
from sim.policies.base import Calibration
from sim.systems import Budget, SystemSpec
from traces.errors import InputError
from traces.schema import Trace


def check_needs(trace: Trace, system: SystemSpec, calibration: Calibration | None = None) -> None:
    """Raises :class:`InputError` unless ``trace`` and ``calibration`` give what the policies of ``system`` ask for."""
    check_calibration(system, calibration)
    if "gates" in system.needs and trace.gates is None:
        raise InputError(f"trace must have gates for defer {system.deferral} of {system.place}, got none")
    if "scores" in system.needs and trace.scores is None and trace.gates is None:
        raise InputError(
            f"trace must have the router's scores, or at least gates, for {system.needing('scores')}, got neither"
        )
    if trace.lookahead_depth < system.lookahead_depth:
        raise InputError(
            f"trace must have look-ahead of depth {system.lookahead_depth} for prefetch {system.needing('lookahead')}, "
            f"got depth {trace.lookahead_depth}"
        )
    if "residuals" in system.needs and not has_residuals(trace):
        raise InputError(
            f"trace must have look-ahead by the residual router for prefetch {system.needing('residuals')}, got "
            "another one's (record it with --lookahead-router residual, or prefetch with next-router)"
        )


def check_costs(costs: Costs, system: SystemSpec, budget: Budget) -> None:
    """Raises :class:`InputError` unless ``costs`` tell of what some runs alone ask for: dense CPU work, a disk."""
    if system.dense_follows:
        costs.cpu_dense_s(1, 1)
    if budget.host_slots is not None:
        costs.read_s(1)


def has_residuals(trace: Trace) -> bool:
    """Whether its look-ahead is a residual router's, or was made to the recall of one's."""
    return trace.header.lookahead_router == "residual"


def router_means(calibration: Calibration | None) -> str:
    """The mean router inputs that a calibration trace was recorded with; empty for none."""
    found: str = getattr(calibration, "router_means", "")
    return found


def learned_digest(calibration: Calibration | None) -> str:
    """Digest of the trace that policies are given to learn from; empty for none, and for what has no digest."""
    found: str = getattr(calibration, "digest", "")
    return found


def check_calibration(system: SystemSpec, calibration: Calibration | None) -> None:
    """Raises :class:`InputError` when a policy of ``system`` has to be fitted, and there is nothing to fit it to."""
    if "calibration" in system.needs and calibration is None:
        raise InputError(
            f"calibration must be given for {system.needing('calibration')}, a trace apart from the one that is run"
        )


def check_causal(system: SystemSpec, calibration: Calibration | None = None) -> None:
    """Raises :class:`InputError` unless ``system`` can run where the routing is not known beforehand."""
    if "future" in system.needs:
        raise InputError(
            f"policies must be causal to decode prompts, got {system.needing('future')} (replay a trace instead)"
        )
    check_calibration(system, calibration)
    if "residuals" in system.needs and not router_means(calibration):
        raise InputError(
            f"calibration must be a trace recorded with --lookahead-router residual for {system.needing('residuals')}, "
            f"got {'none' if calibration is None else 'another'}"
        )
