// Stands for the package's warpgroup.cuh where kernels are emulated: the products run when they are waited for.
#pragma once
#include "tensorcore.cuh"

inline u32 swizzled(int r, int c, int rows) { return c / 64 * rows * 128 + r * 128 + ((c / 8 % 8 ^ r % 8) * 16); }
inline u64 along_rows(u32 address) {
  return (u64)((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}
inline u64 along_columns(u32 address, int rows) {
  return (u64)((address & 0x3ffff) >> 4) | (u64)(rows * 128 >> 4) << 16 | 64ull << 32 | 1ull << 62;
}

struct Barrier {
  u16 count, left;
  u32 phase;
};
inline void make_barrier(u64* barrier, u32 count) { *(Barrier*)barrier = {(u16)count, (u16)count, 0}; }
inline void come(u64* barrier) {
  Barrier& b = *(Barrier*)barrier;
  if (--b.left) return;
  b.left = b.count;
  b.phase++;
  emulation::progress++;
}
inline void wait_for_phase(u64* barrier, u32 phase) {
  while ((((volatile Barrier*)barrier)->phase & 1) == (phase & 1)) emulation::yield();
}
template <int COUNT>
inline void give_registers() {}
template <int COUNT>
inline void take_registers() {}
inline emulation::Meeting some[16];
template <int NUMBER, int COUNT>
inline void meet_some() {
  static const int expected = COUNT;
  emulation::meet(some[NUMBER], expected);
}

struct Product {
  float* d;
  int columns;
  bool registers, add;
  u32 a[4];
  u64 descriptor_a, descriptor_b;
};
inline std::vector<std::vector<Product>> products_of[2048];

inline std::vector<std::vector<Product>>& my_products() {
  auto& mine = products_of[emulation::current->number];
  if (mine.empty()) mine.emplace_back();
  return mine;
}

inline float element_at(u32 address) {
  address ^= (address >> 7 & 7) << 4;
  u16 bits;
  memcpy(&bits, emulation::dynamic_shared + address, 2);
  return bf16_at(bits, 0);
}
inline u32 field(u64 descriptor, int bit) { return (u32)(descriptor >> bit & 0x3fff) << 4; }

// Row r, depth k of an operand along rows; depth k, column n of one along columns.
inline float along_rows_at(u64 descriptor, int r, int k) {
  return element_at(field(descriptor, 0) + r / 8 * field(descriptor, 32) + r % 8 * 128 + k * 2);
}
inline float along_columns_at(u64 descriptor, int k, int n) {
  return element_at(field(descriptor, 0) + n / 64 * field(descriptor, 16) + k / 8 * field(descriptor, 32) + k % 8 * 128 +
                    n % 64 * 2);
}

inline void run(const Product& p) {
  using namespace emulation;
  int warp_row = warp() % 4 * 16, g = lane() / 4, q = lane() % 4;
  // The factors of this thread's two rows.
  float a[2][16];
  Slot& mine = slot(lane());
  if (p.registers) {
    memcpy(mine.words, p.a, 16);
    meet_warp();
    for (int half = 0; half < 2; half++)
      for (int k = 0; k < 16; k++) a[half][k] = bf16_at(slot(g * 4 + k % 8 / 2).words[half + k / 8 * 2], k % 2);
    meet_warp();
  } else
    for (int half = 0; half < 2; half++)
      for (int k = 0; k < 16; k++) a[half][k] = along_rows_at(p.descriptor_a, warp_row + g + half * 8, k);
  for (int i = 0; i < p.columns / 2; i++) {
    int column = i / 4 * 8 + 2 * q + i % 2, half = i / 2 % 2;
    float sum = 0.f;
    for (int k = 0; k < 16; k++)
      sum += a[half][k] * (p.registers ? along_columns_at(p.descriptor_b, k, column) : along_rows_at(p.descriptor_b, column, k));
    p.d[i] = p.add ? p.d[i] + sum : sum;
  }
}

template <int N>
inline void multiply_group(float (&d)[N], u64 a, u64 b, bool add) {
  my_products().back().push_back({d, 2 * N, false, add, {}, a, b});
}
template <int N>
inline void multiply_group_across(float (&d)[N], const u32* a, u64 b, bool add) {
  my_products().back().push_back({d, 2 * N, true, add, {a[0], a[1], a[2], a[3]}, 0, b});
}
inline void begin_products() {}
inline void commit_products() { my_products().emplace_back(); }
template <int PENDING>
inline void wait_products() {
  auto& mine = my_products();
  while ((int)mine.size() > PENDING + 1) {
    std::vector<Product> group = mine.front();
    mine.erase(mine.begin());
    for (const Product& p : group) run(p);
  }
}
template <int N>
inline void hold(float (&)[N]) {}
inline void show_products() {}

inline void (*forget_copies_too)() = emulation::at_block_start;
inline bool forget_products = (emulation::at_block_start = [] {
  for (auto& mine : copies_of) mine.clear();
  for (auto& mine : products_of) mine.clear();
}, true);
