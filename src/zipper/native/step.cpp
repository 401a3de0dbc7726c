// A step of a zip on a CPU: a few tokens of a few sequences through blocks and links, in one parallel region.
//
// A step of one token reads every weight once, so it should take as long as memory takes to give them. Each thread walks along
// whole rows of a matrix, and all tokens meet a row while it is in a register. The sum behind a number has the same order however
// many tokens and threads there are: what a sequence gets does not depend on its company, to the bit.
//
// Everything between matrices is float32. Structures here are those of native/__init__.py, field by field.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int N = 16;  // numbers in a register
#elif defined __AVX2__
constexpr int N = 8;
#else
constexpr int N = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * N)));
typedef uint32_t Words __attribute__((vector_size(4 * N)));

constexpr int PAD = 32;      // rows of weights are padded to a multiple of this
constexpr int CHUNK = 8;     // rows that a thread takes at once
constexpr int AHEAD = 2048;  // bytes that a row is fetched ahead

struct Matrix {
  const void* weight;  // out rows of `stride` numbers: float32 (kind 0), bfloat16 (1), int8 (2)
  const float* scale;  // of a row, or null
  const float* bias;   // or null
  int32_t kind, out, in, stride;
};

struct Norm {
  const float* weight;  // null: none
  const float* bias;    // null: root mean square (arXiv:1910.07467), else layer norm
  float eps;
};

struct Block {
  Norm norm, second, query, key;
  Matrix qkv, out, gate_up, down;
  int32_t heads, key_heads, head_width;
  float scale;
};

struct Link {
  Norm norm, second;
  Matrix query, out, up, down;  // up.weight null: no feed-forward
  int32_t heads, head_width;
};

struct Input {  // between embeddings and the first block
  const Matrix* layers;
  int32_t depth, residual;  // h + MLP(h), else ReLU(MLP(h))
};

struct Token {  // of a sequence
  void* cache;  // layers, keys and values, key heads, room, head width
  int64_t room, past;
};

struct Memory {  // what a token sees through a link: heads, slots, head width
  const void *keys, *values;
  int64_t slots;
};

struct Stage {  // one of the first four, in the order of the tower
  const Input* input;
  const Block* block;
  const Link* link;
  float* keep;             // where the states go that other towers will read
  const Memory* memory;    // of a link: for each token
  const float *cos, *sin;  // of a link: positions, head width; null: none
  int32_t layer;           // of a block: where its keys go
  int32_t last;            // of a link: no other is read at this junction
  int32_t half;            // of a link: its memory is bfloat16, else float32
};

struct Call {
  const Stage* stages;
  const Token* tokens;
  const int32_t* spoken;   // tokens that get logits
  const float *cos, *sin;  // of blocks: positions, head width
  float *states, *logits;
  Norm norm;
  Matrix head;
  int32_t n_stages, n_tokens, n_spoken, width, threads;
  int32_t half;  // caches are bfloat16, else float32
};

// --- one row of a matrix and some tokens ---

