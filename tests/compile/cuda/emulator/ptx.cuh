// The twin of device/ptx.cuh for the host's compiler: CUDA's names, blocks of threads as fibers, and instructions that
// exchange values in a warp, each from the register layout that the PTX ISA gives.
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
using std::max;
using std::min;

struct uint3 {
  unsigned x, y, z;
};
struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return uint4{x, y, z, w}; }

static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __int2float_rn(int a) { return (float)a; }
static inline int __float2int_rn(float a) { return (int)rintf(a); }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __ddiv_rn(double a, double b) { return a / b; }
static inline float __double2float_rn(double a) { return (float)a; }
static inline float __uint_as_float(unsigned a) {
  float f;
  memcpy(&f, &a, sizeof(f));
  return f;
}

namespace emulator {

enum { WARP = 32, STACK = 128 << 10 };

struct Barrier {
  int count = 0, turn = 0;
};

struct Warp {
  Barrier barrier;
  int alive = 0, calls = 0;
  unsigned words[2][WARP][8];
  const void* rows[2][WARP];
};

struct Fiber {
  ucontext_t context;
  jmp_buf state;
  bool begun = false, done = false;
  int calls = 0;  // collectives so far: lanes of a warp must agree
  uint3 thread;
};

static std::vector<Fiber> fibers;
static std::vector<Warp> warps;
static std::vector<char> stacks;
static Barrier block;
static int current, alive;
static jmp_buf scheduler;
static uint3 block_index, block_size;
static void (*entry)(const void*);
static const void* arguments;

static inline void yield() {
  if (_setjmp(fibers[current].state) == 0) _longjmp(scheduler, 1);
}

// Wait until `members` have come
static inline void wait(Barrier& barrier, const int& members) {
  int turn = barrier.turn;
  barrier.count++;
  while (barrier.turn == turn) {
    if (barrier.count >= members) {
      barrier.count = 0, barrier.turn++;
    } else {
      yield();
    }
  }
}

static void begin() {
  entry(arguments);
  Fiber& fiber = fibers[current];
  fiber.done = true;
  alive--;
  warps[current / WARP].alive--;
  _longjmp(scheduler, 1);
}

static void run_block(unsigned threads) {
  fibers.assign(threads, Fiber());
  warps.assign((threads + WARP - 1) / WARP, Warp());
  stacks.resize((size_t)threads * STACK);
  block = Barrier(), alive = (int)threads;
  for (unsigned i = 0; i < threads; i++) {
    fibers[i].thread = uint3{i, 0, 0};
    warps[i / WARP].alive++;
  }
  while (alive > 0) {
    for (current = 0; current < (int)threads; current++) {
      Fiber& fiber = fibers[current];
      if (fiber.done || _setjmp(scheduler) != 0) continue;
      if (fiber.begun) _longjmp(fiber.state, 1);
      fiber.begun = true;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = stacks.data() + (size_t)current * STACK;
      fiber.context.uc_stack.ss_size = STACK;
      makecontext(&fiber.context, begin, 0);
      setcontext(&fiber.context);
    }
  }
}

static void run(void (*body)(const void*), const void* args, const unsigned* grid, unsigned threads) {
  entry = body, arguments = args, block_size = uint3{threads, 1, 1};
  for (unsigned z = 0; z < grid[2]; z++) {
    for (unsigned y = 0; y < grid[1]; y++) {
      for (unsigned x = 0; x < grid[0]; x++) {
        block_index = uint3{x, y, z};
        run_block(threads);
      }
    }
  }
}

// A collective of the warp: where this lane may write what others read after `meet`
struct Collective {
  Warp& warp;
  int lane, side;
  Collective() : warp(warps[current / WARP]), lane(current % WARP), side(fibers[current].calls++ % 2) {
    if (warp.alive != WARP) {
      fprintf(stderr, "a warp with %d lanes exchanges values\n", warp.alive);
      abort();
    }
  }
  void meet() { wait(warp.barrier, warp.alive); }
};

}  // namespace emulator

#define threadIdx (emulator::fibers[emulator::current].thread)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
static inline void __syncthreads() { emulator::wait(emulator::block, emulator::alive); }

static inline int lane_xor(int value, int mask) {
  emulator::Collective all;
  all.warp.words[all.side][all.lane][0] = (unsigned)value;
  all.meet();
  return (int)all.warp.words[all.side][all.lane ^ mask][0];
}

static inline int emulated_byte(unsigned word, int i) { return (int)(word >> 8 * i & 255); }

static inline int dot_u8s8(unsigned a, unsigned b, int c) {
  for (int i = 0; i < 4; i++) c += emulated_byte(a, i) * (signed char)emulated_byte(b, i);
  return c;
}

static inline int dot_u8u8(unsigned a, unsigned b, int c) {
  for (int i = 0; i < 4; i++) c += emulated_byte(a, i) * emulated_byte(b, i);
  return c;
}

// Lane l holds A[l / 4][4 * (l % 4) ..], B[4 * (l % 4) ..][l / 4] and C[l / 4][2 * (l % 4) ..]
static inline void mma_m8n8k16(int& c0, int& c1, unsigned a, unsigned b) {
  emulator::Collective all;
  all.warp.words[all.side][all.lane][0] = a, all.warp.words[all.side][all.lane][1] = b;
  all.meet();
  auto& words = all.warp.words[all.side];
  for (int part = 0; part < 4; part++) {
    unsigned x = words[all.lane / 4 * 4 + part][0];
    c0 = dot_u8s8(x, words[all.lane % 4 * 2 * 4 + part][1], c0);
    c1 = dot_u8s8(x, words[(all.lane % 4 * 2 + 1) * 4 + part][1], c1);
  }
}

// With g = l / 4, t = l % 4: a0 A[g][4t ..], a1 A[g + 8][4t ..], a2 A[g][16 + 4t ..], a3 A[g + 8][16 + 4t ..];
// b0 B[4t ..][g], b1 B[16 + 4t ..][g]; c0, c1 C[g][2t ..], c2, c3 C[g + 8][2t ..]
static inline void mma_m16n8k32(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  emulator::Collective all;
  auto& words = all.warp.words[all.side];
  for (int i = 0; i < 6; i++) words[all.lane][i] = i < 4 ? a[i] : b[i - 4];
  all.meet();
  for (int i = 0; i < 4; i++) {
    int column = all.lane % 4 * 2 + i % 2;
    for (int k = 0; k < 8; k++) {  // words of the depth
      unsigned x = words[all.lane / 4 * 4 + k % 4][i / 2 + k / 4 * 2];
      c[i] = dot_u8s8(x, words[column * 4 + k % 4][4 + k / 4], c[i]);
    }
  }
}

static inline void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  if ((size_t)row % 16 != 0) {
    fprintf(stderr, "ldmatrix from an address that is not aligned to 16 bytes\n");
    abort();
  }
  emulator::Collective all;
  all.warp.rows[all.side][all.lane] = row;
  all.meet();
  for (int i = 0; i < 4; i++) {
    memcpy(&r[i], (const char*)all.warp.rows[all.side][i * 8 + all.lane / 4] + all.lane % 4 * 4, 4);
  }
}

// name(arguments, grid, threads)
#define KERNEL(name, Args, threads, ...)                                                           \
  static void name##_body(const void* args) { __VA_ARGS__(*(const Args*)args); }                   \
  extern "C" int name(const void* args, const unsigned* grid, unsigned block) {                    \
    if (block > threads) return 1;                                                                 \
    emulator::run(name##_body, args, grid, block);                                                 \
    return 0;                                                                                      \
  }
