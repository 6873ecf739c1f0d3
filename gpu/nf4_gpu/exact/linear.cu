// What the LoRA layer of the exact tier does around its large products (NF4-15.1).
// Defines: DTYPE, of no effect.
// Sums of terms on grids are exact in any order and with fused multiply-add: the fma here are those of NF4-14.3.
#include "exact/grid.cuh"

#define RANKS 16     // of an adapter that a block takes
#define WARPS 16     // of a block of gradient
#if __CUDA_ARCH__ >= 900
#define EACH 32      // tokens of a warp that are held at a time, in registers
#else
#define EACH 16
#endif
#define TOKENS (WARPS * EACH)
#define ROW_WARPS 8  // of a block that takes a row a warp
#define ROWS 8       // of a block of finish_linear
#define COLUMNS 128
#define GROUPS 4
#define FACTORS 16   // of a row of left, at a time

// Sums [rows, r], a row every ld -> z = factor times the product, and z on the grids of its rows. A warp takes a row.
extern "C" __global__ void low_rank(const double* sums, i64 rows, int r, i64 ld, float factor, int bits, float* z,
                                    double* gridded, int* status) {
  i64 row = (i64)blockIdx.x * ROW_WARPS + threadIdx.x / 32;
  int lane = threadIdx.x % 32;
  if (row >= rows) return;
  u32 top = 0;
  for (int i = lane; i < r; i += 32) {
    float value = finished(sums[row * ld + i]) * factor;
    z[row * r + i] = value;
    top = max(top, magnitude(value));
  }
  for (int lanes = 16; lanes; lanes /= 2) top = max(top, __shfl_xor_sync(~0u, top, lanes));
  double big = magic(checked(top, status), bits);
  for (int i = lane; i < r; i += 32) gridded[row * r + i] = on_grid(z[row * r + i], big);
}

// B [n, r] -> its rows on their grids, as columns: out [r, n]. A warp takes a row. DTYPE is that of B.
extern "C" __global__ void transposed(const Element* b, int n, int r, int bits, double* out, int* status) {
  int row = blockIdx.x * ROW_WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= n) return;
  u32 top = 0;
  for (int i = lane; i < r; i += 32) top = max(top, magnitude(widen(b[(i64)row * r + i])));
  for (int lanes = 16; lanes; lanes /= 2) top = max(top, __shfl_xor_sync(~0u, top, lanes));
  double big = magic(checked(top, status), bits);
  for (int i = lane; i < r; i += 32) out[(i64)i * n + row] = on_grid(widen(b[(i64)row * r + i]), big);
}

// y [rows, n] = the product of which these are the sums, + bias, + the product of left [rows, r] and right [r, n], both on
// their grids; add: added to y. bias and left may be null; sums too, for the low-rank product alone. A block takes GROUPS
// times ROWS rows and COLUMNS columns.
extern "C" __global__ void __launch_bounds__(COLUMNS)
    finish_linear(const double* __restrict__ sums, i64 rows, int n, i64 ld, const float* __restrict__ bias,
                  const double* __restrict__ left, const double* __restrict__ right, int r, bool add,
                  float* __restrict__ y) {
  __shared__ __align__(16) double tile[ROWS][FACTORS];
  int column = blockIdx.x * COLUMNS + threadIdx.x;
  bool there = column < n;
  float own = there && bias ? bias[column] : 0.f;
  i64 first = (i64)blockIdx.y * (GROUPS * ROWS);
  for (int group = 0; group < GROUPS && first < rows; group++, first += ROWS) {
    double high[ROWS], low[ROWS] = {};
#pragma unroll
    for (int i = 0; i < ROWS; i++)
      high[i] = there && first + i < rows && sums ? __ldcs(sums + (first + i) * ld + column) : 0;
    for (int k0 = 0; left && k0 < r; k0 += FACTORS) {
      __syncthreads();
      for (int i = threadIdx.x; i < ROWS * FACTORS; i += COLUMNS) {
        int row = i / FACTORS, k = i % FACTORS;
        tile[row][k] = k0 + k < r && first + row < rows ? left[(first + row) * r + k0 + k] : 0;
      }
      __syncthreads();
      if (there)
#pragma unroll 4
        for (int k = 0; k < min(FACTORS, r - k0); k += 2) {  // two at once: of an odd number the last meets a zero
          double one = right[(i64)(k0 + k) * n + column];
          double two = k0 + k + 1 < r ? right[(i64)(k0 + k + 1) * n + column] : 0;
#pragma unroll
          for (int i = 0; i < ROWS; i++) {
            double2 pair = *(const double2*)&tile[i][k];
            low[i] = __fma_rn(pair.y, two, __fma_rn(pair.x, one, low[i]));
          }
        }
    }
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
      float value = finished(low[i]);
      if (sums) {
        float product = finished(high[i]);
        if (bias) product = product + own;
        value = left ? product + value : product;
      }
      float* to = y + (first + i) * n + column;
      if (there && first + i < rows) *to = add ? *to + value : value;
    }
  }
}

