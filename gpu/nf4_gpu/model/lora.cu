// What adapters need beside products with weights: narrow products x A^T and dy B, the gradients of A and B, dropout.
// Defines: DTYPE (BFLOAT16); WARPS of a thread block, 4 or 8; PAIRS: of eights of columns of the narrow side, 1 to 4; ACROSS
// (0, 1): how project's factor lies.
// Fused multiply-adds: nothing here is exact but the masks of dropout (NF4-11.4).
#include "philox.cuh"
#include "tensorcore.cuh"

#define THREADS (32 * WARPS)
#define RESIDENT (WARPS == 8 ? 2 : 3)  // thread blocks of a multiprocessor at a time
#define WIDE (16 * WARPS)         // rows, or features, of a thread block
#define STAGES 4
#define DEPTH 64                  // of the sum, a stage
#define NARROW (16 * PAIRS)       // columns, with those that are not there
#define PITCH (DEPTH + 8)         // elements between rows in shared memory, so that no bank is met twice
#define NARROW_PITCH (NARROW + 8)
#define WIDE_PITCH (WIDE + 8)
#define WIDE_STAGE (WIDE * PITCH > DEPTH * WIDE_PITCH ? WIDE * PITCH : DEPTH * WIDE_PITCH)
#define NARROW_STAGE (DEPTH * NARROW_PITCH > NARROW * PITCH ? DEPTH * NARROW_PITCH : NARROW * PITCH)

// Of [.., NARROW_PITCH] in shared memory, 16 rows (the depth) by 16 columns from `column` on: b of two products.
__device__ __forceinline__ void load_across(u32 b[4], const Element* rows, int column, int lane) {
  load_transposed(b, rows + lane % 16 * NARROW_PITCH + column + lane / 16 * 8);
}

// Sums of a thread block, added up over gridDim.y parts: the last of them to end has all, in order, and gets true; the others
// are done. partial [gridDim.x, parts, WIDE, NARROW]; counters [gridDim.x] are 0 before and after.
__device__ __forceinline__ bool add_up_parts(float sum[2 * PAIRS][4], float* partial, u32* counters) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, parts = gridDim.y;
  if (parts == 1) return true;
  float* all = partial + (i64)blockIdx.x * parts * WIDE * NARROW + ((warp * 2 * PAIRS * 32) + lane) * 4;
  float* mine = all + (i64)blockIdx.y * WIDE * NARROW;
#pragma unroll
  for (int n = 0; n < 2 * PAIRS; n++)
    *(float4*)(mine + n * 128) = make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
  __shared__ bool ours;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) ours = atomicInc(counters + blockIdx.x, parts - 1) == (u32)parts - 1;  // and 0 again
  __syncthreads();
  if (!ours) return false;
  __threadfence();
#pragma unroll
  for (int n = 0; n < 2 * PAIRS; n++) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0.f;
  for (int part = 0; part < parts; part++)
#pragma unroll
    for (int n = 0; n < 2 * PAIRS; n++) {
      float4 p = __ldcg((const float4*)(all + (i64)part * WIDE * NARROW + n * 128));
      sum[n][0] += p.x, sum[n][1] += p.y, sum[n][2] += p.z, sum[n][3] += p.w;
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

// A part of a gradient: out[f, j] += scale times the sum over tokens of y[t, f] z[t, j], for up to WIDE features f. Rank j of a
// group of adapters, in slots of `slot` columns, is row j / slot * ranks + j % slot of out if j % slot < ranks.
struct Gradient {
  const Element* y;
  const Element* z;
  float* out;
  i64 feature_stride, rank_stride;  // in out
  int y_pitch, z_pitch, features, columns;
  int slot, ranks;
  float scale;
  int unused;
};

// A thread block makes one of the gradients from one of gridDim.y parts of the tokens.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    gradients(const Gradient* all, i64 tokens, float* partial, u32* counters) {
  DYNAMIC_SHARED(memory);
  Element* wide = (Element*)memory;
  Element* narrow_side = wide + STAGES * WIDE_STAGE;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Gradient job = all[blockIdx.x];
  int stages = (int)((tokens + DEPTH - 1) / DEPTH), pairs = (job.columns + 15) / 16, parts = gridDim.y;
  int first = (int)((i64)stages * blockIdx.y / parts), last = (int)((i64)stages * (blockIdx.y + 1) / parts);

  // A thread copies the same columns of rows that are so far apart; likewise of z.
  const int APART = THREADS / (WIDE / 8), Z_APART = THREADS / (NARROW / 8);
  int r0 = threadIdx.x / (WIDE / 8), c0 = threadIdx.x % (WIDE / 8) * 8;
  int zr = threadIdx.x / (NARROW / 8), zc = threadIdx.x % (NARROW / 8) * 8;
  bool y_works = c0 < job.features, z_works = zc < job.columns;
  const Element* y_from = job.y + ((i64)first * DEPTH + r0) * job.y_pitch + c0;
  const Element* z_from = job.z + ((i64)first * DEPTH + zr) * job.z_pitch + zc;
  auto load = [&](int stage) {
    if (stage < last) {
      int left = (int)(tokens - (i64)stage * DEPTH);
      Element* to = wide + stage % STAGES * WIDE_STAGE + r0 * WIDE_PITCH + c0;
#pragma unroll
      for (int k = 0; k < DEPTH / APART; k++) {
        bool there = y_works && r0 + k * APART < left;
        copy_async(to + k * APART * WIDE_PITCH, y_from + (i64)k * APART * job.y_pitch, there);
      }
      y_from += (i64)DEPTH * job.y_pitch;
      to = narrow_side + stage % STAGES * NARROW_STAGE + zr * NARROW_PITCH + zc;
      if (zr < Z_APART && zc < 16 * pairs)
#pragma unroll
        for (int k = 0; k < (DEPTH + Z_APART - 1) / Z_APART; k++) {
          if (zr + k * Z_APART >= DEPTH) break;
          bool there = z_works && zr + k * Z_APART < left;
          copy_async(to + k * Z_APART * NARROW_PITCH, z_from + (i64)k * Z_APART * job.z_pitch, there);
        }
      z_from += (i64)DEPTH * job.z_pitch;
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
    const Element* ys = wide + stage % STAGES * WIDE_STAGE + (lane / 16 * 8 + lane % 8) * WIDE_PITCH + warp * 16 +
                        lane / 8 % 2 * 8;
    const Element* zs = narrow_side + stage % STAGES * NARROW_STAGE;
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
      u32 a[4];
      load_transposed(a, ys + k * WIDE_PITCH);
#pragma unroll
      for (int pair = 0; pair < PAIRS; pair++)
        if (pair < pairs) {
          u32 b[4];
          load_across(b, zs + k * NARROW_PITCH, pair * 16, lane);
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
    for (int i = 0; i < 4; i++) {
      int f = warp * 16 + lane / 4 + i / 2 * 8, j = n * 8 + lane % 4 * 2 + i % 2;
      if (f >= job.features || j >= job.columns || j % job.slot >= job.ranks) continue;
      i64 rank = j / job.slot * job.ranks + j % job.slot;
      job.out[f * job.feature_stride + rank * job.rank_stride] += job.scale * sum[n][i];
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
