// The last layer of a step in one launch, where it is narrow: Z[L] = W[L] A[L-1] + b[L], C_i and Delta[L] (outputs.cuh),
// whether the sample is predicted right (right.cuh), and Delta[L-1] = f'(Z[L-1]) ⊙ (W[L]^T Delta[L]).
//
// A (m, n) is A[L-1] in rows of `A_stride`; W (K, n), K up to NARROW; b (K,) or null. Where the last layer is wide, W is
// null and Z (m, K) is the product already; else Z may be null, or gets Z[L]. Targets are labels or rows T (.., K) of
// the data, the other one null, gathered by `order` as in forward.cu; w (m,), or null, then `share` is the weight of
// all. Delta (m, K), null where only C is asked for; C, right (m,); below (m, n), or null, becomes Delta[L-1], with
// `kept` A[L-1] or Z[L-1], whichever f' is taken from, and mask, or null, in rows of `A_stride`. Z and Delta are in
// rows of `stride`. blockDim.x threads share a row, blockDim.y rows a block: (32, ROWS), or (256, 1) for long rows. The
// grid is (blocks, 1, models); then come the distances between models.
#include "outputs.cuh"
#include "right.cuh"
#include "step.cuh"

constexpr int NARROW = 64;  // as in plan.py
constexpr int ROWS = 4;     // likewise
constexpr int AT_ONCE = 8;  // outputs whose sums a warp has under way

// Row `a` of A[L-1] times W, plus b, into z: the warp's lanes share the sum.
template <int N> __device__ void affine_row(const real* a, const real* W, const real* b, real* z, int n, int K) {
    const int packs = n / N;
    for (int k0 = 0; k0 < K; k0 += AT_ONCE) {
        real sum[AT_ONCE] = {};
        for (int c = threadIdx.x; c < packs; c += WARP) {
            const Pack<real, N> x = load<N>(a, c);
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k)
                if (k0 + k < K) {
                    const Pack<real, N> w = load<N>(W + (long long)(k0 + k) * n, c);
#pragma unroll
                    for (int j = 0; j < N; ++j) sum[k] += x.v[j] * w.v[j];
                }
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            sum[k] = join_warp(sum[k], Sum());
            if (k0 + k < K && threadIdx.x == (k0 + k) % WARP) z[k0 + k] = sum[k] + (b ? b[k0 + k] : real(0));
        }
    }
}

// Row of Delta[L-1] from the row d of Delta[L]; whether all of it is within bound.
template <int N>
__device__ bool delta_row(const real* d, const real* W, const real* kept, const real* mask, real* below, real bound,
                          int n, int K) {
    bool usual = true;
    for (int c = threadIdx.x; c < n / N; c += WARP) {
        const Pack<real, N> of_f = load<N>(kept, c);
        Pack<real, N> sum = {};
#pragma unroll 8
        for (int k = 0; k < K; ++k) {
            const Pack<real, N> w = load<N>(W + (long long)k * n, c);
#pragma unroll
            for (int j = 0; j < N; ++j) sum.v[j] += d[k] * w.v[j];
        }
#pragma unroll
        for (int j = 0; j < N; ++j) {
            if (mask) sum.v[j] *= mask[c * N + j];
            sum.v[j] *= BELOW::derivative(of_f.v[j]);
            usual = usual && fabs(sum.v[j]) <= bound;
        }
        store<N>(below, c, sum);
    }
    return usual;
}

template <class G> __device__ void outputs_row(const real* z, real* y, int K) {
    const Outputs<G> of(z, K);
    along(K, [&](int k) { y[k] = of(k); });
}

// Whether the sample is predicted right, the same in all threads of a warp; a block of one row asks its first warp.
__device__ bool is_right(const real* scores, const Targets& t, int task, int K) {
    if (task == NOTHING) return false;
    if (task == ONES) return same_ones<WARP>(scores, t.rows + t.at, K);
    return first_largest<WARP>(scores, K) == (t.label < 0 ? first_largest<WARP>(t.rows + t.at, K) : t.label);
}

extern "C" __global__ __launch_bounds__(256) void head(
    const real* A, int A_stride, const real* W, const real* b, real* Z, const long long* order, int batch,
    const long long* labels, const real* T, const real* w, real share, real smoothing, real parameter, int task,
    int by_output, real* Delta, int stride, real* C, real* right, const real* kept, const real* mask, real* below,
    real bound, real bound_below, unsigned long long* state, int ahead, int m, int n, int K, long long of_theta,
    long long of_work, long long of_order) {
    __shared__ alignas(16) real z_of[ROWS][NARROW], d_of[ROWS][NARROW], y_of[ROWS][NARROW];
    const int model = blockIdx.z;
    const Step step(state, ahead);
    const long long first = batch ? step.first(batch) : 0, work = model * of_work;
    const bool wide = n % WIDE == 0 && aligned<WIDE>(W);
    if (W) W += model * of_theta;
    if (b) b += model * of_theta;
    if (order) order += model * of_order;
    bool usual = true;
    for (long long i = first_row(); i < m; i += row_stride()) {
        const real* a = A + work + i * A_stride;
        real* z = W ? z_of[threadIdx.y] : Z + work + i * stride;
        real* d = W ? d_of[threadIdx.y] : Delta + work + i * stride;
        if (W) {
            __syncwarp();  // the last row's z and d have been read
            if (wide)
                affine_row<WIDE>(a, W, b, z, n, K);
            else
                affine_row<1>(a, W, b, z, n, K);
            __syncwarp();
            if (Z) along(K, [&](int k) { Z[work + i * stride + k] = z[k]; });
        }
        const Targets t = target<COST>(labels, T, order ? order[first + i] : first + i, smoothing, K);
        const real weight = w ? w[work + i] : share;
        const real cost = row_delta<ACTIVATION, COST>(z, t, parameter, weight, d, K);
        if (W && by_output) outputs_row<ACTIVATION>(z, y_of[threadIdx.y], K);
        __syncwarp();
        along(K, [&](int k) {
            usual = usual && fabs(d[k]) <= bound;
            if (W && Delta) Delta[work + i * stride + k] = d[k];
        });
        if (threadIdx.x < WARP) {
            const bool hit = is_right(W && by_output ? y_of[threadIdx.y] : z, t, task, K);
            if (threadIdx.x == 0) {
                C[work + i] = cost;
                right[work + i] = hit;
            }
        }
        usual = usual && fabs(cost) <= real(1e30);
        if (below) {
            const real* drop = mask ? mask + work + i * A_stride : mask;
            const real* of_f = kept + work + i * A_stride;
            real* to = below + work + i * A_stride;
            if (wide)
                usual &= delta_row<WIDE>(d, W, of_f, drop, to, bound_below, n, K);
            else
                usual &= delta_row<1>(d, W, of_f, drop, to, bound_below, n, K);
        }
    }
    step.check(usual);
}
