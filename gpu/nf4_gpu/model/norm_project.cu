// RMS norms where the layer that reads the result has adapters, and their backward where the gradient goes on to such a layer:
// the result is multiplied by the narrow matrix before it leaves the registers.
// Defines: DTYPE (BFLOAT16); NARROW, columns of the adapters, a multiple of 8; PARTS: of 32 columns that a warp has backward. A
// thread block's warps share a row's columns. Fused multiply-adds: nothing here is exact.
#include "model/narrow.cuh"

#define WARPS 8  // of a thread block forward
#define BACK_WARPS (NARROW > 16 ? 16 : 32)  // of a thread block backward
#define HELD (PARTS * NARROW <= (NARROW > 16 ? 64 : 32))  // its factors stay in registers
#define PITCH (NARROW + 8)
#define UNROLLED (NARROW > 48 ? 1 : 2)

// What the lanes of ALL warps hold of columns, summed over a row: of tokens g and g + 8 in lane 4 g + q.
template <int ALL, int HALVES>
__device__ __forceinline__ void row_sums(float (&sum)[HALVES]) {
  __shared__ float sums[ALL][8 * HALVES];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int half = 0; half < HALVES; half++) {
    sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
    sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
    if (lane % 4 == 0) sums[warp][lane / 4 + half * 8] = sum[half];
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < HALVES; half++) {
    sum[half] = 0.f;
#pragma unroll
    for (int w = 0; w < ALL; w++) sum[half] += sums[w][lane / 4 + half * 8];
  }
}

// The sums of ALL warps, [8 HALVES, NARROW], to z and, if given, copy.
template <int ALL, int HALVES>
__device__ __forceinline__ void leave_sums(float (&sum)[NARROW / 8][4], float* memory, i64 token, i64 tokens, Element* z,
                                           i64 z_pitch, Element* copy, i64 copy_pitch) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* to = memory + (warp * 8 * HALVES + lane / 4) * PITCH + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < NARROW / 8; n++)
#pragma unroll
    for (int half = 0; half < HALVES; half++)
      *(float2*)(to + half * 8 * PITCH + n * 8) = make_float2(sum[n][2 * half], sum[n][2 * half + 1]);
  __syncthreads();
  for (int i = threadIdx.x; i < 8 * HALVES * NARROW / 2; i += 32 * ALL) {
    int row = i / (NARROW / 2), column = i % (NARROW / 2) * 2;
    if (token + row >= tokens) break;
    float2 total = make_float2(0.f, 0.f);
#pragma unroll
    for (int w = 0; w < ALL; w++) {
      float2 part = *(const float2*)(memory + (w * 8 * HALVES + row) * PITCH + column);
      total.x += part.x, total.y += part.y;
    }
    u32 pair = narrow_pair(total.x, total.y);
    *(u32*)(z + (token + row) * z_pitch + column) = pair;
    if (copy) *(u32*)(copy + (token + row) * copy_pitch + column) = pair;
  }
}

// norm.cu's rms_norm of x [tokens, width] -> y, rstd [tokens]; and z [tokens, NARROW], also to `copy` if given, = y a^T for a
// [NARROW, width].
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)
    rms_norm_project(const Element* x, i64 x_pitch, const float* weight, float eps, int width, int parts, i64 tokens, Element* y,
                     i64 y_pitch, float* rstd, const Element* a, i64 a_pitch, Element* z, i64 z_pitch, Element* copy,
                     i64 copy_pitch) {
  const int THREADS = 32 * WARPS;
  DYNAMIC_SHARED(memory);
  uint4* own = (uint4*)memory + threadIdx.x;  // [parts, 2], THREADS apart: what a thread copies it alone reads
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  i64 token0 = (i64)blockIdx.x * 16, token = token0 + lane / 4;
  int column0 = warp * parts * 32 + lane % 4 * 8;
  for (int k = 0; k < parts; k++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      bool there = token + half * 8 < tokens && column0 + k * 32 < width;
      copy_async(own + (2 * k + half) * THREADS, x + (token + half * 8) * x_pitch + column0 + k * 32, there);
    }
  commit_copies();
  wait_copies<0>();
  float sum[2] = {};
#pragma unroll 2
  for (int k = 0; k < parts; k++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float v[8];
      widen_eight(own[(2 * k + half) * THREADS], v);
      EIGHT sum[half] += v[i] * v[i];
    }
  row_sums<WARPS>(sum);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    sum[half] = 1.f / sqrtf(sum[half] / width + eps);
    if (warp == 0 && lane % 4 == 0 && token + half * 8 < tokens) rstd[token + half * 8] = sum[half];
  }
  float z_sum[NARROW / 8][4] = {};
