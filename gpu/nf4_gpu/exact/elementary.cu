// exp and log of arrays: what the tests hold against the reference.
// Defines: DTYPE, of no effect.
#include "exact/elementary.cuh"

extern "C" __global__ void exponential(const float* x, i64 n, float* y) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = exact_exp(x[i]);
}

extern "C" __global__ void logarithm(const float* x, i64 n, float* y) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = exact_log(x[i]);
}
