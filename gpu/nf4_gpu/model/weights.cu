// What a layer's products read, written out in bfloat16: weights from their 4-bit codes (NF4-4, NF4-6.4, exact), each with
// the adapters' matrices beside and below it. Defines: DTYPE (BFLOAT16).
#include "model/eights.cuh"
#include "nested.cuh"

#define WEIGHT 0  // from codes
#define COPY 1    // bfloat16 as it is
#define ROWS_OF_A 2
#define COLUMNS_OF_B 3

// A rectangle [rows, columns] of the buffer, columns a multiple of 8.
struct Job {
  Element* to;
  const void* from;    // codes; bfloat16 [rows, columns]; A [ranks, width]; B [rows, ranks]
  const void* absmax;  // float32; or codes of it, if it is double-quantized
  const float* nested_absmax;
  const float* offset;
  const float* values;  // [16], by code
  const float* map;     // [256], of the codes of absmax; null if it is not double-quantized
  int kind, first;      // the thread block that begins this job
  int pitch, rows, columns;
  int block_shift, nested_shift;
  int ranks, width;  // rows and columns of A that there are, the others are 0
  int start;         // the column of B's first rank, the others are 0
  int wide;          // whether A and B are in float32
  float scale;       // of B
};

#define PER_THREAD 2  // vectors of eight that are on their way at a time
#define TURNS 4
#define VECTORS (256 * PER_THREAD * TURNS)  // of a thread block

__device__ __forceinline__ float parameter(const Job& job, i64 i) {
  return job.wide ? ((const float*)job.from)[i] : widen(((const Element*)job.from)[i]);
}

// Where the vector `ahead` of one is, in vectors; few rows lie between.
struct Place {
  u32 row, column;
  __device__ __forceinline__ Place(u32 at, u32 vectors) : row(at / vectors), column(at % vectors) {}
  __device__ __forceinline__ void advance(u32 by, u32 vectors) {
    column += by;
    if (column >= vectors) {
      if (column < 2 * vectors) column -= vectors, row++;
      else row += column / vectors, column %= vectors;
    }
  }
};

// The sixteen values lie across the lanes of a warp, twice.
template <bool NESTED>
__device__ __forceinline__ void write_weight(const Job& job, const float* map, u32 begin) {
  float value = __ldg(job.values + threadIdx.x % 16), offset = NESTED ? __ldg(job.offset) : 0.f;
  const u32* codes = (const u32*)job.from;
  const void* scales = job.absmax;
  const float* nested = job.nested_absmax;
  Element* to = job.to;
  u32 vectors = job.columns / 8, total = vectors * job.rows, pitch = job.pitch;
  int shift = job.block_shift - 3, nested_shift = job.nested_shift;
  u32 at = begin + threadIdx.x;
  Place place(at, vectors);
#pragma unroll 1
  for (int turn = 0; turn < TURNS && begin + turn * 256 * PER_THREAD < total; turn++) {
    u32 words[PER_THREAD];
    float absmax[PER_THREAD];
#pragma unroll
    for (int k = 0; k < PER_THREAD; k++) {
      u32 here = at + k * 256;
      words[k] = 0, absmax[k] = 0.f;
      if (here < total) {
        words[k] = __ldcs(codes + here);
        u32 block = here >> shift;
        absmax[k] = NESTED ? map[__ldg((const u8*)scales + block)] * __ldg(nested + (block >> nested_shift)) + offset
                           : __ldg((const float*)scales + block);
      }
    }
#pragma unroll
    for (int k = 0; k < PER_THREAD; k++) {
      float v[8];
      EIGHT v[i] = __shfl_sync(~0u, value, words[k] >> (i * 4 ^ 4)) * absmax[k];  // NF4-4.1; a shuffle reads five bits
      if (at < total) store(to + place.row * pitch + place.column * 8, v);
      at += 256;
      place.advance(256, vectors);
    }
  }
}

// A thread block takes VECTORS vectors of eight of one job.
extern "C" __global__ void __launch_bounds__(256) write_weights(const Job* jobs, int count) {
  __shared__ Job job;
  __shared__ float map[256];
  if (threadIdx.x < 32) {
    // The last job that begins at or before this thread block.
    int number = -1;
    for (int i = threadIdx.x; i < count; i += 32)
      if (jobs[i].first <= (int)blockIdx.x) number = i;
#pragma unroll
    for (int lanes = 16; lanes; lanes /= 2) number = max(number, __shfl_xor_sync(~0u, number, lanes));
    const u32* from = (const u32*)(jobs + number);
    for (int i = threadIdx.x; i < (int)sizeof(Job) / 4; i += 32) ((u32*)&job)[i] = from[i];
  }
  __syncthreads();
  u32 begin = (blockIdx.x - job.first) * VECTORS;
  if (job.kind == WEIGHT) {
    if (job.map) {
      map[threadIdx.x] = job.map[threadIdx.x];
      __syncthreads();
      write_weight<true>(job, map, begin);
    } else
      write_weight<false>(job, map, begin);
    return;
  }
  u32 vectors = job.columns / 8, total = vectors * job.rows;
#pragma unroll 1
  for (int k = 0; k < PER_THREAD * TURNS; k++) {
    u32 at = begin + k * 256 + threadIdx.x;
    if (at >= total) return;
    Place place(at, vectors);
    int column = place.column * 8;
    Element* to = job.to + place.row * (u32)job.pitch + column;
    if (job.kind == COPY) {
      *(uint4*)to = *(const uint4*)((const Element*)job.from + place.row * (i64)job.columns + column);
      continue;
    }
    float v[8];
    if (job.kind == ROWS_OF_A)
      EIGHT v[i] = place.row < job.ranks && column + i < job.width
                       ? parameter(job, place.row * (i64)job.width + column + i)
                       : 0.f;
    else
      EIGHT {
        int rank = column + i - job.start;
        v[i] = rank >= 0 && rank < job.ranks ? parameter(job, place.row * (i64)job.ranks + rank) * job.scale : 0.f;
      }
    store(to, v);
  }
}
