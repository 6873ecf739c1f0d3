// The update of the exact tier, for all adapters at once (NF4-10.4, NF4-10.5, NF4-10.7).
// Defines: DTYPE, that of the adapters.
#include "floats.cuh"

// p, m and v [n] by the gradient g, which is multiplied by clip where clip is below 1.
extern "C" __global__ void update(Element* p, const float* g, float* m, float* v, i64 n, float clip, float rest1, float beta2,
                                  float rest2, float root, float eps, float step, float decay) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float grad = clip < 1.f ? g[i] * clip : g[i];
  float mean = m[i] + rest1 * (grad - m[i]);
  float square = beta2 * v[i] + rest2 * (grad * grad);
  float d = sqrtf(square) / root + eps;
  p[i] = narrow(decay * widen(p[i]) - step * (mean / d));
  m[i] = mean;
  v[i] = square;
}
