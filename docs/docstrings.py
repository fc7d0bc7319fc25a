"""Extension of griffe: the docstrings of akl_triton as mkdocstrings shows them.

Griffe reads the source, where the options of a function are `**options`: `akl_triton.options` gives
it their names and text when it is imported, and they are taken from there. The rest is a matter of
form: our headings are more than griffe knows, `name` in a docstring is a name of ours where there
is one, and the fields of a NamedTuple are described by comments.
"""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any

import griffe

MODULES = ("akl_triton", "akl_triton.integrations", "akl_triton.extras")
# Those of griffe; any other heading becomes a section with that title.
KNOWN = {"Args", "Raises", "Returns", "Yields"}
HEADING = re.compile(r"^(\w[\w. ]*):\n(?=    )", flags=re.MULTILINE)
NAME = re.compile(r"(?<![`\[])`([A-Za-z_][\w.]*)`(?!`)")
# An argument that is described as "> 0", which Markdown takes for a quotation.
QUOTED = re.compile(r"^(    [\w, ]+: )(>)", flags=re.MULTILINE)
COMMENT = re.compile(r"#\s+(.*)$")


class Docstrings(griffe.Extension):
    def __init__(self) -> None:
        mixin = "DistillationMixin"  # its module imports transformers
        self._names = {mixin: f"akl_triton.integrations.transformers.{mixin}"}
        for module in MODULES:
            for name in import_module(module).__all__:
                path = f"{module}.{name}"
                self._names |= {name: path, path: path}

    def on_object(self, *, obj: griffe.Object, loader: griffe.GriffeLoader, **_: Any) -> None:
        own: set[str] = set()
        if isinstance(obj, griffe.Function):
            if any("documented" in str(x.value) for x in obj.decorators):
                self._complete(obj)
            own = {x.name for x in obj.parameters}
        elif isinstance(obj, griffe.Class):
            if "dataclass" in obj.labels:
                self._show_defaults(obj)
            if any(str(base).endswith("NamedTuple") for base in obj.bases):
                self._describe_fields(obj)
            own = {x.name for x in obj.parameters}
        if obj.docstring is not None:
            obj.docstring.value = self.shown(obj.docstring.value, own)

    def shown(self, text: str, own: set[str]) -> str:
        """The text of a docstring, for griffe's parser and in Markdown. `own` are names of the
        object itself, its parameters."""
        text = HEADING.sub(_heading, text)
        text = re.sub(r"::$", ":", text, flags=re.MULTILINE)  # of a literal block
        text = QUOTED.sub(r"\1\\\2", text)

        def reference(match: re.Match[str]) -> str:
            path = None if match[1] in own else self._names.get(match[1])
            return match[0] if path is None else f"[`{match[1]}`][{path}]"

        return NAME.sub(reference, text)

    @staticmethod
    def _complete(function: griffe.Function) -> None:
        """Signature and docstring of a function, with its options."""
        completed = getattr(import_module(function.module.path), function.name)
        function.docstring = griffe.Docstring(inspect.getdoc(completed) or "", parent=function)
        function.overloads = []
        del function.parameters["options"]
        for name, parameter in inspect.signature(completed).parameters.items():
            if name not in function.parameters:
                function.parameters.add(
                    griffe.Parameter(
                        name,
                        annotation=_annotation(parameter),
                        kind=griffe.ParameterKind.keyword_only,
                        default=repr(parameter.default),
                    )
                )

    @staticmethod
    def _show_defaults(dataclass: griffe.Class) -> None:
        """The default of each field, which the source gives as `number(0.5, above=0.0)`."""
        signature = inspect.signature(getattr(import_module(dataclass.module.path), dataclass.name))
        for parameter in dataclass.parameters:
            default = signature.parameters.get(parameter.name)
            if default is not None and default.default is not default.empty:
                parameter.default = repr(default.default)

    @staticmethod
    def _describe_fields(named_tuple: griffe.Class) -> None:
        """The comment of each field as its docstring."""
        for field in named_tuple.attributes.values():
            comment = COMMENT.search(field.source)
            if comment is not None:
                field.docstring = griffe.Docstring(comment[1], parent=field)


def _heading(match: re.Match[str]) -> str:
    if match[1] in KNOWN:
        return match[0]
    return "Examples:\n" if match[1] == "Example" else f"Note: {match[1]}\n"


def _annotation(parameter: inspect.Parameter) -> str | None:
    if parameter.annotation is parameter.empty:
        return None
    shown = inspect.formatannotation(parameter.annotation)
    return re.sub(r"\b(?:torch\.(?=Tensor)|typing\.)", "", shown)
