// Work on whole rows: blockDim.x threads share a row, a warp or a whole block; a block of warps works on blockDim.y
// rows.
#pragma once
#include "common.cuh"

__device__ __forceinline__ long long first_row() { return (long long)blockIdx.x * blockDim.y + threadIdx.y; }
__device__ __forceinline__ long long row_stride() { return (long long)gridDim.x * blockDim.y; }

// Runs f(k) for the elements k of a row that are this thread's.
template <class F> __device__ __forceinline__ void along(int K, F f) {
    for (int k = threadIdx.x; k < K; k += blockDim.x) f(k);
}

// exp(z_k - largest) over their sum: softmax of a row, which nothing can overflow.
struct Exponentials {
    const real* z;
    real largest, total;

    __device__ Exponentials(const real* z, int K) : z(z) {
        real most = -infinity(), sum = 0;
        along(K, [&](int k) { most = Largest()(most, z[k]); });
        largest = join_row(most, Largest(), -infinity());
        along(K, [&](int k) { sum += exp(z[k] - largest); });
        total = join_row(sum, Sum(), real(0));
    }
    __device__ real operator()(int k) const { return exp(z[k] - largest) / total; }
};
