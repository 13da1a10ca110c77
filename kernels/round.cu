// Rows rounded to bf16, as operands of cuBLASLt's products: `to` (m, n), in rows of `ld` numbers, from `from` (m, n).
// Bytes moved: 6 m n.
#include "common.cuh"

template <int N> __device__ void round_packs(const real* from, unsigned short* to, long long m, int n, int ld) {
    for (Walk at(n / N); at.row < m; at.step()) store_bf16<N>(to, at.row * ld + at.column * N, load<N>(from, at.i));
}

extern "C" __global__ void round_rows(const real* __restrict__ from, unsigned short* __restrict__ to, long long m, int n,
                                      int ld) {
    if (n % WIDE == 0 && ld % WIDE == 0 && aligned<WIDE>(from) && aligned<WIDE>(to))
        round_packs<WIDE>(from, to, m, n, ld);
    else
        round_packs<1>(from, to, m, n, ld);
}
