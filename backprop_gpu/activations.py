"""Activation functions: the value f(Z) and the derivative f'(Z), one entry each.

`value(xp, Z, A, s)` writes f(Z) into A, which may be Z itself. `derivative(xp, K, D, s)` writes f'(Z) into D, where K
is A = f(Z) or Z, as `derivative_from` says: a function whose derivative is taken from A never needs its Z again, so the
layer works in place. `xp` is numpy or cupy; `s` holds two scratch arrays. All arrays have one shape and one dtype.

A function of one's own is made by `Activation.of`.

Sources: 5 ("Activation functions": sigmoid, tanh, ReLU, leaky ReLU, softplus, swish), 4, eqs. 9-10 (sigmoid).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from .errors import ConfigError

Array = Any  # numpy.ndarray or cupy.ndarray

LEAKY_SLOPE = 0.01
GELU_K = 0.7978845608028654  # sqrt(2 / pi)
GELU_C = 0.044715


class Activation(NamedTuple):
    """One activation function.

    `derivative` is None where f' = 1 everywhere. `increasing`: strictly, so that the largest z is the largest a.
    `cuda`: value and derivative of one's own function as the CUDA kernels get them; kernels/activations.cuh has those
    of the table below.
    """

    name: str
    value: Callable[[Any, Array, Array, Any], None]
    derivative: Callable[[Any, Array, Array, Any], None] | None
    derivative_from: str = "A"
    elementwise: bool = True
    increasing: bool = True
    cuda: tuple[str, str] | None = None

    @classmethod
    def of(
        cls,
        name: str,
        value: Callable[[Any, Array], Array],
        derivative: Callable[[Any, Array], Array],
        derivative_from: str = "Z",
        increasing: bool = False,
        cuda: tuple[str, str] | None = None,
    ) -> Activation:
        """An activation of one's own, elementwise, from plain array code.

        `value(xp, Z)` returns f(Z), `derivative(xp, K)` returns f'(Z) from K = Z, or from K = f(Z) where
        `derivative_from` is "A"; arrays of one shape (m, N_l), in the network's dtype, of the array module xp (numpy or
        cupy). `increasing`: whether f is so strictly. `name` is what model files and messages call it.

        `cuda`: the same two as CUDA C++ expressions, of `z`, and of `z` or `a`, of type `real` (float or double): on a
        GPU they take the place of the array code, fused into the kernels. Write a constant as real(0.5); between
        integers C++ divides as such, 1/2 is 0. `gradient_check` on a GPU tells whether they are right.

        ConfigError for a name that is taken or no identifier, for a `cuda` that is not two texts, and, when it is used,
        for results of another shape and expressions that do not compile.
        """
        check_own("activation", name, OUTPUT, value, derivative)
        if derivative_from not in ("A", "Z"):
            raise ConfigError(f"derivative_from is {derivative_from!r}", "give 'A' or 'Z'")
        return cls(
            name,
            lambda xp, Z, A, s: fill(A, value(xp, Z), f"the value of {name}"),
            lambda xp, K, D, s: fill(D, derivative(xp, K), f"the derivative of {name}"),
            derivative_from,
            increasing=increasing,
            cuda=expressions(cuda, "('tanh(z)', '1 - tanh(z) * tanh(z)')"),
        )


def check_own(what: str, name: Any, taken: Any, *functions: Any) -> None:
    """ConfigError unless a function of one's own can have that name, and its parts can be called."""
    if not (isinstance(name, str) and name.isidentifier()) or name in taken:
        raise ConfigError(f"{name!r} cannot name your own {what}", "give an identifier that is not in use yet")
    if not all(map(callable, functions)):
        raise ConfigError(f"the {what} {name} has a value or derivative that is no function", "give two functions")


