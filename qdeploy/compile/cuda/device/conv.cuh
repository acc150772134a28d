// What all convolution kernels share: their arguments, the window, and the way from sums to stored codes.
// Activations are [image][h][w][pitch] uint8, a pixel's channels first, bytes behind them never looked at. Weights are
// int8 [group][output][tap][tap_bytes] (depthwise: [4 channels][tap][4]), packed by pack_weights.py with one lane.
// The sum of q_x * q_w lacks what `integers` holds: bias - z_x * sum(q_w - z_w), then z_w, then whether any z_w is not
// 0 or a sum times its scale may leave int32 (which needs nothing here: rounding is in float32).

enum { THEN_NOTHING = 0, THEN_TABLE = 1, THEN_ADD = 2 };

struct ConvArgs {
  const u8* x;
  const s8* w;
  const int* integers;
  const float* scale;
  const float* quant_x;
  const float* quant;  // the convolution's own
  const u8* table;     // THEN_TABLE
  const u8* other;     // THEN_ADD: codes of y's shape and pitch
  const float* quant_a;
  const float* quant_b;
  const float* quant_y;
  u8* y;
  int pixels, out_h, out_w, in_h, in_w, pitch_x, pitch_y;
  int kernel_w, taps, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int tap_bytes, inputs, outputs, groups, padded;  // inputs and outputs of a group; padded: of the per-channel arrays
  int then, first, signed_a, signed_b, signed_y;   // first: the convolution is operand a of the sum
};

// The type of VEC neighbouring bytes that are loaded at once
template <int VEC>
struct Bytes;
template <>
struct Bytes<4> {
  typedef unsigned type;
  static __device__ __forceinline__ unsigned splat(unsigned word) { return word; }
};
template <>
struct Bytes<16> {
  typedef uint4 type;
  static __device__ __forceinline__ uint4 splat(unsigned word) { return make_uint4(word, word, word, word); }
};

// Where an output pixel's window begins
struct Window {
  int image, h, w;
};

__device__ __forceinline__ Window window_of(const ConvArgs& a, int pixel) {
  Pixel p = pixel_of(pixel, a.out_h, a.out_w);
  return Window{p.n * a.in_h * a.in_w, p.h * a.stride_h - a.pad_top, p.w * a.stride_w - a.pad_left};
}

// Offset of channel 0 of what tap (i, j) sees, or -1 outside the image, where the codes are the zero point
__device__ __forceinline__ int tap_offset(const ConvArgs& a, const Window& at, int i, int j) {
  int h = at.h + i * a.dilation_h, w = at.w + j * a.dilation_w;
  bool inside = (unsigned)h < (unsigned)a.in_h && (unsigned)w < (unsigned)a.in_w;
  return inside ? (at.image + h * a.in_w + w) * a.pitch_x : -1;
}

__device__ __forceinline__ unsigned zero_word(const ConvArgs& a) {
  return 0x01010101u * (unsigned)__float2int_rn(a.quant_x[1]);
}

// An int32 sum, complete -> the convolution's own code
__device__ __forceinline__ int requantized(int acc, float scale, const Quant& q) {
  return to_code(__fmul_rn(__int2float_rn(acc), scale), q);
}

// What is done to own codes before they are stored
struct Then {
  int kind, first;
  Sum sum;

  __device__ __forceinline__ int operator()(int own, int other) const {
    return first ? sum(own, other) : sum(other, own);
  }
};

__device__ __forceinline__ Then make_then(const ConvArgs& a) {
  Then then;
  then.kind = a.then, then.first = a.first;
  if (a.then == THEN_ADD) {
    then.sum = make_sum(a.quant_a, a.quant_b, a.quant_y, a.signed_a, a.signed_b, a.signed_y);
  }
  return then;
}

// 4 own codes of neighbouring channels -> what is stored at `offset`
__device__ __forceinline__ unsigned finish_word(const ConvArgs& a, const Then& then, const u8* table, unsigned own,
                                                int offset) {
  if (then.kind == THEN_TABLE) {
    return word_of(table[byte_of(own, 0)], table[byte_of(own, 1)], table[byte_of(own, 2)], table[byte_of(own, 3)]);
  }
  if (then.kind == THEN_ADD) {
    unsigned other = *(const unsigned*)(a.other + offset);
    return word_of(then(byte_of(own, 0), byte_of(other, 0)), then(byte_of(own, 1), byte_of(other, 1)),
                   then(byte_of(own, 2), byte_of(other, 2)), then(byte_of(own, 3), byte_of(other, 3)));
  }
  return own;
}

__device__ __forceinline__ int finish_code(const ConvArgs& a, const Then& then, int own, int offset) {
  if (then.kind == THEN_TABLE) return a.table[own];
  return then.kind == THEN_ADD ? then(own, a.other[offset]) : own;
}
