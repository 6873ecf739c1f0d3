// The operations of a model outside norms, attention and products, in bfloat16 with float32 arithmetic.
// Defines: DTYPE (BFLOAT16). Rows are made of vectors of eight elements. Fused multiply-adds: nothing here is exact.
#include "model/eights.cuh"

// x [row] = table [ids[row]], rows of `width`; the table may lie in the host's pinned memory.
extern "C" __global__ void embed(const Element* table, i64 table_pitch, const int* ids, i64 width, Element* x,
                                 i64 x_pitch) {
  const Element* from = table + ids[blockIdx.x] * table_pitch;
  Element* to = x + (i64)blockIdx.x * x_pitch;
  for (int c = threadIdx.x * 8; c < width; c += blockDim.x * 8) *(uint4*)(to + c) = *(const uint4*)(from + c);
}

// gate and up side by side, [rows, 2 inner], -> act [rows, inner] = silu(gate) up. A thread block takes
// a row and up to blockDim.x vectors of it.
extern "C" __global__ void swiglu(const Element* gate_up, i64 pitch, i64 inner, Element* act, i64 act_pitch) {
  i64 c = ((i64)blockIdx.y * blockDim.x + threadIdx.x) * 8;
  if (c >= inner) return;
  const Element* row = gate_up + (i64)blockIdx.x * pitch;
  float gate[8], up[8];
  load(row + c, gate);
  load(row + inner + c, up);
  swiglu_eight(gate, up);
  store(act + (i64)blockIdx.x * act_pitch + c, gate);
}

// The gradients of gate and up over them, and swiglu's act over its gradient dact.
extern "C" __global__ void swiglu_backward(Element* gate_up, i64 pitch, i64 inner, Element* dact, i64 dact_pitch) {
  i64 c = ((i64)blockIdx.y * blockDim.x + threadIdx.x) * 8;
  if (c >= inner) return;
  Element* row = gate_up + (i64)blockIdx.x * pitch;
  Element* d = dact + (i64)blockIdx.x * dact_pitch + c;
  float gate[8], up[8], grad[8];
  load(row + c, gate);
  load(row + inner + c, up);
  load(d, grad);
  swiglu_backward_eight(gate, up, grad);
  store(row + c, gate);
  store(row + inner + c, up);
  store(d, grad);
}

#define CE_THREADS 1024
#define CE_AHEAD 3  // vectors that a thread reads at a time

// The largest over the block, and the sum; every thread gets both, of the same order.
__device__ __forceinline__ float block_max(float v, float* shared) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, lanes));
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  v = shared[0];
  for (int i = 1; i < CE_THREADS / 32; i++) v = fmaxf(v, shared[i]);
  return v;
}

__device__ __forceinline__ float block_sum(float v, float* shared) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) v += __shfl_xor_sync(~0u, v, lanes);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0.f;
  for (int i = 0; i < CE_THREADS / 32; i++) v += shared[i];
  return v;
}

// logits [rows, vocabulary], a row a thread block, -> losses [rows] = -log softmax(logits)[target]; with a scale, that times
// the gradient over the logits, and zeros up to `padded` columns. A target of -1 has no loss. The first `kept` vectors of a row
// stay in shared memory between their two readings.
extern "C" __global__ void __launch_bounds__(CE_THREADS)
    cross_entropy(Element* logits, i64 pitch, int vocabulary, int padded, int kept, const int* targets, const float* scale,
                  float* losses) {
  DYNAMIC_SHARED(memory);
  __shared__ float shared[CE_THREADS / 32];
  uint4* near = (uint4*)memory;
  Element* row = logits + (i64)blockIdx.x * pitch;
  int target = targets[blockIdx.x], vectors = padded / 8;
  if (target < 0) {
    if (threadIdx.x == 0) losses[blockIdx.x] = 0.f;
    if (scale)
      for (int at = threadIdx.x; at < vectors; at += CE_THREADS) *(uint4*)(row + at * 8) = make_uint4(0, 0, 0, 0);
    return;
  }
  // In units of log2 e. A NaN must reach the loss: fmaxf drops it, the sum does not.
  float top = -3e38f, sum = 0.f;
  for (int first = threadIdx.x; first * 8 < vocabulary; first += CE_AHEAD * CE_THREADS) {
    uint4 words[CE_AHEAD];
    float most = top;
#pragma unroll
    for (int k = 0; k < CE_AHEAD; k++) {
      int at = first + k * CE_THREADS;
      words[k] = at * 8 < vocabulary ? *(const uint4*)(row + at * 8) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int k = 0; k < CE_AHEAD; k++) {
      int at = first + k * CE_THREADS;
      if (at < kept) near[at] = words[k];
      float v[8];
      widen_eight(words[k], v);
      EIGHT if (at * 8 + i < vocabulary) most = fmaxf(most, v[i] * LOG2E);
    }
    sum *= power_of_two(top - most);
    top = most;
#pragma unroll
    for (int k = 0; k < CE_AHEAD; k++) {
      float v[8];
      widen_eight(words[k], v);
      EIGHT if ((first + k * CE_THREADS) * 8 + i < vocabulary) sum += power_of_two(v[i] * LOG2E - top);
    }
  }
  float most = block_max(top, shared);
  sum = block_sum(sum * power_of_two(top - most), shared);
  if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) + most / LOG2E - widen(row[target]);
  if (!scale) return;
  __syncthreads();  // the target's logit is read
  float factor = *scale, over = factor / sum;
#pragma unroll 1
  for (int at = threadIdx.x; at < vectors; at += CE_THREADS) {
    float v[8];
    widen_eight(at < kept && at * 8 < vocabulary ? near[at] : *(const uint4*)(row + at * 8), v);
    EIGHT {
      float p = power_of_two(v[i] * LOG2E - most) * over;
      v[i] = at * 8 + i >= vocabulary ? 0.f : at * 8 + i == target ? p - factor : p;
    }
    store(row + at * 8, v);
  }
}

#define SUM_THREADS 256

// total += the sum of x [n], in float64 and in one order.
extern "C" __global__ void __launch_bounds__(SUM_THREADS) add_up(const float* x, i64 n, double* total) {
  __shared__ double sums[SUM_THREADS];
  double sum = 0.;
  for (i64 i = threadIdx.x; i < n; i += SUM_THREADS) sum += x[i];
  sums[threadIdx.x] = sum;
  for (int half = SUM_THREADS / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *total += sums[0];
}
