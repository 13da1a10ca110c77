// A[0] = data[rows] / 255 of bytes, data[rows] of reals; labels = data[rows] (source 5, "Stochastic gradient descent").
//
// data (samples, n), rows (m,) valid indices, or null for the rows first .. first + m - 1; out (m, n). Bytes moved for
// a batch of 128 x 784: 100 KB read, 401 KB written (float). Divided, not multiplied by 1/255: the same bits as NumPy's.
// H100: 2.5 us at 128 x 784 (plain CuPy lines 5.6), 10.1 us at 8192 x 784 (102), 1.31 of the bandwidth of a large copy,
// from L2.
#include "gather.cuh"

extern "C" __global__ void gather_bytes(const unsigned char* __restrict__ data, const long long* __restrict__ rows,
                                        long long first, real* __restrict__ out, long long m, int n) {
    gather(data, rows, first, out, m, n, n, Scale());
}

extern "C" __global__ void gather_reals(const real* __restrict__ data, const long long* __restrict__ rows,
                                        long long first, real* __restrict__ out, long long m, int n) {
    gather(data, rows, first, out, m, n, n, Copy());
}

extern "C" __global__ void gather_labels(const long long* __restrict__ data, const long long* __restrict__ rows,
                                         long long first, long long* __restrict__ out, long long m, int n) {
    gather_packs<1>(data, rows, first, out, m, n, n, Copy());
}
