// Sixteen fp32 values at a time, read from fp32, bf16 or fp16.
//
// GCC's and Clang's vector extensions: one source serves every width (one AVX-512 register, two of AVX2, four of SSE or
// NEON), and because every operation is elementwise all of them give the same bits.
//
// Compiled once for each level (see levels.h) in that level's own namespace, and without any function of the standard library
// that is not forced inline: the linker keeps one copy of such a function for all levels, and could keep the AVX-512 one.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../saliency.h"

namespace nirvana {
namespace NIRVANA_LEVEL {

constexpr int kLanes = 16;

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Doubles = double __attribute__((vector_size(8 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));

template <typename To, typename From>
NIRVANA_INLINE To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename Vector>
NIRVANA_INLINE Vector read(const void* data) {
  Vector vector;
  std::memcpy(&vector, data, sizeof vector);  // any alignment
  return vector;
}

struct Float32 {
  static constexpr int kSize = 4;
  static NIRVANA_INLINE Floats load(const char* data) { return read<Floats>(data); }
};

// 16 unsigned halves as 32-bit integers. By intrinsics, because GCC 12 takes five instructions for __builtin_convertvector
// and the kernels of 16-bit types then wait for them, not for memory.
NIRVANA_INLINE Ints widen(const char* data) {
#if defined(__AVX512F__)
  return bits_of<Ints>(_mm512_maskz_cvtepu16_epi32(0xffff, read<__m256i>(data)));
#elif defined(__AVX2__)
  const __m256i parts[] = {_mm256_cvtepu16_epi32(read<__m128i>(data)), _mm256_cvtepu16_epi32(read<__m128i>(data + 16))};
  return bits_of<Ints>(parts);
#else
  return __builtin_convertvector(read<Halves>(data), Ints);
#endif
}

struct BFloat16 {
  static constexpr int kSize = 2;
  static NIRVANA_INLINE Floats load(const char* data) { return bits_of<Floats>(widen(data) << 16); }
};

struct Float16 {
  static constexpr int kSize = 2;
  static NIRVANA_INLINE Floats load(const char* data) {
#if defined(__AVX512F__)
    return bits_of<Floats>(_mm512_maskz_cvtph_ps(0xffff, read<__m256i>(data)));
#elif defined(__F16C__)
    const __m256 parts[] = {_mm256_cvtph_ps(read<__m128i>(data)), _mm256_cvtph_ps(read<__m128i>(data + 16))};
    return bits_of<Floats>(parts);
#else
    // Exponent and mantissa moved into place are 2^-112 of the value, subnormals included; infinity and NaN need all
    // exponent bits on top.
    const Ints half = widen(data);
    const Ints bits = bits_of<Ints>(bits_of<Floats>((half & 0x7fff) << 13) * 0x1p112f);
    const Ints not_finite = ((half & 0x7c00) == 0x7c00) & 0x7f800000;
    return bits_of<Floats>(bits | not_finite | (half & 0x8000) << 16);
#endif
  }
};

// The first n < 16 values and zeros, reading no byte beyond them.
template <typename Type>
NIRVANA_INLINE Floats load_first(const char* data, int n) {
  char padded[4 * kLanes] = {};
  std::memcpy(padded, data, static_cast<size_t>(n) * Type::kSize);
  return Type::load(padded);
}

NIRVANA_INLINE Floats absolute(Floats value) { return bits_of<Floats>(bits_of<Ints>(value) & 0x7fffffff); }

NIRVANA_INLINE Doubles widen(Floats value) { return __builtin_convertvector(value, Doubles); }

// Sum of the lanes in fp64, as a fixed tree.
NIRVANA_INLINE double sum(Floats value) {
  double lanes[kLanes];
  const Doubles wide = widen(value);
  std::memcpy(lanes, &wide, sizeof lanes);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

NIRVANA_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Calls body(W(), G()) with the types of two matrices.
template <typename Body>
NIRVANA_INLINE void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Float32());
    case DType::kBFloat16:
      return body(BFloat16());
    case DType::kFloat16:
      return body(Float16());
  }
}

template <typename Body>
NIRVANA_INLINE void with_types(DType first, DType second, const Body& body) {
  with_type(first, [&](auto one) { with_type(second, [&](auto two) { body(one, two); }); });
}

}  // namespace NIRVANA_LEVEL
}  // namespace nirvana
