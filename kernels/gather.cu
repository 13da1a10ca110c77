// A[0] = data[rows] / 255 of bytes, data[rows] of reals; labels = data[rows] (source 5, "Stochastic gradient descent").
//
// data (samples, n), rows (m,) valid indices, or null for the rows first .. first + m - 1; out (m, n). Bytes moved for
// a batch of 128 x 784: 100 KB read, 401 KB written (float). Divided, not multiplied by 1/255: the same bits as
// NumPy's. `step_gather_..` take the rows of the step that `state` says, by `order` as in forward.cu.
// H100: 2.5 us at 128 x 784 (plain CuPy lines 5.6), 10.1 us at 8192 x 784 (102), 1.31 of the bandwidth of a large copy,
// from L2.
#include "step.cuh"

struct Copy { template <class T> __device__ T operator()(T x) const { return x; } };
struct Scale { __device__ real operator()(unsigned char x) const { return real(x) / real(255); } };

// Each thread moves N neighbours of a row.
template <int N, class From, class To, class Change>
__device__ void gather(const From* data, const long long* rows, long long first, To* out, long long m, int n, Change change) {
    const int columns = n / N;
    for (Walk at(columns); at.row < m; at.step()) {
        const long long row = rows ? rows[at.row] : first + at.row;
        const Pack<From, N> x = load<N>(data, row * columns + at.column);
        Pack<To, N> y;
#pragma unroll
        for (int j = 0; j < N; ++j) y.v[j] = change(x.v[j]);
        store<N>(out, at.i, y);
    }
}

extern "C" __global__ void gather_bytes(const unsigned char* __restrict__ data, const long long* __restrict__ rows,
                                        long long first, real* __restrict__ out, long long m, int n) {
    if (n % WIDE == 0 && aligned<WIDE>(data) && aligned<WIDE>(out))
        gather<WIDE>(data, rows, first, out, m, n, Scale());
    else
        gather<1>(data, rows, first, out, m, n, Scale());
}

extern "C" __global__ void gather_reals(const real* __restrict__ data, const long long* __restrict__ rows,
                                        long long first, real* __restrict__ out, long long m, int n) {
    if (n % WIDE == 0 && aligned<WIDE>(data) && aligned<WIDE>(out))
        gather<WIDE>(data, rows, first, out, m, n, Copy());
    else
        gather<1>(data, rows, first, out, m, n, Copy());
}

extern "C" __global__ void gather_labels(const long long* __restrict__ data, const long long* __restrict__ rows,
                                         long long first, long long* __restrict__ out, long long m, int n) {
    gather<1>(data, rows, first, out, m, n, Copy());
}

extern "C" __global__ void step_gather_bytes(const unsigned char* data, const long long* order, int batch, real* out,
                                             unsigned long long* state, int ahead, long long m, int n, long long of_work,
                                             long long of_order) {
    const long long first = Step(state, ahead).first(batch);
    const long long* rows = order ? order + blockIdx.z * of_order + first : nullptr;
    out += blockIdx.z * of_work;
    if (n % WIDE == 0 && aligned<WIDE>(data) && aligned<WIDE>(out))
        gather<WIDE>(data, rows, first, out, m, n, Scale());
    else
        gather<1>(data, rows, first, out, m, n, Scale());
}

extern "C" __global__ void step_gather_reals(const real* data, const long long* order, int batch, real* out,
                                             unsigned long long* state, int ahead, long long m, int n, long long of_work,
                                             long long of_order) {
    const long long first = Step(state, ahead).first(batch);
    const long long* rows = order ? order + blockIdx.z * of_order + first : nullptr;
    out += blockIdx.z * of_work;
    if (n % WIDE == 0 && aligned<WIDE>(data) && aligned<WIDE>(out))
        gather<WIDE>(data, rows, first, out, m, n, Copy());
    else
        gather<1>(data, rows, first, out, m, n, Copy());
}
