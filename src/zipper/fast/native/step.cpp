// A step of a zip on a CPU: tokens of some sequences through blocks and links, in one parallel region.
//
// A step of one token reads every weight once, so it should take as long as memory takes to give them: weights lie in panels of
// some rows, and each thread walks straight on through its panels. Many tokens are as fast as the processor multiplies: a number
// of each meets a column of a panel, and the sums stay in registers. The sum behind a number has the same order however many tokens
// and threads there are: what a sequence gets depends neither on its company nor on the pieces in which it is read, to the bit.
//
// Everything between matrices is float32. Structures here are those of native/__init__.py, field by field.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

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

constexpr int PANEL = 32;     // rows of weights that lie together, and that a thread takes at once
constexpr int R = PANEL / N;  // registers of a panel's column
constexpr int TOKENS = N == 16 ? 8 : 8 / R;  // that meet a column at once: there are registers for their sums
constexpr int GROUP = 8;      // tokens of a sequence that attend at once
constexpr int FEW = 16;       // tokens that wait for memory rather than for the processor
constexpr int BLOCK = 64;     // tokens that stay in the second cache while all panels pass
constexpr int PART = 2048;    // bytes of a token's numbers that meet a panel before the next ones do
constexpr int LINE = 64;      // bytes of a line of the cache

struct Matrix {
  const void* weight;  // panels; of a panel column by column, of bfloat16 two columns at a time, of every row both its numbers
  const float* scale;  // of a row, or null
  const float* bias;   // or null
  int32_t kind, out, in;  // kind: float32 (0), bfloat16 (1), int8 (2)
};

struct Norm {
  const float* weight;  // null: none
  const float* bias;    // null: root mean square (arXiv:1910.07467), else layer norm
  float eps;
};

struct Block {
  Norm norm, second, query, key;
  Matrix qkv, out, gate, up, down;
  int32_t heads, key_heads, head_width;
  float scale;
};

struct Link {
  Norm norm, second, source;    // source.weight null: none
  Matrix query, out, up, down;  // up.weight null: no feed-forward
  const Matrix* reads;          // from the source's states to keys and values, ReLU between them
  int32_t depth, heads, head_width;
  int32_t half;  // its memory is bfloat16, else float32
};

struct Input {  // between embeddings and the first block
  const Matrix* layers;
  int32_t depth, residual;  // h + MLP(h), else ReLU(MLP(h))
};

struct Token {  // of a sequence
  void* cache;  // layers, keys and values, key heads, room, head width
  int64_t room, past, id, place;  // place: the number of its sequence
};

struct Memory {  // what a sequence sees through a link
  const void* held;  // keys and values, heads, room, head width
  int64_t room, slots;
};

struct Unread {  // states that a link has not read yet
  const Link* link;
  const float* states;     // tokens, width of the source
  void* held;              // as in Memory
  const float *cos, *sin;  // of keys: positions, head width; null: none
  int64_t tokens, room, past;
};

struct Stage {  // one of the first four, in the order of the tower
  const Input* input;
  const Block* block;
  const Link* link;
  float* keep;             // where the states go that other towers will read
  const float *cos, *sin;  // of a link: positions, head width; null: none
  int32_t layer;           // of a block: where its keys go
  int32_t seen;            // of a link: its number among those that are read
  int32_t last;            // of a link: no other is read at this junction
};

struct Call {
  const Stage* stages;
  const Token* tokens;
  const Memory* memory;    // of links that are read: of each, of every sequence
  const int32_t* spoken;   // tokens that get logits
  const float *cos, *sin;  // of blocks: positions, head width
  const void* table;       // embeddings: vocabulary, width
  float* logits;
  Norm norm;
  Matrix head;
  int32_t n_stages, n_tokens, n_places, n_spoken, width, threads;
  int32_t half;  // embeddings and caches are bfloat16, else float32
};

// --- numbers in registers ---

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
#ifdef __AVX512F__
  return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
  typedef uint16_t Halves __attribute__((vector_size(2 * N)));
  Halves value;
  memcpy(&value, p, sizeof value);
  return lanes(__builtin_convertvector(value, Words) << 16);
#endif
}

inline Lanes all_of(float x) { return x - Lanes{}; }

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

inline float largest(Lanes v) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)v);
#else
  return *std::max_element((const float*)&v, (const float*)&v + N);
#endif
}

// Of N vectors the sum of each, in the order in which `sum` adds.
inline Lanes sums(const Lanes* parts) {
  Lanes found;
#ifdef __AVX512F__
  auto part = [&](int i) { return (__m512)parts[i]; };  // two become one: halves of both that are added to the other halves
  auto by8 = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee)); };
  auto by4 = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); };
  auto by2 = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee)); };
  auto by1 = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd)); };
  auto four = [&](int i) { return by4(by8(part(i), part(i + 4)), by8(part(i + 8), part(i + 12))); };
  found = (Lanes)by1(by2(four(0), four(1)), by2(four(2), four(3)));
