// Stands for the package's tensorcore.cuh where kernels are emulated: the same functions, by their definitions.
#pragma once
#include "floats.cuh"

#define DYNAMIC_SHARED(name) u8* name = emulation::dynamic_shared

inline u32 shared_address(const void* p) { return (u32)((const u8*)p - emulation::dynamic_shared); }

inline float bf16_at(uint32_t word, int half) { return __uint_as_float((word >> 16 * half & 0xffff) << 16); }

inline void multiply_add(float d[4], const u32 a[4], u32 b0, u32 b1) {
  using namespace emulation;
  uint32_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  together(words, 6, nullptr, [&] {
    int g = lane() / 4, q = lane() % 4;
    for (int i = 0; i < 4; i++) {
      int row = g + i / 2 * 8, column = 2 * q + i % 2;
      float sum = 0.f;
      for (int k = 0; k < 16; k++) {
        const Slot& left = slot(row % 8 * 4 + k % 8 / 2);
        const Slot& right = slot(column * 4 + k % 8 / 2);
        sum += bf16_at(left.words[row / 8 + k / 8 * 2], k % 2) * bf16_at(right.words[4 + k / 8], k % 2);
      }
      d[i] += sum;
    }
    return 0;
  });
}

inline void load_matrices(u32 r[4], const void* row) {
  using namespace emulation;
  if ((uintptr_t)row % 16) abort();
  together(nullptr, 0, row, [&] {
    for (int i = 0; i < 4; i++) memcpy(&r[i], (const char*)slot(8 * i + lane() / 4).pointer + lane() % 4 * 4, 4);
    return 0;
  });
}

inline void load_transposed(u32 r[4], const void* row) {
  using namespace emulation;
  if ((uintptr_t)row % 16) abort();
  together(nullptr, 0, row, [&] {
    for (int i = 0; i < 4; i++) {
      u16 first, second;
      memcpy(&first, (const char*)slot(8 * i + lane() % 4 * 2).pointer + lane() / 4 * 2, 2);
      memcpy(&second, (const char*)slot(8 * i + lane() % 4 * 2 + 1).pointer + lane() / 4 * 2, 2);
      r[i] = (u32)second << 16 | first;
    }
    return 0;
  });
}

inline u32 transpose_pairs(u32 pair) {
  using namespace emulation;
  return together(&pair, 1, nullptr, [&] {
    int g = lane() / 4, q = lane() % 4;
    auto element = [&](int row) { return slot(row * 4 + g / 2).words[0] >> g % 2 * 16 & 0xffff; };
    return element(2 * q + 1) << 16 | element(2 * q);
  });
}

// A copy arrives when its thread waits for it, and not before.
struct Copy {
  void* shared;
  const void* global;
  bool there;
};
inline std::vector<std::vector<Copy>> copies_of[2048];

inline std::vector<std::vector<Copy>>& my_copies() {
  auto& mine = copies_of[emulation::current->number];
  if (mine.empty()) mine.emplace_back();
  return mine;
}

inline void copy_async(void* shared, const void* global, bool there = true) {
  if ((uintptr_t)shared % 16 || (there && (uintptr_t)global % 16)) {
    fprintf(stderr, "emulation: a copy of 16 bytes that are not aligned\n");
    abort();
  }
  my_copies().back().push_back({shared, global, there});
}

inline void copy_once(u32 shared, const void* global, bool there) {
  copy_async(emulation::dynamic_shared + shared, global, there);
}

inline void prefetch(const void*) {}

inline void commit_copies() { my_copies().emplace_back(); }

template <int PENDING>
inline void wait_copies() {
  auto& mine = my_copies();  // the last is not committed yet
  while ((int)mine.size() > PENDING + 1) {
    for (const Copy& copy : mine.front())
      if (copy.there) memcpy(copy.shared, copy.global, 16);
      else memset(copy.shared, 0, 16);
    mine.erase(mine.begin());
  }
}

inline void let_next_begin() {}
inline void wait_for_previous() {}

inline u32 multiply_pairs(u32 a, u32 b) {
  return (u32)narrow(bf16_at(a, 1) * bf16_at(b, 1)) << 16 | narrow(bf16_at(a, 0) * bf16_at(b, 0));
}

inline float power_of_two(float x) { return exp2f(x); }
inline float quick_reciprocal(float x) { return 1 / x; }
inline float quick_rsqrt(float x) { return 1 / sqrtf(x); }
inline float natural_log(float x) { return logf(x); }

inline bool forget_copies = (emulation::at_block_start = [] {
  for (auto& mine : copies_of) mine.clear();
}, true);
