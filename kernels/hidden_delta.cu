// Delta[l] = f'(Z[l]) ⊙ (W[l+1]^T Delta[l+1]), in place on the product, and db[l] = Delta[l] 1 in the same pass (source
// 5, "Back Propagation Algorithm"; source 3, delta^l; source 4, eq. 27; source 1, "Backpropagation").
//
// Delta (m, n) holds the product W^T Delta before and Delta[l] after; K is A[l] or Z[l], whichever f' is taken from;
// mask (m, n), of dropout, or null. partial (chunks, n) as in sums.cuh, or null; `wide`, grid and block as in
// column_sums.cu. Where `rounded` is not null, Delta[l] goes there and nowhere else: as bf16, in rows of `ld`. Bytes
// moved: 3 x 4 m n, 4 x 4 m n with a mask (float).
// H100, ReLU with db: 2.6 us at 128 x 512 (plain CuPy lines 6.6), 72.4 us at 8192 x 2048 (369), 1.15 of a large copy's
// bandwidth.
#include "activations.cuh"
#include "sums.cuh"

template <int N> struct Fetched { Pack<real, N> delta, k, mask; };

template <int N>
__device__ void run(const real* K, const real* mask, real* Delta, real* partial, long long m, int n,
                    long long chunk_rows, unsigned short* rounded, int ld) {
    sum_columns<N>(
        partial, m, n, chunk_rows,
        [&](long long i) {
            Fetched<N> x;
            x.delta = load<N>(Delta, i);
            x.k = load<N>(K, i);
            if (mask) x.mask = load<N>(mask, i);
            return x;
        },
        [&](long long row, long long i, const Fetched<N>& x) {
            Pack<real, N> delta = x.delta;
#pragma unroll
            for (int j = 0; j < N; ++j) {
                if (mask) delta.v[j] *= x.mask.v[j];
                delta.v[j] *= ACTIVATION::derivative(x.k.v[j]);
            }
            if (rounded)
                store_bf16<N>(rounded, i * N + row * (ld - n), delta);
            else
                store<N>(Delta, i, delta);
            return delta;
        });
}

extern "C" __global__ void hidden_delta(const real* __restrict__ K, const real* __restrict__ mask,
                                        real* __restrict__ Delta, real* __restrict__ partial, long long m, int n,
                                        long long chunk_rows, int wide, unsigned short* rounded, int ld) {
    if (wide && aligned<WIDE>(K) && aligned<WIDE>(mask) && aligned<WIDE>(Delta))
        run<WIDE>(K, mask, Delta, partial, m, n, chunk_rows, rounded, ld);
    else
        run<1>(K, mask, Delta, partial, m, n, chunk_rows, rounded, ld);
}
