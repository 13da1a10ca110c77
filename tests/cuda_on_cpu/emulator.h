// What a CUDA text sees when g++ compiles it: CUDA's keywords, vector types, barriers, shuffles, atomics, mathematics.
// runtime.cpp runs the kernels: every CUDA thread is a fiber that runs until it meets a barrier. No header of a library
// is included, so that builds are short.
#pragma once

using size_t = decltype(sizeof 0);

// ---- keywords -------------------------------------------------------------------------------------------------------
// __shared__ is not here: the text's declarations of shared variables are rewritten to call shared() below.
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __grid_constant__

// ---- vector types ---------------------------------------------------------------------------------------------------
#define CUDA_ON_CPU_VECTORS(type, name, align2, align4)                                             \
    struct __align__(align2) name##2 { type x, y; };                                                \
    struct name##3 { type x, y, z; };                                                               \
    struct __align__(align4) name##4 { type x, y, z, w; };                                          \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }                                \
    inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                     \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
CUDA_ON_CPU_VECTORS(signed char, char, 2, 4)
CUDA_ON_CPU_VECTORS(unsigned char, uchar, 2, 4)
CUDA_ON_CPU_VECTORS(short, short, 4, 8)
CUDA_ON_CPU_VECTORS(unsigned short, ushort, 4, 8)
CUDA_ON_CPU_VECTORS(int, int, 8, 16)
CUDA_ON_CPU_VECTORS(unsigned, uint, 8, 16)
CUDA_ON_CPU_VECTORS(long long, longlong, 16, 16)
CUDA_ON_CPU_VECTORS(unsigned long long, ulonglong, 16, 16)
CUDA_ON_CPU_VECTORS(float, float, 8, 16)
CUDA_ON_CPU_VECTORS(double, double, 16, 16)
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- what the runtime offers ----------------------------------------------------------------------------------------
namespace cuda_on_cpu {

// A place in a text. As a default argument it is the place of the call, so barriers know where they stand.
struct Place {
    const char* file;
    int line;
    static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

struct Thread {
    uint3 thread, block;
    unsigned lane;
};
extern const Thread* current;  // the fiber that runs now
extern dim3 grid_size, block_size;

enum Vote { COUNT, OR, AND };
int sync_block(int predicate, Vote, Place);
void sync_warp(unsigned mask, Place);
unsigned ballot(unsigned mask, int predicate, Place);
void shuffle(unsigned mask, void* value, size_t size, unsigned from_lane, Place);
void atomic_access(const void*, unsigned size);
struct Fragments {  // a lane's share of the matrices of d += a b
    float d[4];
    unsigned a[4], b[2];
};
void multiply_fragments(bool pairs, Fragments*, Place);  // pairs: of bf16, else tf32
void begin_copy(void* to_shared, const void* from_global, int bytes, Place);
void commit_copies();
void land_copies(int groups_left);
[[noreturn]] void stop(const char* why, Place);

unsigned new_shared_slot();
void* shared_memory(unsigned slot, const char* name, size_t size, unsigned cell);
void* dynamic_shared_memory(const char* name, unsigned cell);

// The unit in which shared memory is checked: a number, or the members of a struct as far as its alignment tells them.
template <class T> struct Cell { static constexpr unsigned size = alignof(T) < 4 || !__is_class(T) ? alignof(T) : 4; };
template <class T, size_t n> struct Cell<T[n]> : Cell<T> {};

// `__shared__ T x[8];` becomes `auto& x = shared<T[8]>("x", [] {});`. The lambda's type differs for each declaration
// and for each instance of a template, so each has its own slot.
template <class A, class Declaration> inline A& shared(const char* name, Declaration) {
    static const unsigned slot = new_shared_slot();
    return *static_cast<A*>(shared_memory(slot, name, sizeof(A), Cell<A>::size));
}
template <class T> inline T* dynamic_shared(const char* name) {
    return static_cast<T*>(dynamic_shared_memory(name, Cell<T>::size));
}

// The C++ signature of a kernel, for the check of arguments, and a call with a pointer to each argument.
struct Parameter {
    char kind;  // as in NumPy: f, i, u, b; V is a struct
    unsigned size;
    bool pointer, writes;
};
struct Kernel {
    void (*call)(void** arguments);
    int count;
    const Parameter* parameters;
};
template <class T, bool structure = __is_class(T)> struct Type {
    static constexpr char kind = T(-1) < T(0) ? 'i' : 'u';
};
template <class T> struct Type<T, true> { static constexpr char kind = 'V'; };
template <> struct Type<bool> { static constexpr char kind = 'b'; };
template <> struct Type<float> { static constexpr char kind = 'f'; };
template <> struct Type<double> { static constexpr char kind = 'f'; };
template <class T> struct Describe {
    using Value = T;
    static constexpr Parameter parameter{Type<T>::kind, sizeof(T), false, false};
};
template <class T> struct Describe<T*> {
    using Value = T*;
    static constexpr Parameter parameter{Type<T>::kind, sizeof(T), true, true};
};
template <class T> struct Describe<const T*> {
    using Value = const T*;
    static constexpr Parameter parameter{Type<T>::kind, sizeof(T), true, false};
};
template <class Signature, Signature* kernel> struct Entry;
template <class... P, void (*kernel)(P...)> struct Entry<void(P...), kernel> {
    struct Next {
        void** argument;
        template <class T> T take() { return *static_cast<T*>(*argument++); }
    };
    struct InOrder {  // braces evaluate from left to right, a call's parentheses in any order
        InOrder(P... p) { kernel(p...); }
    };
    static void call(void** arguments) {
        Next next{arguments};
        InOrder{next.template take<typename Describe<P>::Value>()...};
    }
    static constexpr Parameter parameters[] = {Describe<P>::parameter..., {}};
    static constexpr Kernel description{call, sizeof...(P), parameters};
};

template <class To, class From> inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}
template <bool yes> struct If {};
template <> struct If<true> { using type = double; };
template <class T> struct DoubleForInteger : If<Type<T>::kind == 'i' || Type<T>::kind == 'u'> {};
template <class T> struct Same { using type = T; };
}  // namespace cuda_on_cpu

