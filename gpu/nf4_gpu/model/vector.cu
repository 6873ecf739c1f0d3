// Products of one row, a vector, with the weights: codes of NF4 or bfloat16, beside them adapters.
// The vector is float32 in memory, and bfloat16 where it meets a weight, as in training.
// Defines: DTYPE (BFLOAT16); KIND of the rows: CODES (0), BF16 (1); PROLOGUE: what is done to the vector first, nothing (0), a
// norm (1), SwiGLU (2); of codes also WARPS, TABLE_ROW (256, or 128 or 64 where shared memory is short), and HALVES, whether a
// row's 64 columns may be of two blocks.
// Fused multiply-adds: nothing here is exact. A kernel may begin while the one before it ends, and waits for that by itself.
//
// What each step brought, in tokens a second of 8B with adapters of rank 16, on an H100 (2026-11-26; in brackets: generate.cu):
//   a warp a row of the adapters; at the end a thread a row                246
//   more thread blocks for them, loaded ahead; eight lanes a row           286
//   scales and the ends' factors are asked for before the codes            300
//   (attention: all of a chunk's keys on their way at once)                316
//   two stages of codes a warp in place of four                            333
#include "tensorcore.cuh"

#define LOG2E 1.44269504088896f
#if KIND == 0
#define GROUP_ROWS 16  // that a thread block takes at a time, each warp a part of the columns
#define SPAN 256       // columns that a warp takes at a time
#define STAGE (GROUP_ROWS * SPAN / 2)  // bytes of codes
#define STAGES 2               // with more on their way, all that goes through memory waits longer
#define MOST_GROUPS WARPS  // whose sums are kept until they are added up
#define MOST_JOBS 3
#define MOST_Z 256     // of z, what is kept beside
#else
#define WARPS 8
#define PER_WARP 4     // rows of a warp
#define GROUP_ROWS (PER_WARP * WARPS)
#define SPAN 1024
#endif
#define THREADS (WARPS * 32)
#define AHEAD 8        // loads of a row of A

// Rows of a weight or of the head.
struct Rows {
  const void* from;     // codes, or bfloat16, `pitch` elements a row
  const void* absmax;   // float32; or codes of it, if there is a map
  const float* nested_absmax;
  const float* offset;
  const float* values;  // [16]
  const float* map;     // [256] or null
  const Element* bias;  // or null
  const void* b;        // [rows, ranks] of an adapter, or null
  float* y;             // where the rows' results go
  int rows, first;      // first: groups of rows before these
  int block_shift, nested_shift;
  int ranks, start;     // start: of the adapter's part of z
  int wide;             // whether b is in float32
  float scale;
};

// An adapter's A [ranks, columns], and where its products with the vector go.
struct Narrow {
  const void* from;
  int ranks, start, wide, unused;
};

// Where a column lies. For codes a lane of four has 32 columns in a row, read eight at a time; the four lie side by side.
__device__ __forceinline__ int place_of(int column) {
#if KIND == 0
  return (column / 128 * 16 + column / 8 % 4 * 4 + column / 32 % 4) * 8 + column % 8;
#else
  return column;
#endif
}

__device__ __forceinline__ float block_total(float v) {
  __shared__ float sums[WARPS];
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) v += __shfl_xor_sync(~0u, v, lanes);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
  __syncthreads();
  v = 0.f;
#pragma unroll
  for (int i = 0; i < WARPS; i++) v += sums[i];
  return v;
}