__device__ __forceinline__ int bits_of(int k) { return min(24, (53 - (k > 1 ? 32 - __clz(k - 1) : 0)) / 2); }

// For each sequence, of at most PIECE rows: out[i, j] = the sum over its rows of left [T, r] column i times right [T, c]
// column j, each column on its grid. Its elements lie by_left and by_right apart, sequences `next`. A block takes RANKS of
// the columns of left and 32 of right, a warp every WARPS-th token.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
    gradient(const float* __restrict__ left, const float* __restrict__ right, const int* __restrict__ starts, int r, int c,
             float* __restrict__ out, i64 next, i64 by_left, i64 by_right, int* status) {
  extern __shared__ __align__(16) double memory[];  // [TOKENS][RANKS] of left, then the warps' sums
  __shared__ u32 tops[WARPS * 32];
  __shared__ double bigs[RANKS];
  int start = starts[blockIdx.z], n = starts[blockIdx.z + 1] - start, bits = bits_of(n);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane, rank0 = blockIdx.y * RANKS;
  int rank = rank0 + threadIdx.x % RANKS;
  bool there = column < c;
  left += (i64)start * r;
  right += (i64)start * c + column;

  float x[EACH];
  auto load = [&](int first) {  // of the tokens from first on
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      int t = first + i * WARPS + warp;
      x[i] = there && t < n ? right[(i64)t * c] : 0.f;
    }
  };
  u32 top = 0, own = 0;
  for (int first = (n - 1) / TOKENS * TOKENS; first >= 0; first -= TOKENS) {
    load(first);  // the last time those that come first
#pragma unroll
    for (int i = 0; i < EACH; i++) own = max(own, magnitude(x[i]));
  }
  if (rank < r)
#pragma unroll 8
    for (int t = threadIdx.x / RANKS; t < n; t += WARPS * 32 / RANKS) top = max(top, magnitude(left[(i64)t * r + rank]));
  tops[threadIdx.x] = top;
  __syncthreads();
  if (threadIdx.x < RANKS) {
    for (int i = threadIdx.x; i < WARPS * 32; i += RANKS) top = max(top, tops[i]);
    bigs[threadIdx.x] = magic(checked(top, status), bits);
  }
  __syncthreads();
  tops[threadIdx.x] = own;
  __syncthreads();
  for (int i = 0; i < WARPS; i++) own = max(own, tops[i * 32 + lane]);
  double big = magic(checked(own, status), bits), sum[RANKS] = {};

  for (int first = 0; first < n; first += TOKENS) {
    if (first) load(first);
    __syncthreads();
#pragma unroll 8
    for (int i = threadIdx.x; i < min(TOKENS, n - first) * RANKS; i += WARPS * 32) {
      int k = rank0 + i % RANKS;
      memory[i] = k < r ? on_grid(left[(i64)(first + i / RANKS) * r + k], bigs[i % RANKS]) : 0;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      if (first + i * WARPS + warp >= n) break;
      double wide = on_grid(x[i], big);
      const double2* factors = (const double2*)(memory + (i * WARPS + warp) * RANKS);
#pragma unroll
      for (int k = 0; k < RANKS / 2; k++) {
        double2 pair = factors[k];
        sum[2 * k] = __fma_rn(wide, pair.x, sum[2 * k]);
        sum[2 * k + 1] = __fma_rn(wide, pair.y, sum[2 * k + 1]);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < RANKS; k++) memory[(warp * RANKS + k) * 32 + lane] = sum[k];
  __syncthreads();
  for (int k = warp; k < RANKS; k += WARPS) {
    double all = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) all = __dadd_rn(all, memory[(w * RANKS + k) * 32 + lane]);
    if (there && rank0 + k < r) out[blockIdx.z * next + (rank0 + k) * by_left + column * by_right] = finished(all);
  }
}
