"""Values that people write into files and recipes: types and bounds, checked before use.

Fields of recipes and arguments of models carry their bounds in their annotations; pydantic checks
them strictly ("128" is no number, 1.0 no count, NaN nothing at all).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, create_model

from .errors import InputError

Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
CountOrNone = Annotated[int, Field(ge=0, le=1_000_000_000)]  # 0: off
Channels = Annotated[int, Field(ge=1, le=65_536)]
Frames = Annotated[int, Field(ge=1, le=1024)]  # of a clip
Side = Annotated[int, Field(ge=1, le=16_384)]  # of a picture, pixels
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, le=1e38, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e38, allow_inf_nan=False)]
Width = Annotated[float, Field(gt=0, le=16, allow_inf_nan=False)]  # factor on channels
Strides = Annotated[Sequence[Annotated[int, Field(ge=1, le=1024)]], Field(max_length=16)]
Heads = Annotated[
    Sequence[Annotated[int, Field(ge=1, le=1024)]], Field(min_length=1, max_length=16)
]
Reductions = Annotated[
    Sequence[Annotated[int, Field(ge=1, le=64)]], Field(min_length=1, max_length=16)
]

MOST_PIXELS = 2**25  # an 8K frame has fewer


def _not_too_many(size: Sequence[int]) -> Sequence[int]:
    if size[0] * size[1] > MOST_PIXELS:
        raise ValueError(f"at most {MOST_PIXELS} pixels")
    return size


_two = (Field(min_length=2, max_length=2), AfterValidator(_not_too_many))
Size = Annotated[Sequence[Side], _two[0], _two[1]]  # (height, width)
SizeList = Annotated[
    list[Side], _two[0], _two[1]
]  # the same for OmegaConf, which knows no Sequence

# Of torchvision's builders: numbers and switches, nothing that decides how many layers there are.
_Number = Annotated[float, Field(ge=0, le=100_000, allow_inf_nan=False)]
_Switches = Annotated[list[bool], Field(max_length=16)]
BackboneOptions = Annotated[
    Mapping[str, bool | Annotated[int, Field(ge=0, le=100_000)] | _Number | str | _Switches | None],
    Field(max_length=32),
]

Backend = Literal["cpu", "cuda", "triton", "reference"]

CONFIGURATION = ConfigDict(strict=True, extra="forbid", protected_namespaces=())


def check_plain(kind: Any, values: Mapping[str, Any], source: str) -> None:
    """Plain dictionaries and lists against a dataclass whose fields carry their bounds.

    Raises:
        InputError: `source`, then the key, its value and what is allowed, of the first that is not.
    """
    try:  # from JSON: dataclasses within would pass unchecked otherwise
        text = json.dumps(values)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{source}: {error}") from None
    try:
        _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        raise InputError(f"{source}: {sentence(error)}") from None


def check_arguments(cls: type, values: Mapping[str, Any], source: str) -> None:
    """Arguments that are given, against the annotations of the `__init__` of `cls`.

    Raises:
        InputError: `source`, put before the argument, its value and what is allowed.
    """
    try:
        _arguments(cls).model_validate(dict(values), strict=True)
    except ValidationError as error:
        raise InputError(f"{source}{sentence(error)}") from None


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


@functools.cache
def _arguments(cls: Any) -> Any:
    hints = get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
    hints.pop("return", None)
    # Not given is not validated: None as a default is no value.
    fields: dict[str, Any] = {name: (kind, None) for name, kind in hints.items()}
    return create_model(cls.__name__, __config__=CONFIGURATION, **fields)


def sentence(error: ValidationError) -> str:
    """`data.sizes[0] is [224], it has to ...`, of the first of its complaints."""
    first = error.errors(include_url=False, include_context=False)[0]
    key = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}"
        for part in first["loc"]
        # A union also names which of its kinds it tried.
        if isinstance(part, int) or part.isidentifier()
    )
    key = key.removeprefix(".") or "it"
    value = repr(first["input"])
    value = value if len(value) <= 60 else value[:57] + "..."
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{key} is not one of its keys"
    message = message.replace("Input should be", "it has to be")
    message = message.replace("List should have", "it has to have")
    return f"{key} is {value}, {message[:1].lower() + message[1:]}"
