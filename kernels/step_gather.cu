// A[0] = the step's rows of the data (source 5, "Stochastic gradient descent"), where cuBLASLt multiplies with it.
//
// data of type SOURCE, gathered by `order` as in forward.cu; out (m, n) in rows of `ld`, of type TARGET: reals, of bytes
// the 255th part; or bf16, of bytes the whole, which is exact: the product has the 255th part for a factor.
#include "gather.cuh"
#include "step.cuh"

__device__ __forceinline__ void change(real x, real& y) { y = x; }
__device__ __forceinline__ void change(unsigned char x, real& y) { y = Scale()(x); }
template <class From> __device__ __forceinline__ void change(From x, unsigned short& y) { y = to_bf16(float(x)); }

struct Operand {
    template <class From> __device__ TARGET operator()(From x) const {
        TARGET y;
        change(x, y);
        return y;
    }
};

extern "C" __global__ void step_gather(const SOURCE* data, const long long* order, int batch, TARGET* out, int ld,
                                       unsigned long long* state, int ahead, long long m, int n) {
    const long long first = Step(state, ahead).first(batch);
    gather(data, order ? order + first : order, first, out, m, n, ld, Operand());
}
