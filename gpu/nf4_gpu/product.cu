// y = x W^T for up to 64 rows of x and a quantized W that is never written out (NF4-4.3).
// Defines: DTYPE (FLOAT16 or BFLOAT16), that of x and y; BLOCK; TILES (1, 2, 4 or 8), of eight rows of x each; BUFFERS, if
// shared memory is short.
//
// The tensor cores take 16 rows of W by 16 columns at a time. Which columns those are is free, as long as x is read
// alike: so a lane reads neighbouring bytes of a row of W, and turns each byte into two factors by one look-up in a copy
// of the table that lies in its own bank. The factors are the codebook's values rounded to DTYPE; the sums of a block, in
// float32, are multiplied by its absmax. Needs sm_80.
#include "nested.cuh"

#define WARPS 8
#define MT (TILES > 2 ? 2 : 1)            // sixteens of rows of W a warp takes: what is read of x serves both
#define ROWS (16 * MT * WARPS)            // of W, in a thread block
#define CHUNK (BLOCK < 64 ? BLOCK : 64)   // columns that share a scale
#define WORDS (CHUNK / 32)                // of eight codes: what a lane reads of a chunk of a row
#define STAGE 256                         // columns that one turn of the loop covers
#ifndef BUFFERS
#define BUFFERS (TILES > 4 ? 2 : 3)       // stages on their way or in use
#endif
#define CHUNKS (STAGE / CHUNK)
#define SCALES (2 * MT * CHUNKS / 4)      // a lane's part of the scales of its quad's rows in a stage
#define PITCH (STAGE + 8)                 // elements between rows of x in shared memory, so that no bank is met twice
#define X_STAGE (8 * TILES * PITCH)       // elements
#define UNITS (STAGE / 32)                // of 16 bytes: a row of W in a stage
#define UNIT_COPIES (16 * MT * UNITS / 32)     // of a unit, by each lane, a stage
#define CODE_STAGE (ROWS * UNITS * 16)    // bytes

#if __CUDA_ARCH__ < 1000
#define FEW_REGISTERS 0
#else
#define FEW_REGISTERS 1  // the compiler keeps more in flight there, and would spill
#endif

constexpr int TOGETHER = TILES > 1 || FEW_REGISTERS ? 2 : CHUNKS;  // chunks that are unrolled side by side
constexpr int COPIES_TOGETHER = TILES > 4 && FEW_REGISTERS ? 1 : UNIT_COPIES;

__device__ __forceinline__ void multiply_add(float d[4], const u32 a[4], u32 b0, u32 b1) {
#if DTYPE == FLOAT16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((u32)__cvta_generic_to_shared(shared)), "l"(global));
}

// Where a unit of a row of a warp's codes lies: rows that are read together lie in different banks.
__device__ __forceinline__ int swizzle(int row, int unit) { return row * UNITS + (unit ^ (row & 3) * 2); }

