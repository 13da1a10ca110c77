// The matrix product of one block, C = A B^T, of which every product of a layer is a case:
//
//     forward            Z[l] = A[l-1] W[l]^T              k runs along the rows of both in memory
//     hidden delta       Delta[l] W[l]                     along the rows of Delta[l], down the columns of W[l]
//     weight gradient    dW[l] = Delta[l]^T A[l-1]         down the columns of both: k counts samples
//
// A block makes ROWS x COLUMNS elements. DEPTH of k at a time are copied to shared memory as they lie in memory, STAGES
// of them under way or in use; out of range they are 0. Rows may be gathered by an index. Bytes are taken as the whole
// numbers that they are, exact in every arithmetic. Every sum has one order. The host defines TILE, a Tile<...>, and
// ARITHMETIC, one of
//
//     ffma      multiply-adds in REAL
//     tf32      tensor cores: operands rounded to 11 bits, sums in float
//     tf32x2    tensor cores: operands as sums of two such numbers, long sums in float: near float's own accuracy
//     bf16      tensor cores: operands rounded to 8 bits, sums in float
#pragma once
#include "arch.cuh"
#include "common.cuh"

enum Way { ALONG, DOWN };  // which way k runs in memory: along rows, or down columns

// What a block makes, and how its warps share that: DEEP of them share the sum over k of one part.
template <int ROWS_, int COLUMNS_, int DEPTH_, int DOWN_, int ACROSS_, int DEEP_, int STAGES_> struct Tile {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, DEPTH = DEPTH_, STAGES = STAGES_;
    static constexpr int WARPS_DOWN = DOWN_, WARPS_ACROSS = ACROSS_, WARPS_DEEP = DEEP_;
    static constexpr int THREADS = WARP * WARPS_DOWN * WARPS_ACROSS * WARPS_DEEP;
    static constexpr int M = ROWS / WARPS_DOWN, N = COLUMNS / WARPS_ACROSS, K = DEPTH / WARPS_DEEP;  // a warp's
    static_assert(M % 16 == 0 && N % 8 == 0 && K % 8 == 0, "a warp's part must be made of whole fragments");
    static_assert(ROWS % 16 == 0 && COLUMNS % 16 == 0 && DEPTH % 16 == 0, "bytes are copied 16 at a time");
};

// A row-major matrix in memory, 0 outside; row r is row rows[first + r] of the data, or first + r without `rows`.
template <class From> struct Matrix {
    const From* data;
    int height, width, stride;
    const long long* rows;
    long long first;
    bool wide;  // 16 bytes in one access

    __device__ Matrix(const From* data, int height, int width, int stride, const long long* rows = nullptr,
                      long long first = 0)
        : data(data), height(height), width(width), stride(stride), rows(rows), first(first),
          wide(stride % (16 / sizeof(From)) == 0 && aligned<16 / sizeof(From)>(data)) {}
    __device__ int row(int r) const { return r < height ? int(rows ? rows[first + r] : first + r) : 0; }
};

// HEIGHT x WIDTH of a matrix in shared memory, where a row takes LD elements. The gap between rows is such that the
// reads of a warp, 8 x 4 numbers, meet in no bank.
template <class From_, Way way, int SIDE, int DEPTH, int THREADS> struct Panel {
    using From = From_;
    static constexpr int HEIGHT = way == ALONG ? SIDE : DEPTH, WIDTH = way == ALONG ? DEPTH : SIDE;
    static constexpr int PER = 16 / sizeof(From), LD = WIDTH + (sizeof(From) == 1 ? 16 : way == ALONG ? 4 : 8);
    static constexpr int ACROSS = WIDTH / PER, COPIES = (HEIGHT * ACROSS + THREADS - 1) / THREADS;
    static constexpr int BYTES = HEIGHT * LD * sizeof(From);
    static constexpr int I = way == ALONG ? LD : 1, K = way == ALONG ? 1 : LD;  // from (i, k) to its neighbours
    static constexpr bool exact = sizeof(From) == 1;  // whole numbers up to 255

    int row[COPIES];  // of the data, for the copies that come next

    template <class F> __device__ __forceinline__ void each(F f) {
#pragma unroll
        for (int j = 0; j < COPIES; ++j) {
            const int p = threadIdx.x + j * THREADS;
            if (HEIGHT * ACROSS % THREADS == 0 || p < HEIGHT * ACROSS) f(row[j], p / ACROSS, p % ACROSS * PER);
        }
    }
    // Finds the rows that the panel from (i, k) on is copied from: memory is far, so this goes before.
    __device__ __forceinline__ void find(const Matrix<From>& from, int i, int k) {
        each([&](int& at, int r, int) { at = from.row((way == ALONG ? i : k) + r); });
    }
    __device__ __forceinline__ void copy(const Matrix<From>& from, int i, int k, From* to) {
        const int row = way == ALONG ? i : k, column = way == ALONG ? k : i;
        each([&](int at, int r, int c) {
            const int there = row + r < from.height ? from.width - column - c : 0;  // elements before the edge
            const From* p = from.data + (long long)at * from.stride + column + c;
            const int elements = there < 0 ? 0 : there < PER ? there : PER;
            if (from.wide)
                copy_async16(to + r * LD + c, elements ? p : from.data, elements * int(sizeof(From)));
            else {
#pragma unroll
                for (int e = 0; e < PER; ++e) to[r * LD + c + e] = e < there ? p[e] : From(0);
            }
        });
    }
};