// The vector as the weights meet it: columns of x [columns], or gate and up [2 columns], after the prologue, in bfloat16; zeros
// up to a whole span.
__device__ __forceinline__ void prepare(Element* xs, const float* x, int columns, const float* weight, float eps) {
  int padded = (columns + SPAN - 1) / SPAN * SPAN;
#if PROLOGUE == 1
  float sum = 0.f;
#pragma unroll 4
  for (int c = threadIdx.x * 4; c < columns; c += THREADS * 4) {
    float4 v = *(const float4*)(x + c);
    sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  float r = 1.f / sqrtf(block_total(sum) / columns + eps);
#endif
#pragma unroll 4
  for (int c = threadIdx.x * 4; c < padded; c += THREADS * 4) {
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    if (c < columns) {
      v = *(const float4*)(x + c);
#if PROLOGUE == 1
      float4 w = *(const float4*)(weight + c);
      v.x *= r * w.x, v.y *= r * w.y, v.z *= r * w.z, v.w *= r * w.w;
#elif PROLOGUE == 2
      float4 up = *(const float4*)(x + columns + c);
      v.x *= quick_reciprocal(1.f + power_of_two(-LOG2E * v.x)) * up.x;
      v.y *= quick_reciprocal(1.f + power_of_two(-LOG2E * v.y)) * up.y;
      v.z *= quick_reciprocal(1.f + power_of_two(-LOG2E * v.z)) * up.z;
      v.w *= quick_reciprocal(1.f + power_of_two(-LOG2E * v.w)) * up.w;
#endif
    }
    *(uint2*)(xs + place_of(c)) = make_uint2(narrow_pair(v.x, v.y), narrow_pair(v.z, v.w));
  }
}

// Eight elements of a row of A in bfloat16, as A meets the vector: so it is in training.
__device__ __forceinline__ uint4 eight_of_a(const void* row, int wide, i64 at) {
  if (!wide) return __ldg((const uint4*)((const Element*)row + at));
  float4 a = __ldg((const float4*)((const float*)row + at)), b = __ldg((const float4*)((const float*)row + at) + 1);
  return make_uint4(narrow_pair(a.x, a.y), narrow_pair(a.z, a.w), narrow_pair(b.x, b.y), narrow_pair(b.z, b.w));
}

__device__ __forceinline__ float dot_eight(uint4 a, uint4 b) {
  u32 m[4] = {a.x, a.y, a.z, a.w}, v[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++)
    sum += __uint_as_float(m[i] << 16) * __uint_as_float(v[i] << 16) +
           __uint_as_float(m[i] & 0xffff0000) * __uint_as_float(v[i] & 0xffff0000);
  return sum;
}

// y = rows times the vector, plus scale b z of their adapter, plus bias, plus y itself if add; z = A times the vector. The first
// thread blocks, `narrow_blocks` of them, make z, each its share of the rows of the adapters [narrow_rows], and count them in
// ready [2], 0 before and after; the others take the jobs [count], `groups` groups of rows in all, and wait for z before they end
// rows with an adapter: if there are rows of adapters, one job has one.
extern "C" __global__ void __launch_bounds__(THREADS, KIND == 0 ? 1 : 2)
    multiply_vector(const Rows* jobs, int count, int groups, const Narrow* adapters, int narrow_rows, int narrow_blocks,
                    const float* x, int columns, i64 pitch, const float* weight, float eps, float* z, u32* ready, bool add) {
  DYNAMIC_SHARED(memory);
  let_next_begin();
  int padded = (columns + SPAN - 1) / SPAN * SPAN, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#if KIND == 0
  u8* ring = memory + 256 * TABLE_ROW;
  Element* xs = (Element*)(ring + WARPS * STAGES * STAGE);
#else
  Element* xs = (Element*)memory;
#endif
  if ((int)blockIdx.x < narrow_blocks) {
    // As many warps a row as there are, each a part of the columns; the first are loaded before there is a vector.
    __shared__ float found[WARPS];
    int own = (narrow_rows + narrow_blocks - 1) / narrow_blocks, beside = 1;
    while (2 * beside * own <= WARPS) beside *= 2;
    int step = beside * 256, c0 = warp % beside * 256 + lane * 8;
    auto row_of = [&](int round) { return (int)blockIdx.x + narrow_blocks * (round * (WARPS / beside) + warp / beside); };
    auto find = [&](int& row) {
      int number = 0;
      while (row >= adapters[number].ranks) row -= adapters[number++].ranks;
      return adapters[number];
    };
    int row = row_of(0), place = row;
    Narrow adapter = {};
    uint4 ahead[AHEAD];
    if (row < narrow_rows) {
      adapter = find(place);
#pragma unroll
      for (int i = 0; i < AHEAD; i++)
        if (c0 + i * step < columns) ahead[i] = eight_of_a(adapter.from, adapter.wide, (i64)place * columns + c0 + i * step);
      for (int c = c0 + AHEAD * step; c < columns; c += step)
        prefetch((const u8*)adapter.from + ((i64)place * columns + c) * (adapter.wide ? 4 : 2));
    }
    wait_for_previous();
    prepare(xs, x, columns, weight, eps);
    __syncthreads();
    for (int round = 0; round * (WARPS / beside) < own; round++) {
      if (round && (row = place = row_of(round)) < narrow_rows) adapter = find(place);
      float sum = 0.f;
      if (row < narrow_rows) {
        if (round == 0)
#pragma unroll
          for (int i = 0; i < AHEAD; i++)
            if (c0 + i * step < columns) sum += dot_eight(ahead[i], *(const uint4*)(xs + place_of(c0 + i * step)));
#pragma unroll 2
        for (int c = c0 + (round == 0 ? AHEAD * step : 0); c < columns; c += step)
          sum += dot_eight(eight_of_a(adapter.from, adapter.wide, (i64)place * columns + c), *(const uint4*)(xs + place_of(c)));
      }
#pragma unroll
      for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      if (lane == 0) found[warp] = sum;
      __syncthreads();
      if (lane == 0 && warp % beside == 0 && row < narrow_rows) {
        for (int i = 1; i < beside; i++) sum += found[warp + i];
        z[adapter.start + place] = widen(narrow(sum));
        __threadfence();
        atomicAdd(ready, 1u);
      }
      __syncthreads();
    }
    return;
  }
  int first = blockIdx.x - narrow_blocks, stride = gridDim.x - narrow_blocks;
  auto wait_for_z = [&] {
    while (*(volatile u32*)ready < (u32)narrow_rows) {
    }
    __threadfence();
  };
  auto factor_of_b = [&](const Rows& job, int row, int rank) {
    i64 at = (i64)row * job.ranks + rank;
    float b = job.wide ? ((const float*)job.b)[at] : widen(((const Element*)job.b)[at]);
    return widen(narrow(b * job.scale));  // B meets z in bfloat16, as in training
  };
#if KIND == 0
  // The tensor cores take 16 rows by 16 columns; which columns is free, as long as the vector is read alike. A lane, number
  // 4 g + q, decodes 32 neighbours of rows g and g + 8, from column 32 q of a span on, then 32 from 128 + 32 q on. Each of
  // the eight 32 of a span has a column of the result to itself: the vector is zero in the others. So a result is of one
  // absmax, by which it is then multiplied. A lane has the vector's part for column g if g % 4 is q, the lower columns' of
  // the first half of a span, the upper ones' of the second: each half is summed up with all eight, of which four mean
  // something, and a lane loads once what it has. The warps have every sixteenth span of a group's rows, and each a ring of
  // codes on their way.
  __shared__ Rows own[MOST_JOBS];
  __shared__ float map[256], offsets[MOST_JOBS], kept_z[MOST_Z];
  float* parts = (float*)(xs + padded);  // [MOST_GROUPS][GROUP_ROWS][WARPS + 1]
  for (int i = threadIdx.x; i < count * (int)(sizeof(Rows) / 4); i += THREADS) ((u32*)own)[i] = ((const u32*)jobs)[i];
  __syncthreads();
  auto job_of = [&](int group) {
    int number = 0;
    while (number + 1 < count && own[number + 1].first <= group) number++;
    return number;
  };
  int quad = lane % 4, g = lane / 4, spans = padded / SPAN, lane_column = g / 4 * 128 + quad * 8;
  bool has_column = g % 4 == quad;
  bool mapped = own[0].map != nullptr;  // as of all the jobs
  int z_size = 0;
  for (int i = 0; i < count; i++) z_size = max(z_size, own[i].b ? own[i].start + own[i].ranks : 0);
  struct Place {
    int group, span;
  };
  auto advance = [&](Place& place) {
    if ((place.span += WARPS) >= spans) place.span = warp, place.group += stride;
  };
  Place to_copy = {warp < spans ? first : groups, warp}, to_scale = to_copy;
  ring += warp * (STAGES * STAGE);
  // Eight lanes copy a row's 128 bytes. Every second row is kept crosswise: then eight lanes read from all banks. A lane keeps
  // the address it copies to: of an address and an offset that all lanes share, ptxas 13.0 makes an illegal instruction.
  u32 first_place = shared_address(ring) + lane / 8 * 128 + (lane % 8 ^ lane / 8 % 2 * 4) * 16, to = first_place;
  auto copy_codes = [&] {
    if (to_copy.group < groups) {
      const Rows& job = own[job_of(to_copy.group)];
      int c = to_copy.span * SPAN + lane % 8 * 32, row0 = (to_copy.group - job.first) * GROUP_ROWS + lane / 8;
      const u8* from = (const u8*)job.from + (row0 * pitch + c) / 2;
      int left = c < columns ? job.rows - row0 : 0;
#pragma unroll
      for (int i = 0; i < 4; i++) copy_once(to + i * 512, from + i * 2 * pitch, i * 4 < left);
    }
    if ((to += STAGE) == first_place + STAGES * STAGE) to = first_place;
    commit_copies();
    advance(to_copy);
  };
  // The scales of a lane's results, a span ahead: those of rows g and g + 8, from column 64 q of the span on.
  float nested[2][1 + HALVES];
  u32 codes[2][1 + HALVES];
  auto load_scales = [&] {
    const Rows& job = own[job_of(min(to_scale.group, groups - 1))];
    const void* absmax = job.absmax;
    const float* nested_absmax = job.nested_absmax;
    int block_shift = job.block_shift, nested_shift = job.nested_shift, row0 = (to_scale.group - job.first) * GROUP_ROWS + g;
    int left = to_scale.group < groups ? job.rows - row0 : 0;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int half = 0; half <= HALVES; half++) {
        int c = to_scale.span * SPAN + quad * 64 + half * 32;
        nested[i][half] = 0.f, codes[i][half] = 0;
        if (i * 8 >= left || c >= columns) continue;
        i64 block = ((row0 + i * 8) * pitch + c) >> block_shift;
        nested[i][half] = mapped ? __ldg(nested_absmax + (block >> nested_shift)) : __ldg((const float*)absmax + block);
        if (mapped) codes[i][half] = __ldg((const u8*)absmax + block);
      }
    advance(to_scale);
  };
  // What is needed first is asked for first, then into the L2 cache what will be: scales, and the adapters' part of the ends.
  float value = __ldg(own[0].values + lane % 16), of_map[(256 + THREADS - 1) / THREADS];
#pragma unroll
  for (int i = 0; i < (256 + THREADS - 1) / THREADS; i++)
    of_map[i] = mapped && i * THREADS + threadIdx.x < 256 ? __ldg(own[0].map + i * THREADS + threadIdx.x) : 0.f;
  float offset_of_job = mapped && threadIdx.x < count ? __ldg(own[threadIdx.x].offset) : 0.f;
  for (int group = first + warp * stride; group < groups; group += WARPS * stride) {
    const Rows& job = own[job_of(group)];
    auto fetch = [&](const void* from, i64 begin, i64 end) {
      for (i64 at = begin + lane * 128; at < end; at += 32 * 128) prefetch((const u8*)from + at);
    };
    int row0 = (group - job.first) * GROUP_ROWS, rows = min(job.rows - row0, GROUP_ROWS);
    i64 block0 = row0 * pitch >> job.block_shift, block1 = (row0 + rows) * pitch >> job.block_shift;
    fetch(job.absmax, mapped ? block0 : 4 * block0, mapped ? block1 : 4 * block1);
    if (mapped) fetch(job.nested_absmax, 4 * (block0 >> job.nested_shift), 4 * (block1 >> job.nested_shift));
    i64 size = job.ranks * (job.wide ? 4 : 2);
    if (job.b) fetch(job.b, row0 * size, (row0 + rows) * size);
  }
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) copy_codes();
  load_scales();
  // The table: a byte's two values, the first in the low half, in each bank or some.
  u32 bank = lane * 4 % min(TABLE_ROW, 128);
