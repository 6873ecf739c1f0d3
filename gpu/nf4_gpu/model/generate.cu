// One token at a time through a model: products with one row, attention over a cache of keys and values, the likeliest token.
// Vectors are float32 in memory, and bfloat16 where they meet a weight, as in training.
// Defines: DTYPE (BFLOAT16); KIND of the rows: CODES (0), BF16 (1); PROLOGUE: what is done to the vector first, nothing (0), a
// norm (1), SwiGLU (2); GROUP and DIM of attention's heads; QK_NORM. Fused multiply-adds: nothing here is exact.
#include "tensorcore.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)
#define LOG2E 1.44269504088896f
#if KIND == 0
#define GROUP_ROWS 16  // that a thread block takes at a time, each warp a part of the columns
#define SPAN 128       // columns that a warp takes at a time
#define MOST_GROUPS 16 // that a thread block takes
#else
#define PER_WARP 4     // rows of a warp
#define GROUP_ROWS (PER_WARP * WARPS)
#define SPAN 1024
#endif

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

// The product of eight elements of the vector with eight of a row of A.
__device__ __forceinline__ float dot_eight(const Element* xs, const void* row, int wide, i64 at) {
  uint4 words = *(const uint4*)xs;
  u32 w[4] = {words.x, words.y, words.z, words.w};
  float v[8], m[8], sum = 0.f;
  EIGHT v[i] = __uint_as_float(i % 2 ? w[i / 2] & 0xffff0000 : w[i / 2] << 16);
  if (wide) {
    float4 a = __ldg((const float4*)((const float*)row + at)), b = __ldg((const float4*)((const float*)row + at) + 1);
    m[0] = a.x, m[1] = a.y, m[2] = a.z, m[3] = a.w, m[4] = b.x, m[5] = b.y, m[6] = b.z, m[7] = b.w;
  } else {
    uint4 a = __ldg((const uint4*)((const Element*)row + at));
    u32 u[4] = {a.x, a.y, a.z, a.w};
    EIGHT m[i] = __uint_as_float(i % 2 ? u[i / 2] & 0xffff0000 : u[i / 2] << 16);
  }
  EIGHT sum += widen(narrow(m[i])) * v[i];  // A meets the vector in bfloat16, as in training
  return sum;
}

