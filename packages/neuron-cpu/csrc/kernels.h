// What a processor's kernels offer; one table for each instruction set, filled by kernels.inc.
#pragma once

#include <cstdint>

namespace neuron_cpu {

// Element types of activations and of weights, as the Python side numbers them.
enum Type { F32 = 0, BF16 = 1, F16 = 2, BLOCKS = 3 };

// Columns of a panel: the outputs that one load of a cache line of bfloat16 weights serves.
constexpr int64_t kPanel = 32;

// How weights in blocks are stored: a weight is scale * code - offset. A unit holds, 32 outputs side by side: outer scale
// (and outer minimum) of float16 where there are two levels; of each group a scale (and a minimum), of 8 bits below an
// outer one, else float16; of each position the low four bits of the codes, outputs c and c + 16 in byte c; then, of 5
// bits, the fifth ones, that of output 4 * i + j at bit i of byte j; of 6 bits, the fifth and sixth, those of output
// 8 * i + j at bits 2 * i of byte j; or codes of 8 bits, signed.
struct Blocks {
    int64_t bits;       // of a code: 4, 5, 6 or 8
    int64_t group;      // positions with one scale
    int64_t unit;       // positions of a unit, a multiple of the group
    int64_t unit_bytes;
    int64_t zero;       // what is taken off a code where there is no minimum
    bool is_two_level, has_min, is_signed;  // is_signed: scales of 8 bits are
};

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
    const Blocks *blocks; // where the weight is in blocks: of units
};

// RMSNorm of rows, of the sum of x and residual where there is one; the sum then takes residual's place.
struct Norm {
    const float *x;
    float *residual;      // [rows, width] or null
    const float *weight;  // [width]
    float *out;           // [rows, width]
    int64_t rows, width;
    float eps;
};

// Queries and keys of packed rows, normalised head by head and rotated in place; keys and values into their pages.
struct Rotation {
    float *qkv;                // [rows, (heads + 2 * kv_heads) * head_dim]
    const int64_t *positions;  // [rows]
    const float *angles;       // [positions, rotary_dim]: cosines, then sines
    const float *q_weight;     // [head_dim] or null
    const float *k_weight;
    float *cache;              // [pages, 2, page_size, kv_heads, head_dim]
    const int64_t *slots;      // [rows]: page * page_size + offset
    int64_t rows, heads, kv_heads, head_dim, rotary_dim, page_size;
    float eps;
};

// Causal attention of the rows of several sequences to the keys and values in their pages.
struct Attention {
    const float *q;                // rows of [heads, head_dim], q_stride floats apart
    const float *cache;            // [pages, 2, page_size, kv_heads, head_dim]
    float *out;                    // [rows, heads, head_dim]
    const int32_t *tables;         // [sequences, table_stride]: pages
    const int32_t *query_start;    // [sequences + 1]: first row of each
    const int32_t *context_lens;   // [sequences]: keys, those of its own rows included
    int64_t q_stride, table_stride, sequences, heads, kv_heads, head_dim, page_size;
    int64_t window;                // keys that a row sees, its own included; 0: all
    float scale;
};

struct Kernels {
    const char *name;
    // Rows of 32 outputs, [32, in] one after the other, into a panel. May be done in place: `panel` may be `rows`.
    // False where there is no memory.
    bool (*pack)(Type type, const void *rows, int64_t in_features, void *panel);
    // False where there is no memory.
    bool (*linear)(const Linear &job);
    void (*gather_rows)(const Blocks &format, const void *weight, const int64_t *wanted, int64_t rows,
                        int64_t in_features, float *out);
    void (*rms_norm)(const Norm &job);
    void (*rotate_and_write)(const Rotation &job);
    bool (*attention)(const Attention &job);
};

extern const Kernels kernels_base;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// Rows of ggml's blocks, each of row_bytes, into panels: positions first … first + positions - 1 of them. number: of the
// format. Rows beyond the last are zeros.
void pack_blocks(const Blocks &format, int number, const void *raw, int64_t rows, int64_t row_bytes, int64_t first,
                 int64_t positions, void *panels);

// The best that this processor can do.
const Kernels &kernels();

}  // namespace neuron_cpu
