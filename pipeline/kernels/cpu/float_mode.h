// The rounding mode of a thread, and what it does with subnormal numbers.

#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace gptbatch {

// While it lives, its thread rounds to nearest even and keeps subnormals. Other libraries may have
// set the thread to flush them to 0.
class StandardFloatMode {
 public:
  StandardFloatMode() : saved_(read()) {
    if ((saved_ & OTHER_MODES) != 0) write(saved_ & ~OTHER_MODES);
  }
  ~StandardFloatMode() {
    if ((saved_ & OTHER_MODES) != 0) write(saved_);
  }
  StandardFloatMode(const StandardFloatMode&) = delete;
  StandardFloatMode& operator=(const StandardFloatMode&) = delete;

 private:
#if defined(__x86_64__)
  using Word = uint32_t;
  static constexpr Word OTHER_MODES = 0x8000 | 0x6000 | 0x0040;  // flush to 0, rounding, read as 0
  static Word read() { return _mm_getcsr(); }
  static void write(Word word) { _mm_setcsr(word); }
#elif defined(__aarch64__)
  using Word = uint64_t;
  static constexpr Word OTHER_MODES = 0x01000000 | 0x00C00000;  // flush to 0, rounding
  static Word read() {
    Word word;
    asm volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void write(Word word) { asm volatile("msr fpcr, %0" : : "r"(word)); }
#else
  using Word = uint32_t;
  static constexpr Word OTHER_MODES = 0;
  static Word read() { return 0; }
  static void write(Word) {}
#endif

  Word saved_;
};

}  // namespace gptbatch