inline Lanes lanes(Words bits) {
  Lanes value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline Lanes load(const float* p) {
  Lanes value;
  memcpy(&value, p, sizeof value);
  return value;
}

inline Lanes load(const uint16_t* p) {  // bfloat16
  typedef uint16_t Halves __attribute__((vector_size(2 * N)));
  Halves value;
  memcpy(&value, p, sizeof value);
  return lanes(__builtin_convertvector(value, Words) << 16);
}

// a b + c, by name: where GCC may choose, it does so by how many tokens there are, and sums differ in their last bits.
inline Lanes fused(Lanes a, Lanes b, Lanes c) {
#ifdef __AVX512F__
  return (Lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined __AVX2__ && defined __FMA__
  return (Lanes)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline float number(float x) { return x; }
inline float number(uint16_t x) {
  uint32_t bits = (uint32_t)x << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline void put(float x, float* to) { *to = x; }
inline void put(float x, uint16_t* to) {  // to the nearest, of two the even one
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  *to = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline float sum(Lanes v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)v);
#else
  typedef float Four __attribute__((vector_size(16)));
  Four part[N / 4];
  memcpy(part, &v, sizeof v);
  for (int i = 1; i < N / 4; i++) part[0] += part[i];
  return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
#endif
}

// e^x for x <= 0 and somewhat above (Cephes): 2^n by the exponent's bits, the rest by a polynomial. NaN stays NaN.
inline Lanes exponential(Lanes x) {
  x = x < -87.f ? Lanes{} - 87.f : x > 88.f ? Lanes{} + 88.f : x;
  const float shift = 12582912.f;  // 1.5 x 2^23: what is added to it is rounded to a whole number, in its last bits
  Lanes n = x * 1.44269504f + shift;
  Words bits;
  memcpy(&bits, &n, sizeof bits);
  n -= shift;
  x = x - n * 0.693359375f + n * 2.12194440e-4f;
  Lanes y = ((((x * 1.9875691500e-4f + 1.3981999507e-3f) * x + 8.3334519073e-3f) * x + 4.1665795894e-2f) * x + 1.6666665459e-1f) * x;
  return ((y + 5.0000001201e-1f) * x * x + x + 1.f) * lanes((bits << 23) + 0x3f800000u);
}

// What PAD numbers of a row add to a sum. X: the form in which tokens are laid out for it.
struct F32 {
  typedef float W;
  typedef float X;
  struct Row {
    Lanes part[PAD / N];
  };
  static Row row(const W* w) {
    Row found;
    for (int i = 0; i < PAD / N; i++) found.part[i] = load(w + i * N);
    return found;
  }
  static Lanes add(Lanes sum, const Row& w, const X* x) {
    for (int i = 0; i < PAD / N; i++) sum = fused(w.part[i], load(x + i * N), sum);
    return sum;
  }
  static void lay(const float* from, X* to) { memcpy(to, from, PAD * sizeof(float)); }
};

struct I8 : F32 {
  typedef int8_t W;
  static Row row(const W* w) {  // GCC's own conversion goes number by number
    Row found;
    for (int i = 0; i < PAD / N; i++) {
#ifdef __AVX512F__
      found.part[i] = (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(w + i * N))));
#elif defined __AVX2__
      found.part[i] = (Lanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(w + i * N))));
#else
      for (int j = 0; j < N; j++) found.part[i][j] = w[i * N + j];
#endif
    }
    return found;
  }
};

#ifdef __AVX512BF16__
struct B16 {
  typedef uint16_t W;
  typedef uint16_t X;
  typedef __m512bh Row;
  static Row row(const W* w) { return (__m512bh)_mm512_loadu_si512(w); }
  static Lanes add(Lanes sum, const Row& w, const X* x) {
    return (Lanes)_mm512_dpbf16_ps((__m512)sum, w, (__m512bh)_mm512_loadu_si512(x));
  }
  static void lay(const float* from, X* to) {
    __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
    memcpy(to, &both, sizeof both);
  }
};
#else
struct B16 : F32 {  // the first of two numbers is the lower half of a word: tokens are laid out evens first
  typedef uint16_t W;
  static Row row(const W* w) {
    Row found;
    for (int i = 0; i < PAD / N; i += 2) {
      Words bits;
      memcpy(&bits, w + i * N, sizeof bits);
      found.part[i] = lanes(bits << 16);
      found.part[i + 1] = lanes(bits & 0xffff0000u);
    }
    return found;
  }
  static void lay(const float* from, X* to) {
    for (int i = 0; i < PAD; i++) to[i / (2 * N) * (2 * N) + i % (2 * N) / 2 + (i & 1) * N] = from[i];
  }
};
#endif

// One row and T tokens; rows one after another, as memory gives them.
template <class K, int T>
inline void dots(const typename K::W* w, int64_t stride, const typename K::X* x, float* y) {
  Lanes sums[T] = {};
  for (int64_t i = 0; i < stride; i += PAD) {
    for (size_t line = 0; line < PAD * sizeof(*w); line += 64) __builtin_prefetch((const char*)(w + i) + AHEAD + line);
    auto row = K::row(w + i);
    for (int t = 0; t < T; t++) sums[t] = K::add(sums[t], row, x + t * stride + i);
  }
  for (int t = 0; t < T; t++) y[t * CHUNK] = sum(sums[t]);
}

