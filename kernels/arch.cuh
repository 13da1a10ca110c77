#pragma once
// What only some architectures can do, behind plain names, as inline PTX: the body below is for the GPU. The tests run
// kernels on the CPU with a second body of each function, tests/cuda_on_cpu/arch.h, so that nothing else need know of
// the instructions. What an architecture lacks is not declared for it; a text that uses it there does not compile.
#ifndef CUDA_ON_CPU

#if __CUDA_ARCH__ >= 800
// The nearest number with the 10 bits of mantissa that a tensor core reads of it; of two, the one farther from zero.
__device__ __forceinline__ unsigned to_tf32(float x) {
    unsigned rounded;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(x));
    return rounded;
}

// Both rounded to nearest, ties to even; `low` in the lower half.
__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// d += a b, by all 32 lanes of a warp. Of d, 16 x 8, lane 4 i + j holds the columns 2 j and 2 j + 1, of row i in d[0]
// and d[1], of row i + 8 in d[2] and d[3].
//
// tf32: of a, 16 x 8, it holds (i, j), (i + 8, j), (i, j + 4), (i + 8, j + 4); of b, 8 x 8, (j, i) and (j + 4, i).
__device__ __forceinline__ void mma_tf32_16x8x8(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// bf16: as tf32 with pairs in place of numbers; a pair's lower half is the one of the smaller k. So a is 16 x 16, and b
// 16 x 8 with the columns 2 j, 2 j + 1 of a, or rows of b, where tf32 has the one j.
__device__ __forceinline__ void mma_bf16_16x8x16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// Begins to copy 16 bytes, both addresses multiples of 16: the first `bytes` of the source, then zeros. Commit makes a
// group of the copies begun since the last one; wait<N> returns when all but the thread's last N groups have landed.
// Other threads see them after a barrier behind it. Before sm_80 the copy is made at once.
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void copy_async16(void* to_shared, const void* from_global, int bytes = 16) {
    const unsigned to = unsigned(__cvta_generic_to_shared(to_shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to),
                 "l"(__cvta_generic_to_global(from_global)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#else
__device__ __forceinline__ void copy_async16(void* to_shared, const void* from_global, int bytes = 16) {
    if (bytes == 16) {
        *static_cast<uint4*>(to_shared) = *static_cast<const uint4*>(from_global);
        return;
    }
#pragma unroll 1
    for (int i = 0; i < 16; ++i)
        static_cast<unsigned char*>(to_shared)[i] = i < bytes ? static_cast<const unsigned char*>(from_global)[i] : 0;
}
__device__ __forceinline__ void copy_async_commit() {}
template <int N> __device__ __forceinline__ void copy_async_wait() {}
#endif

// Of a kernel launched with programmatic stream serialization: what the kernels before it in the stream wrote may be
// read behind pdl_wait; from pdl_launch on, once every block has come to it or ended, the next kernel may start.
// Elsewhere, and on what is older than sm_90, they do nothing.
__device__ __forceinline__ void pdl_wait() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void pdl_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#endif
