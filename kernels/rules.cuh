// The table of optimizers: one step of each rule on one element, from its theta, gradient g and slots s to the next,
// with the names and formulas of backprop_gpu/optimizers.py. A rule is read from the step's row of numbers in device
// memory: the coefficients of the step first, then the settings, in the order that cuda_ops.py writes them.
#pragma once
#include "common.cuh"

struct rule_sgd {  // s[0]: v
    real lr, momentum, decay;
    bool nesterov;
    __device__ rule_sgd(const double* c) : lr(c[0]), momentum(c[1]), decay(c[2]), nesterov(c[3] != 0) {}
    __device__ real operator()(real theta, real g, real* s) const {
        g += decay * theta;
        if (momentum != 0) {
            s[0] = momentum * s[0] + g;
            g = nesterov ? g + momentum * s[0] : s[0];
        }
        return theta - lr * g;
    }
};

struct rule_adagrad {  // s[0]: G
    real rate, decay, eps;
    __device__ rule_adagrad(const double* c) : rate(c[0]), decay(c[1]), eps(c[2]) {}
    __device__ real operator()(real theta, real g, real* s) const {
        g += decay * theta;
        s[0] += g * g;
        return theta - rate * (g / (sqrt(s[0]) + eps));
    }
};

struct rule_rmsprop {  // s[0]: v; s[1]: a, where centered; s[2]: b, where there is momentum
    real lr, alpha, rest, eps, decay, momentum;
    bool centered;
    __device__ rule_rmsprop(const double* c)
        : lr(c[0]), alpha(c[1]), rest(c[2]), eps(c[3]), decay(c[4]), momentum(c[5]), centered(c[6] != 0) {}
    __device__ real operator()(real theta, real g, real* s) const {
        g += decay * theta;
        s[0] = alpha * s[0] + rest * (g * g);
        real v = s[0];
        if (centered) {
            s[1] = alpha * s[1] + rest * g;
            v -= s[1] * s[1];
            v = v < 0 ? real(0) : v;
        }
        real step = g / (sqrt(v) + eps);
        if (momentum != 0) step = s[2] = momentum * s[2] + step;
        return theta - lr * step;
    }
};

struct rule_adadelta {  // s[0]: v; s[1]: D
    real lr, rho, rest, eps, decay;
    __device__ rule_adadelta(const double* c) : lr(c[0]), rho(c[1]), rest(c[2]), eps(c[3]), decay(c[4]) {}
    __device__ real operator()(real theta, real g, real* s) const {
        g += decay * theta;
        s[0] = rho * s[0] + rest * (g * g);
        const real d = g / sqrt(s[0] + eps) * sqrt(s[1] + eps);
        s[1] = rho * s[1] + rest * (d * d);
        return theta - lr * d;
    }
};

struct rule_adam {  // s[0]: m; s[1]: v; s[2]: the largest v, with amsgrad. AdamW is `decoupled`
    real keep, rate, eps, rest1, beta2, rest2, decay;
    bool decoupled, amsgrad;
    __device__ rule_adam(const double* c)
        : keep(c[0]), rate(c[1]), eps(c[2]), rest1(c[3]), beta2(c[4]), rest2(c[5]), decay(c[6]), decoupled(c[7] != 0),
          amsgrad(c[8] != 0) {}
    __device__ real operator()(real theta, real g, real* s) const {
        if (decoupled)
            theta *= keep;
        else
            g += decay * theta;
        s[0] += rest1 * (g - s[0]);
        s[1] = beta2 * s[1] + rest2 * (g * g);
        real v = s[1];
        if (amsgrad) v = s[2] = s[1] > s[2] ? s[1] : s[2];
        return theta - rate * (s[0] / (sqrt(v) + eps));
    }
};

struct rule_nadam {  // s[0]: m; s[1]: v
    real of_m, of_g, rate, eps, rest1, beta2, rest2, decay;
    __device__ rule_nadam(const double* c)
        : of_m(c[0]), of_g(c[1]), rate(c[2]), eps(c[3]), rest1(c[4]), beta2(c[5]), rest2(c[6]), decay(c[7]) {}
    __device__ real operator()(real theta, real g, real* s) const {
        g += decay * theta;
        s[0] += rest1 * (g - s[0]);
        s[1] = beta2 * s[1] + rest2 * (g * g);
        return theta - rate * ((of_g * g + of_m * s[0]) / (sqrt(s[1]) + eps));
    }
};

struct rule_lion {  // s[0]: m
    real keep, lr, beta1, rest1, beta2, rest2;
    __device__ rule_lion(const double* c)
        : keep(c[0]), lr(c[1]), beta1(c[2]), rest1(c[3]), beta2(c[4]), rest2(c[5]) {}
    __device__ real operator()(real theta, real g, real* s) const {
        const real step = lr * sign(beta1 * s[0] + rest1 * g);
        s[0] = beta2 * s[0] + rest2 * g;
        return keep * theta - step;
    }
};

// N neighbours of theta and of the slots, of which some may be null: read, stepped by a rule, written.
template <int N> struct Elements {
    Pack<real, N> x, s[3];

    __device__ __forceinline__ void get(const real* theta, real* const (&slots)[3], long long i) {
        x = load<N>(theta, i);
#pragma unroll
        for (int k = 0; k < 3; ++k) s[k] = slots[k] ? load<N>(slots[k], i) : Pack<real, N>();
    }
    template <class Rule> __device__ __forceinline__ void step(const Rule& rule, const Pack<real, N>& g) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            real mine[3] = {s[0].v[j], s[1].v[j], s[2].v[j]};
            x.v[j] = rule(x.v[j], g.v[j], mine);
#pragma unroll
            for (int k = 0; k < 3; ++k) s[k].v[j] = mine[k];
        }
    }
    __device__ __forceinline__ void put(real* theta, real* const (&slots)[3], long long i) const {
        store<N>(theta, i, x);
#pragma unroll
        for (int k = 0; k < 3; ++k)
            if (slots[k]) store<N>(slots[k], i, s[k]);
    }
};
