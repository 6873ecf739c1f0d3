// Eight elements of a row, which a thread has at a time: to and from memory, and SwiGLU of them (arXiv 2002.05202).
#pragma once
#include "tensorcore.cuh"

#define LOG2E 1.44269504088896f

__device__ __forceinline__ void widen_eight(const uint4& words, float v[8]) {
  u32 w[4] = {words.x, words.y, words.z, words.w};
  EIGHT v[i] = widen((Element)(i % 2 ? w[i / 2] >> 16 : w[i / 2] & 0xffff));
}

__device__ __forceinline__ void narrow_eight(u32 w[4], const float v[8]) {
#pragma unroll
  for (int i = 0; i < 4; i++) w[i] = narrow_pair(v[2 * i], v[2 * i + 1]);
}

__device__ __forceinline__ void load(const Element* p, float v[8]) { widen_eight(*(const uint4*)p, v); }

__device__ __forceinline__ void store(Element* p, const u32 w[4]) { *(uint4*)p = make_uint4(w[0], w[1], w[2], w[3]); }

__device__ __forceinline__ void store(Element* p, const float v[8]) {
  u32 w[4];
  narrow_eight(w, v);
  store(p, w);
}

__device__ __forceinline__ void load_weight(const float* weight, float w[8]) {
  float4 a = *(const float4*)weight, b = *(const float4*)(weight + 4);
  w[0] = a.x, w[1] = a.y, w[2] = a.z, w[3] = a.w, w[4] = b.x, w[5] = b.y, w[6] = b.z, w[7] = b.w;
}

// silu(gate) up, over gate.
__device__ __forceinline__ void swiglu_eight(float gate[8], const float up[8]) {
  EIGHT gate[i] = gate[i] * quick_reciprocal(1.f + power_of_two(-LOG2E * gate[i])) * up[i];
}

// The gradients of gate and up over them, from that of silu(gate) up, over which it is made again.
__device__ __forceinline__ void swiglu_backward_eight(float gate[8], float up[8], float grad[8]) {
  EIGHT {
    float sigmoid = quick_reciprocal(1.f + power_of_two(-LOG2E * gate[i])), silu = gate[i] * sigmoid;
    float dgate = grad[i] * up[i] * sigmoid * (1.f + gate[i] - silu);
    float dup = grad[i] * silu;
    grad[i] = silu * up[i];
    gate[i] = dgate, up[i] = dup;
  }
}
