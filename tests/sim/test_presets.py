"""Published systems, and systems of a user's own: what they are made of, what is refused, and in which words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sim.options import system_of
from sim.presets import Preset, find_preset, preset, preset_names
from sim.systems import Budget, SystemSpec
from tests.sim.hand import misses_by_step, run, trace_of
from traces.errors import InputError

PUBLISHED = frozenset(
    {
        "all-resident",
        "on-demand",
        "layer-split",
        "cpu-experts",
        "ktransformers",
        "fiddler",
        "mixtral-offloading",
        "moe-infinity",
        "se-moe",
        "pre-gated",
        "adapmoe",
        "hybrimoe",
        "hybrimoe-code",
        "dali",
        "freetoken",
        "oracle",
    }
)
"""Every row of the comparison but ExpertFlow's."""
OWN = """
from sim.policies import EvictionPolicy

class Own(EvictionPolicy):
    def key(self, block):
        return 0
"""


@pytest.fixture
def system_file(tmp_path: Path) -> Callable[[str], str]:
    def written(text: str) -> str:
        (tmp_path / "mine.toml").write_text(text)
        return str(tmp_path / "mine.toml")

    return written


def test_every_published_system_stands_there_with_its_source() -> None:
    assert set(preset_names()) >= PUBLISHED
    for name in preset_names():
        found = preset(name)
        assert found.name == name
        assert found.summary, name
        assert found.source, name
        assert found.leaves_out, name


def test_hybrimoe_is_what_its_paper_says() -> None:
    system = preset("hybrimoe").system
    assert (system.evict, system.prefetch, system.place, system.scope) == ("mrs", "impact", "hybrimoe", "layer")


@pytest.mark.parametrize("name", sorted(name for name in PUBLISHED if preset(name).uncalibrated))
def test_what_has_to_be_fitted_has_a_stand_in_and_says_so(name: str) -> None:
    found = preset(name)
    system, notes = found.fitted(calibrated=False)
    assert "calibration" in found.system.needs
    assert "calibration" not in system.needs
    assert notes[0].startswith("no calibration trace was given: ")
    assert found.fitted(calibrated=True) == (found.system, [])


@pytest.mark.parametrize(
    ("fields", "slots"),
    [
        ({"unlimited": True}, 8),
        ({"system": {"scope": "global", "holds": "two layers"}}, 16),
        ({"system": {"scope": "global", "holds": "nothing"}}, 0),
        ({}, 40),
    ],
)
def test_a_system_uses_what_it_says_of_the_slots(fields: dict[str, object], slots: int) -> None:
    found = Preset.model_validate({"system": {}, **fields})
    assert found.budget(Budget(slots=40), layers=10, experts=8) == Budget(slots=slots)


@pytest.mark.parametrize(
    ("found", "role"),
    [
        (preset("hybrimoe"), "system"),
        (preset("all-resident"), "no limit"),
        (preset("oracle"), "clairvoyant"),
        (preset("pre-gated"), "clairvoyant"),
        (Preset(system=SystemSpec(evict="belady")), "clairvoyant"),
        (Preset(system=SystemSpec(prefetch="oracle")), "clairvoyant"),
        (Preset(system=SystemSpec(place="static", options={"place": {"defer": 1}})), "other outputs"),
        (Preset(system=SystemSpec(place="static", options={"place": {"defer": 0}})), "system"),
    ],
)
def test_only_systems_that_could_be_built_and_compute_the_model_compete(found: Preset, role: str) -> None:
    assert found.role == role


def test_front_loading_is_the_first_layers_of_one_pool() -> None:
    """kTransformers' third placement: with a pool for each layer it would be the lowest experts of every layer."""
    front = system_of("ktransformers", evict="static-front", scope="global")
    assert front.fitted(calibrated=False) == (front.system, []), "it needs no calibration trace"
    assert "--evict static-front --scope global" in preset("ktransformers").leaves_out
    trace = trace_of([[[0, 1], [0, 1]], [[2, 3], [2, 3]]])
    fields = front.system.model_dump()
    assert misses_by_step(run(trace, 4, **fields)) == [[0, 2], [0, 2]]


