// Codes, quantizers and the rounding of docs/integers.md; every float32 operation rounds once, in the order written.
typedef unsigned char u8;
typedef signed char s8;

struct Quant {
  float scale, zero, low, high;  // in uint8 codes; pack.py writes them
};

__device__ __forceinline__ Quant load_quant(const float* q) { return Quant{q[0], q[1], q[2], q[3]}; }

__device__ __forceinline__ float real_of(int code, const Quant& q) {
  return __fmul_rn(__int2float_rn(code - __float2int_rn(q.zero)), q.scale);
}

// clamp(rne(steps) + shift): steps in units of the scale, without the zero point, or with it as the file counts it
__device__ __forceinline__ int rounded(float steps, float shift, const Quant& q) {
  return __float2int_rn(fminf(fmaxf(__fadd_rn(rintf(steps), shift), q.low), q.high));
}

__device__ __forceinline__ int to_code(float steps, const Quant& q) { return rounded(steps, q.zero, q); }

// int8 codes of the file are 128 less than those in memory
__device__ __forceinline__ float shift_of(int is_signed) { return is_signed ? 128.0f : 0.0f; }

// Add of docs/integers.md: fma(a, ratio_a, fma(b, ratio_b, offset)), codes as the file counts them
struct Sum {
  float ratio_a, ratio_b, offset, shift_a, shift_b, shift;
  Quant y;

  __device__ __forceinline__ int operator()(int a, int b) const {
    float inner = __fmaf_rn(__fsub_rn(__int2float_rn(b), shift_b), ratio_b, offset);
    return rounded(__fmaf_rn(__fsub_rn(__int2float_rn(a), shift_a), ratio_a, inner), shift, y);
  }
};

__device__ __forceinline__ Sum make_sum(const float* a, const float* b, const float* y, int signed_a, int signed_b,
                                        int signed_y) {
  Quant qa = load_quant(a), qb = load_quant(b), qy = load_quant(y);
  Sum s;
  s.shift_a = shift_of(signed_a), s.shift_b = shift_of(signed_b), s.shift = shift_of(signed_y);
  s.ratio_a = __fdiv_rn(qa.scale, qy.scale), s.ratio_b = __fdiv_rn(qb.scale, qy.scale);
  float zero_b = __fmul_rn(s.ratio_b, __fsub_rn(qb.zero, s.shift_b));
  s.offset = __fsub_rn(__fsub_rn(qy.zero, s.shift), __fmaf_rn(s.ratio_a, __fsub_rn(qa.zero, s.shift_a), zero_b));
  s.y = qy;
  return s;
}

__device__ __forceinline__ int byte_of(unsigned word, int i) { return (int)((word >> (8 * i)) & 255u); }

__device__ __forceinline__ int signed_byte_of(unsigned word, int i) { return (int)(s8)((word >> (8 * i)) & 255u); }

__device__ __forceinline__ unsigned word_of(int a, int b, int c, int d) {
  return (unsigned)a | (unsigned)b << 8 | (unsigned)c << 16 | (unsigned)d << 24;
}

// 1 in each of the first `count` bytes
__device__ __forceinline__ unsigned ones(int count) {
  return count >= 4 ? 0x01010101u : count <= 0 ? 0u : 0x01010101u >> (8 * (4 - count));
}

__device__ __forceinline__ int floor_div(int a, int b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }

// Number of this thread among all of the grid, x only
__device__ __forceinline__ int global_index() { return (int)(blockIdx.x * blockDim.x + threadIdx.x); }

// Image, row and column of a pixel of a batch
struct Pixel {
  int n, h, w;
};

__device__ __forceinline__ Pixel pixel_of(int index, int height, int width) {
  int row = index / width;
  return Pixel{row / height, row % height, index % width};
}
