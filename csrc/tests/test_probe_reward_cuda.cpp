// The CUDA kernels of probe_reward as host code (see cuda_emulation.h), against the formulas in double. Every
// buffer is a heap block of its exact size, so that AddressSanitizer sees a stray access.
#include "cuda_emulation.h"
#include "probe_reward/probe_reward_cuda.cu"
#include "probe_reward_reference.h"

namespace {

using namespace reprdpo::probe_reward;

int failures = 0;
std::string current;

void expect(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::printf("FAILED %s: %s\n", current.c_str(), what);
}

enum class Form { kPadded, kPacked, kPooled };

struct Case {
  Gate gate;
  int64_t B, L, D;
  bool vectors;
  int rows;
  Form form = Form::kPadded;
};

constexpr int64_t kTokens = 3;

// hidden_states and where they are read; rows that nobody reads are NaN.
template <typename T>
struct States {
  std::vector<std::vector<T>> layers;
  std::vector<int64_t> index;
  int64_t element_stride, rows;  // rows of a layer
};

template <typename T>
States<T> make_states(const Case& c, Problem& p, std::mt19937& random) {
  // Elements lie two apart where no vectors are asked for.
  States<T> states{{},
                   {},
                   c.vectors ? 1 : 2,
                   c.form == Form::kPooled   ? c.B
                   : c.form == Form::kPacked ? 7
                                             : c.B * kTokens};
  T nothing;
  std::memset(&nothing, 0xff, sizeof nothing);
  states.layers.assign(c.L, std::vector<T>(states.rows * c.D * states.element_stride, nothing));
  for (int64_t b = 0; b < c.B; ++b) {
    int64_t token = static_cast<int64_t>(random() % (c.form == Form::kPacked ? 7 : kTokens));
    if (c.form != Form::kPooled && b == 1) token = c.form == Form::kPacked ? int64_t{1} << 40 : -1;
    p.present[b] = c.form == Form::kPooled || b != 1;
    states.index.push_back(token);
    const int64_t row = c.form == Form::kPooled ? b : c.form == Form::kPacked ? token : b * kTokens + token;
    for (int64_t l = 0; p.present[b] && l < c.L; ++l) {
      const auto values = normal_values(c.D, 1, random);
      for (int64_t i = 0; i < c.D; ++i) {
        T& element = states.layers[l][(row * c.D + i) * states.element_stride];
        // Packed sequences may share a row: it keeps its first values.
        if (std::isnan(value_of(element))) element_near(values[i], element);
        p.rows[(b * c.L + l) * c.D + i] = value_of(element);
      }
    }
  }
  return states;
}

template <typename T>
ForwardArguments forward_arguments(const Case& c, const Problem& p, const States<T>& states) {
  ForwardArguments a = {};
  const int64_t row = c.D * states.element_stride;
  a.sequence_stride = c.form == Form::kPadded ? kTokens * row : c.form == Form::kPooled ? row : 0;
  a.token_stride = c.form == Form::kPooled ? 0 : row;
  a.element_stride = states.element_stride;
  a.at = c.form == Form::kPooled ? DeviceIndex{nullptr, 1}
                                 : DeviceIndex{states.index.data(), c.form == Form::kPacked ? 7 : kTokens};
  a.probe_weight = p.w.data();
  a.probe_bias = p.bias.data();
  a.gate_weight = p.v.data();
  a.gate_bias = p.c.data();
  a.B = c.B;
  a.D = static_cast<int>(c.D);
  a.L = static_cast<int>(c.L);
  a.gate = c.gate;
  return a;
}

template <typename T>
struct Results {
  std::vector<float> reward, scores, gate, gamma;
  std::vector<T> pooled;
};

template <typename T>
Results<T> run_forward(const Case& c, const Problem& p, const States<T>& states, bool squash, bool reduce) {
  Results<T> out{std::vector<float>(c.B), std::vector<float>(c.B * c.L), std::vector<float>(c.B * c.L),
                 std::vector<float>(c.B / 2), std::vector<T>(c.B * c.L * c.D)};
  std::vector<unsigned> arrivals((c.B + c.rows - 1) / c.rows + 1);
  ForwardArguments a = forward_arguments(c, p, states);
  a.reward = out.reward.data();
  a.scores = out.scores.data();
  a.gate_values = out.gate.data();
  a.pooled = out.pooled.data();
  a.arrivals = arrivals.data();
  if (c.B % 2 == 0) a.confidence = {out.gamma.data(), 2.0f, 0.4f, squash, true, reduce};
  for (int64_t l = 0; l < c.L; l += kMaxLayers) {
    a.first_layer = static_cast<int>(l);
    a.launch_layers = static_cast<int>(std::min<int64_t>(kMaxLayers, c.L - l));
    for (int i = 0; i < a.launch_layers; ++i) a.layers[i] = states.layers[l + i].data();
    launch_forward(a, row_type_of(T()), c.vectors, c.rows, nullptr);
  }
  expect(std::all_of(arrivals.begin(), arrivals.end(), [](unsigned count) { return count == 0; }),
         "the counters are zero again");
  return out;
}

template <typename T>
void check_forward(const Case& c, const Problem& p, const States<T>& states, const Forward& exact) {
  for (const auto& [squash, reduce] : {std::pair(false, true), std::pair(true, false)}) {
    if (squash && c.L * c.D > 200) break;
    const Results<T> got = run_forward(c, p, states, squash, reduce);
    expect(all_close(got.scores, exact.scores, 1e-6), "scores");
    expect(all_close(got.gate, exact.gate, 4e-6), "gate");
    expect(all_close(got.reward, exact.reward, 4e-6), "reward");
    std::vector<double> pooled = p.rows;
    for (int64_t b = 0; b < c.B; ++b) {
      if (!p.present[b]) std::fill_n(pooled.begin() + b * c.L * c.D, c.L * c.D, std::nan(""));
    }
    expect(all_close(got.pooled, pooled, 0), "pooled rows");
    if (c.B % 2 != 0) continue;
    // Of the rewards that came, which are what the confidence is a function of.
    std::vector<float> gamma(c.B / 2);
    confidence({2.0, squash, 0.4f, reduce}, got.reward.data(), c.B / 2, gamma.data());
    expect(all_close(got.gamma, std::vector<double>(gamma.begin(), gamma.end()), 1e-6), "confidence");
  }
}

template <typename T>
void check_backward(const Case& c, const Problem& p, const States<T>& states, const Forward& exact,
                    bool asks_all) {
  const Gradients wanted = gradients_of(p, exact);
  // Rows as the forward saves them, NaN where the index points nowhere.
  std::vector<T> pooled(c.B * c.L * c.D);
  for (int64_t b = 0; b < c.B; ++b) {
    for (int64_t at = b * c.L * c.D; at < (b + 1) * c.L * c.D; ++at) {
      if (p.present[b]) element_near(static_cast<float>(p.rows[at]), pooled[at]);
      if (!p.present[b]) std::memset(&pooled[at], 0xff, sizeof(T));
    }
  }
  const std::vector<float> scores(exact.scores.begin(), exact.scores.end()),
      gate(exact.gate.begin(), exact.gate.end());
  const int64_t tokens = states.rows / (c.form == Form::kPadded ? std::max<int64_t>(c.B, 1) : 1);
  std::vector<float> w(p.w.size()), bias(c.L), v(p.v.size()), mixer_bias(c.L);
  std::vector<std::vector<T>> hidden(c.L, std::vector<T>(states.rows * c.D));
  for (auto& layer : hidden) std::memset(layer.data(), 0xff, layer.size() * sizeof(T));
  BackwardArguments a = {};
  a.hidden_rows = asks_all ? states.rows : 0;
  a.hidden_row_stride = c.D;
  a.hidden_form = c.form == Form::kPadded   ? HiddenForm::kPadded
                  : c.form == Form::kPacked ? HiddenForm::kPacked
                                            : HiddenForm::kPooled;
  a.pooled = pooled.data();
  a.sequence_stride = c.L * c.D;
  a.layer_stride = c.D;
  a.element_stride = 1;
  a.at = c.form == Form::kPooled ? DeviceIndex{nullptr, 1} : DeviceIndex{states.index.data(), tokens};
  a.upstream = {{p.grad_reward.data(), 1, 0}, {p.grad_scores.data(), c.L, 1}, {p.grad_gate.data(), c.L, 1}};
  a.scores = scores.data();
  a.gate_values = gate.data();
  a.probe_weight = p.w.data();
  a.gate_weight = p.v.data();
  a.probe_weight_grad = w.data();
  a.probe_bias_grad = asks_all ? bias.data() : nullptr;
  a.gate_weight_grad = asks_all && c.gate != Gate::kStatic ? v.data() : nullptr;
  a.gate_bias_grad = asks_all ? mixer_bias.data() : nullptr;
  a.B = c.B;
  a.D = static_cast<int>(c.D);
  a.L = static_cast<int>(c.L);
  a.gate = c.gate;
  for (int64_t l = 0; l < c.L; l += kMaxLayers) {
    a.first_layer = static_cast<int>(l);
    a.launch_layers = static_cast<int>(std::min<int64_t>(kMaxLayers, c.L - l));
    for (int i = 0; i < a.launch_layers; ++i) a.hidden[i] = asks_all ? hidden[l + i].data() : nullptr;
    launch_backward(a, row_type_of(T()), c.vectors, 1, nullptr);
  }
  expect(all_close(w, wanted.w, 4e-6), "probe weight's gradient");
  if (!asks_all) return;
  expect(all_close(bias, wanted.bias, 4e-6), "probe bias's gradient");
  expect(all_close(mixer_bias, wanted.c, 8e-6), "gate bias's gradient");
  expect(all_close(v, wanted.v, 8e-6), "gate weight's gradient");
  for (int64_t l = 0; l < c.L; ++l) {
    std::vector<double> rows(states.rows * c.D);
    for (int64_t b = 0; b < c.B; ++b) {
      if (!p.present[b]) continue;
      const int64_t row = c.form == Form::kPooled   ? b
                          : c.form == Form::kPacked ? states.index[b]
                                                    : b * kTokens + states.index[b];
      for (int64_t i = 0; i < c.D; ++i) {
        rows[row * c.D + i] += wanted.d[b * c.L + l] * p.w[l * c.D + i];
        if (c.gate == Gate::kSoftmax) rows[row * c.D + i] += wanted.dz[b * c.L + l] * p.v[l * c.D + i];
      }
    }
    expect(all_close(hidden[l], rows, sizeof(T) == 4 ? 8e-6 : 0x1p-8), "hidden states' gradient");
  }
}

template <typename T>
void check(const Case& c, const char* type) {
  std::mt19937 random(7);
  const char* gates[] = {"softmax", "static", "vote"};
  const char* forms[] = {"padded", "packed", "pooled"};
  char name[160];
  std::snprintf(name, sizeof name, "%s %s B=%d L=%d D=%d %s, %d rows, %s", type,
                gates[static_cast<int>(c.gate)], static_cast<int>(c.B), static_cast<int>(c.L),
                static_cast<int>(c.D), c.vectors ? "vectors" : "elements", c.rows,
                forms[static_cast<int>(c.form)]);
  current = name;
  Problem p = make_problem(c.gate, c.B, c.L, c.D, random);
  const States<T> states = make_states<T>(c, p, random);
  const Forward exact = forward_of(p);
  check_forward(c, p, states, exact);
  check_backward(c, p, states, exact, true);
  check_backward(c, p, states, exact, false);
}

template <typename T>
void check_type(const char* type, std::initializer_list<Gate> gates) {
  for (Gate gate : gates) {
    // One of each; no whole vector; a group of sequences that is not full.
    check<T>({gate, 1, 1, 1, false, 1}, type);
    check<T>({gate, 3, 2, 77, false, 1}, type);
    check<T>({gate, 6, 3, 24, true, 4, Form::kPacked}, type);
    check<T>({gate, 5, 2, 520, true, 2, Form::kPooled}, type);
  }
}

}  // namespace

int main() {
  check_type<float>("float", {Gate::kSoftmax, Gate::kStatic, Gate::kVote});
  check_type<reprdpo::BFloat16>("bfloat16", {Gate::kSoftmax});
  check_type<reprdpo::Half>("half", {Gate::kSoftmax});
  // A width that a block takes in several steps; more layers than a warp; more than one launch; more than a
  // tile of sequences.
  check<reprdpo::BFloat16>({Gate::kSoftmax, 2, 1, 8192, true, 1}, "bfloat16");
  check<float>({Gate::kSoftmax, 2, 80, 8, true, 2}, "float");
  check<float>({Gate::kVote, 2, 37, 5, false, 1}, "float");
  check<reprdpo::Half>({Gate::kSoftmax, 2, 130, 8, true, 2}, "half");
  check<reprdpo::BFloat16>({Gate::kVote, 70, 2, 40, true, 4}, "bfloat16");
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
