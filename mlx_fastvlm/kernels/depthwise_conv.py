"""Depthwise convolution, NHWC, 'same' padding, with bias."""

import mlx.core as mx


def depthwise_conv(x: mx.array, weight: mx.array, bias: mx.array, stride: int = 1) -> mx.array:
    return depthwise_conv_reference(x, weight, bias, stride)


def depthwise_conv_reference(x: mx.array, weight: mx.array, bias: mx.array, stride: int = 1) -> mx.array:
    return mx.conv2d(x, weight, stride=stride, padding=weight.shape[1] // 2, groups=x.shape[-1]) + bias
