// Encoding and decoding of blocks (NF4-3, NF4-4, NF4-5), with double quantization undone on the way (NF4-6.4).
// Defines: DTYPE; BLOCK (32 to 4096); SUM, if absmax is summed for double quantization. Eight neighbours are one 16-byte
// access of a 16-bit dtype, and one 4-byte word of codes.
#include "floats.cuh"
#include "nested.cuh"

#define TINY __uint_as_float(0x00200000)   // 2^-128: up to here RN(1 / absmax) is infinite
#define LIFT __uint_as_float(0x5f800000)   // 2^64
#define INFINITE __uint_as_float(0x7f800000)
#define HUGE __uint_as_float(0x7e800000)   // 2^126

// ---- encode -------------------------------------------------------------------------------------------------------

// A thread holds 32 bytes of neighbours: what is done once a block, or a lane's part in it, is shared by more of them. Of
// 8192 x 28672 bfloat16 that takes 206 us on an H100, with 54 % of the issue slots, where 16 bytes took 216, with 83 %.
#if DTYPE == FLOAT32
#define OCTETS 1
#else
#define OCTETS 2
#endif
#define HELD (8 * OCTETS)
#define GROUP (BLOCK / HELD)               // the threads of a block
#define THREADS (GROUP > 256 ? GROUP : 256)
#define WARPS (THREADS / 32)
#define TURNS 4
#define EACH _Pragma("unroll") for (int i = 0; i < HELD; i++)

// The largest magnitude over the group, from each lane's own.
__device__ __forceinline__ float group_max(float m, float* shared) {
#pragma unroll
  for (int lanes = 1; lanes < (GROUP < 32 ? GROUP : 32); lanes *= 2)
    m = max_magnitude(m, __shfl_xor_sync(~0u, m, lanes));
  if (GROUP > 32) {
    int warp = threadIdx.x / 32, first = warp / (GROUP / 32) * (GROUP / 32);
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[warp] = m;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < GROUP / 32; i++) m = max_magnitude(m, shared[first + i]);
  }
  return m;
}

// NF4-3.5 by sixteenths: [k / 16, (k + 1) / 16) holds at most one threshold, so that the rank of s is the number of
// thresholds below k / 16, and one more if s is above the one inside. A lane reads a copy of the table in its own banks.
struct Bucket {
  float threshold;
  u32 below;
};

struct ByBucket {
  u32 base;  // where this lane's copy would begin for s = -2^19 * 1.5, in shared memory

  __device__ __forceinline__ ByBucket(const Bucket* table) {
    __shared__ Bucket copies[33][32];
    for (int i = threadIdx.x; i < 33 * 32; i += THREADS) copies[i / 32][i % 32] = table[i / 32];
    base = (u32)__cvta_generic_to_shared(&copies[0][threadIdx.x % 32]) - (0x49400000u << 8);
  }

  // All thresholds are inside: ranks stay as they are.
  static __device__ __forceinline__ float within_one(float s) { return fminf(fmaxf(s, -1.f), 1.f); }

  // Adds the rank of s, a number from -1 to 1, to word at a bit.
  __device__ __forceinline__ void add_rank(float s, u32& word, int bit) const {
    // 2^19 * 1.5 + 1: rounded down, the sum has floor(16 s) + 16 in its low bits.
    u32 k = __float_as_uint(__fadd_rd(s, __uint_as_float(0x49400010)));
    Bucket b;
    asm("ld.shared.v2.b32 {%0, %1}, [%2];" : "=f"(b.threshold), "=r"(b.below) : "r"(k * 256 + base));
    word += b.below << bit;
    // As C, this becomes three instructions, not two.
    asm("{.reg .pred above; setp.gt.f32 above, %1, %2; @above add.u32 %0, %0, %3;}"
        : "+r"(word)
        : "f"(s), "f"(b.threshold), "r"(1u << bit));
  }
};

// For codebooks with two thresholds in a sixteenth, or whose ranks are not their codes.
struct Thresholds {
  float t[15];   // ascending, then infinite
  u32 codes[2];  // the code of each rank, a nibble each
};

__device__ __forceinline__ u32 code_of(float s, const Thresholds* thresholds) {
  u32 rank = 0;
#pragma unroll
  for (int j = 0; j < 15; j++) rank += s > thresholds->t[j];
  return thresholds->codes[rank / 8] >> rank % 8 * 4 & 15;
}

struct ByThresholds {
  const Thresholds* thresholds;
  static __device__ __forceinline__ float within_one(float s) { return s; }  // which may pass a threshold there
  __device__ __forceinline__ void add_rank(float s, u32& word, int bit) const {
    word += code_of(s, thresholds) << bit;
  }
};

