"""The CUDA source that MLX would generate for a custom kernel.

mx.fast.cuda_kernel cannot be made without a CUDA build of MLX, so its signature is rebuilt here: mlx/backend/cuda/
custom_kernel.cpp of MLX 0.32 puts each input with its shape, strides and number of dimensions where the source names them,
then the outputs, then template arguments as constants and aliases at the start of the body. MLX's headers are not in its
wheels for the CPU; STUB_HEADER stands for the part of them that a kernel sees.
"""

from __future__ import annotations

import mlx.core as mx

DEVICE_HEADER = "mlx/backend/cuda/device/utils.cuh"
STUB_HEADER = """
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
#include <cuda/std/cstdint>
#include <cuda/std/limits>
#define MAX_NDIM 10
#define WARP_SIZE 32
using cuda::std::int8_t;
using cuda::std::int16_t;
using cuda::std::int32_t;
using cuda::std::int64_t;
using cuda::std::uint8_t;
using cuda::std::uint16_t;
using cuda::std::uint32_t;
using cuda::std::uint64_t;
namespace mlx::core::cu {
using Shape = cuda::std::array<int32_t, MAX_NDIM>;
using Strides = cuda::std::array<int64_t, MAX_NDIM>;
}
"""

CUDA_TYPES = {
    mx.bool_: "bool",
    mx.uint8: "uint8_t",
    mx.uint16: "uint16_t",
    mx.uint32: "uint32_t",
    mx.uint64: "uint64_t",
    mx.int8: "int8_t",
    mx.int16: "int16_t",
    mx.int32: "int32_t",
    mx.int64: "int64_t",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
}


def cuda_source(
    name: str,
    input_names: list[str],
    output_names: list[str],
    source: str,
    header: str,
    inputs: list[mx.array],
    output_dtypes: list[mx.Dtype],
    template: list[tuple[str, object]] | None = None,
) -> str:
    """The whole source of a CUDA kernel.

    Args:
        name: the function's name.
        input_names: names of the inputs in the body.
        output_names: names of the outputs in the body.
        source: the body.
        header: text before the function, such as the project's CUDA dialect.
        inputs: arrays; only their dtypes and numbers of dimensions are used.
        output_dtypes: dtypes of the outputs.
        template: (name, int, bool or dtype) pairs.

    Raises:
        KeyError: a dtype that CUDA kernels of MLX do not have here.
    """
    parameters = []
    for parameter, array in zip(input_names, inputs, strict=True):
        parameters.append(f"const {CUDA_TYPES[array.dtype]}* {parameter}")
        if array.ndim == 0:
            continue
        for suffix, type_name in (("shape", "Shape"), ("strides", "Strides"), ("ndim", "int")):
            if f"{parameter}_{suffix}" in source:
                parameters.append(f"const __grid_constant__ {type_name} {parameter}_{suffix}")
    for parameter, dtype in zip(output_names, output_dtypes, strict=True):
        parameters.append(f"{CUDA_TYPES[dtype]}* {parameter}")
    return (
        f'#include "{DEVICE_HEADER}"\n#include <cooperative_groups.h>\n'
        "#define inf cuda::std::numeric_limits<float>::infinity()\n"
        f'#line 1 "{name} header"\n{header}\n'
        "namespace mlx::core::cu {\nnamespace cg = cooperative_groups;\n"
        f"__global__ void {name}(\n    " + ",\n    ".join(parameters) + ") {\n"
        f'{template_constants(template or [])}#line 1 "{name}"\n{source}\n}}\n}}\n'
    )


def template_constants(template: list[tuple[str, object]]) -> str:
    """Template arguments as the declarations that MLX puts at the start of a CUDA body."""
    lines = []
    for name, value in template:
        if isinstance(value, bool):
            lines.append(f"  constexpr bool {name} = {str(value).lower()};\n")
        elif isinstance(value, int):
            lines.append(f"  constexpr int {name} = {value};\n")
        else:
            lines.append(f"  using {name} = {CUDA_TYPES[value]};\n")
    return "".join(lines)
