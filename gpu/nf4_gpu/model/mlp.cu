// SwiGLU where the layers around it have adapters: what passes by is multiplied by their narrow matrices on the way, so that
// act, and the gradients of gate and up, are not read again for it.
// Defines: DTYPE (BFLOAT16); SLOT (8, 16): columns that an adapter's ranks have.
// A warp holds 32 columns and takes 16 tokens at a time. Fused multiply-adds: nothing here is exact.
#include "model/narrow.cuh"

#define WARPS 8
#define THREADS (32 * WARPS)
#define TOKENS 16             // at a time
#define COLUMNS (32 * WARPS)  // of a thread block

// Sums of a thread block's warps, [16, NARROW] each, of the step before.
template <int NARROW>
struct Exchange {
  float* memory;  // of two steps that take turns
  static const int PITCH = NARROW + 8;

  __device__ __forceinline__ void leave(int turn, float (*sum)[4]) {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float* to = memory + ((turn * WARPS + warp) * TOKENS + lane / 4) * PITCH + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < NARROW / 8; n++) {
      *(float2*)(to + n * 8) = make_float2(sum[n][0], sum[n][1]);
      *(float2*)(to + 8 * PITCH + n * 8) = make_float2(sum[n][2], sum[n][3]);
    }
  }

  // Once all have left theirs: to [tokens, NARROW].
  __device__ __forceinline__ void add_up(int turn, float* to, int token, int tokens) {
    int row = threadIdx.x / (NARROW / 2), column = threadIdx.x % (NARROW / 2) * 2;
    if (row >= TOKENS || token + row >= tokens) return;
    const float* from = memory + (turn * WARPS * TOKENS + row) * PITCH + column;
    float2 total = make_float2(0.f, 0.f);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      float2 part = *(const float2*)(from + w * TOKENS * PITCH);
      total.x += part.x, total.y += part.y;
    }
    *(float2*)(to + (i64)(token + row) * NARROW + column) = total;
  }
};

// gate and up side by side, [tokens, 2 inner], -> act [tokens, inner] = silu(gate) up; and, of the columns of each thread block
// in x, act a^T for a [SLOT, inner], into of_tokens [gridDim.x, tokens, SLOT]. gridDim.y parts of the tokens.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    swiglu_project(const Element* gate_up, u32 pitch, int inner, int tokens, Element* act, u32 act_pitch, const Element* a,
                   i64 a_pitch, float* of_tokens) {
  DYNAMIC_SHARED(memory);
  uint4* own = (uint4*)memory;  // [2 turns, 4, THREADS]
  Exchange<SLOT> exchange{(float*)(own + 2 * 4 * THREADS)};
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
  int column = blockIdx.x * COLUMNS + warp * 32 + lane % 4 * 8;
  bool in = column < inner;
  int steps = (tokens + TOKENS - 1) / TOKENS;
  int first = (int)((i64)steps * blockIdx.y / gridDim.y), last = (int)((i64)steps * (blockIdx.y + 1) / gridDim.y);
  of_tokens += (i64)blockIdx.x * tokens * SLOT;

  // Places in elements, few enough for 32 bits: of what is copied and of what is written.
  u32 next = (first * TOKENS + g) * pitch + column, at = (first * TOKENS + g) * act_pitch + column;
  auto load = [&](int step) {
    if (step < last)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        bool there = in && step * TOKENS + g + half * 8 < tokens;
        const Element* from = gate_up + (next + half * 8 * pitch);
        uint4* to = own + (step % 2 * 4 + half) * THREADS + threadIdx.x;
        copy_async(to, from, there);
        copy_async(to + 2 * THREADS, from + inner, there);
      }
    next += TOKENS * pitch;
    commit_copies();
  };
  load(first);

  u32 factors[2][SLOT / 8][2];
  load_along<SLOT>(factors, a, a_pitch, column, in);
#pragma unroll 1
  for (int step = first; step < last; step++) {
    wait_copies<0>();
    __syncthreads();
    load(step + 1);
    if (step > first) exchange.add_up((step - 1) % 2, of_tokens, (step - 1) * TOKENS, tokens);
    u32 rows[2][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4* from = own + (step % 2 * 4 + half) * THREADS + threadIdx.x;
      float gate[8], up[8];
      widen_eight(from[0], gate);
      widen_eight(from[2 * THREADS], up);
      swiglu_eight(gate, up);
      narrow_eight(rows[half], gate);
      if (in && step * TOKENS + g + half * 8 < tokens)
        store(act + (at + half * 8 * act_pitch), rows[half]);
    }
    at += TOKENS * act_pitch;
    float sum[SLOT / 8][4] = {};
    project_columns<SLOT>(sum, rows, factors);
    exchange.leave(step % 2, sum);
  }
  __syncthreads();
  if (last > first) exchange.add_up((last - 1) % 2, of_tokens, (last - 1) * TOKENS, tokens);
}

