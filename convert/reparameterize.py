"""Folding: everything that is linear at inference becomes one weight and one bias, computed in float32.

A *site* is one weight and bias of the runtime: which tensors the checkpoint stores for it, how they fold, and what they
compute unfolded (`plain`), which the self-check compares with. Folds are exact up to rounding: a BatchNorm with fixed
statistics, a sum of convolutions and a per-channel scale are linear, and zero padding comes before them.
Sources: MobileOne (arXiv 2206.04040, section 3.2), FastViT (arXiv 2303.14189, 3.2), RepLKNet (arXiv 2203.06717).
Convolution kernels are OIHW in checkpoints and OHWI here; maps are (B, H, W, C).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import mlx.core as mx

from .tensors import Tensors

BATCH_NORM_EPS = 1e-5
_BATCH_NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Conv:
    """Shape of a k×k convolution, k odd, padded so that stride alone changes the map's size."""

    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int = 1
    groups: int = 1

    def __call__(self, x: mx.array, kernel: mx.array) -> mx.array:
        """(B, H, W, C) → (B, H/stride, W/stride, O) with any odd kernel of at most k×k."""
        return mx.conv2d(x, kernel, stride=self.stride, padding=kernel.shape[1] // 2, groups=self.groups)

    def identity(self) -> mx.array:
        """The kernel that returns its input."""
        outputs = mx.arange(self.out_channels)
        middle = self.kernel_size // 2
        kernel = self.zeros()
        kernel[outputs, middle, middle, outputs % (self.in_channels // self.groups)] = 1.0
        return kernel

    def zeros(self) -> mx.array:
        return mx.zeros((self.out_channels, self.kernel_size, self.kernel_size, self.in_channels // self.groups))

    def padded(self, kernel: mx.array) -> mx.array:
        """A smaller odd kernel, centered in k×k."""
        margin = (self.kernel_size - kernel.shape[1]) // 2
        return mx.pad(kernel, [(0, 0), (margin, margin), (margin, margin), (0, 0)])


@dataclass(frozen=True)
class ConvSite:
    """A convolution of the tower, in training form or already folded by the checkpoint's author.

    Args:
        source: prefix of the checkpoint's tensors.
        target: prefix of the runtime's weight and bias.
        conv: shape of the folded convolution.
        as_linear: the runtime stores this 1×1 convolution as a Linear, (O, C).
    """

    source: str
    target: str
    conv: Conv
    as_linear: bool = field(default=False, kw_only=True)

    folded_name: ClassVar[str] = "reparam_conv"  # what the checkpoint calls the folded convolution

    def sources(self, tensors: Tensors) -> list[str]:
        """Full names of the tensors this site needs, given which form is stored."""
        if self._is_folded(tensors):
            return [f"{self.source}.{self.folded_name}.{part}" for part in ("weight", "bias")]
        return [f"{self.source}.{name}" for name in self._training_names(tensors)]

    def fold(self, tensors: Tensors) -> dict[str, mx.array]:
        """Runtime parameter name → float32 array."""
        kernel, bias = self.kernel_and_bias(tensors)
        if self.as_linear:
            kernel = kernel.reshape(kernel.shape[0], -1)
        return {f"{self.target}.weight": kernel, f"{self.target}.bias": bias}

    def kernel_and_bias(self, tensors: Tensors) -> tuple[mx.array, mx.array]:
        """Kernel (O, k, k, C/groups) and bias (O,)."""
        if self._is_folded(tensors):
            return self._kernel(tensors, self.folded_name), tensors[f"{self.source}.{self.folded_name}.bias"]
        return self._fold_training_form(tensors)

    def plain(self, tensors: Tensors, x: mx.array) -> mx.array:
        """What the checkpoint computes here, branch by branch: (B, H, W, C) → (B, H', W', O)."""
        if self._is_folded(tensors):
            return self._plain_conv(tensors, self.folded_name, x)
        return self._plain_training_form(tensors, x)

    def is_training_form(self, tensors: Tensors) -> bool:
        return not self._is_folded(tensors)

    def _is_folded(self, tensors: Tensors) -> bool:
        return f"{self.source}.{self.folded_name}.weight" in tensors

    def _training_names(self, tensors: Tensors) -> list[str]:
        raise NotImplementedError

    def _fold_training_form(self, tensors: Tensors) -> tuple[mx.array, mx.array]:
        raise NotImplementedError

    def _plain_training_form(self, tensors: Tensors, x: mx.array) -> mx.array:
        raise NotImplementedError

    def _kernel(self, tensors: Tensors, name: str) -> mx.array:
        return tensors[f"{self.source}.{name}.weight"].transpose(0, 2, 3, 1)

    def _plain_conv(self, tensors: Tensors, name: str, x: mx.array) -> mx.array:
        return self.conv(x, self._kernel(tensors, name)) + tensors[f"{self.source}.{name}.bias"]

    def _fold_conv_bn(self, tensors: Tensors, branch: str) -> tuple[mx.array, mx.array]:
        """k×k kernel and bias of a branch that is a convolution without bias, then BatchNorm."""
        scale, shift = _scale_and_shift(tensors, f"{self.source}.{branch}.bn")
        return self.conv.padded(self._kernel(tensors, f"{branch}.conv")) * scale[:, None, None, None], shift

    def _plain_conv_bn(self, tensors: Tensors, branch: str, x: mx.array) -> mx.array:
        return _batch_norm(tensors, f"{self.source}.{branch}.bn", self.conv(x, self._kernel(tensors, f"{branch}.conv")))


@dataclass(frozen=True)
class SumOfBranchesSite(ConvSite):
    """A sum of convolution + BatchNorm branches, and of a BatchNorm on the identity when `skip` names one."""

    skip: ClassVar[str | None] = None

    def branches(self, tensors: Tensors) -> Iterator[str]:
        raise NotImplementedError

    @property
    def has_skip(self) -> bool:
        return self.skip is not None and self.conv.in_channels == self.conv.out_channels and self.conv.stride == 1

    def _training_names(self, tensors: Tensors) -> list[str]:
        names = []
        for branch in self.branches(tensors):
            names += [f"{branch}.conv.weight", *(f"{branch}.bn.{part}" for part in _BATCH_NORM_PARTS)]
        return names + ([f"{self.skip}.{part}" for part in _BATCH_NORM_PARTS] if self.has_skip else [])

    def _fold_training_form(self, tensors: Tensors) -> tuple[mx.array, mx.array]:
        kernel, bias = self.conv.zeros(), mx.zeros((self.conv.out_channels,))
        for branch in self.branches(tensors):
            branch_kernel, branch_bias = self._fold_conv_bn(tensors, branch)
            kernel, bias = kernel + branch_kernel, bias + branch_bias
        if self.has_skip:
            scale, shift = _scale_and_shift(tensors, f"{self.source}.{self.skip}")
            kernel, bias = kernel + self.conv.identity() * scale[:, None, None, None], bias + shift
        return kernel, bias

    def _plain_training_form(self, tensors: Tensors, x: mx.array) -> mx.array:
        terms = [self._plain_conv_bn(tensors, branch, x) for branch in self.branches(tensors)]
        if self.has_skip:
            terms.append(_batch_norm(tensors, f"{self.source}.{self.skip}", x))
        return sum(terms[1:], terms[0])


@dataclass(frozen=True)
class MobileOneSite(SumOfBranchesSite):
    """MobileOne block: convolution branches, a 1×1 scale branch, a skip.

    Args:
        has_conv: RepMixer's `norm` has no convolution branch.
        has_scale: the stem's blocks and 1×1 blocks have no scale branch.
    """

    has_conv: bool = field(default=True, kw_only=True)
    has_scale: bool = field(default=False, kw_only=True)

    skip = "rbr_skip"

    def branches(self, tensors: Tensors) -> Iterator[str]:
        if self.has_conv:
            # Apple trains with one convolution branch; MobileOne allows several.
            yield "rbr_conv.0"
            count = 1
            while f"{self.source}.rbr_conv.{count}.conv.weight" in tensors:
                yield f"rbr_conv.{count}"
                count += 1
        if self.has_scale:
            yield "rbr_scale"


@dataclass(frozen=True)
class LargeKernelSite(SumOfBranchesSite):
    """Downsampling: a 7×7 and a 3×3 branch."""

    folded_name = "lkb_reparam"

    def branches(self, tensors: Tensors) -> Iterator[str]:
        yield from ("lkb_origin", "small_conv")


@dataclass(frozen=True)
class ConvBatchNormSite(SumOfBranchesSite):
    """ConvFFN's 7×7 and its BatchNorm, which released checkpoints keep apart too."""

    folded_name = "conv"

    def branches(self, tensors: Tensors) -> Iterator[str]:
        yield "conv"


@dataclass(frozen=True)
class RepMixerSite(ConvSite):
    """RepMixer: x + layer_scale · (mixer(x) − norm(x))."""

    def _parts(self) -> tuple[MobileOneSite, MobileOneSite]:
        mixer = MobileOneSite(f"{self.source}.mixer", self.target, self.conv, has_scale=True)
        norm = MobileOneSite(f"{self.source}.norm", self.target, self.conv, has_conv=False)
        return mixer, norm

    def _training_names(self, tensors: Tensors) -> list[str]:
        names = [name for part in self._parts() for name in part.sources(tensors)]
        return ["layer_scale", *(name.removeprefix(f"{self.source}.") for name in names)]

    def _fold_training_form(self, tensors: Tensors) -> tuple[mx.array, mx.array]:
        (mixer_kernel, mixer_bias), (norm_kernel, norm_bias) = (part.kernel_and_bias(tensors) for part in self._parts())
        scale = tensors[f"{self.source}.layer_scale"].reshape(-1)
        kernel = self.conv.identity() + scale[:, None, None, None] * (mixer_kernel - norm_kernel)
        return kernel, scale * (mixer_bias - norm_bias)

    def _plain_training_form(self, tensors: Tensors, x: mx.array) -> mx.array:
        mixed, normed = (part.plain(tensors, x) for part in self._parts())
        return x + tensors[f"{self.source}.layer_scale"].reshape(-1) * (mixed - normed)


@dataclass(frozen=True)
class RepCPESite(ConvSite):
    """Positional encoding: pe(x) + x."""

    def _training_names(self, tensors: Tensors) -> list[str]:
        return ["pe.weight", "pe.bias"]

    def _fold_training_form(self, tensors: Tensors) -> tuple[mx.array, mx.array]:
        return self._kernel(tensors, "pe") + self.conv.identity(), tensors[f"{self.source}.pe.bias"]

    def _plain_training_form(self, tensors: Tensors, x: mx.array) -> mx.array:
        return self._plain_conv(tensors, "pe", x) + x


@dataclass(frozen=True)
class ScaledLinearSite:
    """A Linear or 1×1 convolution with bias whose output a layer scale multiplies.

    Args:
        source: prefix of the checkpoint's weight (O, C) or (O, C, 1, 1) and bias.
        target: prefix of the runtime's weight (O, C) and bias.
        layer_scale: full name of the scale (O, 1, 1), or None.
    """

    source: str
    target: str
    layer_scale: str | None = None

    def sources(self, tensors: Tensors) -> list[str]:
        names = [f"{self.source}.weight", f"{self.source}.bias"]
        return names if self.layer_scale is None else [*names, self.layer_scale]

    def fold(self, tensors: Tensors) -> dict[str, mx.array]:
        weight, bias = tensors[f"{self.source}.weight"], tensors[f"{self.source}.bias"]
        weight = weight.reshape(weight.shape[0], -1)
        if self.layer_scale is not None:
            scale = tensors[self.layer_scale].reshape(-1)
            weight, bias = weight * scale[:, None], bias * scale
        return {f"{self.target}.weight": weight, f"{self.target}.bias": bias}

    def plain(self, tensors: Tensors, x: mx.array) -> mx.array:
        """(..., C) → (..., O), scaled after the fact."""
        weight = tensors[f"{self.source}.weight"]
        y = x @ weight.reshape(weight.shape[0], -1).T + tensors[f"{self.source}.bias"]
        return y if self.layer_scale is None else y * tensors[self.layer_scale].reshape(-1)


@dataclass(frozen=True)
class StackSite:
    """Tensors stacked along their first axis into one parameter, so that one matmul computes them all.

    One source is a plain copy.

    Args:
        names: full names in the checkpoint, in order.
        target: the runtime's parameter.
    """

    names: tuple[str, ...]
    target: str

    def sources(self, tensors: Tensors) -> list[str]:
        return list(self.names)

    def fold(self, tensors: Tensors) -> dict[str, mx.array]:
        if len(self.names) == 1:
            return {self.target: tensors[self.names[0]]}
        return {self.target: mx.concatenate([tensors[name] for name in self.names], axis=0)}


AnySite = ConvSite | ScaledLinearSite | StackSite


def _scale_and_shift(tensors: Tensors, prefix: str) -> tuple[mx.array, mx.array]:
    """A BatchNorm with fixed statistics as y = x · scale + shift."""
    gamma, beta, mean, var = (tensors[f"{prefix}.{part}"] for part in _BATCH_NORM_PARTS)
    scale = gamma / mx.sqrt(var + BATCH_NORM_EPS)
    return scale, beta - mean * scale


def _batch_norm(tensors: Tensors, prefix: str, x: mx.array) -> mx.array:
    """The same BatchNorm as its definition has it."""
    gamma, beta, mean, var = (tensors[f"{prefix}.{part}"] for part in _BATCH_NORM_PARTS)
    return (x - mean) / mx.sqrt(var + BATCH_NORM_EPS) * gamma + beta