template <class K>
void product(const Matrix& m, const void* laid, int tokens, int first, int n, float* y) {
  auto x = (const typename K::X*)laid;
  for (int r = 0; r < n; r++, y++) {
    auto w = (const typename K::W*)m.weight + (int64_t)(first + r) * m.stride;
    int t = 0;
    for (; tokens - t >= 8; t += 8) dots<K, 8>(w, m.stride, x + t * m.stride, y + t * CHUNK);
    if (tokens - t >= 4) dots<K, 4>(w, m.stride, x + t * m.stride, y + t * CHUNK), t += 4;
    if (tokens - t >= 2) dots<K, 2>(w, m.stride, x + t * m.stride, y + t * CHUNK), t += 2;
    if (tokens - t >= 1) dots<K, 1>(w, m.stride, x + t * m.stride, y + t * CHUNK);
  }
}

template <class K>
void lay(const float* from, int64_t stride, void* to) {
  for (int64_t i = 0; i < stride; i += PAD) K::lay(from + i, (typename K::X*)to + i);
}

// --- parts of a step; every thread calls them ---

struct Scratch {  // a thread's own
  std::vector<float> row, laid, scores;
};

struct Shared {  // by the threads
  std::vector<float> mixed, attended, inner, added, delta;
};

// The threads of a region. They meet some fifty times in a step, a few microseconds apart: too soon to sleep, as those of OpenMP do.
struct Team {
  std::atomic<int> here{0}, round{0};
};

inline void rest() {
#ifdef __x86_64__
  __builtin_ia32_pause();
#endif
}

struct Member {
  Team& team;
  int rank, size;
  Scratch& own;

  void meet() const {
    int round = team.round.load(std::memory_order_relaxed);
    if (team.here.fetch_add(1, std::memory_order_acq_rel) == size - 1) {
      team.here.store(0, std::memory_order_relaxed);
      team.round.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; team.round.load(std::memory_order_acquire) == round; spins++)
      if (spins > 4096)
        std::this_thread::yield();  // the machine has other work
      else
        rest();
  }

  // A share of n pieces of work, and a meeting behind it.
  template <class Work>
  void share(int n, Work work) const {
    for (int i = (int64_t)n * rank / size, stop = (int64_t)n * (rank + 1) / size; i < stop; i++) work(i);
    meet();
  }
};

// All tokens as the matrix wants them. fill(token, row): its numbers. Each thread does it for itself: cheaper than to meet.
template <class Fill>
void lay_out(Scratch& own, const Matrix& m, int tokens, Fill fill) {
  own.row.assign(m.stride, 0.f);
  own.laid.resize((size_t)tokens * m.stride);
  for (int t = 0; t < tokens; t++) {
    fill(t, own.row.data());
    if (m.kind == 0) lay<F32>(own.row.data(), m.stride, own.laid.data() + (int64_t)t * m.stride);
    if (m.kind == 1) lay<B16>(own.row.data(), m.stride, (B16::X*)own.laid.data() + (int64_t)t * m.stride);
    if (m.kind == 2) lay<I8>(own.row.data(), m.stride, own.laid.data() + (int64_t)t * m.stride);
  }
}

// y: tokens, CHUNK; rows first .. first + n - 1 of the product.
void some_rows(const Scratch& own, const Matrix& m, int tokens, int first, int n, float* y) {
  if (m.kind == 0) product<F32>(m, own.laid.data(), tokens, first, n, y);
  if (m.kind == 1) product<B16>(m, own.laid.data(), tokens, first, n, y);
  if (m.kind == 2) product<I8>(m, own.laid.data(), tokens, first, n, y);
  if (m.scale || m.bias)
    for (int t = 0; t < tokens; t++)
      for (int r = 0; r < n; r++)
        y[t * CHUNK + r] = y[t * CHUNK + r] * (m.scale ? m.scale[first + r] : 1.f) + (m.bias ? m.bias[first + r] : 0.f);
}

// The product, shared by the threads. put(token, row, number).
template <class Put>
void multiply(const Member& me, const Matrix& m, int tokens, Put put) {
  std::vector<float> y((size_t)tokens * CHUNK);
  me.share((m.out + CHUNK - 1) / CHUNK, [&](int chunk) {
    int first = chunk * CHUNK, n = std::min(CHUNK, m.out - first);
    some_rows(me.own, m, tokens, first, n, y.data());
    for (int t = 0; t < tokens; t++)
      for (int r = 0; r < n; r++) put(t, first + r, y[t * CHUNK + r]);
  });
}