#define Z_COLUMNS (3 * SLOT)
#define Z_PITCH (SLOT == 16 ? 56 : 40)
#define STAGE_BYTES (6 * THREADS * 16 + TOKENS * Z_PITCH * 2)

// The gradients dgate and dup over gate and up, from dact [tokens, inner]; and what the adapters around need of them:
// of the columns of each thread block in x, dgate b[:inner] and dup b[inner:], for s B of gate and up, b [2 inner, ..], of up in
// columns SLOT further on, into of_tokens [gridDim.x, tokens, 2 SLOT];
// of the tokens of each thread block in y, z^T dgate, z^T dup and dz^T act, for z [tokens, 2 SLOT] of gate and up, and dz
// [tokens, SLOT], s dy B of the layer after act, into of_features [gridDim.y, 3, SLOT, inner].
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    swiglu_backward_project(Element* gate_up, i64 pitch, int inner, int tokens, const Element* dact, i64 dact_pitch,
                            const Element* b, i64 b_pitch, const Element* z, i64 z_pitch, const Element* dz, i64 dz_pitch,
                            float* of_tokens, float* of_features) {
  DYNAMIC_SHARED(memory);
  Exchange<2 * SLOT> exchange{(float*)(memory + 2 * STAGE_BYTES)};
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4;
  int column = blockIdx.x * COLUMNS + warp * 32 + lane % 4 * 8;
  bool in = column < inner;
  int steps = (tokens + TOKENS - 1) / TOKENS;
  int first = (int)((i64)steps * blockIdx.y / gridDim.y), last = (int)((i64)steps * (blockIdx.y + 1) / gridDim.y);
  of_tokens += (i64)blockIdx.x * tokens * 2 * SLOT;

  // A thread copies what it reads; some also of z and dz, which all read.
  int z_row = threadIdx.x / (Z_COLUMNS / 8), z_column = threadIdx.x % (Z_COLUMNS / 8) * 8;
  const Element* z_from = z_column < 2 * SLOT ? z + z_column : dz + z_column - 2 * SLOT;
  i64 z_from_pitch = z_column < 2 * SLOT ? z_pitch : dz_pitch;
  auto load = [&](int step) {
    if (step < last) {
      u8* stage = memory + step % 2 * STAGE_BYTES;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int token = step * TOKENS + g + half * 8;
        bool there = in && token < tokens;
        const Element* from = gate_up + token * pitch + column;
        uint4* to = (uint4*)stage + half * THREADS + threadIdx.x;
        copy_async(to, from, there);
        copy_async(to + 2 * THREADS, from + inner, there);
        copy_async(to + 4 * THREADS, dact + token * dact_pitch + column, there);
      }
      if (z_row < TOKENS) {
        int token = step * TOKENS + z_row;
        Element* to = (Element*)(stage + 6 * THREADS * 16) + z_row * Z_PITCH + z_column;
        copy_async(to, z_from + token * z_from_pitch, token < tokens);
      }
    }
    commit_copies();
  };
  load(first);

  u32 factors[2][2][SLOT / 8][2];  // of gate and of up
  load_across<SLOT>(factors[0], b, b_pitch, column / 32 * 32, inner);
  load_across<SLOT>(factors[1], b + inner * b_pitch + SLOT, b_pitch, column / 32 * 32, inner);
  float by_gate[4][4] = {}, by_up[4][4] = {}, by_act[4][4] = {};
