// The numbers that a step is judged by: the sum of the costs, and how many samples are predicted right.
//
// out (chunks, 2) of double: for each chunk of rows, sum of w_i C_i (w null: of C_i), and the count. Scores (m, K) are Z[L],
// or A[L] where g is not increasing; targets are labels (m,) or rows T (m, K), the other one null; C, w (m,).
//     LABELS     right where the first largest score is at the label, or at the first largest t_k
//     ONES       right where z_k > 0 agrees with t_k > 1/2 for all k
//     NOTHING    never
// A warp a row, a block of 256 threads a chunk. Bytes moved: 4 m K (float). `add_pairs` adds the chunks in order.
#include "common.cuh"

enum Task { NOTHING, LABELS, ONES };

struct Best {  // a score and where it stands; a NaN beats every number, the first of equals stands
    real score;
    int at;
};
__device__ Best better(Best a, Best b) {
    const bool ties = a.score == b.score || (a.score != a.score && b.score != b.score);
    if (ties) return a.at < b.at ? a : b;
    return a.score > b.score || a.score != a.score ? a : b;
}
__device__ int first_largest(const real* row, int K) {  // of the whole warp's columns, in every lane
    Best best = {-infinity(), K};
    for (int k = threadIdx.x % WARP; k < K; k += WARP) best = better(best, {row[k], k});
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2)
        best = better(best, {__shfl_xor_sync(ALL, best.score, lane), __shfl_xor_sync(ALL, best.at, lane)});
    return best.at;
}

// Adds up the pairs of a block of 256 threads, in a fixed order, into out[0] and out[1].
__device__ void add_block(double cost, double right, double* out) {
    cost = join_row(cost, Sum(), 0.0);
    right = join_row(right, Sum(), 0.0);
    if (threadIdx.x == 0) {
        out[0] = cost;
        out[1] = right;
    }
}

extern "C" __global__ void measure(const real* __restrict__ scores, const long long* __restrict__ labels,
                                   const real* __restrict__ T, const real* __restrict__ C, const real* __restrict__ w,
                                   int task, double* __restrict__ out, long long m, int K, long long chunk_rows) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const long long first = blockIdx.x * chunk_rows, last = first + chunk_rows < m ? first + chunk_rows : m;
    double cost = 0, right = 0;
    for (long long i = first + threadIdx.x; i < last; i += blockDim.x)
        cost += (w ? double(w[i]) : 1.0) * double(C[i]);
    if (task != NOTHING)
        for (long long i = first + warp; i < last; i += blockDim.x / WARP) {
            const real* row = scores + i * K;
            bool hit;
            if (task == LABELS) {
                const int found = first_largest(row, K);
                hit = found == (labels ? labels[i] : first_largest(T + i * K, K));
            } else {
                bool agree = true;
                for (int k = lane; k < K; k += WARP) agree &= (row[k] > 0) == (T[i * K + k] > real(0.5));
                hit = __all_sync(ALL, agree);
            }
            if (lane == 0) right += hit;
        }
    add_block(cost, right, out + 2 * blockIdx.x);
}

extern "C" __global__ void add_pairs(const double* __restrict__ pairs, double* __restrict__ out, int n) {
    double cost = 0, right = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        cost += pairs[2 * i];
        right += pairs[2 * i + 1];
    }
    add_block(cost, right, out);
}
