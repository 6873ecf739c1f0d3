// Dropout by the counter (NF4-11.1, NF4-11.4): the mask is drawn where it is used, and never stored.
// Defines: DTYPE.
#include "philox.cuh"

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