#pragma unroll 4
  for (int byte = warp; byte < 256; byte += WARPS)
    *(u32*)(memory + byte * TABLE_ROW + bank) =
        narrow_pair(__shfl_sync(~0u, value, byte >> 4), __shfl_sync(~0u, value, byte & 15));
#pragma unroll
  for (int i = 0; i < (256 + THREADS - 1) / THREADS; i++)
    if (i * THREADS + threadIdx.x < 256) map[i * THREADS + threadIdx.x] = of_map[i];
  if (threadIdx.x < count) offsets[threadIdx.x] = offset_of_job;
  wait_for_previous();
  prepare(xs, x, columns, weight, eps);
  __syncthreads();
  auto look_up = [&](u32 word, int byte) {
#if TABLE_ROW == 256
    return *(const u32*)(memory + __byte_perm(word, bank, 0x5504 | byte << 4));  // the byte, eight bits up, and the bank
#else
    const int up = TABLE_ROW == 128 ? 7 : 6;
    return *(const u32*)(memory + ((byte ? word >> (byte * 8 - up) : word << up) & 255 << up) + bank);
#endif
  };
  int slot = 0;
#pragma unroll 1
  for (int begin = first; begin < groups; begin += MOST_GROUPS * stride) {
    int taken = 0;
#pragma unroll 1
    for (int group = begin; group < groups && taken < MOST_GROUPS; group += stride, taken++) {
      float total[2] = {}, offset = offsets[job_of(group)];
#pragma unroll 1
      for (int span = warp; span < spans; span += WARPS) {
        float scale[2][1 + HALVES];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int half = 0; half <= HALVES; half++)
            scale[i][half] = mapped ? map[codes[i][half]] * nested[i][half] + offset : nested[i][half];
        load_scales();
        wait_copies<STAGES - 2>();
        __syncwarp();
        u32 words[2][2][4];  // of two rows, from two places
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int half = 0; half < 2; half++) {
            uint4 word = *(const uint4*)(ring + slot * STAGE + (g + i * 8) * 128 + ((half * 4 + quad) ^ g % 2 * 4) * 16);
            words[i][half][0] = word.x, words[i][half][1] = word.y, words[i][half][2] = word.z, words[i][half][3] = word.w;
          }
        copy_codes();  // where all lanes have read
        if (++slot == STAGES) slot = 0;
        float sums[2][4] = {};  // of the halves
#pragma unroll
        for (int part = 0; part < 4; part++) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (has_column) v = *(const uint4*)(xs + span * SPAN + part * 32 + lane_column);
#pragma unroll
          for (int k = 0; k < 2; k++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
              u32 a[4];
#pragma unroll
              for (int i = 0; i < 4; i++) a[i] = look_up(words[i % 2][half][part], k * 2 + i / 2);
              multiply_add(sums[half], a, k ? v.z : v.x, k ? v.w : v.y);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
          total[i] += (quad < 2 ? sums[0][i * 2] : sums[1][i * 2]) * scale[i][0] +
                      (quad < 2 ? sums[0][i * 2 + 1] : sums[1][i * 2 + 1]) * scale[i][HALVES];
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
        total[i] += __shfl_xor_sync(~0u, total[i], 1);
        total[i] += __shfl_xor_sync(~0u, total[i], 2);
        if (quad == 0) parts[(taken * GROUP_ROWS + g + i * 8) * (WARPS + 1) + warp] = total[i];
      }
    }
    __syncthreads();
    // Eight lanes a row add up the warps' parts and the adapter's.
    if (narrow_rows && begin == first) {
      wait_for_z();
      for (int i = threadIdx.x; i < min(z_size, MOST_Z); i += THREADS) kept_z[i] = __ldcg(z + i);
      __syncthreads();
    }