// The arithmetics: acc += a b^T of a warp's part, M x N over K, a at (i, k) = a[i A::I + k A::K]. In acc[i][j] a lane
// has rows 16 i + g and 16 i + g + 8, columns 8 j + 2 t and 8 j + 2 t + 1, g = lane / 4, t = lane % 4: the tensor
// cores' layout.
template <int M, int N> using Sums = real[M / 16][N / 8][4];

struct ffma {
    static constexpr bool heavy = false;  // of registers
    template <class A, class B, int M, int N, int K>
    static __device__ __forceinline__ void multiply(Sums<M, N>& acc, const typename A::From* a,
                                                    const typename B::From* b, int g, int t) {
#pragma unroll 8
        for (int k = 0; k < K; ++k) {
            real x[M / 8], y[N / 4];
#pragma unroll
            for (int i = 0; i < M / 8; ++i) x[i] = real(a[(8 * i + g) * A::I + k * A::K]);
#pragma unroll
            for (int j = 0; j < N / 4; ++j) y[j] = real(b[(j / 2 * 8 + 2 * t + j % 2) * B::I + k * B::K]);
#pragma unroll
            for (int i = 0; i < M / 8; ++i)
#pragma unroll
                for (int j = 0; j < N / 4; ++j) acc[i / 2][j / 2][i % 2 * 2 + j % 2] += x[i] * y[j];
        }
    }
};

#if defined(CUDA_ON_CPU) || __CUDA_ARCH__ >= 800
// A number as TF32 takes it, and, with `twice`, what that leaves out; an exact one leaves out nothing.
template <bool exact, bool twice> __device__ __forceinline__ void split(float x, unsigned& high, unsigned& low) {
    high = exact ? __float_as_uint(x) : to_tf32(x);
    if (twice && !exact) low = to_tf32(x - __uint_as_float(high));
}

