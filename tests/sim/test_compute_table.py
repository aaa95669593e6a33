"""Measured tables of layer times: how they are read, what lies between and beyond the points, and one that is real."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.costs import RooflineCosts, TableCosts
from sim.spec import catalogue
from sim.spec.compute_table import ComputeTable
from traces.errors import InputError

ROWS = [(1, 2, 1.0), (4, 2, 2.0), (2, 8, 4.0), (8, 8, 16.0)]
CSV = "tokens,activated_experts,time_us\n1,2,1e6\n4,2,2e6\n2,8,4e6\n8,8,16e6\n"
MEASURED = Path(__file__).resolve().parents[3] / "shared/data/measured/qwen3-30b-a3b-moe-layer/moe.csv"
MEASURED_ON = "rtx-pro-6000+xeon8559c+pcie5-x16"


@pytest.fixture
def table() -> ComputeTable:
    return ComputeTable.of("by hand", ROWS)


def test_measured_points_come_back(table: ComputeTable) -> None:
    assert [table.layer_s(tokens, activated) for tokens, activated, _ in ROWS] == pytest.approx([1.0, 2.0, 4.0, 16.0])


@pytest.mark.parametrize(
    ("tokens", "activated", "seconds"),
    [
        (2, 2, 2**0.5),  # halfway between 1 and 4 tokens in logarithms: the geometric mean of 1 and 2
        (4, 8, 8.0),
        (4, 4, 4.0),  # the geometric mean of 2 and 8, halfway between 2 and 8 experts
        (1, 8, 4.0),  # fewer tokens than the column has
        (8, 2, 4.0),  # more tokens: in proportion
        (16, 8, 32.0),
        (1, 1, 0.5),  # fewer experts, and more: in proportion
        (8, 16, 32.0),
    ],
)
def test_times_between_and_beyond_the_points(table: ComputeTable, tokens: int, activated: int, seconds: float) -> None:
    assert table.layer_s(tokens, activated) == pytest.approx(seconds)


def test_one_point_is_a_table() -> None:
    one = ComputeTable.of("one", [(4, 2, 1.0)])
    assert [one.layer_s(*at) for at in ((1, 2), (4, 2), (8, 2), (4, 4))] == pytest.approx([1.0, 1.0, 2.0, 2.0])


@given(st.floats(1, 100), st.floats(1, 100))
def test_a_time_lies_between_its_neighbours(tokens: float, activated: float) -> None:
    table = ComputeTable.of("by hand", ROWS)
    assert table.layer_s(tokens, activated) <= table.layer_s(2 * tokens, activated) * (1 + 1e-9)
    assert table.layer_s(tokens, activated) <= table.layer_s(tokens, 2 * activated) * (1 + 1e-9)


def test_csv_and_json_and_every_unit_tell_the_same(tmp_path: Path, table: ComputeTable) -> None:
    (tmp_path / "t.csv").write_text(CSV)
    for name, unit in (("time_us", 1e-6), ("time_ms", 1e-3), ("time_s", 1.0)):
        rows = [{"tokens": n, "activated_experts": a, name: s / unit, "by": "me"} for n, a, s in ROWS]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    for path in sorted(tmp_path.iterdir()):
        found = ComputeTable.load(path)
        assert found.name == str(path)
        assert [found.layer_s(n, a) for n, a, _ in ROWS] == pytest.approx([s for *_, s in ROWS])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.csv: compute table must have rows, got none"),
        ("tokens,activated_experts,time_us\n", "t.csv: compute table must have rows, got none"),
        ("tokens,activated_experts\n1,2\n", "row 1: must have one of the columns time_us, time_ms, time_s, got tokens"),
        (CSV.replace("4,2,2e6", "4,2,-1"), r"t.csv: row 2: time_us must be a positive number, got '-1'"),
        (CSV.replace("4,2,2e6", "4,2,inf"), r"t.csv: row 2: time_us must be a positive number, got 'inf'"),
        (CSV.replace("4,2,2e6", "four,2,1"), r"t.csv: row 2: tokens must be a positive number, got 'four'"),
        (CSV.replace("4,2,2e6", "4.5,2,1"), r"t.csv: row 2: tokens must be a whole number, got 4.5"),
        (CSV.replace("4,2,2e6", "4"), "t.csv: row 2: must have one of the columns"),
        (CSV.replace("4,2,2e6", "1,2,2e6"), "t.csv: tokens and activated_experts must be given once, got 1, 2"),
        (CSV.replace("activated_experts", "experts"), "row 1: activated_experts must be a positive number, got None"),
    ],
)
def test_a_wrong_csv_names_the_row(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        ComputeTable.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"compute-table must be JSON, got .*t\.json"),
        ('{"tokens": 1}', r"t\.json: compute table must be a list of objects, got another shape"),
        ('[{"tokens": true, "activated_experts": 1, "time_s": 1}]', "tokens must be a positive number, got True"),
    ],
)
def test_a_wrong_json_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        ComputeTable.load(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"compute-table must be readable, got .*none\.csv"):
        ComputeTable.load(tmp_path / "none.csv")
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"compute-table must be text in UTF-8, got .*t\.csv"):
        ComputeTable.load(tmp_path / "t.csv")


def test_a_gpu_expert_is_its_share_of_a_layer_and_the_rest_is_the_roofline(table: ComputeTable) -> None:
    model, machine = catalogue.model("mixtral-8x7b"), catalogue.hardware("rtx4090-pcie4")
    roofline, measured = RooflineCosts(model, machine), TableCosts(model, machine, table)
    assert measured.gpu_expert_s(4) == pytest.approx(2.0 / 2), "two of two experts that four tokens chose"
    assert measured.cpu_expert_s(4, True) == roofline.cpu_expert_s(4, True)
    assert measured.dense_s(4, 10) == roofline.dense_s(4, 10)
    assert measured.copy_s(10**6) == roofline.copy_s(10**6)
    assert measured.name == "roofline mixtral-8x7b on rtx4090-pcie4, GPU experts from by hand"


def notes_of(table: ComputeTable, model: str) -> list[str]:
    return TableCosts(catalogue.model(model), catalogue.hardware("rtx4090-pcie4"), table).notes


def test_a_table_of_another_model_or_of_nobody_knows_which_is_noted(tmp_path: Path) -> None:
    assert notes_of(ComputeTable.of("by hand", ROWS), "mixtral-8x7b") == [
        "by hand does not say of which model it is (column model): it is taken for mixtral-8x7b"
    ]
    header, *rows = CSV.splitlines()
    path = tmp_path / "t.csv"
    path.write_text("\n".join([f"{header},model", *(f"{row},Mixtral-8x7B" for row in rows)]))
    assert notes_of(ComputeTable.load(path), "mixtral-8x7b") == []
    assert notes_of(ComputeTable.load(path), "qwen3-30b-a3b") == [
        f"{path} was measured on Mixtral-8x7B, and is taken for qwen3-30b-a3b"
    ]
    path.write_text("\n".join([f"{header},model", *(f"{row},{place}" for place, row in enumerate(rows))]))
    with pytest.raises(InputError, match=r"t\.csv: model must be the same in all rows, got 0, 1, 2, 3"):
        ComputeTable.load(path)


def test_experts_in_another_format_than_the_tables_are_noted(tmp_path: Path) -> None:
    machine, spec = catalogue.hardware("rtx4090-pcie4"), catalogue.model("mixtral-8x7b")
    path = tmp_path / "t.csv"
    header, *rows = CSV.splitlines()

    def notes(model_quant: str, table_quant: str) -> list[str]:
        path.write_text("\n".join([f"{header},model,quant", *(f"{row},mixtral-8x7b,{table_quant}" for row in rows)]))
        return TableCosts(spec.with_experts_in(model_quant), machine, ComputeTable.load(path)).notes

    assert notes("bf16", "") == notes("fp16", "") == notes("int4", "INT4") == notes("bf16", "bf16") == []
    assert notes("int4", "") == [
        f"{path} does not say in what its experts were kept (column quant; bf16 is assumed), and is taken for experts "
        "of 4.25 bits a weight"
    ]
    assert notes("bf16", "int8") == [
        f"{path} was measured on experts in int8, and is taken for experts of 16 bits a weight"
    ]
    with pytest.raises(InputError, match=r"t\.csv: quant must be a known name, got 'int5' \(did you mean int"):
        notes("bf16", "int5")
    path.write_text("\n".join([f"{header},quant", *(f"{row},{place}" for place, row in enumerate(rows))]))
    with pytest.raises(InputError, match=r"t\.csv: quant must be the same in all rows, got 0, 1, 2, 3"):
        ComputeTable.load(path)


def test_experts_outside_the_columns_are_noted() -> None:
    table = ComputeTable.of("by hand", ROWS, "switch-base-8")
    (note,) = notes_of(table, "switch-base-8")
    assert note == "by hand was asked for 1 activated experts, measured for 2 to 8: times are taken in proportion"


def test_what_is_asked_beyond_the_table_is_noted() -> None:
    table = ComputeTable.of("by hand", ROWS, "mixtral-8x7b")
    costs = TableCosts(catalogue.model("mixtral-8x7b"), catalogue.hardware("rtx4090-pcie4"), table)
    costs.gpu_expert_s(8)
    assert costs.notes == []
    costs.gpu_expert_s(32)
    costs.gpu_expert_s(9)
    assert costs.notes == ["by hand was asked for 32 tokens, measured to 8"]


needs_measurements = pytest.mark.skipif(not MEASURED.exists(), reason="the measured layer times are not there")


def _ratios(ask: RooflineCosts) -> dict[tuple[int, int], float]:
    """Predicted over measured, by (tokens, activated experts), where each expert gets its mean number of tokens."""
    table, top_k = ComputeTable.load(MEASURED), ask.model.top_k
    return {
        (tokens, activated): activated * ask.gpu_expert_s(tokens * top_k // activated) / seconds
        for activated, column in table.columns.items()
        for tokens, seconds in zip(*column, strict=True)
    }


@needs_measurements
def test_the_roofline_has_the_shape_of_measured_layers() -> None:
    """The table is of fused kernels; hence no launches. ``few`` are the layers of at most 8 tokens an expert."""
    machine = catalogue.overridden(catalogue.hardware(MEASURED_ON), {"gpu_launch_us": 0.0})
    ratios = _ratios(RooflineCosts(catalogue.model("qwen3-30b-a3b"), machine))
    off = np.abs(np.array([*ratios.values()]) - 1)
    assert len(ratios) == 50
    assert np.median(off) < 0.16
    assert off.max() < 0.48, "worst at the knee, where memory and arithmetic overlap only in part"
    few = {at: ratio for at, ratio in ratios.items() if at[1] >= 64 and at[0] <= at[1]}
    assert max(abs(ratio - 1) for ratio in few.values()) < 0.06, "bound by the weights"


@needs_measurements
def test_launches_of_every_expert_are_not_in_a_fused_layer() -> None:
    machine = catalogue.hardware(MEASURED_ON)
    eager = np.array([*_ratios(RooflineCosts(catalogue.model("qwen3-30b-a3b"), machine)).values()])
    assert np.median(eager) > 2


@needs_measurements
def test_experts_from_the_table_add_up_to_its_layers() -> None:
    machine, table = catalogue.hardware(MEASURED_ON), ComputeTable.load(MEASURED)
    off = np.abs(np.array([*_ratios(TableCosts(catalogue.model("qwen3-30b-a3b"), machine, table)).values()]) - 1)
    assert np.median(off) < 0.06
    assert off.max() < 0.45