// y = rows times the vector, plus scale b z of their adapter, plus bias, plus y itself if add; z = A times the vector. The first
// thread blocks, one a row of the adapters [narrow_count], make z, and count themselves in ready [2], 0 before and after; the
// others take the jobs [count], `groups` groups of rows in all, and wait for z at the end of one.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    multiply_vector(const Rows* jobs, int count, int groups, const Narrow* adapters, int narrow_count, int narrow_rows,
                    const float* x, int columns, i64 pitch, const float* weight, float eps, float* z, u32* ready, bool add) {
  DYNAMIC_SHARED(memory);
  Element* xs = (Element*)memory;
  int padded = (columns + SPAN - 1) / SPAN * SPAN, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if ((int)blockIdx.x < narrow_rows) {
    prepare(xs, x, columns, weight, eps);
    __syncthreads();
    int row = blockIdx.x, number = 0;
    while (row >= adapters[number].ranks) row -= adapters[number++].ranks;
    const Narrow adapter = adapters[number];
    float sum = 0.f;
#pragma unroll 4
    for (int c = threadIdx.x * 8; c < columns; c += THREADS * 8)
      sum += dot_eight(xs + place_of(c), adapter.from, adapter.wide, (i64)row * columns + c);
    sum = block_total(sum);
    if (threadIdx.x == 0) {
      z[adapter.start + row] = widen(narrow(sum));
      __threadfence();
      atomicAdd(ready, 1u);
    }
    return;
  }
  int group = blockIdx.x - narrow_rows, stride = gridDim.x - narrow_rows;
  auto job_of = [&](int of) {
    int number = 0;
    while (number + 1 < count && jobs[number + 1].first <= of) number++;
    return jobs + number;
  };
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
  // The tensor cores take 16 rows by 16 columns; which columns is free, as long as the vector is read alike. A lane reads 32
  // neighbours of two rows, and all columns of the result are the same. A warp takes every eighth span of a group's columns.
  u32* table = (u32*)(xs + padded);  // [256][32], a copy in each bank: a byte's two values, the first in the low half
  __shared__ float map[256], parts[MOST_GROUPS][GROUP_ROWS][WARPS + 1];
  int quad = lane % 4;
  bool mapped = jobs[0].map != nullptr;  // as of all the jobs
  float value = jobs[0].values[lane % 16];
#pragma unroll 4
  for (int byte = warp; byte < 256; byte += WARPS)
    table[byte * 32 + lane] = narrow_pair(__shfl_sync(~0u, value, byte >> 4), __shfl_sync(~0u, value, byte & 15));
  if (mapped) map[threadIdx.x] = jobs[0].map[threadIdx.x];
  prepare(xs, x, columns, weight, eps);
  __syncthreads();
  const char* mine = (const char*)(table + lane);
  int begin = group, taken = 0;
#pragma unroll 1
  for (; group < groups; group += stride, taken++) {
    const Rows& job = *job_of(group);
    int row = (group - job.first) * GROUP_ROWS + lane / 4, block_shift = job.block_shift, nested_shift = job.nested_shift;
    const u8 *codes = (const u8*)job.from, *absmax = (const u8*)job.absmax;
    const float* nested = job.nested_absmax;
    float offset = mapped ? *job.offset : 0.f;
    i64 row_at[2];
#pragma unroll
    for (int i = 0; i < 2; i++) row_at[i] = (i64)min(row + 8 * i, job.rows - 1) * pitch + quad * 32;
    float sum[2][4] = {};
#pragma unroll 2
    for (int c = warp * SPAN; c < padded; c += WARPS * SPAN) {
      bool there = c + quad * 32 < columns;
      u32 w[2][4], factors[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        uint4 word = make_uint4(0, 0, 0, 0);
        float factor = 0.f;
        if (there) {
          word = __ldcs((const uint4*)(codes + (row_at[i] + c) / 2));
          i64 block = (row_at[i] + c) >> block_shift;
          factor = mapped ? map[__ldg(absmax + block)] * __ldg(nested + (block >> nested_shift)) + offset
                          : __ldg((const float*)absmax + block);
        }
        w[i][0] = word.x, w[i][1] = word.y, w[i][2] = word.z, w[i][3] = word.w;
        factors[i] = narrow_pair(factor, factor);
      }
#pragma unroll
      for (int part = 0; part < 4; part++) {
        uint4 v = *(const uint4*)(xs + ((c / 128 * 4 + part) * 4 + quad) * 8);
#pragma unroll
        for (int half = 0; half < 2; half++) {
          u32 a[4];
#pragma unroll
          for (int i = 0; i < 4; i++) {
            int by = (half * 2 + i / 2) * 8 - 7;  // to 128 times the byte, where its row of the table begins
            u32 word = w[i % 2][part], at = (by < 0 ? word << -by : word >> by) & 0x7f80;
            a[i] = multiply_pairs(*(const u32*)(mine + at), factors[i % 2]);
          }
          multiply_add(sum[half], a, half ? v.z : v.x, half ? v.w : v.y);
        }
      }
    }
    if (quad == 0) {
      parts[taken][lane / 4][warp] = sum[0][0] + sum[1][0];
      parts[taken][lane / 4 + 8][warp] = sum[0][2] + sum[1][2];
    }
  }
  __syncthreads();
  // A thread a row: the warps' parts are added up in order.
  for (int i = threadIdx.x; i < taken * GROUP_ROWS; i += THREADS) {
    int of = begin + i / GROUP_ROWS * stride;
    const Rows& job = *job_of(of);
    int row = (of - job.first) * GROUP_ROWS + i % GROUP_ROWS;
    if (row >= job.rows) continue;
    float out = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) out += parts[i / GROUP_ROWS][i % GROUP_ROWS][w];
    if (job.b) {
      wait_for_z();
#pragma unroll 4
      for (int rank = 0; rank < job.ranks; rank++) out += factor_of_b(job, row, rank) * __ldcg(z + job.start + rank);
    }
    if (job.bias) out += widen(job.bias[row]);
    job.y[row] = add ? job.y[row] + out : out;
  }
