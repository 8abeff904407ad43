#define DISTRUCTION_SET kBaseline
#define DISTRUCTION_SET_NAME "baseline"
#include "vectorised.h"