#ifndef CUDA_ON_CPU_RUNTIME  // what follows would clash with the headers that the runtime includes
extern "C" int printf(const char* format, ...);

#define threadIdx (::cuda_on_cpu::current->thread)
#define blockIdx (::cuda_on_cpu::current->block)
#define blockDim (*const_cast<const dim3*>(&::cuda_on_cpu::block_size))
#define gridDim (*const_cast<const dim3*>(&::cuda_on_cpu::grid_size))
#define warpSize 32

// ---- barriers, votes, shuffles --------------------------------------------------------------------------------------
#define CUDA_ON_CPU_HERE ::cuda_on_cpu::Place at = ::cuda_on_cpu::Place::here()
inline void __syncthreads(CUDA_ON_CPU_HERE) { cuda_on_cpu::sync_block(0, cuda_on_cpu::COUNT, at); }
inline int __syncthreads_count(int p, CUDA_ON_CPU_HERE) { return cuda_on_cpu::sync_block(p, cuda_on_cpu::COUNT, at); }
inline int __syncthreads_or(int p, CUDA_ON_CPU_HERE) { return cuda_on_cpu::sync_block(p, cuda_on_cpu::OR, at); }
inline int __syncthreads_and(int p, CUDA_ON_CPU_HERE) { return cuda_on_cpu::sync_block(p, cuda_on_cpu::AND, at); }
inline void __syncwarp(unsigned mask = ~0u, CUDA_ON_CPU_HERE) { cuda_on_cpu::sync_warp(mask, at); }
inline unsigned __ballot_sync(unsigned mask, int p, CUDA_ON_CPU_HERE) { return cuda_on_cpu::ballot(mask, p, at); }
inline int __any_sync(unsigned mask, int p, CUDA_ON_CPU_HERE) { return cuda_on_cpu::ballot(mask, p, at) != 0; }
inline int __all_sync(unsigned mask, int p, CUDA_ON_CPU_HERE) { return cuda_on_cpu::ballot(mask, !p, at) == 0; }
inline unsigned __activemask() = delete;  // its answer is not fixed on a GPU, so a kernel should not ask

namespace cuda_on_cpu {
template <class T> inline T shuffled(unsigned mask, T value, int from, int width, Place at) {
    static_assert(__is_trivially_copyable(T) && !__is_class(T) && sizeof(T) <= 8, "shuffles take numbers");
    const int lane = current->lane;
    // From a lane outside the group of `width` lanes one gets one's own value.
    shuffle(mask, &value, sizeof value, from >= 0 && from / width == lane / width ? from : lane, at);
    return value;
}
}  // namespace cuda_on_cpu
#define CUDA_ON_CPU_SHUFFLE(name, type, from)                                                                  \
    template <class T> inline T name(unsigned mask, T value, type d, int width = 32, CUDA_ON_CPU_HERE) {       \
        const int lane = cuda_on_cpu::current->lane;                                                           \
        return cuda_on_cpu::shuffled(mask, value, from, width, at);                                            \
    }
CUDA_ON_CPU_SHUFFLE(__shfl_sync, int, lane / width * width + (d & (width - 1)))
CUDA_ON_CPU_SHUFFLE(__shfl_up_sync, unsigned, lane - int(d))
CUDA_ON_CPU_SHUFFLE(__shfl_down_sync, unsigned, lane + int(d))
CUDA_ON_CPU_SHUFFLE(__shfl_xor_sync, int, lane ^ d)