// x [rows, columns], codes of W [outputs, columns] -> y [rows, outputs]. A thread block takes ROWS rows of W, and the
// columns of its split (blockIdx.y) of gridDim.y. The last of the splits to end adds up what all of them left in
// partial [ceil(outputs / ROWS), splits, rows, ROWS], in order; counters [ceil(outputs / ROWS)] are 0 before and after.
template <class Absmax>
__device__ __forceinline__ void product(const Element* x, int rows, int columns, const u8* codes, int outputs,
                                        const float* values, Element* y, float* partial, u32* counters,
                                        Absmax absmax) {
  extern __shared__ __align__(128) u8 memory[];
  // A byte's two factors, the first in the low half: [256][32], a copy in each bank.
  u32* table = (u32*)memory;
  u8* code_stages = memory + 256 * 32 * 4;
  Element* x_stages = (Element*)(code_stages + BUFFERS * CODE_STAGE);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4, group = lane / 4;
  int stages = (columns + STAGE - 1) / STAGE, splits = gridDim.y;
  int first = (int)((i64)stages * blockIdx.y / splits), last = (int)((i64)stages * (blockIdx.y + 1) / splits);
  int row0 = blockIdx.x * ROWS + warp * 16 * MT;  // of W, the warp's first

  auto row_of_unit = [&](int i) {
    return codes + (i64)min(row0 + (i * 32 + lane) / UNITS, outputs - 1) * columns / 2 + lane % UNITS * 16;
  };
  const u8* from[UNIT_COPIES];
#pragma unroll
  for (int i = 0; i < UNIT_COPIES; i++) from[i] = row_of_unit(i);
  auto load = [&](int stage) {  // asynchronously, into its buffer: x's columns by all, W's rows by their warp
    int column = stage * STAGE;
    u8* to = code_stages + stage % BUFFERS * CODE_STAGE + warp * (16 * MT * UNITS * 16);
#pragma unroll COPIES_TOGETHER
    for (int i = 0; i < UNIT_COPIES; i++)
      if (column + lane % UNITS * 32 < columns)
        copy_async(to + swizzle((i * 32 + lane) / UNITS, lane % UNITS) * 16,
                   (COPIES_TOGETHER > 1 ? from[i] : row_of_unit(i)) + column / 2);
    Element* to_x = x_stages + stage % BUFFERS * X_STAGE;
    for (int i = threadIdx.x; i < rows * (STAGE / 8); i += WARPS * 32) {
      int r = i / (STAGE / 8), c = i % (STAGE / 8) * 8;
      if (column + c < columns) copy_async(to_x + r * PITCH + c, x + (i64)r * columns + column + c);
    }
  };
  // The scales of a quad's rows in a stage lie in its four lanes: scale number m * CHUNKS + c in lane number % 4.
  i64 starts[SCALES];
  typename Absmax::Raw next[SCALES];
#pragma unroll
  for (int i = 0; i < SCALES; i++) starts[i] = (i64)min(row0 + (i * 4 + quad) / CHUNKS * 8 + group, outputs - 1) * columns;
  auto load_scales = [&](int stage) {
#pragma unroll
    for (int i = 0; i < SCALES; i++)
      next[i] = absmax.load((starts[i] + min(stage * STAGE + (i * 4 + quad) % CHUNKS * CHUNK, columns - CHUNK)) / BLOCK);
  };

#pragma unroll
  for (int i = 0; i < BUFFERS - 1; i++) {
    if (first + i < last) load(first + i);
    asm volatile("cp.async.commit_group;");
  }
  load_scales(first);
  float value = values[lane % 16];
#pragma unroll 8
  for (int byte = warp; byte < 256; byte += WARPS)
    table[byte * 32 + lane] = narrow_pair(__shfl_sync(~0u, value, byte >> 4), __shfl_sync(~0u, value, byte & 15));

  float sum[MT][TILES][4] = {};
  float scale[SCALES];
  const Element* xs;
  const u8* cs;
  auto multiply_chunk = [&](int c) {
    u32 a[MT][WORDS * 2][4];  // the factors of a chunk: two steps of the tensor cores a word
#pragma unroll
    for (int m = 0; m < 2 * MT; m++) {
      int at = c * (CHUNK / 2) + quad * (CHUNK / 8);  // bytes into the row
      const u8* word = cs + swizzle(m * 8 + group, at / 16) * 16 + at % 16;
      u32 words[WORDS];
#if WORDS == 2
      uint2 pair = *(const uint2*)word;
      words[0] = pair.x, words[1] = pair.y;
#else
      words[0] = *(const u32*)word;
#endif
#pragma unroll
      for (int byte = 0; byte < WORDS * 4; byte++) {
        int shift = byte % 4 * 8 - 7;  // to 128 times the byte, where its row of the table begins
        u32 row = (shift < 0 ? words[byte / 4] << -shift : words[byte / 4] >> shift) & 0x7f80;
        a[m / 2][byte / 2][m % 2 + byte % 2 * 2] = *(const u32*)((const u8*)table + (row | lane * 4));
      }
    }
    float s[2 * MT];
#pragma unroll
    for (int m = 0; m < 2 * MT; m++)
      s[m] = __shfl_sync(~0u, c < 4 ? scale[m * (CHUNKS / 4)] : scale[m * (CHUNKS / 4) + CHUNKS / 4 - 1], c % 4, 4);
#pragma unroll
    for (int t = 0; t < TILES; t++) {
      float part[MT][4] = {};
#pragma unroll
      for (int word = 0; word < WORDS; word++) {
        uint4 b = *(const uint4*)(xs + t * 8 * PITCH + c * CHUNK + word * 8);
#pragma unroll
        for (int m = 0; m < MT; m++) {
          multiply_add(part[m], a[m][2 * word], b.x, b.y);
          multiply_add(part[m], a[m][2 * word + 1], b.z, b.w);
        }
      }
#pragma unroll
      for (int m = 0; m < MT; m++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[m][t][i] = __fmaf_rn(part[m][i], s[2 * m + i / 2], sum[m][t][i]);
    }
  };

  for (int stage = first; stage < last; stage++) {
    asm volatile("cp.async.wait_group %0;" ::"n"(BUFFERS - 2));
    __syncthreads();  // this stage is here, and nobody reads the buffer that is filled next
#pragma unroll
    for (int i = 0; i < SCALES; i++) scale[i] = absmax.decode(next[i]);
    if (stage + 1 < last) load_scales(stage + 1);
    if (stage + BUFFERS - 1 < last) load(stage + BUFFERS - 1);
    asm volatile("cp.async.commit_group;");
    // Rows that x hasn't only reach sums that are not kept; with one tile they read x's first, which costs no more.
    xs = x_stages + stage % BUFFERS * X_STAGE + (TILES > 1 || group < rows ? group : 0) * PITCH + quad * (CHUNK / 4);
    cs = code_stages + stage % BUFFERS * CODE_STAGE + warp * (16 * MT * UNITS * 16);
    if (TILES <= 2 && (stage + 1) * STAGE <= columns) {
#pragma unroll TOGETHER
      for (int c = 0; c < CHUNKS; c++) multiply_chunk(c);  // side by side: alone, they wait for one another's sums
    } else {
#pragma unroll 1
      for (int c = 0; c < CHUNKS && stage * STAGE + c * CHUNK < columns; c++) multiply_chunk(c);
    }
  }

  // A lane holds, of each sixteen rows of W, `group` and `group` + 8, by x's rows 2 `quad` and 2 `quad` + 1 of a tile.
  float* mine = partial + ((i64)blockIdx.x * splits + blockIdx.y) * rows * ROWS;
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int r = t * 8 + quad * 2 + i % 2, output = (warp * MT + m) * 16 + group + i / 2 * 8;
        if (r < rows) mine[r * ROWS + output] = sum[m][t][i];
      }
  __shared__ bool ours;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) ours = atomicInc(counters + blockIdx.x, splits - 1) == splits - 1;  // and 0 again
  __syncthreads();
  if (!ours) return;
  __threadfence();
  const float* all = partial + (i64)blockIdx.x * splits * rows * ROWS;
  for (int i = threadIdx.x; i < rows * ROWS; i += WARPS * 32) {
    int r = i / ROWS, output = blockIdx.x * ROWS + i % ROWS;
    float total = 0.f;
    for (int split = 0; split < splits; split++) total += __ldcg(all + (i64)split * rows * ROWS + i);
    if (output < outputs) y[(i64)r * outputs + output] = narrow(total);
  }
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, TILES > 2 ? 1 : 2)
    multiply(const Element* x, i64 rows, i64 columns, const u8* codes, i64 outputs, const float* values, Element* y,
             float* partial, u32* counters, const float* absmax) {
  product(x, rows, columns, codes, outputs, values, y, partial, counters, PlainAbsmax{absmax});
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, TILES > 2 ? 1 : 2)
    multiply_double(const Element* x, i64 rows, i64 columns, const u8* codes, i64 outputs, const float* values,
                    Element* y, float* partial, u32* counters, const u8* absmax_codes, const float* nested_absmax,
                    const float* offset, const float* map) {
  __shared__ float shared_map[256];
  shared_map[threadIdx.x] = map[threadIdx.x];  // seen by all after the first barrier in product
  product(x, rows, columns, codes, outputs, values, y, partial, counters,
          DoubleAbsmax{absmax_codes, nested_absmax, *offset, shared_map});
}

// The clause word by word, a thread an output: what the fast kernels are held against.
extern "C" __global__ void multiply_plain(const Element* x, i64 rows, i64 columns, const u8* codes, i64 outputs,
                                          const float* values, Element* y, const float* absmax) {
  i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x, r = at / outputs, output = at % outputs;
  if (r >= rows) return;
  float sum = 0.f;
  for (i64 k = 0; k < columns; k++) {
    i64 i = output * columns + k;
    float w = values[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4] * absmax[i / BLOCK];  // NF4-4.1
    sum += widen(narrow(w)) * widen(x[r * columns + k]);
  }
  y[at] = narrow(sum);
}
