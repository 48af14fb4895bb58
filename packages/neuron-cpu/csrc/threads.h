// A pool of threads that share out the tasks of one job at a time.
//
// Tasks are claimed one by one, so a thread that is late (a busy machine) costs its own share only. Threads that find
// nothing wait a moment in user space and then in the kernel: they never take a core from somebody for long.
#pragma once

#include <cstdint>

namespace neuron_cpu {

// Does task `index` of the job that `context` describes. thread: 0 for the caller, else the number of a worker.
using Task = void (*)(void *context, int64_t index, int thread);

// How many threads compute together, the caller included. Ends or starts workers; no job may be running.
void set_num_threads(int number);
int num_threads();

// Runs tasks 0 … num_tasks - 1 and returns when all are done. One caller at a time; a second one computes alone.
void run_tasks(Task task, void *context, int64_t num_tasks);

// Memory for the calling thread's own use until its next call with the same `slot`, at least num_bytes long and aligned
// to 64; null where there is none.
void *scratch(int slot, int64_t num_bytes);

}  // namespace neuron_cpu
