// The functions of kernels/arch.cuh for the CPU: what the GPU's instructions do, by the PTX ISA, with the checks of the
// runtime. emulator.h includes it.
#pragma once
#define CUDA_ON_CPU  // leaves out the inline PTX of arch.cuh

namespace cuda_on_cpu {
constexpr unsigned INFINITE = 0x7f800000u, NOT_A_NUMBER = 0x7fffffffu;  // the NaN that conversions make
inline bool is_nan(unsigned float_bits) { return (float_bits & 0x7fffffffu) > INFINITE; }
inline unsigned upper_half(float x) {  // as bf16, to nearest even
    const unsigned word = bits<unsigned>(x);
    return is_nan(word) ? NOT_A_NUMBER >> 16 : (word + 0x7fffu + (word >> 16 & 1)) >> 16;
}

enum Format { TF32, BF16 };
// Always inlined, as the copy below: the runtime is to see the address of the kernel's own line.
__attribute__((always_inline)) inline void multiply(Format format, float (&d)[4], const unsigned (&a)[4],
                                                    const unsigned (&b)[2], Place at) {
    Fragments mine = {{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    multiply_fragments(format == BF16, &mine, at);
    for (int i = 0; i < 4; ++i) d[i] = mine.d[i];
}
}  // namespace cuda_on_cpu

inline unsigned to_tf32(float x) {
    const unsigned word = cuda_on_cpu::bits<unsigned>(x);
    return cuda_on_cpu::is_nan(word) ? cuda_on_cpu::NOT_A_NUMBER : (word + 0x1000u) & ~0x1fffu;
}
inline unsigned pack_bf16(float low, float high) {
    return cuda_on_cpu::upper_half(high) << 16 | cuda_on_cpu::upper_half(low);
}
__attribute__((always_inline)) inline void mma_tf32_16x8x8(float (&d)[4], const unsigned (&a)[4],
                                                           const unsigned (&b)[2], CUDA_ON_CPU_HERE) {
    cuda_on_cpu::multiply(cuda_on_cpu::TF32, d, a, b, at);
}
__attribute__((always_inline)) inline void mma_bf16_16x8x16(float (&d)[4], const unsigned (&a)[4],
                                                            const unsigned (&b)[2], CUDA_ON_CPU_HERE) {
    cuda_on_cpu::multiply(cuda_on_cpu::BF16, d, a, b, at);
}
__attribute__((always_inline)) inline void copy_async16(void* to_shared, const void* from_global,
                                                        int bytes = 16, CUDA_ON_CPU_HERE) {
    cuda_on_cpu::begin_copy(to_shared, from_global, bytes, at);
}
inline void copy_async_commit() { cuda_on_cpu::commit_copies(); }
template <int N> inline void copy_async_wait() {
    static_assert(N >= 0, "a number of groups");
    cuda_on_cpu::land_copies(N);
}
inline void pdl_wait() {}  // a kernel starts when those before it have ended
inline void pdl_launch() {}
