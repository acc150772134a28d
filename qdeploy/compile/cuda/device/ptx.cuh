// What has no name in CUDA C++: PTX instructions. All inline assembly of the kernels is in this file.
// Fragments are those of the PTX ISA, "Matrix fragments for mma.m8n8k16 / mma.m16n8k32".

// c + sum of a.u8[i] * b.s8[i]
__device__ __forceinline__ int dot_u8s8(unsigned a, unsigned b, int c) {
  asm("dp4a.u32.s32 %0, %1, %2, %0;" : "+r"(c) : "r"(a), "r"(b));
  return c;
}

// c + sum of a.u8[i] * b.u8[i]
__device__ __forceinline__ int dot_u8u8(unsigned a, unsigned b, int c) {
  unsigned sum = (unsigned)c;
  asm("dp4a.u32.u32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
  return (int)sum;
}

// 8 x 16 uint8 times 16 x 8 int8, sm_72 and later
__device__ __forceinline__ void mma_m8n8k16(int& c0, int& c1, unsigned a, unsigned b) {
  asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+r"(c0), "+r"(c1)
      : "r"(a), "r"(b));
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
// 16 x 32 uint8 times 32 x 8 int8
__device__ __forceinline__ void mma_m16n8k32(int (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// Four 8 x 16 byte matrices from shared memory: lane l gives the address of row l % 8 of matrix l / 8, and gets bytes
// 4 * (l % 4) .. of row l / 4 of each.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&r)[4], const void* row) {
  unsigned address = (unsigned)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// The value of the lane whose number differs in the bits of `mask`
__device__ __forceinline__ int lane_xor(int value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// An entry point: `body`(arguments) in blocks of `threads`
#define KERNEL(name, Args, threads, ...)                                                   \
  extern "C" __global__ void __launch_bounds__(threads) name(const __grid_constant__ Args a) { \
    __VA_ARGS__(a);                                                                        \
  }
