"""Mode "as": checks that need no run. The kernel is type-checked with address spaces, its variables are checked to be set
before they are used, and its IR is searched for sums in half (half_sums.py).

Results are cached like builds.
"""

from __future__ import annotations

import json
import re
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tests.metal_emulator import half_sums
from tests.metal_emulator.capture import CapturedKernel
from tests.metal_emulator.compiler import HERE, cached, digest, kernel_flags, run_clang
from tests.metal_emulator.errors import EmulationError
from tests.metal_emulator.findings import Finding, header_file, source_file
from tests.metal_emulator.translate import translate

MESSAGE = re.compile(r"(?P<file>[^\s:]+):(?P<line>\d+):\d+: (?P<level>error|warning): (?P<text>.*)")
SPACE_WORDS = re.compile(r"\b(device|threadgroup|constant|address space|address_space)\b")
TO_BFLOAT = re.compile(r"implicit conversion .*: '[^']*'(?: \(aka '[^']*'\))? to '(?:__bf16|[^']*' \(aka '__bf16)'")
WARNINGS = ["-Wimplicit-float-conversion", "-Wuninitialized", "-Wsometimes-uninitialized"]
UNINITIALIZED = re.compile(r"variable '\w+' is (?:used )?uninitialized")


def static_findings(kernel: CapturedKernel) -> list[Finding]:
    """Address spaces, implicit conversions to bfloat, variables never set, sums in half; compile errors become findings."""
    checked, plain = translate(kernel, address_spaces=True), translate(kernel)
    key = digest(
        str(kernel_flags("as")), str(kernel_flags("run")), checked, plain, *rules(),
    )  # fmt: skip

    def make(target: Path) -> None:
        with ThreadPoolExecutor(2) as pool:
            types = pool.submit(type_findings, kernel, checked)
            sums = pool.submit(half_sum_findings, kernel, plain)
            found = types.result() + sums.result()
        target.write_text(json.dumps([asdict(finding) for finding in found]))

    entry = cached(f"static/{kernel.name}-{key}.json", make)
    return [Finding(**fields) for fields in json.loads(entry.read_text())]


def rules() -> list[str]:
    """The code that decides what is found: results of an older one are not taken from the cache."""
    return [(HERE / name).read_text() for name in ("static_checks.py", "half_sums.py", "findings.py")]


def type_findings(kernel: CapturedKernel, text: str) -> list[Finding]:
    """What clang says of the kernel with real address spaces."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.cpp"
        source.write_text(text)
        try:
            output = run_clang([*kernel_flags("as"), *WARNINGS, "-fsyntax-only", str(source)])
        except EmulationError as error:
            output = str(error)
        lines = implicit_bfloat_lines(kernel, source) if "bf" in kernel.function + kernel.source else []
    found = []
    for match in MESSAGE.finditer(output):
        message = match.group("text")
        if match.group("level") == "error":
            kind = "address space" if SPACE_WORDS.search(message) else "compile"
        elif TO_BFLOAT.search(message):
            kind = "implicit conversion"
        elif UNINITIALIZED.search(message):
            kind = "uninitialized read"
        else:
            continue
        found.append(_placed(kernel, kind, message, match.group("file"), int(match.group("line"))))
    told = {finding.line for finding in found if finding.kind == "implicit conversion"}
    message = "a float becomes a bfloat without a cast"
    found += [Finding("implicit conversion", message, line, kernel=kernel.name) for line in lines if line not in told]
    return list(dict.fromkeys(found))


def implicit_bfloat_lines(kernel: CapturedKernel, source: Path) -> list[int]:
    """Lines of the body with an implicit conversion to bfloat, from clang's syntax tree.

    The tree also shows conversions of constants, of which the compiler's warning is silent when nothing is lost.
    """
    dump = [*kernel_flags("as"), "-fsyntax-only", "-fno-color-diagnostics", "-Xclang", "-ast-dump", "-Xclang"]
    try:
        tree = run_clang([*dump, f"-ast-dump-filter={kernel.function}", str(source)])
    except EmulationError:
        return []
    lines, file, line = set(), "", 0
    for node in tree.splitlines():
        # Places are given relative to the last one printed: a file or a line that is the same is left out.
        for match in re.finditer(r"[<, ](?:line|(?P<file>[^\s<>,:]+)):(?P<line>\d+):\d+(?=[,> ])", node):
            file, line = match.group("file") or file, int(match.group("line"))
        implicit = "ImplicitCastExpr" in node and "part_of_explicit_cast" not in node
        if implicit and "<FloatingCast>" in node and "__bf16'" in node and file.endswith(source_file(kernel.name)):
            lines.add(line)
    return sorted(lines)


def half_sum_findings(kernel: CapturedKernel, text: str) -> list[Finding]:
    """Loops that add to a half or bfloat in a register."""
    with tempfile.TemporaryDirectory() as folder:
        source, ir = Path(folder) / "kernel.cpp", Path(folder) / "kernel.ll"
        source.write_text(text)
        flags = [flag for flag in kernel_flags("run") if flag != "-O2"]
        try:
            run_clang([*flags, *half_sums.FLAGS, "-S", "-emit-llvm", str(source), "-o", str(ir)])
        except EmulationError:
            return []  # type_findings has the errors
        lines = half_sums.find(ir.read_text())
    message = "a sum is kept in half or bfloat over a loop; keep it in float"
    return [_placed(kernel, "half accumulation", message, file, line) for file, line in lines]


def _placed(kernel: CapturedKernel, kind: str, message: str, file: str, line: int) -> Finding:
    file = file.rsplit("/", 1)[-1]
    if file == source_file(kernel.name):
        return Finding(kind, message, line, kernel=kernel.name)
    where = f"line {line} of the header" if file == header_file(kernel.name) else f"{file} line {line}"
    return Finding(kind, f"{message} [{where}]", kernel=kernel.name)