def expressions(cuda: Any, such_as: str) -> tuple[str, str] | None:
    """Value and derivative of a function of one's own as CUDA expressions, each on one line; None for none."""
    if cuda is None:
        return None
    pair = isinstance(cuda, (tuple, list)) and len(cuda) == 2
    if not (pair and all(isinstance(text, str) and text.strip() for text in cuda)):
        raise ConfigError(f"cuda is {cuda!r}", f"give two expressions, such as {such_as}")
    value, derivative = (" ".join(text.split()) for text in cuda)
    return value, derivative


def fill(out: Array, result: Any, what: str, number: bool = True) -> None:
    """out = result, real numbers in out's shape, or one number where `number`."""
    shape = () if isinstance(result, (int, float)) else getattr(result, "shape", None)
    kind = getattr(getattr(result, "dtype", None), "kind", "f")
    if kind not in "biuf" or (shape != out.shape and not (number and shape == ())):
        found = f"is {type(result).__name__}" if shape is None else f"has shape {shape} and kind {kind!r}"
        raise ConfigError(
            f"{what} {found} for arrays of shape {out.shape}", f"return real numbers of shape {out.shape}"
        )
    out[...] = result


def identity(xp: Any, Z: Array, A: Array, s: Any) -> None:
    """f(z) = z; f' = 1."""
    if A is not Z:
        A[...] = Z


def sigmoid(xp: Any, Z: Array, A: Array, s: Any) -> None:
    """f(z) = 1 / (1 + exp(-z))   (source 4, eq. 9). exp may overflow to infinity, which gives the right limit, 0."""
    xp.negative(Z, out=A)
    xp.exp(A, out=A)
    xp.add(A, 1, out=A)
    xp.divide(1, A, out=A)


def d_sigmoid(xp: Any, A: Array, D: Array, s: Any) -> None:
    """f' = a (1 - a)   (source 4, eq. 10)."""
    xp.subtract(1, A, out=D)
    xp.multiply(D, A, out=D)


def tanh(xp: Any, Z: Array, A: Array, s: Any) -> None:
    """f(z) = tanh(z)."""
    xp.tanh(Z, out=A)


def d_tanh(xp: Any, A: Array, D: Array, s: Any) -> None:
    """f' = 1 - a^2."""
    xp.multiply(A, A, out=D)
    xp.subtract(1, D, out=D)


def relu(xp: Any, Z: Array, A: Array, s: Any) -> None:
    """f(z) = max(z, 0)."""
    xp.maximum(Z, 0, out=A)


def d_relu(xp: Any, A: Array, D: Array, s: Any) -> None:
    """f' = 1 where z > 0, else 0; so f'(0) = 0."""
    xp.greater(A, 0, out=D)


def leaky_relu(xp: Any, Z: Array, A: Array, s: Any) -> None:
    """f(z) = max(z, 0.01 z)."""
    xp.multiply(Z, LEAKY_SLOPE, out=s[0])
    xp.maximum(Z, s[0], out=A)


def d_leaky_relu(xp: Any, A: Array, D: Array, s: Any) -> None:
    """f' = 1 where z > 0, else 0.01."""
    xp.greater(A, 0, out=D)
    xp.maximum(D, LEAKY_SLOPE, out=D)


def softplus(xp: Any, Z: Array, A: Array, s: Any) -> None:
    """f(z) = ln(1 + exp(z)) = max(z, 0) + ln(1 + exp(-|z|)), which never overflows."""
    xp.absolute(Z, out=s[0])
    xp.negative(s[0], out=s[0])
    xp.exp(s[0], out=s[0])
    xp.log1p(s[0], out=s[0])
    xp.maximum(Z, 0, out=A)
    xp.add(A, s[0], out=A)


def d_softplus(xp: Any, A: Array, D: Array, s: Any) -> None:
    """f' = sigmoid(z) = 1 - exp(-a)."""
    xp.negative(A, out=D)
    xp.expm1(D, out=D)
    xp.negative(D, out=D)


def swish(xp: Any, Z: Array, A: Array, s: Any) -> None:
    """f(z) = z sigmoid(z): beta is 1 (also known as SiLU)."""
    sigmoid(xp, Z, s[0], None)
    xp.multiply(Z, s[0], out=A)


