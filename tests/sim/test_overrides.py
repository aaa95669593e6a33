"""A user's own numbers: changed in place, in files of models, machines and parts, and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sim.cli import hardware_app, models_app
from sim.spec import catalogue
from sim.spec.overrides import handy, hardware_settings
from traces.errors import InputError

BASE = catalogue.hardware("rtx4090+xeon6330+pcie4-x16+nvme-pcie4")
MODEL = catalogue.model("gpt-oss-20b")
CPU = 'source = "measured"\nbytes_per_s = 30e9\nflops_per_s = 1e12\n'


@pytest.mark.parametrize(
    ("changes", "part", "field", "value"),
    [
        ({"link_gb_per_s": 12.0}, "link", "bytes_per_s", 12e9),
        ({"link.gb_per_s": 12.0}, "link", "bytes_per_s", 12e9),
        ({"link_bytes_per_s": 12e9}, "link", "bytes_per_s", 12e9),
        ({"link_latency_us": 0.0}, "link", "latency_s", 0.0),
        ({"link_pinned": False}, "link", "pinned", False),
        ({"gpu_memory_gb": 1.1}, "gpu", "memory_bytes", 1_100_000_000),
        ({"gpu_tflops_per_s": 100.0}, "gpu", "flops_per_s", 100e12),
        ({"gpu_launch_us": 2.0}, "gpu", "launch_s", 2e-6),
        ({"cpu_int8_tops_per_s": 35.0}, "cpu", "int8_ops_per_s", 35e12),
        ({"cpu_shared_gb_per_s": 90.0}, "cpu", "shared_bytes_per_s", 90e9),
        ({"cpu_memory_efficiency": 0.5}, "cpu", "memory_efficiency", 0.5),
        ({"host_operation_us": 3.0}, "host", "operation_s", 3e-6),
        ({"disk_gb_per_s": 3.0}, "disk", "bytes_per_s", 3e9),
    ],
)
def test_a_number_of_a_part_is_changed_in_its_own_unit_or_a_handy_one(
    changes: dict[str, Any], part: str, field: str, value: float
) -> None:
    found = catalogue.overridden(BASE, changes)
    assert getattr(getattr(found, part), field) == pytest.approx(value, rel=1e-12)
    rest = BASE.model_dump(exclude={"name": True, part: {field, "source"}})
    assert found.model_dump(exclude={"name": True, part: {field, "source"}}) == rest


def test_the_source_and_the_name_tell_what_is_the_users() -> None:
    found = catalogue.overridden(BASE, {"link.gb_per_s": 12.0, "gpu_launch_us": 0, "regime": "graph"})
    assert found.link.source == f"{BASE.link.source}; link_gb_per_s = 12: set by the user [U]"
    assert found.gpu.source == f"{BASE.gpu.source}; gpu_launch_us = 0: set by the user [U]"
    assert found.source == f"{BASE.source}; regime = graph: set by the user [U]"
    assert found.cpu.source == BASE.cpu.source
    assert found.name == f"{BASE.name} with link_gb_per_s=12, gpu_launch_us=0, regime=graph"


def test_no_changes_leave_all_as_it_is() -> None:
    assert catalogue.overridden(BASE, {}) == BASE
    assert catalogue.overridden_model(MODEL, {}) == MODEL


@pytest.mark.parametrize("name", sorted(hardware_settings()))
def test_every_setting_takes_the_value_that_is_there(name: str) -> None:
    part, field, scale = hardware_settings()[name]
    value = getattr(getattr(BASE, part) if part else BASE, field)
    given = value / scale if isinstance(value, float) or scale > 1 else value
    found = catalogue.overridden(BASE, {name: given})
    assert getattr(getattr(found, part) if part else found, field) == pytest.approx(value)


@pytest.mark.parametrize(
    ("field", "name", "scale"),
    [
        ("bytes_per_s", "gb_per_s", 1e9),
        ("shared_bytes_per_s", "shared_gb_per_s", 1e9),
        ("flops_per_s", "tflops_per_s", 1e12),
        ("int8_ops_per_s", "int8_tops_per_s", 1e12),
        ("memory_bytes", "memory_gb", 1e9),
        ("expert_fixed_s", "expert_fixed_us", 1e-6),
        ("pinned", "pinned", 1.0),
    ],
)
def test_handy_units(field: str, name: str, scale: float) -> None:
    assert handy(field) == (name, scale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"link_gbps": 1}, r"hardware setting must be a known name, got 'link_gbps' \(did you mean link_gb_per_s"),
        ({"link.gb_per_s": 0.0}, "^link_gb_per_s must be greater than or equal to 1e-09, got 0$"),
        ({"link.gb_per_s": 1e300}, r"^link_gb_per_s must be less than or equal to 1000000000, got 1e\+300$"),
        ({"link.gb_per_s": -1e300}, r"^link_gb_per_s must be greater than or equal to 1e-09, got -1e\+300$"),
        ({"link.bytes_per_s": 1e19}, r"^link_bytes_per_s must be less than or equal to 10{18}, got 1e\+19$"),
        ({"link_latency_us": 1e308}, r"^link_latency_us must be less than or equal to 3600000000, got 1e\+308$"),
        ({"link_latency_us": -1.0}, "^link_latency_us must be greater than or equal to 0, got -1$"),
        ({"gpu_memory_gb": 1e300}, r"^gpu_memory_gb must be less than or equal to 1000000000, got 1e\+300$"),
        (
            {"gpu_memory_efficiency": 1e-9},
            "^gpu_memory_efficiency must be greater than or equal to 0.000001, got 1e-09$",
        ),
        (
            {"cpu_int8_tops_per_s": 1e-20},
            r"^cpu_int8_tops_per_s must be valid \(0, or at least 1 a second\), got 1e-20$",
        ),
        (
            {"cpu_shared_bytes_per_s": 0.5},
            r"^cpu_shared_bytes_per_s must be valid \(0, or at least 1 a second\), got 0.5$",
        ),
        ({"link_gb_per_s": "fast"}, "^link_gb_per_s must be a valid number.*, got fast$"),
        ({"gpu_memory_gb": float("inf")}, "^gpu_memory_gb must be a finite number, got inf$"),
        ({"gpu_memory_gb": float("nan")}, "^gpu_memory_gb must be a finite number, got nan$"),
        ({"gpu_memory_efficiency": 1.5}, "^gpu_memory_efficiency must be less than or equal to 1, got 1.5$"),
        ({"link_pinned": 7}, "^link_pinned must be a valid boolean"),
        ({"regime": "fast"}, "^regime must be 'eager' or 'graph', got 'fast'$"),
        ({"gpu_name": "mine"}, "hardware setting must be a known name, got 'gpu_name'"),
    ],
)
def test_a_wrong_change_names_the_setting(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        catalogue.overridden(BASE, changes)


def test_a_part_that_is_not_there_cannot_be_changed() -> None:
    with pytest.raises(InputError, match="disk_gb_per_s must be left out for a machine without a disk, got 3"):
        catalogue.overridden(catalogue.hardware("rtx4090-pcie4"), {"disk_gb_per_s": 3})


def test_the_bytes_of_an_expert_set_its_bits() -> None:
    found = catalogue.overridden_model(MODEL, {"expert_bytes": 13_000_000})
    assert found.expert_bytes == 13_000_000
    assert found.expert_bits == pytest.approx(8 * (13_000_000 - 17_280) / (3 * 2880 * 2880))
    assert found.source == f"{MODEL.source}; expert_bytes = 13000000: set by the user [U]"
    assert found.name == "gpt-oss-20b with expert_bytes=13000000"
    assert found.dense_bytes == MODEL.dense_bytes


def test_fields_of_a_model_are_changed_by_name() -> None:
    found = catalogue.overridden_model(MODEL, {"expert_bits": 4.5, "layers": 30.0, "dtype": "fp32"})
    assert (found.expert_bits, found.layers, found.dtype) == (4.5, 30, "fp32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert_byte": 1}, r"model setting must be a known name, got 'expert_byte' \(did you mean expert_bytes"),
        ({"expert_bytes": 0}, "^expert_bytes must be greater than 0, got 0$"),
        ({"expert_bytes": "small"}, "^expert_bytes must be a valid number.*, got small$"),
        ({"expert_bytes": 1e300}, r"^expert_bytes must be at most 68719476736, got 1e\+300$"),
        ({"expert_bits": 1e308}, r"^expert_bits must be less than or equal to 10{12}, got"),
        ({"expert_bits": 1e9}, r"^expert_bytes must be at most 68719476736, got \d+$"),
        ({"hidden": 1e18}, "^hidden must be less than or equal to 10{12}, got"),
        ({"experts": 3}, "^top_k must be at most experts 3, got 4$"),
        ({"layers": 24.5}, "^layers must be a valid integer.*, got 24.5$"),
        ({"dtype": "fp4"}, r"^dtype must be a known name, got 'fp4' \(did you mean mxfp4"),
        ({"name": "mine"}, "model setting must be a known name, got 'name'"),
    ],
)
def test_a_wrong_change_of_a_model_names_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        catalogue.overridden_model(MODEL, changes)


def test_settings_are_read_from_words() -> None:
    words = ["link.gb_per_s=12", " gpu_launch_us = 1e-3 ", "link_pinned=False", "regime=graph"]
    expected = {"link_gb_per_s": 12.0, "gpu_launch_us": 1e-3, "link_pinned": False, "regime": "graph"}
    assert catalogue.settings_of(words) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["link.gb_per_s"], "hardware-set must be NAME=VALUE, got 'link.gb_per_s'"),
        (["=3"], "hardware-set must be NAME=VALUE, got '=3'"),
        (["regime="], "hardware-set must be NAME=VALUE, got 'regime='"),
        (["link.gb_per_s=1", "link_gb_per_s=2"], "hardware-set must give link_gb_per_s once, got 'link_gb_per_s=2' as"),
    ],
)
def test_words_that_are_no_settings_are_named(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        catalogue.settings_of(words)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a CPU of the user's, made the working one."""
    (tmp_path / "mycpu.toml").write_text(CPU)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_part_of_the_user_stands_among_those_of_the_catalogue(here: Path) -> None:
    for name in ("rtx4090+mycpu.toml+pcie4-x16", f"rtx4090+{here / 'mycpu.toml'}+pcie4-x16"):
        spec = catalogue.find_hardware(name)
        assert (spec.name, spec.cpu.name, spec.cpu.bytes_per_s) == (name, "mycpu", 30e9)
        assert spec.gpu == BASE.gpu