#else
  for (int i = 0; i < N; i++) found[i] = sum(parts[i]);
#endif
  return found;
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

// erf(x) to 1.5e-7 (Abramowitz and Stegun, 7.1.26).
inline Lanes error_function(Lanes x) {
  Lanes size = x < 0.f ? -x : x, t = 1.f / (1.f + 0.3275911f * size);
  Lanes series = ((((t * 1.061405429f - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
  Lanes y = 1.f - series * exponential(-size * size);
  return x < 0.f ? -y : y;
}

// --- products ---

// What G numbers of N rows and of a token add to sums. X: the form in which a token's n numbers are laid out for it, zeros behind.
struct F32 {
  typedef float W;
  typedef float X;
  static constexpr int G = 1;
  static Lanes rows(const W* w) { return load(w); }
  static Lanes token(const X* x) { return all_of(*x); }
  static Lanes add(Lanes sum, Lanes w, Lanes x) { return fused(w, x, sum); }
  static void lay(const float* from, int64_t n, int64_t width, X* to) { std::fill(std::copy(from, from + n, to), to + width, 0.f); }
};

struct I8 : F32 {
  typedef int8_t W;
  static Lanes rows(const W* w) {  // GCC's own conversion goes number by number
#ifdef __AVX512F__
    return (Lanes)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)w)));
#elif defined __AVX2__
    return (Lanes)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)w)));
#else
    Lanes found;
    for (int j = 0; j < N; j++) found[j] = w[j];
    return found;
#endif
  }
};

#ifdef __AVX512BF16__
struct B16 {
  typedef uint16_t W;
  typedef uint16_t X;
  static constexpr int G = 2;
  static __m512bh rows(const W* w) { return (__m512bh)_mm512_loadu_si512(w); }
  static __m512bh token(const X* x) {
    int32_t both;
    memcpy(&both, x, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
  }
  static Lanes add(Lanes sum, __m512bh w, __m512bh x) { return (Lanes)_mm512_dpbf16_ps((__m512)sum, w, x); }
  static void lay(const float* from, int64_t n, int64_t width, X* to) {
    auto first = [](int64_t some) { return _cvtu32_mask16(some < N ? (1 << some) - 1 : 0xffff); };
    for (int64_t i = 0; i < width; i += N) {
      const auto rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(first(n - i), from + i));
      _mm256_mask_storeu_epi16(to + i, first(width - i), (__m256i)rounded);
    }
  }
};
#else
struct B16 : F32 {
  typedef uint16_t W;
  static constexpr int G = 2;
  struct Pair {
    Lanes first, second;
  };
  static Pair rows(const W* w) {
    Words bits;
    memcpy(&bits, w, sizeof bits);
    return {lanes(bits << 16), lanes(bits & 0xffff0000u)};
  }
  static Pair token(const X* x) { return {all_of(x[0]), all_of(x[1])}; }
  static Lanes add(Lanes sum, Pair w, Pair x) { return fused(w.second, x.second, fused(w.first, x.first, sum)); }
};
#endif

// Numbers that a row of weights has, and that lie between two tokens: an odd number of lines, so that many tokens do not share one
// place of the cache.
template <class K>
int64_t width_of(const Matrix& m) { return (m.in + K::G - 1) / K::G * K::G; }
template <class K>
int64_t apart_of(const Matrix& m) {
  constexpr int64_t line = LINE / sizeof(typename K::X);
  return ((width_of<K>(m) + line - 1) / line | 1) * line;
}

// Numbers of memory, in float32's size, for so many tokens.
inline size_t laid_size(const Matrix& m, int tokens) { return (size_t)tokens * apart_of<F32>(m); }

// What n columns of a panel and some tokens, `apart` apart, add to y (more) or put there. y: tokens, PANEL. ahead: bytes by which
// columns are fetched before they are read, into the second cache: more is on its way to it at a time than to the first.
template <class K, int tokens>
inline void accumulate(const typename K::W* w, const typename K::X* x, int64_t apart, int64_t n, int64_t ahead, bool more, float* y) {
  constexpr int column = PANEL * K::G;
  Lanes sums[tokens][R] = {};
  for (int64_t i = 0; i < n; i += K::G, w += column) {
    for (int byte = 0; byte < column * (int)sizeof(*w); byte += LINE) __builtin_prefetch((const char*)w + ahead + byte, 0, 2);
    decltype(K::rows(w)) rows[R];
    for (int r = 0; r < R; r++) rows[r] = K::rows(w + r * N * K::G);
    for (int t = 0; t < tokens; t++) {
      const auto token = K::token(x + t * apart + i);
      for (int r = 0; r < R; r++) sums[t][r] = K::add(sums[t][r], rows[r], token);
    }
  }
  for (int t = 0; t < tokens; t++)
    for (int r = 0; r < R; r++, y += N) {
      if (more) sums[t][r] += load(y);
      memcpy(y, sums[t] + r, sizeof(Lanes));
    }
}

