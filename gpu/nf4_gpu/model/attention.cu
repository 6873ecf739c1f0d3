// Causal attention over packed sequences with grouped heads, forward and backward, without a whole matrix of scores
// (arXiv 2205.14135, 2307.08691). Every sum has one order: nothing is added up by atomics.
// Defines: DTYPE (BFLOAT16); DIM of a head, a multiple of 8; ROWS, queries of a thread block forward (64 or 128); KEYS at a
// time (32 or 64); QUERIES at a time in the backward of keys and values (32 or 64); ONLY (0; 1 values, 2 keys) there; SHARED
// (0, 1): whether a query head's share of the gradients of keys and values is left to be added up.
// Fused multiply-adds: nothing here is exact.
#include "tensorcore.cuh"

#define D16 ((DIM + 15) / 16 * 16)
#define PITCH (D16 + 8)  // elements between rows in shared memory, so that no bank is met twice
#define STEPS (D16 / 16)
#define TILES (D16 / 8)
#define LOWEST -3e38f

// Of a sequence that begins at row `start` of the batch and has `length` rows: those from `first` on.
struct Tile {
  int start, length, first, unused;
};

// Rows first.. of a head, [rows, DIM] at x, into shared memory; zeros beyond `length`.
template <int ROWS_>
__device__ __forceinline__ void load_rows(Element* to, const Element* x, i64 pitch, int first, int length) {
#pragma unroll 4
  for (int i = threadIdx.x; i < ROWS_ * (D16 / 8); i += 128) {
    int r = i / (D16 / 8), c = i % (D16 / 8) * 8;
    bool there = first + r < length && c < DIM;
    copy_async(to + r * PITCH + c, there ? x + (i64)(first + r) * pitch + c : x, there);
  }
}

// Addresses for load_matrices: of 16 rows by 16 columns as a; of 16 columns (rows in memory) by 16 as b of two products;
// and for load_transposed of 16 rows (the depth) by 16 columns as b of two products.
__device__ __forceinline__ const Element* as_a(const Element* rows, int row, int column, int lane) {
  return rows + (row + lane % 16) * PITCH + column + lane / 16 * 8;
}
__device__ __forceinline__ const Element* as_b(const Element* rows, int row, int column, int lane) {
  return rows + (row + lane / 16 * 8 + lane % 8) * PITCH + column + lane / 8 % 2 * 8;
}
__device__ __forceinline__ const Element* across(const Element* rows, int row, int column, int lane) {
  return rows + (row + lane % 16) * PITCH + column + lane / 16 * 8;
}

__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
  return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

// Sums of two products side by side, as a of the next: columns 16 n and on.
__device__ __forceinline__ void as_factors(u32 a[4], const float s[2][4]) {
  a[0] = narrow_pair(s[0][0], s[0][1]);
  a[1] = narrow_pair(s[0][2], s[0][3]);
  a[2] = narrow_pair(s[1][0], s[1][1]);
  a[3] = narrow_pair(s[1][2], s[1][3]);
}

#define MT (ROWS / 64)  // sixteens of queries of a warp

