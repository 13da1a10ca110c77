// The matrix product of one block, C = A B^T, of which every product of a layer is a case:
//
//     forward            Z[l] = A[l-1] W[l]^T              k runs along the rows of both in memory
//     hidden delta       Delta[l] W[l]                     along the rows of Delta[l], down the columns of W[l]
//     weight gradient    dW[l] = Delta[l]^T A[l-1]         down the columns of both: k counts samples
//
// A block makes ROWS x COLUMNS elements. DEPTH of k at a time lie in shared memory, twice, so that the next part is
// fetched while this one is multiplied; out of range they are 0. Rows may be gathered by an index, and bytes are taken
// as the integers that they are, exact in every arithmetic. Every sum has one order. The host defines TILE, a Tile<...>,
// and ARITHMETIC, one of
//
//     ffma      multiply-adds in REAL
//     tf32      tensor cores: operands rounded to 11 bits, sums in float
//     tf32x2    tensor cores: operands as sums of two such numbers, near float's own accuracy
//     bf16      tensor cores: operands rounded to 8 bits, sums in float
#pragma once
#include "arch.cuh"
#include "common.cuh"

enum Way { ALONG, DOWN };  // which way k runs in memory: along rows, or down columns

// What a block makes, and how its warps share that: DEEP of them share the sum over k of one part.
template <int ROWS_, int COLUMNS_, int DEPTH_, int DOWN_, int ACROSS_, int DEEP_> struct Tile {
    static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_, DEPTH = DEPTH_;
    static constexpr int WARPS_DOWN = DOWN_, WARPS_ACROSS = ACROSS_, WARPS_DEEP = DEEP_;
    static constexpr int THREADS = WARP * WARPS_DOWN * WARPS_ACROSS * WARPS_DEEP;
    static constexpr int M = ROWS / WARPS_DOWN, N = COLUMNS / WARPS_ACROSS, K = DEPTH / WARPS_DEEP;  // a warp's
    static_assert(M % 16 == 0 && N % 8 == 0 && K % 8 == 0, "a warp's part must be made of whole fragments");
};

// A row-major matrix in memory, 0 outside; row r is row rows[first + r] of the data, or first + r without `rows`.
template <class From> struct Matrix {
    const From* data;
    int height, width, stride;
    const long long* rows;
    long long first;
    bool wide;  // four numbers in one access

    __device__ Matrix(const From* data, int height, int width, int stride, const long long* rows = nullptr,
                      long long first = 0)
        : data(data), height(height), width(width), stride(stride), rows(rows), first(first),
          wide(stride % 4 == 0 && aligned<4>(data)) {}
    __device__ Pack<From, 4> at(int row, int column) const {
        Pack<From, 4> x = {};
        if (row < height && column < width) {
            const From* from = data + (rows ? rows[first + row] : first + row) * stride + column;
            if (wide && column + 4 <= width)
                x = load<4>(from, 0);
            else {
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    if (column + j < width) x.v[j] = from[j];
            }
        }
        return x;
    }
};

// HEIGHT x WIDTH of a matrix on their way through registers to shared memory, where a row takes LD numbers. The gap
// between rows is such that the reads of a warp, 8 x 4 numbers, meet in no bank.
template <class From, int HEIGHT, int WIDTH, int GAP, int THREADS> struct Panel {
    static constexpr int LD = WIDTH + GAP, SIZE = HEIGHT * LD, ACROSS = WIDTH / 4;
    static constexpr int PACKS = (HEIGHT * ACROSS + THREADS - 1) / THREADS;
    Pack<From, 4> x[PACKS];

    template <class F> __device__ void each(F f) {
#pragma unroll
        for (int j = 0; j < PACKS; ++j) {
            const int p = threadIdx.x + j * THREADS;
            if (HEIGHT * ACROSS % THREADS == 0 || p < HEIGHT * ACROSS) f(x[j], p / ACROSS, p % ACROSS * 4);
        }
    }
    __device__ void fetch(const Matrix<From>& from, int row, int column) {
        each([&](Pack<From, 4>& pack, int r, int c) { pack = from.at(row + r, column + c); });
    }
    __device__ void put(real* to) {
        each([&](const Pack<From, 4>& pack, int r, int c) {
            Pack<real, 4> y;
#pragma unroll
            for (int j = 0; j < 4; ++j) y.v[j] = real(pack.v[j]);
            store<4>(to + r * LD + c, 0, y);
        });
    }
};

