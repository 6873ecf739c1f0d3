// What adapters need beside products with weights: narrow products x A^T and dy B, the gradients of A and B, dropout.
// Defines: DTYPE (BFLOAT16); PAIRS: of eights of columns of the narrow side, 1 to 4; for project WARPS of a thread block, 4 or 8,
// and ACROSS (0, 1): how its factor lies.
// Fused multiply-adds: nothing here is exact but the masks of dropout (NF4-11.4).
#include "philox.cuh"
#include "tensorcore.cuh"

#define THREADS (32 * WARPS)
#define RESIDENT (WARPS == 8 ? 2 : 3)  // thread blocks of a multiprocessor at a time
#define WIDE (16 * WARPS)         // rows of a thread block
#define STAGES 4
#define DEPTH 64                  // of the sum, a stage
#define NARROW (16 * PAIRS)       // columns, with those that are not there
#define PITCH (DEPTH + 8)         // elements between rows in shared memory, so that no bank is met twice
#define NARROW_PITCH (NARROW + 8)
#define WIDE_STAGE (WIDE * PITCH)
#define NARROW_STAGE (DEPTH * NARROW_PITCH > NARROW * PITCH ? DEPTH * NARROW_PITCH : NARROW * PITCH)

#define PARTS_AHEAD (PAIRS < 4 ? 8 : 4)  // that are read at a time, of two fours a thread

// Of [.., NARROW_PITCH] in shared memory, 16 rows (the depth) by 16 columns from `column` on: b of two products.
__device__ __forceinline__ void load_across(u32 b[4], const Element* rows, int column, int lane) {
  load_transposed(b, rows + lane % 16 * NARROW_PITCH + column + lane / 16 * 8);
}

// Sums of a thread block, COUNT times four a thread, added up over gridDim.y parts: the last of them to end has all, in order,
// and gets true; the others are done. partial [gridDim.x, parts, COUNT, blockDim.x, 4], of which the first `used` of COUNT count;
// counters [gridDim.x] are 0 before and after.
template <int COUNT>
__device__ __forceinline__ bool add_up_parts(float (&sum)[COUNT][4], float* partial, u32* counters, int used = COUNT) {
  int parts = gridDim.y;
  if (parts == 1) return true;
  i64 of_block = (i64)COUNT * blockDim.x;
  float4* all = (float4*)partial + blockIdx.x * parts * of_block + threadIdx.x;
  float4* mine = all + blockIdx.y * of_block;
#pragma unroll
  for (int n = 0; n < COUNT; n++)
    if (n < used) mine[n * blockDim.x] = make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
  __shared__ bool ours;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) ours = atomicInc(counters + blockIdx.x, parts - 1) == (u32)parts - 1;  // and 0 again
  __syncthreads();
  if (!ours) return false;
  __threadfence();
#pragma unroll
  for (int n = 0; n < COUNT; n++) {
    if (n % 2 || n >= used) continue;  // two at a time: used is even
    float4 total[2] = {};
    for (int first = 0; first < parts; first += PARTS_AHEAD) {
      float4 p[PARTS_AHEAD][2];
#pragma unroll
      for (int i = 0; i < PARTS_AHEAD; i++)
#pragma unroll
        for (int k = 0; k < 2; k++)
          p[i][k] = first + i < parts ? __ldcg(all + (first + i) * of_block + (n + k) * blockDim.x)
                                      : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int i = 0; i < PARTS_AHEAD; i++)
#pragma unroll
        for (int k = 0; k < 2; k++)
          total[k].x += p[i][k].x, total[k].y += p[i][k].y, total[k].z += p[i][k].z, total[k].w += p[i][k].w;
    }
#pragma unroll
    for (int k = 0; k < 2; k++)
      sum[n + k][0] = total[k].x, sum[n + k][1] = total[k].y, sum[n + k][2] = total[k].z, sum[n + k][3] = total[k].w;
  }
  return true;
}