// The same of any number of tokens. The first of them wait for memory; while the others pass, what comes behind is fetched.
template <class K, int at_once = TOKENS>
inline void accumulate_all(const typename K::W* w, const typename K::X* x, int64_t apart, int t, int tokens, int64_t n, bool more,
                           float* y) {
  for (; t + at_once <= tokens; t += at_once) {
    const int64_t ahead = t ? n * PANEL * sizeof(*w) : at_once == 1 ? 4096 : 8192;
    accumulate<K, at_once>(w, x + t * apart, apart, n, ahead, more, y + t * PANEL);
  }
  if constexpr (at_once > 1) accumulate_all<K, at_once / 2>(w, x, apart, t, tokens, n, more, y);
}

// A panel's product with tokens that are laid out. y: tokens, PANEL.
template <class K>
void product(const Matrix& m, const void* laid, int from, int tokens, int panel, float* y) {
  constexpr int64_t part = PART / sizeof(typename K::X);
  const int64_t width = width_of<K>(m), apart = apart_of<K>(m);
  const auto w = (const typename K::W*)m.weight + panel * PANEL * width;
  const auto x = (const typename K::X*)laid + from * apart;
  for (int64_t i = 0; i < width; i += part) accumulate_all<K>(w + i * PANEL, x + i, apart, 0, tokens, std::min(part, width - i), i, y);
}

// --- parts of a step; every thread calls them ---

struct Buffer {  // memory that is only ever written anew, from the start of a line on
  float* data = nullptr;
  size_t size = 0;
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { free(data); }
  float* grow(size_t wanted) {
    if (wanted > size) {
      const size_t larger = wanted + wanted / 2;
      free(data);
      size = 0;
      data = (float*)aligned_alloc(LINE, (larger * sizeof(float) / LINE + 1) * LINE);
      if (!data) throw std::bad_alloc();  // thrown within a parallel region it ends the process, and says so
      size = larger;
    }
    return data;
  }
};

struct Scratch {  // a thread's own
  Buffer row, laid, scores, sum, some, more;
};

struct Shared {  // by the threads
  Buffer states, mixed, attended, inner, added, delta, laid;
};

// The threads of a region. They meet some fifty times in a step, a few microseconds apart: too soon to sleep, as those of OpenMP do.
struct Team {
  struct alignas(LINE) Taken {
    std::atomic<int> pieces{0};
  };
  explicit Team(int size) : taken(size) {}
  std::atomic<int> here{0}, round{0};
  std::vector<Taken> taken;  // of each thread's share
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
      for (auto& share : team.taken) share.pieces.store(0, std::memory_order_relaxed);
      team.round.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; team.round.load(std::memory_order_acquire) == round; spins++)
      if (spins > 4096)
        std::this_thread::yield();  // the machine has other work
      else
        rest();
  }

  // Of n pieces of work an equal share, in their order; then what is left of the others' shares; then a meeting.
  template <class Work>
  void share(int n, Work work) const {
    for (int other = 0; other < size; other++) {
      const int64_t whose = (rank + other) % size, start = n * whose / size, some = n * (whose + 1) / size - start;
      auto& taken = team.taken[whose].pieces;
      while (taken.load(std::memory_order_relaxed) < some) {
        const int i = taken.fetch_add(1, std::memory_order_relaxed);
        if (i < some) work(start + i);
      }
    }
    meet();
  }
};

// All tokens as the matrix wants them; row(token, room): where its numbers stand, perhaps in the room. Few tokens are laid out by
// each thread for itself, which is cheaper than to meet.
template <class K, class Row>
void lay_out(const Member& me, const Matrix& m, int first, int tokens, int step, Row row, float* laid) {
  float* room = me.own.row.grow(m.in);
  for (int t = first; t < tokens; t += step) K::lay(row(t, room), m.in, width_of<K>(m), (typename K::X*)laid + t * apart_of<K>(m));
}

template <class Row>
const float* lay_out(const Member& me, Shared& all, const Matrix& m, int tokens, Row row) {
  const bool few = tokens <= FEW;
  float* laid = few ? me.own.laid.grow(laid_size(m, tokens)) : all.laid.data;
  const int first = few ? 0 : me.rank, step = few ? 1 : me.size;
  if (m.kind == 0) lay_out<F32>(me, m, first, tokens, step, row, laid);
  if (m.kind == 1) lay_out<B16>(me, m, first, tokens, step, row, laid);
  if (m.kind == 2) lay_out<I8>(me, m, first, tokens, step, row, laid);
  if (!few) me.meet();
  return laid;
}