// An operand's panel, and where element (i, k) of it lies in shared memory.
template <Way way, class From, int SIDE, int DEPTH, int THREADS>
struct Operand : Panel<From, way == ALONG ? SIDE : DEPTH, way == ALONG ? DEPTH : SIDE, way == ALONG ? 4 : 8, THREADS> {
    using Base = Panel<From, way == ALONG ? SIDE : DEPTH, way == ALONG ? DEPTH : SIDE, way == ALONG ? 4 : 8, THREADS>;
    static constexpr int I = way == ALONG ? Base::LD : 1, K = way == ALONG ? 1 : Base::LD;
    static constexpr bool exact = sizeof(From) == 1;  // whole numbers up to 255
    __device__ void fetch(const Matrix<From>& from, int i, int k) {
        Base::fetch(from, way == ALONG ? i : k, way == ALONG ? k : i);
    }
};

// The arithmetics: acc += a b^T of a warp's part, M x N over K, a at (i, k) = a[i A::I + k A::K]. In acc[i][j] a lane
// has rows 16 i + g and 16 i + g + 8, columns 8 j + 2 t and 8 j + 2 t + 1, g = lane / 4, t = lane % 4: the tensor
// cores' layout.
template <int M, int N> using Sums = real[M / 16][N / 8][4];

struct ffma {
    template <class A, class B, int M, int N, int K>
    static __device__ __forceinline__ void multiply(Sums<M, N>& acc, const real* a, const real* b, int g, int t) {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            real x[M / 8], y[N / 4];
#pragma unroll
            for (int i = 0; i < M / 8; ++i) x[i] = a[(8 * i + g) * A::I + k * A::K];
#pragma unroll
            for (int j = 0; j < N / 4; ++j) y[j] = b[(j / 2 * 8 + 2 * t + j % 2) * B::I + k * B::K];
#pragma unroll
            for (int i = 0; i < M / 8; ++i)
#pragma unroll
                for (int j = 0; j < N / 4; ++j) acc[i / 2][j / 2][i % 2 * 2 + j % 2] += x[i] * y[j];
        }
    }
};

#if defined(CUDA_ON_CPU) || __CUDA_ARCH__ >= 800
struct High {  // a number as TF32 takes it
    unsigned high;
    __device__ High(float x, bool = true) : high(to_tf32(x)) {}
};
struct Both {  // and what that leaves out
    unsigned high, low;
    __device__ Both(float x, bool exact) : high(to_tf32(x)), low(exact ? 0u : to_tf32(x - __uint_as_float(high))) {}
};

template <class Number> struct TF32 {
    template <class A, class B, int M, int N, int K>
    static __device__ __forceinline__ void multiply(Sums<M, N>& acc, const real* a, const real* b, int g, int t) {
#pragma unroll
        for (int k = 0; k < K; k += 8) {
            unsigned high[N / 8][2], low[N / 8][2];
#pragma unroll
            for (int j = 0; j < N / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) take(b[(8 * j + g) * B::I + (k + t + 4 * e) * B::K], B::exact, high[j][e], low[j][e]);
#pragma unroll
            for (int i = 0; i < M / 16; ++i) {
                unsigned of_a[4], rest[4];
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    take(a[(16 * i + g + e % 2 * 8) * A::I + (k + t + e / 2 * 4) * A::K], A::exact, of_a[e], rest[e]);
#pragma unroll
                for (int j = 0; j < N / 8; ++j) {
                    if constexpr (twice && !A::exact) mma_tf32_16x8x8(acc[i][j], rest, high[j]);
                    if constexpr (twice && !B::exact) mma_tf32_16x8x8(acc[i][j], of_a, low[j]);
                    mma_tf32_16x8x8(acc[i][j], of_a, high[j]);
                }
            }
        }
    }
    static constexpr bool twice = sizeof(Number) == 8;
    static __device__ __forceinline__ void take(float x, bool exact, unsigned& high, unsigned& low) {
        const Number n(x, exact);
        high = n.high;
        if constexpr (twice) low = n.low;
    }
};
using tf32 = TF32<High>;
using tf32x2 = TF32<Both>;

struct bf16 {
    template <class A, class B, int M, int N, int K>
    static __device__ __forceinline__ void multiply(Sums<M, N>& acc, const real* a, const real* b, int g, int t) {
        static_assert(K % 16 == 0, "a step of bf16 takes 16 of k");
#pragma unroll
        for (int k = 0; k < K; k += 16) {
            unsigned of_b[N / 8][2];
#pragma unroll
            for (int j = 0; j < N / 8; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const real* p = b + (8 * j + g) * B::I + (k + 2 * t + 8 * e) * B::K;
                    of_b[j][e] = pack_bf16(p[0], p[B::K]);
                }
#pragma unroll
            for (int i = 0; i < M / 16; ++i) {
                unsigned of_a[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const real* p = a + (16 * i + g + e % 2 * 8) * A::I + (k + 2 * t + e / 2 * 8) * A::K;
                    of_a[e] = pack_bf16(p[0], p[A::K]);
                }
#pragma unroll
                for (int j = 0; j < N / 8; ++j) mma_bf16_16x8x16(acc[i][j], of_a, of_b[j]);
            }
        }
    }
};
#endif

