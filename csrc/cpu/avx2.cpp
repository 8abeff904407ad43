#define DISTRUCTION_SET kAvx2
#define DISTRUCTION_SET_NAME "avx2"
#include "vectorised.h"