def d_swish(xp: Any, Z: Array, D: Array, s: Any) -> None:
    """f' = sigmoid(z) (1 + z (1 - sigmoid(z)))."""
    sigmoid(xp, Z, s[0], None)
    xp.subtract(1, s[0], out=D)
    xp.multiply(D, Z, out=D)
    xp.add(D, 1, out=D)
    xp.multiply(D, s[0], out=D)


def gelu(xp: Any, Z: Array, A: Array, s: Any) -> None:
    """f(z) = z (1 + tanh(k (z + c z^3))) / 2, k = sqrt(2/pi), c = 0.044715: the tanh form (Hendrycks, Gimpel 2016)."""
    _gelu_tanh(xp, Z, s[0])
    xp.add(s[0], 1, out=s[0])
    xp.multiply(s[0], 0.5, out=s[0])
    xp.multiply(Z, s[0], out=A)


def d_gelu(xp: Any, Z: Array, D: Array, s: Any) -> None:
    """f' = (1 + t) / 2 + (1 - t^2) q, with t = tanh(k (z + c z^3)) and q = z k (1 + 3 c z^2) / 2."""
    t, q = s
    _gelu_tanh(xp, Z, t)
    xp.multiply(Z, Z, out=q)
    xp.multiply(q, 1.5 * GELU_K * GELU_C, out=q)
    xp.add(q, 0.5 * GELU_K, out=q)
    xp.multiply(q, Z, out=q)
    xp.multiply(t, t, out=D)
    xp.subtract(1, D, out=D)
    xp.multiply(D, q, out=D)
    xp.multiply(t, 0.5, out=t)
    xp.add(D, t, out=D)
    xp.add(D, 0.5, out=D)


def _gelu_tanh(xp: Any, Z: Array, t: Array) -> None:
    xp.multiply(Z, Z, out=t)
    xp.multiply(t, GELU_K * GELU_C, out=t)
    xp.add(t, GELU_K, out=t)
    xp.multiply(t, Z, out=t)
    xp.tanh(t, out=t)


def elu(xp: Any, Z: Array, A: Array, s: Any) -> None:
    """f(z) = z where z > 0, else exp(z) - 1: alpha is 1."""
    xp.minimum(Z, 0, out=s[0])
    xp.expm1(s[0], out=s[0])
    xp.maximum(Z, 0, out=A)
    xp.add(A, s[0], out=A)


def d_elu(xp: Any, A: Array, D: Array, s: Any) -> None:
    """f' = 1 where z > 0, else a + 1."""
    xp.minimum(A, 0, out=D)
    xp.add(D, 1, out=D)


def softmax(xp: Any, Z: Array, A: Array, s: Any) -> None:
    """a_k = exp(z_k) / sum_j exp(z_j) in each row (source 5, softmax regression); the row's maximum is taken off."""
    r = s[0][:, :1]
    Z.max(axis=1, keepdims=True, out=r)
    xp.subtract(Z, r, out=A)
    xp.exp(A, out=A)
    A.sum(axis=1, keepdims=True, out=r)
    xp.divide(A, r, out=A)


IDENTITY = Activation("identity", identity, None)
SOFTMAX = Activation("softmax", softmax, None, elementwise=False)

HIDDEN: dict[str, Activation] = {
    f.name: f
    for f in (
        IDENTITY,
        Activation("sigmoid", sigmoid, d_sigmoid),
        Activation("tanh", tanh, d_tanh),
        Activation("relu", relu, d_relu, increasing=False),
        Activation("leaky_relu", leaky_relu, d_leaky_relu),
        Activation("softplus", softplus, d_softplus),
        Activation("swish", swish, d_swish, derivative_from="Z", increasing=False),
        Activation("gelu", gelu, d_gelu, derivative_from="Z", increasing=False),
        Activation("elu", elu, d_elu),
    )
}
OUTPUT: dict[str, Activation] = {SOFTMAX.name: SOFTMAX, **HIDDEN}