// y: tokens, PANEL; rows of the product, of some tokens.
void some_rows(const Matrix& m, const float* laid, int from, int tokens, int panel, float* y) {
  if (m.kind == 0) product<F32>(m, laid, from, tokens, panel, y);
  if (m.kind == 1) product<B16>(m, laid, from, tokens, panel, y);
  if (m.kind == 2) product<I8>(m, laid, from, tokens, panel, y);
  const int first = panel * PANEL, n = std::min(PANEL, m.out - first);
  for (int t = 0; m.scale && t < tokens; t++)
    for (int r = 0; r < n; r++) y[t * PANEL + r] *= m.scale[first + r];
  for (int t = 0; m.bias && t < tokens; t++)
    for (int r = 0; r < n; r++) y[t * PANEL + r] += m.bias[first + r];
}

// Panels and tokens shared by the threads, in pieces: work(first token, tokens, panel).
template <class Work>
void share_out(const Member& me, int tokens, int rows, Work work) {
  const int panels = (rows + PANEL - 1) / PANEL;
  me.share(panels * ((tokens + BLOCK - 1) / BLOCK), [&](int i) {
    int from = i / panels * BLOCK;
    work(from, std::min(BLOCK, tokens - from), i % panels);
  });
}

// The product of what is laid out. put(token, row, number). change: of numbers on their way.
template <class Put>
void multiply(const Member& me, const Matrix& m, const float* laid, int tokens, Put put, Lanes (*change)(Lanes) = nullptr) {
  float* y = me.own.some.grow(BLOCK * PANEL);
  share_out(me, tokens, m.out, [&](int from, int some, int panel) {
    some_rows(m, laid, from, some, panel, y);
    for (int i = 0; change && i < some * PANEL; i += N) {
      Lanes changed = change(load(y + i));
      memcpy(y + i, &changed, sizeof changed);
    }
    const int first = panel * PANEL, n = std::min(PANEL, m.out - first);
    for (int t = 0; t < some; t++)
      for (int r = 0; r < n; r++) put(from + t, first + r, y[t * PANEL + r]);
  });
}

