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
//     tf32x2    tensor cores: operands as sums of two such numbers, near float's own accuracy
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
    const int* near = nullptr;  // where the first n_near rows are, already looked up
    int n_near = 0;

    __device__ Matrix(const From* data, int height, int width, int stride, const long long* rows = nullptr,
                      long long first = 0)
        : data(data), height(height), width(width), stride(stride), rows(rows), first(first),
          wide(stride % (16 / sizeof(From)) == 0 && aligned<16 / sizeof(From)>(data)) {}
    __device__ __forceinline__ int row(int r) const {
        if (r >= height) return 0;
        return r < n_near ? near[r] : int(rows ? rows[first + r] : first + r);
    }
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

    const From* start[way == ALONG ? COPIES : 1];  // of the rows, where the next panel has the same as this one
    bool there[way == ALONG ? COPIES : 1];         // whether they are

    template <class F> static __device__ __forceinline__ void each(F f) {
#pragma unroll
        for (int j = 0; j < COPIES; ++j) {
            const int p = threadIdx.x + j * THREADS;
            if (HEIGHT * ACROSS % THREADS == 0 || p < HEIGHT * ACROSS) f(j, p / ACROSS, p % ACROSS * PER);
        }
    }
    __device__ __forceinline__ Panel(const Matrix<From>& from, int i) {
        if constexpr (way == ALONG)
            each([&](int j, int r, int c) {
                start[j] = from.data + (long long)from.row(i + r) * from.stride + c;
                there[j] = i + r < from.height;
            });
    }
    // Begins to copy the panel from (i, k) on.
    __device__ __forceinline__ void copy(const Matrix<From>& from, int i, int k, From* to) const {
        each([&](int j, int r, int c) {
            int elements;  // before the edge
            const From* p;
            if constexpr (way == ALONG) {
                elements = there[j] ? from.width - k - c : 0;
                p = start[j] + k;
            } else {
                elements = k + r < from.height ? from.width - i - c : 0;
                p = from.data + (long long)from.row(k + r) * from.stride + i + c;
            }
            elements = elements < 0 ? 0 : elements < PER ? elements : PER;
            if (elements == 0) p = from.data;
            if (from.wide)
                copy_async16(to + r * LD + c, p, elements * int(sizeof(From)));
            else
#pragma unroll 1
                for (int e = 0; e < PER; ++e) to[r * LD + c + e] = e < elements ? p[e] : From(0);
        });
    }
};

// The arithmetics: acc += a b^T of a warp's part, M x N over K, a at (i, k) = a[i A::I + k A::K]. In acc[i][j] a lane
// has rows 16 i + g and 16 i + g + 8, columns 8 j + 2 t and 8 j + 2 t + 1, g = lane / 4, t = lane % 4: the tensor
// cores' layout.
template <int M, int N> using Sums = real[M / 16][N / 8][4];

struct ffma {
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
    template <class A, class B, int M, int N, int K>
    static __device__ __forceinline__ void multiply(Sums<M, N>& acc, const typename A::From* a,
                                                    const typename B::From* b, int g, int t) {
#pragma unroll
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
                    if constexpr (twice && !A::exact) mma_tf32_16x8x8(acc[i][j], rest, high[j]);
                    if constexpr (twice && !B::exact) mma_tf32_16x8x8(acc[i][j], of_a, low[j]);
                    mma_tf32_16x8x8(acc[i][j], of_a, high[j]);
                }
            }
        }
    }
};
using tf32 = TF32<false>;
using tf32x2 = TF32<true>;