#pragma unroll UNROLLED
  for (int k = 0; k < parts; k++) {
    int column = column0 + k * 32;
    bool in = column < width;
    u32 factors[2][NARROW / 8][2], rows[2][4];
    load_along<NARROW>(factors, a, a_pitch, column, in);
    float w[8] = {};
    if (in) load_weight(weight + column, w);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float v[8];
      widen_eight(own[(2 * k + half) * THREADS], v);
      EIGHT v[i] = v[i] * sum[half] * w[i];
      narrow_eight(rows[half], v);
      if (in && token + half * 8 < tokens)
        store(y + (token + half * 8) * y_pitch + column, rows[half]);
    }
    project_columns<NARROW>(z_sum, rows, factors);
  }
  float* sums = (float*)(memory + 2 * parts * THREADS * 16);
  leave_sums<WARPS, 2>(z_sum, sums, token0, tokens, z, z_pitch, copy, copy_pitch);
}

// norm.cu's rms_norm_backward: dn -> dx = dy + the gradient of x, and rms_norm's y again into `normed`, which may be dn; and
// z [tokens, NARROW] = dx b for b [width, NARROW]. A thread block takes eight tokens at a time, and while there are two stages in
// shared memory, copies the next meanwhile.
extern "C" __global__ void __launch_bounds__(32 * BACK_WARPS, 1)
    rms_norm_backward_project(const Element* dn, i64 dn_pitch, const Element* x, i64 x_pitch, const float* weight,
                              const float* rstd, int width, int stages, int tokens, const Element* dy, i64 dy_pitch, Element* dx,
                              i64 dx_pitch, Element* normed, i64 normed_pitch, const Element* b, i64 b_pitch,
                              Element* z, i64 z_pitch) {
  const int THREADS = 32 * BACK_WARPS;
  DYNAMIC_SHARED(memory);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int column0 = warp * PARTS * 32 + lane % 4 * 8;
  float* sums = (float*)(memory + 3 * PARTS * stages * THREADS * 16);
  int last = (tokens + 7) / 8;
  auto of_stage = [&](int stage) { return (uint4*)memory + stage * 3 * PARTS * THREADS + threadIdx.x; };  // [PARTS, 3]
  auto load = [&](int tile, int stage) {
    uint4* own = of_stage(stage);
    int token = tile * 8 + lane / 4;
    if (tile < last)
#pragma unroll
      for (int k = 0; k < PARTS; k++) {
        int column = column0 + k * 32;
        bool there = token < tokens && column < width;
        copy_async(own + 3 * k * THREADS, x + token * x_pitch + column, there);
        copy_async(own + (3 * k + 1) * THREADS, dn + token * dn_pitch + column, there);
        copy_async(own + (3 * k + 2) * THREADS, dy + token * dy_pitch + column, there);
      }
    commit_copies();
  };
  int stage = 0;
  load(blockIdx.x, 0);
  u32 factors[HELD ? PARTS : 1][2][NARROW / 8][2];
#pragma unroll
  for (int k = 0; k < PARTS; k++)
    if (HELD) load_across<NARROW>(factors[HELD ? k : 0], b, b_pitch, column0 / 32 * 32 + k * 32, width);
#pragma unroll 1
  for (int tile = blockIdx.x; tile < last; tile += gridDim.x) {
    const uint4* own = of_stage(stage);
    if (stages > 1) {
      stage ^= 1;
      load(tile + gridDim.x, stage);
      wait_copies<1>();
    } else
      wait_copies<0>();
    int token = tile * 8 + lane / 4;
    bool there = token < tokens;
    float sum[1] = {}, r = there ? rstd[token] : 0.f;
#pragma unroll 1
    for (int k = 0; k < PARTS; k++) {
      float v[8], d[8], w[8] = {};
      widen_eight(own[3 * k * THREADS], v);
      widen_eight(own[(3 * k + 1) * THREADS], d);
      if (column0 + k * 32 < width) load_weight(weight + column0 + k * 32, w);
      EIGHT sum[0] += d[i] * w[i] * v[i];
    }
    row_sums<BACK_WARPS>(sum);
    float mean = sum[0] * r * r / width;
    float z_sum[NARROW / 8][4] = {};
#pragma unroll HELD ? PARTS : 1
    for (int k = 0; k < PARTS; k++) {
      int column = column0 + k * 32;
      bool in = there && column < width;
      u32 rows[2][4] = {};
      if (!HELD) load_across<NARROW>(factors[0], b, b_pitch, column / 32 * 32, width);
      float v[8], w[8] = {}, out[8];
      if (in) load_weight(weight + column, w);
      widen_eight(own[3 * k * THREADS], v);
      EIGHT out[i] = v[i] * r * w[i];
      narrow_eight(rows[0], out);
      if (in) store(normed + token * normed_pitch + column, rows[0]);
      widen_eight(own[(3 * k + 1) * THREADS], out);
      EIGHT v[i] = r * (out[i] * w[i] - v[i] * mean);
      widen_eight(own[(3 * k + 2) * THREADS], out);
      EIGHT v[i] += out[i];
      narrow_eight(rows[0], v);
      if (in) store(dx + token * dx_pitch + column, rows[0]);
      project_columns<NARROW>(z_sum, rows, factors[HELD ? k : 0]);
    }
    leave_sums<BACK_WARPS, 1>(z_sum, sums, tile * 8, tokens, z, z_pitch, nullptr, 0);
    if (stages == 1) load(tile + gridDim.x, 0);
  }
}
