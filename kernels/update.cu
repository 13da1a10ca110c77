// One step of an optimizer over the flat theta, all layers in one launch, unless the run has left the finite numbers.
//
// `survey` looks before the step is taken: the squared norm of the gradient, and whether an element's outcome would be
// infinite or NaN. `update` then takes the step everywhere or nowhere. theta, g and the rule's slots hold n numbers
// each; slots that a rule does without are null. `row` is the step's row of numbers in device memory: t, lr, weight
// decay, then what the rule reads (rules.cuh); nothing of it comes from the host during an epoch. With a `state`
// (step.cuh) `row` is the first of the epoch's rows, of `row_size` numbers, and `measured` the first of its pairs; the
// state's note of a step that is not usual takes the place of `diverged`. Bytes moved by Adam:
// 4 n to survey (8 n with weight decay), 7 x 4 n to update (float), 2 a weight that is rounded.
// H100, Adam: 9.2 us for 784-512-512-10 (plain CuPy lines 50.7), 0.96 of a large copy's bandwidth; 75.5 us for
// 784-2048-2048-10 (348), 1.02 of it.
#include "rules.cuh"
#include "step.cuh"

// A step is about lr, or lr |g|: only greater ones are computed to see where they lead, element by element (NumPy's
// HUGE_STEP is held against the norms, so it looks more often).
constexpr double HUGE = 1e12;

__device__ __forceinline__ bool all_aligned(const real* theta, const real* g, const real* s0, const real* s1,
                                            const real* s2) {
    return aligned<WIDE>(theta) && aligned<WIDE>(g) && aligned<WIDE>(s0) && aligned<WIDE>(s1) && aligned<WIDE>(s2);
}

// norm2[block] = sum of g^2 of the block's elements; stop[block]: whether one of them would leave the finite numbers,
// or the run has already.
extern "C" __global__ void survey(const real* __restrict__ theta, const real* __restrict__ g,
                                  const real* __restrict__ s0, const real* __restrict__ s1, const real* __restrict__ s2,
                                  const double* __restrict__ row, int row_size, unsigned long long* state, int ahead,
                                  const long long* __restrict__ diverged, double* __restrict__ norm2,
                                  int* __restrict__ stop, long long n) {
    if (state) row += Step(state, ahead).number * row_size;
    const RULE rule(row + 3);
    const double lr = row[1], decay = row[2], step = lr > 1 ? lr : 1;
    double sum = 0;
    int bad = state ? !Step(state, ahead).usual() : diverged[0] != 0;
    over(n, all_aligned(theta, g, s0, s1, s2), [&](long long i, auto pack) {
        constexpr int N = sizeof(pack) / sizeof(real);
        const auto gradient = load<N>(g, i);
        real sum_here = 0;
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const long long e = i * N + j;
            const real gj = gradient.v[j];
            sum_here += gj * gj;
            const double reach = 1 + fabs(double(gj)) + (decay != 0 ? decay * fabs(double(theta[e])) : 0.0);
            if (!(step * reach <= HUGE)) {
                real s[3] = {s0 ? s0[e] : real(0), s1 ? s1[e] : real(0), s2 ? s2[e] : real(0)};
                const real after = rule(theta[e], gj, s);
                bad |= !(is_finite(after) && is_finite(s[0]) && is_finite(s[1]) && is_finite(s[2]));
            }
        }
        sum += sum_here;
    });
    sum = join_row(sum, Sum(), 0.0);
    bad = __syncthreads_or(bad);
    if (threadIdx.x == 0) {
        norm2[blockIdx.x] = sum;
        stop[blockIdx.x] = bad;
    }
}

// W[l] of the layers whose products are cuBLASLt's in bf16, rounded for them: for each of `count`, `copies` says where W
// begins in theta, how many elements it has, the length of its rows, where its copy begins, and the length of that one's
// rows.
enum { W_FROM, W_SIZE, W_ROW, COPY_AT, COPY_ROW, OF_COPY };

template <int N>
__device__ __forceinline__ void round_weights(const long long* copies, int count, unsigned short* rounded, long long i,
                                              const Pack<real, N>& theta) {
    for (int l = 0; l < count; ++l, copies += OF_COPY) {
        const long long first = i * N - copies[W_FROM];
        if (first < 0 || first >= copies[W_SIZE]) continue;
        const unsigned width = copies[W_ROW], ld = copies[COPY_ROW];
        unsigned short* to = rounded + copies[COPY_AT];
        if (width == ld || width % N == 0) {
            const long long row = width == ld ? 0 : unsigned(first) / width;
            store_bf16<N>(to, first + row * (ld - width), theta);
        } else {
#pragma unroll
            for (int j = 0; j < N; ++j)
                if (first + j < copies[W_SIZE])
                    to[first + j + unsigned(first + j) / width * (ld - width)] = to_bf16(float(theta.v[j]));
        }
    }
}

// Takes the step, unless the cost or the norm is not finite, or a block of `survey` says stop: then `diverged` is t, if
// it was 0. Every block adds up the `blocks` parts of `survey` itself, all in the same order. With `rounded`, products
// of bf16 find their weights there from then on.
extern "C" __global__ void update(real* __restrict__ theta, const real* __restrict__ g, real* __restrict__ s0,
                                  real* __restrict__ s1, real* __restrict__ s2, const double* __restrict__ row,
                                  int row_size, unsigned long long* state, int ahead,
                                  const double* __restrict__ measured, const double* __restrict__ norm2,
                                  const int* __restrict__ stop, int blocks, long long* __restrict__ diverged,
                                  const long long* __restrict__ copies, int count,
                                  unsigned short* __restrict__ rounded, long long n) {
    if (state) {
        row += Step(state, ahead).number * row_size;
        measured += Step(state, ahead).number * 2;
    }
    double sum = 0;
    int bad = 0;
    for (int i = threadIdx.x; i < blocks; i += blockDim.x) {
        sum += norm2[i];
        bad |= stop[i];
    }
    sum = join_row(sum, Sum(), 0.0);
    if (__syncthreads_or(bad) || !is_finite(real(sum)) || !(fabs(measured[0]) < double(infinity()))) {
        if (blockIdx.x == 0 && threadIdx.x == 0) {
            if (state)
                Step(state, ahead).check(false);
            else if (diverged[0] == 0)
                diverged[0] = (long long)row[0];
        }
        return;
    }
    const RULE rule(row + 3);
    real* const slots[3] = {s0, s1, s2};
    over(n, all_aligned(theta, g, s0, s1, s2), [&](long long i, auto pack) {
        constexpr int N = sizeof(pack) / sizeof(real);
        Elements<N> x;
        x.get(theta, slots, i);
        x.step(rule, load<N>(g, i));
        x.put(theta, slots, i);
        if (rounded) round_weights<N>(copies, count, rounded, i, x.x);
    });
}
