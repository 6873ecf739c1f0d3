// attention.cu's three kernels for heads of 64 and 128 on compute capability 9.0 (sm_90a), where the products of a warpgroup run
// beside what its threads do: 128 queries or keys a thread block, 64 each of two warpgroups, which a third one supplies.
// Defines: DTYPE (BFLOAT16); DIM (64, 128); SHARED (0, 1), as there. Fused multiply-adds: nothing here is exact.
#include "warpgroup.cuh"

#define THREADS 384
#define SUPPLIERS 128  // threads, the first of a block
#define WORKERS 256    // the others
#define ROWS 128       // queries, or keys, of a thread block
#define KEYS 128       // at a time, forward
#define BESIDE 64      // keys or queries at a time, backward
#define TURNS 2        // tiles of keys, and of values, that take turns forward
#define BACK_TURNS 3   // pairs of tiles that take turns backward
#define LOWEST -3e38f
#define TILE_BYTES (ROWS * DIM * 2)
#define PART_BYTES (BESIDE * DIM * 2)
#define WARPS_OF_WORKERS (WORKERS / 32)

// Of a sequence that begins at row `start` of the batch and has `length` rows: those from `first` on.
struct Tile {
  int start, length, first, unused;
};

__device__ __forceinline__ u8* aligned(u8* memory) { return memory + (-shared_address(memory) & 1023); }

// Rows first.. of a head, [rows, DIM] at x, into shared memory; zeros beyond `length`. A supplier's rows are so far apart that
// their parts are swizzled alike.
template <int COUNT>
__device__ __forceinline__ void load_rows(u8* to, const Element* x, i64 pitch, int first, int length) {
  const int APART = SUPPLIERS / (DIM / 8);
  static_assert(APART % 8 == 0 && COUNT % APART == 0, "");
  int r = threadIdx.x / (DIM / 8), c = threadIdx.x % (DIM / 8) * 8, left = length - first - r;
  const Element* from = x + (first + r) * pitch + c;
  to += swizzled(r, c, COUNT);
#pragma unroll
  for (int k = 0; k < COUNT / APART; k++) {
    copy_async(to + k * APART * 128, from, k * APART < left);
    from += APART * pitch;
  }
}

// Tells the workers that what a supplier copied, but for its last PENDING groups of copies, is there.
template <int PENDING>
__device__ __forceinline__ void supply(u64* full) {
  wait_copies<PENDING>();
  show_products();
  come(full);
}

// Once a warp of workers has read what is to be overwritten.
__device__ __forceinline__ void give_back(u64* empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) come(empty);
}

// d [64, N] = rows from `row` on of a matrix of A_ROWS rows times the transpose of one of N rows, over DIM.
template <int A_ROWS, int N>
__device__ __forceinline__ void multiply_rows(float (&d)[N / 2], const u8* a, int row, const u8* b) {
  u64 first = along_rows(shared_address(a) + row * 128), second = along_rows(shared_address(b));
#pragma unroll
  for (int step = 0; step < DIM / 16; step++)
    multiply_group(d, first + (step / 4 * A_ROWS * 128 + step % 4 * 32 >> 4), second + (step / 4 * N * 128 + step % 4 * 32 >> 4),
                   step > 0);
}

// d [64, DIM] += factors [64, DEPTH] times a matrix [DEPTH, DIM].
template <int DEPTH>
__device__ __forceinline__ void multiply_across(float (&d)[DIM / 2], const u32* factors, const u8* b) {
  u64 second = along_columns(shared_address(b), DEPTH);
#pragma unroll
  for (int step = 0; step < DEPTH / 16; step++)
    multiply_group_across(d, factors + 4 * step, second + (step * 2048 >> 4), true);
}

// Sums as factors of the next product.
template <int N>
__device__ __forceinline__ void as_factors(u32 (&a)[N / 2], const float (&s)[N]) {
#pragma unroll
  for (int i = 0; i < N / 2; i++) {
    int step = i / 4, part = i % 4;  // rows g, g + 8 of columns 2 q, then of 2 q + 8
    int from = step * 8 + part / 2 * 4 + part % 2 * 2;
    a[i] = narrow_pair(s[from], s[from + 1]);
  }
}

