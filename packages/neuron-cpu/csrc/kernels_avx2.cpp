#define KERNELS_NAMESPACE avx2
#define KERNELS_NAME "avx2"
#define KERNELS_TABLE kernels_avx2

#include "kernels.inc"