#else
  prepare(xs, x, columns, weight, eps);
  __syncthreads();
#pragma unroll 1
  for (; group < groups; group += stride) {
    const Rows job = *job_of(group);
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
  if (threadIdx.x == 0 && atomicInc(ready + 1, gridDim.x - narrow_rows - 1) == gridDim.x - narrow_rows - 1) *ready = 0;
}

// x [width] = row *token of a table, which may lie in the host's pinned memory.
extern "C" __global__ void embed_token(const Element* table, i64 pitch, const int* token, i64 width, float* x) {
  i64 c = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (c < width) x[c] = widen(table[*token * pitch + c]);
}

#define EIGHTS (DIM / 8)
#define LANES (EIGHTS <= 1 ? 1 : EIGHTS <= 2 ? 2 : EIGHTS <= 4 ? 4 : EIGHTS <= 8 ? 8 : EIGHTS <= 16 ? 16 : 32)  // of a key
#define BESIDE (128 / LANES)  // keys that are read at a time
#define CHUNK 64              // keys whose scores are kept at a time

// qkv [(GROUP key_heads + 2 key_heads) DIM] of the token at *position -> mixed [GROUP key_heads DIM], over the keys and values
// in the cache [.., key_heads DIM], to which its own are written. rows [..] are rows of cosines and sines by position. A thread
// block takes a key head and one of gridDim.y parts of the positions; the last of the parts to end adds up what all of them left
// in partial [key_heads, parts, GROUP, DIM], then [key_heads, parts, GROUP, 2]; counters [key_heads] are 0 before and after.
extern "C" __global__ void __launch_bounds__(128)
    attend_token(const float* qkv, Element* keys, Element* values, const int* position, const int* rows,
                 const float* cosines, const float* sines, int window, float scale, const float* query_weight,
                 const float* key_weight, float eps, float* mixed, float* partial, u32* counters) {
  __shared__ __align__(16) float q[GROUP][DIM], k[DIM], scores[GROUP][CHUNK], sums[4][GROUP][DIM];
  __shared__ float tops[GROUP], totals[GROUP], shrinks[GROUP];
  int head = blockIdx.x, key_heads = gridDim.x, parts = gridDim.y, here = *position, pitch = key_heads * DIM;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* angle_c = cosines + (i64)rows[here] * (DIM / 2);
  const float* angle_s = sines + (i64)rows[here] * (DIM / 2);
  // Norms and rotation: a warp a head.
  for (int h = warp; h <= GROUP; h += 4) {
    const float* from = h < GROUP ? qkv + (head * GROUP + h) * DIM : qkv + (key_heads * GROUP + head) * DIM;
    float* to = h < GROUP ? q[h] : k;
    float r = 1.f;
#if QK_NORM
    const float* weight = h < GROUP ? query_weight : key_weight;
    float sum = 0.f;
    for (int c = lane; c < DIM; c += 32) sum += from[c] * from[c];
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    r = 1.f / sqrtf(sum / DIM + eps);
#endif
    for (int c = lane; c < DIM / 2; c += 32) {
      float low = from[c] * r, high = from[DIM / 2 + c] * r;
#if QK_NORM
      low *= weight[c], high *= weight[DIM / 2 + c];
#endif
      to[c] = widen(narrow(low * angle_c[c] - high * angle_s[c]));
      to[DIM / 2 + c] = widen(narrow(high * angle_c[c] + low * angle_s[c]));
    }
  }
  if (threadIdx.x < GROUP) tops[threadIdx.x] = -3e38f, totals[threadIdx.x] = 0.f;
  __syncthreads();
  keys += head * DIM, values += head * DIM;
  int begin = window && here >= window ? here - window + 1 : 0, count = here + 1 - begin;
  int first = begin + (int)((i64)count * blockIdx.y / parts), last = begin + (int)((i64)count * (blockIdx.y + 1) / parts);
  const float* v = qkv + (key_heads * (GROUP + 1) + head) * DIM;
  if (first <= here && here < last)
    for (int c = threadIdx.x; c < DIM; c += 128) {
      keys[(i64)here * pitch + c] = narrow(k[c]);
      values[(i64)here * pitch + c] = narrow(v[c]);
    }
  __syncthreads();  // which the threads of this block, alone in need of it, see
  int part = threadIdx.x % LANES, beside = threadIdx.x / LANES;  // LANES threads a key, eight elements each
  bool works = part < EIGHTS;
  float sum[GROUP][8] = {};
#pragma unroll 1
  for (int key0 = first; key0 < last; key0 += CHUNK) {
    int n = min(CHUNK, last - key0);
#pragma unroll 4
    for (int i = beside; i < CHUNK; i += BESIDE) {
      uint4 words = make_uint4(0, 0, 0, 0);
      if (works && i < n) words = *(const uint4*)(keys + (i64)(key0 + i) * pitch + part * 8);
      u32 w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int h = 0; h < GROUP; h++) {
        float dot = 0.f;
        if (works) EIGHT dot += __uint_as_float(i % 2 ? w[i / 2] & 0xffff0000 : w[i / 2] << 16) * q[h][part * 8 + i];
#pragma unroll
        for (int lanes = LANES / 2; lanes; lanes /= 2) dot += __shfl_xor_sync(~0u, dot, lanes);
        if (part == 0) scores[h][i] = i < n ? dot * scale : -3e38f;
      }
    }
    __syncthreads();
    for (int h = warp; h < GROUP; h += 4) {
      float most = tops[h], total = 0.f;
      for (int i = lane; i < CHUNK; i += 32) most = fmaxf(most, scores[h][i]);
#pragma unroll
      for (int lanes = 16; lanes; lanes /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, lanes));
      for (int i = lane; i < CHUNK; i += 32) {
        float p = power_of_two(scores[h][i] - most);
        scores[h][i] = p;
        total += p;
      }
#pragma unroll
      for (int lanes = 16; lanes; lanes /= 2) total += __shfl_xor_sync(~0u, total, lanes);
      float shrink = power_of_two(tops[h] - most);
      __syncwarp();
      if (lane == 0) tops[h] = most, totals[h] = totals[h] * shrink + total, shrinks[h] = shrink;
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < GROUP; h++) EIGHT sum[h][i] *= shrinks[h];
#pragma unroll 4
    for (int i = beside; i < n; i += BESIDE) {
      uint4 words = make_uint4(0, 0, 0, 0);
      if (works) words = *(const uint4*)(values + (i64)(key0 + i) * pitch + part * 8);
      u32 w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int h = 0; h < GROUP; h++) {
        float p = scores[h][i];
        EIGHT sum[h][i] += p * __uint_as_float(i % 2 ? w[i / 2] & 0xffff0000 : w[i / 2] << 16);
      }
    }
    __syncthreads();  // the scores are read
  }
