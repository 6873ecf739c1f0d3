// One token at a time through a model: products with one row, attention over a cache of keys and values, the likeliest token.
// Vectors are float32 in memory, and bfloat16 where they meet a weight, as in training.
// Defines: DTYPE (BFLOAT16); KIND of the rows: CODES (0), BF16 (1), FLOATS (2); PROLOGUE: what is done to the vector first,
// nothing (0), a norm (1), SwiGLU (2); PER_WARP: rows of a warp; GROUP and DIM of attention's heads; QK_NORM.
// Fused multiply-adds: nothing here is exact.
#include "tensorcore.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)
#define LOG2E 1.44269504088896f

// Rows of a weight, of an adapter's A, or of the head.
struct Rows {
  const void* from;     // codes, bfloat16 or float32, `pitch` elements a row
  const void* absmax;   // float32; or codes of it, if there is a map
  const float* nested_absmax;
  const float* offset;
  const float* values;  // [16]
  const float* map;     // [256] or null
  const Element* bias;  // or null
  const void* b;        // [rows, ranks] of an adapter, or null
  float* y;             // where the rows' results go
  int rows, first;      // first: groups of PER_WARP rows before these
  int block_shift, nested_shift;
  int ranks, start;     // start: of the adapter's part of z
  int wide;             // whether b is in float32
  float scale;
};