def test_front_loading_with_a_pool_for_each_layer_is_told() -> None:
    trace = trace_of([[[0, 1], [0, 1]], [[2, 3], [2, 3]]])
    told = "static-front: in a pool for each layer its lowest experts; with --scope global whole layers"
    assert told in run(trace, 2, evict="static-front", place="static").info.notes
    assert told not in run(trace, 2, evict="static-front", place="static", scope="global").info.notes


def test_a_file_takes_over_what_it_leaves_out(system_file: Callable[[str], str]) -> None:
    name = system_file('like = "hybrimoe"\nevict = "lru"\n[options.prefetch]\ndepth = 1\n')
    found = find_preset(name)
    assert found.name == "mine"
    assert found.system.evict == "lru"
    assert found.system.place == "hybrimoe"
    assert found.system.lookahead_depth == 1


def test_a_file_may_name_itself_and_a_policy_beside_it(system_file: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    found = find_preset(system_file('name = "ours"\nevict = "own.py:Own"\n'))
    assert found.name == "ours"
    assert found.system.policy("evict").name == "Own"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('evict = "lro"', "evict must be a known name, got 'lro' (did you mean lru"),
        ('evicts = "lru"', "field must be a known name, got 'evicts' (did you mean evict"),
        ('like = "hybrimo"', "like must be a known name, got 'hybrimo' (did you mean hybrimoe"),
        ("evict = ", "system file must be TOML"),
        ("[options.evict]\nalpha = 1", "options.evict must be left out for lru, which has none, got alpha"),
        ('evict = "mrs"\n[options.evict]\nalpa = 1', "options.evict must be a known name, got 'alpa'"),
        ("[options.evicts]\nalpha = 1", "options must be a known name, got 'evicts'"),
        ('holds = "nothing"', "scope must be global where a system holds nothing, got layer"),
        ("sim_only = 3", "sim_only must be a valid boolean"),
        ('name = "../evil"', "name must be letters, digits, dots, blanks and dashes, got '../evil'"),
        (
            'like = "hybrimoe"\n[options.prefetch]\ndepth = "two"',
            "options.prefetch: depth must be a whole number, got 'two'",
        ),
        ('like = "hybrimoe"\n[options.prefetch]\ndepth = 9', "options.prefetch: depth must be from 1 to 3, got 9"),
        ('like = "adapmoe"\nscope = "global"', "scope must be layer with slots_by_layer miss-costs, got global"),
        ('uncalibrated = { evictt = "lru" }', "evictt must be left out"),
        ('starts_with = "lru"', "starts_with must be an eviction policy that loads something beforehand, got 'lru'"),
    ],
)
def test_a_file_with_a_mistake_is_refused(text: str, told: str, system_file: Callable[[str], str]) -> None:
    name = system_file(text)
    with pytest.raises(InputError) as caught:
        find_preset(name)
    assert told in str(caught.value)
    assert "mine.toml" in str(caught.value)


def test_an_unknown_system_is_refused_with_its_near_names() -> None:
    with pytest.raises(InputError, match=r"system must be a known name, got 'hybridmoe' \(did you mean hybrimoe"):
        find_preset("hybridmoe")
    with pytest.raises(InputError, match=r"system file must be readable, got gone\.toml"):
        find_preset("gone.toml")


def test_a_constant_that_a_policy_refuses_names_the_policy() -> None:
    from sim.policies import PolicyContext

    system = SystemSpec(evict="mrs", options={"evict": {"alpha": 2.0}})
    with pytest.raises(InputError, match="evict mrs: alpha must be above 0 and at most 1, got 2"):
        system.eviction(PolicyContext(2, 4, 2))