void normalise(const Norm& norm, const float* x, int width, float* y) {
  float mean = 0, square = 0;
  if (norm.bias) {
#pragma omp simd reduction(+ : mean)
    for (int i = 0; i < width; i++) mean += x[i];
    mean /= width;
  }
#pragma omp simd reduction(+ : square)
  for (int i = 0; i < width; i++) square += (x[i] - mean) * (x[i] - mean);
  float factor = 1 / std::sqrt(square / width + norm.eps);
  for (int i = 0; i < width; i++) y[i] = (x[i] - mean) * factor * norm.weight[i] + (norm.bias ? norm.bias[i] : 0);
}

// Rotary positions, halves paired: the halves of `sin` have opposite signs.
void turn(float* x, int width, const float* cos, const float* sin) {
  int half = width / 2;
  for (int i = 0; i < half; i++) {
    float a = x[i], b = x[i + half];
    x[i] = a * cos[i] + b * sin[i];
    x[i + half] = b * cos[i + half] + a * sin[i + half];
  }
}

// softmax(scale keys query) values.
template <class V>
void attend(Scratch& own, const float* query, const V* keys, const V* values, int64_t slots, int width, float scale, float* y) {
  if (own.scores.size() < (size_t)slots + N) own.scores.resize(slots + slots / 2 + N);
  float *score = own.scores.data(), top = -INFINITY, total = 0;
  int whole = width / N * N;
  for (int64_t s = 0; s < slots; s++) {
    const V* key = keys + s * width;
    Lanes parts = {};
    for (int i = 0; i < whole; i += N) parts = fused(load(query + i), load(key + i), parts);
    float dot = sum(parts);
    for (int i = whole; i < width; i++) dot += query[i] * number(key[i]);
    score[s] = dot * scale;
    top = std::max(top, score[s]);
  }
  for (int64_t s = 0; s < slots; s += N) {
    Lanes share = exponential(load(score + s) - top);
    memcpy(score + s, &share, sizeof share);
  }
  for (int64_t s = 0; s < slots; s++) total += score[s];
  for (int i = 0; i < whole; i += N) {
    Lanes parts = {};
    for (int64_t s = 0; s < slots; s++) parts = fused(Lanes{} + score[s], load(values + s * width + i), parts);
    parts /= total;
    memcpy(y + i, &parts, sizeof parts);
  }
  for (int i = whole; i < width; i++) {
    y[i] = 0;
    for (int64_t s = 0; s < slots; s++) y[i] += score[s] / total * number(values[s * width + i]);
  }
}

void run_input(const Call& c, const Stage& s, Shared& all, const Member& me) {
  const int n = c.n_tokens, width = c.width;
  float *from = c.states, *to[] = {all.added.data(), all.delta.data()};
  for (int layer = 0; layer < s.input->depth; layer++) {
    const bool last = layer == s.input->depth - 1, residual = last && s.input->residual;
    const Matrix& m = s.input->layers[layer];
    lay_out(me.own, m, n, [&](int t, float* x) { memcpy(x, from + (int64_t)t * width, width * sizeof(float)); });
    if (s.input->depth == 1) me.meet();  // all have read what is about to change
    float* out = last ? c.states : to[layer % 2];
    multiply(me, m, n, [&](int t, int j, float y) {
      int64_t place = (int64_t)t * width + j;
      out[place] = residual ? out[place] + y : y < 0 ? 0 : y;
    });
    from = out;
  }
}

