#define KERNELS_NAMESPACE avx512
#define KERNELS_NAME "avx512"
#define KERNELS_TABLE kernels_avx512

#include "kernels.inc"