__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(~0u, v, 1));
  return fmaxf(v, __shfl_xor_sync(~0u, v, 2));
}
__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}

// Scores to exponentials, and what the sums before are multiplied by.
__device__ __forceinline__ void exponentiate(float (&s)[KEYS / 2], int key0, int query0, int window, bool masked, float scale,
                                             float (&top)[2], float (&sum)[2], float (&shrink)[2], int lane) {
  if (masked)
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) {
      int key = key0 + i / 4 * 8 + lane % 4 * 2 + i % 2, query = query0 + i / 2 % 2 * 8;
      if (key > query || (window && key + window <= query)) s[i] = LOWEST;
    }
#pragma unroll
  for (int half = 0; half < 2; half++) {
    float most = top[half];
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++)
      if (i / 2 % 2 == half) most = fmaxf(most, s[i]);
    most = quad_max(most);
    float shift = most <= LOWEST ? 0.f : most * scale, total = 0.f;
    shrink[half] = power_of_two(top[half] * scale - shift);
    top[half] = most;
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++)
      if (i / 2 % 2 == half) {
        s[i] = power_of_two(s[i] * scale - shift);
        total += s[i];
      }
    sum[half] = sum[half] * shrink[half] + total;
  }
}

// As attention.cu's. Keys are taken from the last block to the first; while the values of one are multiplied, the scores of the
// next become exponentials.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attend(const Element* q, i64 q_pitch, const Element* k, i64 k_pitch, const Element* v, i64 v_pitch, const Tile* tiles,
           int group, int window, float scale, Element* out, i64 out_pitch, float* lse, i64 tokens) {
  DYNAMIC_SHARED(memory);
  __shared__ u64 queries_full, keys_full[TURNS], keys_empty[TURNS], values_full[TURNS], values_empty[TURNS];
  u8* qs = aligned(memory);
  u8* ks = qs + TILE_BYTES;
  u8* vs = ks + TURNS * TILE_BYTES;
  const Tile tile = tiles[blockIdx.y];
  if (tile.first >= tile.length) return;
  int head = blockIdx.x;
  int begin = window && tile.first >= window ? (tile.first - window + 1) / KEYS * KEYS : 0;
  int blocks = (min(tile.length, tile.first + ROWS) - begin + KEYS - 1) / KEYS;
  auto key_of = [&](int block) { return begin + (blocks - 1 - block) * KEYS; };
  if (threadIdx.x == 0) {
    make_barrier(&queries_full, SUPPLIERS);
    for (int i = 0; i < TURNS; i++) {
      make_barrier(keys_full + i, SUPPLIERS), make_barrier(values_full + i, SUPPLIERS);
      make_barrier(keys_empty + i, WARPS_OF_WORKERS), make_barrier(values_empty + i, WARPS_OF_WORKERS);
    }
  }
  __syncthreads();
  if (threadIdx.x < SUPPLIERS) {
    give_registers<40>();
    q += tile.start * q_pitch + head * DIM;
    k += tile.start * k_pitch + head / group * DIM;
    v += tile.start * v_pitch + head / group * DIM;
    load_rows<ROWS>(qs, q, q_pitch, tile.first, tile.length);
    commit_copies();
#pragma unroll 1
    for (int block = 0; block < blocks; block++) {
      int turn = block % TURNS;
      if (block >= TURNS) wait_for_phase(keys_empty + turn, block / TURNS - 1);
      load_rows<KEYS>(ks + turn * TILE_BYTES, k, k_pitch, key_of(block), tile.length);
      commit_copies();
      supply<1>(block == 0 ? &queries_full : values_full + (block - 1) % TURNS);
      if (block >= TURNS) wait_for_phase(values_empty + turn, block / TURNS - 1);
      load_rows<KEYS>(vs + turn * TILE_BYTES, v, v_pitch, key_of(block), tile.length);
      commit_copies();
      supply<1>(keys_full + turn);
    }
    supply<0>(values_full + (blocks - 1) % TURNS);
    return;
  }
  take_registers<232>();
  int worker = threadIdx.x - SUPPLIERS, lane = threadIdx.x % 32, row = __shfl_sync(~0u, worker / 128, 0) * 64;
  int query0 = tile.first + row + worker % 128 / 32 * 16 + lane / 4;
  auto is_masked = [&](int key0) {
    return key0 + KEYS > tile.first + 1 || (window && key0 + window < tile.first + ROWS);
  };
  float o[DIM / 2] = {}, s[KEYS / 2], top[2] = {LOWEST, LOWEST}, sum[2] = {}, shrink[2];
  u32 p[KEYS / 4];
  wait_for_phase(&queries_full, 0);
  wait_for_phase(keys_full, 0);
  begin_products();
  multiply_rows<ROWS, KEYS>(s, qs, row, ks);
  commit_products();
  wait_products<0>();
  hold(s);
  give_back(keys_empty);
  exponentiate(s, key_of(0), query0, window, is_masked(key_of(0)), scale, top, sum, shrink, lane);
  as_factors(p, s);
#pragma unroll 1
  for (int block = 0; block + 1 < blocks; block++) {
    int turn = block % TURNS, next = (block + 1) % TURNS;
    wait_for_phase(keys_full + next, (block + 1) / TURNS);
    hold(o);
    begin_products();
    multiply_rows<ROWS, KEYS>(s, qs, row, ks + next * TILE_BYTES);
    commit_products();
    wait_for_phase(values_full + turn, block / TURNS);
    multiply_across<KEYS>(o, p, vs + turn * TILE_BYTES);
    commit_products();
    wait_products<1>();
    hold(s);
    give_back(keys_empty + next);
    int key0 = key_of(block + 1);
    exponentiate(s, key0, query0, window, is_masked(key0), scale, top, sum, shrink, lane);
    wait_products<0>();
    hold(o);
    give_back(values_empty + turn);
#pragma unroll
    for (int i = 0; i < DIM / 2; i++) o[i] *= shrink[i / 2 % 2];
    as_factors(p, s);
  }
  int turn = (blocks - 1) % TURNS;
  wait_for_phase(values_full + turn, (blocks - 1) / TURNS);
  hold(o);
  begin_products();
  multiply_across<KEYS>(o, p, vs + turn * TILE_BYTES);
  commit_products();
  wait_products<0>();
  hold(o);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int query = query0 + half * 8;
    float total = quad_sum(sum[half]);
    if (query >= tile.length) continue;
    i64 at = tile.start + query;
    if (lane % 4 == 0) lse[head * tokens + at] = top[half] * scale + log2f(total);
    Element* to = out + at * out_pitch + head * DIM + lane % 4 * 2;
    float over = 1.f / total;
#pragma unroll
    for (int n = 0; n < DIM / 8; n++)
      *(u32*)(to + n * 8) = narrow_pair(o[n * 4 + half * 2] * over, o[n * 4 + half * 2 + 1] * over);
  }
}