#pragma unroll 4
    for (int i = threadIdx.x / 8; i < taken * GROUP_ROWS; i += THREADS / 8) {
      int group = begin + i / GROUP_ROWS * stride, eighth = lane % 8;
      const Rows& job = own[job_of(group)];
      int row = (group - job.first) * GROUP_ROWS + i % GROUP_ROWS;
      bool there = row < job.rows;
      float out = 0.f;
      if (job.b && there)
#pragma unroll 2
        for (int rank = eighth; rank < job.ranks; rank += 8) {
          int at = job.start + rank;
          out += factor_of_b(job, row, rank) * (at < MOST_Z ? kept_z[at] : __ldcg(z + at));
        }
#pragma unroll
      for (int w = 0; w < WARPS; w += 8)
        if (w + eighth < WARPS) out += parts[i * (WARPS + 1) + w + eighth];
#pragma unroll
      for (int lanes = 4; lanes; lanes /= 2) out += __shfl_xor_sync(~0u, out, lanes);
      if (eighth == 0 && there) {
        if (job.bias) out += widen(job.bias[row]);
        job.y[row] = add ? job.y[row] + out : out;
      }
    }
    __syncthreads();  // the parts are read
  }
#else
  wait_for_previous();
  prepare(xs, x, columns, weight, eps);
  __syncthreads();
