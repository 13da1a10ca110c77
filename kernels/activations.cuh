// The table of activations: value f(z), and derivative f'(z) from z or from a = f(z), as `from_Z` says. Names and
// formulas are those of backprop_gpu/activations.py (source 5, "Activation functions"; source 4, eqs. 9-10). One's own
// activation is one more struct, written by the host from two expressions.
#pragma once
#include "common.cuh"

struct f_identity {
    static constexpr bool from_Z = false, rows = false;
    static __device__ real value(real z) { return z; }
    static __device__ real derivative(real) { return 1; }
};

struct f_sigmoid {  // exp may overflow to infinity, which gives the right limit, 0
    static constexpr bool from_Z = false, rows = false;
    static __device__ real value(real z) { return 1 / (1 + exp(-z)); }
    static __device__ real derivative(real a) { return (1 - a) * a; }
};

struct f_tanh {
    static constexpr bool from_Z = false, rows = false;
    static __device__ real value(real z) { return tanh(z); }
    static __device__ real derivative(real a) { return 1 - a * a; }
};

struct f_relu {  // z where it is a NaN, as NumPy's maximum
    static constexpr bool from_Z = false, rows = false;
    static __device__ real value(real z) { return z < 0 ? real(0) : z; }
    static __device__ real derivative(real a) { return a > 0; }
};

struct f_leaky_relu {
    static constexpr bool from_Z = false, rows = false;
    static __device__ real value(real z) { return z < 0 ? z * real(0.01) : z; }
    static __device__ real derivative(real a) { return a > 0 ? real(1) : real(0.01); }
};

struct f_softplus {  // max(z, 0) + ln(1 + exp(-|z|)) never overflows
    static constexpr bool from_Z = false, rows = false;
    static __device__ real value(real z) { return (z < 0 ? real(0) : z) + log1p(exp(-fabs(z))); }
    static __device__ real derivative(real a) { return -expm1(-a); }
};

struct f_swish {
    static constexpr bool from_Z = true, rows = false;
    static __device__ real value(real z) { return z * f_sigmoid::value(z); }
    static __device__ real derivative(real z) {
        const real s = f_sigmoid::value(z);
        return s * (1 + z * (1 - s));
    }
};

struct f_gelu {  // the tanh form: z (1 + tanh(k (z + c z^3))) / 2
    static constexpr bool from_Z = true, rows = false;
    static constexpr double k = 0.7978845608028654, c = 0.044715;  // k = sqrt(2 / pi)
    static __device__ real inner(real z) { return tanh(z * (real(k) + real(k * c) * z * z)); }
    static __device__ real value(real z) { return z * (real(0.5) * (1 + inner(z))); }
    static __device__ real derivative(real z) {
        const real t = inner(z), q = z * (real(0.5 * k) + real(1.5 * k * c) * z * z);
        return real(0.5) * (1 + t) + (1 - t * t) * q;
    }
};

struct f_elu {
    static constexpr bool from_Z = false, rows = false;
    static __device__ real value(real z) { return z < 0 ? expm1(z) : z; }
    static __device__ real derivative(real a) { return a < 0 ? a + 1 : real(1); }
};

struct f_softmax {  // acts on whole rows: see rows.cuh
    static constexpr bool rows = true;
};

#ifdef OWN_ACTIVATION
OWN_ACTIVATION
#endif
#ifdef OWN_BELOW
OWN_BELOW
#endif
