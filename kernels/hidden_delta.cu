// Delta[l] = f'(Z[l]) ⊙ (W[l+1]^T Delta[l+1]), in place on the product, and db[l] = Delta[l] 1 in the same pass (source 5,
// "Back Propagation Algorithm"; source 3, delta^l; source 4, eq. 27; source 1, "Backpropagation").
//
// Delta (m, n) holds the product W^T Delta before and Delta[l] after; K is A[l] or Z[l], whichever f' is taken from; mask
// (m, n), of dropout, or null. partial (chunks, n) as in sums.cuh, or null. Bytes moved: 3 x 4 m n, 4 x 4 m n with a mask
// (float). Grid (strips of 32 or 128 columns, chunks), block (32, 8).
#include "activations.cuh"
#include "sums.cuh"

template <int N>
__device__ void hidden_delta(const real* K, const real* mask, real* Delta, real* partial, long long m, int n,
                             long long chunk_rows) {
    sum_columns<N>(partial, m, n, chunk_rows, [&](long long i) {
        Pack<real, N> delta = load<N>(Delta, i);
        if (mask) {
            const Pack<real, N> kept = load<N>(mask, i);
#pragma unroll
            for (int j = 0; j < N; ++j) delta.v[j] *= kept.v[j];
        }
        const Pack<real, N> k = load<N>(K, i);
#pragma unroll
        for (int j = 0; j < N; ++j) delta.v[j] *= ACTIVATION::derivative(k.v[j]);
        store<N>(Delta, i, delta);
        return delta;
    });
}

extern "C" __global__ void hidden_delta(const real* __restrict__ K, const real* __restrict__ mask,
                                        real* __restrict__ Delta, real* __restrict__ partial, long long m, int n,
                                        long long chunk_rows) {
    if (n % WIDE == 0 && aligned<WIDE>(K) && aligned<WIDE>(mask) && aligned<WIDE>(Delta))
        hidden_delta<WIDE>(K, mask, Delta, partial, m, n, chunk_rows);
    else
        hidden_delta<1>(K, mask, Delta, partial, m, n, chunk_rows);
}
