"""Mistakes in the words of ``moetwin cache``: each is one line, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.analysis.caching import OWN, refused, rows, shown

pytestmark = pytest.mark.usefixtures("cache_folder")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("t.safetensors --capacity 0", "be between 1 and 8 slots, got 0"),
        ("t.safetensors --capacity 0%", "be between 1 and 8 slots, got 0%"),
        ("t.safetensors --capacity 5%", "be between 1 and 8 slots, got 5% which is 0"),
        ("t.safetensors --capacity 101%", "capacity must be at most 100%, got 101%"),
        ("t.safetensors --capacity 9", "be between 1 and 8 slots, got 9"),
        ("t.safetensors --capacity half", "be a number of slots or a percentage, got 'half'"),
        ("t.safetensors --capacity 25%,,50%", "capacity must be names or numbers with commas between them"),
        ("t.safetensors --bytes 1MiB", "bytes must leave each layer's share room for one expert of 1048576 bytes"),
        ("t.safetensors --bytes 1000KB --scope global", "bytes must leave the cache room for one expert"),
        ("t.safetensors --bytes 1GiB", "bytes must be at most the 16777216 of all experts, got 1073741824"),
        ("t.safetensors --bytes lots", "bytes must be a size such as 8GiB or 500MB, got 'lots'"),
        ("t.safetensors --bytes 8MiB --capacity 25%", "bytes must not be given together with capacity, got 8MiB"),
        ("t.safetensors --phases decoding", "phase must be a known name, got 'decoding' (did you mean decode?)"),
        ("golden.safetensors --phases all,prefill", "phase must be one that the trace has (decode), got prefill"),
        ("t.safetensors --policies lru,lfuu", "policy must be a known name, got 'lfuu' (did you mean lfu"),
        ("t.safetensors --scope layers", "scope must be a known name, got 'layers' (did you mean layer?)"),
        ("t.safetensors --contract atom", "contract must be a known name, got 'atom' (did you mean atomic?)"),
        ("t.safetensors --order ascending", "order must be left out under the atomic contract, got ascending"),
        ("t.safetensors --contract serial --order up", "order must be a known name, got 'up'"),
        ("t.safetensors --sequences fres", "sequences must be a known name, got 'fres' (did you mean fresh?)"),
        ("t.safetensors --batch 0", "batch must be greater than or equal to 1, got '0'"),
        ("t.safetensors --warmup 88", "warmup must be between 0 and 87 of 88 passes, got 88"),
        ("t.safetensors --option x=1 --policies lru", "option must be a constant of a policy that has one, got 'x=1'"),
        ("t.safetensors --option x", "option must be name=value, got 'x'"),
        ("t.safetensors --option lfx.x=1 --policies lfu", "option's policy must be a known name, got 'lfx'"),
        ("nowhere.safetensors", "trace must be an existing file, got nowhere.safetensors"),
        ("mixxed", "trace or command must be a known name, got 'mixxed' (did you mean mixed?)"),
        ("localty mixed", "trace or command must be a known name, got 'localty' (did you mean locality?)"),
        ("t.safetensors --polices lru", "option must be a known name, got '--polices' (did you mean --policies"),
        ("t.safetensors --out t.txt", "out must end in one of .csv, .parquet, .png, .svg, got t.txt"),
        ("t.safetensors --out own.py/x.csv", "out must be a file that can be written, got own.py/x.csv"),
        ("t.safetensors --out x.png --capacity 25%,50%", "out must be a table for more than one capacity or phase"),
        ("bare.safetensors --policies mrs", "trace must have the router's scores, or at least gates, for mrs"),
        ("t.safetensors --policies static", "static must be given a calibration trace"),
        ("t.safetensors --calibration t.safetensors", "calibration trace must be another than the one replayed"),
        ("t.safetensors --calibration small.safetensors", "calibration trace must have 2 layers, 8 experts, top 2"),
        ("t.safetensors --policy-file own.py:Lat", "class in own.py must be a known name, got 'Lat'"),
        ("t.safetensors --policy-file own.py:Broken", "policy_file must decide without errors, got own.py, line "),
        ("t.safetensors --policy-file none.py:X", "policy_file must be an existing file, got none.py"),
        ("t.safetensors --policy-file own.py:Late --option patience=two", "patience must be a whole number, got 'two'"),
        ("t.safetensors --policy-file own.py:Late --option rate=fast", "rate must be a number, got 'fast'"),
        ("t.safetensors --policy-file own.py:Late --option shy=so", "shy must be true or false, got 'so'"),
        (
            "t.safetensors --policy-file own.py:Late --option patience=0",
            "patience must be at least 1, got 0 (own.py:Late)",
        ),
        ("t.safetensors --policy-file own.py:Late --option patiense=1", "option must be a known name, got 'patiense'"),
        (
            "t.safetensors --policies window-score --option swaps=0",
            "window-score: swaps must be from 1 to 65536, got 0",
        ),
        ("t.safetensors --policies window-score --option swaps=nan", "swaps must be a whole number, got 'nan'"),
        ("t.safetensors --policies lfu-decay --option window=0", "lfu-decay: window must be at least 1, got 0"),
        (f"t.safetensors --policies lfu-decay --option window={1 << 63}", "window must be below 2**63, got 9223372"),
        ("t.safetensors --policies s3fifo --option ghost=inf", "ghost must be a finite number, got 'inf'"),
        ("t.safetensors --policies s3fifo --option s3fifo.small=2", "s3fifo: small must be from 0 to 1, got 2.0"),
        ("t.safetensors --policies hobbit --option recency=nan", "recency must be a finite number, got 'nan'"),
        ("t.safetensors --policy-file own.py:Late --option rate=-inf", "rate must be a finite number, got '-inf'"),
        ("t.safetensors --policy-file own.py:Leaves", "policy_file must decide without errors, got own.py, line "),
        (
            "t.safetensors --policy-file own.py:Nameless",
            "policy_file must have a name that is text, in one line, got 5",
        ),
        ("curve t.safetensors --unit slot", "unit must be a known name, got 'slot' (did you mean slots?)"),
        ("curve t.safetensors --phase all,decode", "phase must be one of all, prefill and decode, got all,decode"),
        ("curve t.safetensors --policies lfu --out c.png", "policies must have lru or belady among them for a plot"),
        ("locality t.safetensors --contract atom", "contract must be a known name, got 'atom'"),
        ("locality t.safetensors --out l.csv", "out must end in one of .png, .svg, got l.csv"),
    ],
)
@pytest.mark.usefixtures("other_traces")
def test_a_mistake_is_one_line_and_leaves_nothing(words: str, message: str, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    known = () if "--policies" in words or not words.startswith("t.safe") else ("--policies", "lru")
    assert message in refused(*words.split(" "), *known)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", [(), ("curve",)])
def test_no_policy_at_all_is_refused_and_none_but_ones_own_is_not(command: tuple[str, ...]) -> None:
    words = (*command, "t.safetensors", "--policies", "")
    assert refused(*words) == "policies must name at least one policy, got ''"
    assert {row["policy"] for row in rows(*words, "--policy-file", "own.py:Late")} == {"Late"}


def test_a_policy_file_with_a_registered_name_is_refused() -> None:
    Path("thief.py").write_text(OWN.replace("class Same(Lru):\n    pass", 'class Same(Lru):\n    name = "lru"'))
    told = refused("t.safetensors", "--policies", "lfu", "--policy-file", "thief.py:Same")
    assert told == "policy_file must have a class with a name of its own, got 'lru' in thief.py:Same"


def test_a_file_that_exists_is_kept_unless_forced() -> None:
    Path("rows.csv").write_text("mine")
    words = ("t.safetensors", "--policies", "lru", "--out", "rows.csv")
    assert refused(*words).startswith("out must be a new file (or give --force), got rows.csv")
    assert Path("rows.csv").read_text() == "mine"
    shown(*words, "--force")
    assert Path("rows.csv").read_text().startswith("policy,")
