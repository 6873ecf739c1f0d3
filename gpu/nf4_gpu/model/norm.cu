// RMS norms over rows of bfloat16, in float32 (arXiv 1910.07467), and their backward.
// Defines: DTYPE (BFLOAT16); WIDTH of a row, a multiple of 8; LANES, the threads of a row, a power of two from 32 on.
// Fused multiply-adds: nothing here is exact.
#include "model/eights.cuh"

#define VECTORS (WIDTH / 8)
#define EACH ((VECTORS + LANES - 1) / LANES)  // vectors of eight that a thread holds
#define ROWS (LANES < 128 ? 128 / LANES : 1)  // of a thread block
#define THREADS (LANES * ROWS)

struct Vector {
  uint4 words;
  __device__ __forceinline__ void load(const Element* p, bool there) {
    words = there ? *(const uint4*)p : make_uint4(0, 0, 0, 0);
  }
  __device__ __forceinline__ float operator[](int i) const {  // i is known when this is compiled
    u32 word = i / 2 == 0 ? words.x : i / 2 == 1 ? words.y : i / 2 == 2 ? words.z : words.w;
    return __uint_as_float(i % 2 ? word & 0xffff0000 : word << 16);
  }
};

// The sum over the lanes of a row, in the same order in each of them.
__device__ __forceinline__ float row_sum(float v) {
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) v += __shfl_xor_sync(~0u, v, lanes);
#if LANES > 32
  __shared__ float sums[THREADS / 32];
  int warp = threadIdx.x / 32, first = warp / (LANES / 32) * (LANES / 32);
  if (threadIdx.x % 32 == 0) sums[warp] = v;
  __syncthreads();
  v = 0.f;
#pragma unroll
  for (int i = 0; i < LANES / 32; i++) v += sums[first + i];
#endif
  return v;
}

// x [.., WIDTH] -> y [rows, WIDTH], rstd [rows] if given. Row i is made of row index[i] of x if there is an index; one of
// -1 becomes zeros.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    rms_norm(const Element* x, i64 x_pitch, const int* index, const float* weight, float eps, i64 rows, Element* y,
             i64 y_pitch, float* rstd) {
  int lane = threadIdx.x % LANES;
  i64 row = (i64)blockIdx.x * ROWS + threadIdx.x / LANES;
  bool there = row < rows;
  i64 from = !there ? -1 : index ? index[row] : row;
  Vector v[EACH];
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < EACH; k++) {
    int c = lane + k * LANES;
    v[k].load(x + from * x_pitch + c * 8, from >= 0 && c < VECTORS);
    EIGHT sum += v[k][i] * v[k][i];
  }
  float r = 1.f / sqrtf(row_sum(sum) / WIDTH + eps);
  if (!there) return;
  if (lane == 0 && rstd) rstd[row] = r;
#pragma unroll
  for (int k = 0; k < EACH; k++) {
    int c = lane + k * LANES;
    if (c >= VECTORS) break;
    float w[8], out[8];
    load_weight(weight + c * 8, w);
    EIGHT out[i] = v[k][i] * r * w[i];
    store(y + row * y_pitch + c * 8, out);
  }
}

// dn, the gradient of rms_norm's y, -> dx = dy + that of x; x and rstd as there. Without an index also y itself again, into
// `normed` if given. With one, dx [index[i]] is written from row i and there is no dy.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    rms_norm_backward(const Element* dn, i64 dn_pitch, const Element* x, i64 x_pitch, const int* index,
                      const float* weight, const float* rstd, i64 rows, const Element* dy, i64 dy_pitch, Element* dx,
                      i64 dx_pitch, Element* normed, i64 normed_pitch) {
  int lane = threadIdx.x % LANES;
  i64 row = (i64)blockIdx.x * ROWS + threadIdx.x / LANES;
  i64 from = row >= rows ? -1 : index ? index[row] : row;
  bool there = from >= 0;
  Vector v[EACH], d[EACH];
  float sum = 0.f;
#pragma unroll
  for (int k = 0; k < EACH; k++) {
    int c = lane + k * LANES;
    bool in = there && c < VECTORS;
    v[k].load(x + from * x_pitch + c * 8, in);
    d[k].load(dn + row * dn_pitch + c * 8, in);
    float w[8] = {};
    if (in) load_weight(weight + c * 8, w);
    EIGHT sum += d[k][i] * w[i] * v[k][i];
  }
  sum = row_sum(sum);
  if (!there) return;
  float r = rstd[row], mean = sum * r * r / WIDTH;
#pragma unroll
  for (int k = 0; k < EACH; k++) {
    int c = lane + k * LANES;
    if (c >= VECTORS) break;
    float w[8], out[8];
    load_weight(weight + c * 8, w);
    if (normed) {
      EIGHT out[i] = v[k][i] * r * w[i];
      store(normed + row * normed_pitch + c * 8, out);
    }
    Vector above;
    above.load(dy + from * dy_pitch + c * 8, dy != nullptr);
    EIGHT out[i] = above[i] + r * (d[k][i] * w[i] - v[k][i] * mean);
    store(dx + from * dx_pitch + c * 8, out);
  }
}
