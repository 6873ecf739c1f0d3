// Dropout by the counter (NF4-11.1, NF4-11.4): the mask is drawn where it is used, and never stored.
// Defines: DTYPE.
#include "floats.cuh"

#define DROPOUT 1u  // the purpose of NF4-11.2

__device__ __forceinline__ void philox(u32 c[4], u32 k0, u32 k1) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    u64 p = (u64)0xD2511F53u * c[0], q = (u64)0xCD9E8D57u * c[2];
    u32 next[4] = {(u32)(q >> 32) ^ c[1] ^ k0, (u32)q, (u32)(p >> 32) ^ c[3] ^ k1, (u32)p};
#pragma unroll
    for (int i = 0; i < 4; i++) c[i] = next[i];
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// One sequence: x [n] -> y [n] with 0 where the mask drops; add: y [n] += x [n] where it keeps. A thread takes the eight
// elements of a block of the generator.
extern "C" __global__ void drop(const Element* x, i64 n, u32 k0, u32 k1, u32 stream, u32 sample, u32 threshold, bool add,
                                Element* y) {
  i64 block = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (block * 8 >= n) return;
  u32 c[4] = {(u32)block, sample, stream, DROPOUT};
  philox(c, k0, k1);
  for (int i = 0; i < 8 && block * 8 + i < n; i++) {
    i64 at = block * 8 + i;
    bool kept = (c[i / 2] >> i % 2 * 16 & 0xffff) >= threshold;
    if (!add)
      y[at] = kept ? x[at] : 0;
    else if (kept)
      y[at] = narrow(widen(y[at]) + widen(x[at]));
  }
}
