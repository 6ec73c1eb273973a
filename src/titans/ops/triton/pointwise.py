"""Device functions that all kernels share: products, activations and error signals.

Every tensor is a tile in registers. Rows are tokens; rows beyond the chunk's end hold zeros,
which stay zeros through everything here that is read again.

`no_type_check` keeps checkers that wrap every function (jaxtyping, under pytest) off a kernel,
whose source triton reads: it has no Python types.
"""

from typing import no_type_check

import triton
import triton.language as tl

EPS = tl.constexpr(1e-5)  # networks.LAYER_NORM_EPS; kernels see only constexpr globals
SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_TWO_PI = tl.constexpr(0.3989422804014327)


@triton.jit
@no_type_check
def dot(a, b, PRECISION: tl.constexpr):
    """a b, accumulated in float32 (float64 for float64 tiles)."""
    if PRECISION == "bf16":
        product = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit
@no_type_check
def load_tile(X, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr, rows, columns):
    """X[index][rows, columns] of X (..., ROWS, COLUMNS)."""
    return tl.load(X + index * ROWS * COLUMNS + rows[:, None] * COLUMNS + columns[None, :])


@triton.jit
@no_type_check
def store_tile(X, value, index, ROWS: tl.constexpr, COLUMNS: tl.constexpr, rows, columns):
    """The inverse of `load_tile`."""
    tl.store(X + index * ROWS * COLUMNS + rows[:, None] * COLUMNS + columns[None, :], value)


@triton.jit
@no_type_check
def load_rows(X, chunk, L, WIDTH: tl.constexpr, columns, BLOCK_C: tl.constexpr):
    """Columns of the L tokens of a chunk, from X (chunks, L, WIDTH); zeros beyond L."""
    rows = tl.arange(0, BLOCK_C)
    at = (chunk * L + rows)[:, None] * WIDTH + columns[None, :]
    return tl.load(X + at, mask=(rows < L)[:, None], other=0.0)


@triton.jit
@no_type_check
def store_rows(X, value, chunk, L, WIDTH: tl.constexpr, columns, BLOCK_C: tl.constexpr):
    """The inverse of `load_rows`."""
    rows = tl.arange(0, BLOCK_C)
    at = (chunk * L + rows)[:, None] * WIDTH + columns[None, :]
    tl.store(X + at, value, mask=(rows < L)[:, None])


@triton.jit
@no_type_check
def load_row(X, chunk, L, BLOCK_C: tl.constexpr):
    """One number per token of a chunk, from X (chunks, L)."""
    rows = tl.arange(0, BLOCK_C)
    return tl.load(X + chunk * L + rows, mask=rows < L, other=0.0)


@triton.jit
@no_type_check
def store_row(X, value, chunk, L, BLOCK_C: tl.constexpr):
    rows = tl.arange(0, BLOCK_C)
    tl.store(X + chunk * L + rows, value, mask=rows < L)