const float* normalise(const Norm& norm, const float* x, int width, float* y) {
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
  return y;
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

// In a register: GCC would rather load it again for every use.
inline Lanes held(Lanes x) {
#ifdef __AVX512F__
  asm("" : "+v"(x));
#endif
  return x;
}

// Products of some keys, `width` apart, and queries, `apart` apart, of n numbers. y: queries, `across` apart, keys. ahead: bytes from
// the keys to what is read next.
template <int keys, int queries, class V>
inline void dots(const V* key, int64_t width, const float* query, int64_t apart, int64_t n, int64_t ahead, float* y, int64_t across) {
  Lanes parts[keys * queries] = {};
  for (int64_t i = 0; i < n; i += N) {
    Lanes numbers[queries];
    for (int t = 0; t < queries; t++) numbers[t] = held(load(query + t * apart + i));
    for (int r = 0; r < keys; r++) {
      const auto from = key + r * width + i;
      if (i * sizeof(V) % LINE == 0) __builtin_prefetch((const char*)from + ahead, 0, 2);
      const Lanes row = load(from);
      for (int t = 0; t < queries; t++) parts[t * keys + r] = fused(row, numbers[t], parts[t * keys + r]);
    }
  }
  float found[keys * queries];
  if constexpr (keys * queries == N) {
    Lanes all = sums(parts);
    memcpy(found, &all, sizeof found);
  } else {
    for (int i = 0; i < keys * queries; i++) found[i] = sum(parts[i]);
  }
  for (int t = 0; t < queries; t++) memcpy(y + t * across, found + t * keys, keys * sizeof(float));
}

// Sums of values, C registers wide, by the scores of T tokens.
template <int T, int C, class V>
inline void mix(const float* scores, int64_t room, const V* values, int64_t width, int64_t slots, int64_t ahead, const float* total,
                float* y, int64_t across) {
  Lanes parts[T][C] = {};
  for (int64_t s = 0; s < slots; s++) {
    Lanes value[C];
    for (int i = 0; i < C; i++) {
      auto from = values + s * width + i * N;
      if (i * N * sizeof(V) % LINE == 0) __builtin_prefetch((const char*)from + ahead, 0, 2);
      value[i] = load(from);
    }
    for (int t = 0; t < T; t++) {
      Lanes score = all_of(scores[t * room + s]);
      for (int i = 0; i < C; i++) parts[t][i] = fused(score, value[i], parts[t][i]);
    }
  }
  for (int t = 0; t < T; t++)
    for (int i = 0; i < C; i++) {
      parts[t][i] /= total[t];
      memcpy(y + t * across + i * N, parts[t] + i, sizeof(Lanes));
    }
}

// softmax(scale keys query) values, of T tokens of one sequence; the last one sees `slots` slots. later: each token before sees one
// less, else as many. next: keys that are likely to be read next.
template <int T, class V>
void attend(Scratch& own, const float* query, int64_t apart, const V* keys, const V* values, int64_t slots, const V* next, bool later,
            int width, float scale, float* y, int64_t across) {
  constexpr int some = std::max(1, N / T);  // keys at once
  const int64_t room = (slots + N - 1) / N * N, to_values = (char*)values - (char*)keys, to_next = (char*)next - (char*)values;
  const int whole = width / N * N;
  float *scores = own.scores.grow(T * room), total[T];
  int64_t key = 0;
  for (; key + some <= slots; key += some)
    dots<some, T>(keys + key * width, width, query, apart, whole, to_values, scores + key, room);
  for (; key < slots; key++) dots<1, T>(keys + key * width, width, query, apart, whole, to_values, scores + key, room);
  for (int t = 0; t < T; t++) {
    float* score = scores + t * room;
    const int64_t seen = slots - (later ? T - 1 - t : 0);
    for (int64_t s = 0; s < seen; s++)
      for (int i = whole; i < width; i++) score[s] += query[t * apart + i] * number(keys[s * width + i]);
    std::fill(score + seen, score + room, -INFINITY);
    Lanes top = all_of(-INFINITY), sums = {};
    for (int64_t s = 0; s < seen; s += N) {
      Lanes scaled = load(score + s) * scale;
      top = scaled > top ? scaled : top;
      memcpy(score + s, &scaled, sizeof scaled);
    }
    const float most = largest(top);
    for (int64_t s = 0; s < seen; s += N) {
      Lanes share = exponential(load(score + s) - most);
      memcpy(score + s, &share, sizeof share);
    }
    std::fill(score + seen, score + room, 0.f);
    for (int64_t s = 0; s < seen; s += N) sums += load(score + s);
    total[t] = sum(sums);
  }
  int at = 0;
  auto mixed = [&](auto registers) {
    constexpr int C = decltype(registers)::value;
    for (; at + C * N <= whole; at += C * N) mix<T, C>(scores, room, values + at, width, slots, to_next, total, y + at, across);
  };
  if (T == 1) mixed(std::integral_constant<int, 4>{});
  mixed(std::integral_constant<int, 2>{});
  mixed(std::integral_constant<int, 1>{});
  for (int t = 0; t < T; t++)
    for (int i = whole; i < width; i++) {
      float part = 0;
      for (int64_t s = 0; s < slots; s++) part += scores[t * room + s] / total[t] * number(values[s * width + i]);
      y[t * across + i] = part;
    }
}

// Tokens of one sequence that attend together.
struct Piece {
  int first, tokens;  // one or GROUP
};

// All heads of all pieces, shared by the threads.
template <class V, class Before, class Seen>
void attend_all(const Member& me, const std::vector<Piece>& pieces, int heads, int width, float scale, bool later, float* query,
                int64_t apart, float* y, int64_t across, Before before, Seen seen) {
  me.share(pieces.size() * heads, [&](int i) {
    const int head = i % heads, first = pieces[i / heads].first, last = first + pieces[i / heads].tokens - 1;
    float *from = query + first * apart + head * width, *to = y + first * across + head * width;
    for (int t = first; t <= last; t++) before(t, query + t * apart + head * width);
    auto [keys, values, slots] = seen(last, head);
    const int after = std::min<int>(i + 1, pieces.size() * heads - 1);
    const auto next = seen(pieces[after / heads].first, after % heads).keys;
    if (!slots)
      for (int t = first; t <= last; t++) std::fill(y + t * across + head * width, y + t * across + (head + 1) * width, 0.f);
    else if (first == last)
      attend<1>(me.own, from, apart, keys, values, slots, next, later, width, scale, to, across);
    else
      attend<GROUP>(me.own, from, apart, keys, values, slots, next, later, width, scale, to, across);
  });
}

template <class V>
struct Seen {
  const V *keys, *values;
  int64_t slots;
};

void run_input(const Call& c, const Stage& s, Shared& all, const Member& me) {
  const int n = c.n_tokens;
  float *states = all.states.data, *from = states, *to[] = {all.added.data, all.delta.data};
  for (int layer = 0; layer < s.input->depth; layer++) {
    const bool last = layer == s.input->depth - 1, residual = last && s.input->residual;
    const Matrix& m = s.input->layers[layer];
    auto laid = lay_out(me, all, m, n, [&](int t, float*) { return from + (int64_t)t * m.in; });
    if (s.input->depth == 1) me.meet();  // all have read what is about to change
    float* out = last ? states : to[layer % 2];
    multiply(me, m, laid, n, [&](int t, int j, float y) {
      int64_t place = (int64_t)t * m.out + j;
      out[place] = residual ? out[place] + y : y < 0 ? 0 : y;
    });
    from = out;
  }
}

template <class V>
void run_block(const Call& c, const Stage& s, const std::vector<Piece>& pieces, Shared& all, const Member& me) {
  const Block& b = *s.block;
  const int n = c.n_tokens, width = c.width, head = b.head_width, group = b.heads / b.key_heads;
  const int keys_at = b.heads * head, values_at = keys_at + b.key_heads * head, hidden = b.gate.out;
  float *mixed = all.mixed.data, *attended = all.attended.data, *inner = all.inner.data, *h = all.states.data;
  auto keys_of = [&](const Token& token, int key_head) {
    return (V*)token.cache + ((int64_t)s.layer * 2 * b.key_heads + key_head) * token.room * head;
  };
  auto normal = lay_out(me, all, b.qkv, n, [&](int t, float* room) { return normalise(b.norm, h + (int64_t)t * width, width, room); });
  multiply(me, b.qkv, normal, n, [&](int t, int j, float y) { mixed[(int64_t)t * b.qkv.out + j] = y; });
  me.share(n * b.key_heads, [&](int i) {  // keys and values first: a later token of the same sequence sees them
    int t = i / b.key_heads, k = i % b.key_heads;
    const Token& token = c.tokens[t];
    float *row = mixed + (int64_t)t * b.qkv.out, *key = row + keys_at + k * head;
    V *place = keys_of(token, k) + token.past * head, *beside = place + b.key_heads * token.room * head;
    if (b.key.weight) normalise(b.key, key, head, key);
    turn(key, head, c.cos + token.past * head, c.sin + token.past * head);
    for (int j = 0; j < head; j++) put(key[j], place + j), put(row[values_at + k * head + j], beside + j);
  });
  auto before = [&](int t, float* query) {
    if (b.query.weight) normalise(b.query, query, head, query);
    turn(query, head, c.cos + c.tokens[t].past * head, c.sin + c.tokens[t].past * head);
  };
  auto seen = [&](int t, int q) {
    const V* keys = keys_of(c.tokens[t], q / group);
    return Seen<V>{keys, keys + b.key_heads * c.tokens[t].room * head, c.tokens[t].past + 1};
  };
  attend_all<V>(me, pieces, b.heads, head, b.scale, true, mixed, b.qkv.out, attended, keys_at, before, seen);
  auto said = lay_out(me, all, b.out, n, [&](int t, float*) { return attended + (int64_t)t * keys_at; });
  multiply(me, b.out, said, n, [&](int t, int j, float y) { h[(int64_t)t * width + j] += y; });
  auto ahead = lay_out(me, all, b.gate, n, [&](int t, float* room) { return normalise(b.second, h + (int64_t)t * width, width, room); });
  float *gate = me.own.some.grow(BLOCK * PANEL), *up = me.own.more.grow(BLOCK * PANEL);
  share_out(me, n, hidden, [&](int from, int some, int panel) {
    some_rows(b.gate, ahead, from, some, panel, gate);
    some_rows(b.up, ahead, from, some, panel, up);
    for (int i = 0; i < some * PANEL; i += N) {
      Lanes g = load(gate + i);
      g = g / (1.f + exponential(-g)) * load(up + i);
      memcpy(gate + i, &g, sizeof g);
    }
    const int first = panel * PANEL, m = std::min(PANEL, hidden - first);
    for (int t = 0; t < some; t++) memcpy(inner + (int64_t)(from + t) * hidden + first, gate + t * PANEL, m * sizeof(float));
  });
  auto gated = lay_out(me, all, b.down, n, [&](int t, float*) { return inner + (int64_t)t * hidden; });
  multiply(me, b.down, gated, n, [&](int t, int j, float y) { h[(int64_t)t * width + j] += y; });
}

template <class V>
void run_link(const Call& c, const Stage& s, bool first, const std::vector<Piece>& pieces, Shared& all, const Member& me) {
  const Link& l = *s.link;
  const int n = c.n_tokens, width = c.width, head = l.head_width, heads = l.heads * head;
  float *mixed = all.mixed.data, *attended = all.attended.data, *inner = all.inner.data, *h = all.states.data;
  float *added = all.added.data, *delta = all.delta.data;
  auto add = [&](int64_t place, bool sees, float y) {  // links of one junction read the same states
    delta[place] = (first ? 0 : delta[place]) + (sees ? y : 0);
    if (s.last) h[place] += delta[place];
  };
  auto normal = lay_out(me, all, l.query, n, [&](int t, float* room) { return normalise(l.norm, h + (int64_t)t * width, width, room); });
  multiply(me, l.query, normal, n, [&](int t, int j, float y) { mixed[(int64_t)t * heads + j] = y; });
  auto before = [&](int t, float* query) {
    if (s.cos) turn(query, head, s.cos + c.tokens[t].past * head, s.sin + c.tokens[t].past * head);
  };
  auto memory_of = [&](int t) -> const Memory& { return c.memory[(int64_t)s.seen * c.n_places + c.tokens[t].place]; };
  auto seen = [&](int t, int q) {
    const Memory& memory = memory_of(t);
    const V* keys = (const V*)memory.held + q * memory.room * head;
    return Seen<V>{keys, keys + l.heads * memory.room * head, memory.slots};
  };
  attend_all<V>(me, pieces, l.heads, head, 1 / std::sqrt((float)head), false, mixed, heads, attended, heads, before, seen);
  auto said = lay_out(me, all, l.out, n, [&](int t, float*) { return attended + (int64_t)t * heads; });
  if (!l.up.weight) {
    multiply(me, l.out, said, n, [&](int t, int j, float y) { add((int64_t)t * width + j, memory_of(t).slots, y); });
    return;
  }
  multiply(me, l.out, said, n, [&](int t, int j, float y) { added[(int64_t)t * width + j] = y; });
  float* sum = me.own.sum.grow(width);
  auto ahead = lay_out(me, all, l.up, n, [&](int t, float* room) {
    for (int i = 0; i < width; i++) sum[i] = h[(int64_t)t * width + i] + added[(int64_t)t * width + i];
    return normalise(l.second, sum, width, room);
  });
  // The constants of gelu(x) = x (1 + erf(x / sqrt(2))) / 2 and the gates are in the matrices.
  auto gelu = [](Lanes y) { return y + y * error_function(y); };
  multiply(me, l.up, ahead, n, [&](int t, int j, float y) { inner[(int64_t)t * l.up.out + j] = y; }, gelu);
  auto gated = lay_out(me, all, l.down, n, [&](int t, float*) { return inner + (int64_t)t * l.up.out; });
  multiply(me, l.down, gated, n, [&](int t, int j, float y) {
    int64_t place = (int64_t)t * width + j;
    add(place, memory_of(t).slots, added[place] + y);
  });
}

template <class V>
void run_unread(const Unread& u, Shared& all, const Member& me) {
  const Link& l = *u.link;
  const int n = u.tokens, head = l.head_width, values_at = l.heads * head;
  const float* from = u.states;
  for (int layer = 0; layer < l.depth; layer++) {
    const Matrix& m = l.reads[layer];
    const bool last = layer == l.depth - 1;
    auto laid = lay_out(me, all, m, n, [&](int t, float* room) {
      const float* row = from + (int64_t)t * m.in;
      return layer || !l.source.weight ? row : normalise(l.source, row, m.in, room);
    });
    float* out = last ? all.mixed.data : layer % 2 ? all.inner.data : all.added.data;
    multiply(me, m, laid, n, [&](int t, int j, float y) { out[(int64_t)t * m.out + j] = !last && y < 0 ? 0 : y; });
    from = out;
  }
  float* mixed = all.mixed.data;
  me.share(n * l.heads, [&](int i) {
    const int64_t t = i / l.heads, k = i % l.heads, at = u.past + t;
    float *key = mixed + t * 2 * values_at + k * head, *value = key + values_at;
    V *place = (V*)u.held + (k * u.room + at) * head, *beside = place + l.heads * u.room * head;
    if (u.cos) turn(key, head, u.cos + at * head, u.sin + at * head);
    for (int j = 0; j < head; j++) put(key[j], place + j), put(value[j], beside + j);
  });
}

// Consecutive tokens of one sequence, in groups and what is left of them.
std::vector<Piece> pieces_of(const Call& c) {
  std::vector<Piece> found;
  for (int t = 0; t < c.n_tokens;) {
    int tokens = 1;
    while (tokens < GROUP && t + tokens < c.n_tokens && c.tokens[t + tokens].cache == c.tokens[t].cache) tokens++;
    if (tokens < GROUP) tokens = 1;
    found.push_back({t, tokens});
    t += tokens;
  }
  return found;
}

}  // namespace

