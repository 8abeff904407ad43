// GCC's own AVX-512 headers trip these warnings.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define DISTRUCTION_SET kAvx512
#define DISTRUCTION_SET_NAME "avx512"
#include "vectorised.h"
