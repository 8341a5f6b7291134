// SIMD levels: kernels are compiled once for each, and the best that this CPU runs is chosen once.
//
// A kernel file defines, in the namespace of its level, one table of pointers:
//     extern const Kernel* const conv_lstm_kernels[] = {...};
// and the host side asks for an entry of it with
//     VSOD_LEVEL_TABLES(const conv_lstm::Kernel*, conv_lstm_kernels)    in namespace vsod
//     conv_lstm_kernels(index)
// Not for kernel files: a copy of this code made for AVX-512 must not become the one that is
// linked.
#pragma once

#include <initializer_list>

namespace vsod {

enum class CpuLevel { kPortable, kAvx2, kAvx512, kAvx512Bf16 };

// The best level of this CPU, lowered by VSOD_OPS_SIMD=portable|avx2|avx512|avx512bf16.
// Raises for another value of it, and for a level that this CPU lacks.
CpuLevel cpu_level();
bool level_is_known();  // whether cpu_level() has one
const char* cpu_level_name(CpuLevel level);

// The entry of this CPU's level, or of the next level below where a table has none (null).
template <class Entry>
Entry best_entry(std::initializer_list<const Entry*> tables, int index) {
  const Entry* const* table = tables.begin() + int(cpu_level());
  while (!(*table)[index]) --table;
  return (*table)[index];
}

#if defined(VSOD_X86_LEVELS)
#define VSOD_LEVEL_TABLES(Entry, name)                                                             \
  namespace portable {                                                                             \
  extern Entry const name[];                                                                       \
  }                                                                                                \
  namespace avx2 {                                                                                 \
  extern Entry const name[];                                                                       \
  }                                                                                                \
  namespace avx512 {                                                                               \
  extern Entry const name[];                                                                       \
  }                                                                                                \
  namespace avx512bf16 {                                                                           \
  extern Entry const name[];                                                                       \
  }                                                                                                \
  static Entry name(int index) {                                                                   \
    return best_entry<Entry>({portable::name, avx2::name, avx512::name, avx512bf16::name}, index); \
  }
#else
#define VSOD_LEVEL_TABLES(Entry, name) \
  namespace portable {                 \
  extern Entry const name[];           \
  }                                    \
  static Entry name(int index) { return best_entry<Entry>({portable::name}, index); }
#endif

}  // namespace vsod
