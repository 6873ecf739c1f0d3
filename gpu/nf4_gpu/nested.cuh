// What the kernels share of double quantization: the exact sum (NF4-6.1) and the absmax of a block (NF4-6.4).
#pragma once
#include "floats.cuh"

#define SUM_BINS 256
#define COPIES 16  // of the bins, so that few thread blocks add to the same; behind them is a counter
#ifndef NESTED_BLOCK
#define NESTED_BLOCK 256
#endif

// Sums of float32 magnitudes, exact in any order: an integer of 24-bit significands for each exponent, sums [SUM_BINS] in
// shared memory. Every thread of the block calls each of the three.
__device__ __forceinline__ void clear_sums(u64* sums) {
  for (int i = threadIdx.x; i < SUM_BINS; i += blockDim.x) sums[i] = 0;
  __syncthreads();
}

// bits: each lane's number, or 0. The lanes of a warp with the same exponent add up first.
__device__ __forceinline__ void add_to_sums(u64* sums, u32 bits) {
  u32 exponent = bits >> 23, significand = exponent ? bits & 0x7fffff | 0x800000 : bits;
  for (u32 left = __ballot_sync(~0u, significand != 0); left;) {
    u32 leader = __shfl_sync(~0u, exponent, __ffs(left) - 1);
    u32 same = __ballot_sync(~0u, exponent == leader), part = exponent == leader ? significand : 0;
#if __CUDA_ARCH__ >= 800
    u32 total = __reduce_add_sync(~0u, part);
#else
    u32 total = part;
    for (int lanes = 16; lanes; lanes /= 2) total += __shfl_xor_sync(~0u, total, lanes);
#endif
    if (threadIdx.x % 32 == 0) atomicAdd(sums + leader, (u64)total);
    left &= ~same;
  }
}

// Adds the sums to bins [SUM_BINS] in global memory.
__device__ __forceinline__ void flush_sums(const u64* sums, u64* bins) {
  __syncthreads();
  for (int i = threadIdx.x; i < SUM_BINS; i += blockDim.x)
    if (sums[i]) atomicAdd(bins + i, sums[i]);
}

// The absmax of a block in two steps, so that a kernel may load what it will decode later.
struct PlainAbsmax {
  typedef float Raw;
  const float* absmax;
  __device__ __forceinline__ Raw load(i64 block) const { return __ldg(absmax + block); }
  __device__ __forceinline__ float decode(Raw raw) const { return raw; }
};

struct DoubleAbsmax {
  struct Raw {
    u32 code;
    float absmax;
  };
  const u8* codes;
  const float* absmax;
  float offset;
  const float* map;  // [256]
  __device__ __forceinline__ Raw load(i64 block) const {
    return Raw{__ldg(codes + block), __ldg(absmax + block / NESTED_BLOCK)};
  }
  __device__ __forceinline__ float decode(Raw raw) const { return map[raw.code] * raw.absmax + offset; }
};
