"""Whatever a system decides, a family's model computes what it computes with all its experts resident.

Tolerances are relative to the largest logit: 1e-5 in fp32, 2e-2 in fp16, 5e-2 in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from real.decode import Machine
from real.device import open_device
from real.generate import generate, left_pad
from real.models.families import FAMILIES
from real.models.load import DTYPES, LoadedModel
from real.record import Collector
from real.routing import Replay, RouterTap
from sim.plan import CPU, GPU
from sim.presets import preset, preset_names
from tests.real import tiny
from tests.real.running import DEVICES, Guide, assert_near, decoded, forced, machine_on, own_model
from traces.schema import Trace
from traces.workload import Workload, lock_step

PROMPTS = [[5, 17, 200, 31, 8, 77, 140], [90, 4, 33], [1, 2, 3, 250, 9], [61, 200]]
"""Four lanes, all but the first one padded."""
FORCED = [[3, 4, 5], [7, 8], [9, 10, 11], [12]]
NEW_TOKENS = 4
TOP_K = 2
SYSTEMS = [name for name in preset_names() if not preset(name).sim_only]
KINDS = {"fetch": "mixtral-offloading", "hybrid": "hybrimoe", "static": "ktransformers"}
TOLERANCE = {"fp16": 2e-2, "bf16": 5e-2}


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=list(FAMILIES))
def machine(request: pytest.FixtureRequest, device: str) -> Iterator[Machine]:
    with machine_on(device, request.param) as machine:
        yield machine


@pytest.fixture(scope="module")
def qwen(device: str) -> Iterator[Machine]:
    with machine_on(device) as machine:
        yield machine


def system_of(name: str, **changes: Any) -> dict[str, Any]:
    """The fields of a published system, as it runs without a calibration trace."""
    return {**preset(name).fitted(calibrated=False, residuals=False)[0].model_dump(), **changes}


@cache
def resident(device: str, model_type: str, lanes: int) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Greedy tokens and logits [B, V] of every step, with all experts on the device."""
    loaded = own_model(model_type)
    loaded.model.to(device)  # type: ignore[arg-type]
    ids, mask = left_pad(PROMPTS[:lanes])
    made = generate(loaded.model, ids.to(device), mask.to(device), max_new_tokens=NEW_TOKENS, keep_logits=True)
    return made.tokens, made.logits


def routing(loaded: LoadedModel, prompts: list[list[int]], tokens: list[list[int]]) -> Trace:
    """What the model's own routers choose for given tokens."""
    collector = Collector(loaded, lookahead_depth=3)
    with RouterTap(loaded.layers, collector):
        tiny.logits_of(loaded, prompts, tokens, hooks=collector)
    return collector.finish()


def replayed(loaded: LoadedModel, workload: Workload) -> list[torch.Tensor]:
    """Logits of the forced tokens under a workload's routing, with all experts resident."""
    replay = Replay(workload.trace, loaded)
    with RouterTap(loaded.layers, replay):
        return list(tiny.logits_of(loaded, PROMPTS, FORCED, hooks=Guide(replay, workload, 0)))


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("name", [name for name in SYSTEMS if not preset(name).clairvoyant])
def test_a_system_decodes_what_the_resident_model_decodes(qwen: Machine, name: str, lanes: int) -> None:
    tokens, logits = resident(qwen.device.name, "qwen3_moe", lanes)
    run = decoded(qwen, PROMPTS[:lanes], NEW_TOKENS, TOP_K, **system_of(name))
    assert run.tokens == tokens
    assert_near(run.logits, logits)


@pytest.mark.parametrize("name", [name for name in SYSTEMS if preset(name).clairvoyant])
def test_a_bound_computes_what_the_resident_model_computes(qwen: Machine, name: str) -> None:
    workload = lock_step(routing(tiny.model(), PROMPTS, FORCED), len(PROMPTS))
    run = forced(qwen, workload, PROMPTS, FORCED, TOP_K, **system_of(name))
    assert_near([logits.cpu() for logits in run.logits], replayed(tiny.model(), workload))


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_family_decodes_what_its_resident_model_decodes(machine: Machine, kind: str, lanes: int) -> None:
    tokens, logits = resident(machine.device.name, machine.loaded.family.model_type, lanes)
    for slots, changes in ((TOP_K, {}), (TOP_K, {"prefetch": "none"}), (5, {"prefetch": "next-router"})):
        run = decoded(machine, PROMPTS[:lanes], NEW_TOKENS, slots, **system_of(KINDS[kind], **changes))
        assert run.tokens == tokens
        assert_near(run.logits, logits)
        done_on = set(run.operations.op) & {GPU, CPU}
        assert done_on == ({GPU} if kind == "fetch" else {GPU, CPU})


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_low_precision_stays_within_its_tolerance(device: str, model_type: str, dtype: str) -> None:
    workload = lock_step(routing(tiny.model(model_type), PROMPTS, FORCED), len(PROMPTS))
    loaded = own_model(model_type)
    loaded = replace(loaded, spec=loaded.spec.in_dtype(dtype))
    loaded.model.to(DTYPES[dtype])  # type: ignore[arg-type]
    wanted = replayed(loaded, workload)
    with open_device(device) as opened:
        machine = Machine.prepare(loaded, opened)
        for kind in KINDS.values():
            run = forced(machine, workload, PROMPTS, FORCED, TOP_K, **system_of(kind))
            got = [logits.cpu() for logits in run.logits]
            assert {logits.dtype for logits in got} == {DTYPES[dtype]}
            assert_near(got, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KINDS)
def test_a_sliding_window_is_kept_under_padding(device: str, kind: str) -> None:
    """GPT-OSS with a window that is shorter than the prompts: lanes decode as they do alone, and as when resident."""
    with machine_on(device, "gpt_oss") as machine:
        machine.loaded.config.sliding_window = 3
        run = decoded(machine, PROMPTS, NEW_TOKENS, TOP_K, **system_of(KINDS[kind]))
        alone = [decoded(machine, [prompt], NEW_TOKENS, TOP_K, **system_of(KINDS[kind])) for prompt in PROMPTS]
    assert run.tokens == [one.tokens[0] for one in alone]
    for lane, one in enumerate(alone):
        assert_near([logits[lane : lane + 1] for logits in run.logits], one.logits)
    plain = own_model("gpt_oss")
    plain.model.to(device)  # type: ignore[arg-type]
    plain.config.sliding_window = 3
    ids, mask = left_pad(PROMPTS)
    made = generate(plain.model, ids.to(device), mask.to(device), max_new_tokens=NEW_TOKENS, keep_logits=True)
    assert_near(run.logits, made.logits)
    with pytest.raises(AssertionError):
        assert_near(run.logits, resident(device, "gpt_oss", len(PROMPTS))[1])


def test_a_wrong_expert_is_noticed(device: str, machine: Machine) -> None:
    """One expert that the prompt uses computes something else: tokens or logits have to tell."""
    model_type = machine.loaded.family.model_type
    used = int(routing(tiny.model(model_type), PROMPTS[:1], [[]]).expert_ids[-1, -1, 0])
    _, wanted = resident(device, model_type, 1)
    flat = machine.store.expert(machine.loaded.spec.moe_layers - 1, used)
    with torch.inference_mode():
        flat.mul_(1.01)
        run = decoded(machine, PROMPTS[:1], 1, TOP_K, **system_of("mixtral-offloading"))
        flat.div_(1.01)
    with pytest.raises(AssertionError):
        assert_near(run.logits, wanted[:1])
