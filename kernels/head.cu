// The last layer of a step in one launch, where it is narrow: Z[L] = W[L] A[L-1] + b[L], C_i and Delta[L] (outputs.cuh),
// whether the sample is predicted right (right.cuh), and Delta[L-1] = f'(Z[L-1]) ⊙ (W[L]^T Delta[L]).
//
// A (m, n) is A[L-1] in rows of `A_stride`; W (K, n), K up to NARROW; b (K,) or null. Where the last layer is wide, W is
// null and Z (m, K) is the product already; else Z may be null, or gets Z[L]. Targets are labels or rows T (.., K) of
// the data, the other one null, gathered by `order` as in forward.cu; w (m,), or null, then `share` is the weight of
// all. Delta (m, K); C, right (m,); below (m, n), or null, becomes Delta[L-1], with `kept` A[L-1] or Z[L-1], whichever f'
// is taken from, and mask, or null, in rows of `A_stride`; where `rounded` is not null, Delta[L-1] goes there instead, as
// bf16 in rows of `ld`. Z and Delta are in rows of `stride`. With `by_output` the largest output decides what is
// predicted, not the largest z.
//
// A block of 32 x WARPS threads works on ROWS samples: all threads on each product, a warp on each row of outputs; where
// rows are long, (256, 1) on one sample at a time. The grid is (blocks, 1, models); then come the distances between
// models. The host defines ROWS, up to WARPS of them.
#include "arch.cuh"
#include "outputs.cuh"
#include "right.cuh"
#include "step.cuh"

constexpr int NARROW = 64;   // as in plan.py
constexpr int WARPS = 4;     // likewise
constexpr int AT_ONCE = 10;  // outputs whose sums a thread has under way

// z[row][k] = b_k + W_k . a of ROWS samples from a on, by the whole block.
template <int N, class Wait>
__device__ void affine_rows(const real* a, int stride, int rows, const real* W, const real* b, real (*z)[NARROW], int n,
                            int K, Wait wait) {
    __shared__ real parts[WARPS][ROWS][AT_ONCE];
    const int thread = threadIdx.y * WARP + threadIdx.x, packs = n / N;
    for (int k0 = 0; k0 < K; k0 += AT_ONCE) {
        real sum[ROWS][AT_ONCE] = {};
        for (int c0 = 0; c0 < packs; c0 += WARP * WARPS) {
            const int c = c0 + thread;
            Pack<real, N> w[AT_ONCE], x[ROWS];
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k)
                w[k] = c < packs && k0 + k < K ? load<N>(W + (long long)(k0 + k) * n, c) : Pack<real, N>();
            wait();  // the kernel before writes A, not W
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                x[r] = c < packs && r < rows ? load<N>(a + (long long)r * stride, c) : Pack<real, N>();
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int k = 0; k < AT_ONCE; ++k)
#pragma unroll
                    for (int j = 0; j < N; ++j) sum[r][k] += x[r].v[j] * w[k].v[j];
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) sum[r][k] = join_warp(sum[r][k], Sum());
        __syncthreads();  // the last parts are read
        if (threadIdx.x == 0) {
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int k = 0; k < AT_ONCE; ++k) parts[threadIdx.y][r][k] = sum[r][k];
        }
        __syncthreads();
        if (thread < ROWS * AT_ONCE && k0 + thread % AT_ONCE < K) {
            const int r = thread / AT_ONCE, k = thread % AT_ONCE;
            real total = b ? b[k0 + k] : real(0);
#pragma unroll
            for (int warp = 0; warp < WARPS; ++warp) total += parts[warp][r][k];
            z[r][k0 + k] = total;
        }
    }
}

// Rows of Delta[L-1] from those, d, of Delta[L], by the whole block, put(r, c, pack) in their place; whether all of them
// are within bound.
template <int N, class Put>
__device__ bool delta_rows(const real (*d)[NARROW], const real* W, const real* kept, const real* mask, int stride,
                           int rows, real bound, int n, int K, Put put) {
    bool usual = true;
    for (int c = threadIdx.y * WARP + threadIdx.x; c < n / N; c += WARP * WARPS) {
        Pack<real, N> sum[ROWS] = {};
#pragma unroll 5
        for (int k = 0; k < K; ++k) {
            const Pack<real, N> w = load<N>(W + (long long)k * n, c);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int j = 0; j < N; ++j)
                    if (r < rows) sum[r].v[j] += d[r][k] * w.v[j];
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            if (r >= rows) break;
            const Pack<real, N> of_f = load<N>(kept + (long long)r * stride, c);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                if (mask) sum[r].v[j] *= mask[(long long)r * stride + c * N + j];
                sum[r].v[j] *= BELOW::derivative(of_f.v[j]);
                usual = usual && fabs(sum[r].v[j]) <= bound;
            }
            put(r, c, sum[r]);
        }
    }
    return usual;
}

