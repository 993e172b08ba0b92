"""Finds sums kept in half or bfloat over a loop, in the text of LLVM's IR.

There the types are certain and macros, aliases and templates are gone. A sum in an array that stays in memory is not seen.
"""

from __future__ import annotations

import re

# Loops stay loops, so that a sum is one addition whose result comes back to it through a phi.
FLAGS = ["-O1", "-fno-unroll-loops", "-fno-vectorize", "-fno-slp-vectorize", "-gline-tables-only"]
HALF = r"(?:<\d+ x )?(?:half|bfloat)>?"


def find(ir: str) -> list[tuple[str, int]]:
    """(file, line) of every addition in half or bfloat whose result comes back to it in the next turn of a loop."""
    places = []
    locations, files = _debug_locations(ir), _debug_files(ir)
    for function in re.split(r"^define ", ir, flags=re.M)[1:]:
        values = {m.group(1): m.group(2) for m in re.finditer(r"^  (%[\w.\"]+) = (.*)$", function, re.M)}
        for name, code in values.items():
            if _is_half_sum(code) and _returns_to(name, code, values):
                places.append(_location(code, locations, files))
    return sorted(set(places) - {("", 0)})


def _is_half_sum(code: str) -> bool:
    """An addition in half, or a conversion back to half of one that was made in float (bfloat has no arithmetic of its own)."""
    return bool(
        re.match(rf"(?:fadd|fsub)(?: \w+)* {HALF} ", code)
        or re.search(r"@llvm\.(?:fma|fmuladd)\.(?:v\d+)?(?:f16|bf16)\(", code)
        or re.match(rf"fptrunc (?:\w+ )*(?:<\d+ x )?float>? \S+ to {HALF}", code)
    )


def _returns_to(name: str, code: str, values: dict[str, str]) -> bool:
    """Whether the value is an operand of its own addition, through phis and conversions to float."""
    operands = _operands(code)
    if code.startswith("fptrunc"):  # the sum itself is in float
        inner = values.get(operands[0], "") if operands else ""
        if not re.search(r"^(?:fadd|fsub) |@llvm\.(?:fma|fmuladd)\.", inner):
            return False
        operands = [_operands(values[o])[0] for o in _operands(inner) if values.get(o, "").startswith("fpext")]
    return any(
        values.get(operand, "").startswith("phi ") and name in _phi_sources(operand, values) for operand in operands
    )


def _phi_sources(name: str, values: dict[str, str]) -> set[str]:
    """All values that reach a phi through other phis and selects."""
    seen, waiting = set(), [name]
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        if values.get(value, "").startswith(("phi ", "select ")):
            waiting += _operands(values[value])
    return seen


def _operands(code: str) -> list[str]:
    return re.findall(r"%[\w.\"]+(?=[,)\s]|$)", re.sub(r", !dbg.*", "", code).replace("],", " ],"))


def _debug_locations(ir: str) -> dict[str, dict[str, str]]:
    """!dbg number → its fields."""
    found = {}
    for match in re.finditer(
        r"^(!\d+) = (?:distinct )?!DI(?:Location|Subprogram|LexicalBlockFile|LexicalBlock)\((.*)\)$", ir, re.M
    ):
        found[match.group(1)] = dict(re.findall(r"(\w+): (!\d+|\d+)", match.group(2)))
    return found


def _debug_files(ir: str) -> dict[str, str]:
    return dict(re.findall(r'^(!\d+) = !DIFile\(filename: "([^"]*)"', ir, re.M))


def _location(code: str, locations: dict, files: dict) -> tuple[str, int]:
    """The first place in a kernel's own text from an instruction outward through what it was inlined into."""
    attached = re.search(r"!dbg (!\d+)", code)
    number = attached.group(1) if attached else None
    while number in locations:
        location = locations[number]
        scope = location.get("scope")
        while scope in locations and "file" not in locations[scope]:
            scope = locations[scope].get("scope")
        file = files.get(locations.get(scope, {}).get("file", ""), "").rsplit("/", 1)[-1]
        if file.endswith(".metal"):
            return file, int(location.get("line", 0))
        number = location.get("inlinedAt")
    return "", 0
