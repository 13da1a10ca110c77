// Rows of a matrix, gathered and changed on the way.
#pragma once
#include "common.cuh"

struct Copy { template <class T> __device__ T operator()(T x) const { return x; } };
struct Scale { __device__ real operator()(unsigned char x) const { return real(x) / real(255); } };

// out (m, n), in rows of `ld`, from the rows of the data; each thread moves N neighbours of a row.
template <int N, class From, class To, class Change>
__device__ void gather_packs(const From* data, const long long* rows, long long first, To* out, long long m, int n,
                             int ld, Change change) {
    const int columns = n / N;
    for (Walk at(columns); at.row < m; at.step()) {
        const long long row = rows ? rows[at.row] : first + at.row;
        const Pack<From, N> x = load<N>(data, row * columns + at.column);
        Pack<To, N> y;
#pragma unroll
        for (int j = 0; j < N; ++j) y.v[j] = change(x.v[j]);
        store<N>(out, at.row * (ld / N) + at.column, y);
    }
}

template <class From, class To, class Change>
__device__ void gather(const From* data, const long long* rows, long long first, To* out, long long m, int n, int ld,
                       Change change) {
    if (n % WIDE == 0 && ld % WIDE == 0 && aligned<WIDE>(data) && aligned<WIDE>(out))
        gather_packs<WIDE>(data, rows, first, out, m, n, ld, change);
    else
        gather_packs<1>(data, rows, first, out, m, n, ld, change);
}
