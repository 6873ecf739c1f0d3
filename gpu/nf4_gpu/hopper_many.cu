// y = x W^T for up to 64 rows of x on Hopper (NF4-4.3).
// Defines: DTYPE (FLOAT16 or BFLOAT16), that of x and y; BLOCK (64 or more); N (8, 16, 32 or 64), rows of x at most; MG and
// KG, warpgroups side by side along the rows of W and along the columns; SPLITS (1 or 2), thread blocks that share the
// columns; STAGES (a multiple of KG).
//
// Warpgroup products: a warpgroup takes 64 rows of W, whose factors it looks up into registers, by 16 columns and all rows
// of x, which lie in shared memory. The sums of a chunk, in float32, are multiplied by its absmax while the next chunk is
// looked up. A warp of its own loads, a step of W and x at a time.
//
// What each step brought, in us for 16 and 64 rows, double-quantized 8192 x 28672, on an H100 (2026-11-26):
//   product.cu                                                                   74.0  154
//   warpgroup products, x put in order by every thread block, clusters of four   123   213
//   x put in order once, the copy engine; clusters of two, all resident at once  57.8   76
//   warpgroups along the columns too (not of 64 rows: too few registers)         52.3
//   the L2 cache drops codes first                                               48.3   73
#include "hopper.cuh"

#define WARPS (MG * KG * 4)
#define THREADS (WARPS * 32 + 32)
#define ROWS (MG * 64)
#define X_CHUNK (N * CHUNK * 2)  // bytes
#define X_BYTES (CHUNKS * X_CHUNK)
#define CODE_BYTES (ROWS * 128)
#define STAGE_BYTES (CODE_BYTES + X_BYTES)
#define BUFFERS (N > 32 && MG * KG > 2 ? 1 : 2)  // of factors, if there are registers
#define PITCH (ROWS + 4)

// Dynamic shared memory; the sums [KG][N][PITCH] come to lie over the stages.
#define RING TABLE_BYTES
#define BARRIERS (RING + STAGES * STAGE_BYTES)  // STAGES of 8 bytes for what is full, and as many for what is empty

#if DTYPE == FLOAT16
#define OPERANDS "f16.f16"
#else
#define OPERANDS "bf16.bf16"
#endif

