"""What MLX would send to the GPU: the generated source with its grid and buffers, asked of MLX itself.

MLX writes the kernel's signature from the inputs (address spaces, shapes, attributes), so nothing of that is rebuilt here:
`mx.export_function` traces the call without running it and hands over the primitive. Translation is left to translate.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import mlx.core as mx

from tests.metal_emulator.errors import EmulationError


@dataclass(frozen=True)
class Parameter:
    """One parameter of the generated signature.

    Attributes:
        text: as MLX wrote it.
        name: its name in the kernel.
        attribute: the thread attribute, or "" for a buffer.
        type: the type without const, address space, * and &.
        space: "device" or "constant" for a buffer, else "".
        writable: whether the kernel may write it.
        by_reference: whether it is a reference (a 0-d input) and not a pointer.
    """

    text: str
    name: str
    attribute: str = ""
    type: str = ""
    space: str = ""
    writable: bool = False
    by_reference: bool = False


@dataclass(frozen=True)
class CapturedKernel:
    """A call of a custom kernel as MLX would launch it.

    Attributes:
        name: the name given to metal_kernel.
        function: the generated function's name; differs by template arguments and types.
        instance: the function with its template arguments.
        source: the whole generated MSL.
        header_length: characters of `source` that are the header given by the user.
        body: start and end of the body given by the user, in characters of `source`.
        parameters: the signature.
        grid: threads in x, y, z.
        threadgroup: threads per threadgroup in x, y, z.
        shape_infos: per input: whether its shape, strides and number of dimensions are buffers of their own.
        row_contiguous: whether MLX copies strided inputs first.
    """

    name: str
    function: str
    instance: str
    source: str
    header_length: int
    body: tuple[int, int]
    parameters: tuple[Parameter, ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    shape_infos: tuple[tuple[bool, bool, bool], ...]
    row_contiguous: bool


def capture(kernel, *, name: str, header: str, inputs: list[mx.array], **call) -> CapturedKernel:
    """Asks MLX what it would launch.

    Args:
        kernel: what the real mx.fast.metal_kernel returned.
        name: the name it was given.
        header: the header it was given.
        inputs: arrays, already evaluated.
        **call: the other arguments of the kernel's call.

    Raises:
        EmulationError: MLX rejects the call.
    """
    recorded: list[dict] = []
    try:
        mx.export_function(recorded.append, lambda *arrays: kernel(inputs=list(arrays), **call), *inputs)
    except (ValueError, RuntimeError, TypeError) as error:
        raise EmulationError(f"MLX rejects the call of kernel {name}: {error}") from error
    launches = [entry for entry in recorded if entry.get("type") == "primitive" and entry.get("name") == "CustomKernel"]
    if len(launches) != 1:
        raise EmulationError(f"kernel {name}: MLX recorded {len(launches)} launches for one call")
    function, source, gx, gy, gz, tx, ty, tz, shape_infos, row_contiguous = launches[0]["arguments"][:10]
    signature = re.compile(r"\[\[kernel\]\] void " + re.escape(function) + r"\((.*?)\) \{\n", re.S).search(
        source, len(header)
    )
    end = re.search(
        r"\n\}\n(\ntemplate \[\[host_name\(.*?\)\]\] \[\[kernel\]\] decltype\((.*?)\) .*?;\n)?\s*$", source, re.S
    )
    if signature is None or end is None:
        raise EmulationError(f"kernel {name}: this version of MLX generates a source the emulator does not know")
    return CapturedKernel(
        name=name,
        function=function,
        instance=end.group(2) or function,
        source=source,
        header_length=len(header),
        body=(signature.end(), end.start()),
        parameters=tuple(parse_parameter(text.strip()) for text in signature.group(1).split(",\n")),
        grid=(gx, gy, gz),
        threadgroup=(tx, ty, tz),
        shape_infos=tuple(tuple(info) for info in shape_infos),
        row_contiguous=row_contiguous,
    )


def parse_parameter(text: str) -> Parameter:
    """A line of the generated signature, such as `const device float* x [[buffer(0)]]`."""
    buffer = re.fullmatch(r"(const )?(device|constant) (.*?)([*&]) (\w+) \[\[buffer\(\d+\)\]\]", text)
    if buffer:
        const, space, element, declarator, name = buffer.groups()
        return Parameter(text, name, type=element, space=space, writable=const is None, by_reference=declarator == "&")
    attribute = re.fullmatch(r"(\w+) (\w+) \[\[(\w+)\]\]", text)
    if attribute is None:
        raise EmulationError(f"the emulator does not know the kernel parameter {text!r}")
    return Parameter(text, attribute.group(2), attribute=attribute.group(3), type=attribute.group(1))
