// x[0] = 7: the smallest kernel whose result shows that this machine compiles and runs kernels at all.
// One thread; x: one int.
extern "C" __global__ void probe(int* x) { x[0] = 7; }
