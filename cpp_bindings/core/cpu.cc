#include "cpu.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif
#endif

namespace owl2 {

extern const Kernels kScalar;

namespace {

#if defined(__x86_64__)

// Linux lets a process use the registers of AMX only after it has asked.
bool may_use_amx() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

struct Features {
  bool avx2 = false, avx_vnni = false, avx512_vnni = false, amx = false;
};

uint64_t enabled_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

Features features() {
  Features found;
  uint32_t a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0) return found;
  const bool saved = c >> 27 & 1, fused = c >> 12 & 1, halves = c >> 29 & 1;
  if (!saved || !fused || !halves) return found;
  const uint64_t state = enabled_state();
  uint32_t b7, c7, d7, a71 = 0;
  if (__get_cpuid_count(7, 0, &a, &b7, &c7, &d7) == 0) return found;
  if (a >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);
  found.avx2 = (state & 0x6) == 0x6 && (b7 >> 5 & 1);
  found.avx_vnni = found.avx2 && (a71 >> 4 & 1);
  const bool foundation = (b7 >> 16 & 1) && (b7 >> 17 & 1) && (b7 >> 30 & 1) && (b7 >> 31 & 1);  // F, DQ, BW, VL
  found.avx512_vnni = found.avx2 && (state & 0xe6) == 0xe6 && foundation && (c7 >> 11 & 1);
  found.amx = found.avx512_vnni && (state & 0x60000) == 0x60000 && (d7 >> 24 & 1) && (d7 >> 25 & 1) && may_use_amx();
  return found;
}

#elif defined(__aarch64__)

struct Features {
  bool dotprod = false, i8mm = false;
};

Features features() {
  Features found;
#if defined(__linux__)
  constexpr unsigned long kDotprod = 1ul << 20, kI8mm = 1ul << 13;  // of AT_HWCAP and AT_HWCAP2
  found.dotprod = (getauxval(AT_HWCAP) & kDotprod) != 0;
  found.i8mm = found.dotprod && (getauxval(AT_HWCAP2) & kI8mm) != 0;
#endif
  return found;
}

#endif

std::string names(const std::vector<const Kernels*>& all) {
  std::string text;
  for (const Kernels* one : all) text += (text.empty() ? "" : ", ") + std::string(one->name);
  return text;
}

}  // namespace

#if defined(__x86_64__)
extern const Kernels kAmx, kAvx512Vnni, kAvxVnni, kAvx2;
#elif defined(__aarch64__)
extern const Kernels kNeonI8mm, kNeonDotprod, kNeon;
#endif

std::vector<const Kernels*> available_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  static const Features has = features();
  if (has.amx) found.push_back(&kAmx);
  if (has.avx512_vnni) found.push_back(&kAvx512Vnni);
  if (has.avx_vnni) found.push_back(&kAvxVnni);
  if (has.avx2) found.push_back(&kAvx2);
#elif defined(__aarch64__)
  static const Features has = features();
  if (has.i8mm) found.push_back(&kNeonI8mm);
  if (has.dotprod) found.push_back(&kNeonDotprod);
  found.push_back(&kNeon);
#endif
  found.push_back(&kScalar);
  return found;
}

const Kernels& choose_kernels() {
  const std::vector<const Kernels*> found = available_kernels();
  const char* const asked = std::getenv("OWL2_CPU");
  if (asked == nullptr || *asked == '\0') return *found.front();
  for (const Kernels* one : found)
    if (std::string(asked) == one->name) return *one;
  throw std::invalid_argument("OWL2_CPU is " + std::string(asked) + ", and this processor has " + names(found));
}

}  // namespace owl2
