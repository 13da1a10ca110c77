// Z[l] = W[l] A[l-1] + b[l], A[l] = f(Z[l]) (source 5, "Forward propagation algorithm"; source 4, eqs. 2-3), one launch.
//
// A (m, k) is A[l-1], or the data, from which the step's rows are gathered by `order`: `batch` a step, in the data's own
// order where `order` is null and `batch` is not 0. Bytes count as they are, `scale` is 1 / 255 then. W (n, k); b (n,)
// or null; Z and F = f(Z) (m, n) in rows of `stride` reals; Z may be F, then only F is left in it. The grid is
// (columns, rows, models); then come the distances between models in `data`, theta, the workspace and the orders.
#include "activations.cuh"
#include "product.cuh"
#include "step.cuh"

extern "C" __global__ __launch_bounds__(TILE::THREADS, TILE::ROWS * TILE::COLUMNS <= 4096 ? 2 : 1) void forward(
    const SOURCE* A, int A_stride, const long long* order, int batch, const real* W, const real* b, real* Z, real* F,
    int stride, real scale, real bound, unsigned long long* state, int ahead, int m, int n, int k, long long of_A,
    long long of_theta, long long of_work, long long of_order) {
    extern __shared__ __align__(16) unsigned char shared[];
    const int model = blockIdx.z, row = blockIdx.y * TILE::ROWS, column = blockIdx.x * TILE::COLUMNS;
    const Step step(state, ahead);
    const Matrix<SOURCE> below(A + model * of_A, m, k, A_stride, order ? order + model * of_order : order,
                               batch ? step.first(batch) : 0);
    const Matrix<real> weights(W + model * of_theta, n, k, k);
    const real* bias = b ? b + model * of_theta : b;
    Z += model * of_work;
    F += model * of_work;
    bool usual = true;
    product<TILE, ALONG, ALONG>(
        shared, below, weights, row, column, k, batch != 0, Nothing(),
        [&](int, int j) { return bias ? get_pair(bias, 0, j, 0, n) : Pack<real, 2>(); },
        [&](int i, int j, const Pack<real, 2>& product, const Pack<real, 2>& of_b) {
            if (i >= m || j >= n) return;
            Pack<real, 2> z, f = {};
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                z.v[e] = product.v[e] * scale + of_b.v[e];
                if (j + e < n) {
                    f.v[e] = ACTIVATION::value(z.v[e]);
                    usual = usual && fabs(z.v[e]) <= bound && fabs(f.v[e]) <= bound;
                }
            }
            if (Z != F) put_pair(Z, i, j, stride, n, z);
            put_pair(F, i, j, stride, n, f);
        });
    step.check(usual);
}
