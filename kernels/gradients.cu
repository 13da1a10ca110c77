// dW[l] = Delta[l] A[l-1]^T and db[l] = Delta[l] 1 of all layers in one launch, and the step of the optimizer on them,
// so that no gradient is ever stored (source 5, "Back Propagation Algorithm"); with RULE undefined they go to `g`.
//
// A block makes one tile of one dW; the blocks of the first column sum db on the way, and one more block adds up what
// the step is judged by: measured[step] = sum of w_i C_i (w null: of C_i), sum of right_i. `layers` says for each what
// layer.. below lists, places counted in reals from the start of `work` or theta. Layer 1 may read the data, of type
// SOURCE, gathered by `order` as in forward.cu. theta, g and the slots begin at the first layer that is trained; `rows`
// are those of update.cu, of `row_size` numbers each. The grid is (tiles + 1, 1, models), then come the distances
// between models in the data, theta and the slots, the workspace, the orders, and the number of steps that `rows` and
// `measured` hold for each.
#include "product.cuh"
#include "step.cuh"
#ifdef RULE
#include "rules.cuh"
#endif

enum { FIRST_TILE, TILES_ACROSS, N_OUT, N_IN, W_AT, B_AT, DELTA_AT, DELTA_STRIDE, A_AT, A_STRIDE, LAYER };  // B_AT may be -1

constexpr int MOST_LAYERS = 8;  // whose table is kept near

__device__ void add_up(const real* C, const real* right, const real* w, double* measured, int m) {
    double cost = 0, hits = 0;
    for (int i = threadIdx.x; i < m; i += blockDim.x) {
        cost += (w ? double(w[i]) : 1.0) * double(C[i]);
        hits += right[i];
    }
    cost = join_row(cost, Sum(), 0.0);
    hits = join_row(hits, Sum(), 0.0);
    if (threadIdx.x == 0) {
        measured[0] = cost;
        measured[1] = hits;
    }
}

// What happens to a gradient: the optimizer's step, or it is stored.
struct Taken {
    real *theta, *g;
    real* slots[3];
    const Step& step;
#ifdef RULE
    RULE rule;
    using Pair = Elements<2>;
#else
    struct Pair {};
#endif

    // The pair at i, i + 1 of theta, in one access where `even`, as far as there are `n` of them.
    __device__ Pair get(long long i, bool even, int n) const {
        Pair x = {};
#ifdef RULE
        if (even)
            x.get(theta, slots, i / 2);
        else
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (e < n) {
                    Elements<1> one;
                    one.get(theta, slots, i + e);
                    x.x.v[e] = one.x.v[0];
#pragma unroll
                    for (int k = 0; k < 3; ++k) x.s[k].v[e] = one.s[k].v[0];
                }
#endif
        return x;
    }
    __device__ void put(long long i, bool even, int n, Pack<real, 2> gradient, Pair x) const {
#ifdef RULE
        if (!step.usual()) return;
        x.step(rule, gradient);
        if (even)
            x.put(theta, slots, i / 2);
        else
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (e < n) {
                    const Elements<1> one = {{{x.x.v[e]}}, {{{x.s[0].v[e]}}, {{x.s[1].v[e]}}, {{x.s[2].v[e]}}}};
                    one.put(theta, slots, i + e);
                }
#else
        if (even)
            store<2>(g, i / 2, gradient);
        else
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (e < n) g[i + e] = gradient.v[e];
#endif
    }
};

