"""``moetwin trace slice`` and ``concat``: small traces cut and joined by hand, and laws over random ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from traces import NOT_ROUTED, InputError, Phase, Trace, TraceError, TraceHeader, store
from traces.cli import app
from traces.edit import concat, slice_trace
from traces.synthetic import Sizes, markov

N = NOT_ROUTED


def made(**changed: Any) -> Trace:
    """Three sequences of two prefill and three decode tokens, 4 layers x 6 experts, top-2, with every array."""
    sizes = Sizes(
        sequences=3,
        prompt_tokens=2,
        new_tokens=3,
        layers=4,
        experts=6,
        top_k=2,
        expert_bytes=(10, 11, 12, 13),
        scores=True,
        lookahead=2,
    )
    return with_header(markov(np.random.default_rng(changed.pop("seed", 0)), sizes), **changed)


def with_header(trace: Trace, **changed: Any) -> Trace:
    return dataclasses.replace(trace, header=trace.header.model_copy(update=changed))


def hand(**changed: Any) -> Trace:
    """One decode token through three layers with look-ahead of depth two, one expert each."""
    arrays: dict[str, Any] = {
        "expert_ids": [[[0], [1], [2]]],
        "lookahead": [[[[1], [2]], [[3], [N]], [[N], [N]]]],
        "token_ids": [9],
        "sequence": [0],
        "position": [0],
        "step": [0],
        "phase": [Phase.DECODE],
    }
    header = TraceHeader(model="hand", layers=3, experts=4, top_k=1, expert_bytes=(5, 6, 7), made_by="hand")
    return Trace.of(header, **arrays | changed)


def test_slice_by_sequence_numbers_them_anew() -> None:
    trace = made(domains=("a", "b", "c"), prompts_digest="abc")
    part = slice_trace(trace, sequences="2,0")
    assert part.sequence.tolist() == [0] * 5 + [1] * 5
    assert part.step.tolist() == [0, 0, 1, 2, 3, 8, 8, 9, 10, 11]
    assert part.header.domains == ("a", "c")
    assert part.header.prompts_digest == ""
    for name in ("expert_ids", "gates", "scores", "lookahead"):
        np.testing.assert_array_equal(getattr(part, name), getattr(trace, name)[[0, 1, 2, 3, 4, 10, 11, 12, 13, 14]])


def test_made_by_tells_what_was_cut_from_what() -> None:
    trace = made(made_by="by hand")
    part = slice_trace(trace, sequences="0:2", phase=Phase.DECODE, layers="1:", tokens=1)
    said = "slice(sequences=0:2, layers=1:, phase=decode, tokens=1)"
    assert part.header.made_by == f"{said} of {trace.digest} (by hand)"
    assert slice_trace(made(made_by=""), steps=":9").header.made_by.startswith("slice(steps=:9) of ")
    assert not slice_trace(made(made_by=""), steps=":9").header.made_by.endswith(")")


def test_slice_by_phase_keeps_positions() -> None:
    part = slice_trace(made(), phase=Phase.DECODE)
    assert part.position.tolist() == [2, 3, 4] * 3
    assert set(part.phase.tolist()) == {Phase.DECODE}
    assert part.header.prompts_digest == made().header.prompts_digest


def test_slice_by_tokens_counts_what_the_other_choices_leave() -> None:
    assert slice_trace(made(), tokens=3).position.tolist() == [0, 1, 2] * 3
    assert slice_trace(made(), tokens=1, phase=Phase.DECODE).position.tolist() == [2] * 3
    assert len(slice_trace(made(), tokens=99)) == 15


def test_slice_by_step_may_drop_whole_sequences_but_not_the_middle() -> None:
    """Each sequence has four forward passes: 0 to 3, 4 to 7, 8 to 11."""
    assert slice_trace(made(), steps="0:2,9:").step.tolist() == [0, 0, 1, 9, 10, 11]
    with pytest.raises(InputError, match="steps must leave each sequence in one piece, got 0:6,7, a gap in sequence 1"):
        slice_trace(made(), steps="0:6,7")


def test_slice_by_domain() -> None:
    trace = made(domains=("a", "b", "a"))
    assert slice_trace(trace, domains=["a"]).step.tolist() == [0, 0, 1, 2, 3, 8, 8, 9, 10, 11]
    assert len(slice_trace(trace, domains=["b", "a"])) == 15


def test_slice_by_layer_adapts_the_header() -> None:
    trace = made()
    part = slice_trace(trace, layers="0,2:4")
    assert (part.header.layers, part.header.expert_bytes) == (3, (10, 12, 13))
    np.testing.assert_array_equal(part.expert_ids, trace.expert_ids[:, [0, 2, 3]])
    assert part.scores is not None
    assert trace.scores is not None
    np.testing.assert_array_equal(part.scores, trace.scores[:, [0, 2, 3]])


@pytest.mark.parametrize(
    ("layers", "ahead"),
    [
        ("0:2", [[[1]], [[N]]]),  # layer 1 at depth one is still there, layer 2 is not
        ("1:3", [[[3]], [[N]]]),
        ("0,2", [[[2]], [[N]]]),  # what was two layers ahead is now the next one
        ("0:3", [[[1], [2]], [[3], [N]], [[N], [N]]]),
        ("1", None),  # nothing is left to predict
    ],
)
def test_lookahead_is_of_the_layers_that_are_left(layers: str, ahead: Any) -> None:
    part = slice_trace(hand(), layers=layers)
    assert (None if part.lookahead is None else part.lookahead[0].tolist()) == ahead


def test_lookahead_too_short_for_the_next_layer_goes() -> None:
    shallow = hand(lookahead=[[[[1]], [[3]], [[N]]]])
    assert slice_trace(shallow, layers="0,2").lookahead is None
    assert slice_trace(shallow, layers="0:2").lookahead_depth == 1


def test_a_sequence_that_begins_late_can_be_cut_by_tokens() -> None:
    late = slice_trace(made(), phase=Phase.DECODE)
    assert slice_trace(late, tokens=2).position.tolist() == [2, 3] * 3


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"sequences": "0:4,9"}, "sequences must be among 0 to 2, got 9"),
        ({"sequences": "7:9"}, "sequences must be among 0 to 2, got 7:9"),
        ({"layers": "2:1"}, "layers must be among 0 to 3, got 2:1"),
        ({"layers": "first"}, "layers must be numbers and ranges such as 0:4,7, got 'first'"),
        ({"steps": "0-4"}, "steps must be numbers and ranges such as 0:4,7, got '0-4'"),
        ({"steps": "0,,4"}, "steps must be numbers and ranges such as 0:4,7, got '0,,4'"),
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"domains": ["b"]}, "domains must be left out for a trace that names none, got b"),
        (
            {"sequences": "0", "steps": "5"},
            "the choices together must leave a token, got none for sequences=0, steps=5",
        ),
    ],
)
def test_slice_refuses(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        slice_trace(made(), **choice)
    assert str(caught.value) == message


def test_slice_offers_near_domains_and_names_a_missing_phase() -> None:
    with pytest.raises(InputError, match=r"domain must be a known name, got 'cod' \(did you mean code\?\)"):
        slice_trace(made(domains=("code", "essays", "plays")), domains=["cod"])
    with pytest.raises(InputError, match="phase must be one that the trace has, got prefill"):
        slice_trace(hand(), phase=Phase.PREFILL)


@given(
    seed=st.integers(0, 50),
    sequences=st.sampled_from(["", "0", "1:", "0,2"]),
    layers=st.sampled_from(["", "0", "1:3", "0,3"]),
    phase=st.sampled_from([None, *Phase]),
    tokens=st.sampled_from([None, 1, 2]),
)
@settings(max_examples=40)
def test_slices_can_be_taken_one_after_the_other(
    seed: int, sequences: str, layers: str, phase: Phase | None, tokens: int | None
) -> None:
    """All choices together give what one after the other gives, tokens last; each result obeys the schema."""
    trace = made(seed=seed, domains=("a", "b", "c"))
    together = slice_trace(trace, sequences=sequences, layers=layers, phase=phase, tokens=tokens)
    step_by_step = slice_trace(slice_trace(trace, layers=layers), phase=phase)
    step_by_step = slice_trace(slice_trace(step_by_step, sequences=sequences), tokens=tokens)
    assert together.digest == step_by_step.digest
    assert together.header.domains == step_by_step.header.domains


def test_concat_numbers_sequences_and_steps_on() -> None:
    first, second = slice_trace(made(), sequences="1", steps="5:7"), made(seed=1)
    joined, notes = concat([first, second])
    assert joined.sequence.tolist() == [0, 0, *(1 + second.sequence)]
    assert joined.step.tolist() == [0, 1, *(2 + second.step)]
    assert joined.position.tolist() == [2, 3, *second.position]
    assert notes == []
    for name in ("expert_ids", "gates", "scores", "lookahead", "token_ids", "phase"):
        np.testing.assert_array_equal(
            getattr(joined, name), np.concatenate([getattr(first, name), getattr(second, name)])
        )
    assert joined.header.made_by == f"concat of {first.digest}, {second.digest}"


def test_concat_leaves_out_what_not_all_have_and_says_so() -> None:
    whole, bare = made(), dataclasses.replace(made(), gates=None, lookahead=None)
    for order, names in (([whole, bare], ["whole", "bare"]), ([bare, whole], ["bare", "whole"])):
        joined, notes = concat(order, names)
        assert (joined.gates, joined.lookahead) == (None, None)
        assert joined.scores is not None
        assert notes == [f"{name} is left out: bare does not have it" for name in ("gates", "lookahead")]


def test_concat_cuts_lookahead_to_the_smallest_depth() -> None:
    deep, shallow = hand(), hand(lookahead=[[[[1]], [[3]], [[N]]]])
    joined, notes = concat([deep, shallow])
    assert joined.lookahead is not None
    assert joined.lookahead[:, :, 0, 0].tolist() == [[1, 3, N]] * 2
    assert notes == ["lookahead is cut to the smallest depth, 1 of 2"]


def test_concat_keeps_domains() -> None:
    named, nameless = made(domains=("a", "b", "c", "d")), hand()
    assert concat([named, named]).trace.header.domains == ("a", "b", "c") * 2
    joined, notes = concat([hand(sequence=[1]), with_header(nameless, domains=("x",))])
    assert joined.header.domains == ("unknown", "x")
    assert notes == ["domains are 'unknown' where a trace names none"]
    assert concat([nameless, nameless]).trace.header.domains == ()


def test_concat_joins_headers() -> None:
    one = with_header(hand(), licence="MIT", software={"numpy": "2.0", "torch": "2.9"}, prompts_digest="p")
    two = with_header(hand(), licence="CC0", software={"numpy": "2.1"}, synthetic=True, model="other", dtype="bf16")
    joined, notes = concat([one, two])
    header = joined.header
    assert (header.model, header.licence, header.dtype, header.synthetic) == ("hand + other", "MIT + CC0", "float32", 1)
    assert header.software == {"numpy": "2.0, 2.1", "torch": "2.9"}
    assert header.prompts_digest == ""
    assert [note.split()[0] for note in notes] == ["model", "dtype", "licence"]
    assert notes[0] == "model differs: 'hand', 'other'; written as 'hand + other'"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"experts": 5}, "b: experts must be as in a (4), got 5"),
        ({"expert_bytes": (5, 6, 8)}, "b: expert_bytes must be as in a ((5, 6, 7)), got (5, 6, 8)"),
        ({"expert_bytes": (5, 5, 5)}, "b: expert_bytes must be as in a ((5, 6, 7)), got 5 in every layer"),
    ],
)
def test_concat_refuses_other_dimensions(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError) as caught:
        concat([hand(), with_header(hand(), **changed)], ["a", "b"])
    assert str(caught.value) == message


def test_concat_needs_two() -> None:
    with pytest.raises(TraceError, match="traces must be at least 2, got 1"):
        concat([hand()])


@given(seeds=st.lists(st.integers(0, 20), min_size=2, max_size=4))
@settings(max_examples=20)
def test_a_slice_of_a_concat_is_the_part(seeds: list[int]) -> None:
    parts = [made(seed=seed) for seed in seeds]
    joined = concat(parts).trace
    for number, part in enumerate(parts):
        again = slice_trace(joined, sequences=f"{3 * number}:{3 * number + 3}")
        again = dataclasses.replace(again, step=again.step - again.step[0])
        assert again.digest == part.digest


# The commands.


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return store.save(made(domains=("a", "b", "a")), tmp_path / "t.safetensors")


def test_the_slice_command_writes_a_trace(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "part.safetensors"
    options = ("--domains", "a, b", "--phase", "decode", "--layers", "1:", "--sequences", "0,1", "--tokens", "2")
    said = run("slice", file, "--out", out, "--steps", ":11", *options).output
    part = store.load(out, verify=True)
    assert (len(part), part.header.layers) == (4, 3)
    assert said == f"{out}: 4 tokens in 3 layers, digest {part.digest}\n"


def test_the_slice_command_refuses_and_writes_nothing(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "part.safetensors"
    with pytest.raises(InputError, match=r"phase must be a known name, got 'prefil' \(did you mean prefill\?\)"):
        run("slice", file, "--out", out, "--phase", "prefil")
    with pytest.raises(InputError, match="out must be a new file"):
        run("slice", file, "--out", file)
    with pytest.raises(InputError, match=r"out must end in \.safetensors, .* got .*part\.csv"):
        run("slice", file, "--out", out.with_suffix(".csv"))
    with pytest.raises(InputError, match=r"out must end in \.safetensors, .* got .*part$"):
        run("concat", file, "--out", out.with_suffix(""))
    assert list(tmp_path.iterdir()) == [file]
    assert run("slice", file, "--out", file, "--force", "--tokens", "1").exit_code == 0
    assert len(store.load(file)) == 3


def test_the_concat_command_says_what_is_left_out(file: Path, tmp_path: Path) -> None:
    bare, out = tmp_path / "bare.safetensors", tmp_path / "both.safetensors"
    store.save(dataclasses.replace(store.load(file), gates=None), bare)
    result = run("concat", file, bare, "--out", out)
    assert f"note: gates is left out: {bare} does not have it\n" in result.stderr
    assert result.stdout.startswith(f"{out}: 30 tokens in 4 layers, digest ")
    assert store.load(out).header.domains == ("a", "b", "a") * 2


def test_the_concat_command_names_the_file_that_does_not_fit(file: Path, tmp_path: Path) -> None:
    small = store.save(hand(), tmp_path / "small.safetensors")
    with pytest.raises(TraceError, match=r"small.safetensors: layers must be as in .*t.safetensors \(4\), got 3"):
        run("concat", file, small, "--out", tmp_path / "both.safetensors")
    assert not (tmp_path / "both.safetensors").exists()
