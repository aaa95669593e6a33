"""The catalogues: dimensions against published sizes, machines and their parts, and a user's own file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError, field_validator
from typer.testing import CliRunner

from sim.cli import hardware_app, models_app
from sim.spec import CpuSpec, ModelSpec, catalogue
from traces.errors import InputError

EXPERT_MB = {
    "mixtral-8x7b": 352.3,
    "mixtral-8x22b": 604.0,
    "phi-3.5-moe": 157.3,
    "qwen1.5-moe-a2.7b": 17.3,
    "qwen2-57b-a14b": 55.1,
    "qwen3-30b-a3b": 9.4,
    "deepseek-v2-lite": 17.3,
    "deepseek-v3": 88.1,
    "olmoe-1b-7b": 12.6,
    "gpt-oss-20b": 49.8,
    "gpt-oss-120b": 49.8,
    "switch-base-8": 9.4,
    "switch-base-16": 9.4,
    "switch-base-32": 9.4,
    "switch-base-64": 9.4,
    "switch-base-128": 9.4,
    "switch-base-256": 9.4,
    "nllb-moe-54b": 67.1,
}
"""Megabytes of one expert in bf16."""

SHAPES = {
    "mixtral-8x7b": (32, 32, 8, 2, 4096, 14336),
    "mixtral-8x22b": (56, 56, 8, 2, 6144, 16384),
    "phi-3.5-moe": (32, 32, 16, 2, 4096, 6400),
    "qwen1.5-moe-a2.7b": (24, 24, 60, 4, 2048, 1408),
    "qwen2-57b-a14b": (28, 28, 64, 8, 3584, 2560),
    "qwen3-30b-a3b": (48, 48, 128, 8, 2048, 768),
    "deepseek-v2-lite": (27, 26, 64, 6, 2048, 1408),
    "deepseek-v3": (61, 58, 256, 8, 7168, 2048),
    "olmoe-1b-7b": (16, 16, 64, 8, 2048, 1024),
    "gpt-oss-20b": (24, 24, 32, 4, 2880, 2880),
    "gpt-oss-120b": (36, 36, 128, 4, 2880, 2880),
    **{f"switch-base-{experts}": (24, 12, experts, 1, 768, 3072) for experts in (8, 16, 32, 64, 128, 256)},
    "nllb-moe-54b": (48, 12, 128, 2, 2048, 8192),
}
"""Layers, those with experts, experts, top-k, hidden, width of an expert."""

PARAMETERS_B = {
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 141,
    "phi-3.5-moe": 41.9,
    "qwen1.5-moe-a2.7b": 14.3,
    "qwen2-57b-a14b": 57.4,
    "qwen3-30b-a3b": 30.5,
    "deepseek-v2-lite": 15.7,
    "deepseek-v3": 671,
    "olmoe-1b-7b": 6.92,
    "gpt-oss-20b": 20.9,
    "gpt-oss-120b": 117,
    "switch-base-128": 7.4,
    "nllb-moe-54b": 54.5,
}
"""Parameters that the authors state, in billions, to three digits, and those of Switch to two."""

LATENT = ("deepseek-v2-lite", "deepseek-v3")

MACHINE = """
name = "mine"
[gpu]
name = "g"
source = "data sheet"
memory_bytes = 8_000_000_000
bytes_per_s = 400e9
flops_per_s = 50e12
[cpu]
name = "c"
source = "measured"
bytes_per_s = 30e9
flops_per_s = 1e12
[link]
name = "l"
source = "measured"
bytes_per_s = 12e9
[host]
source = "measured"
"""


def test_every_model_has_its_published_sizes_checked() -> None:
    assert set(catalogue.model_names()) - {"moetwin-small"} == EXPERT_MB.keys() == SHAPES.keys()
    assert {name for name in EXPERT_MB if not name.startswith("switch")} == PARAMETERS_B.keys() - {"switch-base-128"}


def test_the_small_model_stands_in_the_catalogue_as_in_its_config() -> None:
    root = Path(__file__).parents[2] / "real" / "models" / "small"
    config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    spec = catalogue.model("moetwin-small")
    assert (spec.layers, spec.moe_layers, spec.experts) == (
        config["num_hidden_layers"],
        config["num_hidden_layers"],
        config.get("num_experts", config.get("num_local_experts")),
    )
    assert (spec.top_k, spec.hidden, spec.expert_width) == (
        config["num_experts_per_tok"],
        config["hidden_size"],
        config["moe_intermediate_size"],
    )
    assert (spec.heads, spec.kv_heads, spec.head_dim) == (
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["head_dim"],
    )
    assert (spec.vocab, spec.tied_embeddings) == (config["vocab_size"], config["tie_word_embeddings"])
    stored_bytes = (root / "model.safetensors").stat().st_size
    norms = 2 * spec.head_dim * spec.layers  # query and key norms, which a spec leaves out
    header_bytes = stored_bytes - 2 * (spec.total_elements + norms)
    assert 0 < header_bytes < 0.005 * stored_bytes, "bf16 weights, and names before them"


@pytest.mark.parametrize(("name", "megabytes"), EXPERT_MB.items())
def test_bytes_of_an_expert_in_bf16(name: str, megabytes: float) -> None:
    spec = catalogue.model(name).with_experts_in("bf16")
    assert round(spec.expert_bytes / 1e6, 1) == megabytes


@pytest.mark.parametrize(("name", "billions"), PARAMETERS_B.items())
def test_dimensions_add_up_to_the_published_parameter_count(name: str, billions: float) -> None:
    digits = 2 if name.startswith("switch") else 3
    assert float(f"{catalogue.model(name).total_elements / 1e9:.{digits}g}") == billions


@pytest.mark.parametrize(("name", "shape"), SHAPES.items())
def test_dimensions_of_the_experts(name: str, shape: tuple[int, ...]) -> None:
    spec = catalogue.model(name)
    assert (spec.layers, spec.moe_layers, spec.experts, spec.top_k, spec.hidden, spec.expert_width) == shape


def test_gpt_oss_experts_are_counted_as_released() -> None:
    spec = catalogue.model("gpt-oss-20b")
    assert spec.expert_bytes == 3 * 2880 * 2880 * 4.25 / 8 + 2 * 8640, "MXFP4, with biases in bf16"
    assert round(spec.expert_bytes / 1e6, 1) == 13.2


@pytest.mark.parametrize(("quant", "bits"), [("int8", 8.25), ("int4", 4.25), ("mxfp4", 4.25), ("q4_k", 4.5)])
def test_bytes_of_a_quantised_expert(quant: str, bits: float) -> None:
    lite = catalogue.model("deepseek-v2-lite").with_experts_in(quant)
    assert lite.expert_bytes == 3 * 2048 * 1408 * bits / 8


@pytest.mark.parametrize(
    ("name", "width"),
    [("qwen1.5-moe-a2.7b", 5632), ("qwen2-57b-a14b", 20480), ("deepseek-v2-lite", 2 * 1408), ("deepseek-v3", 2048)],
)
def test_shared_experts_have_their_own_width(name: str, width: int) -> None:
    spec = catalogue.model(name)
    bare = spec.model_copy(update={"shared_width": 0})
    assert spec.moe_layer_elements - bare.moe_layer_elements == 3 * spec.hidden * width


def test_switch_has_two_matrices_and_half_its_layers_attend_twice() -> None:
    spec = catalogue.model("switch-base-8")
    attention, plain = 4 * 768 * 768, 2 * 768 * 3072
    outside = 24 * attention + 12 * attention + 12 * plain + 12 * 768 * 8 + 24 * 2 * 768 + 768 + 32128 * 768
    assert spec.dense_elements == outside
    assert spec.total_elements == outside + 12 * 8 * plain
    assert spec.kv_bytes_per_token == 12 * 2 * 768 * 2, "the decoder's layers alone"


def test_models_that_are_like_another_have_its_numbers_and_their_own() -> None:
    few, many = (catalogue.model(f"switch-base-{experts}") for experts in (8, 256))
    assert many.total_elements - few.total_elements == 12 * 248 * (2 * 768 * 3072 + 768)
    same = {"name", "source", "experts"}
    assert few.model_dump(exclude=same) == many.model_dump(exclude=same)


def test_nllb_experts_have_biases_and_its_decoder_attends_twice() -> None:
    spec = catalogue.model("nllb-moe-54b")
    assert spec.expert_bytes == 2 * (2 * 2048 * 8192 + 8192 + 2048)
    assert spec.layers * spec.attention_elements == (48 + 24) * 4 * 2048 * 2048
    assert spec.kv_bytes_per_token == 24 * 2 * 2048 * 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 65}, "top_k must be at most experts 64, got 65"),
        ({"moe_layers": 17}, "moe_layers must be at most layers 16, got 17"),
        ({"dtype": "bf61"}, r"dtype must be a known name, got 'bf61' \(did you mean bf16"),
    ],
)
def test_a_model_has_to_make_sense(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelSpec.model_validate({**catalogue.model("olmoe-1b-7b").model_dump(), **fields})


def test_latent_attention_caches_the_compressed_vector() -> None:
    lite = catalogue.model("deepseek-v2-lite")
    assert lite.kv_bytes_per_token == 27 * (512 + 64) * 2
    assert lite.attention_elements == 2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 16 * 128 * 2048


def test_latent_attention_has_wider_queries_and_keys_than_values() -> None:
    wide = {name: catalogue.model(name).query_head_dim for name in catalogue.model_names()}
    assert {name: width for name, width in wide.items() if width} == dict.fromkeys(LATENT, 128 + 64)
    assert {catalogue.model(name).head_dim for name in LATENT} == {128}
    assert catalogue.model("olmoe-1b-7b").key_dim == 128


def test_fields_of_later_are_written_only_where_they_say_something() -> None:
    plain, latent = (catalogue.model(name) for name in ("olmoe-1b-7b", "deepseek-v3"))
    free = plain.model_copy(update={"context_costs": False})
    assert {"query_head_dim", "context_costs"}.isdisjoint(plain.model_dump())
    assert latent.model_dump()["query_head_dim"] == 192
    assert free.model_dump()["context_costs"] is False
    for spec in (plain, latent, free):
        assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize("name", catalogue.model_names())
def test_every_model_says_where_its_numbers_were_read(name: str) -> None:
    assert re.search(r"\[[PMNI]\]", catalogue.model(name).source)


def test_an_unknown_model_offers_the_near_name() -> None:
    with pytest.raises(InputError, match=r"model must be a known name, got 'qwen3-30b' \(did you mean qwen3-30b-a3b"):
        catalogue.model("qwen3-30b")


@pytest.mark.parametrize("name", catalogue.hardware_names())
def test_every_machine_is_complete_and_every_part_has_a_marked_source(name: str) -> None:
    spec = catalogue.hardware(name)
    assert spec.name == name
    for text in (spec.source, spec.gpu.source, spec.cpu.source, spec.link.source, spec.host.source):
        assert re.search(r"\[[PMNI]\]", text)


def test_every_part_is_valid_and_has_a_marked_source() -> None:
    for kind in catalogue.PART_KINDS:
        base = {"gpu": "a6000", "cpu": "xeon6330", "link": "pcie4-x16", "host": "python", "disk": "nvme-pcie4"}
        for name in catalogue.part_names(kind):
            spec = catalogue.hardware("+".join({**base, kind: name}.values()))
            assert re.search(r"\[[PMNI]\]", getattr(spec, kind).source)


def test_a_machine_is_composed_of_parts() -> None:
    spec = catalogue.hardware("rtx4090+xeon6330+pcie3-x16")
    assert (spec.gpu.name, spec.cpu.name, spec.link.name) == ("rtx4090", "xeon6330", "pcie3-x16")
    assert spec.host == catalogue.hardware("a6000-xeon5220r").host
    assert catalogue.hardware("rtx4090+xeon6330+pcie3-x16+python").host == spec.host


def test_a_host_and_a_disk_may_follow_in_either_order() -> None:
    one, other = (
        catalogue.hardware(f"rtx4090+xeon6330+pcie4-x16+{rest}") for rest in ("python+nvme-pcie5", "nvme-pcie5+python")
    )
    assert one.disk == other.disk
    assert one.disk is not None
    assert one.disk.bytes_per_s == 13e9
    assert catalogue.hardware("rtx4090+xeon6330+pcie4-x16").disk is None


def test_a_cpu_whose_rates_are_reached_needs_no_efficiency() -> None:
    cpu = CpuSpec(name="c", source="by hand", bytes_per_s=1e9, flops_per_s=1e12)
    assert (cpu.reached_bytes_per_s, cpu.reached_flops_per_s) == (1e9, 1e12)
    assert (cpu.handoff_s, cpu.first_expert_s, cpu.shared_bytes_per_s) == (0, 0, 0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a6000-xeon5220", r"hardware must be a known name, got 'a6000-xeon5220' \(did you mean a6000-xeon5220r"),
        ("rtx409+xeon6330+pcie4-x16", r"gpu must be a known name, got 'rtx409' \(did you mean rtx4090"),
        ("rtx4090+xeon6330+pcie9", r"link must be a known name, got 'pcie9'"),
        ("rtx4090+xeon6330+pcie4-x16+lisp", r"host must be a known name, got 'lisp'"),
        (
            "rtx4090+xeon6330",
            r"hardware must be a machine, or gpu\+cpu\+link with \+host or \+disk after it, got 'rtx4",
        ),
        ("rtx4090+xeon6330+pcie4-x16+python+python", "hardware must have one host, got 'python' and 'python'"),
    ],
)
def test_an_unknown_machine_or_part_is_named(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        catalogue.hardware(name)


def test_an_unknown_kind_of_part_is_named() -> None:
    with pytest.raises(InputError, match="part must be a known name, got 'tape'"):
        catalogue.part_names("tape")


def test_a_hardware_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MACHINE, encoding="utf-8")
    spec = catalogue.load_hardware_file(path)
    assert (spec.name, spec.gpu.memory_bytes, spec.link.bytes_per_s) == ("mine", 8_000_000_000, 12e9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("bytes_per_s = 400e9", "bytes_per_s = -1"), r"gpu\.bytes_per_s must be greater than or equal to 1, got -1"),
        (("bytes_per_s = 400e9", "bytes_per_s = 'fast'"), r"gpu\.bytes_per_s must be a valid number.*got 'fast'"),
        (("bytes_per_s = 400e9", ""), r"gpu\.bytes_per_s must be given, got nothing"),
        (("bytes_per_s = 400e9", "bytes_per_s = 4e11\nspeed = 3"), r"gpu\.speed must be left out .*, got 3"),
        (("[link]", "[lnk]"), r"link must be given, got nothing"),
        (("[host]", "[host"), r"hardware file must be TOML, got .*mine\.toml"),
    ],
)
def test_a_wrong_hardware_file_names_the_field(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MACHINE.replace(*change), encoding="utf-8")
    with pytest.raises(catalogue.CatalogueError, match=message) as caught:
        catalogue.load_hardware_file(path)
    assert "mine.toml" in str(caught.value)


def test_a_hardware_file_has_to_be_there(tmp_path: Path) -> None:
    with pytest.raises(catalogue.CatalogueError, match=r"hardware file must be readable, got .*none\.toml"):
        catalogue.load_hardware_file(tmp_path / "none.toml")


def test_a_rule_of_a_validator_is_passed_on_as_it_stands() -> None:
    class Even(BaseModel):
        number: int

        @field_validator("number")
        @classmethod
        def _even(cls, value: int) -> int:
            if value % 2:
                raise InputError(f"number must be even, got {value}")
            return value

    with pytest.raises(ValidationError) as caught:
        Even(number=3)
    assert catalogue.first_fault(caught.value) == "number must be even, got 3"


@pytest.mark.parametrize(
    ("app", "names"), [(models_app, catalogue.model_names), (hardware_app, catalogue.hardware_names)]
)
def test_lists_show_every_name(app: object, names: object) -> None:
    result = CliRunner().invoke(app, ["list"])
    assert result.exit_code == 0
    assert [name for name in names() if name not in result.output] == []


def test_model_list_as_json() -> None:
    records = json.loads(CliRunner().invoke(models_app, ["list", "--json"]).output)
    assert [record["name"] for record in records] == catalogue.model_names()


def test_model_record_as_json_has_the_derived_bytes() -> None:
    record = json.loads(CliRunner().invoke(models_app, ["show", "olmoe-1b-7b", "--json"]).output)
    assert record["expert_bytes"] == 3 * 2048 * 1024 * 2
    assert record["source"].startswith("[P]")


def test_hardware_list_as_json_has_machines_and_parts() -> None:
    found = json.loads(CliRunner().invoke(hardware_app, ["list", "--json"]).output)
    assert [machine["name"] for machine in found["machines"]] == catalogue.hardware_names()
    assert found["parts"]["link"] == catalogue.part_names("link")


def test_tables_show_numbers_and_the_marks_of_their_sources() -> None:
    shown = CliRunner().invoke(hardware_app, ["show", "a6000-xeon5220r"], env={"COLUMNS": "200"}).output
    assert "48,000,000,000" in shown
    assert "[P]" in shown
    shown = CliRunner().invoke(models_app, ["show", "olmoe-1b-7b"], env={"COLUMNS": "200"}).output
    assert "12,582,912" in shown
    assert "[P] config.json" in shown


def test_show_reads_a_file_of_the_user(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MACHINE, encoding="utf-8")
    record = json.loads(CliRunner().invoke(hardware_app, ["show", str(path), "--json"]).output)
    assert record["gpu"]["memory_bytes"] == 8_000_000_000
