// Sums down the columns of a row-major matrix in fixed order, the bits the same every run: db[l] = Delta[l] 1.
//
// A block of 32 x 16 threads takes a strip of 32 N columns and a chunk of rows; each thread runs down every sixteenth
// row, then the sixteen sums of a column are added in order. Where the rows are in several chunks, the chunks' sums are
// rows themselves, summed by a second launch.
#pragma once
#include "common.cuh"

constexpr int DEEP = 16;  // blockDim.y
constexpr int AHEAD = 4;  // rows that a thread fetches before it works on the first: memory is far

// partial[chunk, column] = sum over the chunk's rows of work(row, element, fetch(element)), element by element in the
// order of the rows; partial may be null, then only the work happens. The grid is (strips, chunks).
template <int N, class Fetch, class Work>
__device__ void sum_columns(real* partial, long long m, int n, long long chunk_rows, Fetch fetch, Work work) {
    __shared__ real part[DEEP][WARP * N];
    const int columns = n / N, k = threadIdx.y * WARP + threadIdx.x;  // k: the column of the strip that this thread adds up
    const long long first = blockIdx.y * chunk_rows, last = first + chunk_rows < m ? first + chunk_rows : m;
    for (int strip = blockIdx.x * WARP; strip < columns; strip += gridDim.x * WARP) {
        const int column = strip + threadIdx.x;
        Pack<real, N> total = {};
        if (column < columns)
            for (long long row = first + threadIdx.y; row < last; row += DEEP * AHEAD) {
                decltype(fetch(row)) fetched[AHEAD];
#pragma unroll
                for (int a = 0; a < AHEAD; ++a)
                    if (row + a * DEEP < last) fetched[a] = fetch((row + a * DEEP) * columns + column);
#pragma unroll
                for (int a = 0; a < AHEAD; ++a)
                    if (row + a * DEEP < last) {
                        const Pack<real, N> x = work(row + a * DEEP, (row + a * DEEP) * columns + column, fetched[a]);
#pragma unroll
                        for (int j = 0; j < N; ++j) total.v[j] += x.v[j];
                    }
            }
        if (!partial) continue;
        __syncthreads();  // the last strip's sums have been read
#pragma unroll
        for (int j = 0; j < N; ++j) part[threadIdx.y][threadIdx.x * N + j] = total.v[j];
        __syncthreads();
        if (k < WARP * N && strip * N + k < n) {
            real sum = part[0][k];
#pragma unroll
            for (int j = 1; j < DEEP; ++j) sum += part[j][k];
            partial[blockIdx.y * (long long)n + strip * N + k] = sum;
        }
    }
}
