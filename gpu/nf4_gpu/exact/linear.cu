// What the LoRA layer of the exact tier does around its large products (NF4-15.1).
// Defines: DTYPE, of no effect.
// Sums of terms on grids are exact in any order and with fused multiply-add: the fma here are those of NF4-14.3.
#include "exact/grid.cuh"

#define RANKS 16    // of an adapter that a block takes
#define TOKENS 64   // of a sequence, at a time
#define WARPS 8
#define ROWS 4  // of a thread of finish_linear

// Sums [rows, r], a row every ld -> z = factor times the product, and z on the grids of its rows. A warp takes a row.
extern "C" __global__ void low_rank(const double* sums, i64 rows, int r, i64 ld, i64 stride, int pieces, float factor, int bits,
                                    float* z, double* gridded, int* status) {
  i64 row = (i64)blockIdx.x * WARPS + threadIdx.x / 32;
  int lane = threadIdx.x % 32;
  if (row >= rows) return;
  u32 top = 0;
  for (int i = lane; i < r; i += 32) {
    float value = finished(sum_of_pieces(sums + row * ld + i, stride, pieces)) * factor;
    z[row * r + i] = value;
    top = max(top, magnitude(value));
  }
  for (int lanes = 16; lanes; lanes /= 2) top = max(top, __shfl_xor_sync(~0u, top, lanes));
  double big = magic(checked(top, status), bits);
  for (int i = lane; i < r; i += 32) gridded[row * r + i] = on_grid(z[row * r + i], big);
}

// B [n, r] -> its rows on their grids, as columns: out [r, n]. A warp takes a row. DTYPE is that of B.
extern "C" __global__ void transposed(const Element* b, int n, int r, int bits, double* out, int* status) {
  int row = blockIdx.x * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= n) return;
  u32 top = 0;
  for (int i = lane; i < r; i += 32) top = max(top, magnitude(widen(b[(i64)row * r + i])));
  for (int lanes = 16; lanes; lanes /= 2) top = max(top, __shfl_xor_sync(~0u, top, lanes));
  double big = magic(checked(top, status), bits);
  for (int i = lane; i < r; i += 32) out[(i64)i * n + row] = on_grid(widen(b[(i64)row * r + i]), big);
}

// y [rows, n] = the product of which these are the sums, + bias, + the product of left [rows, r] and right [r, n], both on
// their grids; add: added to y. bias and left may be null; sums too, for the low-rank product alone.
extern "C" __global__ void finish_linear(const double* sums, i64 rows, int n, i64 ld, i64 stride, int pieces, const float* bias,
                                         const double* left, const double* right, int r, bool add, float* y) {
  int column = blockIdx.x * blockDim.x + threadIdx.x;
  i64 first = (i64)blockIdx.y * ROWS;
  if (column >= n) return;
  double low[ROWS] = {};
  if (left)
    for (int k = 0; k < r; k++) {
      double factor = right[(i64)k * n + column];
#pragma unroll
      for (int i = 0; i < ROWS; i++)
        if (first + i < rows) low[i] = __fma_rn(left[(first + i) * r + k], factor, low[i]);
    }
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
    i64 row = first + i;
    if (row >= rows) return;
    float value;
    if (sums) {
      value = finished(sum_of_pieces(sums + row * ld + column, stride, pieces));
      if (bias) value = value + bias[column];
      if (left) value = value + finished(low[i]);
    } else
      value = finished(low[i]);
    float* to = y + row * n + column;
    *to = add ? *to + value : value;
  }
}

__device__ __forceinline__ int bits_of(int k) { return min(24, (53 - (k > 1 ? 32 - __clz(k - 1) : 0)) / 2); }

// For each sequence, of at most PIECE rows: out[i, j] = the sum over its rows of left [T, r] column i times right [T, c]
// column j, each column on its grid. Its elements lie by_left and by_right apart, sequences `next`. A block takes RANKS of
// the columns of left and 32 of right, a warp every WARPS-th token.
extern "C" __global__ void gradient(const float* left, const float* right, const int* starts, int r, int c, float* out,
                                    i64 next, i64 by_left, i64 by_right, int* status) {
  __shared__ double lefts[TOKENS][RANKS];
  __shared__ double sums[WARPS][32][RANKS + 1];
  __shared__ u32 tops[WARPS * 32];
  __shared__ double bigs[RANKS];
  int start = starts[blockIdx.z], n = starts[blockIdx.z + 1] - start, bits = bits_of(n);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane, rank0 = blockIdx.y * RANKS;
  left += (i64)start * r;
  right += (i64)start * c;

  u32 top = 0;
  int rank = rank0 + threadIdx.x % RANKS;
  if (rank < r)
    for (int t = threadIdx.x / RANKS; t < n; t += WARPS * 32 / RANKS) top = max(top, magnitude(left[(i64)t * r + rank]));
  tops[threadIdx.x] = top;
  __syncthreads();
  if (threadIdx.x < RANKS) {
    for (int i = threadIdx.x; i < WARPS * 32; i += RANKS) top = max(top, tops[i]);
    bigs[threadIdx.x] = magic(checked(top, status), bits);
  }
  __syncthreads();
  top = 0;
  if (column < c)
    for (int t = warp; t < n; t += WARPS) top = max(top, magnitude(right[(i64)t * c + column]));
  tops[threadIdx.x] = top;
  __syncthreads();
  for (int i = 0; i < WARPS; i++) top = max(top, tops[i * 32 + lane]);
  double big = magic(checked(top, status), bits), sum[RANKS] = {};

  for (int first = 0; first < n; first += TOKENS) {
    for (int i = threadIdx.x; i < TOKENS * RANKS; i += WARPS * 32) {
      int t = first + i / RANKS, k = rank0 + i % RANKS;
      lefts[i / RANKS][i % RANKS] = t < n && k < r ? on_grid(left[(i64)t * r + k], bigs[i % RANKS]) : 0;
    }
    __syncthreads();
    if (column < c)
      for (int t = warp; t < min(TOKENS, n - first); t += WARPS) {
        double x = on_grid(right[(i64)(first + t) * c + column], big);
#pragma unroll
        for (int i = 0; i < RANKS; i++) sum[i] = __fma_rn(x, lefts[t][i], sum[i]);
      }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < RANKS; i++) sums[warp][lane][i] = sum[i];
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * RANKS; i += WARPS * 32) {
    // Neighbours in the result are neighbours here: of right where those are its columns, else of left.
    int j = by_right == 1 ? i % 32 : i / RANKS, k = by_right == 1 ? i / 32 : i % RANKS;
    if (blockIdx.x * 32 + j >= c || rank0 + k >= r) continue;
    double all = 0;
    for (int w = 0; w < WARPS; w++) all = __dadd_rn(all, sums[w][j][k]);
    out[blockIdx.z * next + (rank0 + k) * by_left + (blockIdx.x * 32 + j) * by_right] = finished(all);
  }
}
