"""Signatures as users read them: without what the library's own type checks need."""

from typing import Any

import griffe

# What an annotation says of a layer, in neural_tangents' words.
ALIASES = {"Layer": "tuple[InitFn, ApplyFn, KernelFn]"}


def plain(annotation: Any) -> Any:
    """`annotation` with `T` in the place of `Validated[T]`, and aliases spelled out."""
    if isinstance(annotation, griffe.ExprName):
        return ALIASES.get(annotation.name, annotation)
    if isinstance(annotation, griffe.ExprSubscript) and str(annotation.left) == "Validated":
        return plain(annotation.slice)
    if isinstance(annotation, griffe.Expr):
        for name, value in vars(annotation).items():
            if isinstance(value, list):
                setattr(annotation, name, [plain(item) for item in value])
            elif isinstance(value, griffe.Expr) and name != "parent":
                setattr(annotation, name, plain(value))
    return annotation


class PlainSignatures(griffe.Extension):
    def on_function(self, *, func: griffe.Function, **_: Any) -> None:
        for signature in (func, *(func.overloads or ())):
            for parameter in signature.parameters:
                parameter.annotation = plain(parameter.annotation)
            signature.returns = plain(signature.returns)

    def on_attribute(self, *, attr: griffe.Attribute, **_: Any) -> None:
        attr.annotation = plain(attr.annotation)
