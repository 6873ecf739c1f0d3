// y = x W^T for up to eight rows of x, or sixteen, on Hopper (NF4-4.3).
// Defines: DTYPE (FLOAT16 or BFLOAT16), that of x and y; BLOCK (64 or more); MT (1, 2 or 4), sixteens of rows of W that a
// thread block takes at a time; TILES (1 or 2), of eight rows of x each.
//
// A thread block owns whole rows of W, so nothing is left to add up between thread blocks. Its warps share the columns,
// a step each in turn, and each has a ring of its own that the copy engine fills: no barrier holds them together. The
// tensor cores take 16 rows of W by 16 columns; which columns those are is free, as long as x is read alike, so a lane has
// neighbouring bytes of a row. The sums of a chunk, in float32, are multiplied by its absmax.
//
// What each step brought, in us for one row, double-quantized 8192 x 28672, on an H100 (2026-11-26; its codes read once
// by a kernel that does no more take 39.5):
//   product.cu: columns split over thread blocks, a second pass adds up          53.3
//   whole rows in a thread block; codes to registers, an address in one PRMT     58.2
//   lines of 128 bytes asked for at once                                         52.2
//   the copy engine fills a ring of each warp, x a step ahead                    51.0
//   the L2 cache drops codes first                                               46.9
//   two stages a warp in place of four                                           45.3
//   it begins while the one before ends                                          44.2
#include "hopper.cuh"

#define WARPS 8
#define STAGES 2  // more of them are slower: memory serves fewer requests at a time better
#define THREADS (WARPS * 32)
#define ROWS (16 * MT)
#define DEPTH (MT > 1 ? 2 : 1)  // sixteens of rows in a stage
#define PARTS (MT / DEPTH)      // stages of a step
#define STAGE_BYTES (DEPTH * 16 * 128)
#define AHEAD (TILES == 1)      // x is loaded a step ahead, if there are registers

// Dynamic shared memory.
#define RING TABLE_BYTES
#define SCALES (RING + WARPS * STAGES * STAGE_BYTES)
#define SUMS (SCALES + WARPS * DEPTH * 16 * CHUNKS * 4)
#define BARRIERS (SUMS + WARPS / 2 * 8 * TILES * ROWS * 4)  // then WARPS * STAGES of 8 bytes

