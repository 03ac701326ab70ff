// Sixteen fp32 values at a time, read from fp32, bf16 or fp16.
//
// One AVX-512 register, two of AVX2, four of SSE or NEON, through GCC's and Clang's vector extensions: one source serves them
// all, and because every operation is elementwise all of them give the same bits. Vectors are never wider than a register:
// GCC 12 takes comparisons of such vectors apart into scalars (1.3 instead of 8 GB/s for the divergence).
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

// Floats in one register of this level.
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = kLanes / kWidth;

using FloatRegister = float __attribute__((vector_size(4 * kWidth)));
using IntRegister = int32_t __attribute__((vector_size(4 * kWidth)));
using HalfRegister = uint16_t __attribute__((vector_size(2 * kWidth)));
using DoubleRegisters = double __attribute__((vector_size(8 * kWidth)));

template <typename Register>
struct Lanes {
  Register part[kParts];
};
using Floats = Lanes<FloatRegister>;
using Ints = Lanes<IntRegister>;      // also masks: -1 for yes, 0 for no
using Doubles = Lanes<DoubleRegisters>;

template <typename To, typename From>
NIRVANA_INLINE To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename Value>
NIRVANA_INLINE Value read(const void* data) {
  Value value;
  std::memcpy(&value, data, sizeof value);  // any alignment
  return value;
}

template <typename Result, typename Body>
NIRVANA_INLINE Result each_part(const Body& body) {
  Result result;
#pragma GCC unroll 4  // or the parts go through memory
  for (int i = 0; i < kParts; ++i) result.part[i] = body(i);
  return result;
}

// Register by register: GCC 12 copies the whole struct through the stack in 16-byte pieces, and the 32-byte loads that follow
// must wait for them (2.7 instead of 8 GB/s for the divergence at the AVX2 level).
template <typename To, typename From>
NIRVANA_INLINE Lanes<To> bits_of(const Lanes<From>& from) {
  return each_part<Lanes<To>>([&](int i) __attribute__((always_inline)) { return bits_of<To>(from.part[i]); });
}

template <typename Register>
NIRVANA_INLINE Lanes<Register> read_lanes(const void* data) {
  const char* bytes = static_cast<const char*>(data);
  return each_part<Lanes<Register>>(
      [&](int i) __attribute__((always_inline)) { return read<Register>(bytes + i * sizeof(Register)); });
}

#define NIRVANA_LANEWISE(Result, Name, A, B, expression)                                 \
  NIRVANA_INLINE Result Name(A a, B b) {                                                 \
    return each_part<Result>([&](int i) __attribute__((always_inline)) { return expression; }); \
  }
NIRVANA_LANEWISE(Floats, operator+, Floats, Floats, a.part[i] + b.part[i])
NIRVANA_LANEWISE(Floats, operator-, Floats, Floats, a.part[i] - b.part[i])
NIRVANA_LANEWISE(Floats, operator*, Floats, Floats, a.part[i] * b.part[i])
NIRVANA_LANEWISE(Floats, operator/, Floats, Floats, a.part[i] / b.part[i])
NIRVANA_LANEWISE(Floats, operator+, Floats, float, a.part[i] + b)
NIRVANA_LANEWISE(Floats, operator-, Floats, float, a.part[i] - b)
NIRVANA_LANEWISE(Floats, operator*, Floats, float, a.part[i] * b)
NIRVANA_LANEWISE(Doubles, operator+, Doubles, Doubles, a.part[i] + b.part[i])
NIRVANA_LANEWISE(Ints, operator+, Ints, int32_t, a.part[i] + b)
NIRVANA_LANEWISE(Ints, operator&, Ints, int32_t, a.part[i] & b)
NIRVANA_LANEWISE(Ints, operator|, Ints, Ints, a.part[i] | b.part[i])
NIRVANA_LANEWISE(Ints, operator<<, Ints, int, a.part[i] << b)
NIRVANA_LANEWISE(Ints, operator==, Ints, int32_t, a.part[i] == b)
NIRVANA_LANEWISE(Ints, operator<, Ints, int32_t, a.part[i] < b)
NIRVANA_LANEWISE(Ints, operator==, Floats, float, a.part[i] == b)
NIRVANA_LANEWISE(Ints, operator<, Floats, float, a.part[i] < b)
NIRVANA_LANEWISE(Ints, operator>, Floats, Floats, a.part[i] > b.part[i])
#undef NIRVANA_LANEWISE

NIRVANA_INLINE Floats& operator+=(Floats& a, Floats b) { return a = a + b; }

NIRVANA_INLINE Floats select(Ints mask, Floats yes, Floats no) {
  return each_part<Floats>([&](int i) __attribute__((always_inline)) { return mask.part[i] ? yes.part[i] : no.part[i]; });
}

NIRVANA_INLINE Floats all(float value) { return Floats{} + value; }

NIRVANA_INLINE Floats absolute(Floats value) { return bits_of<FloatRegister>(bits_of<IntRegister>(value) & 0x7fffffff); }

NIRVANA_INLINE Doubles widen(Floats value) {
  return each_part<Doubles>([&](int i)
                                __attribute__((always_inline)) { return __builtin_convertvector(value.part[i], DoubleRegisters); });
}

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

struct Float32 {
  static constexpr int kSize = 4;
  static NIRVANA_INLINE Floats load(const char* data) { return read_lanes<FloatRegister>(data); }
};

// 16 unsigned halves as 32-bit integers. By intrinsics, because GCC 12 takes five instructions for __builtin_convertvector
// and the kernels of 16-bit types then wait for them, not for memory.
NIRVANA_INLINE Ints widen_halves(const char* data) {
  return each_part<Ints>([&](int i) __attribute__((always_inline)) {
    const char* part = data + 2 * kWidth * i;
#if defined(__AVX512F__)
    return bits_of<IntRegister>(_mm512_maskz_cvtepu16_epi32(0xffff, read<__m256i>(part)));
#elif defined(__AVX2__)
    return bits_of<IntRegister>(_mm256_cvtepu16_epi32(read<__m128i>(part)));
#else
    return __builtin_convertvector(read<HalfRegister>(part), IntRegister);
#endif
  });
}

struct BFloat16 {
  static constexpr int kSize = 2;
  static NIRVANA_INLINE Floats load(const char* data) { return bits_of<FloatRegister>(widen_halves(data) << 16); }
};

struct Float16 {
  static constexpr int kSize = 2;
  static NIRVANA_INLINE Floats load(const char* data) {
#if defined(__AVX512F__) || defined(__F16C__)
    return each_part<Floats>([&](int i) __attribute__((always_inline)) {
      const char* part = data + 2 * kWidth * i;
#if defined(__AVX512F__)
      return bits_of<FloatRegister>(_mm512_maskz_cvtph_ps(0xffff, read<__m256i>(part)));
#else
      return bits_of<FloatRegister>(_mm256_cvtph_ps(read<__m128i>(part)));
#endif
    });
#else
    // Exponent and mantissa moved into place are 2^-112 of the value, subnormals included; infinity and NaN need all
    // exponent bits on top.
    const Ints half = widen_halves(data);
    const Ints bits = bits_of<IntRegister>(bits_of<FloatRegister>((half & 0x7fff) << 13) * 0x1p112f);
    const Ints not_finite = ((half & 0x7c00) == 0x7c00) & 0x7f800000;
    return bits_of<FloatRegister>(bits | not_finite | (half & 0x8000) << 16);
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