// 1 / a (NF4-3.4), and v such that their product is s; where a is not a number, *status is set (NF4-12.1).
template <class Ranks>
__device__ __forceinline__ float reciprocal_for(float a, float v[HELD], bool inside, int* status) {
  if (a > TINY && a <= HUGE) return reciprocal(a);
  if (!(a < INFINITE)) {  // refused; until then s must be a number
    if (status && inside) *status = 1;
    EACH v[i] = 0.f;
  } else if (a > HUGE) {  // 1 / a is subnormal, and so inexact that |s| may pass 1
    float r = reciprocal(a);
    EACH v[i] = Ranks::within_one(v[i] * r);
    return 1.f;
  } else if (a > 0.f) {  // NF4-3.3: the products with 2^64 are exact
    EACH v[i] = v[i] * LIFT;
    return reciprocal(a * LIFT);
  }
  return 0.f;
}

// v, of which the group holds a block -> its codes, and *absmax if any of them is inside the tensor.
template <class Ranks>
__device__ __forceinline__ void encode_block(float v[HELD], bool inside, u32 words[OCTETS], float* absmax, int* status,
                                             const Ranks& ranks, float* shared) {
  float a = 0.f;
  EACH a = max_magnitude(a, v[i]);
  a = group_max(a, shared);
  if (threadIdx.x % GROUP == 0 && inside) *absmax = a;
  float r = reciprocal_for<Ranks>(a, v, inside, status);
#pragma unroll
  for (int o = 0; o < OCTETS; o++) {
    words[o] = 0;
    // NF4-5.1: the first element in the high nibble of the low byte
    EIGHT ranks.add_rank(v[o * 8 + i] * r, words[o], i * 4 ^ 4);
  }
}

// x [n] -> codes [ceil(n / 2)], absmax [ceil(n / BLOCK)]. Where an element is not finite and status is given, *status
// is set. A thread block takes TURNS tiles that follow one another. With SUM the exact sum of absmax (NF4-6.1) is added to
// one of the COPIES of bins.
template <class Ranks>
__device__ __forceinline__ void encode_tiles(const Element* x, i64 n, bool aligned, u8* codes, float* absmax,
                                             int* status, const Ranks& ranks, u64* bins) {
  __shared__ float shared[WARPS];
  const int tile = THREADS * HELD, part = TURNS * tile;
  i64 start = (i64)blockIdx.x * part;
  x += start + threadIdx.x * HELD, codes += start / 2 + threadIdx.x * (HELD / 2);
  absmax += (start + threadIdx.x * HELD) / BLOCK;
  n -= start;
  float v[HELD];
  u32 words[OCTETS];
  if (aligned && n >= part) {
    Eight next[OCTETS];  // loaded a turn ahead
#pragma unroll
    for (int o = 0; o < OCTETS; o++) next[o].load(x + o * 8);
#pragma unroll 1
    for (int at = 0; at < part; at += tile) {
#pragma unroll
      for (int o = 0; o < OCTETS; o++) next[o].widen_to(v + o * 8);
      if (at + tile < part)
#pragma unroll
        for (int o = 0; o < OCTETS; o++) next[o].load(x + at + tile + o * 8);
      encode_block(v, true, words, absmax + at / BLOCK, status, ranks, shared);
#if OCTETS == 2
      *(uint2*)(codes + at / 2) = make_uint2(words[0], words[1]);
#else
      *(u32*)(codes + at / 2) = words[0];
#endif
    }
  } else {
#pragma unroll 1
    for (int at = 0; at < part && at < n; at += tile) {
      int left = (int)(n < part ? n : part) - threadIdx.x * HELD - at;
      EACH v[i] = i < left ? widen(x[at + i]) : 0.f;
      encode_block(v, left > 0, words, absmax + at / BLOCK, status, ranks, shared);
#pragma unroll
      for (int i = 0; i < HELD; i += 2)
        if (i < left) codes[(at + i) / 2] = words[i / 8] >> i % 8 * 4;  // NF4-5.2: s = 0 pads
    }
  }
#ifdef SUM
  __shared__ u64 sums[SUM_BINS];
  clear_sums(sums);  // and the absmax of all warps are written
  const float* ours = absmax - threadIdx.x * HELD / BLOCK;
  int blocks = (int)((n < part ? n : part) + BLOCK - 1) / BLOCK;
  for (int first = 0; first < blocks; first += THREADS) {
    float a = first + threadIdx.x < blocks ? ours[first + threadIdx.x] : 0.f;
    add_to_sums(sums, a < INFINITE ? __float_as_uint(a) : 0);
  }
  flush_sums(sums, bins + blockIdx.x % COPIES * SUM_BINS);
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS)
    encode(const Element* x, i64 n, bool aligned, u8* codes, float* absmax, int* status, const Bucket* table,
           u64* bins) {
  ByBucket ranks(table);
  __syncthreads();
  encode_tiles(x, n, aligned, codes, absmax, status, ranks, bins);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1024 / THREADS)
    encode_by_thresholds(const Element* x, i64 n, bool aligned, u8* codes, float* absmax, int* status,
                         const Thresholds* thresholds, u64* bins) {
  encode_tiles(x, n, aligned, codes, absmax, status, ByThresholds{thresholds}, bins);
}

