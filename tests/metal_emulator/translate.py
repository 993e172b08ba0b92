"""Rewrites MSL to C++ that clang compiles together with the headers in shim/.

Only what C++ cannot express is touched, token by token, so that every other mistake in a kernel stays a mistake:
threadgroup variables, vector constructors, unsuffixed literals (float in MSL) and attributes. Lines keep their numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tests.metal_emulator.capture import CapturedKernel, Parameter
from tests.metal_emulator.errors import EmulationError
from tests.metal_emulator.findings import header_file, source_file
from tests.metal_emulator.tokens import (
    CLOSING,
    OPENING,
    Token,
    after_template_arguments,
    joined,
    next_significant,
    tokenize,
)

SCALARS = "half bfloat float char uchar short ushort int uint long ulong bool".split()
VECTOR_NAME = re.compile(rf"({'|'.join(SCALARS)})([234])")
UNSUFFIXED_FLOAT = re.compile(r"(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+")
METAL_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*<metal_\w+>[^\n]*$", re.M)
ATOMICS = {"atomic", "atomic_int", "atomic_uint", "atomic_float", "atomic_bool", "atomic_ulong"}
KEPT_ATTRIBUTES = {"maybe_unused", "nodiscard", "likely", "unlikely", "fallthrough"}

# Thread attributes: (member of MslThread, number of components).
POSITIONS = {
    "thread_position_in_grid": "position_in_grid",
    "thread_position_in_threadgroup": "position_in_threadgroup",
    "threadgroup_position_in_grid": "threadgroup_position",
    "threads_per_threadgroup": "threads_per_threadgroup",
    "dispatch_threads_per_threadgroup": "dispatch_threads_per_threadgroup",
    "threads_per_grid": "threads_per_grid",
    "grid_size": "threads_per_grid",
    "threadgroups_per_grid": "threadgroups_per_grid",
}
INDICES = {
    "thread_index_in_threadgroup": "here->index",
    "thread_index_in_simdgroup": "here->lane",
    "simdgroup_index_in_threadgroup": "here->simdgroup",
    "simdgroups_per_threadgroup": "here->simdgroups",
    "dispatch_simdgroups_per_threadgroup": "here->simdgroups",
    "threads_per_simdgroup": "32u",
    "thread_execution_width": "32u",
    "thread_index_in_quadgroup": "here->lane % 4",
    "quadgroup_index_in_threadgroup": "here->index / 4",
    "quadgroups_per_threadgroup": "here->simdgroups * 8",
}


@dataclass(frozen=True)
class Declaration:
    """`threadgroup <type> <name><dimensions>` for one variable."""

    type: str
    name: str
    dimensions: str


def translate(kernel: CapturedKernel, *, address_spaces: bool = False) -> str:
    """C++ for a captured kernel: its header, function and an entry point that calls it with its template arguments.

    Args:
        kernel: what MLX generated.
        address_spaces: for the type check only: threadgroup variables become variables of that address space.
    """
    source = kernel.source[: kernel.body[1]] + "\n}\n"
    header, rest = source[: kernel.header_length], source[kernel.header_length :]
    body_start = kernel.body[0] - kernel.header_length
    text = f'#line 1 "{header_file(kernel.name)}"\n{header}'
    if not header or header.endswith(
        "\n"
    ):  # else MLX appends the signature to the header's last line, and so does this
        text += f'#line 1 "{kernel.name}.signature.metal"\n'
    text += f'{rest[:body_start]}#line 1 "{source_file(kernel.name)}"\n{rest[body_start:]}'
    return rewrite(text, address_spaces) + entry_point(kernel)


def entry_point(kernel: CapturedKernel) -> str:
    """The function that the runtime calls for each thread. Its own reads are the runtime's, so they are not watched."""
    arguments = [_argument(parameter, number) for number, parameter in enumerate(kernel.parameters)]
    call = f"{kernel.instance}({', '.join(arguments)})"
    return (
        f'\n#line 1 "{kernel.name}.entry.metal"\n'
        'extern "C" __attribute__((no_sanitize("thread"))) '
        f"void msl_entry(void** buffers, const MslThread* thread_) {{ {call}; }}\n"
    ).replace("here->", "thread_->")


def rewrite(text: str, address_spaces: bool = False) -> str:
    """MSL → C++, token by token."""
    return _Rewriter(METAL_INCLUDE.sub("", text), address_spaces).run()


def threadgroup_declarations(tokens: list[Token], index: int) -> tuple[list[Declaration], int, bool] | None:
    """The variables declared by the `threadgroup` at `index`.

    Returns:
        Declarations, the index of the `;` that ends them and whether one has an initializer; None if the keyword belongs
        to a pointer, a reference, a parameter or a template argument.
    """
    parts: list[list[Token]] = [[]]
    depth, initialized, in_initializer = 0, False, False
    for i in range(index + 1, len(tokens)):
        token = tokens[i]
        if depth == 0 and token.text == ";":
            break
        if depth == 0 and token.text == ",":
            parts.append([])
            in_initializer = False
            continue
        if depth == 0 and token.text == "=":
            initialized = in_initializer = True
        if depth == 0 and not in_initializer and token.text in ("*", "&", "(", ")", ">", "{", "}"):
            return None
        depth += (token.text in OPENING or token.text == "<") - (token.text in CLOSING or token.text == ">")
        if not in_initializer and token.kind != "comment":
            parts[-1].append(token)
    else:
        return None
    first = _split_declarator(parts[0])
    if first is None:
        return None
    element, name, dimensions = first
    found = [Declaration(element, name, dimensions)]
    for part in parts[1:]:
        more = _split_declarator(part)
        if more is None:
            return None
        found.append(Declaration(element, more[1], more[2]))
    return found, i, initialized


