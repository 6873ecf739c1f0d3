// Double quantization of absmax (NF4-6.1, NF4-6.3) and its decoding (NF4-6.4).
#include "nested.cuh"

#define LARGEST __uint_as_float(0x7f7fffff)
#define LIMBS 10   // 32 bits each: a sum, in units of 2^-149, is below 2^(149 + 128 + 32)

// The float32 nearest to sum / n, ties to even (NF4-6.1). bins: the sums of significands by exponent; used: a bit for
// each that is not 0. n is below 2^32.
__device__ float rounded_mean(const u64* bins, const u32* used, u64 n) {
  u32 limbs[LIMBS] = {};
  for (int word = 0; word < SUM_BINS / 32; word++)
    for (u32 left = used[word]; left; left &= left - 1) {
      int e = word * 32 + __ffs(left) - 1, shift = (e ? e : 1) - 1;  // a subnormal has the scale of exponent 1
      u64 low = bins[e] << shift % 32, high = bins[e] >> 32 >> (32 - shift % 32), carry = 0;
#pragma unroll
      for (int i = 0; i < LIMBS; i++) {  // all of them, so that they stay in registers
        int part = i - shift / 32;
        carry += (u64)limbs[i] + (part == 0 ? (u32)low : part == 1 ? (u32)(low >> 32) : part == 2 ? (u32)high : 0);
        limbs[i] = (u32)carry;
        carry >>= 32;
      }
    }
  // Three limbs from the top, or from limb 2 where the sum is small, hold more than the 25 bits that matter of the
  // quotient; what is below them is only looked at for whether it is there.
  u32 a = 0, b = 0, c = 0;
  int top = 2;  // the number of limb a
  bool sticky = false;
#pragma unroll
  for (int i = LIMBS - 1; i >= 2; i--)
    if (top == 2 && (limbs[i] || i == 2)) a = limbs[i], b = limbs[i - 1], c = limbs[i - 2], top = i;
#pragma unroll
  for (int i = 0; i < LIMBS - 3; i++) sticky |= i < top - 2 && limbs[i];
  u64 rest = a, quotient;
  a = (u32)(rest / n), rest = rest % n << 32 | b;
  b = (u32)(rest / n), rest = rest % n << 32 | c;
  c = (u32)(rest / n), rest = rest % n;
  quotient = (u64)a << 32 | b;
  // The quotient is a, b, c, in units of 2^(32 (top - 2) - 149). A float32 keeps 24 bits of it, or all the whole units.
  int bits = a ? 96 - __clz(a) : b ? 64 - __clz(b) : c ? 32 - __clz(c) : 0;
  int cut = bits > 24 ? bits - 24 : 0;
  u32 kept, half;
  if (cut == 0) {  // top is 2: the units are those of the float32, and the rest of the division is below them
    kept = c;
    half = 2 * rest >= n;
    sticky = 2 * rest > n;
  } else {
    u64 upper = cut >= 32 ? quotient : 0, lower = (u64)b << 32 | c;
    kept = cut >= 32 ? (u32)(upper >> (cut - 32)) : (u32)(lower >> cut);
    int bit = cut - 1;
    half = bit >= 32 ? (u32)(quotient >> (bit - 32)) & 1 : c >> bit & 1;
    sticky |= rest != 0;
    if (bit > 32) sticky |= c != 0 || (quotient & ((1ull << (bit - 32)) - 1)) != 0;
    else sticky |= ((u64)c & ((1ull << bit) - 1)) != 0;
    kept &= 0xffffff;
  }
  cut += 32 * (top - 2);
  // In units of 2^-149 the bits of a small number are those of the float32; kept's hidden bit counts as exponent 1.
  return __uint_as_float(kept + (half && (sticky || kept & 1)) + ((u32)cut << 23));
}

