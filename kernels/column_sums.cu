// db = Delta 1: sums down the columns of M (m, n), into partial (chunks, n), one row for each chunk_rows rows of M.
//
// `wide`: whether a thread takes 16 bytes of a row (n is a multiple of them then), or one number. Bytes moved: 4 m n
// read (float). Grid (strips of 32 numbers or accesses, chunks), block (32, 16).
// H100: 2.2 us at 128 x 512 (CuPy's sum 3.1), 26.3 us at 8192 x 2048 (198), 1.05 of a large copy's bandwidth.
#include "sums.cuh"

template <int N> __device__ void run(const real* M, real* partial, long long m, int n, long long chunk_rows) {
    sum_columns<N>(
        partial, m, n, chunk_rows, [&](long long i) { return load<N>(M, i); },
        [](long long, long long, const Pack<real, N>& x) { return x; });
}

extern "C" __global__ void column_sums(const real* __restrict__ M, real* __restrict__ partial, long long m, int n,
                                       long long chunk_rows, int wide) {
    if (wide && aligned<WIDE>(M))
        run<WIDE>(M, partial, m, n, chunk_rows);
    else
        run<1>(M, partial, m, n, chunk_rows);
}
