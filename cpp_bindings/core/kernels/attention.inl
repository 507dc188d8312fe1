// Attention of one head, for any Lanes, after Milakov and Gimelshein's online softmax: keys are read in stretches of
// 64, in order, and no row of scores is kept. What a row sums, and in which order, depends on its position alone.

constexpr int kStretch = 64;
constexpr int kTileRows = 6;
constexpr int kLargestWidth = 512;
constexpr float kNone = -3.0e38f;  // less than every score

// Keys and values of a stretch.
template <class Value>
struct Stretch {
  const Value* keys;    // [4, D, 16]
  const Value* values;  // [64, Dp]
  const float* key_scales;
  const float* value_scales;
};

// Softmax of some rows up to a stretch: the largest score, the sums of the weights, and the weighted values.
struct Running {
  float most[kTileRows];
  Lanes sums[kTileRows];
  float results[kTileRows][kLargestWidth];
};

template <class Value, int R>
void score(const Stretch<Value>& stretch, int width, const float* queries, size_t stride, float scores[][kStretch]) {
  Lanes sums[R][4];
  for (int r = 0; r < R; r++)
    for (int b = 0; b < 4; b++) sums[r][b] = broadcast(0.0f);
  for (int d = 0; d < width; d++) {
    Lanes keys[4];
    for (int b = 0; b < 4; b++) keys[b] = load(stretch.keys + (static_cast<size_t>(b) * width + d) * 16);
    for (int r = 0; r < R; r++) {
      const Lanes query = broadcast(queries[r * stride + d]);
      for (int b = 0; b < 4; b++) sums[r][b] = fused(query, keys[b], sums[r][b]);
    }
  }
  for (int r = 0; r < R; r++) {
    for (int b = 0; b < 4; b++) {
      Lanes s = sums[r][b];
      if (stretch.key_scales != nullptr) s = multiply(s, load(stretch.key_scales + 16 * b));
      store(scores[r] + 16 * b, s);
    }
  }
}

// Turns scores into weights; returns by what earlier weights have to be multiplied.
inline float weigh(float* scores, int visible, const float* value_scales, float* most, Lanes* sums) {
  Lanes part[4], larger = broadcast(*most);
  for (int b = 0; b < 4; b++) {
    part[b] = filled_from(load(scores + 16 * b), visible - 16 * b, kNone);
    larger = maximum(larger, part[b]);
  }
  const float now = largest(larger);
  float kept[16];
  store(kept, exponential(broadcast(*most - now)));
  *most = now;
  *sums = multiply(*sums, broadcast(kept[0]));
  for (int b = 0; b < 4; b++) {
    Lanes weights = exponential(subtract(part[b], broadcast(now)));
    weights = filled_from(weights, visible - 16 * b, 0.0f);
    *sums = add(*sums, weights);
    if (value_scales != nullptr) weights = multiply(weights, load(value_scales + 16 * b));
    store(scores + 16 * b, weights);
  }
  return kept[0];
}

template <class Value, int R>
void collect(const Stretch<Value>& stretch, int padded, int visible, const float weights[][kStretch], const float* kept,
             float results[][kLargestWidth]) {
  for (int d = 0; d < padded; d += 64) {
    const int lanes = padded - d < 64 ? (padded - d) / 16 : 4;
    Lanes sums[R][4];
    for (int r = 0; r < R; r++)
      for (int i = 0; i < 4; i++)
        sums[r][i] = i < lanes ? multiply(load(results[r] + d + 16 * i), broadcast(kept[r])) : broadcast(0.0f);
    const Value* values = stretch.values + d;
    for (int j = 0; j < visible; j++, values += padded) {
      Lanes value[4];
      for (int i = 0; i < 4; i++) value[i] = load(values + (i < lanes ? 16 * i : 0));
      for (int r = 0; r < R; r++) {
        const Lanes weight = broadcast(weights[r][j]);
        for (int i = 0; i < 4; i++) sums[r][i] = fused(weight, value[i], sums[r][i]);
      }
    }
    for (int r = 0; r < R; r++)
      for (int i = 0; i < lanes; i++) store(results[r] + d + 16 * i, sums[r][i]);
  }
}