// y [rows, columns] = alpha x m, for x [rows, depth] and m [columns, depth], or with ACROSS [depth, columns]; columns and depth
// are multiples of 8. A thread block takes WIDE rows and one of gridDim.y parts of the depth. y is also written to `copy` if
// given.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    project(const Element* x, i64 x_pitch, const Element* m, i64 m_pitch, i64 rows, i64 depth, i64 columns, float alpha,
            Element* y, i64 y_pitch, Element* copy, i64 copy_pitch, float* partial, u32* counters) {
  DYNAMIC_SHARED(memory);
  Element* wide = (Element*)memory;
  Element* narrow_side = wide + STAGES * WIDE_STAGE;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  i64 row0 = (i64)blockIdx.x * WIDE;
  int stages = (int)((depth + DEPTH - 1) / DEPTH), parts = gridDim.y;
  int first = (int)((i64)stages * blockIdx.y / parts), last = (int)((i64)stages * (blockIdx.y + 1) / parts);

  // A thread copies the same columns of rows that are THREADS / 8 apart; likewise of m.
  int r0 = threadIdx.x / 8, c0 = threadIdx.x % 8 * 8;
  const Element* from = x + (row0 + r0) * x_pitch + (i64)first * DEPTH + c0;
  int rows_left = (int)(rows - row0) - r0;
#if ACROSS
  const int ACROSS_APART = THREADS / (NARROW / 8);
  int mr = threadIdx.x / (NARROW / 8), mc = threadIdx.x % (NARROW / 8) * 8;
  const Element* m_from = m + ((i64)first * DEPTH + mr) * m_pitch + mc;
  bool m_works = mr < ACROSS_APART && mc < columns;
#else
  const Element* m_from = m + r0 * m_pitch + (i64)first * DEPTH + c0;
#endif
  auto load = [&](int stage) {
    if (stage < last) {
      int depth_left = (int)(depth - (i64)stage * DEPTH) - c0;
      Element* to = wide + stage % STAGES * WIDE_STAGE + r0 * PITCH + c0;
#pragma unroll
      for (int k = 0; k < WIDE / (THREADS / 8); k++) {
        bool there = k * (THREADS / 8) < rows_left && depth_left > 0;
        copy_async(to + k * (THREADS / 8) * PITCH, from + k * (THREADS / 8) * x_pitch, there);
      }
      from += DEPTH;
      to = narrow_side + stage % STAGES * NARROW_STAGE;
#if ACROSS
      int m_left = (int)(depth - (i64)stage * DEPTH) - mr;
      if (mr < ACROSS_APART)
#pragma unroll
        for (int k = 0; k < (DEPTH + ACROSS_APART - 1) / ACROSS_APART; k++) {
          if (mr + k * ACROSS_APART >= DEPTH) break;
          bool there = m_works && k * ACROSS_APART < m_left;
          copy_async(to + (mr + k * ACROSS_APART) * NARROW_PITCH + mc, m_from + k * ACROSS_APART * m_pitch, there);
        }
      m_from += DEPTH * m_pitch;
#else
#pragma unroll
      for (int k = 0; k < (NARROW + THREADS / 8 - 1) / (THREADS / 8); k++) {
        int r = r0 + k * (THREADS / 8);
        if (r >= NARROW) break;
        bool there = r < columns && depth_left > 0;
        copy_async(to + r * PITCH + c0, m_from + k * (THREADS / 8) * m_pitch, there);
      }
      m_from += DEPTH;
#endif
    }
    commit_copies();
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) load(first + i);

  float sum[2 * PAIRS][4] = {};
#pragma unroll 1
  for (int stage = first; stage < last; stage++) {
    wait_copies<STAGES - 2>();
    __syncthreads();
    load(stage + STAGES - 1);
    const Element* xs = wide + stage % STAGES * WIDE_STAGE + (warp * 16 + lane % 16) * PITCH + lane / 16 * 8;
    const Element* ms = narrow_side + stage % STAGES * NARROW_STAGE;
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
      u32 a[4];
      load_matrices(a, xs + k);
#pragma unroll
      for (int pair = 0; pair < PAIRS; pair++) {
        u32 b[4];
#if ACROSS
        load_across(b, ms + k * NARROW_PITCH, pair * 16, lane);
#else
        load_matrices(b, ms + (pair * 16 + lane / 16 * 8 + lane % 8) * PITCH + k + lane / 8 % 2 * 8);
#endif
        multiply_add(sum[2 * pair], a, b[0], b[1]);
        multiply_add(sum[2 * pair + 1], a, b[2], b[3]);
      }
    }
  }
  wait_copies<0>();
  if (!add_up_parts(sum, partial, counters)) return;