template <class G> __device__ void outputs_row(const real* z, real* y, int K) {
    const Outputs<G> of(z, K);
    along(K, [&](int k) { y[k] = of(k); });
}

// Whether the sample is predicted right, the same in all threads of a warp.
__device__ bool is_right(const real* scores, const Targets& t, int task, int K) {
    if (task == NOTHING) return false;
    if (task == ONES) return same_ones<WARP>(scores, t.rows + t.at, K);
    return first_largest<WARP>(scores, K) == (t.label < 0 ? first_largest<WARP>(t.rows + t.at, K) : t.label);
}

extern "C" __global__ __launch_bounds__(256, 1) void head(
    const real* A, int A_stride, const real* W, const real* b, real* Z, const long long* order, int batch,
    const long long* labels, const real* T, const real* w, real share, real smoothing, real parameter, int task,
    int by_output, real* Delta, int stride, real* C, real* right, const real* kept, const real* mask, real* below,
    unsigned short* rounded, int ld, real bound, real bound_below, unsigned long long* state, int ahead, int m, int n,
    int K, long long of_theta, long long of_work, long long of_order) {
    __shared__ real z_of[ROWS][NARROW];
    __shared__ real d_of[ROWS][NARROW];
    __shared__ real y_of[ROWS][NARROW];
    const int model = blockIdx.z;
    const Step step(state, ahead);
    const long long first = batch ? step.first(batch) : 0, work = model * of_work;
    const bool wide = n % WIDE == 0 && aligned<WIDE>(W);
    const int each = W ? ROWS : blockDim.y, row = threadIdx.y;  // samples of a block at a time; the warp's own
    if (W) W += model * of_theta;
    if (b) b += model * of_theta;
    if (order) order += model * of_order;
    bool usual = true, waited = false;
    for (long long i = (long long)blockIdx.x * each; i < m; i += (long long)gridDim.x * each) {
        const int rows = m - i < each ? m - i : each;
        const long long mine = i + row;
        Targets t = {};
        bool looked_up = false;
        auto wait = [&] {  // meanwhile look up the target: two memory accesses, one after the other
            if (!looked_up && row < rows)
                t = target<COST>(labels, T, order ? order[first + mine] : first + mine, smoothing, K);
            looked_up = true;
            if (!waited) {
                pdl_wait();
                pdl_launch();
            }
            waited = true;
        };
        if (W) {
            __syncthreads();  // the last z and d have been read
            if (wide)
                affine_rows<WIDE>(A + work + i * A_stride, A_stride, rows, W, b, z_of, n, K, wait);
            else
                affine_rows<1>(A + work + i * A_stride, A_stride, rows, W, b, z_of, n, K, wait);
            __syncthreads();
        }
        wait();
        if (row < rows) {
            const real* z = W ? z_of[row] : Z + work + mine * stride;
            real* d = W ? d_of[row] : Delta + work + mine * stride;
            const real cost = row_delta<ACTIVATION, COST>(z, t, parameter, w ? w[work + mine] : share, d, K);
            along(K, [&](int k) {
                usual = usual && fabs(d[k]) <= bound;
                if (W) Delta[work + mine * stride + k] = d[k];
                if (W && Z) Z[work + mine * stride + k] = z[k];
            });
            usual = usual && fabs(cost) <= real(1e30);
            if (W && by_output) {
                outputs_row<ACTIVATION>(z, y_of[row], K);
                __syncwarp();
            }
            if (threadIdx.x < WARP) {
                const bool hit = is_right(W && by_output ? y_of[row] : z, t, task, K);
                if (threadIdx.x == 0) {
                    C[work + mine] = cost;
                    right[work + mine] = hit;
                }
            }
        }
        if (below || rounded) {
            __syncthreads();
            const long long at = work + i * A_stride;
            const real* drop = mask ? mask + at : mask;
            auto put = [&](int r, int c, const auto& x) {
                constexpr int N = sizeof(x) / sizeof(real);
                if (rounded)
                    store_bf16<N>(rounded, (i + r) * ld + c * N, x);
                else
                    store<N>(below + at + (long long)r * A_stride, c, x);
            };
            if (wide)
                usual &= delta_rows<WIDE>(d_of, W, kept + at, drop, A_stride, rows, bound_below, n, K, put);
            else
                usual &= delta_rows<1>(d_of, W, kept + at, drop, A_stride, rows, bound_below, n, K, put);
        }
    }
    step.check(usual);
}