#pragma unroll 1
  for (int group = first; group < groups; group += stride) {
    int number = 0;
    while (number + 1 < count && jobs[number + 1].first <= group) number++;
    const Rows job = jobs[number];
    int row0 = (group - job.first) * GROUP_ROWS;
    float sum[PER_WARP] = {};
    row0 += warp * PER_WARP;
#pragma unroll 1
    for (int c = lane * 8; c < padded; c += SPAN) {
      uint4 words[PER_WARP][4];
#pragma unroll
      for (int r = 0; r < PER_WARP; r++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          words[r][i] = c + i * 256 < columns ? __ldcs((const uint4*)((const Element*)job.from +
                                                                     (i64)min(row0 + r, job.rows - 1) * pitch + c + i * 256))
                                              : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        uint4 part = *(const uint4*)(xs + c + i * 256);
        u32 v[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
        for (int r = 0; r < PER_WARP; r++) {
          u32 m[4] = {words[r][i].x, words[r][i].y, words[r][i].z, words[r][i].w};
#pragma unroll
          for (int k = 0; k < 4; k++)
            sum[r] += __uint_as_float(m[k] << 16) * __uint_as_float(v[k] << 16) +
                      __uint_as_float(m[k] & 0xffff0000) * __uint_as_float(v[k] & 0xffff0000);
        }
      }
    }
    if (job.b && row0 < job.rows) {
      wait_for_z();
#pragma unroll
      for (int r = 0; r < PER_WARP; r++)
        for (int rank = lane; rank < job.ranks; rank += 32)
          sum[r] += factor_of_b(job, min(row0 + r, job.rows - 1), rank) * __ldcg(z + job.start + rank);
    }
#pragma unroll
    for (int r = 0; r < PER_WARP; r++) {
#pragma unroll
      for (int lanes = 16; lanes; lanes /= 2) sum[r] += __shfl_xor_sync(~0u, sum[r], lanes);
      int row = row0 + r;
      if (lane != 0 || row >= job.rows) continue;
      float out = sum[r];
      if (job.bias) out += widen(job.bias[row]);
      job.y[row] = add ? job.y[row] + out : out;
    }
  }
#endif
  if (narrow_rows == 0) return;
  __syncthreads();
  if (threadIdx.x == 0 && atomicInc(ready + 1, stride - 1) == (u32)stride - 1) *ready = 0;
}
