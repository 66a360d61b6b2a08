// What the tests can call of the headers: lanes.cpp, compiled once for each lane type, fills one table each.
#pragma once

#include <cstddef>
#include <cstdint>

// Arrays of several outputs are [outputs, n]. Floating-point arrays hold the table's element type.
struct Table {
  const char* name;
  int width, element_size;
  void (*elementary)(const char* function, const void* x, void* y, size_t n);
  void (*on_word)(const char* function, const uint32_t* x, void* y, size_t n);
  void (*philox)(const uint32_t* counters, uint32_t k0, uint32_t k1, uint32_t* words, size_t n);
  void (*normal4)(const uint32_t* words, void* normals, size_t n);
  // normals of columns 0 .. n - 1 of one row; n a multiple of 4 width
  void (*draw)(uint64_t seed, uint32_t stream, uint32_t sample, uint32_t row, void* normals, size_t n);
  void (*spread)(int scale, const void* rho, void* four, size_t n);
  // of mu, rho, eps: analytic KL, sampled KL, its derivatives by mu and rho (analytic)
  void (*divergence)(int scale, const void* mu, const void* rho, const void* eps, double loc,
                     double prior_scale, void* four, size_t n);
};