#pragma unroll
  for (int n = 0; n < 2 * PAIRS; n++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      i64 row = row0 + warp * 16 + lane / 4 + i * 8, column = n * 8 + lane % 4 * 2;
      if (row >= rows || column >= columns) continue;
      u32 pair = narrow_pair(alpha * sum[n][2 * i], alpha * sum[n][2 * i + 1]);
      *(u32*)(y + row * y_pitch + column) = pair;
      if (copy) *(u32*)(copy + row * copy_pitch + column) = pair;
    }
}

// A part of a gradient: out[f, j] += scale times the sum over tokens of y[t, f] z[t, j], for up to FEATURES features f. Rank j of
// a group of adapters, in slots of `slot` columns, is row j / slot * ranks + j % slot of out if j % slot < ranks.
struct Gradient {
  const Element* y;
  const Element* z;
  float* out;
  i64 feature_stride, rank_stride;  // in out; one of them is 1
  int y_pitch, z_pitch, features, columns;
  int slot, ranks;
  float scale;
  int unused;
};

#define FEATURES 256  // of a thread block, 32 a warp; a lane, number 4 g + q, has the eight from 8 q on
#define TOKENS 64     // at a time
#define TURNS 2
#define TURN_BYTES (TOKENS * FEATURES * 2 + TOKENS * NARROW_PITCH * 2)

// A thread block makes one of the gradients from one of gridDim.y parts of the tokens.
extern "C" __global__ void __launch_bounds__(FEATURES, 2)
    gradients(const Gradient* all, i64 tokens, float* partial, u32* counters) {
  DYNAMIC_SHARED(memory);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, feature = warp * 32 + lane % 4 * 8;
  const Gradient job = all[blockIdx.x];
  bool in = feature < job.features;
  int turns = (int)((tokens + TOKENS - 1) / TOKENS), pairs = (job.columns + 15) / 16;
  int first = (int)((i64)turns * blockIdx.y / gridDim.y), last = (int)((i64)turns * (blockIdx.y + 1) / gridDim.y);

  // A thread copies what it alone reads of y, and some of z, which all read.
  auto load = [&](int turn) {
    if (turn < last) {
      i64 token = (i64)turn * TOKENS + g;
      const Element* from = job.y + token * job.y_pitch + feature;
      uint4* to = (uint4*)(memory + turn % TURNS * TURN_BYTES) + threadIdx.x;
#pragma unroll
      for (int k = 0; k < TOKENS / 8; k++) {
        copy_async(to + k * FEATURES, from, in && token + k * 8 < tokens);
        from += 8 * job.y_pitch;
      }
      Element* narrow_side = (Element*)(memory + turn % TURNS * TURN_BYTES + TOKENS * FEATURES * 2);
#pragma unroll
      for (int k = 0; k < TOKENS * NARROW / 8; k += FEATURES) {
        int row = (k + threadIdx.x) / (NARROW / 8), column = (k + threadIdx.x) % (NARROW / 8) * 8;
        if (row >= TOKENS || column >= 16 * pairs) continue;
        i64 from_row = (i64)turn * TOKENS + row;
        bool there = column < job.columns && from_row < tokens;
        copy_async(narrow_side + row * NARROW_PITCH + column, job.z + from_row * job.z_pitch + column, there);
      }
    }
    commit_copies();
  };
  load(first);

  float sum[4 * PAIRS][4] = {};
#pragma unroll 1
  for (int turn = first; turn < last; turn++) {
    wait_copies<0>();
    __syncthreads();
    load(turn + 1);
    const uint4* ys = (const uint4*)(memory + turn % TURNS * TURN_BYTES) + threadIdx.x;
    const Element* zs = (const Element*)(memory + turn % TURNS * TURN_BYTES + TOKENS * FEATURES * 2) +
                        (lane / 16 * 8 + lane % 8) * NARROW_PITCH + lane / 8 % 2 * 8;
#pragma unroll
    for (int k = 0; k < TOKENS / 16; k++) {
      u32 y[2][4];
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint4 words = ys[(2 * k + half) * FEATURES];
        y[half][0] = transpose_pairs(words.x), y[half][1] = transpose_pairs(words.y);
        y[half][2] = transpose_pairs(words.z), y[half][3] = transpose_pairs(words.w);
      }
#pragma unroll
      for (int pair = 0; pair < PAIRS; pair++)
        if (pair < pairs) {
          u32 z[4];  // ranks in rows, tokens in the depth
          load_transposed(z, zs + k * 16 * NARROW_PITCH + pair * 16);
#pragma unroll
          for (int n = 0; n < 4; n++) multiply_add(sum[4 * pair + n], z, y[0][n], y[1][n]);
        }
    }
  }
  if (!add_up_parts(sum, partial, counters, 4 * pairs) || !in) return;
