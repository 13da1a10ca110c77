// Whether a sample is predicted right:
//     LABELS     the first largest score is at the label, or at the first largest t_k
//     ONES       z_k > 0 agrees with t_k > 1/2 for all k
//     NOTHING    never
#pragma once
#include "common.cuh"

enum Task { NOTHING, LABELS, ONES };

struct Best {  // a score and where it stands
    real score;
    int at;
};
__device__ Best better(Best a, Best b) {  // a NaN beats every number; of equals the first
    const bool ties = a.score == b.score || (a.score != a.score && b.score != b.score);
    if (ties) return a.at < b.at ? a : b;
    return a.score > b.score || a.score != a.score ? a : b;
}

// Of a row that LANES neighbours share, in all of them.
template <int LANES> __device__ int first_largest(const real* row, int K) {
    Best best = {-infinity(), K};
    for (int k = threadIdx.x % LANES; k < K; k += LANES) best = better(best, {row[k], k});
#pragma unroll
    for (int lane = LANES / 2; lane > 0; lane /= 2)
        best = better(best, {__shfl_xor_sync(ALL, best.score, lane), __shfl_xor_sync(ALL, best.at, lane)});
    return best.at;
}
template <int LANES> __device__ bool same_ones(const real* row, const real* t, int K) {
    bool agree = true;
    for (int k = threadIdx.x % LANES; k < K; k += LANES) agree &= (row[k] > 0) == (t[k] > real(0.5));
    return LANES == 1 ? agree : __all_sync(ALL, agree);
}
