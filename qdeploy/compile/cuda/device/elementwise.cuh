// Element-wise operators over one or several activations, which are broadcast; a thread makes 4 codes of a pixel.

struct Strides {
  int image, h, w, c;  // bytes from one to the next, 0 where the operand is broadcast
};

template <int COUNT>
struct ElementArgs {
  const u8* x[COUNT];
  const float* quants[COUNT];
  const float* quant;
  u8* y;
  int pixels, height, width, words, pitch;
  Strides strides[COUNT];
  int is_signed[COUNT + 1];  // which operands, and last the output, are int8 in the file
};

// Compute: made of the arguments once a thread; code(codes of all operands) is called for each channel
template <int COUNT, class Compute>
__device__ __forceinline__ void elementwise(const ElementArgs<COUNT>& a) {
  int index = global_index(), word = index % a.words, pixel = index / a.words;
  if (pixel >= a.pixels) return;
  Compute compute(a);
  Pixel p = pixel_of(pixel, a.height, a.width);
  unsigned words[COUNT];
#pragma unroll
  for (int k = 0; k < COUNT; k++) {
    Strides s = a.strides[k];
    const u8* x = a.x[k] + p.n * s.image + p.h * s.h + p.w * s.w + word * 4 * s.c;
    bool whole = s.c == 1 && (s.image | s.h | s.w) % 4 == 0;
    words[k] = whole ? *(const unsigned*)x : word_of(x[0], x[s.c], x[2 * s.c], x[3 * s.c]);
  }
  int codes[4];
#pragma unroll
  for (int part = 0; part < 4; part++) {
    int values[COUNT];
#pragma unroll
    for (int k = 0; k < COUNT; k++) values[k] = byte_of(words[k], part);
    codes[part] = compute.code(values);
  }
  *(unsigned*)(a.y + pixel * a.pitch + word * 4) = word_of(codes[0], codes[1], codes[2], codes[3]);
}

// Operand 0 is a of docs/integers.md's Add
struct Add {
  Sum sum;
  __device__ __forceinline__ explicit Add(const ElementArgs<2>& a)
      : sum(make_sum(a.quants[0], a.quants[1], a.quant, a.is_signed[0], a.is_signed[1], a.is_signed[2])) {}
  __device__ __forceinline__ int code(const int* x) const { return sum(x[0], x[1]); }
};

struct Mul {
  Quant q;
  int zero_a, zero_b;
  float ratio, zero, shift;
  __device__ __forceinline__ explicit Mul(const ElementArgs<2>& a) : q(load_quant(a.quant)) {
    Quant qa = load_quant(a.quants[0]), qb = load_quant(a.quants[1]);
    zero_a = __float2int_rn(qa.zero), zero_b = __float2int_rn(qb.zero);
    ratio = __fdiv_rn(__fmul_rn(qa.scale, qb.scale), q.scale);
    shift = shift_of(a.is_signed[2]), zero = __fsub_rn(q.zero, shift);
  }
  __device__ __forceinline__ int code(const int* x) const {
    float product = __fmul_rn(__int2float_rn((x[0] - zero_a) * (x[1] - zero_b)), ratio);
    return rounded(__fadd_rn(product, zero), shift, q);
  }
};

struct TableArgs {
  const u8* x;
  const u8* table;
  u8* y;
  int pixels, words, pitch_x, pitch_y;
};

__device__ __forceinline__ void look_up(const TableArgs& a) {
  __shared__ u8 table[256];
  for (int i = (int)threadIdx.x; i < 256; i += (int)blockDim.x) table[i] = a.table[i];
  __syncthreads();
  int index = global_index(), word = index % a.words, pixel = index / a.words;
  if (pixel >= a.pixels) return;
  unsigned x = *(const unsigned*)(a.x + pixel * a.pitch_x + word * 4);
  *(unsigned*)(a.y + pixel * a.pitch_y + word * 4) =
      word_of(table[byte_of(x, 0)], table[byte_of(x, 1)], table[byte_of(x, 2)], table[byte_of(x, 3)]);
}

struct PartArgs {
  const u8* x;
  const float* quant_x;
  const float* quant;
  u8* y;
  int pixels, channels, start, plane, image_x, pitch_x, pitch_y;  // plane: pixels of an image
};

// One part of a concatenation, requantized, `start` channels behind the first; one code a thread
__device__ __forceinline__ void concat_part(const PartArgs& a) {
  int index = global_index(), pixel = index / a.channels, c = index % a.channels;
  if (pixel >= a.pixels) return;
  Quant q = load_quant(a.quant);
  int code = a.x[pixel / a.plane * a.image_x + pixel % a.plane * a.pitch_x + c];
  float steps = __fdiv_rn(real_of(code, load_quant(a.quant_x)), q.scale);
  a.y[pixel * a.pitch_y + a.start + c] = (u8)to_code(steps, q);
}
