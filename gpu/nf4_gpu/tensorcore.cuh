// What the model's kernels share: tensor cores in bfloat16, asynchronous copies to shared memory, quick functions.
// Needs sm_80. Nothing here is exact: sums are in float32, in the order of the hardware.
#pragma once
#include "floats.cuh"

#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) u8 name[]

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// d [16, 8] += a [16, 16] b [16, 8]. A lane, number 4 g + q, holds of d rows g (0, 1) and g + 8 (2, 3) in columns 2 q and
// 2 q + 1; of a rows g (0, 2) and g + 8 (1, 3) in columns 2 q and after, and 8 further on (2, 3); of b column g in rows 2 q
// and after, and 8 further on.
__device__ __forceinline__ void multiply_add(float d[4], const u32 a[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices of 8 x 8: lane 8 i + r gives the address of row r of the i-th, 16 bytes in shared memory; lane 4 g + q gets
// of each the pair in row g from column 2 q on.
__device__ __forceinline__ void load_matrices(u32 r[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same of their transposes: the pair in column g from row 2 q on.
__device__ __forceinline__ void load_transposed(u32 r[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// A matrix of 8 x 8 between lanes: lane 4 g + q gives the pair in row g from column 2 q on, and gets that in column g from row 2 q
// on.
__device__ __forceinline__ u32 transpose_pairs(u32 pair) {
  u32 result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
  return result;
}

// 16 bytes from global to shared memory, or zeros: nothing is read then, wherever the address is.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool there = true) {
  int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}

// The same to a shared_address, of what is read once: the L2 cache is told to drop it first.
__device__ __forceinline__ void copy_once(u32 shared, const void* global, bool there) {
  int bytes = there ? 16 : 0;
  asm volatile(
      "{.reg .b64 once; createpolicy.fractional.L2::evict_first.b64 once, 1.0;"
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, once;}" ::"r"(shared),
      "l"(global), "r"(bytes)
      : "memory");
}

__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of this thread's groups are on their way.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// From sm_90 on a launch may overlap the end of the one before it on the stream: it then begins when all thread blocks of that
// one have called let_next_begin or ended. Until wait_for_previous a kernel reads only what none of its run writes.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Products of two pairs of bfloat16, each rounded.
__device__ __forceinline__ u32 multiply_pairs(u32 a, u32 b) {
  u32 product;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(product) : "r"(a), "r"(b), "r"(0x80008000u));
  return product;
}

// 2^x and 1 / x to some units in the last place.
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float quick_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float quick_rsqrt(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float natural_log(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y * 0.693147180559945f;
}
