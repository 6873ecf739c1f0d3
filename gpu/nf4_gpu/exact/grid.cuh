// Numbers on grids, and sums over a thread block that need no order (NF4-14.2 to NF4-14.4).
#pragma once
#include "floats.cuh"

#define PIECE 4096
#define SUM_BITS 41
#define PIECES 256  // of a sum: 2^20 terms

// What rounds a number to a multiple of 2^(e - bits) once it is added and then subtracted: 1.5 * 2^(52 + e - bits) with
// 2^(e - 1) <= top < 2^e. top is 0 or normal: products of two float32 are at least 2^-298.
__device__ __forceinline__ double magic(double top, int bits) {
  int field = __double2hiint(top) >> 20 & 0x7ff;  // e + 1022
  return __hiloint2double((field + 53 - bits) << 20 | 0x80000, 0);
}

__device__ __forceinline__ double on_grid(double x, double magic) { return __dsub_rn(__dadd_rn(x, magic), magic); }

// Magnitudes as integers order like their values; a NaN is above infinity.
__device__ __forceinline__ u32 magnitude(float x) { return __float_as_uint(x) & 0x7fffffff; }
__device__ __forceinline__ u64 magnitude(double x) { return (u64)__double_as_longlong(x) & 0x7fffffffffffffffull; }

// Sets *status where a magnitude is not finite (NF4-14.1); what is then computed means nothing.
__device__ __forceinline__ float checked(u32 top, int* status) {
  if (top >= 0x7f800000) *status = 1;
  return __uint_as_float(top);
}
__device__ __forceinline__ double checked(u64 top, int* status) {
  if (top >= 0x7ff0000000000000ull) *status = 1;
  return __longlong_as_double((i64)top);
}

// RN(S) + 0 of NF4-14.3.
__device__ __forceinline__ float finished(double sum) { return __fadd_rn(__double2float_rn(sum), 0.f); }

// Of several pieces' sums, `stride` apart, the sum by NF4-14.4.
__device__ __forceinline__ double sum_of_pieces(const double* sums, i64 stride, int pieces) {
  if (pieces == 1) return *sums;
  u64 top = 0;
  for (int i = 0; i < pieces; i++) top = max(top, magnitude(sums[i * stride]));
  double big = magic(__longlong_as_double((i64)top), SUM_BITS), sum = 0;
  for (int i = 0; i < pieces; i++) sum = __dadd_rn(sum, on_grid(sums[i * stride], big));
  return sum;
}

// Over the threads of a block, in any order: every thread calls them, and every thread gets the result.
template <class T> __device__ __forceinline__ T block_max(T value) {
  __shared__ T parts[32];
  for (int lanes = 16; lanes; lanes /= 2) value = max(value, __shfl_xor_sync(~0u, value, lanes));
  __syncthreads();  // whoever still reads the last one's parts
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = parts[threadIdx.x % 32 < blockDim.x / 32 ? threadIdx.x % 32 : 0];
  for (int lanes = 16; lanes; lanes /= 2) value = max(value, __shfl_xor_sync(~0u, value, lanes));
  return value;
}

__device__ __forceinline__ double block_sum(double value) {
  __shared__ double parts[32];
  for (int lanes = 16; lanes; lanes /= 2) value = __dadd_rn(value, __shfl_xor_sync(~0u, value, lanes));
  __syncthreads();
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
  __syncthreads();
  value = threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : 0;
  for (int lanes = 16; lanes; lanes /= 2) value = __dadd_rn(value, __shfl_xor_sync(~0u, value, lanes));
  return value;
}

// The sum of term(first) to term(last - 1), at most PIECE, which a whole block makes (NF4-14.4).
template <class Term> __device__ __forceinline__ double piece_sum(Term term, int first, int last, int* status) {
  u64 top = 0;
  for (int i = first + threadIdx.x; i < last; i += blockDim.x) top = max(top, magnitude(term(i)));
  double big = magic(checked(block_max(top), status), SUM_BITS), sum = 0;
  for (int i = first + threadIdx.x; i < last; i += blockDim.x) sum = __dadd_rn(sum, on_grid(term(i), big));
  return block_sum(sum);
}

// The sum of term(0) to term(n - 1), n <= PIECES * PIECE (NF4-14.4).
template <class Term> __device__ __forceinline__ double exact_sum(Term term, int n, int* status) {
  if (n <= PIECE) return piece_sum(term, 0, n, status);
  __shared__ double sums[PIECES];
  int pieces = 0;
  for (int first = 0; first < n; first += PIECE, pieces++) {
    double sum = piece_sum(term, first, min(first + PIECE, n), status);
    if (threadIdx.x == 0) sums[pieces] = sum;
  }
  __syncthreads();
  return sum_of_pieces(sums, 1, pieces);
}
