#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace neuron_cpu {
namespace {

const Kernels &choose() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const char *wanted = getenv("NEURON_CPU_KERNELS");
    auto is_wanted = [&](const char *name) { return wanted != nullptr && strcmp(wanted, name) == 0; };
    // Only where it is asked for: no machine that it was tested on had it.
    if (is_wanted("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return kernels_avx512;
    if (!is_wanted("base") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c"))
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
