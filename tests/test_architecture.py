"""Who may import whom. Every rule names the file that breaks it."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("traces", "sim", "real", "analysis")
FORBIDDEN = {
    "traces": {"sim", "real", "analysis", "moetwin", "simpy", "torch", "transformers", "matplotlib"},
    "sim": {"real", "analysis", "moetwin", "torch", "transformers", "matplotlib"},
    "real": {"analysis", "moetwin", "simpy"},
    "analysis": {"real", "moetwin", "torch", "transformers", "simpy"},
}
"""What no file of a room imports, anywhere in it, functions included."""

HEAVY = {
    "traces": {"simpy", "torch", "transformers"},
    "sim": {"torch", "transformers"},
    "analysis": {"simpy", "torch", "transformers"},
}
"""What importing a module of a room must not bring in, through whatever chain of imports."""

SIMPY_IMPORTERS = {"sim.engine"}


def name_of(path: Path) -> str:
    """Dotted name of the module in ``path``, which is relative to the root."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    """Every module of the project by its dotted name."""
    found = [path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    return {name_of(path): path for path in sorted([*found, Path("moetwin.py")])}


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse((ROOT / modules()[name]).read_text(encoding="utf-8"))


def imported_by(name: str, nodes: Iterator[ast.AST]) -> set[str]:
    """Dotted names that the import statements among ``nodes`` of module ``name`` ask for."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = absolute(name, node)
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def absolute(name: str, node: ast.ImportFrom) -> str:
    """The module that a ``from`` import reads, with relative dots resolved."""
    if not node.level:
        return node.module or ""
    is_package = modules()[name].name == "__init__.py"
    parents = name.split(".")[: len(name.split(".")) - node.level + is_package]
    return ".".join([*parents, *([node.module] if node.module else [])])


def eager(tree: ast.AST) -> Iterator[ast.AST]:
    """Statements that run when a module is imported: neither function bodies nor ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from eager(node)


@cache
def loads(name: str) -> frozenset[str]:
    """Modules and top-level packages that importing ``name`` asks for directly, its own packages included."""
    asked = imported_by(name, eager(tree_of(name)))
    parts = name.split(".")
    asked |= {".".join(parts[:end]) for end in range(1, len(parts))}
    for target in list(asked):
        pieces = target.split(".")
        asked |= {".".join(pieces[:end]) for end in range(1, len(pieces))}
    return frozenset(asked)


def chains(start: str) -> dict[str, str]:
    """Everything that importing ``start`` brings in, each with the chain of modules that leads to it."""
    reached, queue = {start: start}, [start]
    while queue:
        name = queue.pop(0)
        if name not in modules():
            continue
        for target in sorted(loads(name) - reached.keys()):
            reached[target] = f"{reached[name]} -> {target}"
            queue.append(target)
    return reached


def files_of(room: str) -> list[str]:
    return [name for name in modules() if name.split(".")[0] == room]


@pytest.mark.parametrize("room", ROOMS)
def test_no_file_imports_what_its_room_must_not(room: str) -> None:
    wrong = [
        f"{modules()[name]} imports {target}"
        for name in files_of(room)
        for target in sorted({target.split(".")[0] for target in imported_by(name, ast.walk(tree_of(name)))})
        if target in FORBIDDEN[room]
    ]
    assert wrong == []


@pytest.mark.parametrize("room", sorted(HEAVY))
def test_importing_a_room_stays_light(room: str) -> None:
    wrong = [
        f"{modules()[name]}: {chain}"
        for name in files_of(room)
        for target, chain in chains(name).items()
        if target in HEAVY[room]
    ]
    assert wrong == []


def test_policies_import_numpy_and_the_standard_library_alone() -> None:
    allowed = {"numpy", *sys.stdlib_module_names}
    wrong = [
        f"{modules()[name]} imports {target}"
        for name in files_of("sim")
        if name.startswith("sim.policies")
        for target in sorted(imported_by(name, ast.walk(tree_of(name))))
        if target.split(".")[0] not in allowed and target != "sim" and not target.startswith("sim.policies")
    ]
    assert wrong == []


def test_the_simulated_clock_has_one_owner() -> None:
    users = {name for name in modules() if "simpy" in imported_by(name, ast.walk(tree_of(name)))}
    assert users <= SIMPY_IMPORTERS


def test_the_command_line_imports_no_room_at_its_top() -> None:
    assert [name for name in loads("moetwin") if name.split(".")[0] in ROOMS] == []


def test_every_folder_with_code_is_a_package() -> None:
    folders = {path.parent for path in modules().values()} - {Path(".")}
    assert [str(folder) for folder in sorted(folders) if not (ROOT / folder / "__init__.py").exists()] == []


def packages_with_exports() -> list[str]:
    return [name for name, path in modules().items() if path.name == "__init__.py" and exports(name) is not None]


def exports(name: str) -> list[str] | None:
    """The literal ``__all__`` of a module, None when it has none."""
    for node in tree_of(name).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            value: list[str] = ast.literal_eval(node.value)
            return value
    return None


@pytest.mark.parametrize("name", packages_with_exports())
def test_exports_are_honest(name: str) -> None:
    listed, module = exports(name), importlib.import_module(name)
    assert listed is not None
    assert len(listed) == len(set(listed)), f"{modules()[name]} lists a name twice"
    assert [entry for entry in listed if not hasattr(module, entry)] == []


@pytest.mark.parametrize("room", [room for room in packages_with_exports() if room in ROOMS])
def test_a_room_exports_what_its_front_door_imports(room: str) -> None:
    imported = {
        alias.asname or alias.name
        for node in tree_of(room).body
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
    }
    assert {name for name in imported if not name.startswith("_")} <= set(exports(room) or [])


# The rules above can fail: each helper is shown a case that it has to notice.


def test_relative_imports_are_resolved() -> None:
    (node,) = ast.parse("from ..errors import InputError").body
    assert isinstance(node, ast.ImportFrom)
    assert absolute("sim.spec.catalogue", node) == "sim.errors"


def test_eager_statements_leave_out_functions_and_type_checking() -> None:
    source = """
import a
class C:
    import b
    def f(self):
        import c
try:
    import d
except ImportError:
    pass
if TYPE_CHECKING:
    import e
"""
    assert imported_by("moetwin", eager(ast.parse(source))) == {"a", "b", "d"}


def test_a_chain_names_every_module_on_the_way() -> None:
    assert chains("sim.spec.catalogue")["difflib"].endswith("traces.errors -> difflib")
