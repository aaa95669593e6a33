"""Whether a trace, or a model that decodes, gives what the policies of a system ask for."""

from __future__ import annotations

from sim.policies.base import Calibration
from sim.systems import SystemSpec
from traces.errors import InputError
from traces.schema import Trace


def check_needs(trace: Trace, system: SystemSpec, calibration: Calibration | None = None) -> None:
    """Raises :class:`InputError` unless ``trace`` and ``calibration`` give what the policies of ``system`` ask for."""
    check_calibration(system, calibration)
    if "scores" in system.needs and trace.scores is None and trace.gates is None:
        raise InputError(
            f"trace must have the router's scores, or at least gates, for {system.needing('scores')}, got neither"
        )
    if trace.lookahead_depth < system.lookahead_depth:
        raise InputError(
            f"trace must have look-ahead of depth {system.lookahead_depth} for prefetch {system.needing('lookahead')}, "
            f"got depth {trace.lookahead_depth}"
        )


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
