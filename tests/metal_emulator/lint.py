"""Finds what MSL does not have although C++ does, in the tokens of a kernel's header and body.

clang cannot: to it these are valid. Rules are few and sure; what needs types is left to static_checks.py.
"""

from __future__ import annotations

import re

from tests.metal_emulator.capture import CapturedKernel
from tests.metal_emulator.findings import Finding
from tests.metal_emulator.tokens import Token, next_significant, previous_significant, tokenize
from tests.metal_emulator.translate import SCALARS, VECTOR_NAME, threadgroup_declarations

SPACES = {"device", "threadgroup", "thread", "constant"}
NOT_IN_MSL = {
    "double": "MSL has no double",
    "std": "MSL has no namespace std",
    "new": "MSL has no dynamic memory",
    "delete": "MSL has no dynamic memory",
    "throw": "MSL has no exceptions",
    "try": "MSL has no exceptions",
    "goto": "MSL has no goto",
    "virtual": "MSL has no virtual functions",
    "dynamic_cast": "MSL has no dynamic_cast",
    "typeid": "MSL has no typeid",
    "thread_local": "MSL has no thread_local",
    "asm": "MSL has no inline assembly",
}
FOREIGN_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*(<(?!metal_)[^>]*>)", re.M)
OTHER_TYPES = (
    "auto int8_t uint8_t int16_t uint16_t int32_t uint32_t int64_t uint64_t size_t float16_t bfloat16_t".split()
)
BEFORE_DECLARATION = set("(,;{}<>") | {"const", "static", "inline", ""}
AFTER_DECLARATOR = set("=;,)[")


def lint(kernel: CapturedKernel) -> list[Finding]:
    """Findings of kind "lint" for the user's part of the source: the header and the body."""
    header = kernel.source[: kernel.header_length]
    body = kernel.source[kernel.body[0] : kernel.body[1]]
    types = known_types(kernel.source)
    spaces = SPACES | set(re.findall(r"#\s*define\s+(\w+)\s+(?:device|threadgroup|thread|constant)\b", kernel.source))
    found = []
    for text, in_body in ((header, False), (body, True)):
        tokens = tokenize(text)
        for include in FOREIGN_INCLUDE.finditer(text):
            line = text.count("\n", 0, include.start()) + 1
            message = f"MSL has no header {include.group(1)}"
            found.append(_at(kernel, message, line, in_body))
        for index, token in enumerate(tokens):
            message = (
                _not_in_msl(token)
                or _pointer_without_space(tokens, index, types, spaces)
                or _threadgroup_variable(tokens, index, in_body)
                or _lambda(tokens, index)
            )
            if message:
                found.append(_at(kernel, message, text.count("\n", 0, token.start) + 1, in_body))
    return found


def _at(kernel: CapturedKernel, message: str, line: int, in_body: bool) -> Finding:
    place = "" if in_body else f" [line {line} of the header]"
    return Finding("lint", message + place, line if in_body else 0, kernel=kernel.name)


def known_types(source: str) -> set[str]:
    """Names that begin a declaration: MSL's types, template parameters, typedefs and structs of the source.

    Not auto: it takes the address space along with the type.
    """
    declared = re.findall(r"\b(?:typename|class|struct|using)\s+(\w+)", source)
    declared += re.findall(r"\btypedef\b[^;]*?(\w+)\s*;", source)
    vectors = [f"{scalar}{size}" for scalar in SCALARS for size in (2, 3, 4)]
    return {*SCALARS, *vectors, *OTHER_TYPES, *declared, "vec"} - {"metal"}


def _not_in_msl(token: Token) -> str | None:
    return NOT_IN_MSL.get(token.text) if token.kind == "name" else None


def _pointer_without_space(tokens: list[Token], index: int, types: set[str], spaces: set[str]) -> str | None:
    """`const T* p = ...`: a declaration of a pointer or reference that names no address space."""
    if tokens[index].text not in ("*", "&"):
        return None
    name = next_significant(tokens, index + 1)
    after = next_significant(tokens, name + 1)
    if after >= len(tokens) or tokens[name].kind != "name" or tokens[after].text not in AFTER_DECLARATOR:
        return None
    words, before = _type_before(tokens, index)
    bare = [word for word in words if word not in ("const", "volatile", "metal", "::")]
    if not bare or set(words) & spaces or before not in BEFORE_DECLARATION:
        return None
    if bare[0] not in types or not all(_part_of_type(word, types) for word in bare):
        return None
    return f"{' '.join(words)}{tokens[index].text} {tokens[name].text} names no address space"


def _type_before(tokens: list[Token], index: int) -> tuple[list[str], str]:
    """The words of the type that ends before `index`, and the token before it."""
    words: list[str] = []
    i = previous_significant(tokens, index - 1)
    if i >= 0 and tokens[i].text == ">":  # template arguments, as one word
        depth = 0
        while i >= 0:
            depth += (tokens[i].text == ">") - (tokens[i].text == "<")
            if depth == 0:
                break
            i -= 1
        i = previous_significant(tokens, i - 1)
    while i >= 0 and (tokens[i].kind == "name" or tokens[i].text == "::"):
        if tokens[i].text == "return":
            return words, "return"
        words.insert(0, tokens[i].text)
        i = previous_significant(tokens, i - 1)
    return words, tokens[i].text if i >= 0 else ""


def _part_of_type(word: str, types: set[str]) -> bool:
    return word in types or word in ("static", "inline", "unsigned", "signed") or bool(VECTOR_NAME.fullmatch(word))


def _threadgroup_variable(tokens: list[Token], index: int, in_body: bool) -> str | None:
    if tokens[index].text != "threadgroup":
        return None
    found = threadgroup_declarations(tokens, index)
    if found is None:
        return None
    if not in_body:
        return "a threadgroup variable outside the kernel's body"
    return "a threadgroup variable with an initializer: MSL leaves it uninitialized" if found[2] else None


def _lambda(tokens: list[Token], index: int) -> str | None:
    """`[&](` or `[=](` or `[](`."""
    if tokens[index].text != "[":
        return None
    inside = next_significant(tokens, index + 1)
    if inside < len(tokens) and tokens[inside].text in ("&", "="):
        inside = next_significant(tokens, inside + 1)
    after = next_significant(tokens, inside + 1)
    if after >= len(tokens) or tokens[inside].text != "]" or tokens[after].text not in ("(", "{"):
        return None
    before = previous_significant(tokens, index - 1)
    if before >= 0 and (
        tokens[before].kind == "name" and tokens[before].text != "return" or tokens[before].text in ")]"
    ):
        return None  # an index, or a declared array
    return "MSL has no lambda expressions"