// Fibers change at barriers only, so nothing is left to order here.
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}

// ---- atomics --------------------------------------------------------------------------------------------------------
// Indivisible as they are, for the same reason. The check must not see their plain load and store, hence no_sanitize.
namespace cuda_on_cpu {
template <class T> __attribute__((noinline, no_sanitize("thread"))) T load(const T* p) { return *p; }
template <class T> __attribute__((noinline, no_sanitize("thread"))) void store(T* p, T value) { *p = value; }
}  // namespace cuda_on_cpu
#define CUDA_ON_CPU_ATOMIC(name, parameters, expression)                                                       \
    template <class T> __attribute__((always_inline)) inline T name parameters {                               \
        cuda_on_cpu::atomic_access(p, sizeof(T));                                                              \
        const T old = cuda_on_cpu::load(p);                                                                    \
        cuda_on_cpu::store(p, T(expression));                                                                  \
        return old;                                                                                            \
    }
#define CUDA_ON_CPU_VALUE typename cuda_on_cpu::Same<T>::type
#define CUDA_ON_CPU_UPDATE (T * p, CUDA_ON_CPU_VALUE value)
CUDA_ON_CPU_ATOMIC(atomicAdd, CUDA_ON_CPU_UPDATE, old + value)
CUDA_ON_CPU_ATOMIC(atomicSub, CUDA_ON_CPU_UPDATE, old - value)
CUDA_ON_CPU_ATOMIC(atomicMax, CUDA_ON_CPU_UPDATE, old < value ? value : old)
CUDA_ON_CPU_ATOMIC(atomicMin, CUDA_ON_CPU_UPDATE, value < old ? value : old)
CUDA_ON_CPU_ATOMIC(atomicAnd, CUDA_ON_CPU_UPDATE, old& value)
CUDA_ON_CPU_ATOMIC(atomicOr, CUDA_ON_CPU_UPDATE, old | value)
CUDA_ON_CPU_ATOMIC(atomicXor, CUDA_ON_CPU_UPDATE, old ^ value)
CUDA_ON_CPU_ATOMIC(atomicExch, CUDA_ON_CPU_UPDATE, value)
CUDA_ON_CPU_ATOMIC(atomicInc, CUDA_ON_CPU_UPDATE, old >= value ? 0 : old + 1)
CUDA_ON_CPU_ATOMIC(atomicCAS, (T * p, CUDA_ON_CPU_VALUE expected, CUDA_ON_CPU_VALUE value),
                   old == expected ? value : old)

