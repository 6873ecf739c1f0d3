// What the products on Hopper share: the table of factors, the scales of a step, and the copy engine with its barriers.
#pragma once
#include "nested.cuh"

#define CHUNK 64   // columns that share a scale
#define CHUNKS 4   // of a step
#define STEP 256   // columns: 128 bytes of each row of W
#define TABLE_ROW 256
#define TABLE_BYTES (256 * TABLE_ROW)

// Row b of the table, at the beginning of shared memory: the two factors of byte b, rounded to DTYPE, the first in the low
// half, once in each of the 32 banks; and then entry b of the 8-bit map in each bank. So a warp looks up in one turn, and a
// byte moved up by eight bits, beside the lane's bank, is an address: one instruction.
__device__ __forceinline__ u32 look_up(const u8* table, u32 word, int byte, u32 bank) {
  return *(const u32*)(table + __byte_perm(word, bank, 0x5504 | byte << 4));
}

__device__ __forceinline__ float look_up_map(const u8* table, u32 word, int byte, u32 bank) {
  return *(const float*)(table + TABLE_ROW / 2 + __byte_perm(word, bank, 0x5504 | byte << 4));
}

// By the first `warps` warps. Read it after a barrier.
template <int warps, class Scales>
__device__ __forceinline__ void write_table(u8* table, const float* values, const Scales& scales) {
  const int turns = 64 / warps;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = warp * 4 + lane / 8;
  if (warp >= warps) return;
  float value = values[lane % 16], entries[turns];
#pragma unroll
  for (int i = 0; i < turns; i++) entries[i] = scales.map_entry(first + i * warps * 4);  // on their way
#pragma unroll
  for (int i = 0; i < turns; i++) {
    int byte = first + i * warps * 4;
    u32 pair = narrow_pair(__shfl_sync(~0u, value, byte >> 4), __shfl_sync(~0u, value, byte & 15));
    uint4* row = (uint4*)(table + byte * TABLE_ROW) + lane % 8;
    *row = make_uint4(pair, pair, pair, pair);
  }
  if (Scales::NESTED)
#pragma unroll
    for (int i = 0; i < turns; i++) {
      float4* row = (float4*)(table + (first + i * warps * 4) * TABLE_ROW + TABLE_ROW / 2) + lane % 8;
      *row = make_float4(entries[i], entries[i], entries[i], entries[i]);
    }
}

// The absmax of a chunk, or of a step's four, which begin a block: in two steps, as in nested.cuh.
struct PlainScales {
  typedef float One;
  typedef float4 Four;
  static const bool NESTED = false;
  const float* absmax;
  __device__ __forceinline__ float map_entry(int) const { return 0.f; }
  __device__ __forceinline__ One load(i64 block) const { return __ldg(absmax + block); }
  __device__ __forceinline__ Four load_four(i64 block) const {
#if BLOCK == 64
    return __ldg((const float4*)(absmax + block));
#elif BLOCK == 128
    float2 two = __ldg((const float2*)(absmax + block));
    return make_float4(two.x, two.x, two.y, two.y);
#else
    float one = __ldg(absmax + block);
    return make_float4(one, one, one, one);
#endif
  }
  __device__ __forceinline__ float decode(One one, const u8*, u32) const { return one; }
  __device__ __forceinline__ float4 decode_four(Four four, const u8*, u32) const { return four; }
};

struct DoubleScales {
  struct One {
    u32 codes;
    float absmax;
  };
  typedef One Four;
  static const bool NESTED = true;
  const u8* codes;
  const float* absmax;
  float offset;
  const float* map;
  __device__ __forceinline__ float map_entry(int i) const { return __ldg(map + i); }
  __device__ __forceinline__ One load(i64 block) const {
    return One{__ldg(codes + block), __ldg(absmax + block / NESTED_BLOCK)};
  }
  __device__ __forceinline__ Four load_four(i64 block) const {
    float nested = __ldg(absmax + block / NESTED_BLOCK);  // nested blocks are of 32 or more
#if BLOCK == 64
    return Four{__ldg((const u32*)(codes + block)), nested};
#elif BLOCK == 128
    return Four{__byte_perm(__ldg((const u16*)(codes + block)), 0, 0x1100), nested};
#else
    return Four{__ldg(codes + block) * 0x01010101u, nested};
#endif
  }
  __device__ __forceinline__ float decode(One one, const u8* table, u32 bank) const {
    return look_up_map(table, one.codes, 0, bank) * one.absmax + offset;
  }
  __device__ __forceinline__ float4 decode_four(Four four, const u8* table, u32 bank) const {
    float f[4];
#pragma unroll
    for (int i = 0; i < 4; i++) f[i] = look_up_map(table, four.codes, i, bank) * four.absmax + offset;
    return make_float4(f[0], f[1], f[2], f[3]);
  }
};

// A matrix of codes as the copy engine knows it: made by the host, with boxes of 128 bytes (swizzled) by some rows.
struct __align__(64) TensorMap {
  u64 opaque[16];
};

// A launch may overlap the end of the one before it on the stream: it then begins when all thread blocks of that one have
// called let_next_begin or ended. Until wait_for_previous a kernel only reads what no product writes: W and the tables.
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }

__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void init_barrier(u32 barrier, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After the last init_barrier, by the thread that did them.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void expect_bytes(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void wait(u32 barrier, u32 parity) {
  asm volatile(
      "{.reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The step's box of codes from `row` on, into shared memory. The L2 cache is told to drop them first: they come once, and
// where they are kept instead, W's way from memory takes an eighth longer.
__device__ __forceinline__ void load_codes(u32 to, const TensorMap& codes, int step, int row, u32 barrier) {
  asm volatile(
      "{.reg .b64 once; createpolicy.fractional.L2::evict_first.b64 once, 1.0;"
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1, {%2, %3}], [%4], once;}" ::"r"(to),
      "l"(&codes), "r"(step * (STEP / 2)), "r"(row), "r"(barrier)
      : "memory");
}

// Bytes that follow one another.
__device__ __forceinline__ void load_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
      "r"(bytes), "r"(barrier)
      : "memory");
}