// q [tokens, heads DIM], k and v [tokens, heads / group DIM] -> out as q, and lse [heads, tokens], the logarithm to base 2 of
// the sum of exponentials. scale: log2 e / sqrt(DIM). window: positions that a query sees, its own included; 0 for all.
extern "C" __global__ void __launch_bounds__(128)
    attend(const Element* q, i64 q_pitch, const Element* k, i64 k_pitch, const Element* v, i64 v_pitch, const Tile* tiles,
           int group, int window, float scale, Element* out, i64 out_pitch, float* lse, i64 tokens) {
  DYNAMIC_SHARED(memory);
  Element* qs = (Element*)memory;
  Element* ks = qs + ROWS * PITCH;
  Element* vs = ks + KEYS * PITCH;
  const Tile tile = tiles[blockIdx.y];
  if (tile.first >= tile.length) return;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.x;
  q += tile.start * q_pitch + head * DIM;
  k += tile.start * k_pitch + head / group * DIM;
  v += tile.start * v_pitch + head / group * DIM;
  int begin = window && tile.first >= window ? (tile.first - window + 1) / KEYS * KEYS : 0;
  int end = min(tile.length, tile.first + ROWS);

  load_rows<ROWS>(qs, q, q_pitch, tile.first, tile.length);
  load_rows<KEYS>(ks, k, k_pitch, begin, tile.length);
  commit_copies();
  float o[MT][TILES][4] = {}, top[MT][2], sum[MT][2] = {};
#pragma unroll
  for (int m = 0; m < MT; m++) top[m][0] = top[m][1] = LOWEST;
#pragma unroll 1
  for (int key0 = begin; key0 < end; key0 += KEYS) {
    wait_copies<0>();
    __syncthreads();  // the keys are here, and nobody reads the values before them any more
    load_rows<KEYS>(vs, v, v_pitch, key0, tile.length);
    commit_copies();
    float s[MT][KEYS / 8][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      u32 a[MT][4];
#pragma unroll
      for (int m = 0; m < MT; m++) load_matrices(a[m], as_a(qs, (warp * MT + m) * 16, step * 16, lane));
#pragma unroll
      for (int n = 0; n < KEYS / 16; n++) {
        u32 b[4];
        load_matrices(b, as_b(ks, n * 16, step * 16, lane));
#pragma unroll
        for (int m = 0; m < MT; m++) {
          multiply_add(s[m][2 * n], a[m], b[0], b[1]);
          multiply_add(s[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
    bool masked = key0 + KEYS > tile.first + 1 || (window && key0 + window < tile.first + ROWS);
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        int query = tile.first + (warp * MT + m) * 16 + lane / 4 + half * 8;
        float most = top[m][half];
        if (masked)
#pragma unroll
          for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
              int key = key0 + n * 8 + lane % 4 * 2 + i;
              if (key > query || (window && key + window <= query)) s[m][n][half * 2 + i] = LOWEST;
            }
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++) most = fmaxf(most, fmaxf(s[m][n][half * 2], s[m][n][half * 2 + 1]));
        most = quad_max(most);
        float shift = most <= LOWEST ? 0.f : most * scale;  // where nothing is seen yet
        float shrink = power_of_two(top[m][half] * scale - shift), total = 0.f;
        top[m][half] = most;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float p = power_of_two(s[m][n][half * 2 + i] * scale - shift);
            s[m][n][half * 2 + i] = p;
            total += p;
          }
        sum[m][half] = sum[m][half] * shrink + total;
#pragma unroll
        for (int n = 0; n < TILES; n++) o[m][n][half * 2] *= shrink, o[m][n][half * 2 + 1] *= shrink;
      }
    wait_copies<0>();
    __syncthreads();  // the values are here, and nobody reads the keys any more
    if (key0 + KEYS < end) load_rows<KEYS>(ks, k, k_pitch, key0 + KEYS, tile.length);
    commit_copies();
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) {
      u32 a[MT][4];
#pragma unroll
      for (int m = 0; m < MT; m++) as_factors(a[m], s[m] + 2 * step);
#pragma unroll
      for (int n = 0; n < D16 / 16; n++) {
        u32 b[4];
        load_transposed(b, across(vs, step * 16, n * 16, lane));
#pragma unroll
        for (int m = 0; m < MT; m++) {
          multiply_add(o[m][2 * n], a[m], b[0], b[1]);
          multiply_add(o[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int query = tile.first + (warp * MT + m) * 16 + lane / 4 + half * 8;
      float total = quad_sum(sum[m][half]);
      if (query >= tile.length) continue;
      i64 row = tile.start + query;
      if (lane % 4 == 0) lse[head * tokens + row] = top[m][half] * scale + log2f(total);
      Element* to = out + row * out_pitch + head * DIM;
      float over = 1.f / total;
#pragma unroll
      for (int n = 0; n < TILES; n++) {
        int c = n * 8 + lane % 4 * 2;
        if (c < DIM) *(u32*)(to + c) = narrow_pair(o[m][n][half * 2] * over, o[m][n][half * 2 + 1] * over);
      }
    }
}

// dout, the gradient of attend's out, -> dq, and delta [heads, tokens], dout . out of each head. A thread block takes 64
// queries of a head.
extern "C" __global__ void __launch_bounds__(128)
    attend_backward_queries(const Element* q, i64 q_pitch, const Element* k, i64 k_pitch, const Element* v, i64 v_pitch,
                            const Element* out, i64 out_pitch, const Element* dout, i64 dout_pitch, const float* lse,
                            const Tile* tiles, int group, int window, float scale, Element* dq, i64 dq_pitch, float* delta,
                            i64 tokens) {
  DYNAMIC_SHARED(memory);
  Element* qs = (Element*)memory;
  Element* ds = qs + 64 * PITCH;
  Element* kvs = ds + 64 * PITCH;  // two of keys and values
  __shared__ float deltas[64];
  const Tile tile = tiles[blockIdx.y];
  if (tile.first >= tile.length) return;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = blockIdx.x;
  q += tile.start * q_pitch + head * DIM;
  k += tile.start * k_pitch + head / group * DIM;
  v += tile.start * v_pitch + head / group * DIM;
  out += tile.start * out_pitch + head * DIM;
  dout += tile.start * dout_pitch + head * DIM;
  lse += head * tokens + tile.start;
  int begin = window && tile.first >= window ? (tile.first - window + 1) / KEYS * KEYS : 0;
  int end = min(tile.length, tile.first + 64);
  auto load = [&](int key0) {
    Element* to = kvs + (key0 - begin) / KEYS % 2 * 2 * KEYS * PITCH;
    if (key0 < end) {
      load_rows<KEYS>(to, k, k_pitch, key0, tile.length);
      load_rows<KEYS>(to + KEYS * PITCH, v, v_pitch, key0, tile.length);
    }
    commit_copies();
  };
  load_rows<64>(qs, q, q_pitch, tile.first, tile.length);
  load_rows<64>(ds, dout, dout_pitch, tile.first, tile.length);
  load(begin);
  {  // two threads a row
    int r = threadIdx.x / 2, query = tile.first + r;
    float dot = 0.f;
    if (query < tile.length)
      for (int c = threadIdx.x % 2 * 8; c < DIM; c += 16) {
        uint4 a = *(const uint4*)(out + query * out_pitch + c), b = *(const uint4*)(dout + query * dout_pitch + c);
        u32 x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
          dot += widen((Element)(x[i] & 0xffff)) * widen((Element)(y[i] & 0xffff)) +
                 widen((Element)(x[i] >> 16)) * widen((Element)(y[i] >> 16));
      }
    dot += __shfl_xor_sync(~0u, dot, 1);
    if (threadIdx.x % 2 == 0) {
      deltas[r] = dot;
      if (query < tile.length) delta[head * tokens + tile.start + query] = dot;
    }
  }
  __syncthreads();
  float row_delta[2], row_lse[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int r = warp * 16 + lane / 4 + half * 8;
    row_delta[half] = deltas[r];
    row_lse[half] = tile.first + r < tile.length ? lse[tile.first + r] : 3e38f;
  }
  float sum[TILES][4] = {};
#pragma unroll 1
  for (int key0 = begin; key0 < end; key0 += KEYS) {
    load(key0 + KEYS);
    wait_copies<1>();
    __syncthreads();
    const Element* ks = kvs + (key0 - begin) / KEYS % 2 * 2 * KEYS * PITCH;
    const Element* vs = ks + KEYS * PITCH;
    float s[KEYS / 8][4] = {}, dp[KEYS / 8][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      u32 a[4], d[4];
      load_matrices(a, as_a(qs, warp * 16, step * 16, lane));
      load_matrices(d, as_a(ds, warp * 16, step * 16, lane));
#pragma unroll
      for (int n = 0; n < KEYS / 16; n++) {
        u32 b[4];
        load_matrices(b, as_b(ks, n * 16, step * 16, lane));
        multiply_add(s[2 * n], a, b[0], b[1]);
        multiply_add(s[2 * n + 1], a, b[2], b[3]);
        load_matrices(b, as_b(vs, n * 16, step * 16, lane));
        multiply_add(dp[2 * n], d, b[0], b[1]);
        multiply_add(dp[2 * n + 1], d, b[2], b[3]);
      }
    }
    bool masked = key0 + KEYS > tile.first + 1 || (window && key0 + window < tile.first + 64);
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float p = power_of_two(s[n][i] * scale - row_lse[i / 2]);
        if (masked) {
          int key = key0 + n * 8 + lane % 4 * 2 + i % 2, query = tile.first + warp * 16 + lane / 4 + i / 2 * 8;
          if (key > query || (window && key + window <= query)) p = 0.f;
        }
        s[n][i] = p * (dp[n][i] - row_delta[i / 2]);
      }
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) {
      u32 a[4];
      as_factors(a, s + 2 * step);
#pragma unroll
      for (int n = 0; n < D16 / 16; n++) {
        u32 b[4];
        load_transposed(b, across(ks, step * 16, n * 16, lane));
        multiply_add(sum[2 * n], a, b[0], b[1]);
        multiply_add(sum[2 * n + 1], a, b[2], b[3]);
      }
    }
    __syncthreads();  // nobody reads the buffer that is filled next
  }
  wait_copies<0>();
  float factor = scale * 0.693147180559945f;  // 1 / sqrt(DIM)
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int query = tile.first + warp * 16 + lane / 4 + half * 8;
    if (query >= tile.length) continue;
    Element* to = dq + (tile.start + query) * dq_pitch + head * DIM;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      int c = n * 8 + lane % 4 * 2;
      if (c < DIM) *(u32*)(to + c) = narrow_pair(sum[n][half * 2] * factor, sum[n][half * 2 + 1] * factor);
    }
  }
}

// dk and dv from dout and delta. A thread block takes 64 keys of a key head and goes through its query heads, or with SHARED
// through one, and leaves float32 [heads, tokens, DIM] of it.
extern "C" __global__ void __launch_bounds__(128)
    attend_backward_keys(const Element* q, i64 q_pitch, const Element* k, i64 k_pitch, const Element* v, i64 v_pitch,
                         const Element* dout, i64 dout_pitch, const float* lse, const float* delta, const Tile* tiles,
                         int group, int window, float scale, Element* dk, Element* dv, i64 d_pitch, float* dk_shares,
                         float* dv_shares, i64 tokens) {
  DYNAMIC_SHARED(memory);
  Element* ks = (Element*)memory;
  Element* vs = ks + 64 * PITCH;
  Element* buffers = vs + 64 * PITCH;  // two of queries and of dout
  __shared__ float row_lse[2][QUERIES], row_delta[2][QUERIES];
  const Tile tile = tiles[blockIdx.y];
  if (tile.first >= tile.length) return;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#if SHARED
  int key_head = blockIdx.x / group, head0 = blockIdx.x, heads = 1;
#else
  int key_head = blockIdx.x, head0 = blockIdx.x * group, heads = group;
#endif
  q += tile.start * q_pitch;
  dout += tile.start * dout_pitch;
  int begin = tile.first / QUERIES * QUERIES;
  int end = window ? min(tile.length, tile.first + 63 + window) : tile.length;
  int blocks = (end - begin + QUERIES - 1) / QUERIES, turns = blocks * heads;
  auto load = [&](int turn) {
    if (turn < turns) {
      int head = head0 + turn / blocks, first = begin + turn % blocks * QUERIES, buffer = turn % 2;
      Element* to = buffers + buffer * 2 * QUERIES * PITCH;
      load_rows<QUERIES>(to, q + head * DIM, q_pitch, first, tile.length);
      load_rows<QUERIES>(to + QUERIES * PITCH, dout + head * DIM, dout_pitch, first, tile.length);
      if (threadIdx.x < QUERIES) {
        i64 at = head * tokens + tile.start + first + threadIdx.x;
        bool there = first + (int)threadIdx.x < tile.length;
        row_lse[buffer][threadIdx.x] = there ? lse[at] : 3e38f;
        row_delta[buffer][threadIdx.x] = there ? delta[at] : 0.f;
      }
    }
    commit_copies();
  };
  load_rows<64>(ks, k + tile.start * k_pitch + key_head * DIM, k_pitch, tile.first, tile.length);
  load_rows<64>(vs, v + tile.start * v_pitch + key_head * DIM, v_pitch, tile.first, tile.length);
  load(0);
#if ONLY != 2
  float sum_v[TILES][4] = {};
#endif
#if ONLY != 1
  float sum_k[TILES][4] = {};
#endif
#pragma unroll 1
  for (int turn = 0; turn < turns; turn++) {
    load(turn + 1);
    wait_copies<1>();
    __syncthreads();
    int first = begin + turn % blocks * QUERIES;
    const Element* qs = buffers + turn % 2 * 2 * QUERIES * PITCH;
    const Element* ds = qs + QUERIES * PITCH;
    float s[QUERIES / 8][4] = {};  // scores, the keys in rows
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      u32 a[4];
      load_matrices(a, as_a(ks, warp * 16, step * 16, lane));
#pragma unroll
      for (int n = 0; n < QUERIES / 16; n++) {
        u32 b[4];
        load_matrices(b, as_b(qs, n * 16, step * 16, lane));
        multiply_add(s[2 * n], a, b[0], b[1]);
        multiply_add(s[2 * n + 1], a, b[2], b[3]);
      }
    }
    bool masked = first < tile.first + 63 || (window && first + QUERIES > tile.first + window);
#pragma unroll
    for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int column = n * 8 + lane % 4 * 2 + i % 2;
        float p = power_of_two(s[n][i] * scale - row_lse[turn % 2][column]);
        if (masked) {
          int key = tile.first + warp * 16 + lane / 4 + i / 2 * 8, query = first + column;
          if (key > query || (window && key + window <= query)) p = 0.f;
        }
        s[n][i] = p;
      }
#if ONLY != 2
#pragma unroll
    for (int step = 0; step < QUERIES / 16; step++) {
      u32 a[4];
      as_factors(a, s + 2 * step);
#pragma unroll
      for (int n = 0; n < D16 / 16; n++) {
        u32 b[4];
        load_transposed(b, across(ds, step * 16, n * 16, lane));
        multiply_add(sum_v[2 * n], a, b[0], b[1]);
        multiply_add(sum_v[2 * n + 1], a, b[2], b[3]);
      }
    }
#endif
#if ONLY != 1
    float dp[QUERIES / 8][4] = {};
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      u32 a[4];
      load_matrices(a, as_a(vs, warp * 16, step * 16, lane));
#pragma unroll
      for (int n = 0; n < QUERIES / 16; n++) {
        u32 b[4];
        load_matrices(b, as_b(ds, n * 16, step * 16, lane));
        multiply_add(dp[2 * n], a, b[0], b[1]);
        multiply_add(dp[2 * n + 1], a, b[2], b[3]);
      }
    }