// Rows `row` .. row + R - 1 of the queries, and the keys from position `start` on.
template <class Value, int R>
void attend_stretch(const HeadQueries& q, int width, int row, int start, const Stretch<Value>& stretch,
                    Running& state) {
  float scores[R][kStretch], kept[R];
  score<Value, R>(stretch, width, q.queries + row * q.query_stride, q.query_stride, scores);
  int visible = 0;
  for (int r = 0; r < R; r++) {
    const int seen = q.past + row + r + 1 - start;
    visible = seen < kStretch ? (seen > visible ? seen : visible) : kStretch;
    kept[r] = seen <= 0 ? 1.0f : weigh(scores[r], seen, stretch.value_scales, &state.most[r], &state.sums[r]);
    if (seen <= 0)
      for (int j = 0; j < kStretch; j++) scores[r][j] = 0.0f;
  }
  collect<Value, R>(stretch, padded_width(width), visible, scores, kept, state.results);
}

template <class Value>
Stretch<Value> stretch_of(const HeadBlock& block, int start) {
  const int place = start % kBlockPositions;
  return {static_cast<const Value*>(block.keys) + static_cast<size_t>(place) * block.width,
          static_cast<const Value*>(block.values) + static_cast<size_t>(place) * padded_width(block.width),
          block.key_scales == nullptr ? nullptr : block.key_scales + place,
          block.value_scales == nullptr ? nullptr : block.value_scales + place};
}

// The stretch in floats, which several tiles of rows then read.
template <class Value>
Stretch<float> widened(const Stretch<Value>& stretch, int width, float* scratch) {
  const size_t keys = static_cast<size_t>(kStretch) * width,
               values = static_cast<size_t>(kStretch) * padded_width(width);
  for (size_t i = 0; i < keys; i += 16) store(scratch + i, load(stretch.keys + i));
  for (size_t i = 0; i < values; i += 16) store(scratch + keys + i, load(stretch.values + i));
  return {scratch, scratch + keys, stretch.key_scales, stretch.value_scales};
}

template <class Value, int R>
void attend_tile(const HeadQueries& q, const HeadBlock* blocks, int row, Running& state) {
  const int width = blocks[0].width, last = q.past + row + R - 1;
  for (int start = 0; start <= last; start += kStretch)
    attend_stretch<Value, R>(q, width, row, start, stretch_of<Value>(blocks[start / kBlockPositions], start), state);
}

inline void begin(Running& state, int rows, int padded) {
  for (int r = 0; r < rows; r++) {
    state.most[r] = kNone;
    state.sums[r] = broadcast(0.0f);
    for (int d = 0; d < padded; d += 16) store(state.results[r] + d, broadcast(0.0f));
  }
}

inline void finish(const HeadQueries& q, int row, int rows, int width, Running& state) {
  for (int r = 0; r < rows; r++) {
    const Lanes total = broadcast(sum(state.sums[r]));
    for (int d = 0; d < width; d += 16)
      store_part(q.results + (row + r) * q.result_stride + d, divide(load(state.results[r] + d), total), width - d);
  }
}

constexpr int kGroupTiles = 6;

