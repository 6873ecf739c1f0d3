// Bits, conversions and loads that the kernels share. Every function is exact or is one rounding of its clause.
// Compiled with -fmad=false, without flush to zero: a * b + c is two roundings, and subnormals are numbers (NF4-1).
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define FLOAT32 0
#define FLOAT16 1
#define BFLOAT16 2

#define EIGHT _Pragma("unroll") for (int i = 0; i < 8; i++)

// The bits of an element in memory.
#if DTYPE == FLOAT32
typedef u32 Element;
#else
typedef u16 Element;
#endif

// NF4-7.1
__device__ __forceinline__ float widen(Element bits) {
#if DTYPE == FLOAT32
  return __uint_as_float(bits);
#elif DTYPE == FLOAT16
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
  return f;
#else
  return __uint_as_float((u32)bits << 16);
#endif
}

// NF4-7.2, NF4-7.3, but for the bits of a NaN.
__device__ __forceinline__ Element narrow(float f) {
#if DTYPE == FLOAT32
  return __float_as_uint(f);
#elif DTYPE == FLOAT16
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
#elif __CUDA_ARCH__ >= 800
  u16 h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
#else
  u32 u = __float_as_uint(f);
  return f != f ? 0x7fff : (Element)((u + 0x7fff + (u >> 16 & 1)) >> 16);
#endif
}

#if DTYPE != FLOAT32
// Two at once; the first in the low half.
__device__ __forceinline__ u32 narrow_pair(float first, float second) {
#if __CUDA_ARCH__ >= 800
  u32 pair;
#if DTYPE == FLOAT16
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
#endif
  return pair;
#else
  return (u32)narrow(second) << 16 | narrow(first);
#endif
}
#endif

// Eight neighbours as they lie in memory, loaded at once from a 16-byte aligned address.
struct Eight {
#if DTYPE == FLOAT32
  uint4 a, b;
#else
  uint4 a;
#endif
  __device__ __forceinline__ void load(const Element* x) {
    a = __ldcs((const uint4*)x);
#if DTYPE == FLOAT32
    b = __ldcs((const uint4*)x + 1);
#endif
  }
  __device__ __forceinline__ void widen_to(float v[8]) const {
#if DTYPE == FLOAT32
    u32 w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    EIGHT v[i] = widen(w[i]);
#else
    u32 w[4] = {a.x, a.y, a.z, a.w};
    EIGHT v[i] = widen((Element)(i % 2 ? w[i / 2] >> 16 : w[i / 2] & 0xffff));
#endif
  }
};

__device__ __forceinline__ void store_eight(Element* y, const float v[8]) {
#if DTYPE == FLOAT32
  __stcs((float4*)y, make_float4(v[0], v[1], v[2], v[3]));
  __stcs((float4*)y + 1, make_float4(v[4], v[5], v[6], v[7]));
#else
  __stcs((uint4*)y, make_uint4(narrow_pair(v[0], v[1]), narrow_pair(v[2], v[3]), narrow_pair(v[4], v[5]),
                               narrow_pair(v[6], v[7])));
#endif
}

// The larger of m and the magnitude of f; a NaN if either is one, as in NumPy.
__device__ __forceinline__ float max_magnitude(float m, float f) {
#if __CUDA_ARCH__ >= 800
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(m) : "f"(fabsf(f)));
  return m;
#else
  u32 a = __float_as_uint(m), b = __float_as_uint(f) & 0x7fffffff;  // as integers magnitudes order like their values
  return __uint_as_float(a > b ? a : b);
#endif
}

// RN(1 / a), IEEE, of a float32 that is not subnormal enough to overflow.
__device__ __forceinline__ float reciprocal(float a) {
  float r;
  asm("rcp.rn.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
}