// As attention.cu's; a thread block takes 128 queries of a head.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attend_backward_queries(const Element* q, i64 q_pitch, const Element* k, i64 k_pitch, const Element* v, i64 v_pitch,
                            const Element* out, i64 out_pitch, const Element* dout, i64 dout_pitch, const float* lse,
                            const Tile* tiles, int group, int window, float scale, Element* dq, i64 dq_pitch, float* delta,
                            i64 tokens) {
  DYNAMIC_SHARED(memory);
  __shared__ u64 queries_full, full[BACK_TURNS], empty[BACK_TURNS];
  __shared__ float deltas[ROWS];
  u8* qs = aligned(memory);
  u8* ds = qs + TILE_BYTES;
  u8* kvs = ds + TILE_BYTES;
  const Tile tile = tiles[blockIdx.y];
  if (tile.first >= tile.length) return;
  int head = blockIdx.x;
  int begin = window && tile.first >= window ? (tile.first - window + 1) / BESIDE * BESIDE : 0;
  int blocks = (min(tile.length, tile.first + ROWS) - begin + BESIDE - 1) / BESIDE;
  dout += tile.start * dout_pitch + head * DIM;
  if (threadIdx.x == 0) {
    make_barrier(&queries_full, SUPPLIERS);
    for (int i = 0; i < BACK_TURNS; i++) make_barrier(full + i, SUPPLIERS), make_barrier(empty + i, WARPS_OF_WORKERS);
  }
  __syncthreads();
  if (threadIdx.x < SUPPLIERS) {
    give_registers<40>();
    q += tile.start * q_pitch + head * DIM;
    k += tile.start * k_pitch + head / group * DIM;
    v += tile.start * v_pitch + head / group * DIM;
    load_rows<ROWS>(qs, q, q_pitch, tile.first, tile.length);
    load_rows<ROWS>(ds, dout, dout_pitch, tile.first, tile.length);
    commit_copies();
#pragma unroll 1
    for (int block = 0; block < blocks; block++) {
      int turn = block % BACK_TURNS;
      u8* to = kvs + turn * 2 * PART_BYTES;
      if (block >= BACK_TURNS) wait_for_phase(empty + turn, block / BACK_TURNS - 1);
      load_rows<BESIDE>(to, k, k_pitch, begin + block * BESIDE, tile.length);
      load_rows<BESIDE>(to + PART_BYTES, v, v_pitch, begin + block * BESIDE, tile.length);
      commit_copies();
      supply<1>(block == 0 ? &queries_full : full + (block - 1) % BACK_TURNS);
    }
    supply<0>(full + (blocks - 1) % BACK_TURNS);
    return;
  }
  take_registers<232>();
  int worker = threadIdx.x - SUPPLIERS, lane = threadIdx.x % 32, row = __shfl_sync(~0u, worker / 128, 0) * 64;
  int row0 = row + worker % 128 / 32 * 16 + lane / 4;
  out += tile.start * out_pitch + head * DIM;
  lse += head * tokens + tile.start;
  {  // two threads a row
    int r = worker / 2, query = tile.first + r;
    float dot = 0.f;
    if (query < tile.length)
      for (int c = worker % 2 * 8; c < DIM; c += 16) {
        uint4 a = *(const uint4*)(out + query * out_pitch + c), b = *(const uint4*)(dout + query * dout_pitch + c);
        u32 x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; i++)
          dot += widen((Element)(x[i] & 0xffff)) * widen((Element)(y[i] & 0xffff)) +
                 widen((Element)(x[i] >> 16)) * widen((Element)(y[i] >> 16));
      }
    dot += __shfl_xor_sync(~0u, dot, 1);
    if (worker % 2 == 0) {
      deltas[r] = dot;
      if (query < tile.length) delta[head * tokens + tile.start + query] = dot;
    }
  }
  meet_some<1, WORKERS>();
  float row_delta[2], row_lse[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int r = row0 + half * 8;
    row_delta[half] = deltas[r];
    row_lse[half] = tile.first + r < tile.length ? lse[tile.first + r] : 3e38f;
  }
  float sum[DIM / 2] = {}, s[BESIDE / 2], dp[BESIDE / 2];
  u32 factors[BESIDE / 4];
  wait_for_phase(&queries_full, 0);
