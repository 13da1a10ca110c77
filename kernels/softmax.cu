// A = softmax(Z), rows: a_k = exp(z_k - max_j z_j) / sum_j exp(z_j - max_j z_j)   (source 5, softmax regression).
//
// Z, A (m, K). blockDim.x threads share a row, blockDim.y rows a block. Bytes moved: 2 x 4 m K (float).
// H100: 1.9 us at 128 x 10 (plain CuPy lines 11.2), 3.1 us at 8192 x 10 (13.2): bound by launches.
#include "rows.cuh"

extern "C" __global__ void softmax(const real* __restrict__ Z, real* __restrict__ A, long long m, int K) {
    for (long long i = first_row(); i < m; i += row_stride()) {
        const Exponentials a(Z + i * K, K);
        along(K, [&](int k) { A[i * K + k] = a(k); });
    }
}