#pragma unroll
  for (int i = 0; i < 2 * PAIRS; i++) {
    int j = i * 8 + g;  // of ranks g and g + 8 the sums alternate
    if (j >= job.columns || j % job.slot >= job.ranks) continue;
    float* to = job.out + feature * job.feature_stride + (i64)(j / job.slot * job.ranks + j % job.slot) * job.rank_stride;
    float before[8];  // read at once: each waits for memory
    if (job.feature_stride == 1)
      *(float4*)before = *(float4*)to, *(float4*)(before + 4) = *(float4*)(to + 4);
    else
      EIGHT before[i] = to[i * job.feature_stride];
#pragma unroll
    for (int k = 0; k < 8; k++) before[k] += job.scale * sum[i / 2 * 4 + k / 2][i % 2 * 2 + k % 2];
    if (job.feature_stride == 1)
      *(float4*)to = *(float4*)before, *(float4*)(to + 4) = *(float4*)(before + 4);
    else
      EIGHT to[i * job.feature_stride] = before[i];
  }
}

// y [rows, width] = x where the mask keeps and 0 elsewhere, or with add y += x where it keeps (NF4-9.4). Row i is number
// places[i] of sample samples[i]; width is a multiple of 8. A thread block takes a row and up to blockDim.x eights of it.
extern "C" __global__ void drop_rows(const Element* x, i64 x_pitch, i64 width, const u32* samples, const int* places,
                                     u32 k0, u32 k1, u32 stream, u32 threshold, bool add, Element* y, i64 y_pitch) {
  i64 column = ((i64)blockIdx.y * blockDim.x + threadIdx.x) * 8, row = blockIdx.x;
  if (column >= width) return;
  u32 c[4] = {(u32)((places[row] * width + column) / 8), samples[row], stream, DROPOUT};
  philox(c, k0, k1);
  uint4 in = *(const uint4*)(x + row * x_pitch + column);
  Element* to = y + row * y_pitch + column;
  u32 w[4] = {in.x, in.y, in.z, in.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    u32 keep = ((c[i] & 0xffff) >= threshold ? 0xffffu : 0) | ((c[i] >> 16) >= threshold ? 0xffff0000u : 0);
    w[i] &= keep;
  }
  if (add) {
    uint4 before = *(const uint4*)to;
    u32 b[4] = {before.x, before.y, before.z, before.w};
#pragma unroll
    for (int i = 0; i < 4; i++)
      w[i] = narrow_pair(widen((Element)(b[i] & 0xffff)) + widen((Element)(w[i] & 0xffff)),
                         widen((Element)(b[i] >> 16)) + widen((Element)(w[i] >> 16)));
  }
  *(uint4*)to = make_uint4(w[0], w[1], w[2], w[3]);
}
