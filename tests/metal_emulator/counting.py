"""Arithmetic counters: a call of msl_count(flops, special) in every basic block that computes something.

Works on the text of LLVM's IR after optimization, so it counts what is left to execute. What counts as what is said in
counts.Counts. Functions of namespace msl::uncounted stand for hardware and are left alone.
"""

from __future__ import annotations

import re

UNCOUNTED = "9uncounted"  # the namespace in a mangled name
VECTOR = re.compile(r"<(\d+) x (?:float|half|bfloat|double)>")
ARITHMETIC = re.compile(r"= (?:tail |musttail |notail )?(fadd|fsub|fmul|fdiv|frem) ")
INTRINSIC = re.compile(r"@llvm\.(fma|fmuladd|minnum|maxnum|minimum|maximum)\.")
REDUCTION = re.compile(r"@llvm\.vector\.reduce\.f(?:add|mul|min|max)\.")
SPECIAL_INTRINSIC = re.compile(
    r"@llvm\.(sqrt|exp|exp2|exp10|log|log2|log10|sin|cos|tan|tanh|sinh|cosh|asin|acos|atan|pow|powi|ldexp)\."
)
SPECIAL_CALL = re.compile(
    r"call [^@]*@(?:acos|acosh|asin|asinh|atan|atan2|atanh|cos|cosh|exp|exp2|exp10|fmod|log|log2|log10|pow|sin|sinh|sqrt|tan|"
    r"tanh)f\(|@msl_rsqrt\("
)
COST = {"fma": 2, "fmuladd": 2}
LABEL = re.compile(r"^(?:[\w.$-]+|\"[^\"]*\"):")
DECLARATION = "declare void @msl_count(i32, i32)"


def instruction_cost(line: str) -> tuple[int, int]:
    """(flops, special operations) of one line of IR."""
    width = VECTOR.search(line)
    lanes = int(width.group(1)) if width else 1
    if ARITHMETIC.search(line):
        return lanes, 0
    intrinsic = INTRINSIC.search(line)
    if intrinsic:
        return lanes * COST.get(intrinsic.group(1), 1), 0
    if REDUCTION.search(line):
        return lanes - 1, 0
    if SPECIAL_INTRINSIC.search(line) or SPECIAL_CALL.search(line):
        return 0, lanes
    return 0, 0


def insert_counters(ir: str) -> str:
    """The IR with a counter call in front of every terminator of a block that computes."""
    out: list[str] = []
    block_start, flops, special, inside = 0, 0, 0, False

    def close_block() -> None:
        nonlocal flops, special
        if flops or special:
            out.insert(block_start, f"  call void @msl_count(i32 {flops}, i32 {special})")
        flops = special = 0

    for line in ir.splitlines():
        if line.startswith("define "):
            inside = UNCOUNTED not in line
            out.append(line)
            block_start = len(out)
            continue
        if inside and (line == "}" or LABEL.match(line)):
            close_block()
            out.append(line)
            block_start = len(out)
            inside = line != "}"
            continue
        out.append(line)
        if not inside:
            continue
        if re.search(r"= phi ", line):
            block_start = len(out)  # phis stay first
        more_flops, more_special = instruction_cost(line)
        flops += more_flops
        special += more_special
    text = "\n".join(out) + "\n"
    if DECLARATION.split("(")[0] not in ir:
        text += DECLARATION + "\n"
    return text
