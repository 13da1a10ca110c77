// out_i = w_i / sum_j w_j, the part of each sample in the mean cost of its batch; all 0 where w is.
//
// w, out (m,). One block, so that the sum has one order. Bytes moved: 3 x 4 m (float).
// H100: 1.6 us for 128 (plain CuPy lines 2.7), 3.7 us for 8192 (4.2): bound by its launch.
#include "common.cuh"

extern "C" __global__ void share(const real* w, real* out, long long m) {
    real sum = 0;
    for (long long i = threadIdx.x; i < m; i += blockDim.x) sum += w[i];
    sum = join_row(sum, Sum(), real(0));
    for (long long i = threadIdx.x; i < m; i += blockDim.x) out[i] = sum > 0 ? w[i] / sum : real(0);
}
