// Operands of products on their grids (NF4-14.2), products from their sums (NF4-14.3), and sums (NF4-14.4).
// Defines: DTYPE, of an operand; LANES, of a row: 32 or 256; VALUES, of a lane.
#include "exact/grid.cuh"

// x [rows, k], a row every ldx -> out [rows, k], a row every ldo: each row on its grid, each piece of PIECE columns by
// itself, with `bits` (the last piece with `last_bits`). A warp, or a block of 256 threads, takes a row.
extern "C" __global__ void rows(const Element* __restrict__ x, i64 rows, int k, i64 ldx, double* __restrict__ out, i64 ldo,
                                int bits, int last_bits, int* status) {
  int lane = threadIdx.x % LANES;
  i64 row = (i64)blockIdx.x * (256 / LANES) + threadIdx.x / LANES;
  if (row >= rows) return;  // with 256 lanes all threads have the same row
  x += row * ldx;
  out += row * ldo;
  for (int first = 0; first < k; first += PIECE) {
    int last = min(first + PIECE, k);
    float v[VALUES];  // LANES * VALUES >= the columns of a piece: all are on their way before the first is looked at
    u32 top = 0;
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
      int at = first + i * LANES + lane;
      v[i] = at < last ? widen(x[at]) : 0.f;
    }
#pragma unroll
    for (int i = 0; i < VALUES; i++) top = max(top, magnitude(v[i]));
#if LANES == 32
    for (int lanes = 16; lanes; lanes /= 2) top = max(top, __shfl_xor_sync(~0u, top, lanes));
#else
    top = block_max(top);
#endif
    double big = magic(checked(top, status), last == k ? last_bits : bits);
#pragma unroll
    for (int i = 0; i < VALUES; i++) {
      int at = first + i * LANES + lane;
      if (at < last) out[at] = on_grid(v[i], big);
    }
  }
}

// x [k, n], a row every ldx -> out [k, n], a row every ldo: each column on its grid, as rows does. A block takes eight
// columns of a piece, blockIdx.z the piece, and blockIdx.y the matrix: these lie `next_x` and `next_out` apart.
extern "C" __global__ void columns(const Element* __restrict__ x, int k, int n, i64 ldx, i64 next_x,
                                   double* __restrict__ out, i64 ldo, i64 next_out, int bits, int last_bits, int* status) {
  __shared__ u32 tops[512];
  int column = blockIdx.x * 8 + threadIdx.x % 8, lane = threadIdx.x / 8;
  int first = blockIdx.z * PIECE, last = min(first + PIECE, k);
  x += blockIdx.y * next_x + column;
  out += blockIdx.y * next_out + column;
  u32 top = 0;
  if (column < n)
#pragma unroll 8
    for (int i = first + lane; i < last; i += 64) top = max(top, magnitude(widen(x[i * ldx])));
  tops[threadIdx.x] = top;
  for (int half = 256; half >= 8; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) tops[threadIdx.x] = max(tops[threadIdx.x], tops[threadIdx.x + half]);
  }
  __syncthreads();
  if (column >= n) return;
  double big = magic(checked(tops[threadIdx.x % 8], status), last == k ? last_bits : bits);
#pragma unroll 8
  for (int i = first + lane; i < last; i += 64) out[i * ldo] = on_grid(widen(x[i * ldx]), big);
}

// Of a product in several pieces, their sums [n] each, `stride` apart: the sum over the first (NF4-14.3).
extern "C" __global__ void combine(double* sums, i64 n, i64 stride, int pieces) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) sums[i] = sum_of_pieces(sums + i, stride, pieces);
}

// y [rows, columns] from the sums of a product, a row every ld; times factor, by RN. A block takes a row.
extern "C" __global__ void finish(const double* sums, i64 columns, i64 ld, float factor, float* y) {
  sums += blockIdx.x * ld;
  y += blockIdx.x * columns;
  for (i64 i = threadIdx.x; i < columns; i += blockDim.x) y[i] = finished(sums[i]) * factor;
}

// The sums of the squares of pieces of PIECE elements: a block a piece. starts [blocks + 1] says where each begins.
extern "C" __global__ void squares(const float* x, const i64* starts, double* sums, int* status) {
  const float* from = x + starts[blockIdx.x];
  int n = (int)(starts[blockIdx.x + 1] - starts[blockIdx.x]);
  double sum = piece_sum([&](int i) { return (double)from[i] * from[i]; }, 0, n, status);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// x += y, by RN.
extern "C" __global__ void add(float* x, const float* y, i64 n) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = x[i] + y[i];
}