// How many reals of shared memory a product takes.
template <class T, Way WAY_A, Way WAY_B> __device__ constexpr int shared_size() {
    constexpr int STAGE = Operand<WAY_A, real, T::ROWS, T::DEPTH, T::THREADS>::SIZE +
                          Operand<WAY_B, real, T::COLUMNS, T::DEPTH, T::THREADS>::SIZE;
    constexpr int JOINED = T::WARPS_DEEP > 1 ? T::WARPS_DEEP * T::ROWS * T::COLUMNS : 0;
    return 2 * STAGE > JOINED ? 2 * STAGE : JOINED;
}

// The part of the product that begins at (row, column) of C. `watch(a)` sees each panel of A in shared memory; then
// `finish(row, column, pair)` gets each two neighbours of C, column even, some of them outside of C.
template <class T, Way WAY_A, Way WAY_B, class FromA, class FromB, class Watch, class Finish>
__device__ __forceinline__ void product(real* shared, const Matrix<FromA>& A, const Matrix<FromB>& B, int row,
                                        int column, int depth, Watch watch, Finish finish) {
    using OfA = Operand<WAY_A, FromA, T::ROWS, T::DEPTH, T::THREADS>;
    using OfB = Operand<WAY_B, FromB, T::COLUMNS, T::DEPTH, T::THREADS>;
    constexpr int STAGE = OfA::SIZE + OfB::SIZE;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int deep = warp % T::WARPS_DEEP, across = warp / T::WARPS_DEEP % T::WARPS_ACROSS;
    const int down = warp / T::WARPS_DEEP / T::WARPS_ACROSS;
    const int my_row = down * T::M, my_column = across * T::N, my_k = deep * T::K;
    Sums<T::M, T::N> acc = {};
    OfA a;
    OfB b;
    a.fetch(A, row, 0);
    b.fetch(B, column, 0);
    a.put(shared);
    b.put(shared + OfA::SIZE);
    __syncthreads();
    for (int k = 0, stage = 0; k < depth; k += T::DEPTH, stage ^= 1) {
        const real* now = shared + stage * STAGE;
        const bool more = k + T::DEPTH < depth;
        if (more) {
            a.fetch(A, row, k + T::DEPTH);
            b.fetch(B, column, k + T::DEPTH);
        }
        ARITHMETIC::template multiply<OfA, OfB, T::M, T::N, T::K>(
            acc, now + my_row * OfA::I + my_k * OfA::K, now + OfA::SIZE + my_column * OfB::I + my_k * OfB::K, g, t);
        watch(now);
        if (more) {
            a.put(shared + (stage ^ 1) * STAGE);
            b.put(shared + (stage ^ 1) * STAGE + OfA::SIZE);
        }
        __syncthreads();
    }
    if constexpr (T::WARPS_DEEP == 1) {
#pragma unroll
        for (int i = 0; i < T::M / 8; ++i)
#pragma unroll
            for (int j = 0; j < T::N / 8; ++j) {
                const Pack<real, 2> pair = {{acc[i / 2][j][i % 2 * 2], acc[i / 2][j][i % 2 * 2 + 1]}};
                finish(row + my_row + 8 * i + g, column + my_column + 8 * j + 2 * t, pair);
            }
    } else {  // the parts of the sum over k are joined in their order
#pragma unroll
        for (int i = 0; i < T::M / 8; ++i)
#pragma unroll
            for (int j = 0; j < T::N / 8; ++j) {
                const Pack<real, 2> pair = {{acc[i / 2][j][i % 2 * 2], acc[i / 2][j][i % 2 * 2 + 1]}};
                const int at = (my_row + 8 * i + g) * T::COLUMNS + my_column + 8 * j + 2 * t;
                store<2>(shared + deep * T::ROWS * T::COLUMNS + at, 0, pair);
            }
        __syncthreads();
        for (int p = threadIdx.x; p < T::ROWS * T::COLUMNS / 2; p += T::THREADS) {
            Pack<real, 2> sum = load<2>(shared, p);
#pragma unroll
            for (int part = 1; part < T::WARPS_DEEP; ++part) {
                const Pack<real, 2> x = load<2>(shared + part * T::ROWS * T::COLUMNS, p);
                sum.v[0] += x.v[0];
                sum.v[1] += x.v[1];
            }
            finish(row + 2 * p / T::COLUMNS, column + 2 * p % T::COLUMNS, sum);
        }
    }
}

struct Nothing { __device__ void operator()(const real*) const {} };

// Writes a pair, column even, of a row-major matrix of width n, as far as it is in there.
__device__ __forceinline__ void put_pair(real* M, int row, int column, int stride, int n, const Pack<real, 2>& x) {
    real* to = M + (long long)row * stride + column;
    if (column + 1 < n && stride % 2 == 0)
        store<2>(to, 0, x);
    else {
        to[0] = x.v[0];
        if (column + 1 < n) to[1] = x.v[1];
    }
}
