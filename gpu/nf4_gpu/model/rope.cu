// Rotary positions of query and key heads, with Hugging Face's halves, after norms of each head where the model has them
// (Qwen3); and the backward of both, which also sums what attention leaves a query head of the gradients of keys and values.
// Defines: DTYPE (BFLOAT16); DIM of a head, a multiple of 8; QK_NORM (0, 1); SHARES: query heads a key head, if the gradients
// of keys and values are apart for each. Fused multiply-adds: nothing here is exact.
#include "tensorcore.cuh"

#define HALF (DIM / 2)
#define WIDTH (HALF % 8 ? 4 : 8)  // elements of each half that a thread takes
#define PARTS (HALF / WIDTH)      // threads that a head needs, and those it gets: a power of two, in one warp
#define LANES (PARTS <= 1 ? 1 : PARTS <= 2 ? 2 : PARTS <= 4 ? 4 : PARTS <= 8 ? 8 : PARTS <= 16 ? 16 : 32)
#define EACH _Pragma("unroll") for (int i = 0; i < WIDTH; i++)

__device__ __forceinline__ void load(const Element* p, float v[WIDTH]) {
  u32 w[WIDTH / 2];
#if DIM % 16 == 0
  *(uint4*)w = *(const uint4*)p;
#else
  *(uint2*)w = *(const uint2*)p;
#endif
  EACH v[i] = widen((Element)(i % 2 ? w[i / 2] >> 16 : w[i / 2] & 0xffff));
}

__device__ __forceinline__ void store(Element* p, const float v[WIDTH]) {
  u32 w[WIDTH / 2];
#pragma unroll
  for (int i = 0; i < WIDTH / 2; i++) w[i] = narrow_pair(v[2 * i], v[2 * i + 1]);
#if DIM % 16 == 0
  *(uint4*)p = *(uint4*)w;
#else
  *(uint2*)p = *(uint2*)w;
#endif
}

__device__ __forceinline__ float head_sum(float v) {
#pragma unroll
  for (int lanes = LANES / 2; lanes; lanes /= 2) v += __shfl_xor_sync(~0u, v, lanes);
  return v;
}

// Where a thread works: its token, its head among those of a row, and the first column of its part of the lower half.
struct Place {
  i64 token;
  int head, column;
  bool there;
  __device__ __forceinline__ Place(i64 tokens, int heads) {
    i64 unit = (i64)blockIdx.x * blockDim.x + threadIdx.x, pair = unit / LANES;
    token = pair / heads, head = (int)(pair % heads), column = (int)(unit % LANES) * WIDTH;
    there = token < tokens && column < HALF;
  }
};

// x [tokens, (query_heads + key_heads) DIM] -> y, which may be x; positions [tokens] are rows of cosines and sines [.., HALF].
extern "C" __global__ void __launch_bounds__(256)
    rotate(const Element* x, i64 x_pitch, Element* y, i64 y_pitch, const int* positions, const float* cosines,
           const float* sines, i64 tokens, int query_heads, int key_heads, const float* query_weight,
           const float* key_weight, float eps) {
  Place at(tokens, query_heads + key_heads);
  float low[WIDTH] = {}, high[WIDTH] = {};
  if (at.there) {
    const Element* from = x + at.token * x_pitch + at.head * DIM + at.column;
    load(from, low);
    load(from + HALF, high);
  }
#if QK_NORM
  float sum = 0.f;
  EACH sum += low[i] * low[i] + high[i] * high[i];
  float r = 1.f / sqrtf(head_sum(sum) / DIM + eps);
#endif
  if (!at.there) return;
#if QK_NORM
  const float* weight = at.head < query_heads ? query_weight : key_weight;
  EACH low[i] = low[i] * r * weight[at.column + i], high[i] = high[i] * r * weight[HALF + at.column + i];
#endif
  i64 angle = (i64)positions[at.token] * HALF + at.column;
  float first[WIDTH], second[WIDTH];
  EACH {
    float c = cosines[angle + i], s = sines[angle + i];
    first[i] = low[i] * c - high[i] * s;
    second[i] = high[i] * c + low[i] * s;
  }
  Element* to = y + at.token * y_pitch + at.head * DIM + at.column;
  store(to, first);
  store(to + HALF, second);
}

// d [tokens, (query_heads + 2 key_heads) DIM], the gradients of rotated queries and keys, and of values, -> those of the
// products, in place. raw: queries and keys before norm and rotation, with QK_NORM. With SHARES the gradients of keys and
// values are sums over the query heads of dk and dv, float32 [query_heads, tokens, DIM].
extern "C" __global__ void __launch_bounds__(256)
    rotate_backward(Element* d, i64 d_pitch, const int* positions, const float* cosines, const float* sines, i64 tokens,
                    int query_heads, int key_heads, const Element* raw, i64 raw_pitch, const float* query_weight,
                    const float* key_weight, float eps, const float* dk, const float* dv) {
#ifdef SHARES
  Place at(tokens, query_heads + 2 * key_heads);
#else
  Place at(tokens, query_heads + key_heads);
#endif
  Element* to = d + at.token * d_pitch + at.head * DIM + at.column;
  float first[WIDTH] = {}, second[WIDTH] = {};
  bool value = at.head >= query_heads + key_heads;
  if (at.there) {
#ifdef SHARES
    if (at.head >= query_heads) {
      const float* shares = value ? dv : dk;
      int head = (at.head - query_heads) % key_heads * SHARES;
#pragma unroll
      for (int share = 0; share < SHARES; share++) {
        const float* part = shares + ((head + share) * tokens + at.token) * DIM + at.column;
        EACH first[i] += part[i], second[i] += part[HALF + i];
      }
    } else
#endif
    {
      load(to, first);
      load(to + HALF, second);
    }
    if (!value) {
      i64 angle = (i64)positions[at.token] * HALF + at.column;
      EACH {
        float c = cosines[angle + i], s = sines[angle + i], low = first[i] * c + second[i] * s;
        second[i] = second[i] * c - first[i] * s;
        first[i] = low;
      }
    }
  }
#if QK_NORM
  float low[WIDTH] = {}, high[WIDTH] = {}, squares = 0.f, sum = 0.f;
  if (at.there && !value) {
    const Element* from = raw + at.token * raw_pitch + at.head * DIM + at.column;
    load(from, low);
    load(from + HALF, high);
    const float* weight = at.head < query_heads ? query_weight : key_weight;
    EACH {
      first[i] *= weight[at.column + i], second[i] *= weight[HALF + at.column + i];
      squares += low[i] * low[i] + high[i] * high[i];
      sum += low[i] * first[i] + high[i] * second[i];
    }
  }
  float r = 1.f / sqrtf(head_sum(squares) / DIM + eps), mean = head_sum(sum) * r * r / DIM;
  if (!value) EACH first[i] = r * (first[i] - low[i] * mean), second[i] = r * (second[i] - high[i] * mean);
#endif
  if (!at.there) return;
  store(to, first);
  store(to + HALF, second);
}
