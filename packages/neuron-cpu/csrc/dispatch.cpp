#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace neuron_cpu {
namespace {

const Kernels &choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    // For tests: a lesser set than the processor has.
    const char *wanted = getenv("NEURON_CPU_KERNELS");
    bool is_base = wanted != nullptr && strcmp(wanted, "base") == 0;
    bool is_avx2 = wanted != nullptr && strcmp(wanted, "avx2") == 0;
    if (!is_base && !is_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return kernels_avx512;
    if (!is_base && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return kernels_avx2;
#endif
    return kernels_base;
}

}  // namespace

const Kernels &kernels() {
    static const Kernels *chosen = nullptr;
    if (chosen == nullptr) chosen = &choose();
    return *chosen;
}

}  // namespace neuron_cpu
