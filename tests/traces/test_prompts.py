"""Prompt files: what is read, what is refused, and the prompts that ship."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from traces import InputError
from traces.prompts import SHIPPED_PROMPTS, Prompt, digest, load_prompts


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_shipped_prompts_are_five_a_domain_of_the_promised_length() -> None:
    prompts = load_prompts(SHIPPED_PROMPTS)
    assert len(set(prompts)) == 30
    assert set(Counter(prompt.domain for prompt in prompts).values()) == {5}
    assert len({prompt.domain for prompt in prompts}) == 6
    for prompt in prompts:
        if prompt.domain == "python_code":
            assert 10 <= len(prompt.text.splitlines()) <= 20
        else:
            assert 40 <= len(prompt.text.split()) <= 120


def test_every_shipped_prompt_names_its_source() -> None:
    lines = SHIPPED_PROMPTS.read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line)["source"] for line in lines)


def test_json_lines(tmp_path: Path) -> None:
    lines = '{"domain": "a", "text": "one\u2028two", "source": "own"}\n\n{"domain": "b", "text": "three"}\r\n'
    path = written(tmp_path, "p.jsonl", lines)
    assert load_prompts(path) == [Prompt("a", "one\u2028two"), Prompt("b", "three")]


def test_plain_text_is_one_prompt(tmp_path: Path) -> None:
    path = written(tmp_path, "ode.txt", b"\xef\xbb\xbfO wild\nWest Wind\n\n")
    assert load_prompts(path) == [Prompt("ode", "O wild\nWest Wind")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "", "must hold a prompt, got an empty file"),
        ("p.jsonl", " \n\n", "must hold a prompt, got an empty file"),
        ("p.txt", b"caf\xe9", "must be UTF-8 text, got byte 0xe9 at offset 3"),
        ("p.txt", b"ELF\0\0", "must be text, got a zero byte at character 3"),
        ("p.jsonl", '{"domain": "a", "text": "b"}\n{"domain": ', "line 2: must be a JSON object, got '{\"domain\":'"),
        ("p.jsonl", '["a", "b"]', "line 1: must be a JSON object, got list"),
        ("p.jsonl", '{"domain": "a"}', "line 1: text must be a text that is not empty, got None"),
        ("p.jsonl", '{"domain": "", "text": "b"}', "line 1: domain must be a text that is not empty, got ''"),
        ("p.jsonl", '{"domain": "a", "text": 3}', "line 1: text must be a text that is not empty, got 3"),
        ("p.csv", "a,b", "prompts must be a .jsonl or a .txt file"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(InputError) as raised:
        load_prompts(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"prompts must be a readable file, got .*none.txt: No such file"):
        load_prompts(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(InputError, match="prompts must be a readable file"):
        load_prompts(tmp_path / "folder.txt")


def test_digest_depends_on_order_domain_and_text_only() -> None:
    first, second = Prompt("a", "bc"), Prompt("ab", "c")
    assert digest([first]) != digest([second])
    assert digest([first, second]) != digest([second, first])
    assert digest([Prompt("a", "bc")]) == digest(iter([first]))