struct bf16 {
    template <class A, class B, int M, int N, int K>
    static __device__ __forceinline__ void multiply(Sums<M, N>& acc, const typename A::From* a,
                                                    const typename B::From* b, int g, int t) {
        static_assert(K % 16 == 0, "a step of bf16 takes 16 of k");
#pragma unroll
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
// `finish(row, column, quad, more)` gets each four neighbours of C, column a multiple of 4, some of them outside of C;
// `more` is what `prepare(row, column)` gave for them, before the product where a thread has few of them. `shared` holds
// `Tile.shared` of plan.py bytes, at a multiple of 16.
//
// What the kernel before this one writes is not touched before pdl_wait. A is where it is bytes, B and what `prepare`
// reads with `early_b`: they were there before. `waited()` is called behind it.
template <class T, Way WAY_A, Way WAY_B, class FromA, class FromB, class Waited, class Watch, class Prepare, class Finish>
__device__ __forceinline__ void product(unsigned char* shared, const Matrix<FromA>& A, const Matrix<FromB>& B, int row,
                                        int column, int depth, bool early_b, Waited waited, Watch watch,
                                        Prepare prepare, Finish finish) {
    using OfA = Panel<FromA, WAY_A, T::ROWS, T::DEPTH, T::THREADS>;
    using OfB = Panel<FromB, WAY_B, T::COLUMNS, T::DEPTH, T::THREADS>;
    constexpr int STAGES = T::STAGES;
    constexpr bool early_a = OfA::exact;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const int deep = warp % T::WARPS_DEEP, across = warp / T::WARPS_DEEP % T::WARPS_ACROSS;
    const int down = warp / T::WARPS_DEEP / T::WARPS_ACROSS;
    const int my_row = down * T::M, my_column = across * T::N, my_k = deep * T::K;

    // A thread finishes every THREADS-th quad.
    constexpr int ALL_QUADS = T::ROWS * T::COLUMNS / 4, QUADS = (ALL_QUADS + T::THREADS - 1) / T::THREADS;
    constexpr bool EARLY = QUADS <= 2;
    auto quad_row = [&](int q) { return int(threadIdx.x + q * T::THREADS) * 4 / T::COLUMNS; };
    auto quad_column = [&](int q) { return int(threadIdx.x + q * T::THREADS) * 4 % T::COLUMNS; };
    auto is_quad = [&](int q) { return ALL_QUADS % T::THREADS == 0 || threadIdx.x + q * T::THREADS < ALL_QUADS; };
    decltype(prepare(0, 0)) more[EARLY ? QUADS : 1];
    auto prepare_early = [&] {
        if constexpr (EARLY) {
#pragma unroll
            for (int q = 0; q < QUADS; ++q)
                if (is_quad(q)) more[q] = prepare(row + quad_row(q), column + quad_column(q));
        }
    };

    const OfA a(A, row);
    const OfB b(B, column);
    auto of_a = [&](int stage) { return reinterpret_cast<FromA*>(shared + stage * OfA::BYTES); };
    auto of_b = [&](int stage) { return reinterpret_cast<FromB*>(shared + STAGES * OfA::BYTES + stage * OfB::BYTES); };
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; ++s) {
        const int k = s * T::DEPTH;
        if (k >= depth) break;
        if (early_a) a.copy(A, row, k, of_a(s));
        if (!early_a && early_b) b.copy(B, column, k, of_b(s));
    }
    if (early_b) prepare_early();
    pdl_wait();
    pdl_launch();
    waited();
    if (!early_b) prepare_early();
    Sums<T::M, T::N> acc = {};
#pragma unroll 1
    for (int i = 1 - STAGES; i * T::DEPTH < depth; ++i) {
        if (i >= 0) {
            copy_async_wait<STAGES - 2>();
            __syncthreads();  // this stage has landed for all, and the one before is read
        }
        const int k = (i + STAGES - 1) * T::DEPTH, free = (i + STAGES - 1) % STAGES;
        if (k < depth) {
            if (i >= 0 || !early_a) a.copy(A, row, k, of_a(free));
            if (i >= 0 || early_a || !early_b) b.copy(B, column, k, of_b(free));
        }
        copy_async_commit();
        if (i >= 0) {
            const int stage = i % STAGES;
            ARITHMETIC::template multiply<OfA, OfB, T::M, T::N, T::K>(
                acc, of_a(stage) + my_row * OfA::I + my_k * OfA::K, of_b(stage) + my_column * OfB::I + my_k * OfB::K, g,
                t);
            watch(of_a(stage));
        }
    }
    __syncthreads();  // the last stage is read
    constexpr int LD = T::COLUMNS + 8;
    real* sums = reinterpret_cast<real*>(shared);
#pragma unroll
    for (int i = 0; i < T::M / 8; ++i)
#pragma unroll
        for (int j = 0; j < T::N / 8; ++j) {
            const Pack<real, 2> pair = {{acc[i / 2][j][i % 2 * 2], acc[i / 2][j][i % 2 * 2 + 1]}};
            store<2>(sums + (deep * T::ROWS + my_row + 8 * i + g) * LD + my_column + 8 * j + 2 * t, 0, pair);
        }
    __syncthreads();
    auto finish_quad = [&](int q, const decltype(prepare(0, 0))& given) {
        const int r = quad_row(q), c = quad_column(q);
        Pack<real, 4> quad = load<4>(sums + r * LD + c, 0);
#pragma unroll
        for (int part = 1; part < T::WARPS_DEEP; ++part) {  // the parts of the sum over k, in their order
            const Pack<real, 4> x = load<4>(sums + (part * T::ROWS + r) * LD + c, 0);
#pragma unroll
            for (int e = 0; e < 4; ++e) quad.v[e] += x.v[e];
        }
        finish(row + r, column + c, quad, given);
    };
    if constexpr (EARLY) {
#pragma unroll
        for (int q = 0; q < QUADS; ++q)
            if (is_quad(q)) finish_quad(q, more[q]);
    } else {
#pragma unroll 1
        for (int q = 0; q < QUADS; ++q)
            if (is_quad(q)) finish_quad(q, prepare(row + quad_row(q), column + quad_column(q)));
    }
}

struct Nothing {
    __device__ void operator()() const {}
    __device__ void operator()(const real*) const {}
    __device__ void operator()(const unsigned char*) const {}
};

// A quad, column a multiple of 4, of a row-major matrix of width n, as far as it is in there.
__device__ __forceinline__ bool whole_quad(int column, int stride, int n) { return column + 3 < n && stride % 4 == 0; }
__device__ __forceinline__ Pack<real, 4> get_quad(const real* M, int row, int column, int stride, int n) {
    const real* from = M + (long long)row * stride + column;
    if (whole_quad(column, stride, n)) return load<4>(from, 0);
    Pack<real, 4> x;
#pragma unroll
    for (int e = 0; e < 4; ++e) x.v[e] = column + e < n ? from[e] : real(0);
    return x;
}
__device__ __forceinline__ void put_quad(real* M, int row, int column, int stride, int n, const Pack<real, 4>& x) {
    real* to = M + (long long)row * stride + column;
    if (whole_quad(column, stride, n))
        store<4>(to, 0, x);
    else
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (column + e < n) to[e] = x.v[e];
}