// Tiles of rows that share each widened stretch.
template <class Value>
void attend_group(const HeadQueries& q, const HeadBlock* blocks, int row, int rows, float* scratch, Running* states) {
  const int width = blocks[0].width;
  const int tiles = (rows + kTileRows - 1) / kTileRows;
  for (int t = 0; t < tiles; t++) begin(states[t], kTileRows, padded_width(width));
  for (int start = 0; start <= q.past + row + rows - 1; start += kStretch) {
    const Stretch<float> stretch = widened(stretch_of<Value>(blocks[start / kBlockPositions], start), width, scratch);
    for (int t = 0; t < tiles; t++) {
      const int first = row + t * kTileRows, count = rows - t * kTileRows;
      if (q.past + first + (count < kTileRows ? count : kTileRows) - 1 < start) continue;
      switch (count < kTileRows ? count : kTileRows) {
        case 6:
          attend_stretch<float, 6>(q, width, first, start, stretch, states[t]);
          break;
        case 5:
          attend_stretch<float, 5>(q, width, first, start, stretch, states[t]);
          break;
        case 4:
          attend_stretch<float, 4>(q, width, first, start, stretch, states[t]);
          break;
        case 3:
          attend_stretch<float, 3>(q, width, first, start, stretch, states[t]);
          break;
        case 2:
          attend_stretch<float, 2>(q, width, first, start, stretch, states[t]);
          break;
        default:
          attend_stretch<float, 1>(q, width, first, start, stretch, states[t]);
      }
    }
  }
  for (int t = 0; t < tiles; t++) {
    const int count = rows - t * kTileRows;
    finish(q, row + t * kTileRows, count < kTileRows ? count : kTileRows, width, states[t]);
  }
}

template <class Value>
void attend_values(const HeadQueries& q, const HeadBlock* blocks) {
  const int width = blocks[0].width;
  if (q.rows == 1) {
    Running state;
    begin(state, 1, padded_width(width));
    attend_tile<Value, 1>(q, blocks, 0, state);
    finish(q, 0, 1, width, state);
    return;
  }
  float scratch[2 * kStretch * kLargestWidth];
  Running states[kGroupTiles];
  for (int row = 0; row < q.rows; row += kGroupTiles * kTileRows) {
    const int rows = q.rows - row < kGroupTiles * kTileRows ? q.rows - row : kGroupTiles * kTileRows;
    attend_group<Value>(q, blocks, row, rows, scratch, states);
  }
}

void attend(const HeadQueries& queries, const HeadBlock* blocks) {
  switch (blocks[0].type) {
    case KvType::f32:
      return attend_values<float>(queries, blocks);
    case KvType::f16:
      return attend_values<uint16_t>(queries, blocks);
    case KvType::i8:
      return attend_values<int8_t>(queries, blocks);
  }
}

template <class Value>
void scatter(const HeadBlock& block, int position, const Value* key, const Value* value) {
  const int width = block.width, padded = padded_width(width), place = position % kBlockPositions;
  Value* const keys = static_cast<Value*>(block.keys) + static_cast<size_t>(place / 16) * width * 16 + place % 16;
  for (int d = 0; d < width; d++) keys[static_cast<size_t>(d) * 16] = key[d];
  __builtin_memcpy(static_cast<Value*>(block.values) + static_cast<size_t>(place) * padded, value,
                   padded * sizeof(Value));
}

void store_key_value(const HeadBlock& block, int position, const float* key, const float* value) {
  const int width = block.width, padded = padded_width(width), place = position % kBlockPositions;
  float k[kLargestWidth], v[kLargestWidth];
  for (int d = 0; d < padded; d += 16) {
    store(k + d, load_part(key + d, width - d));
    store(v + d, load_part(value + d, width - d));
  }
  if (block.type == KvType::f32) return scatter(block, position, k, v);
  if (block.type == KvType::f16) {
    uint16_t half_k[kLargestWidth], half_v[kLargestWidth];
    for (int d = 0; d < padded; d += 16) {
      store(half_k + d, load(k + d));
      store(half_v + d, load(v + d));
    }
    return scatter(block, position, half_k, half_v);
  }
  int8_t codes_k[kLargestWidth], codes_v[kLargestWidth];
  int32_t unused = 0;
  block.key_scales[place] = round_to_int8(k, padded, codes_k, &unused);
  block.value_scales[place] = round_to_int8(v, padded, codes_v, &unused);
  scatter(block, position, codes_k, codes_v);
}