// What Python calls gives 1 where there is no memory for what the threads share.

EXPORT int32_t zipper_step(const Call* call) try {
  const Call& c = *call;
  static thread_local Shared all;  // memory that is asked for anew at every step costs more than the step's small parts
  size_t mixed = 0, attended = 0, inner = 0, added = c.width, laid = c.n_spoken ? laid_size(c.head, 1) : 0;
  auto reads = [&](const Matrix& m) { laid = std::max(laid, laid_size(m, 1)); };
  for (int i = 0; i < c.n_stages; i++) {
    const Stage& s = c.stages[i];
    mixed = std::max<size_t>(mixed, s.block ? s.block->qkv.out : s.link ? s.link->query.out : 0);
    attended = std::max<size_t>(attended, s.block ? s.block->out.in : s.link ? s.link->out.in : 0);
    inner = std::max<size_t>(inner, s.block ? s.block->gate.out : s.link ? s.link->up.out : 0);
    if (s.block) reads(s.block->qkv), reads(s.block->out), reads(s.block->gate), reads(s.block->down);
    if (s.link) reads(s.link->query), reads(s.link->out), reads(s.link->up), reads(s.link->down);
    for (int layer = 0; s.input && layer < s.input->depth; layer++) {
      reads(s.input->layers[layer]);
      added = std::max<size_t>(added, s.input->layers[layer].out);
    }
  }
  auto grow = [&](Buffer& part, size_t width) { part.grow(width * c.n_tokens); };
  grow(all.mixed, mixed), grow(all.attended, attended), grow(all.inner, inner), grow(all.added, added), grow(all.delta, added);
  grow(all.laid, laid), grow(all.states, c.width);
  for (int64_t t = 0; t < c.n_tokens; t++)
    for (int64_t i = 0, at = c.tokens[t].id * c.width; i < c.width; i++)
      all.states.data[t * c.width + i] = c.half ? number(((const uint16_t*)c.table)[at + i]) : ((const float*)c.table)[at + i];
  const auto pieces = pieces_of(c);
  Shared& shared = all;  // a thread_local name means another thing in every thread
  Team team(c.threads);
#pragma omp parallel num_threads(c.threads)
  {
    static thread_local Scratch own;
    Member me{team, omp_get_thread_num(), omp_get_num_threads(), own};
    bool first = true;
    for (int i = 0; i < c.n_stages; i++) {
      const Stage& s = c.stages[i];
      // Nobody changes the states before all have met again.
      if (s.keep && !me.rank) memcpy(s.keep, shared.states.data, (size_t)c.n_tokens * c.width * sizeof(float));
      if (s.input) run_input(c, s, shared, me);
      if (s.link) (s.link->half ? run_link<uint16_t> : run_link<float>)(c, s, first, pieces, shared, me);
      if (s.block) (c.half ? run_block<uint16_t> : run_block<float>)(c, s, pieces, shared, me);
      first = !s.link || s.last;
    }
    if (c.n_spoken) {
      auto laid = lay_out(me, shared, c.head, c.n_spoken, [&](int t, float* room) {
        return normalise(c.norm, shared.states.data + (int64_t)c.spoken[t] * c.width, c.width, room);
      });
      multiply(me, c.head, laid, c.n_spoken, [&](int t, int j, float y) { c.logits[(int64_t)t * c.head.out + j] = y; });
    }
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

EXPORT int32_t zipper_read(const Unread* unread, int32_t n, int32_t threads) try {
  static thread_local Shared all;
  for (int i = 0; i < n; i++) {
    const Link& l = *unread[i].link;
    for (int layer = 0; layer < l.depth; layer++) {
      const size_t tokens = unread[i].tokens, out = tokens * l.reads[layer].out;
      all.mixed.grow(out), all.inner.grow(out), all.added.grow(out), all.laid.grow(laid_size(l.reads[layer], tokens));
    }
  }
  Shared& shared = all;
  Team team(threads);
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch own;
    Member me{team, omp_get_thread_num(), omp_get_num_threads(), own};
    for (int i = 0; i < n; i++) (unread[i].link->half ? run_unread<uint16_t> : run_unread<float>)(unread[i], shared, me);
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}

// y = m x, of tokens, the bias included. x: tokens, in. y: tokens, out.
EXPORT int32_t zipper_product(const Matrix* matrix, const float* x, int32_t tokens, int32_t threads, float* y) try {
  const Matrix& m = *matrix;
  static thread_local Shared all;
  all.laid.grow(laid_size(m, tokens));
  Shared& shared = all;
  Team team(threads);
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch own;
    Member me{team, omp_get_thread_num(), omp_get_num_threads(), own};
    auto laid = lay_out(me, shared, m, tokens, [&](int t, float*) { return x + (int64_t)t * m.in; });
    multiply(me, m, laid, tokens, [&](int t, int j, float number) { y[(int64_t)t * m.out + j] = number; });
  }
  return 0;
} catch (const std::bad_alloc&) {
  return 1;
}
