// Attention of the exact tier (NF4-15.2): the scores of a sequence's heads as matrices, a row for each query.
// Defines: DTYPE, of no effect; LANES, 32 or 256, and VALUES: a row has at most LANES * VALUES keys, and PIECE of them.
#include "exact/elementary.cuh"
#include "exact/grid.cuh"

// Where the row of `gathered`, of [sequences * groups, group * n] rows, is among those of heads [T, groups, group].
__device__ __forceinline__ i64 row_of_heads(i64 gathered, int n, int groups, int group) {
  int row = (int)(gathered % n), head = (int)(gathered / n % group);
  i64 batch = gathered / n / group;
  return ((batch / groups * n + row) * groups + batch % groups) * group + head;
}

// Rows of heads [T, groups * group * d] of sequences of n rows -> [sequences * groups, group * n, d], head after head. A
// warp takes a row.
extern "C" __global__ void gather(const float* __restrict__ x, int n, int groups, int group, int d, i64 rows,
                                  float* __restrict__ out) {
  i64 row = (i64)blockIdx.x * 8 + threadIdx.x / 32;
  if (row >= rows) return;
  x += row_of_heads(row, n, groups, group) * d;
  for (int c = threadIdx.x % 32; c < d; c += 32) out[row * d + c] = x[c];
}

// The way back, from the sums of a product.
extern "C" __global__ void scatter(const double* __restrict__ sums, int n, int groups, int group, int d, i64 rows,
                                   float* __restrict__ out) {
  i64 row = (i64)blockIdx.x * 8 + threadIdx.x / 32;
  if (row >= rows) return;
  out += row_of_heads(row, n, groups, group) * d;
  for (int c = threadIdx.x % 32; c < d; c += 32) out[c] = finished(sums[row * d + c]);
}

#if LANES == 32
template <class T> __device__ __forceinline__ T row_max(T value) {
  for (int lanes = 16; lanes; lanes /= 2) value = max(value, __shfl_xor_sync(~0u, value, lanes));
  return value;
}
__device__ __forceinline__ double row_sum(double value) {
  for (int lanes = 16; lanes; lanes /= 2) value = __dadd_rn(value, __shfl_xor_sync(~0u, value, lanes));
  return value;
}
#else
#define row_max block_max
#define row_sum block_sum
#endif

#define EACH _Pragma("unroll") for (int j = 0; j < VALUES; j++)

// Puts a row on its grid, into out.
__device__ __forceinline__ void store_row(const float v[VALUES], double* out, int lane, int n, int bits, int* status) {
  u32 top = 0;
  EACH top = max(top, magnitude(v[j]));
  double big = magic(checked(row_max(top), status), bits);
  EACH if (j * LANES + lane < n) out[j * LANES + lane] = on_grid(v[j], big);
}

// Sums of queries and keys [rows, n], n rows a head -> the probabilities p, and over the sums p on the grids of its rows.
extern "C" __global__ void probabilities(double* sums, i64 rows, int n, int window, float factor, int bits, float* p,
                                         int* status) {
  int lane = threadIdx.x % LANES;
  i64 row = (i64)blockIdx.x * (256 / LANES) + threadIdx.x / LANES;
  if (row >= rows) return;
  int query = (int)(row % n);
  sums += row * n;
  p += row * n;
  float v[VALUES], top = __uint_as_float(0xff800000);
  EACH {
    int key = j * LANES + lane;
    v[j] = key <= query && key > query - window ? finished(sums[key]) * factor : __uint_as_float(0xff800000);
    top = fmaxf(top, v[j]);  // no NaN: sums of finite numbers
  }
  u32 order = __float_as_uint(top);
  order = row_max(order >> 31 ? ~order : order | 0x80000000u);
  top = __uint_as_float(order >> 31 ? order & 0x7fffffff : ~order);
  checked(magnitude(top), status);
  double big = magic(1., SUM_BITS), sum = 0;  // the greatest power is exp(0)
  EACH {
    v[j] = exact_exp(v[j] - top);
    sum = __dadd_rn(sum, on_grid(v[j], big));
  }
  float norm = __double2float_rn(row_sum(sum));
  EACH {
    v[j] = v[j] / norm;
    if (j * LANES + lane < n) p[j * LANES + lane] = v[j];
  }
  store_row(v, sums, lane, n, bits, status);
}

// Sums [rows, n] of the gradient of p -> that of the scores times factor in e, and over the sums e on its rows' grids.
extern "C" __global__ void scores_backward(double* sums, const float* p, i64 rows, int n, int window, float factor, int bits,
                                           float* e, int* status) {
  int lane = threadIdx.x % LANES;
  i64 row = (i64)blockIdx.x * (256 / LANES) + threadIdx.x / LANES;
  if (row >= rows) return;
  int query = (int)(row % n);
  sums += row * n;
  p += row * n;
  e += row * n;
  float v[VALUES], own[VALUES];
  u64 top = 0;
  EACH {
    int key = j * LANES + lane;
    bool seen = key <= query && key > query - window;  // elsewhere p is 0
    v[j] = seen ? finished(sums[key]) : 0.f;
    own[j] = seen ? p[key] : 0.f;
    top = max(top, magnitude((double)own[j] * v[j]));
  }
  double big = magic(checked(row_max(top), status), SUM_BITS), sum = 0;
  EACH sum = __dadd_rn(sum, on_grid((double)own[j] * v[j], big));
  float c = __double2float_rn(row_sum(sum));
  EACH {
    v[j] = own[j] * (v[j] - c) * factor;
    if (j * LANES + lane < n) e[j * LANES + lane] = v[j];
  }
  store_row(v, sums, lane, n, bits, status);
}

// Scores [rows, n] as floats: -infinity where a key is hidden. For rows longer than a piece.
extern "C" __global__ void hide(float* z, i64 size, int n, int window) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= size) return;
  int key = (int)(i % n), query = (int)(i / n % n);
  if (key > query || key <= query - window) z[i] = __uint_as_float(0xff800000);
}
