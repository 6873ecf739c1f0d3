// What a transformer layer does outside its products, every operation rounded by itself (NF4-14.7, NF4-14.8, NF4-14.9,
// NF4-14.10, NF4-14.11).
// Defines: DTYPE, of an embedding. A block takes a row where a row has a sum.
#include "exact/elementary.cuh"
#include "exact/grid.cuh"

// Rows of the table [vocabulary, n], of DTYPE, widened.
extern "C" __global__ void embed(const Element* table, const int* ids, int n, i64 size, float* out) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < size) out[i] = widen(table[(i64)ids[i / n] * n + i % n]);
}

extern "C" __global__ void swiglu(const float* gate, const float* up, i64 n, float* y) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = gate[i] * exact_sigmoid(gate[i]) * up[i];
}

// The gradients over gate and up.
extern "C" __global__ void swiglu_backward(const float* dout, float* gate, float* up, i64 n) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float g = gate[i], u = up[i], d = dout[i], sigmoid = exact_sigmoid(g), silu = g * sigmoid;
  gate[i] = (((g - silu) + 1.f) * sigmoid) * d * u;
  up[i] = d * silu;
}

extern "C" __global__ void rms_norm(const float* x, const float* weight, int n, double eps, float* y, float* rstd,
                                    int* status) {
  x += (i64)blockIdx.x * n;
  y += (i64)blockIdx.x * n;
  double mean = exact_sum([&](int i) { return (double)x[i] * x[i]; }, n, status) / n + eps;
  float r = __double2float_rn(1.0 / sqrt(mean));
  if (threadIdx.x == 0) rstd[blockIdx.x] = r;
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = x[i] * r * weight[i];
}

extern "C" __global__ void rms_scale(const float* x, const float* weight, const float* rstd, int n, float* y) {
  i64 at = (i64)blockIdx.x * n;
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[at + i] = x[at + i] * rstd[blockIdx.x] * weight[i];
}

// dx over dy.
extern "C" __global__ void rms_norm_backward(float* dy, const float* x, const float* weight, const float* rstd, int n,
                                             int* status) {
  dy += (i64)blockIdx.x * n;
  x += (i64)blockIdx.x * n;
  float r = rstd[blockIdx.x];
  double sum = exact_sum([&](int i) { return (double)(dy[i] * weight[i]) * x[i]; }, n, status);
  float b = __double2float_rn(sum * r * r / n);
  for (int i = threadIdx.x; i < n; i += blockDim.x) dy[i] = (dy[i] * weight[i] - x[i] * b) * r;
}

// Rows of heads [T, heads, 2 half], in place; sin is negated to go back.
extern "C" __global__ void rotate(float* x, const float* cos, const float* sin, int heads, int half, bool inverse) {
  x += (i64)blockIdx.x * heads * 2 * half;
  cos += (i64)blockIdx.x * half;
  sin += (i64)blockIdx.x * half;
  for (int i = threadIdx.x; i < heads * half; i += blockDim.x) {
    int pair = i % half;
    float* first = x + i / half * 2 * half + pair;
    float c = cos[pair], s = inverse ? -sin[pair] : sin[pair], a = first[0], b = first[half];
    first[0] = a * c - b * s;
    first[half] = b * c + a * s;
  }
}

// z [rows, n] over itself: its softmax (NF4-14.8).
extern "C" __global__ void softmax(float* z, int n, int* status) {
  z += (i64)blockIdx.x * n;
  float top = __uint_as_float(0xff800000);
  bool bad = false;
  for (int i = threadIdx.x; i < n; i += blockDim.x) top = fmaxf(top, z[i]), bad |= z[i] != z[i];
  if (bad) *status = 1;
  // As integers that order like floats: of the block the greatest.
  u32 bits = __float_as_uint(top);
  bits = block_max(bits >> 31 ? ~bits : bits | 0x80000000u);
  top = __uint_as_float(bits >> 31 ? bits & 0x7fffffff : ~bits);
  checked(magnitude(top), status);
  for (int i = threadIdx.x; i < n; i += blockDim.x) z[i] = exact_exp(z[i] - top);
  float norm = __double2float_rn(exact_sum([&](int i) { return (double)z[i]; }, n, status));
  for (int i = threadIdx.x; i < n; i += blockDim.x) z[i] = z[i] / norm;
}

// The gradient of the scores over dp, times factor.
extern "C" __global__ void softmax_backward(float* dp, const float* p, int n, float factor, int* status) {
  dp += (i64)blockIdx.x * n;
  p += (i64)blockIdx.x * n;
  float c = __double2float_rn(exact_sum([&](int i) { return (double)p[i] * dp[i]; }, n, status));
  for (int i = threadIdx.x; i < n; i += blockDim.x) dp[i] = p[i] * (dp[i] - c) * factor;
}

// Logits [rows, n] over themselves: the gradient of scale times the losses' sum, or scratch without one (NF4-14.10).
extern "C" __global__ void cross_entropy(float* logits, const int* targets, int n, float scale, bool gradient, float* losses,
                                         int* status) {
  logits += (i64)blockIdx.x * n;
  int target = targets[blockIdx.x];
  u32 bits = 0;
  bool bad = false;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    u32 own = __float_as_uint(logits[i]);
    bad |= logits[i] != logits[i];
    bits = max(bits, own >> 31 ? ~own : own | 0x80000000u);
  }
  if (bad) *status = 1;
  bits = block_max(bits);
  float top = __uint_as_float(bits >> 31 ? bits & 0x7fffffff : ~bits), picked = logits[target] - top;
  checked(magnitude(top), status);
  __syncthreads();  // all have read the target's logit
  for (int i = threadIdx.x; i < n; i += blockDim.x) logits[i] = exact_exp(logits[i] - top);
  float norm = __double2float_rn(exact_sum([&](int i) { return (double)logits[i]; }, n, status));
  if (threadIdx.x == 0) losses[blockIdx.x] = exact_log(norm) - picked;
  if (!gradient) return;
  float factor = scale / norm;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    float g = logits[i] * factor;
    logits[i] = i == target ? g - scale : g;
  }
}
