// Rows of ggml's blocks into panels of units (`Blocks`): the layouts of the blocks are those of ggml-common.h, ggml 0.25.

#include <cstring>

#include "kernels.h"
#include "threads.h"

namespace neuron_cpu {
namespace {

// Elements and bytes of a block, by the number of the format.
constexpr int64_t kElements[] = {32, 32, 32, 32, 32, 256, 256, 256};
constexpr int64_t kBytes[] = {18, 20, 22, 24, 34, 144, 176, 210};
enum { Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K };

const uint8_t kNoRow[256] = {};

// What a block holds, apart. Scales and minima of float16 are its bits.
struct Block {
    uint8_t codes[256];
    uint8_t scales[16], mins[8];
    uint16_t outer, outer_min;
};

uint16_t half_at(const uint8_t *at) {
    uint16_t bits;
    memcpy(&bits, at, 2);
    return bits;
}

// Blocks of 32: low halves of 16 bytes, then high ones; fifth bits in order.
void read_small(int format, const uint8_t *at, Block &block) {
    bool has_min = format == Q4_1 || format == Q5_1, has_fifth = format == Q5_0 || format == Q5_1;
    block.outer = half_at(at);
    // What a file adds is subtracted here.
    block.outer_min = has_min ? half_at(at + 2) ^ 0x8000 : 0;
    at += has_min ? 4 : 2;
    if (format == Q8_0) {
        memcpy(block.codes, at, 32);
        return;
    }
    uint32_t fifth = 0;
    if (has_fifth) {
        memcpy(&fifth, at, 4);
        at += 4;
    }
    for (int e = 0; e < 32; e++) {
        int code = e < 16 ? at[e] & 15 : at[e - 16] >> 4;
        block.codes[e] = static_cast<uint8_t>(code | (fifth >> e & 1) << 4);
    }
}

void read_k(int format, const uint8_t *at, Block &block) {
    block.outer = half_at(at);
    block.outer_min = half_at(at + 2);
    const uint8_t *packed = at + 4, *low = at + (format == Q5_K ? 48 : 16), *fifth = at + 16;
    for (int g = 0; g < 4; g++) {
        block.scales[g] = packed[g] & 63;
        block.mins[g] = packed[g + 4] & 63;
        block.scales[g + 4] = static_cast<uint8_t>((packed[g + 8] & 15) | packed[g] >> 6 << 4);
        block.mins[g + 4] = static_cast<uint8_t>(packed[g + 8] >> 4 | packed[g + 4] >> 6 << 4);
    }
    for (int run = 0; run < 4; run++)
        for (int l = 0; l < 32; l++) {
            block.codes[64 * run + l] = low[32 * run + l] & 15;
            block.codes[64 * run + 32 + l] = low[32 * run + l] >> 4;
        }
    if (format == Q5_K)
        for (int run = 0; run < 8; run++)
            for (int l = 0; l < 32; l++) block.codes[32 * run + l] |= static_cast<uint8_t>((fifth[l] >> run & 1) << 4);
}

void read_q6(const uint8_t *at, Block &block) {
    for (int half = 0; half < 2; half++)
        for (int l = 0; l < 32; l++) {
            const uint8_t *low = at + 64 * half + l;
            int high = at[128 + 32 * half + l];
            uint8_t *to = block.codes + 128 * half + l;
            to[0] = static_cast<uint8_t>((low[0] & 15) | (high & 3) << 4);
            to[32] = static_cast<uint8_t>((low[32] & 15) | (high >> 2 & 3) << 4);
            to[64] = static_cast<uint8_t>(low[0] >> 4 | (high >> 4 & 3) << 4);
            to[96] = static_cast<uint8_t>(low[32] >> 4 | high >> 6 << 4);
        }
    memcpy(block.scales, at + 192, 16);
    block.outer = half_at(at + 208);
    block.outer_min = 0;
}

// Positions begin … begin + unit - 1 of 32 rows' blocks as a unit.
void write_unit(const Blocks &format, const Block *rows, int64_t begin, uint8_t *to) {
    int64_t groups = format.unit / format.group, first = begin / format.group;
    auto put_halves = [&](bool is_min) {
        for (int64_t c = 0; c < kPanel; c++) {
            uint16_t bits = is_min ? rows[c].outer_min : rows[c].outer;
            memcpy(to + 2 * c, &bits, 2);
        }
        to += 2 * kPanel;
    };
    auto put_bytes = [&](bool is_min) {
        for (int64_t g = 0; g < groups; g++)
            for (int64_t c = 0; c < kPanel; c++) *to++ = (is_min ? rows[c].mins : rows[c].scales)[first + g];
    };
    // With one level, a block is a group, and its scale the outer one.
    put_halves(false);
    if (format.has_min) put_halves(true);
    if (format.is_two_level) {
        put_bytes(false);
        if (format.has_min) put_bytes(true);
    }
    for (int64_t k = begin; k < begin + format.unit; k++) {
        if (format.bits == 8) {
            for (int64_t c = 0; c < kPanel; c++) *to++ = rows[c].codes[k];
            continue;
        }
        for (int64_t c = 0; c < kPanel / 2; c++)
            *to++ = static_cast<uint8_t>((rows[c].codes[k] & 15) | rows[c + kPanel / 2].codes[k] << 4);
    }
    int64_t width = format.bits - 4, bytes = width * 4, parts = 8 / width;
    if (format.bits == 5 || format.bits == 6)
        for (int64_t k = begin; k < begin + format.unit; k++)
            for (int64_t j = 0; j < bytes; j++) {
                int together = 0;
                for (int64_t i = 0; i < parts; i++) together |= rows[i * bytes + j].codes[k] >> 4 << (i * width);
                *to++ = static_cast<uint8_t>(together);
            }
}

struct Packing {
    const Blocks *format;
    int number;
    const uint8_t *raw;
    int64_t rows, row_bytes, first, units;
    uint8_t *panels;
};

void pack_panel(void *context, int64_t index, int) {
    const Packing &job = *static_cast<const Packing *>(context);
    static thread_local Block rows[kPanel];
    int64_t elements = kElements[job.number], here = -1;
    for (int64_t unit = 0; unit < job.units; unit++) {
        int64_t begin = job.first + unit * job.format->unit, block = begin / elements;
        if (block != here) {
            here = block;
            for (int64_t c = 0; c < kPanel; c++) {
                int64_t row = index * kPanel + c;
                const uint8_t *at = kNoRow;
                if (row < job.rows) at = job.raw + row * job.row_bytes + block * kBytes[job.number];
                if (job.number == Q6_K)
                    read_q6(at, rows[c]);
                else if (job.number >= Q4_K)
                    read_k(job.number, at, rows[c]);
                else
                    read_small(job.number, at, rows[c]);
            }
        }
        write_unit(*job.format, rows, begin % elements,
                   job.panels + (index * job.units + unit) * job.format->unit_bytes);
    }
}

}  // namespace

void pack_blocks(const Blocks &format, int number, const void *raw, int64_t rows, int64_t row_bytes, int64_t first,
                 int64_t positions, void *panels) {
    Packing job = {&format, number, static_cast<const uint8_t *>(raw), rows, row_bytes, first,
                   positions / format.unit, static_cast<uint8_t *>(panels)};
    run_tasks(pack_panel, &job, (rows + kPanel - 1) / kPanel);
}

}  // namespace neuron_cpu