#pragma unroll 1
  for (int block = 0; block < blocks; block++) {
    int turn = block % BACK_TURNS, key0 = begin + block * BESIDE;
    const u8* ks = kvs + turn * 2 * PART_BYTES;
    wait_for_phase(full + turn, block / BACK_TURNS);
    begin_products();
    multiply_rows<ROWS, BESIDE>(s, qs, row, ks);
    commit_products();
    multiply_rows<ROWS, BESIDE>(dp, ds, row, ks + PART_BYTES);
    commit_products();
    wait_products<1>();
    hold(s);
    if (key0 + BESIDE > tile.first + row + 1 || (window && key0 + window < tile.first + ROWS))
#pragma unroll
      for (int i = 0; i < BESIDE / 2; i++) {
        int key = key0 + i / 4 * 8 + lane % 4 * 2 + i % 2, query = tile.first + row0 + i / 2 % 2 * 8;
        if (key > query || (window && key + window <= query)) s[i] = LOWEST;
      }
#pragma unroll
    for (int i = 0; i < BESIDE / 2; i++) s[i] = power_of_two(s[i] * scale - row_lse[i / 2 % 2]);
    wait_products<0>();
    hold(dp);
    hold(sum);
#pragma unroll
    for (int i = 0; i < BESIDE / 2; i++) s[i] *= dp[i] - row_delta[i / 2 % 2];
    as_factors(factors, s);
    begin_products();
    multiply_across<BESIDE>(sum, factors, ks);
    commit_products();
    wait_products<0>();
    hold(sum);
    give_back(empty + turn);
  }
  float factor = scale * 0.693147180559945f;  // 1 / sqrt(DIM)
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int query = tile.first + row0 + half * 8;
    if (query >= tile.length) continue;
    Element* to = dq + (tile.start + query) * dq_pitch + head * DIM + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < DIM / 8; n++)
      *(u32*)(to + n * 8) = narrow_pair(sum[n * 4 + half * 2] * factor, sum[n * 4 + half * 2 + 1] * factor);
  }
}

