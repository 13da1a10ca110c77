// What every kernel uses: the number type, 16-byte accesses, walks over vectors and matrices, reductions in fixed
// order. No headers, so that NVRTC needs none. The host defines REAL, float or double, before this text.
#pragma once

using real = REAL;

constexpr int WARP = 32;
constexpr unsigned ALL = 0xffffffffu;
constexpr int WIDE = 16 / sizeof(real);  // reals in a 16-byte access

// N numbers, moved by one access; 16 bytes where they are N = WIDE reals.
template <class T, int N> struct alignas(N * sizeof(T)) Pack { T v[N]; };

template <int N, class T> __device__ __forceinline__ Pack<T, N> load(const T* p, long long i) {
    return reinterpret_cast<const Pack<T, N>*>(p)[i];
}
template <int N, class T> __device__ __forceinline__ void store(T* p, long long i, const Pack<T, N>& x) {
    reinterpret_cast<Pack<T, N>*>(p)[i] = x;
}

// The nearest bf16 of a number, ties to even: the upper half of a float. Wholly in integers, so for every architecture.
__device__ __forceinline__ unsigned short to_bf16(float x) {
    const unsigned bits = __float_as_uint(x);
    return x != x ? 0x7fff : (bits + 0x7fffu + (bits >> 16 & 1)) >> 16;
}
// N numbers rounded to bf16, to p + at, which is a multiple of N.
template <int N> __device__ __forceinline__ void store_bf16(unsigned short* p, long long at, const Pack<real, N>& x) {
    Pack<unsigned short, N> rounded;
#pragma unroll
    for (int j = 0; j < N; ++j) rounded.v[j] = to_bf16(float(x.v[j]));
    store<N>(p, at / N, rounded);
}

// Whether an array starts where an access of N numbers may; a null pointer does.
template <int N, class T> __device__ __forceinline__ bool aligned(const T* p) {
    return reinterpret_cast<unsigned long long>(p) % (N * sizeof(T)) == 0;
}

__device__ __forceinline__ real infinity() { return real(__int_as_float(0x7f800000)); }
__device__ __forceinline__ real not_a_number() { return real(__int_as_float(0x7fc00000)); }
__device__ __forceinline__ bool is_finite(real x) { return fabs(x) < infinity(); }
__device__ __forceinline__ real sign(real x) { return real(x > 0) - real(x < 0); }

// Where a thread stands in a grid-stride walk over the elements of a row-major (rows, columns) matrix. One division a
// thread, none a step.
struct Walk {
    long long i, row, stride, down;
    int column, columns, across;

    __device__ Walk(int columns) : columns(columns) {
        i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
        stride = (long long)gridDim.x * blockDim.x;
        row = i / columns;
        column = int(i % columns);
        down = stride / columns;
        across = int(stride % columns);
    }
    __device__ void step() {
        i += stride;
        row += down;
        column += across;
        if (column >= columns) {
            column -= columns;
            ++row;
        }
    }
};

// Runs f(i, pack) for each i-th pack of n elements, WIDE at a time where every vector is aligned, the rest one by one.
// The empty `pack` says by its type how many.
template <class F> __device__ __forceinline__ void over(long long n, bool wide, F f) {
    const long long start = (long long)blockIdx.x * blockDim.x + threadIdx.x, stride = (long long)gridDim.x * blockDim.x;
    const long long packs = wide ? n / WIDE : 0;
    for (long long i = start; i < packs; i += stride) f(i, Pack<real, WIDE>());
    for (long long i = packs * WIDE + start; i < n; i += stride) f(i, Pack<real, 1>());
}

struct Sum { template <class T> __device__ T operator()(T a, T b) const { return a + b; } };
struct Largest {  // a NaN beats every number
    template <class T> __device__ T operator()(T a, T b) const { return a > b || a != a ? a : b; }
};

// The values of a warp joined, the same bits in every lane.
template <class T, class Join> __device__ __forceinline__ T join_warp(T x, Join join) {
#pragma unroll
    for (int lane = WARP / 2; lane > 0; lane /= 2) x = join(x, __shfl_xor_sync(ALL, x, lane));
    return x;
}

// The values of the threads with one threadIdx.y joined, in every one of them. blockDim.x is 32, or a multiple of it up
// to 1024 where blockDim.y is 1; all threads call it. `none` is what joins without effect.
template <class T, class Join> __device__ __forceinline__ T join_row(T x, Join join, T none) {
    __shared__ T part[WARP];
    x = join_warp(x, join);
    if (blockDim.x > WARP) {
        const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
        __syncthreads();  // the last use of `part` is over
        if (lane == 0) part[warp] = x;
        __syncthreads();
        x = join_warp(lane < warps ? part[lane] : none, join);
    }
    return x;
}