def test_a_link_a_host_and_a_disk_of_the_user(here: Path) -> None:
    (here / "link.toml").write_text('name = "cable"\nsource = "measured"\nbytes_per_s = 3e9\n')
    (here / "host.toml").write_text('source = "measured"\nlayer_s = 1e-6\n')
    (here / "disk.toml").write_text('source = "measured"\nbytes_per_s = 1e9\n')
    spec = catalogue.find_hardware("rtx4090+xeon6330+link.toml+disk.toml+host.toml")
    assert (spec.link.name, spec.link.bytes_per_s, spec.host.layer_s) == ("cable", 3e9, 1e-6)
    assert spec.disk is not None
    assert (spec.disk.name, spec.disk.latency_s) == ("disk", 100e-6)


def test_a_machine_file_may_name_parts_of_the_catalogue_and_files_beside_it(here: Path) -> None:
    folder = here / "machines"
    folder.mkdir()
    (folder / "cpu.toml").write_text(CPU)
    path = folder / "mine.toml"
    path.write_text('name = "mine"\nregime = "graph"\ngpu = "rtx4090"\ncpu = "cpu.toml"\nlink = "pcie4-x16"\n')
    spec = catalogue.find_hardware(str(path))
    assert (spec.name, spec.regime, spec.gpu, spec.cpu.bytes_per_s) == ("mine", "graph", BASE.gpu, 30e9)
    assert (spec.host, spec.disk) == (BASE.host, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CPU.replace("30e9", "-1"), "^mycpu.toml: bytes_per_s must be greater than or equal to 1, got -1"),
        (CPU.replace("30e9", "inf"), "^mycpu.toml: bytes_per_s must be a finite number, got inf"),
        (CPU + "cores = 3\n", r"^mycpu.toml: cores must be left out \(no such field\), got 3"),
        ("bytes_per_s = 1\n", "^mycpu.toml: source must be given, got nothing"),
        ("[", "^cpu file must be TOML, got mycpu.toml"),
    ],
)
def test_a_wrong_part_names_the_file_and_the_field(here: Path, text: str, message: str) -> None:
    (here / "mycpu.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        catalogue.find_hardware("rtx4090+mycpu.toml+pcie4-x16")


def test_a_part_that_is_not_there_is_named(here: Path) -> None:
    with pytest.raises(InputError, match=r"cpu file must be readable, got none\.toml \(No such file"):
        catalogue.find_hardware("rtx4090+none.toml+pcie4-x16")
    (here / "m.toml").write_text('name = "m"\ngpu = "rtx409"\ncpu = "xeon6330"\nlink = "pcie4-x16"\n')
    with pytest.raises(InputError, match=r"^m\.toml: gpu must be a known name, got 'rtx409' \(did you mean rtx4090"):
        catalogue.find_hardware("m.toml")


def test_a_whole_machine_may_have_a_plus_in_its_file_name(here: Path) -> None:
    (here / "a+b.toml").write_text('name = "ab"\ngpu = "rtx4090"\ncpu = "xeon6330"\nlink = "pcie4-x16"\n')
    assert catalogue.find_hardware("a+b.toml").name == "ab"


def test_a_model_of_the_user_may_be_like_one_of_the_catalogue(here: Path) -> None:
    (here / "m.toml").write_text('name = "m"\nlike = "deepseek-v2-lite"\nexperts = 32\n')
    spec, base = catalogue.find_model("m.toml"), catalogue.model("deepseek-v2-lite")
    assert (spec.name, spec.experts, spec.expert_width) == ("m", 32, base.expert_width)
    assert spec.source == f"as deepseek-v2-lite: {base.source}; experts: set by the user [U]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'name = "m"\nlike = "deepseek-v2-light"\n',
            r"^m\.toml: like must be a known name, got 'deepseek-v2-light' \(",
        ),
        ('name = "m"\nlike = 3\n', r"^m\.toml: like must be a known name, got '3'"),
        ('name = "m"\nlike = ["olmoe-1b-7b"]\n', r"^m\.toml: like must be a known name"),
        ('like = "olmoe-1b-7b"\n', r"^m\.toml: name must be given, got nothing"),
        ('name = "m"\nlike = "olmoe-1b-7b"\nexpert = 3\n', r"^m\.toml: expert must be left out"),
        ('name = "m"\nlike = "olmoe-1b-7b"\ntop_k = 99\n', r"^m\.toml: top_k must be at most experts 64, got 99"),
    ],
)
def test_a_wrong_model_file_names_the_field(here: Path, text: str, message: str) -> None:
    (here / "m.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        catalogue.find_model("m.toml")


def test_the_command_line_shows_a_changed_machine_and_how_to_change_it(here: Path) -> None:
    words = ["show", "rtx4090+mycpu.toml+pcie4-x16", "--set", "link.gb_per_s=12", "--set", "regime=graph"]
    shown = CliRunner().invoke(hardware_app, words, env={"COLUMNS": "200"}).output
    for text in ("link.gb_per_s=12", "regime=graph", "cpu.gb_per_s=30", "link.pinned=true", "gpu.memory_gb=24", "[U]"):
        assert text in shown
    record = json.loads(CliRunner().invoke(hardware_app, [*words, "--json"]).output)
    assert (record["link"]["bytes_per_s"], record["regime"], record["disk"]) == (12e9, "graph", None)


def test_the_command_line_shows_a_changed_model(here: Path) -> None:
    (here / "m.toml").write_text('name = "m"\nlike = "olmoe-1b-7b"\n')
    words = ["show", "m.toml", "--set", "expert_bits=4.5"]
    record = json.loads(CliRunner().invoke(models_app, [*words, "--json"]).output)
    assert record["expert_bytes"] == 3 * 2048 * 1024 * 4.5 / 8
    shown = CliRunner().invoke(models_app, words, env={"COLUMNS": "200"}).output
    assert "expert_bytes in int4" in shown
    assert f"{3 * 2048 * 1024 * 4.25 / 8:,.0f}" in shown


@pytest.mark.parametrize("app", [models_app, hardware_app])
def test_the_command_line_refuses_what_is_no_setting(app: Any) -> None:
    name = "olmoe-1b-7b" if app is models_app else "rtx4090-pcie4"
    error = CliRunner().invoke(app, ["show", name, "--set", "fast"]).exception
    assert isinstance(error, InputError)
    assert str(error) == "set must be NAME=VALUE, got 'fast'"
