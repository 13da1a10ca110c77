// The numbers that a step is judged by: the sum of the costs, and how many samples are predicted right.
//
// out (chunks, 2) of double: for each chunk of rows, sum of w_i C_i (w null: of C_i), and the count. Scores (m, K) are
// Z[L], or A[L] where g is not increasing; targets are labels (m,) or rows T (m, K), the other one null; C, w (m,).
// A block of 256 threads a chunk; a thread a row, or a warp a row where rows are longer than NARROW. Bytes moved: 4 m K
// (float). `add_pairs` adds the chunks in order.
// H100: 3.1 us at 128 x 10 (plain CuPy lines 10.8), 5.2 us at 8192 x 10 (12.2): bound by launches.
#include "right.cuh"

constexpr int NARROW = 64;  // as in cuda_ops.py, which chooses the chunks

// How many of the rows first .. last - 1 are right: this thread's share of the count.
template <int LANES>
__device__ int count_right(const real* scores, const long long* labels, const real* T, int task, long long first,
                           long long last, int K) {
    int right = 0;
    for (long long i = first + threadIdx.x / LANES; i < last; i += blockDim.x / LANES) {
        const real* row = scores + i * K;
        bool hit;
        if (task == LABELS)
            hit = first_largest<LANES>(row, K) == (labels ? labels[i] : first_largest<LANES>(T + i * K, K));
        else
            hit = same_ones<LANES>(row, T + i * K, K);
        right += hit && threadIdx.x % LANES == 0;
    }
    return right;
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
    const long long first = blockIdx.x * chunk_rows, last = first + chunk_rows < m ? first + chunk_rows : m;
    double cost = 0, right = 0;
    for (long long i = first + threadIdx.x; i < last; i += blockDim.x)
        cost += (w ? double(w[i]) : 1.0) * double(C[i]);
    if (task != NOTHING)
        right = K <= NARROW ? count_right<1>(scores, labels, T, task, first, last, K)
                            : count_right<WARP>(scores, labels, T, task, first, last, K);
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
