"""A fold plan as JSON and back: a versioned form, checked field by field."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from lncompile.plans.entries import PlanError

#: What a file says that holds a plan, and the version of its form. A reader refuses a newer one.
FORMAT, VERSION = "lncompile fold plan", 1

Record = TypeVar("Record")


def to_dict(plan: Any) -> dict[str, Any]:
    """Return a plan as plain dicts, lists, strings and numbers."""
    return {"format": FORMAT, "version": VERSION, **_plain(plan)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def from_dict(kind: type[Record], values: Any) -> Record:
    """Make a plan of plain dicts, lists, strings and numbers.

    Args:
        kind: the class of plans.
        values: what :func:`to_dict` returned.

    Raises:
        PlanError: where it is something else.
    """
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        raise PlanError("this is not a fold plan")
    version = values.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise PlanError(f"this plan has version {version}, and this lncompile reads version {VERSION}")
    fields = {key: value for key, value in values.items() if key not in ("format", "version")}
    plan: Record = _read(kind, fields, "the plan")
    return plan


def _read(kind: Any, value: Any, where: str) -> Any:
    """A value as a type says it."""
    if dataclasses.is_dataclass(kind):
        return _read_record(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        fitting = [alternative for alternative in arguments if _may_be(alternative, value)]
        return _read(fitting[0], value, where) if fitting else _refuse(kind, value, where)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            return _refuse(kind, value, where)
        return tuple(_read(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            return _refuse(kind, value, where)
        read_key = int if arguments[0] is int else str
        try:
            return {read_key(key): _read(arguments[1], item, f"{where}[{key!r}]") for key, item in value.items()}
        except ValueError as error:
            raise PlanError(str(error)) from error
    if not _may_be(kind, value):
        return _refuse(kind, value, where)
    return None if kind is type(None) else kind(value)


def _read_record(kind: Any, value: Any, where: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(value, Mapping):
        return _refuse(kind, value, where)
    unknown = sorted(set(map(str, value)) - set(fields))
    missing = sorted(
        name
        for name, field in fields.items()
        if name not in value and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    )
    if unknown or missing:
        raise PlanError(f"{where} has no {', '.join(missing)}" if missing else f"{where} has {', '.join(unknown)}")
    types_of_fields = get_type_hints(kind)
    return kind(**{name: _read(types_of_fields[name], item, f"{where}.{name}") for name, item in value.items()})


def _may_be(kind: Any, value: Any) -> bool:
    """Whether a plain value can be one of a plain type."""
    if kind is type(None):
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (int, str, bool):
        return type(value) is kind
    return True


def _refuse(kind: Any, value: Any, where: str) -> Any:
    raise PlanError(f"{where} is {value!r}, not a {getattr(kind, '__name__', kind)}")