// Where a pair of columns lies, so that a warp's lanes read 16 bytes each side by side: a lane has 32 columns in a row.
__device__ __forceinline__ int place_of(int column) {
  int step = column / 1024, lane = column / 32 % 32, part = column / 8 % 4;
  return ((step * 4 + part) * 32 + lane) * 8 + column % 8;
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

// The vector as the weights meet it: columns of x [columns], or gate and up [2 columns], after the prologue, in bfloat16.
__device__ __forceinline__ void prepare(Element* xs, const float* x, int columns, const float* weight, float eps) {
  int steps = (columns + 1023) / 1024;
#if PROLOGUE == 1
  float sum = 0.f;
  for (int c = threadIdx.x; c < columns; c += THREADS) sum += x[c] * x[c];
  float r = 1.f / sqrtf(block_total(sum) / columns + eps);
#endif
  for (int c = threadIdx.x; c < steps * 1024; c += THREADS) {
    float v = 0.f;
    if (c < columns) {
      v = x[c];
#if PROLOGUE == 1
      v *= r * weight[c];
#elif PROLOGUE == 2
      v *= quick_reciprocal(1.f + power_of_two(-LOG2E * v)) * x[columns + c];
#endif
    }
    xs[place_of(c)] = narrow(v);
  }
}

// What a lane has of a row: 32 neighbouring columns of each step.
struct Part {
#if KIND == 0
  uint4 codes;
  u32 absmax_code;
  float absmax;
#elif KIND == 1
  uint4 words[4];
#else
  float4 words[8];
#endif
};

__device__ __forceinline__ void load(Part& part, const Rows& job, i64 row, i64 pitch, int column, bool there) {
  i64 at = row * pitch + column;
#if KIND == 0
  part.codes = make_uint4(0, 0, 0, 0);
  part.absmax = 0.f, part.absmax_code = 0;
  if (!there) return;
  part.codes = __ldcs((const uint4*)((const u8*)job.from + at / 2));
  i64 block = at >> job.block_shift;
  if (job.map) {
    part.absmax_code = __ldg((const u8*)job.absmax + block);
    part.absmax = __ldg(job.nested_absmax + (block >> job.nested_shift));
  } else
    part.absmax = __ldg((const float*)job.absmax + block);
#elif KIND == 1
#pragma unroll
  for (int i = 0; i < 4; i++)
    part.words[i] = there ? __ldcs((const uint4*)((const Element*)job.from + at) + i) : make_uint4(0, 0, 0, 0);
#else
#pragma unroll
  for (int i = 0; i < 8; i++)
    part.words[i] = there ? __ldg((const float4*)((const float*)job.from + at) + i) : make_float4(0.f, 0.f, 0.f, 0.f);
#endif
}

// y = rows times the vector, plus scale b z of an adapter, plus bias, plus y itself if add. jobs [count]; a warp takes PER_WARP
// rows at a time, one after the other in all the grid.
extern "C" __global__ void __launch_bounds__(THREADS)
    multiply_vector(const Rows* jobs, int count, int groups, const float* x, int columns, i64 pitch, const float* weight,
                    float eps, const float* z, bool add) {
  DYNAMIC_SHARED(memory);
  Element* xs = (Element*)memory;
  int steps = (columns + 1023) / 1024, lane = threadIdx.x % 32;
#if KIND == 0
  u32* table = (u32*)(xs + steps * 1024);  // [256][32], a copy in each bank: a byte's two values, the first in the low half
  __shared__ float map[256];
  float value = jobs[0].values[lane % 16];
#pragma unroll 4
  for (int byte = threadIdx.x / 32; byte < 256; byte += WARPS)
    table[byte * 32 + lane] = narrow_pair(__shfl_sync(~0u, value, byte >> 4), __shfl_sync(~0u, value, byte & 15));
  if (jobs[0].map) map[threadIdx.x] = jobs[0].map[threadIdx.x];
#endif
  prepare(xs, x, columns, weight, eps);
  __syncthreads();
  for (int group = blockIdx.x * WARPS + threadIdx.x / 32; group < groups; group += gridDim.x * WARPS) {
    int number = 0;
    while (number + 1 < count && jobs[number + 1].first <= group) number++;
    const Rows job = jobs[number];
    int row0 = (group - job.first) * PER_WARP;
    float sum[PER_WARP] = {};
    Part next[PER_WARP];
#pragma unroll
    for (int r = 0; r < PER_WARP; r++) load(next[r], job, row0 + r, pitch, lane * 32, row0 + r < job.rows && lane * 32 < columns);
#if KIND == 0
    float offset = job.map ? *job.offset : 0.f;
#endif
    for (int step = 0; step < steps; step++) {
      Part part[PER_WARP];
#pragma unroll
      for (int r = 0; r < PER_WARP; r++) part[r] = next[r];
      int column = (step + 1) * 1024 + lane * 32;
      if (step + 1 < steps)
#pragma unroll
        for (int r = 0; r < PER_WARP; r++) load(next[r], job, row0 + r, pitch, column, row0 + r < job.rows && column < columns);
      float total[PER_WARP] = {};
#pragma unroll
      for (int eight = 0; eight < 4; eight++) {
        uint4 words = *(const uint4*)(xs + ((step * 4 + eight) * 32 + lane) * 8);
        u32 w[4] = {words.x, words.y, words.z, words.w};
        float v[8];
        EIGHT v[i] = __uint_as_float(i % 2 ? w[i / 2] & 0xffff0000 : w[i / 2] << 16);
#pragma unroll
        for (int r = 0; r < PER_WARP; r++) {
#if KIND == 0
          u32 codes = eight == 0 ? part[r].codes.x : eight == 1 ? part[r].codes.y : eight == 2 ? part[r].codes.z : part[r].codes.w;
#pragma unroll
          for (int byte = 0; byte < 4; byte++) {
            u32 pair = table[(codes >> byte * 8 & 255) * 32 + lane];
            total[r] += __uint_as_float(pair << 16) * v[byte * 2] + __uint_as_float(pair & 0xffff0000) * v[byte * 2 + 1];
          }
#elif KIND == 1
          u32 m[4] = {part[r].words[eight].x, part[r].words[eight].y, part[r].words[eight].z, part[r].words[eight].w};
          EIGHT total[r] += __uint_as_float(i % 2 ? m[i / 2] & 0xffff0000 : m[i / 2] << 16) * v[i];
#else
          float4 a = part[r].words[2 * eight], b = part[r].words[2 * eight + 1];
          float m[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
          EIGHT total[r] += m[i] * v[i];
#endif
        }
      }
#pragma unroll
      for (int r = 0; r < PER_WARP; r++) {
#if KIND == 0
        float absmax = job.map ? map[part[r].absmax_code] * part[r].absmax + offset : part[r].absmax;
        sum[r] += lane * 32 + step * 1024 < columns ? total[r] * absmax : 0.f;
#else
        sum[r] += total[r];
#endif
      }
    }
#pragma unroll
    for (int r = 0; r < PER_WARP; r++) {
      int row = row0 + r;
      if (job.b && row < job.rows)
        for (int rank = lane; rank < job.ranks; rank += 32) {
          i64 at = (i64)row * job.ranks + rank;
          float b = job.wide ? ((const float*)job.b)[at] : widen(((const Element*)job.b)[at]);
          sum[r] += job.scale * b * z[job.start + rank];
        }
#pragma unroll
      for (int lanes = 16; lanes; lanes /= 2) sum[r] += __shfl_xor_sync(~0u, sum[r], lanes);
      if (lane == 0 && row < job.rows) {
        float out = sum[r];
        if (job.bias) out += widen(job.bias[row]);
        job.y[row] = add ? job.y[row] + out : out;
      }
    }
  }
}

// x [width] = row *token of a table, which may lie in the host's pinned memory.
extern "C" __global__ void embed_token(const Element* table, i64 pitch, const int* token, i64 width, float* x) {
  i64 c = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (c < width) x[c] = widen(table[*token * pitch + c]);
}

#define CHUNK 128  // keys that are scored at a time, a thread each
#define EACH ((DIM + 127) / 128)  // columns of a head that a thread adds up

// qkv [(GROUP key_heads + 2 key_heads) DIM] of the token at *position -> mixed [GROUP key_heads DIM], over the keys and values
// in the cache [.., key_heads DIM], to which its own are written. rows [..] are rows of cosines and sines by position. A thread
// block takes a key head and one of gridDim.y parts of the positions; the last of the parts to end adds up what all of them left
// in partial [key_heads, parts, GROUP, DIM + 2]; counters [key_heads] are 0 before and after.
extern "C" __global__ void __launch_bounds__(128)
    attend_token(const float* qkv, Element* keys, Element* values, const int* position, const int* rows,
                 const float* cosines, const float* sines, int window, float scale, const float* query_weight,
                 const float* key_weight, float eps, float* mixed, float* partial, u32* counters) {
  __shared__ float q[GROUP][DIM], k[DIM], scores[GROUP][CHUNK], tops[GROUP], totals[GROUP], shrinks[GROUP];
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
  float sum[GROUP][EACH] = {};
  for (int key0 = first; key0 < last; key0 += CHUNK) {
    int key = key0 + threadIdx.x, n = min(CHUNK, last - key0);
    if (key < last) {
      float dot[GROUP] = {};
      for (int c = 0; c < DIM; c += 8) {
        uint4 words = *(const uint4*)(keys + (i64)key * pitch + c);
        u32 w[4] = {words.x, words.y, words.z, words.w};
        EIGHT {
          float x = __uint_as_float(i % 2 ? w[i / 2] & 0xffff0000 : w[i / 2] << 16);
#pragma unroll
          for (int h = 0; h < GROUP; h++) dot[h] += x * q[h][c + i];
        }
      }
#pragma unroll
      for (int h = 0; h < GROUP; h++) scores[h][threadIdx.x] = dot[h] * scale;
    }
    __syncthreads();
    for (int h = warp; h < GROUP; h += 4) {
      float most = tops[h], total = 0.f;
      for (int i = lane; i < n; i += 32) most = fmaxf(most, scores[h][i]);
#pragma unroll
      for (int lanes = 16; lanes; lanes /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, lanes));
      for (int i = lane; i < n; i += 32) {
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
    for (int e = 0; e < EACH; e++) {
      int c = e * 128 + threadIdx.x;
      if (c >= DIM) break;
#pragma unroll
      for (int h = 0; h < GROUP; h++) sum[h][e] *= shrinks[h];
      for (int i = 0; i < n; i++) {
        float x = widen(values[(i64)(key0 + i) * pitch + c]);
#pragma unroll
        for (int h = 0; h < GROUP; h++) sum[h][e] += scores[h][i] * x;
      }
    }
    __syncthreads();  // the scores are read
  }
  float* mine = partial + ((i64)head * parts + blockIdx.y) * GROUP * (DIM + 2);
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    int c = e * 128 + threadIdx.x;
    if (c < DIM)
#pragma unroll
      for (int h = 0; h < GROUP; h++) mine[h * (DIM + 2) + c] = sum[h][e];
  }
  if (threadIdx.x < GROUP) {
    mine[threadIdx.x * (DIM + 2) + DIM] = tops[threadIdx.x];
    mine[threadIdx.x * (DIM + 2) + DIM + 1] = totals[threadIdx.x];
  }
  __shared__ bool ours;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) ours = atomicInc(counters + head, parts - 1) == (u32)parts - 1;  // and 0 again
  __syncthreads();
  if (!ours) return;
  __threadfence();
  const float* all = partial + (i64)head * parts * GROUP * (DIM + 2);
  for (int i = threadIdx.x; i < GROUP * DIM; i += 128) {
    int h = i / DIM, c = i % DIM;
    float most = -3e38f, total = 0.f, out = 0.f;
    for (int part = 0; part < parts; part++) most = fmaxf(most, __ldcg(all + (part * GROUP + h) * (DIM + 2) + DIM));
    for (int part = 0; part < parts; part++) {
      const float* of = all + (part * GROUP + h) * (DIM + 2);
      float shrink = power_of_two(__ldcg(of + DIM) - most);
      out += shrink * __ldcg(of + c);
      total += shrink * __ldcg(of + DIM + 1);
    }
    mixed[(head * GROUP + h) * DIM + c] = out / total;
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
