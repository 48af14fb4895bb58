// The Python side: numbers and addresses in, nothing of Python's is touched while threads compute.

#define Py_LIMITED_API 0x030b0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "kernels.h"
#include "threads.h"

namespace {

using namespace neuron_cpu;

// Reads `number` integers into `values`; false with an exception set.
bool read_integers(PyObject *const *arguments, Py_ssize_t given, Py_ssize_t number, long long *values) {
    if (given != number) {
        PyErr_Format(PyExc_TypeError, "%zd numbers expected, %zd given", number, given);
        return false;
    }
    for (Py_ssize_t index = 0; index < number; index++) {
        values[index] = PyLong_AsLongLong(arguments[index]);
        if (values[index] == -1 && PyErr_Occurred() != nullptr) return false;
    }
    return true;
}

PyObject *done(bool has_memory) {
    if (!has_memory) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

void *address(long long number) { return reinterpret_cast<void *>(static_cast<intptr_t>(number)); }

PyObject *py_set_num_threads(PyObject *, PyObject *const *arguments, Py_ssize_t given) {
    long long number;
    if (!read_integers(arguments, given, 1, &number)) return nullptr;
    Py_BEGIN_ALLOW_THREADS
    set_num_threads(static_cast<int>(number));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *py_num_threads(PyObject *, PyObject *) { return PyLong_FromLong(num_threads()); }

PyObject *py_instructions(PyObject *, PyObject *) { return PyUnicode_FromString(kernels().name); }

struct Packing {
    Type type;
    const char *rows;
    char *panels;
    int64_t in_features, panel_bytes;
    bool failed;
};

void pack_one(void *context, int64_t index, int) {
    Packing &job = *static_cast<Packing *>(context);
    int64_t at = index * job.panel_bytes;
    if (!kernels().pack(job.type, job.rows + at, job.in_features, job.panels + at)) job.failed = true;
}

PyObject *py_pack(PyObject *, PyObject *const *arguments, Py_ssize_t given) {
    long long v[5];
    if (!read_integers(arguments, given, 5, v)) return nullptr;
    Packing job = {static_cast<Type>(v[0]), static_cast<const char *>(address(v[1])), static_cast<char *>(address(v[2])),
                   v[4], kPanel * v[4] * (v[0] == F32 ? 4 : 2), false};
    Py_BEGIN_ALLOW_THREADS
    run_tasks(pack_one, &job, v[3]);
    Py_END_ALLOW_THREADS
    return done(!job.failed);
}

// Formats of blocks, by number.
const Blocks formats[] = {
    // bits, group, unit, bytes, zero, two levels, minimum, signed
    {4, 32, 32, 0, 8, false, false, false},   // Q4_0
    {4, 32, 32, 0, 0, false, true, false},    // Q4_1
    {5, 32, 32, 0, 16, false, false, false},  // Q5_0
    {5, 32, 32, 0, 0, false, true, false},    // Q5_1
    {8, 32, 32, 0, 0, false, false, false},   // Q8_0
    {4, 32, 256, 0, 0, true, true, false},    // Q4_K
    {5, 32, 256, 0, 0, true, true, false},    // Q5_K
    {6, 16, 256, 0, 32, true, false, true},   // Q6_K
};

// The format of a number, its units as long as the number says: number = index + 16 * positions of a unit.
bool read_format(long long number, Blocks &format) {
    long long index = number % 16, unit = number / 16;
    if (index < 0 || index >= static_cast<long long>(sizeof(formats) / sizeof(formats[0])) || unit <= 0 ||
        unit % formats[index].group != 0) {
        PyErr_SetString(PyExc_ValueError, "no format of blocks has this number");
        return false;
    }
    format = formats[index];
    format.unit = unit;
    int64_t groups = unit / format.group, columns = kPanel;
    int64_t scales = groups * columns * (format.is_two_level ? 1 : 2) + (format.is_two_level ? columns * 2 : 0);
    int64_t codes = unit * columns * format.bits / 8;
    format.unit_bytes = scales * (format.has_min ? 2 : 1) + codes;
    return true;
}

PyObject *py_unit_bytes(PyObject *, PyObject *const *arguments, Py_ssize_t given) {
    long long number;
    Blocks format;
    if (!read_integers(arguments, given, 1, &number) || !read_format(number, format)) return nullptr;
    return PyLong_FromLongLong(format.unit_bytes);
}

PyObject *py_gather_rows(PyObject *, PyObject *const *arguments, Py_ssize_t given) {
    long long v[6];
    Blocks format;
    if (!read_integers(arguments, given, 6, v) || !read_format(v[0], format)) return nullptr;
    Py_BEGIN_ALLOW_THREADS
    kernels().gather_rows(format, address(v[1]), static_cast<const int64_t *>(address(v[2])), v[4], v[5],
                          static_cast<float *>(address(v[3])));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *py_pack_blocks(PyObject *, PyObject *const *arguments, Py_ssize_t given) {
    long long v[7];
    Blocks format;
    if (!read_integers(arguments, given, 7, v) || !read_format(v[0], format)) return nullptr;
    Py_BEGIN_ALLOW_THREADS
    pack_blocks(format, static_cast<int>(v[0] % 16), address(v[1]), v[3], v[4], v[5], v[6], address(v[2]));
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *py_linear(PyObject *, PyObject *const *arguments, Py_ssize_t given) {
    long long v[14];
    if (!read_integers(arguments, given, 14, v)) return nullptr;
    Linear job;
    job.x_type = static_cast<Type>(v[0]);
    job.weight_type = static_cast<Type>(v[1]);
    job.out_type = static_cast<Type>(v[2]);
    job.x = address(v[3]);
    job.weight = address(v[4]);
    job.bias = static_cast<const float *>(address(v[5]));
    job.out = address(v[6]);
    job.rows = v[7];
    job.in_features = v[8];
    job.out_features = v[9];
    job.x_stride = v[10];
    job.out_stride = v[11];
    job.gated = v[12] != 0;
    Blocks blocks;
    if (job.weight_type == BLOCKS) {
        if (!read_format(v[13], blocks)) return nullptr;
        job.blocks = &blocks;
    }
    bool has_memory;
    Py_BEGIN_ALLOW_THREADS
    has_memory = kernels().linear(job);
    Py_END_ALLOW_THREADS
    return done(has_memory);
}

// The last of `given` arguments as a float, into `value`; the others are integers.
bool read_with_float(PyObject *const *arguments, Py_ssize_t given, Py_ssize_t number, long long *values, float *value) {
    if (!read_integers(arguments, given > 0 ? given - 1 : 0, number, values)) return false;
    *value = static_cast<float>(PyFloat_AsDouble(arguments[given - 1]));
    return PyErr_Occurred() == nullptr;
}

PyObject *py_rms_norm(PyObject *, PyObject *const *arguments, Py_ssize_t given) {
    long long v[6];
    Norm job;
    if (!read_with_float(arguments, given, 6, v, &job.eps)) return nullptr;
    job.x = static_cast<const float *>(address(v[0]));
    job.residual = static_cast<float *>(address(v[1]));
    job.weight = static_cast<const float *>(address(v[2]));
    job.out = static_cast<float *>(address(v[3]));
    job.rows = v[4];
    job.width = v[5];
    Py_BEGIN_ALLOW_THREADS
    kernels().rms_norm(job);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *py_rotate_and_write(PyObject *, PyObject *const *arguments, Py_ssize_t given) {
    long long v[13];
    Rotation job;
    if (!read_with_float(arguments, given, 13, v, &job.eps)) return nullptr;
    job.qkv = static_cast<float *>(address(v[0]));
    job.positions = static_cast<const int64_t *>(address(v[1]));
    job.angles = static_cast<const float *>(address(v[2]));
    job.q_weight = static_cast<const float *>(address(v[3]));
    job.k_weight = static_cast<const float *>(address(v[4]));
    job.cache = static_cast<float *>(address(v[5]));
    job.slots = static_cast<const int64_t *>(address(v[6]));
    job.rows = v[7];
    job.heads = v[8];
    job.kv_heads = v[9];
    job.head_dim = v[10];
    job.rotary_dim = v[11];
    job.page_size = v[12];
    Py_BEGIN_ALLOW_THREADS
    kernels().rotate_and_write(job);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *py_attention(PyObject *, PyObject *const *arguments, Py_ssize_t given) {
    long long v[14];
    Attention job;
    if (!read_with_float(arguments, given, 14, v, &job.scale)) return nullptr;
    job.q = static_cast<const float *>(address(v[0]));
    job.cache = static_cast<const float *>(address(v[1]));
    job.out = static_cast<float *>(address(v[2]));
    job.tables = static_cast<const int32_t *>(address(v[3]));
    job.query_start = static_cast<const int32_t *>(address(v[4]));
    job.context_lens = static_cast<const int32_t *>(address(v[5]));
    job.q_stride = v[6];
    job.table_stride = v[7];
    job.sequences = v[8];
    job.heads = v[9];
    job.kv_heads = v[10];
    job.head_dim = v[11];
    job.page_size = v[12];
    job.window = v[13];
    bool has_memory;
    Py_BEGIN_ALLOW_THREADS
    has_memory = kernels().attention(job);
    Py_END_ALLOW_THREADS
    return done(has_memory);
}

template <PyObject *(*function)(PyObject *, PyObject *const *, Py_ssize_t)>
PyCFunction fast() {
    return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"set_num_threads", fast<py_set_num_threads>(), METH_FASTCALL, nullptr},
    {"num_threads", py_num_threads, METH_NOARGS, nullptr},
    {"instructions", py_instructions, METH_NOARGS, nullptr},
    {"pack", fast<py_pack>(), METH_FASTCALL, nullptr},
    {"linear", fast<py_linear>(), METH_FASTCALL, nullptr},
    {"pack_blocks", fast<py_pack_blocks>(), METH_FASTCALL, nullptr},
    {"unit_bytes", fast<py_unit_bytes>(), METH_FASTCALL, nullptr},
    {"gather_rows", fast<py_gather_rows>(), METH_FASTCALL, nullptr},
    {"rms_norm", fast<py_rms_norm>(), METH_FASTCALL, nullptr},
    {"rotate_and_write", fast<py_rotate_and_write>(), METH_FASTCALL, nullptr},
    {"attention", fast<py_attention>(), METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_neuron_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__neuron_cpu() { return PyModule_Create(&definition); }
