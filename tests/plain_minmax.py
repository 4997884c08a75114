"""MinMax once more, in numpy and float64, group by group: what the package is compared with."""

import numpy as np


def codes_of(group, bits, divisor=None, scale_dtype="float32"):
    "Codes, scales and zero points of `group` [rows, width], one scale per row; `divisor` makes the grid symmetric."
    top = 2**bits - 1
    if divisor:
        scale = np.abs(group).max(1, keepdims=True) / divisor
        zero = np.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = np.minimum(group.min(1, keepdims=True), 0), np.maximum(group.max(1, keepdims=True), 0)
        scale = (high - low) / top
    scale = scale.astype(scale_dtype).astype(np.float64)
    scale[scale == 0] = 1
    if not divisor:
        zero = np.clip(np.round(-low / scale), 0, top)
    return np.clip(np.round(group / scale + zero), 0, top), scale, zero


def squared_error(weight, bits, width, divisor=None, scale_dtype="float32"):
    "Sum of squared errors of `weight` [out_features, in_features] with a scale for each `width` columns of a row."
    total, weight = 0.0, np.asarray(weight, np.float64)
    for start in range(0, weight.shape[1], width):
        group = weight[:, start : start + width]
        codes, scale, zero = codes_of(group, bits, divisor, scale_dtype)
        total += float((((codes - zero) * scale - group) ** 2).sum())
    return total