__device__ __forceinline__ void multiply_add(float d[4], const u32 a[4], u32 b0, u32 b1) {
#if DTYPE == FLOAT16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Where the loop of a warp is: pass (ROWS rows of W), step (of columns), part (of the rows).
struct Place {
  int pass, step, part;
  __device__ __forceinline__ void advance(int steps, int warp) {
    if (++part < PARTS) return;
    part = 0, step += WARPS;
    if (step >= steps) step = warp, pass += gridDim.x;
  }
};

// x [rows, columns], codes of W [outputs, columns] -> y [rows, outputs]; columns are whole steps.
template <class Scales>
__device__ __forceinline__ void product(const TensorMap& codes, const Element* x, int rows, int columns, int outputs,
                                        const float* values, Element* y, Scales scales) {
  extern __shared__ __align__(1024) u8 memory[];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4, group = lane / 4;
  int w_row = group % 4 * 2 + group / 4;  // of eight: those that half a warp reads at a time lie in different banks
  int steps = columns / STEP, passes = (outputs + ROWS - 1) / ROWS;
  u32 bank = lane * 4;
  u32 ring = shared_address(memory) + RING + warp * (STAGES * STAGE_BYTES);
  u32 barriers = shared_address(memory) + BARRIERS + warp * (STAGES * 8);

  Place to_load = {(int)blockIdx.x, warp, 0};
  auto load = [&](int slot) {
    if (to_load.pass < passes && to_load.step < steps) {
      expect_bytes(barriers + slot * 8, STAGE_BYTES);
      load_codes(ring + slot * STAGE_BYTES, codes, to_load.step, to_load.pass * ROWS + to_load.part * (DEPTH * 16),
                 barriers + slot * 8);
    }
    to_load.advance(steps, warp);
  };
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < STAGES; i++) init_barrier(barriers + i * 8, 1);
    publish_barriers();
#pragma unroll
    for (int i = 0; i < STAGES; i++) load(i);
  }
  // A stage's scales: those of a row of W in each lane, loaded a stage ahead.
  typename Scales::Four next_scales;
  Place to_scale = {(int)blockIdx.x, warp, 0};
  auto load_scales = [&] {
    if (to_scale.pass < passes && to_scale.step < steps) {
      int row = to_scale.pass * ROWS + (to_scale.part * DEPTH * 16 + lane % (DEPTH * 16));
      next_scales = scales.load_four(((i64)min(row, outputs - 1) * columns + to_scale.step * STEP) / BLOCK);
    }
    to_scale.advance(steps, warp);
  };
  load_scales();
  // A lane's part of x in a step: sixteen columns of each chunk, of the rows of x that are its group's.
  uint4 x_next[TILES][CHUNKS * 2];
  auto load_x = [&](uint4 to[TILES][CHUNKS * 2], int step) {
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
      for (int i = 0; i < CHUNKS * 2; i++) {
        to[t][i] = make_uint4(0, 0, 0, 0);
        if (t * 8 + group < rows)
          to[t][i] = __ldg((const uint4*)(x + (i64)(t * 8 + group) * columns + step * STEP + quad * 16 + i / 2 * CHUNK) + i % 2);
      }
  };
  let_next_begin();
  write_table<WARPS>(memory, values, scales);
  wait_for_previous();
  if (AHEAD && warp < steps) load_x(x_next, warp);
  __syncthreads();

  float* my_scales = (float*)(memory + SCALES) + warp * (DEPTH * 16 * CHUNKS);
  int slot = 0;
  u32 parity = 0;
  for (int pass = blockIdx.x; pass < passes; pass += gridDim.x) {
    float sum[MT][TILES][4] = {};
#pragma unroll 1
    for (int step = warp; step < steps; step += WARPS) {
      uint4 x_now[TILES][CHUNKS * 2];
      if (AHEAD) {
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
          for (int i = 0; i < CHUNKS * 2; i++) x_now[t][i] = x_next[t][i];
        load_x(x_next, step + WARPS < steps ? step + WARPS : warp);
      } else
        load_x(x_now, step);
#pragma unroll
      for (int part = 0; part < PARTS; part++) {
        float4 decoded = scales.decode_four(next_scales, memory, bank);
        __syncwarp();  // the last stage's have been read
        if (lane < DEPTH * 16) *(float4*)(my_scales + lane * CHUNKS) = decoded;
        __syncwarp();
        load_scales();
        wait(barriers + slot * 8, parity);
        const u8* stage = memory + RING + (warp * STAGES + slot) * STAGE_BYTES;
#pragma unroll
        for (int m = 0; m < DEPTH; m++) {  // lanes hold rows w_row and w_row + 8 of the sixteen
          float4 scale[2] = {*(const float4*)(my_scales + (m * 16 + w_row) * CHUNKS),
                             *(const float4*)(my_scales + (m * 16 + 8 + w_row) * CHUNKS)};
#pragma unroll
          for (int c = 0; c < CHUNKS; c++) {
            const u8* at = stage + (m * 16 + w_row) * 128 + ((c * 2 + quad / 2) ^ w_row) * 16 + quad % 2 * 8;
            uint2 words[2] = {*(const uint2*)at, *(const uint2*)(at + 8 * 128)};
            float chunk[TILES][4] = {};
#pragma unroll
            for (int k = 0; k < 4; k++) {  // sixteen columns: two bytes of each lane's eight
              u32 a[4];
#pragma unroll
              for (int i = 0; i < 4; i++)
                a[i] = look_up(memory, k < 2 ? words[i % 2].x : words[i % 2].y, k % 2 * 2 + i / 2, bank);
#pragma unroll
              for (int t = 0; t < TILES; t++) {
                const u32* b = (const u32*)&x_now[t][c * 2] + k * 2;
                multiply_add(chunk[t], a, b[0], b[1]);
              }
            }
#pragma unroll
            for (int t = 0; t < TILES; t++)
#pragma unroll
              for (int i = 0; i < 4; i++) {
                float& total = sum[part * DEPTH + m][t][i];
                total = __fmaf_rn(chunk[t][i], ((const float*)&scale[i / 2])[c], total);
              }
          }
        }
        __syncwarp();  // all have read the stage
        if (lane == 0) load(slot);
        if (++slot == STAGES) slot = 0, parity ^= 1;
      }
    }
    // Of each output the warps hold a sum each: the upper half of them, then the lower half added to it, then these in order.
    float* sums = (float*)(memory + SUMS);  // [WARPS / 2][8 * TILES][ROWS]
#pragma unroll
    for (int turn = 0; turn < 2; turn++) {
      if (warp / (WARPS / 2) == 1 - turn)
#pragma unroll
        for (int m = 0; m < MT; m++)
#pragma unroll
          for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
              int r = t * 8 + quad * 2 + i % 2, output = m * 16 + i / 2 * 8 + w_row;
              float* at = sums + (warp % (WARPS / 2) * (8 * TILES) + r) * ROWS + output;
              if (r < rows) *at = turn ? sum[m][t][i] + *at : sum[m][t][i];
            }
      __syncthreads();
    }
    for (int i = threadIdx.x; i < rows * ROWS; i += THREADS) {
      int output = pass * ROWS + i % ROWS;
      float total = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS / 2; w++) total += sums[w * (8 * TILES * ROWS) + i];
      if (output < outputs) y[(i64)(i / ROWS) * outputs + output] = narrow(total);
    }
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    few(const __grid_constant__ TensorMap codes, const Element* x, i64 rows, i64 columns, i64 outputs,
        const float* values, Element* y, const float* absmax) {
  product(codes, x, rows, columns, outputs, values, y, PlainScales{absmax});
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    few_double(const __grid_constant__ TensorMap codes, const Element* x, i64 rows, i64 columns, i64 outputs,
               const float* values, Element* y, const u8* absmax_codes, const float* nested_absmax, const float* offset,
               const float* map) {
  product(codes, x, rows, columns, outputs, values, y, DoubleScales{absmax_codes, nested_absmax, *offset, map});
}
