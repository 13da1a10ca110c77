// C_i, the cost of each sample, and Delta[L] = w_i dC_i/dZ[L], in one pass over Z[L] (outputs.cuh).
//
// Z, Delta (m, K); C (m,); targets are labels (m,), which stand for one-hot rows, or rows T (m, K), the other one null;
// w (m,), or null, then `share` is the weight of all. `parameter` is Huber's delta. Delta must not be Z. blockDim.x
// threads share a row, blockDim.y rows a block: (32, 8), or (256, 1) for long rows. Bytes moved: 2 x 4 m K, and what
// the rows T hold (float); rows are read again from the cache.
// H100, softmax and cross-entropy with db: 4.3 us at 128 x 10 in two launches, 9.0 us at 8192 x 10 in three: bound by
// launches.
#include "outputs.cuh"

extern "C" __global__ void output_delta(const real* __restrict__ Z, const long long* __restrict__ labels,
                                        const real* __restrict__ T, const real* __restrict__ w, real share,
                                        real smoothing, real parameter, real* __restrict__ Delta,
                                        real* __restrict__ C, long long m, int K) {
    for (long long i = first_row(); i < m; i += row_stride()) {
        const Targets t = target<COST>(labels, T, i, smoothing, K);
        const real cost = row_delta<ACTIVATION, COST>(Z + i * K, t, parameter, w ? w[i] : share, Delta + i * K, K);
        if (threadIdx.x == 0) C[i] = cost;
    }
}
