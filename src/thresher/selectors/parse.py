"""Selectors as text, for command lines and run files: ``misa:active_heads=8,block_size=128,topk=512``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar, get_type_hints

from thresher.errors import ThresherError, require
from thresher.selectors.base import Selector
from thresher.selectors.dense import Dense
from thresher.selectors.dsa import DSA
from thresher.selectors.hisa import HISA
from thresher.selectors.misa import MISA
from thresher.selectors.misa_controls import MISARandom, MISAStatic
from thresher.selectors.misa_rerank import MISARerank
from thresher.selectors.oracle import Oracle
from thresher.selectors.random import Random
from thresher.selectors.shared import Shared
from thresher.selectors.window import Window

T = TypeVar("T")

SELECTORS: Mapping[str, type[Selector]] = MappingProxyType(
    {
        "dense": Dense,
        "dsa": DSA,
        "misa": MISA,
        "misa_rerank": MISARerank,
        "hisa": HISA,
        "window": Window,
        "random": Random,
        "oracle": Oracle,
        "shared": Shared,
        "misa_static": MISAStatic,
        "misa_random": MISARandom,
    }
)


def _parse_ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+"))


def _parse_bool(text: str) -> bool:
    return {"true": True, "false": False}[text]


# type of a field -> (how to read it, what to call it in an error)
READERS: Mapping[Any, tuple[Callable[[str], Any], str]] = MappingProxyType(
    {
        int: (int, "an int"),
        int | None: (int, "an int"),
        float: (float, "a number"),
        str: (str, "text"),
        bool: (_parse_bool, "true or false"),
        tuple[int, ...]: (_parse_ints, "ints joined by +, as in 1+5+7"),
    }
)


def parse(
    text: str, selectors: Mapping[str, type[Selector]] = SELECTORS, defaults: Mapping[str, object] = MappingProxyType({})
) -> Selector:
    """The selector that ``name:option=value,option=value`` describes.

    Args:
        text: a name of ``selectors``, then the options of its class that differ from their defaults. Tuples are joined by ``+``.
        selectors: names and their classes; pass ``{**SELECTORS, "mine": Mine}`` to add one.
        defaults: option -> value used where a class has that option and the text does not name it.

    Raises:
        ThresherError: an unknown name or option, a value of the wrong type, a missing option, or a value the class refuses.
    """
    return parse_named(text, selectors, "a selector", {}, defaults)


def parse_named(
    text: str, classes: Mapping[str, type[T]], what: str, given: Mapping[str, object], defaults: Mapping[str, object] = MappingProxyType({})
) -> T:
    """One of ``classes`` (frozen dataclasses) from ``name:option=value,...``; fields in ``given`` are the caller's to set."""
    name, colon, rest = (part.strip() for part in text.partition(":"))
    require(name in classes, f"{what} must be one of {', '.join(classes)}", repr(name), "write name or name:option=value,...")
    cls: Any = classes[name]
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name not in given}
    types = get_type_hints(cls)
    options = ", ".join(fields) or "none"
    require(not colon or rest != "", "options must follow the colon", repr(text), "drop the colon or write option=value")
    values: dict[str, Any] = {}
    for item in rest.split(",") if rest else []:
        option, equals, value = (part.strip() for part in item.partition("="))
        require(option in fields, f"options of {name} must be among: {options}", repr(option), "check the spelling")
        require(equals != "" and value != "", f"{option} must have a value", repr(item), f"write {option}=value")
        require(option not in values, f"{option} must be given once", repr(text), "remove one of them")
        values[option] = _read(option, value, types[option])
    values = {**{option: value for option, value in defaults.items() if option in fields}, **values}
    missing = [f.name for f in fields.values() if f.default is dataclasses.MISSING and f.name not in values]
    require(not missing, f"{name} needs {', '.join(missing)}", repr(text), f"write {name}:" + ",".join(f"{m}=..." for m in missing))
    made: T = cls(**values, **{option: value for option, value in given.items() if option in {f.name for f in dataclasses.fields(cls)}})
    return made


def to_text(selector: Selector, selectors: Mapping[str, type[Selector]] = SELECTORS) -> str:
    """The text that ``parse`` turns back into ``selector``, every option spelled out.

    Raises:
        ThresherError: its class has no name in ``selectors``.
    """
    names = [name for name, cls in selectors.items() if cls is type(selector)]
    do = "pass selectors={**SELECTORS, 'name': its class}"
    require(bool(names), "the selector's class must have a name", type(selector).__name__, do)
    options = [f"{f.name}={_write(getattr(selector, f.name))}" for f in dataclasses.fields(selector)]
    return names[0] + (":" + ",".join(options) if options else "")


def _read(option: str, value: str, kind: Any) -> Any:
    require(kind in READERS, f"{option} must be of a type that has a text form", kind, "build this selector in Python")
    reader, described = READERS[kind]
    try:
        return reader(value)
    except (ValueError, KeyError):
        raise ThresherError(f"{option} must be {described}; got {value!r}; correct the value") from None


def _write(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