class _Rewriter:
    """One pass over the tokens; each method looks at the token at `index` and may consume more than one."""

    def __init__(self, text: str, address_spaces: bool):
        self.tokens = tokenize(text)
        self.address_spaces = address_spaces
        self.vector_aliases = _vector_aliases(text)
        self.classes = ATOMICS | set(re.findall(r"\b(?:struct|class)\s+(\w+)", text))
        self.index = 0
        self.variables = 0

    def run(self) -> str:
        out = []
        while self.index < len(self.tokens):
            token = self.tokens[self.index]
            replaced = None
            if token.kind == "name":
                replaced = self.threadgroup_variable(token) or self.vector_constructor(token)
            elif token.kind == "number" and UNSUFFIXED_FLOAT.fullmatch(token.text):
                replaced = token.text + "f"
                self.index += 1
            elif token.text == "[":
                replaced = self.attribute()
            if replaced is None:
                replaced = token.text
                self.index += 1
            out.append(replaced)
        return "".join(out)

    def threadgroup_variable(self, token: Token) -> str | None:
        if token.text != "threadgroup":
            return None
        found = threadgroup_declarations(self.tokens, self.index)
        if found is None:
            return None
        declarations, end, _ = found
        lines = joined(self.tokens[self.index : end]).count("\n")
        self.index = end
        statements = []
        for declaration in declarations:
            self.variables += 1
            statements.append(self._variable_statement(declaration))
        return "; ".join(statements) + "\n" * lines

    def _variable_statement(self, declared: Declaration) -> str:
        element, name, dimensions = declared.type, declared.name, declared.dimensions
        if self.address_spaces:
            # A class has no constructor for another address space: its variable is only declared.
            storage = "extern" if self.classes & set(re.findall(r"\w+", element)) else "static"
            return f"{storage} threadgroup {element} {name}{dimensions}"
        storage = f'::msl::threadgroup_variable<{element} {dimensions}>("{name}", {self.variables})'
        return f"{element} (&{name}){dimensions} = {storage}"

    def vector_constructor(self, token: Token) -> str | None:
        """`float4(`, `vec<T, 4>(` and `Alias(` become calls; anything else is left alone."""
        after = next_significant(self.tokens, self.index + 1)
        if after >= len(self.tokens):
            return None
        named = VECTOR_NAME.fullmatch(token.text)
        if named and self.tokens[after].text == "(":
            self.index += 1
            return f"msl_make_vec<{named.group(1)}, {named.group(2)}>"
        if token.text in self.vector_aliases and self.tokens[after].text == "(":
            self.index += 1
            return f"msl_make<{token.text}>"
        if token.text == "vec" and self.tokens[after].text == "<":
            end = after_template_arguments(self.tokens, after)
            if end is not None and self.tokens[next_significant(self.tokens, end)].text == "(":
                self.index += 1
                return "msl_make_vec"
        return None

    def attribute(self) -> str | None:
        """`[[buffer(0)]]` and the like are dropped; C++ keeps its own."""
        if self.index + 1 >= len(self.tokens) or self.tokens[self.index + 1].text != "[":
            return None
        depth = 0
        for i in range(self.index, len(self.tokens)):
            depth += (self.tokens[i].text == "[") - (self.tokens[i].text == "]")
            if depth == 0:
                break
        inside = joined(self.tokens[self.index + 2 : i - 1])
        if not re.fullmatch(r"\s*\w+\s*(\(.*\))?\s*", inside, re.S) or inside.strip() in KEPT_ATTRIBUTES:
            return None
        self.index = i + 1
        return ""


def _split_declarator(tokens: Iterable[Token]) -> tuple[str, str, str] | None:
    """(type, name, dimensions) of `float tile[4][8]`; the type is empty in the second and later declarators."""
    text = " ".join(joined(list(tokens)).split())
    match = re.fullmatch(r"(?P<type>.*?)\s*\b(?P<name>[A-Za-z_]\w*)\s*(?P<dimensions>(\[.*\])?)", text)
    return match.group("type", "name", "dimensions") if match else None


def _vector_aliases(text: str) -> set[str]:
    """Names that the source gives to vector types."""
    vector = rf"(?:metal::)?(?:vec<[^;]*>|(?:{'|'.join(SCALARS)})[234])"
    using = re.findall(rf"\busing\s+(\w+)\s*=\s*{vector}\s*;", text)
    typedef = re.findall(rf"\btypedef\s+{vector}\s+(\w+)\s*;", text)
    return set(using) | set(typedef)


def _argument(parameter: Parameter, number: int) -> str:
    """What the entry point passes for a parameter."""
    if parameter.attribute in POSITIONS:
        member = POSITIONS[parameter.attribute]
        return "msl_make_vec<uint, 3>({})".format(", ".join(f"here->{member}[{axis}]" for axis in range(3)))
    if parameter.attribute in INDICES:
        return INDICES[parameter.attribute]
    if parameter.attribute == "grid_origin":
        return "msl_make_vec<uint, 3>(0u)"
    if parameter.attribute:
        raise EmulationError(f"the emulator does not know the thread attribute {parameter.attribute}")
    const = "" if parameter.writable else "const "
    pointer = f"({const}{parameter.space} {parameter.type}*)(uintptr_t)buffers[{number}]"
    return f"*{pointer}" if parameter.by_reference else pointer
