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

PyObject *py_linear(PyObject *, PyObject *const *arguments, Py_ssize_t given) {
    long long v[13];
    if (!read_integers(arguments, given, 13, v)) return nullptr;
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
    bool has_memory;
    Py_BEGIN_ALLOW_THREADS
    has_memory = kernels().linear(job);
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
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_neuron_cpu", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__neuron_cpu() { return PyModule_Create(&definition); }
