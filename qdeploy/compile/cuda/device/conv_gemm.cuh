// Convolution as an implicit matrix product on tensor cores: rows are output pixels, columns output channels, and the
// depth is [tap][channel]. A block has WM x WN x WK warps; each computes 32 x 32 sums, and WK of them share a tile and
// divide its depth. Operands go through registers into one of two stages of shared memory while the other is
// multiplied. A row of a stage is BK + 16 bytes, an odd number of 16-byte units, so ldmatrix meets no bank twice.

template <int WM, int WN, int WK, int VEC>
struct Gemm {
  static constexpr int BM = 32 * WM, BN = 32 * WN, THREADS = 32 * WM * WN * WK;
  static constexpr int BK = WK == 1 ? 64 : 32 * WK, ROW = BK + 16, STAGE = (BM + BN) * ROW;
  static constexpr int PER_ROW = BK / VEC, STEP = THREADS / PER_ROW, ROWS_A = BM / STEP, ROWS_B = BN / STEP;
  static constexpr int OUT = BN + 4;  // bytes of a row of finished codes
  typedef typename Bytes<VEC>::type Vec;

  const ConvArgs& a;
  u8* shared;
  int m0, n0, group, depth, row, column, wm, wn, wk, lane;
  unsigned fill;
  bool corrects;  // some weight has a zero point, so sums of the input's codes are needed
  Window windows[ROWS_A];
  Vec next_a[ROWS_A], next_b[ROWS_B];
  int acc[2][4][4], sums[2][2];

  __device__ __forceinline__ Gemm(const ConvArgs& args, u8* memory) : a(args), shared(memory) {
    int tid = (int)threadIdx.x, warp = tid / 32;
    lane = tid % 32, wn = warp % WN, wm = warp / WN % WM, wk = warp / (WN * WM);
    m0 = (int)blockIdx.x * BM, n0 = (int)blockIdx.y * BN, group = (int)blockIdx.z;
    row = tid / PER_ROW, column = tid % PER_ROW * VEC;
    depth = a.taps * a.tap_bytes, fill = zero_word(a), corrects = a.integers[2 * a.padded] != 0;
#pragma unroll
    for (int i = 0; i < ROWS_A; i++) {
      int pixel = m0 + row + i * STEP;
      windows[i] = pixel < a.pixels ? window_of(a, pixel) : Window{0, -(1 << 28), 0};
    }
#pragma unroll
    for (int i = 0; i < 32; i++) acc[i / 16][i / 4 % 4][i % 4] = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) sums[i / 2][i % 2] = 0;
  }

  // Global memory -> registers: depth k0 .. k0 + BK - 1
  __device__ __forceinline__ void fetch(int k0) {
    int k = k0 + column, tap = k / a.tap_bytes, c = k - tap * a.tap_bytes;
    int i = tap / a.kernel_w, j = tap - i * a.kernel_w;
#pragma unroll
    for (int r = 0; r < ROWS_A; r++) {
      int offset = k < depth ? tap_offset(a, windows[r], i, j) : -1;
      next_a[r] = offset >= 0 ? *(const Vec*)(a.x + offset + group * a.inputs + c)
                              : Bytes<VEC>::splat(k < depth ? fill : 0u);
    }
#pragma unroll
    for (int r = 0; r < ROWS_B; r++) {
      int n = n0 + row + r * STEP;
      next_b[r] = k < depth && n < a.outputs ? *(const Vec*)(a.w + (group * a.outputs + n) * depth + k)
                                             : Bytes<VEC>::splat(0u);
    }
  }

  // Registers -> a stage
  __device__ __forceinline__ void put(int stage) {
    u8* to = shared + stage * STAGE + row * ROW + column;
#pragma unroll
    for (int r = 0; r < ROWS_A; r++) *(Vec*)(to + r * STEP * ROW) = next_a[r];
#pragma unroll
    for (int r = 0; r < ROWS_B; r++) *(Vec*)(to + (BM + r * STEP) * ROW) = next_b[r];
  }

  // A 16 x 32 by 32 x 8 product
  static __device__ __forceinline__ void multiply(int (&c)[4], const unsigned (&x)[4], const unsigned (&w)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    mma_m16n8k32(c, x, w);
#else
    mma_m8n8k16(c[0], c[1], x[0], w[0]);
    mma_m8n8k16(c[2], c[3], x[1], w[0]);
    mma_m8n8k16(c[0], c[1], x[2], w[1]);
    mma_m8n8k16(c[2], c[3], x[3], w[1]);
#endif
  }

  // Multiply a stage; it holds the depth from k0 on
  __device__ __forceinline__ void compute(int stage, int k0) {
    const u8* rows_a = shared + stage * STAGE + (wm * 32 + lane % 16) * ROW + lane / 16 * 16;
    const u8* rows_b = shared + stage * STAGE + (BM + wn * 32 + lane % 8 + lane / 16 * 8) * ROW + lane / 8 % 2 * 16;
#pragma unroll
    for (int kk = 0; kk < BK / 32 / WK; kk++) {
      int k = (kk * WK + wk) * 32;
      unsigned x[2][4], w[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        ldmatrix_x4(x[i], rows_a + i * 16 * ROW + k);
        ldmatrix_x4(w[i], rows_b + i * 16 * ROW + k);
      }
#pragma unroll
      for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const unsigned pair[2] = {w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]};
          multiply(acc[i][j], x[i], pair);
        }
      }
      if (corrects) add_up(x, k0 + k);
    }
  }

  // Sums of the codes of each row, without the bytes behind a pixel's channels
  __device__ __forceinline__ void add_up(const unsigned (&x)[2][4], int k0) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      unsigned valid = ones(a.inputs - (k0 + half * 16 + lane % 4 * 4) % a.tap_bytes);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        sums[i][0] = dot_u8u8(x[i][half * 2], valid, sums[i][0]);
        sums[i][1] = dot_u8u8(x[i][half * 2 + 1], valid, sums[i][1]);
      }
    }
  }

  // Sums of the warps that share a tile -> the first of them
  __device__ __forceinline__ void gather() {
    int* memory = (int*)shared;
    if (WK > 1) {
      if (wk > 0) {
#pragma unroll
        for (int i = 0; i < 36; i++) {
          int value = i < 32 ? acc[i / 16][i / 4 % 4][i % 4] : sums[(i - 32) / 2 % 2][i % 2];
          memory[(((wk - 1) * WM * WN + wm * WN + wn) * 36 + i) * 32 + lane] = value;
        }
      }
      __syncthreads();
      if (wk == 0) {
        for (int other = 0; other < WK - 1; other++) {
#pragma unroll
          for (int i = 0; i < 36; i++) {
            int value = memory[((other * WM * WN + wm * WN + wn) * 36 + i) * 32 + lane];
            if (i < 32) acc[i / 16][i / 4 % 4][i % 4] += value;
            else sums[(i - 32) / 2 % 2][i % 2] += value;
          }
        }
      }
      __syncthreads();
    }
  }

  // int32 sums -> own codes in shared memory
  __device__ __forceinline__ void requantize() {
    Quant q = load_quant(a.quant);
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int half = 0; half < 2; half++) {  // the 4 lanes of a row hold parts of its sum
        sums[i][half] += lane_xor(sums[i][half], 1);
        sums[i][half] += lane_xor(sums[i][half], 2);
      }
    }
    if (wk > 0) return;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      int column_y = wn * 32 + j * 8 + lane % 4 * 2, bias[2], zero[2];
      float scale[2];
