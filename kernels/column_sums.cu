// db = Delta 1: sums down the columns of M (m, n), into partial (chunks, n), one row for each chunk_rows rows of M.
//
// Bytes moved: 4 m n read (float). Grid (strips of 32 or 128 columns, chunks), block (32, 8).
#include "sums.cuh"

template <int N> __device__ void column_sums(const real* M, real* partial, long long m, int n, long long chunk_rows) {
    sum_columns<N>(partial, m, n, chunk_rows, [&](long long i) { return load<N>(M, i); });
}

extern "C" __global__ void column_sums(const real* __restrict__ M, real* __restrict__ partial, long long m, int n,
                                       long long chunk_rows) {
    if (n % WIDE == 0 && aligned<WIDE>(M))
        column_sums<WIDE>(M, partial, m, n, chunk_rows);
    else
        column_sums<1>(M, partial, m, n, chunk_rows);
}
