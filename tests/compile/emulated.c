/* Calls functions of a shared library for a process that cannot load it: tests/compile/arm.py talks to it.

   In: length of a name, the name, number of arguments, the arguments: -1 and a number, or the length of a buffer, its
   bytes, the number of its axes, their sizes, and its type as DLPack has it (code, bits << 8); or -2, a count, and the
   lengths and bytes of so many buffers, to whose addresses the argument points. Then out: the result, and the bytes of
   every buffer but those. All numbers are int64. A name that begins with __tvm_ffi_ has TVM's calling convention.
*/
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST 64
typedef int64_t word;

typedef struct { /* dlpack.h */
  void *data;
  int32_t device_type, device_id, axes;
  uint8_t code, bits;
  uint16_t lanes;
  word *shape, *strides;
  uint64_t offset;
} Tensor;

typedef struct { /* tvm/ffi/c_api.h */
  int32_t type, padding;
  word value;
} Any;

/* what libraries call when they refuse something */
void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *text) { fprintf(stderr, "%s: %s\n", kind, text); }

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "%s: ", kind);
  for (int32_t i = 0; i < count; i++) fputs(parts[i] ? parts[i] : "", stderr);
  fputc('\n', stderr);
}

enum { ANY_INT = 1, ANY_TENSOR = 7, CPU = 1, INT64 = 64 << 8 };

static void get(void *to, size_t size) {
  if (size && fread(to, 1, size, stdin) != size) exit(0);
}

static word number(void) {
  word value;
  get(&value, sizeof value);
  return value;
}

static word buffer(word size) {
  void *memory = aligned_alloc(64, (size + 127) / 64 * 64);
  get(memory, size);
  return (word)memory;
}

static word addresses(word count) {
  word *found = calloc(count + 1, sizeof(word));
  for (word i = 0; i < count; i++) found[i] = buffer(number());
  return (word)found;
}

int main(int count, char **arguments) {
  static word a[MOST], sizes[MOST], shapes[MOST][8];
  static Tensor tensors[MOST];
  static Any values[MOST], result;
  void *library = dlopen(arguments[count - 1], RTLD_NOW | RTLD_GLOBAL);
  if (!library) {
    fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  for (;;) {
    char name[256] = {0};
    get(name, number());
    void *function = dlsym(library, name);
    if (!function) {
      fprintf(stderr, "no %s\n", name);
      return 1;
    }
    word given = number(), code;
    for (word i = 0; i < given; i++) {
      word axes = 1, type = INT64;
      sizes[i] = number();
      values[i] = (Any){ANY_INT};
      if (sizes[i] == -1) {
        a[i] = values[i].value = number();
        continue;
      }
      if (sizes[i] == -2) { /* the process ends before they add up */
        shapes[i][0] = number();
        a[i] = addresses(shapes[i][0]);
      } else {
        a[i] = buffer(sizes[i]);
        axes = number();
        get(shapes[i], axes * sizeof(word));
        type = number();
      }
      tensors[i] = (Tensor){(void *)a[i], CPU, 0, (int32_t)axes, type & 255, type >> 8, 1, shapes[i], NULL, 0};
      values[i] = (Any){ANY_TENSOR, 0, (word)&tensors[i]};
    }
    if (!strncmp(name, "__tvm_ffi_", 10))
      code = ((int (*)(void *, Any *, int32_t, Any *))function)(NULL, values, given, &result);
    else
      code = ((int (*)())function)(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12],
                                   a[13], a[14], a[15], a[16], a[17], a[18], a[19], a[20], a[21], a[22], a[23]);
    fwrite(&code, sizeof code, 1, stdout);
    for (word i = 0; i < given; i++)
      if (sizes[i] >= 0) {
        fwrite((void *)a[i], 1, sizes[i], stdout);
        free((void *)a[i]);
      }
    fflush(stdout);
  }
}
