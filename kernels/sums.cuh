// Sums down the columns of a row-major matrix in fixed order, the bits the same every run: db[l] = Delta[l] 1.
//
// A block of 32 x 8 threads takes a strip of 32 N columns and a chunk of rows; each thread runs down every eighth row, then
// the eight sums of a column are added in order. Where the rows are in several chunks, the chunks' sums are rows themselves,
// summed by a second launch.
#pragma once
#include "common.cuh"

constexpr int DEEP = 8;  // blockDim.y

// partial[chunk, column] = sum over the chunk's rows of value(element); partial may be null, then only `value` happens. The
// grid is (strips, chunks).
template <int N, class Value>
__device__ void sum_columns(real* partial, long long m, int n, long long chunk_rows, Value value) {
    __shared__ real part[DEEP][WARP * N];
    const int columns = n / N, k = threadIdx.y * WARP + threadIdx.x;  // k: the column of the strip that is this thread's to add
    const long long first = blockIdx.y * chunk_rows, last = first + chunk_rows < m ? first + chunk_rows : m;
    for (int strip = blockIdx.x * WARP; strip < columns; strip += gridDim.x * WARP) {
        const int column = strip + threadIdx.x;
        Pack<real, N> total = {};
        if (column < columns)
            for (long long row = first + threadIdx.y; row < last; row += DEEP) {
                const Pack<real, N> x = value(row * columns + column);
#pragma unroll
                for (int j = 0; j < N; ++j) total.v[j] += x.v[j];
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
