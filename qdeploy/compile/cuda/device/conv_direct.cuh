// Convolutions that are no large matrix product: few pixels, depthwise, and groups whose channels fill no words.

// One output channel a warp, which divides the depth: reading the weights once is all the time that this takes.
template <int VEC>
__device__ __forceinline__ void conv_gemv(const ConvArgs& a) {
  int lane = (int)threadIdx.x % 32, channel = (int)(blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32);
  if (channel >= a.outputs) return;  // the whole warp
  int pixel = (int)blockIdx.y, depth = a.taps * a.tap_bytes, acc = 0, sum = 0;
  bool corrects = a.integers[2 * a.padded] != 0;
  Window at = window_of(a, pixel);
  unsigned fill = zero_word(a);
  for (int k = lane * VEC; k < depth; k += 32 * VEC) {
    int tap = k / a.tap_bytes, c = k - tap * a.tap_bytes, i = tap / a.kernel_w, j = tap - i * a.kernel_w;
    int offset = tap_offset(a, at, i, j);
    union Words {
      typename Bytes<VEC>::type vector;
      unsigned word[VEC / 4];
    } x, w;
    x.vector = offset >= 0 ? *(const typename Bytes<VEC>::type*)(a.x + offset + c) : Bytes<VEC>::splat(fill);
    w.vector = *(const typename Bytes<VEC>::type*)(a.w + channel * depth + k);
#pragma unroll
    for (int part = 0; part < VEC / 4; part++) {
      acc = dot_u8s8(x.word[part], w.word[part], acc);
      if (corrects) sum = dot_u8u8(x.word[part], ones(a.inputs - c - part * 4), sum);
    }
  }
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    acc += lane_xor(acc, mask);
    sum += lane_xor(sum, mask);
  }
  if (lane == 0) {
    acc += a.integers[channel] - a.integers[a.padded + channel] * sum;
    int own = requantized(acc, a.scale[channel], load_quant(a.quant)), offset = pixel * a.pitch_y + channel;
    a.y[offset] = (u8)finish_code(a, make_then(a), own, offset);
  }
}

// 4 channels of 4 neighbouring columns a thread
__device__ __forceinline__ void conv_depthwise(const ConvArgs& a) {
  int words = (a.padded + 3) / 4, runs = (a.out_w + 3) / 4, index = global_index();
  int word = index % words, run = index / words, first = run % runs * 4, line = run / runs;
  if (line >= a.pixels / a.out_w) return;
  int begin = line * a.out_w + first, count = min(4, a.out_w - first);
  int zeros[4], acc[4][4];
#pragma unroll
  for (int c = 0; c < 4; c++) {
    zeros[c] = a.integers[a.padded + word * 4 + c];
#pragma unroll
    for (int p = 0; p < 4; p++) acc[p][c] = a.integers[word * 4 + c];
  }
  Window at = window_of(a, begin);
  unsigned fill = zero_word(a);
  for (int tap = 0; tap < a.taps; tap++) {
    int i = tap / a.kernel_w, j = tap - i * a.kernel_w;
    unsigned weights = *(const unsigned*)(a.w + (word * a.taps + tap) * 4);
    int w[4];
#pragma unroll
    for (int c = 0; c < 4; c++) w[c] = signed_byte_of(weights, c) - zeros[c];
#pragma unroll
    for (int p = 0; p < 4; p++) {
      Window pixel = Window{at.image, at.h, at.w + p * a.stride_w};
      int offset = tap_offset(a, pixel, i, j);
      unsigned x = offset >= 0 ? *(const unsigned*)(a.x + offset + word * 4) : fill;
#pragma unroll
      for (int c = 0; c < 4; c++) acc[p][c] += byte_of(x, c) * w[c];
    }
  }
  Quant q = load_quant(a.quant);
  Then then = make_then(a);
#pragma unroll
  for (int p = 0; p < 4; p++) {
    if (p >= count) break;
    int own[4];
#pragma unroll
    for (int c = 0; c < 4; c++) own[c] = requantized(acc[p][c], a.scale[word * 4 + c], q);
    int offset = (begin + p) * a.pitch_y + word * 4;
    *(unsigned*)(a.y + offset) = finish_word(a, then, a.table, word_of(own[0], own[1], own[2], own[3]), offset);
  }
}

// One output code a thread: any groups
__device__ __forceinline__ void conv_grouped(const ConvArgs& a) {
  int channels = a.groups * a.outputs, index = global_index(), channel = index % channels, pixel = index / channels;
  if (pixel >= a.pixels) return;
  int from = channel / a.outputs * a.inputs, zero = a.integers[a.padded + channel], acc = a.integers[channel];
  Window at = window_of(a, pixel);
  int fill = byte_of(zero_word(a), 0);
  for (int tap = 0; tap < a.taps; tap++) {
    int i = tap / a.kernel_w, offset = tap_offset(a, at, i, tap - i * a.kernel_w);
    const s8* w = a.w + (channel * a.taps + tap) * a.tap_bytes;
    for (int c = 0; c < a.inputs; c++) acc += (offset >= 0 ? a.x[offset + from + c] : fill) * (w[c] - zero);
  }
  int own = requantized(acc, a.scale[channel], load_quant(a.quant)), offset = pixel * a.pitch_y + channel;
  a.y[offset] = (u8)finish_code(a, make_then(a), own, offset);
}
