#define KERNELS_NAMESPACE base
#define KERNELS_NAME "base"
#define KERNELS_TABLE kernels_base

#include "kernels.inc"
