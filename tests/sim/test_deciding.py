"""What a profile tells of deciding: by system or by policy, and more for layers of many experts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sim.profile import ProfileCosts, decided_by
from sim.run import simulate
from sim.spec.profile import TOGETHER, Planning, Profile
from sim.systems import Budget, SystemSpec
from tests.sim import hand
from tests.sim.profiles import SPEC
from tests.sim.test_profile_runs import PROFILE
from traces.synthetic import Sizes, zipf
from traces.workload import Workload, one_at_a_time

SYSTEM = SystemSpec(evict="mrs", place="hybrimoe", prefetch="impact")


def profile(*planning: Planning) -> Profile:
    return PROFILE.model_copy(update={"planning": planning})


def one(kind: str, policy: str, layer_s: float, expert_s: float = 0.0) -> Planning:
    return Planning(kind=kind, policy=policy, layer_s=layer_s, expert_s=expert_s)


def a_prompt() -> Workload:
    sizes = Sizes(
        sequences=1, prompt_tokens=6, new_tokens=3, layers=2, experts=8, top_k=2, expert_bytes=SPEC.expert_bytes
    )
    return one_at_a_time(zipf(np.random.default_rng(0), sizes))


@pytest.mark.parametrize("system", [SystemSpec(place="hybrimoe"), SystemSpec(place="hybrimoe", prefetch="popularity")])
def test_a_layer_of_many_experts_takes_longer_to_decide(system: SystemSpec) -> None:
    """A second, half a second for the policy, and a quarter for each expert beyond the two of a token."""
    costs = ProfileCosts(profile(one("place", "hybrimoe", 0.5, 0.25)))
    layers = simulate(a_prompt(), system, Budget(slots=3), costs, hardware="here").layers
    unions = layers.hits_union + layers.late_hits + layers.misses
    assert layers.python_s.tolist() == [1.5 + 0.25 * (union - 2) for union in unions]
    assert unions[layers.phase == 0].min() > 2
    assert {*unions[layers.phase == 1]} == {2}


def test_the_time_passes_on_both_machines_of_the_engine() -> None:
    """The dense part takes 1, and each layer 8 experts: what is decided with contention and without takes as long."""
    trace = hand.trace_of([[[0], [1]]], experts=4)
    quick, slow = (hand.HandCosts(deciding=s) for s in (0.0, 2.0))
    contended = hand.HandCosts(deciding=2.0, slow={("gpu", "link"): 1.0, ("link", "cpu"): 2.0})
    ends_s = []
    for costs in (quick, slow, contended):
        run = simulate(one_at_a_time(trace), SystemSpec(), Budget(slots=2), costs, hardware="hand")
        ends_s.append(float(run.tokens.end_s.iloc[-1]))
    assert ends_s[1] == ends_s[2] == ends_s[0] + 2 * 2.0


def test_policies_that_were_timed_together_count_as_they_were() -> None:
    parts = [one("evict", "mrs", 1.0, 1.0), one("place", "hybrimoe", 2.0, 1.0), one("prefetch", "impact", 4.0)]
    together = one(TOGETHER, decided_by(SYSTEM), 16.0, 8.0)
    apart, both = ProfileCosts(profile(*parts)), ProfileCosts(profile(*parts, together))
    for costs, layer_s, expert_s in ((apart, 7.0, 2.0), (both, 16.0, 8.0)):
        made = costs.for_run(SYSTEM, 9)
        assert (made.host.controller_s, made.deciding_s(5)) == (1.0 + layer_s, 3 * expert_s)
        assert made.slow().deciding_s(5) == 3 * expert_s
        assert made.deciding_s(1) == 0.0
        assert costs.deciding_s(5) == 0.0
    for other in ({"scope": "global"}, {"options": {"prefetch": {"most": 1}}}):
        assert both.for_run(SYSTEM.model_copy(update=other), 9).host.controller_s == 8.0


def test_profiles_without_the_later_number_are_what_they_were(tmp_path: Path) -> None:
    assert one("place", "hybrimoe", 0.5).model_dump() == {"kind": "place", "policy": "hybrimoe", "layer_s": 0.5}
    old, new = profile(one("place", "hybrimoe", 0.5)), profile(one("place", "hybrimoe", 0.5, 0.25))
    assert old.digest != new.digest
    for written in (old, new):
        written.save(tmp_path / "profile.toml", force=True)
        assert Profile.load(tmp_path / "profile.toml") == written
        assert ("expert_s" in (tmp_path / "profile.toml").read_text(encoding="utf-8")) == (written is new)