// As attention.cu's; a thread block takes 128 keys.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attend_backward_keys(const Element* q, i64 q_pitch, const Element* k, i64 k_pitch, const Element* v, i64 v_pitch,
                         const Element* dout, i64 dout_pitch, const float* lse, const float* delta, const Tile* tiles,
                         int group, int window, float scale, Element* dk, Element* dv, i64 d_pitch, float* dk_shares,
                         float* dv_shares, i64 tokens) {
  DYNAMIC_SHARED(memory);
  __shared__ u64 keys_full, full[BACK_TURNS], empty[BACK_TURNS];
  __shared__ float row_lse[BACK_TURNS][BESIDE], row_delta[BACK_TURNS][BESIDE];
  u8* ks = aligned(memory);
  u8* vs = ks + TILE_BYTES;
  u8* buffers = vs + TILE_BYTES;
  const Tile tile = tiles[blockIdx.y];
  if (tile.first >= tile.length) return;
#if SHARED
  int key_head = blockIdx.x / group, head0 = blockIdx.x, heads = 1;
#else
  int key_head = blockIdx.x, head0 = blockIdx.x * group, heads = group;
#endif
  int begin = tile.first;
  int end = window ? min(tile.length, tile.first + ROWS - 1 + window) : tile.length;
  int blocks = (end - begin + BESIDE - 1) / BESIDE * heads;
  if (threadIdx.x == 0) {
    make_barrier(&keys_full, SUPPLIERS);
    for (int i = 0; i < BACK_TURNS; i++) make_barrier(full + i, SUPPLIERS), make_barrier(empty + i, WARPS_OF_WORKERS);
  }
  __syncthreads();
  if (threadIdx.x < SUPPLIERS) {
    give_registers<40>();
    load_rows<ROWS>(ks, k + tile.start * k_pitch + key_head * DIM, k_pitch, tile.first, tile.length);
    load_rows<ROWS>(vs, v + tile.start * v_pitch + key_head * DIM, v_pitch, tile.first, tile.length);
    commit_copies();
    int head = head0, first = begin;
#pragma unroll 1
    for (int block = 0; block < blocks; block++) {
      int turn = block % BACK_TURNS;
      u8* to = buffers + turn * 2 * PART_BYTES;
      if (block >= BACK_TURNS) wait_for_phase(empty + turn, block / BACK_TURNS - 1);
      load_rows<BESIDE>(to, q + tile.start * q_pitch + head * DIM, q_pitch, first, tile.length);
      load_rows<BESIDE>(to + PART_BYTES, dout + tile.start * dout_pitch + head * DIM, dout_pitch, first, tile.length);
      commit_copies();
      if (threadIdx.x < BESIDE) {
        i64 at = head * tokens + tile.start + first + threadIdx.x;
        bool there = first + (int)threadIdx.x < tile.length;
        row_lse[turn][threadIdx.x] = there ? lse[at] : 3e38f;
        row_delta[turn][threadIdx.x] = there ? delta[at] : 0.f;
      }
      supply<1>(block == 0 ? &keys_full : full + (block - 1) % BACK_TURNS);
      first += BESIDE;
      if (first >= end) first = begin, head++;
    }
    supply<0>(full + (blocks - 1) % BACK_TURNS);
    return;
  }
  take_registers<232>();
  int worker = threadIdx.x - SUPPLIERS, lane = threadIdx.x % 32, row = __shfl_sync(~0u, worker / 128, 0) * 64;
  int row0 = row + worker % 128 / 32 * 16 + lane / 4;
  float sum_k[DIM / 2] = {}, sum_v[DIM / 2] = {}, s[BESIDE / 2], dp[BESIDE / 2];
  u32 factors[BESIDE / 4];
  int first = begin;
  wait_for_phase(&keys_full, 0);
#pragma unroll 1
  for (int block = 0; block < blocks; block++) {
    int turn = block % BACK_TURNS;
    const u8* qs = buffers + turn * 2 * PART_BYTES;
    const u8* ds = qs + PART_BYTES;
    wait_for_phase(full + turn, block / BACK_TURNS);
    begin_products();
    multiply_rows<ROWS, BESIDE>(s, ks, row, qs);  // the keys in rows
    commit_products();
    multiply_rows<ROWS, BESIDE>(dp, vs, row, ds);
    commit_products();
    wait_products<1>();
    hold(s);
    if (first < tile.first + row + 63 || (window && first + BESIDE > tile.first + window))
#pragma unroll
      for (int i = 0; i < BESIDE / 2; i++) {
        int key = tile.first + row0 + i / 2 % 2 * 8, query = first + i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (key > query || (window && key + window <= query)) s[i] = LOWEST;
      }
#pragma unroll
    for (int i = 0; i < BESIDE / 2; i++)
      s[i] = power_of_two(s[i] * scale - row_lse[turn][i / 4 * 8 + lane % 4 * 2 + i % 2]);
    as_factors(factors, s);
    wait_products<0>();
    hold(dp);
    hold(sum_v);
    begin_products();
    multiply_across<BESIDE>(sum_v, factors, ds);
    commit_products();
#pragma unroll
    for (int i = 0; i < BESIDE / 2; i++) s[i] *= dp[i] - row_delta[turn][i / 4 * 8 + lane % 4 * 2 + i % 2];
    u32 more[BESIDE / 4];
    as_factors(more, s);
    hold(sum_k);
    begin_products();
    multiply_across<BESIDE>(sum_k, more, qs);
    commit_products();
    wait_products<0>();
    hold(sum_v);
    hold(sum_k);
    give_back(empty + turn);
    first += BESIDE;
    if (first >= end) first = begin;
  }
  float factor = scale * 0.693147180559945f;  // 1 / sqrt(DIM)
#pragma unroll
  for (int half = 0; half < 2; half++) {
    int key = tile.first + row0 + half * 8;
    if (key >= tile.length) continue;
    i64 at = tile.start + key;
#pragma unroll
    for (int n = 0; n < DIM / 8; n++) {
      int c = n * 8 + lane % 4 * 2, i = n * 4 + half * 2;
#if SHARED
      i64 to = (head0 * tokens + at) * DIM + c;
      *(float2*)(dv_shares + to) = make_float2(sum_v[i], sum_v[i + 1]);
      *(float2*)(dk_shares + to) = make_float2(sum_k[i] * factor, sum_k[i + 1] * factor);
#else
      i64 to = at * d_pitch + key_head * DIM + c;
      *(u32*)(dv + to) = narrow_pair(sum_v[i], sum_v[i + 1]);
      *(u32*)(dk + to) = narrow_pair(sum_k[i] * factor, sum_k[i + 1] * factor);
#endif
    }
  }
}
