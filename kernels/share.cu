// out_i = w_i / sum_j w_j, the part of each sample in the mean cost of its batch; all 0 where w is.
//
// w, out (m,). `step_shares` takes the step's weights from those of all samples first, by `order` as in forward.cu; out
// may be null. One block, so that the sum has one order. Bytes moved: 3 x 4 m (float).
// H100: 1.6 us for 128 (plain CuPy lines 2.7), 3.7 us for 8192 (4.2): bound by its launch.
#include "step.cuh"

extern "C" __global__ void share(const real* w, real* out, long long m) {
    real sum = 0;
    for (long long i = threadIdx.x; i < m; i += blockDim.x) sum += w[i];
    sum = join_row(sum, Sum(), real(0));
    for (long long i = threadIdx.x; i < m; i += blockDim.x) out[i] = sum > 0 ? w[i] / sum : real(0);
}

extern "C" __global__ void step_shares(const real* weights, const long long* order, int batch, real* w, real* out,
                                       unsigned long long* state, int ahead, int m, long long of_work,
                                       long long of_order) {
    const long long first = Step(state, ahead).first(batch), of_model = blockIdx.z * of_work;
    real sum = 0;
    for (int i = threadIdx.x; i < m; i += blockDim.x) {
        const real mine = weights[order ? order[blockIdx.z * of_order + first + i] : first + i];
        w[of_model + i] = mine;
        sum += mine;
    }
    sum = join_row(sum, Sum(), real(0));
    if (out)
        for (int i = threadIdx.x; i < m; i += blockDim.x) out[of_model + i] = sum > 0 ? w[of_model + i] / sum : real(0);
}
