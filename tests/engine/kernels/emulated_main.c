/* Calls functions of a library for another process: the kernels of another kind of processor, in an
 * emulator. Reads calls from standard input and answers on standard output, until its input ends:
 *
 *     name's length, name, number of buffers, (bytes, contents)..., number of arguments,
 *     (kind, value, offset)...        kind 0: a number; 1: an address in buffer `value`; 2: a float
 *     -> result, contents of all buffers
 *
 * All numbers are int64. Whole numbers and addresses are passed in order, floats in registers of their
 * own, as AArch64's procedure call standard has it: then one type of function serves for all.
 */
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX = 24, FLOATS = 4 };
typedef int64_t i;
typedef int32_t function(i, i, i, i, i, i, i, i, i, i, i, i, i, i, i, i, i, i, i, i, i, i, i, i, float,
                         float, float, float);

static void take(void *to, size_t size) {
    if (size && fread(to, size, 1, stdin) != 1) exit(0); /* the input has ended */
}
static i number(void) {
    i value;
    take(&value, sizeof value);
    return value;
}
static void give(const void *from, size_t size) {
    if (size && fwrite(from, size, 1, stdout) != 1) exit(1);
}

int main(int count, char **arguments) {
    void *library = count == 2 ? dlopen(arguments[1], RTLD_NOW) : NULL;
    if (!library) {
        fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    for (;;) {
        char name[64] = {0};
        take(name, (size_t)number());
        i buffers = number();
        i *sizes = calloc((size_t)buffers + 1, sizeof *sizes);
        char **contents = calloc((size_t)buffers + 1, sizeof *contents);
        for (i at = 0; at < buffers; at++) {
            sizes[at] = number();
            contents[at] = aligned_alloc(64, ((size_t)sizes[at] + 127) / 64 * 64);
            take(contents[at], (size_t)sizes[at]);
        }
        i a[MAX] = {0}, whole = 0, floats = 0, left = number();
        float f[FLOATS] = {0};
        for (; left > 0; left--) {
            i kind = number(), value = number(), offset = number();
            if (kind == 2) {
                double wide;
                memcpy(&wide, &value, sizeof wide);
                f[floats++] = (float)wide;
            } else {
                a[whole++] = kind == 1 ? (i)(intptr_t)(contents[value] + offset) : value;
            }
        }
        function *called = (function *)(intptr_t)dlsym(library, name);
        i result = called(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11],
                          a[12], a[13], a[14], a[15], a[16], a[17], a[18], a[19], a[20], a[21],
                          a[22], a[23], f[0], f[1], f[2], f[3]);
        give(&result, sizeof result);
        for (i at = 0; at < buffers; at++) {
            give(contents[at], (size_t)sizes[at]);
            free(contents[at]);
        }
        free(contents);
        free(sizes);
        fflush(stdout);
    }
}
