"""A user's own policy: read from a file, equal to a registered one when it says the same, and watched for mistakes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sim.custom import load_policy
from sim.policies.base import EvictionPolicy
from sim.replay import Capacity, Feed, Settings
from sim.replay.result import Replay
from sim.replay.run import replay
from traces.errors import InputError
from traces.schema import Trace
from traces.synthetic import Sizes, generate

HEAD = """
from dataclasses import dataclass
from sim.policies import EvictionPolicy
from sim.policies.evict.lru import Lru

class Mine(EvictionPolicy):
    def key(self, block):
        return 0
"""
RECENT = """
    def __init__(self, context):
        super().__init__(context)
        self.last = {}
    def observe(self, event, blocks, counts):
        self.last.update(dict.fromkeys(blocks, event))
    def key(self, block):
        return self.last[block]
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Writes the lines of a class body behind the head, and returns what names the class."""
    monkeypatch.chdir(tmp_path)

    def written(body: str) -> str:
        Path("my.py").write_text(HEAD + body)
        return "my.py:Mine"

    return written


@pytest.fixture(scope="module")
def trace() -> Trace:
    sizes = Sizes(sequences=2, prompt_tokens=4, new_tokens=12, layers=2, experts=6, top_k=2, expert_bytes=10)
    return generate("zipf", 0, sizes)


def run(kind: type[EvictionPolicy], trace: Trace, *, name: str = "mine", slots: str = "3") -> Replay:
    capacity = Capacity.slots(slots, trace.header, "layer")
    return replay(Feed.of(trace), Settings(name, capacity), policy=kind, log=True)


def refused(kind: type[EvictionPolicy], trace: Trace) -> str:
    with pytest.raises(InputError) as caught:
        run(kind, trace)
    return str(caught.value)


def test_a_policy_that_says_what_lru_says_decides_like_it(write: Callable[[str], str], trace: Trace) -> None:
    mine = run(load_policy(write(RECENT)), trace)
    lru = replay(Feed.of(trace), Settings("lru", mine.settings.capacity), log=True)
    assert np.array_equal(mine.table, lru.table)
    assert np.array_equal(mine.log, lru.log)
    assert len(mine.log)


def test_the_name_is_the_class_name_or_its_own(write: Callable[[str], str]) -> None:
    assert load_policy(write("")).name == "Mine"
    assert load_policy(write('    name = "my-own"\n')).name == "my-own"


def test_a_name_is_not_inherited(write: Callable[[str], str]) -> None:
    write("\nclass Heir(Lru):\n    pass\n")
    assert load_policy("my.py:Heir").name == "Heir"


def test_constants_are_those_of_the_class(write: Callable[[str], str]) -> None:
    assert load_policy(write('    defaults = {"window": 3}\n')).defaults == {"window": 3}


def test_the_file_may_hold_dataclasses_and_leaves_nothing_beside_it(
    write: Callable[[str], str], tmp_path: Path
) -> None:
    write("\n@dataclass\nclass Note:\n    block: int\n")
    load_policy("my.py:Mine")
    assert [path.name for path in tmp_path.iterdir()] == ["my.py"]
    assert "moetwin_policy_my" in sys.modules


def test_a_file_with_a_colon_in_its_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:b.py").write_text(HEAD)
    assert load_policy("a:b.py:Mine").name == "Mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("my.py", "policy_file must name a file and a class in it, as my.py:MyPolicy, got 'my.py'"),
        (":Mine", "policy_file must name a file and a class in it, as my.py:MyPolicy, got ':Mine'"),
        ("my.py:", "policy_file must name a file and a class in it, as my.py:MyPolicy, got 'my.py:'"),
        ("none.py:Mine", "policy_file must be an existing file, got none.py"),
        (".:Mine", "policy_file must be an existing file, got ."),
        ("bad.py:Mine", "policy_file must be Python, got bad.py, line 2: invalid syntax"),
        ("binary.py:Mine", "policy_file must be Python, got binary.py"),
        ("raises.py:Mine", "policy_file must run without errors, got raises.py, line 2: ZeroDivisionError: division"),
        ("leaves.py:Mine", "policy_file must run without errors, got leaves.py, line 1: SystemExit: 3"),
        ("my.py:Mime", "class in my.py must be a known name, got 'Mime' (did you mean Mine?)"),
        ("empty.py:Mine", "policy_file must have a class derived from EvictionPolicy, got none in empty.py"),
        ("empty.py:Other", "policy_file must name a class derived from EvictionPolicy, got class Other in empty.py"),
        ("empty.py:x", "policy_file must name a class derived from EvictionPolicy, got x, a int in empty.py"),
        ("my.py:EvictionPolicy", "policy_file must name a complete policy, got my.py:EvictionPolicy without key"),
        ("my.py:Vague", "policy_file must name a complete policy, got my.py:Vague without key"),
        ("my.py:Deaf", "policy_file must set by_recency = False where it defines key, got my.py:Deaf"),
    ],
)
def test_what_is_no_policy_is_told_in_one_line(write: Callable[[str], str], text: str, message: str) -> None:
    write(
        "\nclass Vague(EvictionPolicy):\n    pass\n"
        "\nclass Deaf(Lru):\n    def key(self, block):\n        return -block\n"
    )
    Path("bad.py").write_text("x = 1\nclass = 2\n")
    Path("binary.py").write_bytes(b"\xff\x00\x01")
    Path("raises.py").write_text("x = 0\n1 / x\n")
    Path("leaves.py").write_text("raise SystemExit(3)\n")
    Path("empty.py").write_text("x = 1\nclass Other:\n    pass\n")
    with pytest.raises(InputError) as caught:
        load_policy(text)
    assert str(caught.value).startswith(message)


def test_an_heir_of_lru_that_says_so_is_asked(write: Callable[[str], str], trace: Trace) -> None:
    write("\nclass Heir(Lru):\n    by_recency = False\n    def key(self, block):\n        return -block\n")
    run(load_policy("my.py:Heir"), trace)


DECIDING = {
    "raises in key": (
        "    def key(self, block):\n        return {}[block]\n",
        "policy_file must decide without errors, got my.py, line 10: KeyError: ",
        "(my.py:Mine, key)",
    ),
    "raises in observe": (
        "    def observe(self, event, blocks, counts):\n        assert False\n",
        "policy_file must decide without errors, got my.py, line 10: AssertionError (my.py:Mine, observe)",
        "(my.py:Mine, observe)",
    ),
    "cannot be built": (
        "    def __init__(self, context):\n        raise RuntimeError('no')\n",
        "policy_file must decide without errors, got my.py, line 10: RuntimeError: no (my.py:Mine, __init__)",
        "(my.py:Mine, __init__)",
    ),
    "leaves in key": (
        "    def key(self, block):\n        raise SystemExit(3)\n",
        "policy_file must decide without errors, got my.py, line 10: SystemExit: 3 (my.py:Mine, key)",
        "(my.py:Mine, key)",
    ),
    "leaves when it is built": (
        "    def __init__(self, context):\n        raise SystemExit\n",
        "policy_file must decide without errors, got my.py, line 10: SystemExit (my.py:Mine, __init__)",
        "(my.py:Mine, __init__)",
    ),
    "an error in two lines": (
        "    def key(self, block):\n        raise OSError('one\\ntwo')\n",
        "policy_file must decide without errors, got my.py, line 10: OSError: one two (my.py:Mine, key)",
        "(my.py:Mine, key)",
    ),
    "a key that is missing": (
        "    def key(self, block):\n        return None\n",
        "policy_file must return keys that are numbers, got None",
        "(my.py:Mine, key)",
    ),
    "a key that is a pair": (
        "    def key(self, block):\n        return (0, block)\n",
        "policy_file must return keys that are numbers, got (0, ",
        "(my.py:Mine, key)",
    ),
    "a key that is nan": (
        "    def key(self, block):\n        return float('nan')\n",
        "policy_file must return keys that can be compared, got nan",
        "(my.py:Mine, key)",
    ),
    "another block": (
        "    def order(self, blocks, recency):\n        return [99, *blocks]\n",
        "policy_file must order the blocks that it was given, each once, got block 99, which is not one of them",
        "(my.py:Mine, order)",
    ),
    "a block left out": (
        "    def order(self, blocks, recency):\n        return sorted(blocks)[1:]\n",
        "policy_file must order the blocks that it was given, each once, got no block ",
        "(my.py:Mine, order)",
    ),
    "a block twice": (
        "    def order(self, blocks, recency):\n        return [*blocks, *blocks]\n",
        "policy_file must order the blocks that it was given, each once, got block ",
        "(my.py:Mine, order)",
    ),
    "no order": (
        "    def order(self, blocks, recency):\n        return None\n",
        "policy_file must decide without errors, got my.py: TypeError: 'NoneType' object is not iterable",
        "(my.py:Mine, order)",
    ),
    "preloads what is not": (
        "    def preload(self):\n        return [12]\n",
        "policy_file must preload blocks from 0 to 11, got 12",
        "(my.py:Mine, preload)",
    ),
    "preloads twice": (
        "    def preload(self):\n        return [1, 1]\n",
        "policy_file must preload a block once, got 1 twice",
        "(my.py:Mine, preload)",
    ),
    "preloads too much": (
        "    def preload(self):\n        return range(4)\n",
        "policy_file must preload at most 3 a pool, got 4",
        "(my.py:Mine, preload)",
    ),
}


@pytest.mark.parametrize("case", [*DECIDING])
def test_what_goes_wrong_while_deciding_is_told_in_one_line(
    write: Callable[[str], str], trace: Trace, case: str
) -> None:
    body, begin, end = DECIDING[case]
    told = refused(load_policy(write(body)), trace)
    assert told.removeprefix("mine: ").startswith(begin)  # before what a constructor refuses
    assert told.endswith(end)
    assert told.count("my.py:Mine") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("name = 5", "have a name that is text, in one line, got 5 in my.py:Mine"),
        ("name = []", "have a name that is text, in one line, got [] in my.py:Mine"),
        ("name = ' '", "have a name that is text, in one line, got ' ' in my.py:Mine"),
        ("name = 'a\\nb'", "have a name that is text, in one line, got 'a\\nb' in my.py:Mine"),
        ("needs = None", "have needs that are a set, got None in my.py:Mine"),
        ("needs = 'scores'", "have needs that are a set, got 'scores' in my.py:Mine"),
        ("needs = {'scores', 'luck'}", "need nothing but scores, future, calibration, got 'luck' in "),
        ("needs = {'lookahead'}", "need nothing but scores, future, calibration, got 'lookahead' in "),
        ("needs = {5, 'x'}", "need nothing but scores, future, calibration, got 'x' in my.py:Mine"),
        ("bypass = 1", "have True or False as bypass, got 1 in my.py:Mine"),
        ("misses_first = None", "have True or False as misses_first, got None in my.py:Mine"),
        ("by_recency = 'no'", "have True or False as by_recency, got 'no' in my.py:Mine"),
        ("defaults = None", "have defaults that map names to values, got None in my.py:Mine"),
        ("defaults = ['a']", "have defaults that map names to values, got ['a'] in my.py:Mine"),
        ("defaults = {1: 2}", "have defaults that map names to values, got {1: 2} in my.py:Mine"),
        ("defaults = {'a': None}", "have finite numbers, text, True or False as defaults, got a=None in my.py:Mine"),
        ("defaults = {'a': float('nan')}", "have finite numbers, text, True or False as defaults, got a=nan in "),
        ("defaults = {'a': 1, 'b': 1e999}", "have finite numbers, text, True or False as defaults, got b=inf in "),
    ],
)
def test_what_a_class_says_of_itself_is_checked_before_it_is_used(
    write: Callable[[str], str], line: str, message: str
) -> None:
    with pytest.raises(InputError) as caught:
        load_policy(write(f"    {line}\n"))
    assert str(caught.value).startswith(f"policy_file must {message}")


def test_what_a_class_may_say_of_itself(write: Callable[[str], str]) -> None:
    lines = ("needs = {'scores', 'future'}", "bypass = True", "defaults = {'a': 1, 'b': 0.5, 'c': 'x', 'd': True}")
    kind = load_policy(write("".join(f"    {line}\n" for line in lines)))
    assert (kind.needs, kind.bypass) == ({"scores", "future"}, True)


@pytest.mark.parametrize("number", ["np.float32(block)", "np.int64(block)", "Fraction(block, 3)", "block > 2"])
def test_keys_may_be_numbers_of_any_kind(write: Callable[[str], str], trace: Trace, number: str) -> None:
    text = f"    def key(self, block):\n        from fractions import Fraction\n        return {number}\n"
    write(text)
    Path("my.py").write_text("import numpy as np\n" + Path("my.py").read_text())
    assert len(run(load_policy("my.py:Mine"), trace).log)


def test_what_a_policy_does_to_its_lists_stays_with_it(write: Callable[[str], str], trace: Trace) -> None:
    spoils = RECENT + (
        "    def observe(self, event, blocks, counts):\n"
        "        self.last.update(dict.fromkeys(blocks, event))\n"
        "        blocks.clear()\n"
        "    def order(self, blocks, recency):\n"
        "        found = [float(block) for block in super().order(blocks, recency)]\n"
        "        blocks.clear()\n"
        "        recency[:] = reversed(recency)\n"
        "        return found\n"
    )
    clean = run(load_policy(write(RECENT)), trace)
    assert np.array_equal(run(load_policy(write(spoils)), trace).log, clean.log)


def test_a_preload_that_fits_is_taken(write: Callable[[str], str], trace: Trace) -> None:
    found = run(load_policy(write("    def preload(self):\n        return [0, 1, 6]\n")), trace)
    assert found.static_blocks == 3
    assert found.static_load_bytes == 30


def test_an_error_of_the_input_keeps_its_words(write: Callable[[str], str], trace: Trace) -> None:
    body = (
        "    def key(self, block):\n"
        "        from traces.errors import InputError\n"
        "        raise InputError('window must be at least 1, got 0')\n"
    )
    assert refused(load_policy(write(body)), trace) == "window must be at least 1, got 0 (my.py:Mine, key)"
