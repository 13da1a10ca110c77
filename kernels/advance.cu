// The end of a recording of `steps` steps. Its batches may have been `fewer` samples smaller than the others: what
// follows in the order is that much nearer. The grid is (models).
#include "step.cuh"

extern "C" __global__ void advance(unsigned long long* state, int steps, int fewer) {
    state += blockIdx.x * STATE;
    state[STEP] += steps;
    state[FIRST] -= fewer;
}