#pragma unroll
  for (int h = 0; h < GROUP; h++)
#pragma unroll
    for (int i = 0; i < 8; i++) {
#pragma unroll
      for (int lanes = LANES; lanes < 32; lanes *= 2) sum[h][i] += __shfl_xor_sync(~0u, sum[h][i], lanes);
      if (works && lane < LANES) sums[warp][h][part * 8 + i] = sum[h][i];
    }
  __syncthreads();
  float* all = partial + (i64)head * parts * GROUP * DIM;
  float* all_tops = partial + (i64)key_heads * parts * GROUP * DIM + (i64)head * parts * GROUP * 2;  // and totals
  for (int i = threadIdx.x; i < GROUP * DIM; i += 128) {
    float total = 0.f;
#pragma unroll
    for (int other = 0; other < 4; other++) total += (&sums[other][0][0])[i];
    all[blockIdx.y * GROUP * DIM + i] = total;
  }
  if (threadIdx.x < GROUP)
    *(float2*)(all_tops + (blockIdx.y * GROUP + threadIdx.x) * 2) = make_float2(tops[threadIdx.x], totals[threadIdx.x]);
  __shared__ bool ours;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) ours = atomicInc(counters + head, parts - 1) == (u32)parts - 1;  // and 0 again
  __syncthreads();
  if (!ours) return;
  __threadfence();
  // What each part is multiplied by, over the scores: parts are at most CHUNK.
  float* factors = &scores[0][0];  // [GROUP, parts]
  for (int h = warp; h < GROUP; h += 4) {
    float most = -3e38f, total = 0.f;
    float2 found[CHUNK / 32];
#pragma unroll
    for (int k = 0; k < CHUNK / 32; k++) {
      int i = lane + k * 32;
      found[k] = i < parts ? __ldcg((const float2*)(all_tops + (i * GROUP + h) * 2)) : make_float2(-3e38f, 0.f);
      most = fmaxf(most, found[k].x);
    }
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, lanes));
#pragma unroll
    for (int k = 0; k < CHUNK / 32; k++) found[k].x = power_of_two(found[k].x - most), total += found[k].x * found[k].y;
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) total += __shfl_xor_sync(~0u, total, lanes);
#pragma unroll
    for (int k = 0; k < CHUNK / 32; k++)
      if (lane + k * 32 < parts) factors[h * parts + lane + k * 32] = found[k].x / total;
  }
  __syncthreads();
  for (int i = threadIdx.x * 4; i < GROUP * DIM; i += 512) {
    const float* mine = factors + i / DIM * parts;
    float4 out = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 16
    for (int other = 0; other < parts; other++) {
      float4 part = __ldcg((const float4*)(all + other * GROUP * DIM + i));
      out.x += mine[other] * part.x, out.y += mine[other] * part.y;
      out.z += mine[other] * part.z, out.w += mine[other] * part.w;
    }
    *(float4*)(mixed + head * GROUP * DIM + i) = out;
  }
}

