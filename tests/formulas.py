"""The formulas as the notes write them, one number at a time, in Python's floats: what the operations are held to."""

import math

SQRT_2_PI = math.sqrt(2 / math.pi)


def sigmoid(z):
    return 1 / (1 + math.exp(-z)) if z > -700 else 0.0


def _gelu_inner(z):
    return math.tanh(SQRT_2_PI * (z + 0.044715 * z**3))


VALUE = {
    "identity": lambda z: z,
    "sigmoid": sigmoid,
    "tanh": math.tanh,
    "relu": lambda z: max(z, 0.0),
    "leaky_relu": lambda z: z if z > 0 else 0.01 * z,
    "softplus": lambda z: z + math.log1p(math.exp(-z)) if z > 0 else math.log1p(math.exp(z)),
    "swish": lambda z: z * sigmoid(z),
    "gelu": lambda z: 0.5 * z * (1 + _gelu_inner(z)),
    "elu": lambda z: z if z > 0 else math.expm1(z),
}
DERIVATIVE = {
    "identity": lambda z: 1.0,
    "sigmoid": lambda z: sigmoid(z) * sigmoid(-z),
    "tanh": lambda z: 1 - math.tanh(z) ** 2,
    "relu": lambda z: 1.0 if z > 0 else 0.0,
    "leaky_relu": lambda z: 1.0 if z > 0 else 0.01,
    "softplus": sigmoid,
    "swish": lambda z: sigmoid(z) + z * sigmoid(z) * sigmoid(-z),
    "gelu": lambda z: (
        0.5 * (1 + _gelu_inner(z)) + 0.5 * z * (1 - _gelu_inner(z) ** 2) * SQRT_2_PI * (1 + 3 * 0.044715 * z**2)
    ),
    "elu": lambda z: 1.0 if z > 0 else math.exp(z),
}


def softmax(z):
    top = max(z)
    e = [math.exp(v - top) for v in z]
    return [v / math.fsum(e) for v in e]


def output(g, z):
    """g of one row."""
    return softmax(z) if g == "softmax" else [VALUE[g](v) for v in z]


def jacobian(g, z):
    """dg_k/dz_j of one row."""
    if g != "softmax":
        return [[DERIVATIVE[g](z[j]) if j == k else 0.0 for j in range(len(z))] for k in range(len(z))]
    y = softmax(z)
    return [[y[k] * ((j == k) - y[j]) for j in range(len(z))] for k in range(len(z))]


def cost(name, g, z, t):
    """C_i of one row."""
    y = output(g, z)
    if name == "cross_entropy":
        top = max(z)
        lse = top + math.log(math.fsum(math.exp(v - top) for v in z))
        return math.fsum(tk * (lse - zk) for tk, zk in zip(t, z, strict=True))
    if name == "binary_cross_entropy":  # -t ln y - (1 - t) ln(1 - y), by ln y = -softplus(-z), ln(1 - y) = -softplus(z)
        softplus = VALUE["softplus"]
        return math.fsum(tk * softplus(-zk) + (1 - tk) * softplus(zk) for tk, zk in zip(t, z, strict=True))
    error = [yk - tk for yk, tk in zip(y, t, strict=True)]
    if name == "squared_error":
        return 0.5 * math.fsum(e**2 for e in error)
    if name == "norm":
        return math.hypot(*error)
    if name == "mae":
        return math.fsum(map(abs, error))
    assert name == "huber"
    return math.fsum(0.5 * e**2 if abs(e) <= 1 else abs(e) - 0.5 for e in error)


def slope(name, error):
    """dC_i/dy from y - t, for the costs of any output."""
    if name == "squared_error":
        return error
    if name == "norm":
        return [e / math.hypot(*error) if e else 0.0 for e in error]
    if name == "mae":
        return [(e > 0) - (e < 0) for e in error]
    assert name == "huber"
    return [max(-1.0, min(1.0, e)) for e in error]


def delta(name, g, z, t):
    """dC_i/dz of one row, through dC/dy and the full Jacobian; the canonical pairs by A - T."""
    y = output(g, z)
    error = [yk - tk for yk, tk in zip(y, t, strict=True)]
    if name in ("cross_entropy", "binary_cross_entropy"):
        return error
    J = jacobian(g, z)
    error = slope(name, error)
    return [math.fsum(error[k] * J[k][j] for k in range(len(z))) for j in range(len(z))]
