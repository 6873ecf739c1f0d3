// CUDA C on a CPU: thread blocks one after the other, the threads of a block as coroutines that change over where they
// wait for one another. What needs tensor cores or asynchronous copies is in the tensorcore.cuh beside this file, which
// stands for the package's own.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define EMULATED 1

struct dim3 {
  unsigned x, y, z;
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulation {

const size_t STACK = 96 << 10;

struct Fiber {
  void* stack_pointer;
  char* stack;
  dim3 index;
  int number;
  bool done;
};

struct Meeting {  // of some of a block's threads
  int arrived = 0;
  unsigned generation = 0;
};

struct Slot {  // what a lane brings to its warp
  uint32_t words[32];
  const void* pointer;
};

inline Fiber* current;
inline void* scheduler;
inline dim3 block_index, block_size, grid_size;
inline std::vector<Fiber> fibers;
inline std::vector<Meeting> warps;
inline Meeting everybody;
inline int living;
inline std::vector<int> living_of_warp;
inline Slot slots[2048];
inline unsigned long progress;
inline unsigned char* dynamic_shared;
inline void (*at_block_start)();

extern "C" void emulation_switch(void** save, void* load);
asm(R"(
.text
.weak emulation_switch
emulation_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");

inline void yield() { emulation_switch(&current->stack_pointer, scheduler); }

inline void meet(Meeting& meeting, const int& expected) {
  unsigned generation = meeting.generation;
  meeting.arrived++;
  while (meeting.generation == generation) {
    if (meeting.arrived >= expected) {
      meeting.arrived = 0;
      meeting.generation++;
      progress++;
      return;
    }
    yield();
  }
}

inline int lane() { return current->number % 32; }
inline int warp() { return current->number / 32; }
inline void meet_warp() { meet(warps[warp()], living_of_warp[warp()]); }
inline Slot& slot(int lane) { return slots[warp() * 32 + lane]; }

// Every lane brings words, and with all of them there calls look(), which may read any lane's.
template <class Look>
auto together(const uint32_t* words, int count, const void* pointer, Look look) {
  Slot& mine = slot(lane());
  memcpy(mine.words, words, count * 4);
  mine.pointer = pointer;
  meet_warp();
  auto result = look();
  meet_warp();
  return result;
}

template <class Function>
struct Thread {
  static inline Function* body;
  static void start() {
    (*body)();
    Fiber* me = current;
    me->done = true;
    living--;
    living_of_warp[me->number / 32]--;
    progress++;
    for (;;) yield();
  }
};

template <class Function>
void run_block(unsigned threads, Function body) {
  static std::vector<char*> stacks;
  while (stacks.size() < threads) stacks.push_back((char*)malloc(STACK));
  Thread<Function>::body = &body;
  fibers.assign(threads, Fiber{});
  warps.assign((threads + 31) / 32, Meeting{});
  living_of_warp.assign((threads + 31) / 32, 0);
  everybody = Meeting{};
  living = threads;
  if (at_block_start) at_block_start();
  for (unsigned i = 0; i < threads; i++) {
    Fiber& fiber = fibers[i];
    living_of_warp[i / 32]++;
    fiber.stack = stacks[i];
    fiber.number = i;
    fiber.index = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
    void** top = (void**)(((uintptr_t)(fiber.stack + STACK) & ~(uintptr_t)63) - 8);
    *top = nullptr;                                // as if start had been called from nowhere
    *--top = (void*)&Thread<Function>::start;      // where the first switch returns to
    for (int r = 0; r < 6; r++) *--top = nullptr;  // callee-saved registers
    fiber.stack_pointer = top;
  }
  int left = threads;
  while (left) {
    unsigned long before = progress;
    left = 0;
    for (Fiber& fiber : fibers) {
      if (fiber.done) continue;
      current = &fiber;
      emulation_switch(&scheduler, fiber.stack_pointer);
      if (!fiber.done) left++;
    }
    if (left && progress == before) {
      fprintf(stderr, "emulation: the threads of a block wait for one another for ever\n");
      abort();
    }
  }
}

template <class... Parameters, size_t... I>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
  kernel(*(Parameters*)arguments[I]...);
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const unsigned* grid, const unsigned* block, unsigned shared, void** arguments,
            int count) {
  if (count != (int)sizeof...(Parameters)) {
    fprintf(stderr, "emulation: a kernel of %d parameters is given %d\n", (int)sizeof...(Parameters), count);
    abort();
  }
  const size_t BEYOND = 4096;  // bytes of dynamic shared memory that no kernel may write
  std::vector<unsigned char> memory(shared + 1024 + BEYOND);
  dynamic_shared = (unsigned char*)(((uintptr_t)memory.data() + 1023) & ~(uintptr_t)1023);
  grid_size = {grid[0], grid[1], grid[2]};
  block_size = {block[0], block[1], block[2]};
  for (unsigned z = 0; z < grid[2]; z++)
    for (unsigned y = 0; y < grid[1]; y++)
      for (unsigned x = 0; x < grid[0]; x++) {
        block_index = {x, y, z};
        memset(memory.data(), 0xff, memory.size());  // NaN: what was not written shows
        run_block(block[0] * block[1] * block[2],
                  [&] { call(kernel, arguments, std::index_sequence_for<Parameters...>{}); });
        for (size_t i = 0; i < BEYOND; i++)
          if (dynamic_shared[shared + i] != 0xff) {
            fprintf(stderr, "emulation: %u bytes of dynamic shared memory, and byte %zu is written\n", shared, shared + i);
            abort();
          }
      }
}

template <class T>
uint32_t word_of(T value) {
  static_assert(sizeof(T) == 4);
  uint32_t word;
  memcpy(&word, &value, 4);
  return word;
}
template <class T>
T of_word(uint32_t word) {
  T value;
  memcpy(&value, &word, 4);
  return value;
}

}  // namespace emulation

#define threadIdx (emulation::current->index)
#define blockIdx (emulation::block_index)
#define blockDim (emulation::block_size)
#define gridDim (emulation::grid_size)

inline void __syncthreads() { emulation::meet(emulation::everybody, emulation::living); }
inline void __syncwarp() { emulation::meet_warp(); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned, T value, int from, int width = 32) {
  using namespace emulation;
  uint32_t word = word_of(value);
  return together(&word, 1, nullptr, [&] { return of_word<T>(slot(lane() / width * width + (unsigned)from % width).words[0]); });
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  using namespace emulation;
  uint32_t word = word_of(value);
  return together(&word, 1, nullptr, [&] { return of_word<T>(slot(lane() ^ mask).words[0]); });
}
inline unsigned __ballot_sync(unsigned, bool value) {
  using namespace emulation;
  uint32_t word = value;
  return together(&word, 1, nullptr, [&] {
    unsigned found = 0;
    for (int i = 0; i < 32; i++) found |= slot(i).words[0] << i;
    return found;
  });
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
inline float __uint_as_float(unsigned u) { return emulation::of_word<float>(u); }
inline unsigned __float_as_uint(float f) { return emulation::word_of(f); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline int __ffs(unsigned x) { return __builtin_ffs(x); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned which) {
  uint64_t both = (uint64_t)y << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) result |= (unsigned)(both >> (which >> 4 * i & 7) * 8 & 255) << 8 * i;
  return result;
}
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }

template <class T>
T atomicAdd(T* p, T value) {
  T old = *p;
  *p = old + value;
  return old;
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
  unsigned old = *p;
  *p = old >= limit ? 0 : old + 1;
  return old;
}

template <class T>
T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
T max(T a, T b) {
  return a > b ? a : b;
}