// The clauses word by word, a thread a block: what the fast kernel is held against.
extern "C" __global__ void encode_plain(const Element* x, i64 n, u8* codes, float* absmax,
                                        const Thresholds* thresholds) {
  i64 block = (i64)blockIdx.x * blockDim.x + threadIdx.x, start = block * BLOCK;
  if (start >= n) return;
  i64 stop = start + BLOCK < n ? start + BLOCK : n;
  float a = 0.f;
  for (i64 i = start; i < stop; i++) a = fmaxf(a, fabsf(widen(x[i])));  // NF4-3.2
  absmax[block] = a;
  float lift = a <= TINY ? LIFT : 1.f;
  float r = a > 0.f ? reciprocal(a * lift) : 0.f;
  for (i64 i = start; i < stop; i += 2) {
    u32 byte = 0;
    for (i64 j = i; j < i + 2; j++) {
      float s = j < n ? widen(x[j]) * lift * r : 0.f;  // NF4-3.3, NF4-3.4, NF4-5.2
      byte = byte << 4 | code_of(s, thresholds);       // NF4-3.5, NF4-5.1
    }
    codes[i / 2] = byte;
  }
}

// ---- decode -------------------------------------------------------------------------------------------------------

#define DECODERS 512  // threads
#define UNROLL 2      // words of a thread, all on their way before the first is needed

// codes [ceil(n / 2)] -> y [n]. The sixteen values lie across the lanes of a warp, twice, and are read by shuffle.
// staged(): what absmax.decode needs is in shared memory once all threads have called it.
template <class Absmax, class Staged>
__device__ __forceinline__ void decode_words(const u8* codes, i64 n, bool aligned, const float* values, Element* y,
                                             const Absmax& absmax, Staged staged) {
  const int part = DECODERS * UNROLL * 8;
  float value = values[threadIdx.x % 16];
  i64 start = (i64)blockIdx.x * part, first = start + threadIdx.x * 8;
  if (aligned && n - start >= part) {
    u32 w[UNROLL];
    typename Absmax::Raw raw[UNROLL];
#pragma unroll
    for (int k = 0; k < UNROLL; k++) {
      w[k] = __ldcs((const u32*)(codes + first / 2) + k * DECODERS);
      raw[k] = absmax.load((first + k * DECODERS * 8) / BLOCK);
    }
    staged();
#pragma unroll
    for (int k = 0; k < UNROLL; k++) {
      float a = absmax.decode(raw[k]), v[8];
      EIGHT v[i] = __shfl_sync(~0u, value, w[k] >> (i * 4 ^ 4)) * a;  // NF4-4.1; a shuffle reads five bits
      store_eight(y + first + k * DECODERS * 8, v);                   // NF4-4.2
    }
  } else {
    staged();
    for (i64 at = start + threadIdx.x * 2; at < start + part && at < n; at += DECODERS * 2) {
      float a = absmax.decode(absmax.load(at / BLOCK));
      u32 byte = codes[at / 2];
      y[at] = narrow(values[byte >> 4] * a);
      if (at + 1 < n) y[at + 1] = narrow(values[byte & 15] * a);
    }
  }
}

extern "C" __global__ void __launch_bounds__(DECODERS)
    decode(const u8* codes, i64 n, bool aligned, const float* values, Element* y, const float* absmax) {
  decode_words(codes, n, aligned, values, y, PlainAbsmax{absmax}, [] {});
}

extern "C" __global__ void __launch_bounds__(DECODERS)
    decode_double(const u8* codes, i64 n, bool aligned, const float* values, Element* y, const u8* absmax_codes,
                  const float* nested_absmax, const float* offset, const float* map) {
  __shared__ float shared_map[256];
  float entry = threadIdx.x < 256 ? map[threadIdx.x] : 0.f;  // under way while the words are asked for
  decode_words(codes, n, aligned, values, y, DoubleAbsmax{absmax_codes, nested_absmax, *offset, shared_map}, [&] {
    if (threadIdx.x < 256) shared_map[threadIdx.x] = entry;
    __syncthreads();
  });
}

// The clauses word by word, a thread an element.
extern "C" __global__ void decode_plain(const u8* codes, i64 n, const float* values, Element* y, const float* absmax) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  u32 code = i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4;
  y[i] = narrow(values[code] * absmax[i / BLOCK]);
}
