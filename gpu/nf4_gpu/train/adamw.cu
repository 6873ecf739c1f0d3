// Clipping by the norm of all gradients (NF4-10.7) and AdamW's update (NF4-10.4, NF4-10.5), the latter to the bit.
// Defines: DTYPE, that of the parameters.
#include "floats.cuh"

#define PARTS 1024  // of the sum of squares: each by a thread block
#define THREADS 256

// What the host works out for an update, in float64 rounded once (NF4-10.3).
struct Scalars {
  float rest1, beta2, rest2, eps, decay, step, root;
  float loss_scale;  // 1 / the number of targets
  double max_norm;
};

// What an update came to.
struct Outcome {
  double loss;  // the sum of the losses
  double norm;
  float factor;  // of the gradients, 1 where they are not clipped
  int made;      // whether loss and norm are finite
};

__device__ __forceinline__ double block_sum(double sum) {
  __shared__ double sums[THREADS];
  sums[threadIdx.x] = sum;
  for (int half = THREADS / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  return sums[0];  // in thread 0
}

// g [n] -> parts [PARTS], sums of squares in float64, always of the same elements in the same order.
extern "C" __global__ void __launch_bounds__(THREADS) sum_squares(const float* g, i64 n, double* parts) {
  double sum = 0.;
  for (i64 i = (i64)blockIdx.x * THREADS + threadIdx.x; i < n; i += (i64)PARTS * THREADS) sum += (double)g[i] * g[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

// The norm, and what the gradients are multiplied by. outcome->loss is there already.
extern "C" __global__ void __launch_bounds__(THREADS)
    finish_norm(const double* parts, const Scalars* scalars, Outcome* outcome) {
  double sum = 0.;
  for (int i = threadIdx.x; i < PARTS; i += THREADS) sum += parts[i];
  sum = block_sum(sum);
  if (threadIdx.x) return;
  double norm = sqrt(sum), loss = outcome->loss, max_norm = scalars->max_norm;
  double c = max_norm / (norm + 1e-6);
  outcome->norm = norm;
  outcome->factor = max_norm > 0. && c < 1. ? (float)c : 1.f;
  outcome->made = loss - loss == 0. && norm - norm == 0.;
}

// One update of n parameters p with their gradients and states, unless the outcome says that none is made.
extern "C" __global__ void __launch_bounds__(THREADS)
    adamw(Element* p, const float* g, float* m, float* v, i64 n, const Scalars* scalars, const Outcome* outcome) {
  i64 i = (i64)blockIdx.x * THREADS + threadIdx.x;
  if (i >= n || !outcome->made) return;
  const Scalars s = *scalars;
  float factor = outcome->factor, grad = g[i];
  if (factor < 1.f) grad = grad * factor;  // NF4-10.7
  float mean = m[i], square = v[i], parameter = widen(p[i]);
  mean = mean + s.rest1 * (grad - mean);
  square = s.beta2 * square + s.rest2 * (grad * grad);
  float d = sqrtf(square) / s.root + s.eps;
  float u = s.step * (mean / d);
  parameter = s.decay * parameter - u;
  m[i] = mean, v[i] = square;
  p[i] = narrow(parameter);
}