@triton.jit
@no_type_check
def load_square(G, chunk, L, BLOCK_C: tl.constexpr):
    """G of a chunk, from (chunks, L, L); zeros beyond L."""
    rows = tl.arange(0, BLOCK_C)
    inside = (rows < L)[:, None] & (rows < L)[None, :]
    return tl.load(G + (chunk * L + rows)[:, None] * L + rows[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def store_square(G, value, chunk, L, BLOCK_C: tl.constexpr):
    rows = tl.arange(0, BLOCK_C)
    inside = (rows < L)[:, None] & (rows < L)[None, :]
    tl.store(G + (chunk * L + rows)[:, None] * L + rows[None, :], value, mask=inside)


@triton.jit
@no_type_check
def load_write(G, chunk, L, BLOCK_C: tl.constexpr):
    """The last row of G: what each token of the chunk weighs in the weights after it."""
    rows = tl.arange(0, BLOCK_C)
    return tl.load(G + (chunk * L + L - 1) * L + rows, mask=rows < L, other=0.0)


@triton.jit
@no_type_check
def activate(z, GELU: tl.constexpr):
    return z * 0.5 * (1.0 + tl.erf(z * SQRT_HALF)) if GELU else z * sigmoid(z)


@triton.jit
@no_type_check
def sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
@no_type_check
def activation_slope(z, GELU: tl.constexpr):
    """First derivative of `activate`."""
    if GELU:
        density = tl.exp(-0.5 * z * z) * INVERSE_SQRT_TWO_PI
        result = 0.5 * (1.0 + tl.erf(z * SQRT_HALF)) + z * density
    else:
        s = sigmoid(z)
        result = s * (1.0 + z * (1.0 - s))
    return result


@triton.jit
@no_type_check
def activation_curvature(z, GELU: tl.constexpr):
    """Second derivative of `activate`."""
    if GELU:
        result = tl.exp(-0.5 * z * z) * INVERSE_SQRT_TWO_PI * (2.0 - z * z)
    else:
        s = sigmoid(z)
        result = s * (1.0 - s) * (2.0 + z * (1.0 - 2.0 * s))
    return result


@triton.jit
@no_type_check
def layer_norm(z, WIDTH: tl.constexpr):
    """LayerNorm over rows without gain, and the inverse standard deviation (a column)."""
    centred = z - tl.sum(z, 1)[:, None] / WIDTH
    variance = tl.sum(centred * centred, 1)[:, None] / WIDTH
    inverse_std = 1.0 / tl.sqrt(variance + EPS)
    return centred * inverse_std, inverse_std


@triton.jit
@no_type_check
def through_norm(x, normed, inverse_std, WIDTH: tl.constexpr):
    """J x, with J = (I - 1 1^T / V - n n^T / V) / std the Jacobian of LayerNorm, J = J^T."""
    mean = tl.sum(x, 1)[:, None] / WIDTH
    along = tl.sum(x * normed, 1)[:, None] / WIDTH
    return inverse_std * (x - mean - normed * along)


@triton.jit
@no_type_check
def error_signal(z, target, L2: tl.constexpr, NORM: tl.constexpr, WIDTH: tl.constexpr):
    """delta = d loss / d z of the last layer's output z, for the loss on z or LayerNorm(z).

    l2: 0.5 |y - target|^2, dot: -<y, target>, with y = LayerNorm(z) or z. A residual is in
    the target.
    """
    if NORM:
        normed, inverse_std = layer_norm(z, WIDTH)
        delta = normed - target if L2 else -target
        delta = through_norm(delta, normed, inverse_std, WIDTH)
    else:
        delta = z - target if L2 else -target
    return delta


@triton.jit
@no_type_check
def error_signal_backward(
    slope, z, target, L2: tl.constexpr, NORM: tl.constexpr, WIDTH: tl.constexpr
):
    """Gradients of z and of the target, from the gradient `slope` of delta.

    delta = J r, r = n - target (or -target), so the gradient of r is J slope; n and 1 / std
    appear in J as well.
    """
    if NORM:
        n, inverse_std = layer_norm(z, WIDTH)
        error = n - target if L2 else -target
        delta = through_norm(error, n, inverse_std, WIDTH)
        back = through_norm(slope, n, inverse_std, WIDTH)
        error_along = tl.sum(error * n, 1)[:, None] / WIDTH
        slope_along = tl.sum(slope * n, 1)[:, None] / WIDTH
        slope_n = -inverse_std * (slope * error_along + error * slope_along)
        if L2:
            slope_n += back
        scale = tl.sum(slope * delta, 1)[:, None] / WIDTH
        slope_z = through_norm(slope_n, n, inverse_std, WIDTH) - inverse_std * n * scale
        slope_target = -back
    else:
        slope_z = slope if L2 else slope * 0.0
        slope_target = -slope
    return slope_z, slope_target