template <class V>
void run_block(const Call& c, const Stage& s, Shared& all, const Member& me) {
  Scratch& own = me.own;
  const Block& b = *s.block;
  const int n = c.n_tokens, width = c.width, head = b.head_width, group = b.heads / b.key_heads;
  const int keys_at = b.heads * head, values_at = keys_at + b.key_heads * head, hidden = b.gate_up.out / 2;
  float *mixed = all.mixed.data(), *attended = all.attended.data(), *inner = all.inner.data(), *h = c.states;
  auto keys_of = [&](const Token& token, int key_head) {
    return (V*)token.cache + ((int64_t)s.layer * 2 * b.key_heads + key_head) * token.room * head;
  };
  lay_out(own, b.qkv, n, [&](int t, float* x) { normalise(b.norm, h + (int64_t)t * width, width, x); });
  multiply(me, b.qkv, n, [&](int t, int j, float y) { mixed[(int64_t)t * b.qkv.out + j] = y; });
  me.share(n * b.key_heads, [&](int i) {  // keys and values first: a later token of the same sequence sees them
    int t = i / b.key_heads, k = i % b.key_heads;
    const Token& token = c.tokens[t];
    float *row = mixed + (int64_t)t * b.qkv.out, *key = row + keys_at + k * head;
    V *place = keys_of(token, k) + token.past * head, *beside = place + b.key_heads * token.room * head;
    if (b.key.weight) normalise(b.key, key, head, key);
    turn(key, head, c.cos + token.past * head, c.sin + token.past * head);
    for (int j = 0; j < head; j++) put(key[j], place + j), put(row[values_at + k * head + j], beside + j);
  });
  me.share(n * b.heads, [&](int i) {
    int t = i / b.heads, q = i % b.heads;
    const Token& token = c.tokens[t];
    float* query = mixed + (int64_t)t * b.qkv.out + q * head;
    if (b.query.weight) normalise(b.query, query, head, query);
    turn(query, head, c.cos + token.past * head, c.sin + token.past * head);
    const V *keys = keys_of(token, q / group), *values = keys + b.key_heads * token.room * head;
    attend(own, query, keys, values, token.past + 1, head, b.scale, attended + (int64_t)t * keys_at + q * head);
  });
  lay_out(own, b.out, n, [&](int t, float* x) { memcpy(x, attended + (int64_t)t * keys_at, keys_at * sizeof(float)); });
  multiply(me, b.out, n, [&](int t, int j, float y) { h[(int64_t)t * width + j] += y; });
  lay_out(own, b.gate_up, n, [&](int t, float* x) { normalise(b.second, h + (int64_t)t * width, width, x); });
  std::vector<float> gate((size_t)n * CHUNK + N), up((size_t)n * CHUNK);
  me.share((hidden + CHUNK - 1) / CHUNK, [&](int chunk) {
    int first = chunk * CHUNK, m = std::min(CHUNK, hidden - first);
    some_rows(own, b.gate_up, n, first, m, gate.data());
    some_rows(own, b.gate_up, n, hidden + first, m, up.data());
    for (int i = 0; i < n * CHUNK; i += N) {
      Lanes g = load(gate.data() + i);
      g /= 1.f + exponential(-g);
      memcpy(gate.data() + i, &g, sizeof g);
    }
    for (int t = 0; t < n; t++)
      for (int r = 0; r < m; r++) inner[(int64_t)t * hidden + first + r] = gate[t * CHUNK + r] * up[t * CHUNK + r];
  });
  lay_out(own, b.down, n, [&](int t, float* x) { memcpy(x, inner + (int64_t)t * hidden, hidden * sizeof(float)); });
  multiply(me, b.down, n, [&](int t, int j, float y) { h[(int64_t)t * width + j] += y; });
}

