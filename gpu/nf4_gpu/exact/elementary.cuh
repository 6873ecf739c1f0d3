// Exponential and logarithm of float32 as fixed sequences of float64 operations, rounded once (NF4-14.5, NF4-14.6).
// Compiled without contraction: a product and the sum after it are two roundings.
#pragma once
#include "floats.cuh"

__device__ __forceinline__ float exact_exp(float x) {
  if (x != x) return x;
  double t = fmin(fmax((double)x, -104.0), 89.0);
  double f = t * 0x1.71547652b82fep+0;
  double k = f + 0x1.8p52;  // to the nearest integer, which the low bits hold
  f -= k - 0x1.8p52;
  double p = 0x1.fde5f7c280a5dp-17 * f;
  p = (p + 0x1.445c83de9f053p-13) * f;
  p = (p + 0x1.5d8a86032650bp-10) * f;
  p = (p + 0x1.3b29f39d8a1c5p-7) * f;
  p = (p + 0x1.c6b08ac069726p-5) * f;
  p = (p + 0x1.ebfbe07786d64p-3) * f;
  p = (p + 0x1.62e42ff0e191bp-1) * f;
  p = p + 1.0;
  p = __hiloint2double(__double2hiint(p) + (__double2loint(k) << 20), __double2loint(p));  // times 2^k, exactly
  return __double2float_rn(p);
}

__device__ __forceinline__ float exact_log(float x) {
  if (!(x >= 0.f)) return __uint_as_float(0x7fc00000);
  if (x == 0.f) return __uint_as_float(0xff800000);
  if (x == __uint_as_float(0x7f800000)) return x;
  double m = (double)x;
  int high = __double2hiint(m), low = __double2loint(m);
  // Down to [sqrt(1/2), sqrt(2)): the 64 bits less those of sqrt(1/2), 3fe6a09e667f3bcd, shifted down by 52.
  int k = (high - 0x3fe6a09e - ((u32)low < 0x667f3bcdu)) >> 20;
  m = __hiloint2double(high - (k << 20), low);
  double s = (m - 1.0) / (m + 1.0), z = s * s;
  double p = 0x1.e2f639984fc29p-3 * z;
  p = (p + 0x1.2438d8d9ccdfep-2) * z;
  p = (p + 0x1.999a7a84d63d3p-2) * z;
  p = (p + 0x1.555554fda11eep-1) * z;
  p = (p + 2.0) * s;
  return __double2float_rn(p + k * 0x1.62e42fefa39efp-1);
}

// 1 / (1 + exp(-x)) of NF4-14.7.
__device__ __forceinline__ float exact_sigmoid(float x) { return 1.f / (1.f + exact_exp(-x)); }