// ---- mathematics ----------------------------------------------------------------------------------------------------
// In CUDA the overloads for float, double and the integers (as double) stand in the global namespace.
#define CUDA_ON_CPU_MATH1(name)                             \
    extern "C" double name(double);                         \
    extern "C" float name##f(float);                        \
    inline float name(float x) { return name##f(x); }       \
    template <class T> inline typename cuda_on_cpu::DoubleForInteger<T>::type name(T x) { return name(double(x)); }
#define CUDA_ON_CPU_MATH2(name)                             \
    extern "C" double name(double, double);                 \
    extern "C" float name##f(float, float);                 \
    inline float name(float x, float y) { return name##f(x, y); } \
    inline double name(float x, double y) { return name(double(x), y); } \
    inline double name(double x, float y) { return name(x, double(y)); }
CUDA_ON_CPU_MATH1(exp) CUDA_ON_CPU_MATH1(exp2) CUDA_ON_CPU_MATH1(expm1) CUDA_ON_CPU_MATH1(log) CUDA_ON_CPU_MATH1(log2)
CUDA_ON_CPU_MATH1(log10) CUDA_ON_CPU_MATH1(log1p) CUDA_ON_CPU_MATH1(sqrt) CUDA_ON_CPU_MATH1(cbrt) CUDA_ON_CPU_MATH1(sin)
CUDA_ON_CPU_MATH1(cos) CUDA_ON_CPU_MATH1(tan) CUDA_ON_CPU_MATH1(sinh) CUDA_ON_CPU_MATH1(cosh) CUDA_ON_CPU_MATH1(tanh)
CUDA_ON_CPU_MATH1(asin) CUDA_ON_CPU_MATH1(acos) CUDA_ON_CPU_MATH1(atan) CUDA_ON_CPU_MATH1(asinh)
CUDA_ON_CPU_MATH1(acosh) CUDA_ON_CPU_MATH1(atanh) CUDA_ON_CPU_MATH1(erf) CUDA_ON_CPU_MATH1(erfc)
CUDA_ON_CPU_MATH1(lgamma) CUDA_ON_CPU_MATH1(tgamma) CUDA_ON_CPU_MATH1(floor) CUDA_ON_CPU_MATH1(ceil)
CUDA_ON_CPU_MATH1(trunc) CUDA_ON_CPU_MATH1(round) CUDA_ON_CPU_MATH1(rint) CUDA_ON_CPU_MATH1(nearbyint)
CUDA_ON_CPU_MATH1(fabs)
CUDA_ON_CPU_MATH2(pow) CUDA_ON_CPU_MATH2(fmod) CUDA_ON_CPU_MATH2(fmax) CUDA_ON_CPU_MATH2(fmin) CUDA_ON_CPU_MATH2(fdim)
CUDA_ON_CPU_MATH2(atan2) CUDA_ON_CPU_MATH2(hypot) CUDA_ON_CPU_MATH2(copysign) CUDA_ON_CPU_MATH2(nextafter)
CUDA_ON_CPU_MATH2(remainder)
inline float pow(float x, int y) { return powf(x, float(y)); }
inline double pow(double x, int y) { return pow(x, double(y)); }
extern "C" double fma(double, double, double);
extern "C" float fmaf(float, float, float);
inline float fma(float x, float y, float z) { return fmaf(x, y, z); }
extern "C" int abs(int);
inline long abs(long x) { return x < 0 ? -x : x; }
inline long long abs(long long x) { return x < 0 ? -x : x; }
inline float abs(float x) { return fabsf(x); }
inline double abs(double x) { return fabs(x); }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float rsqrt(float x) { return 1.f / sqrtf(x); }
inline double rsqrt(double x) { return 1. / sqrt(x); }
inline bool isfinite(float x) { return __builtin_isfinite(x); }
inline bool isfinite(double x) { return __builtin_isfinite(x); }
inline bool isnan(float x) { return __builtin_isnan(x); }
inline bool isnan(double x) { return __builtin_isnan(x); }
inline bool isinf(float x) { return __builtin_isinf(x); }
inline bool isinf(double x) { return __builtin_isinf(x); }
inline bool signbit(float x) { return __builtin_signbit(x); }
inline bool signbit(double x) { return __builtin_signbit(x); }

#define CUDA_ON_CPU_MIN_MAX(type)                                  \
    inline type min(type a, type b) { return b < a ? b : a; }      \
    inline type max(type a, type b) { return a < b ? b : a; }
CUDA_ON_CPU_MIN_MAX(int)
CUDA_ON_CPU_MIN_MAX(unsigned)
CUDA_ON_CPU_MIN_MAX(long)
CUDA_ON_CPU_MIN_MAX(unsigned long)
CUDA_ON_CPU_MIN_MAX(long long)
CUDA_ON_CPU_MIN_MAX(unsigned long long)
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(double(a), b); }
inline double min(double a, float b) { return fmin(a, double(b)); }
inline double max(float a, double b) { return fmax(double(a), b); }
inline double max(double a, float b) { return fmax(a, double(b)); }

// ---- intrinsics -----------------------------------------------------------------------------------------------------
inline float __int_as_float(int x) { return cuda_on_cpu::bits<float>(x); }
inline int __float_as_int(float x) { return cuda_on_cpu::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_cpu::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_cpu::bits<unsigned>(x); }
inline double __longlong_as_double(long long x) { return cuda_on_cpu::bits<double>(x); }
inline long long __double_as_longlong(double x) { return cuda_on_cpu::bits<long long>(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }
inline int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __saturatef(float x) { return x > 0.f ? x < 1.f ? x : 1.f : 0.f; }
// Named roundings are never fused on a GPU; the same must hold here, so the compiler may not look into them.
#define CUDA_ON_CPU_ROUNDED(name, type, op)          \
    inline type name(type x, type y) {               \
        __asm__("" : "+x"(x), "+x"(y));              \
        type result = x op y;                        \
        __asm__("" : "+x"(result));                  \
        return result;                               \
    }
CUDA_ON_CPU_ROUNDED(__fadd_rn, float, +)
CUDA_ON_CPU_ROUNDED(__fsub_rn, float, -)
CUDA_ON_CPU_ROUNDED(__fmul_rn, float, *)
CUDA_ON_CPU_ROUNDED(__fdiv_rn, float, /)
CUDA_ON_CPU_ROUNDED(__dadd_rn, double, +)
CUDA_ON_CPU_ROUNDED(__dsub_rn, double, -)
CUDA_ON_CPU_ROUNDED(__dmul_rn, double, *)
CUDA_ON_CPU_ROUNDED(__ddiv_rn, double, /)
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline void __stcs(T* p, T value) { *p = value; }
inline void __trap(CUDA_ON_CPU_HERE) { cuda_on_cpu::stop("__trap()", at); }
#define assert(condition) \
    ((condition) ? (void)0 : ::cuda_on_cpu::stop("assertion failed: " #condition, ::cuda_on_cpu::Place::here()))

#include "arch.h"
#endif
