// What a processor's kernels offer; one table for each instruction set, filled by kernels.inc.
#pragma once

#include <cstdint>

namespace neuron_cpu {

// Element types of activations and of weights, as the Python side numbers them.
enum Type { F32 = 0, BF16 = 1, F16 = 2 };

// Columns of a panel: the outputs that one load of a cache line of bfloat16 weights serves.
constexpr int64_t kPanel = 32;

// x [rows, in] times the transpose of a packed weight [out, in], plus bias.
struct Linear {
    Type x_type, weight_type, out_type;
    const void *x;
    const void *weight;   // panels: ceil(out / 32) of [in, 32]
    const float *bias;    // [out] or null
    void *out;            // [rows, out], or [rows, out / 2] where gated
    int64_t rows, in_features, out_features;
    int64_t x_stride, out_stride;  // elements from row to row
    bool gated;           // silu(first half of the outputs) * second half
};

struct Kernels {
    const char *name;
    // Rows of 32 outputs, [32, in] one after the other, into a panel. May be done in place: `panel` may be `rows`.
    // False where there is no memory.
    bool (*pack)(Type type, const void *rows, int64_t in_features, void *panel);
    // False where there is no memory.
    bool (*linear)(const Linear &job);
};

extern const Kernels kernels_base;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// The best that this processor can do.
const Kernels &kernels();

}  // namespace neuron_cpu