template <bool twice> struct TF32 {
    static constexpr bool heavy = twice;
    template <class A, class B, int M, int N, int K>
    static __device__ __forceinline__ void multiply(Sums<M, N>& acc, const typename A::From* a,
                                                    const typename B::From* b, int g, int t) {
        constexpr int AT_ONCE = twice ? 1 : K / 8;  // more would not leave registers enough
#pragma unroll AT_ONCE
        for (int k = 0; k < K; k += 8) {
            unsigned high[N / 8][2], low[N / 8][2];
#pragma unroll
            for (int j = 0; j < N / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    split<B::exact, twice>(b[(8 * j + g) * B::I + (k + t + 4 * e) * B::K], high[j][e], low[j][e]);
#pragma unroll
            for (int i = 0; i < M / 16; ++i) {
                unsigned of_a[4], rest[4];
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    split<A::exact, twice>(a[(16 * i + g + e % 2 * 8) * A::I + (k + t + e / 2 * 4) * A::K], of_a[e],
                                           rest[e]);
#pragma unroll
                for (int j = 0; j < N / 8; ++j) {
                    if constexpr (twice) {  // tensor cores cut off what their sums cannot hold: long ones are float's
                        real sum[4] = {};
                        if constexpr (!A::exact) mma_tf32_16x8x8(sum, rest, high[j]);
                        if constexpr (!B::exact) mma_tf32_16x8x8(sum, of_a, low[j]);
                        mma_tf32_16x8x8(sum, of_a, high[j]);
#pragma unroll
                        for (int e = 0; e < 4; ++e) acc[i][j][e] += sum[e];
                    } else
                        mma_tf32_16x8x8(acc[i][j], of_a, high[j]);
                }
            }
        }
    }
};
using tf32 = TF32<false>;
using tf32x2 = TF32<true>;

struct bf16 {
    static constexpr bool heavy = false;
    template <class A, class B, int M, int N, int K>
    static __device__ __forceinline__ void multiply(Sums<M, N>& acc, const typename A::From* a,
                                                    const typename B::From* b, int g, int t) {
        static_assert(K % 16 == 0, "a step of bf16 takes 16 of k");
#pragma unroll 1
        for (int k = 0; k < K; k += 16) {
            unsigned of_b[N / 8][2];
#pragma unroll
            for (int j = 0; j < N / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const auto* p = b + (8 * j + g) * B::I + (k + 2 * t + 8 * e) * B::K;
                    of_b[j][e] = pack_bf16(p[0], p[B::K]);
                }
#pragma unroll
            for (int i = 0; i < M / 16; ++i) {
                unsigned of_a[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const auto* p = a + (16 * i + g + e % 2 * 8) * A::I + (k + 2 * t + e / 2 * 8) * A::K;
                    of_a[e] = pack_bf16(p[0], p[A::K]);
                }
#pragma unroll
                for (int j = 0; j < N / 8; ++j) mma_bf16_16x8x16(acc[i][j], of_a, of_b[j]);
            }
        }
    }
};
#endif

// The part of the product that begins at (row, column) of C. `watch(a)` sees each panel of A in shared memory. Then
// `finish(row, column, pair, more)` gets each two neighbours of C, column even, some of them outside of C; `more` is what
// `prepare(row, column)` gave for them, before the product where a thread has few of them. `shared` holds
// `Tile.shared` of plan.py bytes, at a multiple of 16.
//
// What the kernel before this one writes is not touched before pdl_wait. That may be one of the operands: B with
// `early_a`, then prepare comes behind the wait too; else A.
template <class T, Way WAY_A, Way WAY_B, class FromA, class FromB, class Watch, class Prepare, class Finish>
__device__ __forceinline__ void product(unsigned char* shared, const Matrix<FromA>& A, const Matrix<FromB>& B, int row,
                                        int column, int depth, bool early_a, Watch watch, Prepare prepare,
                                        Finish finish) {
    using OfA = Panel<FromA, WAY_A, T::ROWS, T::DEPTH, T::THREADS>;
    using OfB = Panel<FromB, WAY_B, T::COLUMNS, T::DEPTH, T::THREADS>;
    constexpr int STAGES = T::STAGES;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int deep = warp % T::WARPS_DEEP, across = warp / T::WARPS_DEEP % T::WARPS_ACROSS;
    const int down = warp / T::WARPS_DEEP / T::WARPS_ACROSS;
    const int my_row = down * T::M, my_column = across * T::N, my_k = deep * T::K;

    // Which pairs of C a thread finishes: those of its fragments, or, where warps share them, every THREADS-th.
    constexpr bool joined = T::WARPS_DEEP > 1;
    constexpr int ALL_PAIRS = T::ROWS * T::COLUMNS / 2;
    constexpr int PAIRS = joined ? (ALL_PAIRS + T::THREADS - 1) / T::THREADS : T::M / 8 * (T::N / 8);
    constexpr bool EARLY = PAIRS <= 4;
    auto pair_row = [&](int p) {
        return row + (joined ? 2 * (threadIdx.x + p * T::THREADS) / T::COLUMNS : my_row + p / (T::N / 8) * 8 + g);
    };
    auto pair_column = [&](int p) {
        return column + (joined ? 2 * (threadIdx.x + p * T::THREADS) % T::COLUMNS : my_column + p % (T::N / 8) * 8 + 2 * t);
    };
    auto is_pair = [&](int p) { return !joined || ALL_PAIRS % T::THREADS == 0 || threadIdx.x + p * T::THREADS < ALL_PAIRS; };

    OfA a[STAGES];  // of all but the last only the first use counts
    OfB b[STAGES];
    auto of_a = [&](int stage) { return reinterpret_cast<FromA*>(shared + stage * OfA::BYTES); };
    auto of_b = [&](int stage) { return reinterpret_cast<FromB*>(shared + STAGES * OfA::BYTES + stage * OfB::BYTES); };
#pragma unroll
    for (int s = 0; s < STAGES; ++s) {
        a[s].find(A, row, s * T::DEPTH);
        b[s].find(B, column, s * T::DEPTH);
    }
    decltype(prepare(0, 0)) more[EARLY ? PAIRS : 1];
    auto prepare_early = [&] {
        if constexpr (EARLY) {
#pragma unroll
            for (int p = 0; p < PAIRS; ++p)
                if (is_pair(p)) more[p] = prepare(pair_row(p), pair_column(p));
        }
    };
    auto copy_stage = [&](int s, bool of_A) {
        if (s * T::DEPTH >= depth) return;
        if (of_A)
            a[s].copy(A, row, s * T::DEPTH, of_a(s));
        else
            b[s].copy(B, column, s * T::DEPTH, of_b(s));
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) copy_stage(s, early_a);
    if (!early_a) prepare_early();
    pdl_wait();
    pdl_launch();
#pragma unroll
    for (int s = 0; s < STAGES - 1; ++s) {
        copy_stage(s, !early_a);
        copy_async_commit();
    }
    if (early_a) prepare_early();
    Sums<T::M, T::N> acc = {};
    OfA& next_a = a[STAGES - 1];
    OfB& next_b = b[STAGES - 1];
    for (int k = 0, stage = 0; k < depth; k += T::DEPTH, stage = stage + 1 == STAGES ? 0 : stage + 1) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // this stage has landed for all, and the one before is read
        const int ahead = k + (STAGES - 1) * T::DEPTH, free = stage == 0 ? STAGES - 1 : stage - 1;
        if (ahead < depth) {
            next_a.copy(A, row, ahead, of_a(free));
            next_b.copy(B, column, ahead, of_b(free));
            if (WAY_A == DOWN) next_a.find(A, row, ahead + T::DEPTH);
            if (WAY_B == DOWN) next_b.find(B, column, ahead + T::DEPTH);
        }
        copy_async_commit();
        ARITHMETIC::template multiply<OfA, OfB, T::M, T::N, T::K>(
            acc, of_a(stage) + my_row * OfA::I + my_k * OfA::K, of_b(stage) + my_column * OfB::I + my_k * OfB::K, g, t);
        watch(of_a(stage));
    }
    real* sums = reinterpret_cast<real*>(shared);
    if constexpr (joined) {
        __syncthreads();  // the last stage is read
#pragma unroll
        for (int i = 0; i < T::M / 8; ++i)
#pragma unroll
            for (int j = 0; j < T::N / 8; ++j) {
                const Pack<real, 2> pair = {{acc[i / 2][j][i % 2 * 2], acc[i / 2][j][i % 2 * 2 + 1]}};
                const int at = (my_row + 8 * i + g) * T::COLUMNS + my_column + 8 * j + 2 * t;
                store<2>(sums + deep * T::ROWS * T::COLUMNS + at, 0, pair);
            }
        __syncthreads();
    }
#pragma unroll
    for (int p = 0; p < PAIRS; ++p) {
        if (!is_pair(p)) break;
        Pack<real, 2> pair;
        if constexpr (joined) {  // the parts of the sum over k, in their order
            pair = load<2>(sums, threadIdx.x + p * T::THREADS);
#pragma unroll
            for (int part = 1; part < T::WARPS_DEEP; ++part) {
                const Pack<real, 2> x = load<2>(sums + part * T::ROWS * T::COLUMNS, threadIdx.x + p * T::THREADS);
                pair.v[0] += x.v[0];
                pair.v[1] += x.v[1];
            }
        } else {
            const int i = p / (T::N / 8), j = p % (T::N / 8);
            pair = {{acc[i / 2][j][i % 2 * 2], acc[i / 2][j][i % 2 * 2 + 1]}};
        }
        if constexpr (EARLY)
            finish(pair_row(p), pair_column(p), pair, more[p]);
        else
            finish(pair_row(p), pair_column(p), pair, prepare(pair_row(p), pair_column(p)));
    }
}

struct Nothing { __device__ void operator()(const real*) const {} __device__ void operator()(const unsigned char*) const {} };

// A pair, column even, of a row-major matrix of width n, as far as it is in there.
__device__ __forceinline__ Pack<real, 2> get_pair(const real* M, int row, int column, int stride, int n) {
    const real* from = M + (long long)row * stride + column;
    if (column + 1 < n && stride % 2 == 0) return load<2>(from, 0);
    return {{column < n ? from[0] : real(0), column + 1 < n ? from[1] : real(0)}};
}
__device__ __forceinline__ void put_pair(real* M, int row, int column, int stride, int n, const Pack<real, 2>& x) {
    real* to = M + (long long)row * stride + column;
    if (column + 1 < n && stride % 2 == 0)
        store<2>(to, 0, x);
    else {
        if (column < n) to[0] = x.v[0];
        if (column + 1 < n) to[1] = x.v[1];
    }
}
