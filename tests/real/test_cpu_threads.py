"""How many threads a CPU expert has: refused where a lane is one core, given to the pool, named by runs."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from real import checks, cuda_device, validate
from real.checks import check_cpu_threads, most_cpu_threads
from real.cuda_device import CudaDevice
from real.decode import replay
from real.device import open_device
from real.models.load import dimensions
from real.validate import Validation
from sim.systems import Budget, SystemSpec
from tests.commanding import SMALL, refused, run
from tests.real.fake_cuda import FakeGpu
from tests.real.running import COSTS, machine_on
from tests.real.test_validate import SETTINGS, tiny_subject
from tests.sim.test_profile_runs import PROFILE
from traces.errors import InputError
from traces.synthetic import generate
from traces.workload import one_at_a_time

REFUSED = "cpu-threads must be 1 on the device cpu, a core a lane, got 2"


def test_the_cpu_device_has_one_core_a_lane() -> None:
    before = torch.get_num_threads()
    with pytest.raises(InputError, match=REFUSED):
        open_device("cpu", 2)
    assert torch.get_num_threads() == before, "nothing was opened"
    with open_device("cpu", 1) as device:
        assert device.cpu_threads == 1
        device.use_cpu_threads(1)
        with pytest.raises(InputError, match=REFUSED):
            device.use_cpu_threads(2)


def test_beside_a_gpu_there_are_as_many_as_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert most_cpu_threads("cpu") == 1
    assert most_cpu_threads("cuda") >= 1
    monkeypatch.setattr(checks, "most_cpu_threads", lambda device: 12)
    for count in (None, 1, 12):
        check_cpu_threads(count, "cuda")
    for count in (0, 13):
        with pytest.raises(InputError, match=f"cpu-threads must be at most 12, the cores that there are, got {count}"):
            check_cpu_threads(count, "cuda")


def test_the_pool_of_a_cuda_device_gets_the_threads_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), list[int]()
    monkeypatch.setattr(cuda_device, "torch", FakeGpu(0).torch())
    with CudaDevice() as device:
        assert device.cpu_threads == before
        for count in (3, 1):
            device.use_cpu_threads(count)
            assert device.cpu_threads == count
            device.wait([device.cpu(lambda: seen.append(torch.get_num_threads()))])
        device.drain()
        assert torch.get_num_threads() == before
    assert seen == [3, 1]
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen[-1] == before, "threads of later on have what they had"


def test_a_measured_run_names_them() -> None:
    with machine_on("cpu") as machine:
        spec = machine.loaded.spec
        shape = {"layers": spec.moe_layers, "experts": spec.experts, "top_k": spec.top_k}
        routing = generate("zipf", 0, replace(SMALL, **shape, expert_bytes=spec.expert_bytes))
        result = replay(machine, one_at_a_time(routing), SystemSpec(), Budget(slots=2), COSTS)
    assert result.info.cpu_threads == 1


def test_a_run_whose_policies_weighed_a_profile_of_others_says_so(tmp_path: Path) -> None:
    spec = dimensions("moetwin-small", dtype="fp32", random_weights=False)
    told = "the profile was measured with 4 threads for a CPU expert, the run had 1"
    for threads in (1, 4):
        profile = PROFILE.model_copy(update={"model": spec, "cpu_threads": threads})
        profile.save(tmp_path / f"{threads}.toml")
        words = ["--prompt", "x", "--max-new-tokens", "2", "--profile", str(tmp_path / f"{threads}.toml"), "--json"]
        result = run("decode", "--device", "cpu", *words)
        assert result.exit_code == 0, result.output
        assert (told in json.loads(result.stdout)["notes"]) == (threads == 4)


def test_a_validation_opens_its_device_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OpenedError(Exception):
        """Says what was opened."""

    def opened(*given: object) -> None:
        raise OpenedError(given)

    monkeypatch.setattr(validate, "open_device", opened)
    for threads in (None, 4):
        settings = replace(SETTINGS, cpu_threads=threads)
        one = Validation(tmp_path / str(threads), settings, [tiny_subject()])
        with pytest.raises(OpenedError) as error:
            one.run()
        assert error.value.args == (("cpu", threads),)
    with pytest.raises(InputError, match=r"of the same validation, got .* with cpu_threads None in place of 4"):
        Validation(tmp_path / "None", settings, [tiny_subject()])


def test_a_validation_from_before_they_could_be_chosen_goes_on(tmp_path: Path) -> None:
    Validation(tmp_path / "v", SETTINGS, [tiny_subject()])
    path = tmp_path / "v" / "settings.json"
    content = json.loads(path.read_text())
    del content["cpu_threads"]
    path.write_text(json.dumps(content))
    assert Validation(tmp_path / "v", SETTINGS, [tiny_subject()]).progress().done == 0


@pytest.mark.parametrize(
    "words",
    [
        ("calibrate", "--out", "new.toml"),
        ("decode", "--prompt", "x", "--out", "new"),
        ("validate", "--out", "new"),
    ],
)
def test_commands_refuse_more_on_the_cpu_device(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(*words, "--device", "cpu", "--cpu-threads", "2") == f"error: {REFUSED}"
    assert not [*tmp_path.iterdir()]
