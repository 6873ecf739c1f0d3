// Narrow products of what a kernel has in registers: eight columns, from 8 q on of 32, of tokens g and g + 8 in lane 4 g + q.
// The depth is taken in the order that this gives: of a lane's columns the first four, and in the next product the others.
#pragma once
#include "model/eights.cuh"

// Factors of 32 columns for project_columns, from a [N, ..], of which the lane's eight columns begin at `column`.
template <int N>
__device__ __forceinline__ void load_along(u32 (&factors)[2][N / 8][2], const Element* a, i64 pitch, int column, bool there) {
#pragma unroll
  for (int n = 0; n < N / 8; n++) {
    uint4 row = there ? *(const uint4*)(a + (n * 8 + threadIdx.x % 32 / 4) * pitch + column) : make_uint4(0, 0, 0, 0);
    factors[0][n][0] = row.x, factors[0][n][1] = row.y, factors[1][n][0] = row.z, factors[1][n][1] = row.w;
  }
}

// The same from b [rows, N]: its rows from first on, 32 of them.
template <int N>
__device__ __forceinline__ void load_across(u32 (&factors)[2][N / 8][2], const Element* b, i64 pitch, int first, int rows) {
  int g = threadIdx.x % 32 / 4;
#pragma unroll
  for (int s = 0; s < 2; s++)
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
      int row = first + g / 2 * 8 + s * 4 + pair * 2 + g % 2;
      const Element* from = b + row * pitch + threadIdx.x % 4 * 2;
#pragma unroll
      for (int n = 0; n < N / 8; n++) factors[s][n][pair] = transpose_pairs(row < rows ? *(const u32*)(from + n * 8) : 0);
    }
}

// d [16, N] += rows [16, 32] times factors [32, N].
template <int N>
__device__ __forceinline__ void project_columns(float (*d)[4], const u32 (&rows)[2][4], const u32 (&factors)[2][N / 8][2]) {
#pragma unroll
  for (int s = 0; s < 2; s++) {
    u32 a[4] = {rows[0][2 * s], rows[1][2 * s], rows[0][2 * s + 1], rows[1][2 * s + 1]};
#pragma unroll
    for (int n = 0; n < N / 8; n++) multiply_add(d[n], a, factors[s][n][0], factors[s][n][1]);
  }
}