// The largest of logits [n], the first of equals -> *token, tokens [*position + 1], and *position + 1. A thread block takes a
// part of them; partial [gridDim.x] and counter, 0 before and after, are theirs.
extern "C" __global__ void __launch_bounds__(256)
    take_likeliest(const float* logits, i64 n, int* token, int* tokens, int* position, u64* partial, u32* counter) {
  __shared__ u64 best[8];
  // Ordered as integers: the logit, then the smaller index.
  auto key = [](float x, i64 i) {
    u32 bits = __float_as_uint(x);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (u64)bits << 32 | (0xffffffffu - (u32)i);
  };
  auto over_block = [&](u64 mine) {
    u32 high = mine >> 32, low = (u32)mine;
    for (int lanes = 16; lanes; lanes /= 2) {
      u32 other_high = __shfl_xor_sync(~0u, high, lanes), other_low = __shfl_xor_sync(~0u, low, lanes);
      if (other_high > high || (other_high == high && other_low > low)) high = other_high, low = other_low;
    }
    __syncthreads();
    if (threadIdx.x % 32 == 0) best[threadIdx.x / 32] = (u64)high << 32 | low;
    __syncthreads();
    u64 found = best[0];
    for (int i = 1; i < 8; i++) found = best[i] > found ? best[i] : found;
    return found;
  };
  u64 mine = 0;
  for (i64 i = (i64)blockIdx.x * 256 + threadIdx.x; i < n; i += (i64)gridDim.x * 256) {
    u64 other = key(logits[i], i);
    mine = other > mine ? other : mine;
  }
  mine = over_block(mine);
  __shared__ bool ours;
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = mine;
    __threadfence();
    ours = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;  // and 0 again
  }
  __syncthreads();
  if (!ours) return;
  __threadfence();
  mine = threadIdx.x < gridDim.x ? __ldcg(partial + threadIdx.x) : 0;
  mine = over_block(mine);
  if (threadIdx.x == 0) {
    int found = (int)(0xffffffffu - (u32)mine), next = *position + 1;
    *token = found;
    tokens[next] = found;
    *position = next;
  }
}
