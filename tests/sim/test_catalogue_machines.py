"""Machines of the catalogue: CPUs against their sources, and which names are refused for what they stand for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sim.spec import catalogue
from tests.sim.test_catalogue import MACHINE
from traces.errors import InputError

NOT_MODELLED = (
    *("h100x8", "4xh100", "2x-rtx4090", "2 x rtx4090", "dual-rtx4090", "h100-x2", "h100x8-pcie5-x16", "4xa6000"),
    *("rtx4090+rtx4090+epyc9374f+pcie4-x16", "rtx4090x2+epyc9374f+pcie4-x16", "2xa6000+epyc9374f+pcie4-x16"),
    *("gh200", "h100+grace+pcie5-x16", "m3-ultra", "m4-max", "mi300a", "strix-halo", "jetson-orin", "apple-m3"),
    *("dgx-h100", "HGX-h200"),
)
"""Several GPUs, and memory that GPU and CPU share."""


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("xeon6459c", 77),
        ("xeon8358p", 63),
        ("xeon6330", 57),
        ("ryzen9950x3d", 54),
        ("i9-13900h", 48),
        ("xeon8559c", 178),
        ("epyc9374f", 185),
        ("xeon5220r", 40),
        ("xeon6338", 63),
    ],
)
def test_a_cpu_reaches_the_bandwidth_of_its_source(name: str, rates: float) -> None:
    assert catalogue.hardware(f"rtx4090+{name}+pcie4-x16").cpu.reached_bytes_per_s / 1e9 == pytest.approx(
        rates, rel=1e-3
    )


@pytest.mark.parametrize("name", catalogue.part_names("cpu"))
def test_every_cpu_has_a_rate_for_int8_that_fits_its_vector_units(name: str) -> None:
    """Four times the fp32 operations of the same units; AMX has another source."""
    cpu = catalogue.hardware(f"rtx4090+{name}+pcie4-x16").cpu
    assert cpu.int8_ops_per_s > cpu.reached_flops_per_s
    if "AMX" not in cpu.source:
        nominal = r"(\d+) cores \* ([\d.]+) GHz \* (\d+) fp32 .* int8: the same with (\d+) operations a cycle"
        ((cores, ghz, fp32, int8),) = re.findall(nominal, cpu.source)
        assert int(int8) == 4 * int(fp32)
        assert cpu.int8_ops_per_s == pytest.approx(1e9 * int(cores) * float(ghz) * int(int8) / 2, rel=2e-3)


@pytest.mark.parametrize("name", [name for name in catalogue.part_names("cpu") if name != "xeon5220r-10c"])
def test_the_memory_that_a_cpu_shares_is_nominal(name: str) -> None:
    cpu = catalogue.hardware(f"rtx4090+{name}+pcie4-x16").cpu
    numbers = {"two": 2, "six": 6, "eight": 8, "twelve": 12}
    ((channels, transfers),) = re.findall(r"(\w+) channels of DDR\d-(\d{4})", cpu.source)
    assert cpu.shared_bytes_per_s == pytest.approx(numbers[channels] * int(transfers) * 1e6 * 8, rel=1e-3)
    assert cpu.reached_bytes_per_s < cpu.shared_bytes_per_s


@pytest.mark.parametrize("name", NOT_MODELLED)
def test_several_gpus_and_unified_memory_are_refused_by_name(name: str) -> None:
    with pytest.raises(InputError, match="hardware must have one GPU with memory of its own: several GPUs and unified"):
        catalogue.find_hardware(name)


@pytest.mark.parametrize(
    "name",
    [
        *("rtx4090+epyc9374f+pcie4x16", "rtx4090-pcie4-x88", "rtx5090+epyc9374f+pcie5.0-x16", "rtx5090-x870"),
        *("rtx4090-m2-ssd", "a6000+xeon5220+pcie3-x8"),
    ],
)
def test_a_name_that_is_only_unknown_is_called_that(name: str) -> None:
    with pytest.raises(InputError, match=r"(hardware|gpu|cpu|link) must be a known name, got"):
        catalogue.find_hardware(name)


def test_every_name_of_the_catalogue_is_modelled_and_files_may_be_called_anything(tmp_path: Path) -> None:
    for name in catalogue.hardware_names():
        assert catalogue.find_hardware(name).name == name
    cpus, links = catalogue.part_names("cpu"), catalogue.part_names("link")
    for composed in [f"{gpu}+{cpus[0]}+{link}" for gpu in catalogue.part_names("gpu") for link in links]:
        assert catalogue.find_hardware(composed).name == composed
    path = tmp_path / "my-x2-box.toml"
    path.write_text(MACHINE, encoding="utf-8")
    assert catalogue.find_hardware(str(path)).name == "mine"
    part = tmp_path / "4xgpu.toml"
    part.write_text('source = "mine"\nmemory_bytes = 8e9\nbytes_per_s = 4e11\nflops_per_s = 5e13\n', encoding="utf-8")
    assert catalogue.find_hardware(f"{part}+{cpus[0]}+{links[0]}").gpu.name == "4xgpu"
