"""Grids: what a file says, in which order its points come, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sim.sweep.fields import known_fields, located
from sim.sweep.grid import Grid
from traces.errors import InputError

TEXT = """
[base]
trace = "mixed"
cache = "25%"
hardware.link.latency_us = 9

[axes]
system = ["hybrimoe", "fiddler"]
"hardware.link_gb_per_s" = { from = 4, to = 16, steps = 3, scale = "log" }
"""


def of(axes: Any, **base: Any) -> Grid:
    return Grid.of({"base": {"trace": "mixed", **base}, "axes": axes})


def test_a_file_gives_its_points_in_order(tmp_path: Path) -> None:
    path = tmp_path / "g.toml"
    path.write_text(TEXT)
    grid = Grid.load(path)
    assert grid.folder == tmp_path
    assert grid.base == {"trace": "mixed", "cache": "25%", "hardware.link_latency_us": 9}
    shown = [(point["system"], point["hardware.link_gb_per_s"]) for point in grid.points()]
    assert shown == [(system, link) for system in ("hybrimoe", "fiddler") for link in (4, 8, 16)]
    assert all(point.items() >= grid.base.items() for point in grid.points())


@pytest.mark.parametrize(
    ("wanted", "values"),
    [
        ({"from": 4, "to": 64, "steps": 5, "scale": "log"}, (4, 8, 16, 32, 64)),
        ({"from": 1, "to": 2, "steps": 3}, (1.0, 1.5, 2.0)),
        ({"from": 10, "to": 1, "steps": 4}, (10, 7, 4, 1)),
        ({"from": 1.0, "to": 3.0, "steps": 3}, (1.0, 2.0, 3.0)),
        ({"from": 1, "to": 10, "steps": 3, "scale": "log"}, (1.0, 3.16228, 10.0)),
    ],
)
def test_ranges(wanted: dict[str, Any], values: tuple[float, ...]) -> None:
    found = of({"hardware.link_gb_per_s": wanted}).axes["hardware.link_gb_per_s"]
    assert found == values
    assert [type(one) for one in found] == [type(one) for one in values]


def test_an_axis_takes_the_place_of_the_base() -> None:
    assert [point["cache"] for point in of({"cache": ["8", "25%"]}, cache="50%").points()] == ["8", "25%"]


def test_tables_in_tables_and_dots_are_the_same() -> None:
    quoted = of({"system.options.prefetch.depth": [1, 2], "hardware.link.gb_per_s": [4.0]})
    assert of({"system": {"options": {"prefetch": {"depth": [1, 2]}}}, "hardware": {"link_gb_per_s": [4.0]}}) == quoted


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({}, "axes must have at least one field, got none"),
        ({"hardware.link_gbs": [4]}, "did you mean hardware.link_gb_per_s"),
        ({"cach": ["25%"]}, "field must be a known name, got 'cach' (did you mean cache"),
        ({"system.evicts": ["lru"]}, "did you mean system.evict"),
        ({"system.options.prefech.depth": [1]}, "did you mean prefetch"),
        ({"system.options.prefetch": [1]}, "system.options.prefetch must go on with the name of a constant"),
        ({"model.expert_bit": [4]}, "did you mean model.expert_bits"),
        ({"model_set": [4]}, "field must be a known name, got 'model_set'"),
        ({"seed": []}, "seed must have at least one value as an axis, got none"),
        ({"seed": 3}, "seed must be a list or a range {from, to, steps} as an axis, got 3"),
        ({"seed": [1, 2, 1]}, "seed must have each value once as an axis, got 1 twice"),
        ({"seed": [[1]]}, "seed must be text, true, false, or a finite number, got [1]"),
        ({"seed": [float("nan")]}, "seed must be text, true, false, or a finite number, got nan"),
        ({"seed": {"from": 1, "to": 2}}, "seed's range must have from, to and steps, got no steps"),
        ({"seed": {"from": 1, "to": 2, "step": 3}}, "seed's range must be a known name, got 'step' (did you mean step"),
        ({"seed": {"from": 1, "to": 2, "steps": 1}}, "seed's steps must be a whole number from 2 to 100,000, got 1"),
        ({"seed": {"from": 1, "to": 2, "steps": 2.0}}, "seed's steps must be a whole number"),
        ({"seed": {"from": "1", "to": 2, "steps": 2}}, "seed's range must go from one number to another, got '1'"),
        ({"seed": {"from": 0, "to": 2, "steps": 2, "scale": "log"}}, "seed's range must be above 0 on a log scale"),
        ({"seed": {"from": 1, "to": 2, "steps": 2, "scale": "lin"}}, "seed's scale must be a known name, got 'lin'"),
        ({"seed": {"from": 1, "to": 1, "steps": 2}}, "seed must have each value once"),
        ({"hardware.link_gb_per_s": [4], "hardware.link_bytes_per_s": [4e9]}, "two axes for one"),
        ({"hardware.link_gb_per_s": [4], "hardware": {"link": {"gb_per_s": [8]}}}, "must be given once"),
        ({"seed": {"from": 1, "to": 400, "steps": 400}, "batch": {"from": 1, "to": 400, "steps": 400}}, "160,000"),
    ],
)
def test_what_is_wrong_with_axes(axes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        of(axes)
    assert words in str(caught.value)


def test_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    path = tmp_path / "g.toml"
    with pytest.raises(InputError, match=r"grid file must be readable, got .*g\.toml"):
        Grid.load(path)
    path.write_text("[base")
    with pytest.raises(InputError, match=r"grid file must be TOML, got .*g\.toml"):
        Grid.load(path)
    path.write_text("[bases]\n[axes]\nseed = [1]")
    with pytest.raises(InputError, match=r"g\.toml: table must be a known name, got 'bases' \(did you mean base"):
        Grid.load(path)
    path.write_text("axes = 3")
    with pytest.raises(InputError, match="axes must be a table, got 3"):
        Grid.load(path)


def test_fields_are_those_of_the_scenario_and_its_parts() -> None:
    known = known_fields()
    assert {"trace", "system", "system.evict", "cache", "batch", "seed", "calibration", "profile"} <= known
    assert {"hardware.regime", "hardware.link_bytes_per_s", "model.expert_bytes", "model.hidden"} <= known
    assert known.isdisjoint({"system.name", "system.options", "hardware_set", "model_set", "model.name"})


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("my.toml", "/here/my.toml"),
        ("my.py:Mine", "/here/my.py:Mine"),
        ("/there/t.safetensors", "/there/t.safetensors"),
        ("rtx4090+my.toml+pcie4-x16", "rtx4090+/here/my.toml+pcie4-x16"),
        ("hybrimoe", "hybrimoe"),
        ("12.5%", "12.5%"),
        (3, 3),
    ],
)
def test_files_are_sought_beside_the_grid(text: Any, place: Any) -> None:
    assert located(text, Path("/here")) == place
