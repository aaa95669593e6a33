"""Copies by size: which are measured, that they move what they say, and that GPU work is there before and after."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from real import bandwidth, bench
from real.bandwidth import sizes_of, transfers
from real.bench import Bench
from real.decode import Machine
from real.device import Device, Work, open_device
from sim.spec.profile import TO_DEVICE, TO_HOST, CpuThreads
from tests.real.running import DEVICES, machine_on

REPEATS, MIB = 2, 2**20


@pytest.fixture(scope="module", params=DEVICES)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with machine_on(request.param) as machine:
        yield machine


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    with open_device(request.param) as device:
        yield device


def test_sizes_are_powers_of_four_and_an_expert() -> None:
    powers = [64 * 2**10, 256 * 2**10, MIB, 4 * MIB, 16 * MIB, 64 * MIB]
    assert sizes_of(12_582_912, 2**40) == sorted([*powers, 12_582_912])
    assert sizes_of(4 * MIB, 2**40) == powers, "each once"
    assert sizes_of(352_321_536, 2**40) == [*powers, 352_321_536]
    assert sizes_of(100, 8 * MIB) == [100, *powers[:3]], "an eighth of what is free"
    assert sizes_of(5 * MIB, 0) == [5 * MIB]


def test_every_kind_of_copy_is_measured_at_every_size(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "MOST_BYTES", MIB)
    expert_bytes = machine.loaded.spec.expert_bytes
    found = transfers(Bench(machine, REPEATS), machine.device, expert_bytes)
    kinds = ("pinned", "pageable") if machine.device.name == "cuda" else ("pageable",)
    wanted = [(way, kind, beside) for kind in kinds for way in (TO_DEVICE, TO_HOST) for beside in (False, True)]
    assert [(one.direction, one.memory, one.beside_gpu) for one in found] == wanted
    for one in found:
        assert [point.size for point in one.points] == sorted([expert_bytes, 64 * 2**10, 256 * 2**10, MIB])
        assert all(0 < point.value_s == point.median_s <= point.p90_s for point in one.points)
        assert all(point.repeats == 3 * REPEATS for point in one.points)


@pytest.mark.parametrize("direction", [TO_DEVICE, TO_HOST])
def test_copies_move_one_part_after_the_other(device: Device, direction: Any) -> None:
    on_device = torch.zeros(12, dtype=torch.uint8, device=device.torch_device)
    device.settle()  # so that no copy comes before the zeros
    on_host = torch.arange(1, 13, dtype=torch.uint8)
    submit = bandwidth._copies(device, direction, on_device, on_host, 5)  # two parts, and a rest
    moved = []
    for _ in range(2):
        device.wait([submit()])
        device.settle()
        moved.append((on_device.tolist(), on_host.tolist()))
    if direction == TO_DEVICE:
        assert [there for there, _ in moved] == [[*range(1, 6), *[0] * 7], [*range(1, 11), 0, 0]]
    else:
        assert [here for _, here in moved] == [[*[0] * 5, *range(6, 13)], [*[0] * 10, 11, 12]]


def test_gpu_work_is_submitted_before_the_copy_and_awaited_with_it(device: Device) -> None:
    ran: list[str] = []
    pieces: list[Work] = []

    def busy() -> Work:
        pieces.append(device.gpu(lambda: ran.append("gpu"), ()))
        return pieces[-1]

    def copy() -> Work:
        assert len(pieces) == 3
        return device.copy(lambda: ran.append("copy"), ())

    work = bandwidth._beside(device, copy, busy, 3)
    device.settle()
    assert sorted(ran) == ["copy", "gpu", "gpu", "gpu"]
    assert work.resource == "link"
    assert all(one.done for one in (work, *pieces))


def test_memory_that_cannot_be_pinned_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*size: int, **how: object) -> None:
        raise RuntimeError("no more")

    kept = bandwidth._host_area(64, pinned=False)
    assert kept is not None
    assert kept.tolist() == [1] * 64
    monkeypatch.setattr(torch, "empty", refuse)
    assert bandwidth._host_area(64, pinned=True) is None
    with pytest.raises(RuntimeError, match="no more"):
        bandwidth._host_area(64, pinned=False)


def test_gpu_work_grows_until_it_lasts(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def hidden(one: Bench, tokens: int) -> torch.Tensor:
        asked.append(tokens)
        return own(one, tokens)

    own = Bench._hidden
    monkeypatch.setattr(Bench, "_hidden", hidden)
    monkeypatch.setattr(bench, "MOST_BUSY_TOKENS", 16)
    for least_s, tokens in ((1e9, [1, 4, 16]), (0.0, [1])):
        monkeypatch.setattr(bench, "BUSY_S", least_s)
        submit, seconds = Bench(machine, REPEATS).busy()
        assert asked == tokens
        assert seconds > 0
        machine.device.wait([submit()])
        asked.clear()


def test_experts_on_the_cpu_are_measured_by_threads(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[int] = []
    monkeypatch.setattr(bench, "most_cpu_threads", lambda device: 6)
    monkeypatch.setattr(type(machine.device), "use_cpu_threads", lambda device, count: used.append(count))
    given = machine.device.cpu_threads
    found = Bench(machine, REPEATS).cpu_by_threads()
    assert [one.threads for one in found] == [1, 2, 4, 6]
    assert used == [1, 2, 4, 6, given], "and as before in the end"
    assert all([point.size for point in one.points] == [1, 16] for one in found)
    assert all(isinstance(one, CpuThreads) and all(point.value_s > 0 for point in one.points) for one in found)
