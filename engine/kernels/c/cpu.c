/* The CPU kernels, in one unit of compilation: each file below is one concern, and includes nothing
 * itself. A file may use what those before it define.
 *
 * Plain C11 with GCC/Clang vector extensions; the vector width follows the compile target. What
 * stands between #if, in a few small functions, is written for instruction sets, beside a portable
 * version. Built and loaded by build.py, called through cpu.py.
 *
 * A row's result is the same, bit for bit, in any batch, with any number of threads, and however
 * the tokens of its sequence are divided among steps. Sums over K run in blocks of KC in a fixed
 * order. Attention adds up positions in runs and splits that start at multiples of TILE and SPLIT,
 * whatever queries share a tile. So keys and values that are computed again, many at a time, equal
 * those that were computed one by one. Where a product and a sum round once it says madd: compilers
 * do not decide it (build.py), since they would for one number of rows and not for another.
 */
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif
#include "vectors.h"
#include "threads.h"
#include "experts.h"
#include "cache_write.h"
#include "linear.h"
#include "rounded_rows.h"
#include "int8.h"
#include "grouped_int8.h"
#include "int4.h"
#include "low_rank.h"
#include "rows.h"
#include "recurrence.h"
#include "choosing.h"
#include "truncation.h"
#include "attention_plan.h"
#include "attention_scores.h"
#include "attention.h"
#include "exchange.h"
#include "replay.h"
