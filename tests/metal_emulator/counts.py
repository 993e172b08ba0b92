"""Counts: what a launch moves and computes, as seen by the compiled kernel (mode "count")."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

LARGEST = {"threadgroup_memory"}  # added up, the largest of the launches counts


@dataclass(frozen=True)
class Counts:
    """What one launch (or, added up, several) does.

    Loads and stores are those that clang leaves at -O2 without vectorization: a value kept in a register is loaded
    once. An access is one instruction of one thread, whatever its width. Inputs of fewer than 8 elements and shapes are
    `constant` in Metal and counted apart.

    Attributes:
        device_loads, device_stores: accesses to device memory.
        device_bytes_read, device_bytes_written: bytes of those accesses.
        device_bytes_read_unique, device_bytes_written_unique: each byte once per launch: what cannot be avoided.
        device_bytes_read_per_group, device_bytes_written_per_group: each byte once per threadgroup that touches it: what
            reaches the memory behind a first-level cache that holds all a threadgroup uses.
        constant_loads, constant_bytes_read: accesses to constant memory.
        threadgroup_loads, threadgroup_stores: accesses to threadgroup memory.
        threadgroup_bytes_read, threadgroup_bytes_written: bytes of those accesses.
        flops: floating-point additions, multiplications, divisions, minima and maxima; a fused multiply-add is 2, a
            vector operation one per element, a simdgroup_matrix product 1024.
        special: transcendental functions, square roots and reciprocal square roots.
        simdgroup_operations: simdgroup functions executed, one per simdgroup.
        barriers: threadgroup barriers executed, one per threadgroup that passes one.
        threadgroups, threads: launched.
        threadgroup_memory: bytes of threadgroup variables per threadgroup.
    """

    device_loads: int = 0
    device_stores: int = 0
    device_bytes_read: int = 0
    device_bytes_written: int = 0
    device_bytes_read_unique: int = 0
    device_bytes_written_unique: int = 0
    device_bytes_read_per_group: int = 0
    device_bytes_written_per_group: int = 0
    constant_loads: int = 0
    constant_bytes_read: int = 0
    threadgroup_loads: int = 0
    threadgroup_stores: int = 0
    threadgroup_bytes_read: int = 0
    threadgroup_bytes_written: int = 0
    flops: int = 0
    special: int = 0
    simdgroup_operations: int = 0
    barriers: int = 0
    threadgroups: int = 0
    threads: int = 0
    threadgroup_memory: int = 0

    def __add__(self, other: Counts) -> Counts:
        """The counts of two launches one after the other; threadgroup_memory is the larger."""
        both = {}
        for field in fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            both[field.name] = max(mine, theirs) if field.name in LARGEST else mine + theirs
        return Counts(**both)


def total(counts: Iterable[Counts]) -> Counts:
    """The counts of several launches together."""
    return sum(counts, Counts())


def from_report(report: dict, threads: int) -> Counts:
    """Counts of the runtime's report.

    Args:
        report: the whole report; its "counts" are not null.
        threads: number of threads launched.
    """
    raw = report["counts"]
    return Counts(
        device_loads=raw["device_read_accesses"],
        device_stores=raw["device_write_accesses"],
        device_bytes_read=raw["device_read_bytes"],
        device_bytes_written=raw["device_write_bytes"],
        device_bytes_read_unique=raw["device_read_unique_bytes"],
        device_bytes_written_unique=raw["device_write_unique_bytes"],
        device_bytes_read_per_group=raw["device_read_per_group_bytes"],
        device_bytes_written_per_group=raw["device_write_per_group_bytes"],
        constant_loads=raw["constant_read_accesses"],
        constant_bytes_read=raw["constant_read_bytes"],
        threadgroup_loads=raw["threadgroup_read_accesses"],
        threadgroup_stores=raw["threadgroup_write_accesses"],
        threadgroup_bytes_read=raw["threadgroup_read_bytes"],
        threadgroup_bytes_written=raw["threadgroup_write_bytes"],
        flops=raw["flops"],
        special=raw["special"],
        simdgroup_operations=raw["simdgroup_operations"],
        barriers=report["barriers"],
        threadgroups=report["threadgroups"],
        threads=threads,
        threadgroup_memory=report["threadgroup_memory"],
    )