// d [64][N] = a [64][16] b [16][N], added to d if `add`.
__device__ __forceinline__ void multiply_add(float d[N / 2], const u32 a[4], u64 b, int add) {
#if N == 8
  asm volatile(
      "{.reg .pred add; setp.ne.b32 add, %9, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32." OPERANDS
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, add, 1, 1, 0;}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#elif N == 16
  asm volatile(
      "{.reg .pred add; setp.ne.b32 add, %13, 0; wgmma.mma_async.sync.aligned.m64n16k16.f32." OPERANDS
      " {%0, %1, %2, %3, %4, %5, %6, %7}, {%8, %9, %10, %11}, %12, add, 1, 1, 0;}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#elif N == 32
  asm volatile(
      "{.reg .pred add; setp.ne.b32 add, %21, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32." OPERANDS
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, add, 1, 1, 0;}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#else
  asm volatile(
      "{.reg .pred add; setp.ne.b32 add, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." OPERANDS
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "
      "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, add, 1, 1, 0;}"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
        "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
        "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
        "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
#endif
}

// x [rows, columns] -> arranged [columns / 64][N][64], as the tensor cores read it from shared memory (128-byte swizzle),
// where lane q of a row of W has bytes 8 q to 8 q + 7 of a chunk: pair 8 q + p of columns becomes pair 4 p + q.
extern "C" __global__ void __launch_bounds__(256) arrange(const u32* x, i64 rows, i64 columns, u32* arranged) {
  let_next_begin();
  wait_for_previous();
  int unit = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;  // a warp a row of a chunk
  int chunk = unit / N, r = unit % N;
  if (r < rows && chunk * CHUNK < columns)
    arranged[unit * 32 + (lane % 8 ^ r % 8) * 4 + lane / 8] = x[(r * columns + chunk * CHUNK) / 2 + lane];
}

// arranged x, codes of W [outputs, columns] -> y [rows, outputs]; columns are whole steps. Rows that x hasn't only reach
// sums that are not kept.
template <class Scales>
__device__ __forceinline__ void product(const TensorMap& codes, const u8* x, int rows, int columns, int outputs,
                                        const float* values, Element* y, Scales scales) {
  extern __shared__ __align__(1024) u8 memory[];
  int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0), quad = lane % 4, group = lane / 4;
  int w_row = group % 4 * 2 + group / 4;  // of eight: those that half a warp reads at a time lie in different banks
  int steps = columns / STEP;
  int first = (int)((i64)steps * blockIdx.y / SPLITS), last = (int)((i64)steps * (blockIdx.y + 1) / SPLITS);
  u32 ring = shared_address(memory) + RING, full = shared_address(memory) + BARRIERS, empty = full + STAGES * 8;

  auto load_w = [&](int step, int slot) {
    expect_bytes(full + slot * 8, STAGE_BYTES);
    load_codes(ring + slot * STAGE_BYTES, codes, step, blockIdx.x * ROWS, full + slot * 8);
  };
  auto load_x = [&](int step, int slot) {
    load_bytes(ring + slot * STAGE_BYTES + CODE_BYTES, x + (i64)step * X_BYTES, X_BYTES, full + slot * 8);
  };
  if (threadIdx.x == WARPS * 32) {
#pragma unroll
    for (int i = 0; i < STAGES; i++) init_barrier(full + i * 8, 1), init_barrier(empty + i * 8, MG * 4);
    publish_barriers();
#pragma unroll
    for (int i = 0; i < STAGES; i++)
      if (first + i < last) load_w(first + i, i);
  }
  let_next_begin();
  write_table<WARPS>(memory, values, scales);
  wait_for_previous();
  if (threadIdx.x == WARPS * 32) {
#pragma unroll
    for (int i = 0; i < STAGES; i++)
      if (first + i < last) load_x(first + i, i);
  }
  __syncthreads();

  float sum[N / 2] = {};
  if (warp == WARPS) {
    if (lane == 0) {
      int slot = 0;
      u32 parity = 0;
      for (int step = first + STAGES; step < last; step++) {
        wait(empty + slot * 8, parity);
        load_w(step, slot);
        load_x(step, slot);
        if (++slot == STAGES) slot = 0, parity ^= 1;
      }
    }
  } else {
    int along_k = warp / (MG * 4), sixteen = warp % (MG * 4), row = blockIdx.x * ROWS + sixteen * 16 + w_row;
    // A step's scales lie in the four lanes of their rows' quads, a chunk's in each; they are loaded a step ahead.
    typename Scales::One next_scales[2];
    auto load_scales = [&](int step) {
#pragma unroll
      for (int i = 0; i < 2; i++)
        next_scales[i] =
            scales.load(((i64)min(row + i * 8, outputs - 1) * columns + step * STEP + quad * CHUNK) / BLOCK);
    };
    if (first + along_k < last) load_scales(first + along_k);
    u32 bank = lane * 4, at = (quad / 2 ^ w_row) * 16;
    asm volatile("" : "+r"(bank), "+r"(at));  // kept, not computed again and again
    int slot = along_k;
    u32 parity = 0;
#pragma unroll 1
    for (int step = first + along_k; step < last; step += KG) {
      float scale[2];
#pragma unroll
      for (int i = 0; i < 2; i++) scale[i] = scales.decode(next_scales[i], memory, bank);
      if (step + KG < last) load_scales(step + KG);
      wait(full + slot * 8, parity);
      const u8* stage = memory + RING + slot * STAGE_BYTES + (sixteen * 16 + w_row) * 128 + quad % 2 * 8;
      // A descriptor: where x lies, 1024 bytes from eight rows to the next eight, 128-byte swizzle.
      u64 x_chunk = (ring + slot * STAGE_BYTES + CODE_BYTES) >> 4 & 0x3fff | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
      u32 a[BUFFERS][4][4];
      float chunk[N / 2], s[2];
      auto add_chunk = [&] {
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
        for (int i = 0; i < N / 2; i++) asm volatile("" : "+f"(chunk[i])::"memory");
#pragma unroll
        for (int i = 0; i < N / 2; i++) sum[i] = __fmaf_rn(chunk[i], s[i / 2 % 2], sum[i]);
      };
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        uint2 words[2] = {*(const uint2*)(stage + (at ^ c * 32)), *(const uint2*)(stage + 8 * 128 + (at ^ c * 32))};
#pragma unroll
        for (int k = 0; k < 4; k++)  // sixteen columns: two bytes of each lane's eight, of rows w_row and w_row + 8
#pragma unroll
          for (int i = 0; i < 4; i++)
            a[c % BUFFERS][k][i] = look_up(memory, k < 2 ? words[i % 2].x : words[i % 2].y, k % 2 * 2 + i / 2, bank);
        if (BUFFERS == 2 && c > 0) add_chunk();
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < 4; k++)
          multiply_add(chunk, a[c % BUFFERS][k], x_chunk + (c * X_CHUNK + k * 32) / 16, k > 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#pragma unroll
        for (int i = 0; i < 2; i++) s[i] = __shfl_sync(~0u, scale[i], c, 4);
        if (BUFFERS == 1 || c == CHUNKS - 1) add_chunk();
      }
      if (lane == 0) arrive(empty + slot * 8);
      slot += KG;
      if (slot >= STAGES) slot -= STAGES, parity ^= 1;
    }
  }

  // Of each output there are KG sums in each of SPLITS thread blocks; they are added in order, an equal part by each.
  __syncthreads();  // the stages are read
  float* sums = (float*)(memory + RING);  // [KG][N][PITCH]
  if (warp < WARPS)
#pragma unroll
    for (int i = 0; i < N / 2; i++)
      sums[(warp / (MG * 4) * N + i / 4 * 8 + quad * 2 + i % 2) * PITCH + warp % (MG * 4) * 16 + i / 2 % 2 * 8 + w_row] =
          sum[i];
  auto meet = [] {
    if (SPLITS > 1)
      asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
    else
      __syncthreads();
  };
  meet();
  const int share = ROWS / SPLITS;
  for (int i = threadIdx.x; i < rows * share; i += THREADS) {
    int r = i / share, o = blockIdx.y * share + i % share, output = blockIdx.x * ROWS + o;
    float part[SPLITS * KG], total = 0.f;
#pragma unroll
    for (int j = 0; j < SPLITS * KG; j++) {
      u32 mine = shared_address(sums + (j % KG * N + r) * PITCH + o);
      asm volatile("{.reg .b32 there; mapa.shared::cluster.u32 there, %1, %2; ld.shared::cluster.f32 %0, [there];}"
                   : "=f"(part[j])
                   : "r"(mine), "r"(j / KG));
    }
#pragma unroll
    for (int j = 0; j < SPLITS * KG; j++) total += part[j];
    if (output < outputs) y[(i64)r * outputs + output] = narrow(total);
  }
  meet();  // nobody ends while its sums are read
}

extern "C" __global__ void __cluster_dims__(1, SPLITS, 1) __launch_bounds__(THREADS, 1)
    many(const __grid_constant__ TensorMap codes, const u8* x, i64 rows, i64 columns, i64 outputs, const float* values,
         Element* y, const float* absmax) {
  product(codes, x, rows, columns, outputs, values, y, PlainScales{absmax});
}

extern "C" __global__ void __cluster_dims__(1, SPLITS, 1) __launch_bounds__(THREADS, 1)
    many_double(const __grid_constant__ TensorMap codes, const u8* x, i64 rows, i64 columns, i64 outputs,
                const float* values, Element* y, const u8* absmax_codes, const float* nested_absmax,
                const float* offset, const float* map) {
  product(codes, x, rows, columns, outputs, values, y, DoubleScales{absmax_codes, nested_absmax, *offset, map});
}