// absmax [n], not negative, with the bins of its exact sum -> codes [n], nested_absmax [ceil(n / 256)], offset [1]. A
// warp takes a nested block, a lane eight neighbours. starts [8192]: by the upper 13 bits of s, the number of thresholds
// that are below every such s; at most three others are not above all of them (NF4-3.5). *status, if given, is set where an
// absmax would decode to an infinity (NF4-6.6). bins [COPIES][SUM_BINS] are 0 afterwards.
extern "C" __global__ void __launch_bounds__(256)
    encode_nested(const float* absmax, i64 n, bool aligned, u64* bins, const float* map, const float* table,
                  const u8* starts, u8* codes, float* nested_absmax, float* offset, int* status) {
  __shared__ float thresholds[258];  // infinite beyond the last
  __shared__ u64 sums[SUM_BINS];
  __shared__ u32 used[SUM_BINS / 32];
  __shared__ float mean;
  __shared__ bool last;
  for (int i = threadIdx.x; i < 258; i += 256) thresholds[i] = i < 255 ? table[i] : __uint_as_float(0x7f800000);
  u64 sum = 0;
#pragma unroll
  for (int copy = 0; copy < COPIES; copy++) sum += __ldcg(bins + copy * SUM_BINS + threadIdx.x);
  sums[threadIdx.x] = sum;
  u32 ballot = __ballot_sync(~0u, sum != 0);
  if (threadIdx.x % 32 == 0) used[threadIdx.x / 32] = ballot;
  __syncthreads();
  if (threadIdx.x == 0) {
    mean = rounded_mean(sums, used, n);
    if (blockIdx.x == 0) *offset = mean;
    // Every thread block has read the bins; the counter is 0 again.
    last = atomicInc((u32*)(bins + COPIES * SUM_BINS), gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (last)
    for (int copy = 0; copy < COPIES; copy++) bins[copy * SUM_BINS + threadIdx.x] = 0;  // for the next tensor
  int lane = threadIdx.x % 32;
  i64 blocks = (n + NESTED_BLOCK - 1) / NESTED_BLOCK;
  for (i64 block = (i64)blockIdx.x * 8 + threadIdx.x / 32; block < blocks; block += (i64)gridDim.x * 8) {
    i64 at = block * NESTED_BLOCK + lane * 8;
    float v[8];
    if (aligned && at + 8 <= n) {
      Eight eight;
      eight.load((const u32*)absmax + at);
      eight.widen_to(v);
      EIGHT v[i] = v[i] - mean;
    } else
      EIGHT v[i] = at + i < n ? absmax[at + i] - mean : 0.f;
    float a = 0.f;
    EIGHT a = max_magnitude(a, v[i]);
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) a = max_magnitude(a, __shfl_xor_sync(~0u, a, lanes));
    if (lane == 0) nested_absmax[block] = a;
    float lift = a <= __uint_as_float(0x00200000) ? __uint_as_float(0x5f800000) : 1.f;  // NF4-3.3
    float r = a > 0.f ? reciprocal(a * lift) : 0.f;
    u32 code[8];
    EIGHT {
      float s = v[i] * lift * r;
      code[i] = __ldg(starts + (__float_as_uint(s) >> 19));
      if (s > thresholds[code[i] + 1]) code[i] += 2;
      if (s > thresholds[code[i]]) code[i] += 1;
    }
    // Up to the largest number every decoded absmax is finite; an infinite a is no absmax of finite elements.
    if (status && a <= LARGEST && a + mean >= LARGEST)
      EIGHT if (at + i < n && !(fabsf(map[code[i]] * a + mean) <= LARGEST)) *status = 1;
    if (aligned && at + 8 <= n)
      *(uint2*)(codes + at) = make_uint2(code[0] | code[1] << 8 | code[2] << 16 | code[3] << 24,
                                         code[4] | code[5] << 8 | code[6] << 16 | code[7] << 24);
    else
      EIGHT if (at + i < n) codes[at + i] = code[i];
  }
}

// NF4-6.4
extern "C" __global__ void decode_nested(const u8* codes, i64 n, const float* nested_absmax, const float* offset,
                                         const float* map, float* absmax) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  DoubleAbsmax nested{codes, nested_absmax, *offset, map};
  if (i < n) absmax[i] = nested.decode(nested.load(i));
}

// absmax [n] -> bins [COPIES][SUM_BINS], 0 before: the exact sum of an absmax that encode did not make.
extern "C" __global__ void __launch_bounds__(256) sum_absmax(const float* absmax, i64 n, u64* bins) {
  __shared__ u64 sums[SUM_BINS];
  clear_sums(sums);
  for (i64 at = (i64)blockIdx.x * 256; at < n; at += (i64)gridDim.x * 256)
    add_to_sums(sums, at + threadIdx.x < n ? __float_as_uint(absmax[at + threadIdx.x]) & 0x7fffffff : 0);
  flush_sums(sums, bins + blockIdx.x % COPIES * SUM_BINS);
}