#pragma unroll
    for (int n = 0; n < QUERIES / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) s[n][i] *= dp[n][i] - row_delta[turn % 2][n * 8 + lane % 4 * 2 + i % 2];
#pragma unroll
    for (int step = 0; step < QUERIES / 16; step++) {
      u32 a[4];
      as_factors(a, s + 2 * step);
#pragma unroll
      for (int n = 0; n < D16 / 16; n++) {
        u32 b[4];
        load_transposed(b, across(qs, step * 16, n * 16, lane));
        multiply_add(sum_k[2 * n], a, b[0], b[1]);
        multiply_add(sum_k[2 * n + 1], a, b[2], b[3]);
      }
    }
#endif
    __syncthreads();  // nobody reads the buffer that is filled next
  }
  wait_copies<0>();
  float factor = scale * 0.693147180559945f;  // 1 / sqrt(DIM)
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int key = tile.first + warp * 16 + lane / 4 + half * 8;
    if (key >= tile.length) continue;
    i64 row = tile.start + key;
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      int c = n * 8 + lane % 4 * 2;
      if (c >= DIM) continue;
#if SHARED
      i64 at = (head0 * tokens + row) * DIM + c;
#if ONLY != 2
      *(float2*)(dv_shares + at) = make_float2(sum_v[n][half * 2], sum_v[n][half * 2 + 1]);
#endif
#if ONLY != 1
      *(float2*)(dk_shares + at) = make_float2(sum_k[n][half * 2] * factor, sum_k[n][half * 2 + 1] * factor);
#endif
#else
      i64 at = row * d_pitch + key_head * DIM + c;
#if ONLY != 2
      *(u32*)(dv + at) = narrow_pair(sum_v[n][half * 2], sum_v[n][half * 2 + 1]);
#endif
#if ONLY != 1
      *(u32*)(dk + at) = narrow_pair(sum_k[n][half * 2] * factor, sum_k[n][half * 2 + 1] * factor);
#endif
#endif
    }
  }
}
