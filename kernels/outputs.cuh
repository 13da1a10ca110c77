// What a row of outputs costs, and its Delta: C_i and w_i dC_i/dZ[L] from Z[L] and a target (source 5, "Quick recap" and
// softmax regression; source 3, delta^L = sigma'(z^L) ⊙ grad C; source 4, eq. 32).
//
//     softmax, cross-entropy          C_i = ln sum_k exp(z_k) - sum_k t_k z_k                          Delta = y - t
//     sigmoid, binary cross-entropy   C_i = sum_k (step(z_k) - t_k) z_k + ln(1 + exp(-|z_k|))          Delta = y - t
//     any other pair                  G = dC_i/dY;   Delta = g'(Z) ⊙ G,   softmax: Delta = y ⊙ (G - y . G)
//
// Smoothed by e, t stands for (1 - e) t + e / K, under the sigmoid for (1 - e) t + e / 2.
#pragma once
#include "activations.cuh"
#include "costs.cuh"
#include "rows.cuh"

template <class A, class B> constexpr bool same = false;
template <class A> constexpr bool same<A, A> = true;

struct Targets {
    long long label;  // -1 where there are rows
    const real* rows;
    long long at;     // where this sample's row begins
    real keep, rest;  // t -> keep t + rest

    __device__ real operator()(int k) const { return (label < 0 ? rows[at + k] : real(k == label)) * keep + rest; }
};

template <class F> struct Outputs {  // y_k, elementwise
    const real* z;
    __device__ Outputs(const real* z, int) : z(z) {}
    __device__ real operator()(int k) const { return F::value(z[k]); }
};
template <> struct Outputs<f_softmax> : Exponentials { using Exponentials::Exponentials; };

// dC_i/dy_k, and this thread's part of C_i.
template <class Cost, class Y> struct Slope {
    const Y& y;
    const Targets& t;
    real parameter;
    __device__ Slope(const Y& y, const Targets& t, int, real parameter) : y(y), t(t), parameter(parameter) {}
    __device__ real operator()(int k) const { return Cost::derivative(y(k), t(k), parameter); }
    __device__ real cost(int K) const {
        real sum = 0;
        along(K, [&](int k) { sum += Cost::value(y(k), t(k), parameter); });
        return join_row(sum, Sum(), real(0));
    }
};
template <class Y> struct Slope<cost_norm, Y> {  // e / ||e||, and 0 where e = y - t is; no square leaves the range
    const Y& y;
    const Targets& t;
    real largest, root;
    __device__ Slope(const Y& y, const Targets& t, int K, real) : y(y), t(t) {
        largest = 0;
        along(K, [&](int k) { largest = Largest()(largest, real(fabs(this->y(k) - this->t(k)))); });
        largest = join_row(largest, Largest(), real(0));
        root = 0;
        if (largest != 0) {
            along(K, [&](int k) {
                const real e = (this->y(k) - this->t(k)) / largest;
                root += e * e;
            });
        }
        root = sqrt(join_row(root, Sum(), real(0)));
    }
    __device__ real operator()(int k) const { return largest == 0 ? real(0) : (y(k) - t(k)) / largest / root; }
    __device__ real cost(int) const { return largest * root; }
};

// The row's cost; its Delta, times weight, goes to `delta`.
template <class G, class Cost>
__device__ real row_delta(const real* z, const Targets& t, real parameter, real weight, real* delta, int K) {
    if constexpr (same<Cost, cost_cross_entropy>) {
        const Exponentials y(z, K);
        real dot = 0;
        along(K, [&](int k) {  // a label picks its term: 0 times an infinity is none
            if (t.label < 0 || t(k) != 0) dot += t(k) * (z[k] - y.largest);
        });
        along(K, [&](int k) { delta[k] = (y(k) - t(k)) * weight; });
        return log(y.total) - join_row(dot, Sum(), real(0));
    } else if constexpr (same<Cost, cost_binary_cross_entropy>) {
        real sum = 0;
        along(K, [&](int k) {
            sum += (real(z[k] > 0) - t(k)) * z[k] + log1p(exp(-fabs(z[k])));
            delta[k] = (f_sigmoid::value(z[k]) - t(k)) * weight;
        });
        return join_row(sum, Sum(), real(0));
    } else {
        const Outputs<G> y(z, K);
        const Slope<Cost, Outputs<G>> slope(y, t, K, parameter);
        if constexpr (G::rows) {
            real mean = 0;
            along(K, [&](int k) { mean += y(k) * slope(k); });
            mean = join_row(mean, Sum(), real(0));
            along(K, [&](int k) { delta[k] = y(k) * (slope(k) - mean) * weight; });
        } else {
            along(K, [&](int k) { delta[k] = slope(k) * G::derivative(G::from_Z ? z[k] : y(k)) * weight; });
        }
        return slope.cost(K);
    }
}

// The target of a sample: a label, which stands for a one-hot row, or row T + at. K: how many outputs.
template <class Cost>
__device__ Targets target(const long long* labels, const real* T, long long sample, real smoothing, int K) {
    const real classes = same<Cost, cost_binary_cross_entropy> ? 2 : K;
    return {labels ? labels[sample] : -1, T, sample * K, 1 - smoothing, smoothing / classes};
}