#pragma unroll 1
  for (int step = first; step < last; step++) {
    wait_copies<0>();
    __syncthreads();
    load(step + 1);
    if (step > first) exchange.add_up((step - 1) % 2, of_tokens, (step - 1) * TOKENS, tokens);
    const u8* stage = memory + step % 2 * STAGE_BYTES;
    u32 dgate[2][4], dup[2][4], act[2][4];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint4* from = (const uint4*)stage + half * THREADS + threadIdx.x;
      float gate[8], up[8], grad[8];
      widen_eight(from[0], gate);
      widen_eight(from[2 * THREADS], up);
      widen_eight(from[4 * THREADS], grad);
      swiglu_backward_eight(gate, up, grad);
      narrow_eight(dgate[half], gate);
      narrow_eight(dup[half], up);
      narrow_eight(act[half], grad);
      int token = step * TOKENS + g + half * 8;
      if (in && token < tokens) {
        Element* to = gate_up + token * pitch + column;
        store(to, dgate[half]);
        store(to + inner, dup[half]);
      }
    }
    float sum[2 * SLOT / 8][4] = {};
    project_columns<SLOT>(sum, dgate, factors[0]);
    project_columns<SLOT>(sum + SLOT / 8, dup, factors[1]);
    exchange.leave(step % 2, sum);

    // Ranks in rows, tokens in the depth.
    const Element* zs = (const Element*)(stage + 6 * THREADS * 16) + (lane % 8 + lane / 16 * 8) * Z_PITCH;
    auto add_products = [&](float (&d)[4][4], int slot, const u32 (&rows)[2][4]) {
      u32 factor[4];
      load_transposed(factor, zs + slot * SLOT + (SLOT == 16 ? lane / 8 % 2 * 8 : 0));
      if (SLOT == 8) factor[1] = factor[3] = 0;
#pragma unroll
      for (int n = 0; n < 4; n++) multiply_add(d[n], factor, transpose_pairs(rows[0][n]), transpose_pairs(rows[1][n]));
    };
    add_products(by_gate, 0, dgate);
    add_products(by_up, 1, dup);
    add_products(by_act, 2, act);
  }
  __syncthreads();
  if (last > first) exchange.add_up((last - 1) % 2, of_tokens, (last - 1) * TOKENS, tokens);
  if (!in) return;
  auto leave = [&](float (&d)[4][4], int which) {
#pragma unroll
    for (int half = 0; half < SLOT / 8; half++) {
      float* to = of_features + ((i64)(blockIdx.y * 3 + which) * SLOT + g + half * 8) * inner + column;
      *(float4*)to = make_float4(d[0][2 * half], d[0][2 * half + 1], d[1][2 * half], d[1][2 * half + 1]);
      *(float4*)(to + 4) = make_float4(d[2][2 * half], d[2][2 * half + 1], d[3][2 * half], d[3][2 * half + 1]);
    }
  };
  leave(by_gate, 0);
  leave(by_up, 1);
  leave(by_act, 2);
}

// The sums of all the thread blocks before, in order. y [tokens, columns] = those of of_tokens [blocks, tokens, columns], also to
// `copy` if given. With parts > 0, those of of_features [parts, 3, SLOT, inner] are added to gradients: times `scale`, to those of
// B of gate and up [inner, rank]; and to that of A of the layer after act, [rank_after, inner].
extern "C" __global__ void __launch_bounds__(THREADS)
    add_up_blocks(const float* of_tokens, int blocks, int tokens, int columns, Element* y, i64 y_pitch, Element* copy,
                  i64 copy_pitch, const float* of_features, int parts, int inner, int rank, int rank_after, float gate_scale,
                  float up_scale, float* gate, float* up, float* after) {
  i64 unit = (i64)blockIdx.x * THREADS + threadIdx.x, units = (i64)tokens * columns / 4;
  if (unit < units) {
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f);
    const float* from = of_tokens + unit * 4;
#pragma unroll 16
    for (int block = 0; block < blocks; block++) {
      float4 part = __ldcg((const float4*)(from + block * units * 4));
      total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
    }
    uint2 words = make_uint2(narrow_pair(total.x, total.y), narrow_pair(total.z, total.w));
    i64 token = unit * 4 / columns, column = unit * 4 % columns;
    *(uint2*)(y + token * y_pitch + column) = words;
    if (copy) *(uint2*)(copy + token * copy_pitch + column) = words;
    return;
  }
  unit -= units;
  i64 of_part = (i64)3 * SLOT * inner;
  if (parts == 0 || unit >= of_part / 4) return;
  i64 of_matrix = of_part / 12;
  int which = (int)(unit / of_matrix);
  unit %= of_matrix;
  if (which == 2) {
    int row = (int)(unit * 4 / inner);
    if (row >= rank_after) return;
    const float* from = of_features + (i64)2 * SLOT * inner + unit * 4;
    float4 total = make_float4(0.f, 0.f, 0.f, 0.f), before = *(float4*)(after + unit * 4);
#pragma unroll 8
    for (int part = 0; part < parts; part++) {
      float4 more = __ldcg((const float4*)(from + part * of_part));
      total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
    }
    *(float4*)(after + unit * 4) = make_float4(before.x + total.x, before.y + total.y, before.z + total.z, before.w + total.w);
    return;
  }
  int row = (int)(unit % (SLOT / 4)) * 4, column = (int)(unit / (SLOT / 4));
  if (row >= rank) return;
  const float* from = of_features + (i64)(which * SLOT + row) * inner + column;
  float total[4] = {};
#pragma unroll 4
  for (int part = 0; part < parts; part++)
#pragma unroll
    for (int i = 0; i < 4; i++) total[i] += __ldcg(from + part * of_part + (i64)i * inner);
  float* to = (which ? up : gate) + (i64)column * rank + row;
  float before[4], scale = which ? up_scale : gate_scale;  // read at once: each waits for memory
#pragma unroll
  for (int i = 0; i < 4; i++) before[i] = row + i < rank ? to[i] : 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (row + i < rank) to[i] = before[i] + scale * total[i];
}
