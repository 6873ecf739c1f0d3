// What a layer's products read, written out in bfloat16: weights from their 4-bit codes (NF4-4, NF4-6.4, exact), each with
// the adapters' matrices beside and below it. Defines: DTYPE (BFLOAT16).
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

#define PER_THREAD 2  // vectors of eight

__device__ __forceinline__ void store(Element* p, const float v[8]) {
  *(uint4*)p = make_uint4(narrow_pair(v[0], v[1]), narrow_pair(v[2], v[3]), narrow_pair(v[4], v[5]),
                          narrow_pair(v[6], v[7]));
}

__device__ __forceinline__ float parameter(const Job& job, i64 i) {
  return job.wide ? ((const float*)job.from)[i] : widen(((const Element*)job.from)[i]);
}

// A thread block takes 256 * PER_THREAD vectors of one job. The sixteen values lie across the lanes of a warp, twice.
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
  bool nested = job.kind == WEIGHT && job.map;
  float value = job.kind == WEIGHT ? job.values[threadIdx.x % 16] : 0.f;
  if (nested) {
    map[threadIdx.x] = job.map[threadIdx.x];
    __syncthreads();
  }
  int vectors = job.columns / 8;
  i64 total = (i64)vectors * job.rows, begin = (i64)(blockIdx.x - job.first) * 256 * PER_THREAD;
  int row0 = (int)(begin / vectors), column0 = (int)(begin % vectors);

  if (job.kind == WEIGHT) {
    u32 words[PER_THREAD];
    float absmax[PER_THREAD];
    float offset = nested ? *job.offset : 0.f;
#pragma unroll
    for (int k = 0; k < PER_THREAD; k++) {
      i64 at = begin + k * 256 + threadIdx.x;
      words[k] = 0, absmax[k] = 0.f;
      if (at < total) {
        words[k] = __ldcs((const u32*)job.from + at);
        i64 block = at * 8 >> job.block_shift;
        if (nested)
          absmax[k] = map[__ldg((const u8*)job.absmax + block)] * __ldg(job.nested_absmax + (block >> job.nested_shift)) +
                      offset;
        else
          absmax[k] = __ldg((const float*)job.absmax + block);
      }
    }
#pragma unroll
    for (int k = 0; k < PER_THREAD; k++) {
      float v[8];
      EIGHT v[i] = __shfl_sync(~0u, value, words[k] >> (i * 4 ^ 4)) * absmax[k];  // NF4-4.1; a shuffle reads five bits
      if (begin + k * 256 + threadIdx.x >= total) continue;
      int row = row0, column = column0 + k * 256 + threadIdx.x;
      if (column >= vectors) row += column / vectors, column %= vectors;
      store(job.to + (i64)row * job.pitch + column * 8, v);
    }
    return;
  }
#pragma unroll 1
  for (int k = 0; k < PER_THREAD; k++) {
    if (begin + k * 256 + threadIdx.x >= total) return;
    int column = column0 + k * 256 + threadIdx.x, row = row0 + column / vectors;
    column = column % vectors * 8;
    Element* to = job.to + (i64)row * job.pitch + column;
    if (job.kind == COPY) {
      *(uint4*)to = *(const uint4*)((const Element*)job.from + (i64)row * job.columns + column);
      continue;
    }
    float v[8];
    if (job.kind == ROWS_OF_A)
      EIGHT v[i] = row < job.ranks && column + i < job.width ? parameter(job, (i64)row * job.width + column + i) : 0.f;
    else
      EIGHT {
        int rank = column + i - job.start;
        v[i] = rank >= 0 && rank < job.ranks ? parameter(job, (i64)row * job.ranks + rank) * job.scale : 0.f;
      }
    store(to, v);
  }
}