template <class From>
__device__ __forceinline__ void layer_tile(unsigned char* shared, const real* work, const long long* layer,
                                           const Matrix<From>& below, int tile, real scale, int m, const Taken& taken) {
    const int n_out = layer[N_OUT], n_in = layer[N_IN], across = layer[TILES_ACROSS];
    const long long at_W = layer[W_AT], at_b = layer[B_AT];
    const int row = tile / across * TILE::ROWS, column = tile % across * TILE::COLUMNS;
    const Matrix<real> delta(work + layer[DELTA_AT], m, n_out, layer[DELTA_STRIDE]);
    // db: GROUPS of threads add up every GROUPS-th row of a panel each; then their sums are joined in order.
    constexpr int LD = Panel<real, DOWN, TILE::ROWS, TILE::DEPTH, TILE::THREADS>::LD;
    constexpr int GROUPS = TILE::THREADS / TILE::ROWS;
    static_assert(GROUPS * TILE::ROWS == TILE::THREADS, "each thread has one column");
    const int group = threadIdx.x / TILE::ROWS, unit = threadIdx.x % TILE::ROWS;
    const bool sums_b = column == 0 && at_b >= 0, even = n_in % 2 == 0;
    real db = 0;
    product<TILE, DOWN, DOWN>(
        shared, delta, below, row, column, m, false,
        [&](const real* panel) {
            if (sums_b) {
#pragma unroll 8
                for (int k = group; k < TILE::DEPTH; k += GROUPS) db += panel[k * LD + unit];
            }
        },
        [&](int i, int j) {
            return i < n_out && j < n_in ? taken.get(at_W + (long long)i * n_in + j, even, n_in - j) : typename Taken::Pair();
        },
        [&](int i, int j, Pack<real, 2> gradient, const typename Taken::Pair& x) {
            if (i >= n_out || j >= n_in) return;
            gradient.v[0] *= scale;
            gradient.v[1] *= scale;
            taken.put(at_W + (long long)i * n_in + j, even, n_in - j, gradient, x);
        });
    if (sums_b) {
        real* parts = reinterpret_cast<real*>(shared);
        __syncthreads();  // the product is read
        parts[threadIdx.x] = db;
        __syncthreads();
        if (threadIdx.x < TILE::ROWS && row + unit < n_out) {
            for (int part = 1; part < GROUPS; ++part) db += parts[part * TILE::ROWS + unit];
            const long long i = at_b + row + unit;
            taken.put(i, false, 1, {{db, 0}}, taken.get(i, false, 1));
        }
    }
}

// Blocks that share a multiprocessor, where their registers do.
constexpr int RESIDENT = TILE::ROWS * TILE::COLUMNS < (ARITHMETIC::heavy ? 2048 : 4096) ? 2 : 1;

extern "C" __global__ __launch_bounds__(TILE::THREADS, RESIDENT) void gradients(
    const long long* layers, int n_layers, int tiles, const SOURCE* data, int data_stride,
    const long long* order, int batch, const real* work, real scale, real* theta, real* g, real* s0, real* s1, real* s2,
    const double* rows, int row_size, long long C, long long right, long long w, double* measured,
    unsigned long long* state, int ahead, int m, long long of_theta, long long of_work, long long of_order,
    long long steps) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int model = blockIdx.z, tile = blockIdx.x;
    const Step step(state, ahead);
    const long long at_work = model * of_work, at = model * of_theta, at_step = model * steps + step.number;
    if (tile == tiles) {
        pdl_wait();
        pdl_launch();
        work += at_work;
        add_up(work + C, work + right, w < 0 ? nullptr : work + w, measured + 2 * at_step, m);
        return;
    }
    const Taken taken = {theta + at, g ? g + at : g, {s0 ? s0 + at : s0, s1 ? s1 + at : s1, s2 ? s2 + at : s2},
                         step
#ifdef RULE
                         , RULE(rows + at_step * row_size + 3)
#endif
    };
    __shared__ long long table[MOST_LAYERS * LAYER];  // fetched at once: memory is far
    const bool fits = n_layers <= MOST_LAYERS;
    if (fits) {
        for (int i = threadIdx.x; i < n_layers * LAYER; i += TILE::THREADS) table[i] = layers[i];
        __syncthreads();
    }
    const long long* layer = fits ? table : layers;
    for (int l = 1; l < n_layers && tile >= layer[LAYER + FIRST_TILE]; ++l) layer += LAYER;
    const int mine = tile - layer[FIRST_TILE], n_in = layer[N_IN];
    work += at_work;
    if (order) order += model * of_order;
    if constexpr (sizeof(SOURCE) == 1) {
        if (layer[A_AT] < 0) {
            const Matrix<SOURCE> batch_of(data, m, n_in, data_stride, order, step.first(batch));
            layer_tile(shared, work, layer, batch_of, mine, scale, m, taken);
            return;
        }
    }
    const bool of_data = layer[A_AT] < 0;
    const real* below = of_data ? reinterpret_cast<const real*>(data) : work + layer[A_AT];
    layer_tile(shared, work, layer,
               Matrix<real>(below, m, n_in, layer[A_STRIDE], of_data ? order : nullptr, of_data ? step.first(batch) : 0), mine,
               real(1), m, taken);
}
