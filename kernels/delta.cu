// Delta[l] = f'(Z[l]) ⊙ (W[l+1]^T Delta[l+1]) (source 5, "Back Propagation Algorithm"; source 3, delta^l; source 4,
// eq. 27), the product and what follows it in one launch.
//
// above (m, k) is Delta[l+1], in rows of `above_stride`; W (k, n) is W[l+1]. K is A[l] or Z[l], whichever f' is taken
// from; mask, of dropout, or null; out (m, n) becomes Delta[l]; all three in rows of `stride` reals. The grid is
// (columns, rows, models), then come the distances between models in theta and the workspace.
#include "activations.cuh"
#include "product.cuh"
#include "step.cuh"

extern "C" __global__ __launch_bounds__(TILE::THREADS, TILE::ROWS * TILE::COLUMNS <= 4096 ? 2 : 1) void delta(
    const real* above, int above_stride, const real* W, const real* K, const real* mask, real* out, int stride,
    real bound, unsigned long long* state, int ahead, int m, int n, int k, long long of_theta, long long of_work) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int model = blockIdx.z, row = blockIdx.y * TILE::ROWS, column = blockIdx.x * TILE::COLUMNS;
    const Step step(state, ahead);
    const Matrix<real> deltas(above + model * of_work, m, k, above_stride);
    const Matrix<real> weights(W + model * of_theta, k, n, n);
    K += model * of_work;
    out += model * of_work;
    if (mask) mask += model * of_work;
    bool usual = true;
    product<TILE, ALONG, DOWN>(
        shared, deltas, weights, row, column, k, false, Nothing(),
        [&](int i, int j) {  // f'(Z), times the mask
            Pack<real, 2> d = {};
            if (i >= m || j >= n) return d;
            d = get_pair(K, i, j, stride, n);
            d.v[0] = ACTIVATION::derivative(d.v[0]);
            d.v[1] = ACTIVATION::derivative(d.v[1]);
            if (mask) {
                const Pack<real, 2> kept = get_pair(mask, i, j, stride, n);
                d.v[0] *= kept.v[0];
                d.v[1] *= kept.v[1];
            }
            return d;
        },
        [&](int i, int j, const Pack<real, 2>& product, const Pack<real, 2>& slope) {
            if (i >= m || j >= n) return;
            const Pack<real, 2> d = {{product.v[0] * slope.v[0], j + 1 < n ? product.v[1] * slope.v[1] : real(0)}};
            usual = usual && fabs(d.v[0]) <= bound && fabs(d.v[1]) <= bound;
            put_pair(out, i, j, stride, n, d);
        });
    step.check(usual);
}
