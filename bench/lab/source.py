"""The device functions of a kernel, and the lines that belong to each.

Compilers inline every device function into its kernel, and machine code keeps no more than the file
and the line that an instruction comes from.  The IR that Triton makes of a kernel first, and stores
with it, still has the functions apart: the lines of each, and the functions that it calls.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Line = tuple[str, int]
"""The path of a source file, and one of its lines."""

_FUNCTION = re.compile(r'  tt\.func \w+ @("[^"]+"|[\w.$-]+)\(')
_CALL = re.compile(r'\btt\.call @("[^"]+"|[\w.$-]+)\(')
_ALIAS = re.compile(r"(#loc\d*) = loc\((.*)\)$")
_PLACE = re.compile(r'"([^"]+)":(\d+):\d+')
_REFERENCE = re.compile(r"#loc\d*")


@dataclass(frozen=True, slots=True)
class Functions:
    """The device functions of a kernel, by the names that Triton gives their specialisations."""

    lines: Mapping[str, frozenset[Line]]
    calls: Mapping[str, frozenset[str]]

    def owners(self, names: Sequence[str]) -> dict[Line, str]:
        """The lines that serve exactly one of the functions ``names``, each with that function.

        They are its own lines and those of the functions that it calls, however deep.  A line of a
        function that serves several of them is left out: it does not say where it has been inlined.
        """
        roots = {name: {f for f in self.lines if _is_named(f, name)} for name in names}
        served = {name: self._reached(roots, name) for name in names}
        claims = Counter(line for lines in served.values() for line in lines)
        return {line: name for name, lines in served.items() for line in lines if claims[line] == 1}

    def _reached(self, roots: Mapping[str, set[str]], name: str) -> set[Line]:
        """The lines of a function and of all that it calls, up to the other roots."""
        others = set().union(*(of for other, of in roots.items() if other != name))
        reached: set[str] = set()
        pending = list(roots[name])
        while pending:
            function = pending.pop()
            if function not in reached and function not in others:
                reached.add(function)
                pending += self.calls[function]
        return {line for function in reached for line in self.lines[function]}


def _is_named(specialisation: str, name: str) -> bool:
    """Whether a name is that of a function: Triton calls f of the module m, specialised for an
    int32, m.f__i32."""
    return re.search(rf"(?:^|\.){re.escape(name)}(?:__|$)", specialisation) is not None


def read_functions(ir: str) -> Functions:
    """The functions of a kernel from its IR, ``asm["source"]`` of a compiled kernel."""
    text = ir.splitlines()
    places = _places(text)
    lines: dict[str, frozenset[Line]] = {}
    calls: dict[str, frozenset[str]] = {}
    for name, body in _bodies(text):
        found = [places[alias] for line in body for alias in _REFERENCE.findall(line)]
        lines[name] = frozenset(place for place in found if place is not None)
        calls[name] = frozenset(
            called.strip('"') for line in body for called in _CALL.findall(line)
        )
    return Functions(lines, calls)


def _bodies(text: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    name, body = "", list[str]()
    for line in text:
        if start := _FUNCTION.match(line):
            name, body = start.group(1).strip('"'), []
        body.append(line)
        if line.startswith("  } loc(") and name:
            yield name, body
            name = ""


def _places(text: Sequence[str]) -> dict[str, Line | None]:
    """The place of each location of the IR: some only name others, and some are unknown."""
    meanings = {alias.group(1): alias.group(2) for line in text if (alias := _ALIAS.match(line))}

    def place(meaning: str) -> Line | None:
        if found := _PLACE.search(meaning):
            return found.group(1), int(found.group(2))
        reference = _REFERENCE.search(meaning)
        return place(meanings[reference.group()]) if reference else None

    return {alias: place(meaning) for alias, meaning in meanings.items()}
