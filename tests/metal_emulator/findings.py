"""Findings: what was found wrong with a kernel, and the symbolizer that turns addresses into lines."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass

from tests.metal_emulator.toolchain import Toolchain

# Every kind of finding and what it means; README.md says in which mode each is found.
KINDS = {
    "race": "two threads access the same memory, one of them writes, and nothing orders them",
    "same-value race": "two threads write the same value to the same place, and nothing orders them",
    "out of bounds": "an access outside every buffer and threadgroup variable",
    "uninitialized read": "a read of threadgroup memory, an output or a variable that nothing has written",
    "unwritten output": "elements of an output that nothing has written when the kernel ends",
    "write to input": "a write to an input buffer",
    "misaligned": "a vector access at an address that is no multiple of its size",
    "undefined behavior": "array index, shift, integer or float-to-integer overflow, division by zero",
    "divergent barrier": "a threadgroup barrier that not all threads reach",
    "divergent simdgroup": "a simdgroup function that not all lanes call, or not the same one",
    "inactive lane": "a shuffle that reads a lane which takes no part",
    "threadgroup memory": "more threadgroup memory than Metal allows",
    "thread count": "more threads per threadgroup than Metal allows",
    "crash": "the kernel crashed",
    "timeout": "the kernel did not end",
    "lint": "a construct that MSL does not have",
    "address space": "a pointer or reference to one address space where another is expected",
    "compile": "the kernel does not compile with address spaces",
    "implicit conversion": "an implicit conversion to bfloat, which MSL rejects",
    "half accumulation": "a sum kept in half or bfloat over a loop",
}


@dataclass(frozen=True)
class Finding:
    """Something wrong with a kernel.

    Attributes:
        kind: a key of KINDS.
        message: one line, with an example: which element, which threads.
        line: line of the kernel's `source` string, counted from 1; 0 if unknown or not in it.
        count: how often it happened in the launch.
        kernel: the kernel's name.
    """

    kind: str
    message: str
    line: int = 0
    count: int = 1
    kernel: str = ""

    def __str__(self) -> str:
        place = f"{self.kernel} line {self.line}" if self.line else self.kernel
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"{place}: {self.kind}: {self.message}{times}"


def describe(findings: Iterable[Finding]) -> str:
    """One finding per line."""
    return "\n".join(str(finding) for finding in findings)


def source_file(kernel: str) -> str:
    """The name under which the compiler knows the kernel's `source` string."""
    return f"{kernel}.metal"


def header_file(kernel: str) -> str:
    """The name under which the compiler knows the kernel's `header` string."""
    return f"{kernel}.header.metal"


def from_report(report: list[dict], kernel: str, executable: str, toolchain: Toolchain) -> list[Finding]:
    """The runtime's findings with addresses replaced by lines of the kernel.

    Args:
        report: the "findings" of the runtime's report.
        kernel: the kernel's name.
        executable: the program that ran, with line tables.
        toolchain: where the symbolizer is.
    """
    addresses = {entry[key] for entry in report for key in ("pc", "other_pc") if entry[key]}
    frames = symbolize(executable, sorted(addresses), toolchain)
    found = []
    for entry in report:
        place = _kernel_place(frames.get(entry["pc"], []) + [(entry["file"], entry["line"])], kernel)
        message = entry["message"]
        if entry["other_pc"]:
            other = _kernel_place(frames.get(entry["other_pc"], []), kernel)
            message += f" (the other access: {_place_text(other, kernel)})"
        if place[0] == header_file(kernel):
            message += f" [{_place_text(place, kernel)}]"
        line = place[1] if place[0] == source_file(kernel) else 0
        found.append(Finding(entry["kind"], message, line, entry["count"], kernel))
    return sorted(_merged(found), key=lambda finding: (finding.line, finding.kind, finding.message))


def symbolize(executable: str, addresses: list[int], toolchain: Toolchain) -> dict[int, list[tuple[str, int]]]:
    """address → (file, line) of the frames inlined there, innermost first."""
    if not addresses:
        return {}
    command = [toolchain.symbolizer, "--obj", executable, "--functions=none", "--inlines"]
    text = "\n".join(hex(address) for address in addresses)
    output = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    frames = {}
    for address, block in zip(addresses, output.strip().split("\n\n"), strict=False):
        matches = (re.match(r"(.*):(\d+):\d+$", line) for line in block.splitlines())
        frames[address] = [(match.group(1).rsplit("/", 1)[-1], int(match.group(2))) for match in matches if match]
    return frames


def _kernel_place(frames: list[tuple[str, int]], kernel: str) -> tuple[str, int]:
    """The outermost known place in the kernel's body, else in its header, else ("", 0).

    A finding in a helper is reported where the body calls it: inlined frames go from the helper outward.
    """
    for wanted in (source_file(kernel), header_file(kernel)):
        for file, line in frames:
            if file.rsplit("/", 1)[-1] == wanted:
                return wanted, line
    return "", 0


def _place_text(place: tuple[str, int], kernel: str) -> str:
    file, line = place
    if not line:
        return "place unknown"
    return f"line {line}" if file == source_file(kernel) else f"line {line} of the header"


def _merged(findings: list[Finding]) -> list[Finding]:
    """One finding per kind and line: inlining and unrolling give one statement many addresses."""
    merged: dict[tuple, Finding] = {}
    for finding in findings:
        key = (finding.kind, finding.line) if finding.line else (finding.kind, finding.message)
        first = merged.get(key)
        if first is None:
            merged[key] = finding
        else:
            merged[key] = Finding(first.kind, first.message, first.line, first.count + finding.count, first.kernel)
    return list(merged.values())
