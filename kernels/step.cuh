// Where a run stands, in device memory, so that a recorded step may be replayed: nothing of it is an argument. A kernel
// of the a-th step of a recording (from 0) works on step state[STEP] + a of the epoch, t = state[T] + that of the run.
//
// Numbers beyond a bound, or NaN, may lead out of the finite numbers. Whoever writes one notes the step in
// state[UNUSUAL], and from there on no parameter changes: the host finds it there and takes that step with more care.
#pragma once
#include "common.cuh"

enum { STEP, UNUSUAL, FIRST, T, STATE };  // of the epoch, from 0; 0, or its t; where the order begins; t of step 0

struct Step {
    unsigned long long* state;
    long long number;  // of the epoch, from 0

    // `state` has STATE numbers for each model; blockIdx.z is the model.
    __device__ Step(unsigned long long* states, int ahead) : state(states + blockIdx.z * STATE) {
        number = (long long)state[STEP] + ahead;
    }
    __device__ unsigned long long t() const { return state[T] + number; }  // of the whole run, from 1
    // The order's first row of this step.
    __device__ long long first(int batch) const { return (long long)state[FIRST] + number * batch; }
    __device__ bool usual() const { return state[UNUSUAL] == 0; }
    __device__ void check(bool usual) const {
        if (!usual) atomicCAS(state + UNUSUAL, 0ull, t());
    }
};