template <class V>
void run_link(const Call& c, const Stage& s, bool first, Shared& all, const Member& me) {
  Scratch& own = me.own;
  const Link& l = *s.link;
  const int n = c.n_tokens, width = c.width, head = l.head_width, heads = l.heads * head;
  float *mixed = all.mixed.data(), *attended = all.attended.data(), *inner = all.inner.data(), *h = c.states;
  float *added = all.added.data(), *delta = all.delta.data();
  auto add = [&](int64_t place, bool sees, float y) {  // links of one junction read the same states
    delta[place] = (first ? 0 : delta[place]) + (sees ? y : 0);
    if (s.last) h[place] += delta[place];
  };
  lay_out(own, l.query, n, [&](int t, float* x) { normalise(l.norm, h + (int64_t)t * width, width, x); });
  multiply(me, l.query, n, [&](int t, int j, float y) { mixed[(int64_t)t * heads + j] = y; });
  me.share(n * l.heads, [&](int i) {
    int t = i / l.heads, q = i % l.heads;
    const Memory& memory = s.memory[t];
    float *query = mixed + (int64_t)t * heads + q * head, *out = attended + (int64_t)t * heads + q * head;
    if (!memory.slots) {
      std::fill(out, out + head, 0.f);
      return;
    }
    int64_t turned = c.tokens[t].past * head;
    if (s.cos) turn(query, head, s.cos + turned, s.sin + turned);
    int64_t at = q * memory.slots * head;
    attend(own, query, (const V*)memory.keys + at, (const V*)memory.values + at, memory.slots, head, 1 / std::sqrt((float)head), out);
  });
  lay_out(own, l.out, n, [&](int t, float* x) { memcpy(x, attended + (int64_t)t * heads, heads * sizeof(float)); });
  if (!l.up.weight) {
    multiply(me, l.out, n, [&](int t, int j, float y) { add((int64_t)t * width + j, s.memory[t].slots, y); });
    return;
  }
  multiply(me, l.out, n, [&](int t, int j, float y) { added[(int64_t)t * width + j] = y; });
  lay_out(own, l.up, n, [&](int t, float* x) {
    float* sum = own.scores.data();
    for (int i = 0; i < width; i++) sum[i] = h[(int64_t)t * width + i] + added[(int64_t)t * width + i];
    normalise(l.second, sum, width, x);
  });
  // The constants of gelu(x) = x (1 + erf(x / sqrt(2))) / 2 and the gates are in the matrices.
  multiply(me, l.up, n, [&](int t, int j, float y) { inner[(int64_t)t * l.up.out + j] = y + y * std::erf(y); });
  lay_out(own, l.down, n, [&](int t, float* x) { memcpy(x, inner + (int64_t)t * l.up.out, l.up.out * sizeof(float)); });
  multiply(me, l.down, n, [&](int t, int j, float y) {
    int64_t place = (int64_t)t * width + j;
    add(place, s.memory[t].slots, added[place] + y);
  });
}

}  // namespace

extern "C" void zipper_step(const Call* call) {
  const Call& c = *call;
  static thread_local Shared all;  // memory that is asked for anew at every step costs more than the step's small parts
  size_t mixed = 0, attended = 0, inner = 0;
  for (int i = 0; i < c.n_stages; i++) {
    const Stage& s = c.stages[i];
    mixed = std::max<size_t>(mixed, s.block ? s.block->qkv.out : s.link ? s.link->query.out : 0);
    attended = std::max<size_t>(attended, s.block ? s.block->out.in : s.link ? s.link->out.in : 0);
    inner = std::max<size_t>(inner, s.block ? s.block->gate_up.out / 2 : s.link ? s.link->up.out : 0);
  }
  auto grow = [&](std::vector<float>& part, size_t width) {
    if (part.size() < width * c.n_tokens) part.resize(width * c.n_tokens);
  };
  grow(all.mixed, mixed), grow(all.attended, attended), grow(all.inner, inner), grow(all.added, c.width), grow(all.delta, c.width);
  Shared& shared = all;  // a thread_local name means another thing in every thread
  Team team;
#pragma omp parallel num_threads(c.threads)
  {
    static thread_local Scratch own;
    if (own.scores.size() < (size_t)c.width) own.scores.resize(c.width);
    Member me{team, omp_get_thread_num(), omp_get_num_threads(), own};
    bool first = true;
    for (int i = 0; i < c.n_stages; i++) {
      const Stage& s = c.stages[i];
      // Nobody changes the states before all have met again.
      if (s.keep && !me.rank) memcpy(s.keep, c.states, (size_t)c.n_tokens * c.width * sizeof(float));
      if (s.input) run_input(c, s, shared, me);
      if (s.link) (s.half ? run_link<uint16_t> : run_link<float>)(c, s, first, shared, me);
      if (s.block) (c.half ? run_block<uint16_t> : run_block<float>)(c, s, shared, me);
      first = !s.link || s.last;
    }
    if (c.n_spoken) {
      lay_out(own, c.head, c.n_spoken, [&](int t, float* x) {
        normalise(c.norm, c.states + (int64_t)c.spoken[t] * c.width, c.width, x);
      });
      multiply(me, c.head, c.n_spoken, [&](int t, int j, float y) { c.logits[(int64_t)t * c.head.out + j] = y; });
    }
  }
}
