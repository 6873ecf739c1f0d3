// One token at a time through a model: its embedding, attention over a cache of keys and values, the likeliest token.
// Defines: DTYPE (BFLOAT16); GROUP and DIM of attention's heads; QK_NORM. Fused multiply-adds: nothing here is exact. A kernel
// may begin while the one before it ends, and waits for that by itself.
#include "tensorcore.cuh"

// x [width] = row *token of a table, which may lie in the host's pinned memory.
extern "C" __global__ void embed_token(const Element* table, i64 pitch, const int* token, i64 width, float* x) {
  let_next_begin();
  i64 c = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (c < width) x[c] = widen(table[*token * pitch + c]);
}

#define EIGHTS (DIM / 8)
#define LANES (EIGHTS <= 1 ? 1 : EIGHTS <= 2 ? 2 : EIGHTS <= 4 ? 4 : EIGHTS <= 8 ? 8 : EIGHTS <= 16 ? 16 : 32)  // of a key
#define BESIDE (128 / LANES)  // keys that are read at a time
#define CHUNK 64              // keys whose scores are kept at a time
#define BATCH (CHUNK / BESIDE < 1 ? 1 : CHUNK / BESIDE < 8 ? CHUNK / BESIDE : 8)  // of a thread's keys that are asked for at once

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
  let_next_begin();
  int head = blockIdx.x, key_heads = gridDim.x, parts = gridDim.y, here = *position, pitch = key_heads * DIM;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* angle_c = cosines + (i64)rows[here] * (DIM / 2);
  const float* angle_s = sines + (i64)rows[here] * (DIM / 2);
  keys += head * DIM, values += head * DIM;
  int begin = window && here >= window ? here - window + 1 : 0, count = here + 1 - begin;
  int first = begin + (int)((i64)count * blockIdx.y / parts), last = begin + (int)((i64)count * (blockIdx.y + 1) / parts);
  for (int key = first + warp; key < last; key += 4)
    if (lane * 64 < DIM) prefetch(keys + (i64)key * pitch + lane * 64), prefetch(values + (i64)key * pitch + lane * 64);
  wait_for_previous();
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
  const float* v = qkv + (key_heads * (GROUP + 1) + head) * DIM;
  if (first <= here && here < last)
    for (int c = threadIdx.x; c < DIM; c += 128) {
      keys[(i64)here * pitch + c] = narrow(k[c]);
      values[(i64)here * pitch + c] = narrow(v[c]);
    }
  __syncthreads();  // which the threads of this block, alone in need of it, see
  int part = threadIdx.x % LANES, beside = threadIdx.x / LANES;  // LANES threads a key, eight elements each
  bool works = part < EIGHTS;
  float sum[GROUP][8] = {}, own_q[GROUP][8];
#pragma unroll
  for (int h = 0; h < GROUP; h++)
    if (works) EIGHT own_q[h][i] = q[h][part * 8 + i];
#pragma unroll 1
  for (int key0 = first; key0 < last; key0 += CHUNK) {
    int n = min(CHUNK, last - key0);
#pragma unroll 1
    for (int i0 = 0; i0 < n; i0 += BATCH * BESIDE) {
      uint4 words[BATCH];
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        int i = i0 + b * BESIDE + beside;
        words[b] = make_uint4(0, 0, 0, 0);
        if (works && i < n) words[b] = *(const uint4*)(keys + (i64)(key0 + i) * pitch + part * 8);
      }
#pragma unroll
      for (int b = 0; b < BATCH; b++) {
        int i = i0 + b * BESIDE + beside;
        if (i0 + b * BESIDE >= n) break;
        u32 w[4] = {words[b].x, words[b].y, words[b].z, words[b].w};
#pragma unroll
        for (int h = 0; h < GROUP; h++) {
          float dot = 0.f;
          if (works) EIGHT dot += __uint_as_float(i % 2 ? w[i / 2] & 0xffff0000 : w[i / 2] << 16) * own_q[h][i];
#pragma unroll
          for (int lanes = LANES / 2; lanes; lanes /= 2) dot += __shfl_xor_sync(~0u, dot, lanes);
          if (part == 0 && i < n) scores[h][i] = dot * scale;
        }
      }
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
  wait_for_previous();
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
