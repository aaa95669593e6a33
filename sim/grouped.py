"""Groups of command-line options: a dataclass whose fields are options of every command that takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from inspect import Parameter, signature
from typing import Any, get_type_hints


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Gives ``command`` an option for each field of the dataclasses that it takes, and hands it these, built.

    A field is annotated as an option is, and its default is the option's. All options are keywords.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

    def run(**given: Any) -> None:
        built = {
            name: group(**{one.name: given.pop(one.name) for one in fields(group)}) for name, group in groups.items()
        }
        command(**given, **built)

    parameters: list[Parameter] = []
    for one in signature(command).parameters.values():
        own = one.replace(annotation=hints[one.name], kind=Parameter.KEYWORD_ONLY)
        parameters += _options_of(groups[one.name]) if one.name in groups else [own]
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def _options_of(group: Any) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(one.name, Parameter.KEYWORD_ONLY, default=_default_of(one), annotation=hints[one.name])
        for one in fields(group)
    ]


def _default_of(field: Field[Any]) -> Any:
    return Parameter.empty if field.default is MISSING else field.default