#pragma unroll
      for (int side = 0; side < 2; side++) {
        int n = n0 + column_y + side, channel = group * a.outputs + n;
        bool valid = n < a.outputs;
        bias[side] = valid ? a.integers[channel] : 0, zero[side] = valid ? a.integers[a.padded + channel] : 0;
        scale[side] = valid ? a.scale[channel] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int codes[2];
#pragma unroll
        for (int side = 0; side < 2; side++) {
          int sum = acc[i / 2][j][i % 2 * 2 + side] + bias[side] - zero[side] * sums[i / 2][i % 2];
          codes[side] = requantized(sum, scale[side], q);
        }
        u8* to = shared + (wm * 32 + i * 8 + lane / 4) * OUT + column_y;
        *(unsigned short*)to = (unsigned short)(codes[0] | codes[1] << 8);
      }
    }
  }

  // Own codes -> what is stored
  __device__ __forceinline__ void store(const u8* table) {
    Then then = make_then(a);
    int end = a.groups == 1 ? a.pitch_y : a.outputs;
    for (int i = (int)threadIdx.x; i < BM * (BN / 4); i += THREADS) {
      int r = i / (BN / 4), c = i % (BN / 4) * 4, offset = (m0 + r) * a.pitch_y + group * a.outputs + n0 + c;
      if (m0 + r < a.pixels && n0 + c < end) {
        *(unsigned*)(a.y + offset) = finish_word(a, then, table, *(const unsigned*)(shared + r * OUT + c), offset);
      }
    }
  }
};

template <int WM, int WN, int WK, int VEC>
__device__ __forceinline__ void conv_gemm(const ConvArgs& a) {
  typedef Gemm<WM, WN, WK, VEC> Tile;
  constexpr int GATHER = (WK - 1) * WM * WN * 36 * 32 * 4;
  __shared__ __align__(16) u8 shared[2 * Tile::STAGE > GATHER ? 2 * Tile::STAGE : GATHER];
  __shared__ u8 table[256];
  if (a.then == THEN_TABLE) {
    for (int i = (int)threadIdx.x; i < 256; i += Tile::THREADS) table[i] = a.table[i];
  }
  Tile tile(a, shared);
  int steps = (tile.depth + Tile::BK - 1) / Tile::BK;
  tile.fetch(0);
  tile.put(0);
  __syncthreads();
  for (int step = 0; step < steps; step++) {
    bool more = step + 1 < steps;
    if (more) tile.fetch((step + 1) * Tile::BK);
    tile.compute(step % 2, step * Tile::BK);
    if (more) tile.put((step + 1) % 2);
    __syncthreads();
  }
  tile.gather();
  tile.requantize();
  __syncthreads();
  tile.store(table);
}
