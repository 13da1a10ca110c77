// The table of costs: the part of C_i that one output makes, and its derivative by that output, from the output y and
// its target t. Names and formulas are those of backprop_gpu/costs.py. The two costs of a canonical pair and the norm
// do not fall apart like that: see output_delta.cu. One's own cost is one more struct, written by the host from two
// expressions.
#pragma once
#include "common.cuh"

struct cost_cross_entropy {};

struct cost_binary_cross_entropy {};

struct cost_norm {};

struct cost_squared_error {  // C_i = 1/2 ||y - t||^2
    static __device__ real value(real y, real t, real) { return real(0.5) * ((y - t) * (y - t)); }
    static __device__ real derivative(real y, real t, real) { return y - t; }
};

struct cost_huber {  // c (|e| - c/2) with e = y - t, c = min(|e|, delta): e^2/2 up to delta, straight from there on
    static __device__ real value(real y, real t, real delta) {
        const real e = fabs(y - t), c = e > delta ? delta : e;
        return c * (e - real(0.5) * c);
    }
    static __device__ real derivative(real y, real t, real delta) {
        const real e = y - t;
        return e > delta ? delta : e < -delta ? -delta : e;
    }
};

struct cost_mae {
    static __device__ real value(real y, real t, real) { return fabs(y - t); }
    static __device__ real derivative(real y, real t, real) { return sign(y - t); }
};

#ifdef OWN_COST
OWN_COST
#endif
