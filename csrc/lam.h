// Plain parameter structs: the only thing a kernel file sees. No torch, no Python, no CUDA header.
#pragma once
#include <cstdint>

namespace lam {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

// A 4-D operand. Strides are in elements; an axis that broadcasts has stride 0. data == nullptr: absent (or, for a
// gradient, not wanted, and then nothing is computed for it).
struct View {
  void* data = nullptr;
  DType dtype = DType::f32;
  int64_t stride[4] = {0, 0, 0, 0};
};

// A mask that is never stored: M = rows columns^T + offset. Absent: rank 0. Of gradients: contiguous, data null where
// not wanted.
struct Factors {
  int64_t rank = 0;
  View rows;     // [B,H,Lq,rank], unit last stride, broadcast axes 0
  View columns;  // [B,H,Lk,rank], the same
  View offset;   // [B,H,1,Lk], any stride; data null when there is none
};

enum class PatternKind : int32_t { block_diagonal = 0, toeplitz = 1, dilated_toeplitz = 2, causal = 3, segments = 4 };

constexpr int kMaxPatternTerms = 4;

// One term of a pattern; a spec is the intersection of its terms, and no term at all means "everything".
struct PatternTerm {
  PatternKind kind;
  int32_t end_aligned;  // 0: positions count from the start, 1: both count from the last one
  int64_t a;            // block | radius | radius | - | index of the pair of id arrays
  int64_t b;            // -     | -      | dilation
};
struct PatternSpec {
  int32_t n_terms = 0;
  PatternTerm terms[kMaxPatternTerms];
};

// Segment ids, int64: [B|1, Lq] and [B|1, Lk]; stride_b is 0 when shared by the batch.
struct SegmentIds {
  const int64_t* query = nullptr;
  const int64_t* key = nullptr;
  int64_t query_stride_b = 0, query_stride_l = 1;
  int64_t key_stride_b = 0, key_stride_l = 1;
};

// Runs body(ctx, task) for task in [0, n), on as many threads as the caller allows; returns when all are done.
using ParallelFor = void (*)(int64_t n, void (*body)(void* ctx, int64_t task), void* ctx);

struct MaskedAttentionParams {
  int64_t B, H, Hkv, Lq, Lk, D, Dv;
  double scale;
  double dropout_p;
  int64_t dropout_seed, dropout_offset;
  bool gate;  // the bias operand holds M >= 0 and stands for log M

  View query, key, value;      // [B,H,Lq,D] [B,Hkv,Lk,D] [B,Hkv,Lk,Dv], one dtype, unit last stride
  View multiplier, bias;       // any float dtype, any stride, broadcast axes 0
  Factors multiplier_factors, bias_factors;  // instead of the mask of that name; never with gate
  View attn_mask;              // uint8 (bool), nonzero = visible; dtype unused
  View key_mask;               // uint8 [B,Lk] as strides {b, 0, 0, l}; dtype unused
  int64_t n_patterns;          // 0 (everything), 1 (all heads) or H
  const PatternSpec* patterns;
  const SegmentIds* segments;  // indexed by PatternTerm::a

  View out;  // [B,H,Lq,Dv] contiguous, dtype of query
  View lse;  // [B,H,Lq] contiguous (strides {b, h, l, 0}), fp32, or fp64 for fp64 input; natural log
  View lse_rest;  // where given, lse is the maximum alone and this is the rest; like lse

  // Backward only. grad_lse may be absent (zero).
  View grad_out, grad_lse;                     // grad_out: unit last stride
  View grad_query, grad_key, grad_value;       // contiguous, dtype of query
  View grad_multiplier, grad_bias;             // contiguous, shape and dtype of the operand; broadcast axes 0
  Factors grad_multiplier_factors, grad_bias_factors;

  int64_t num_threads;
  ParallelFor parallel_for;
};

// 0 on success, otherwise the process could not get the scratch memory it asked for.
using MaskedAttentionKernel = int (*)(const MaskedAttentionParams&);

// The base is the global half: it has no pattern, and all operands and their gradients. `local` has the same operands
// with the pattern, and out, lse and grad_out of the local half.
struct GlobalLocalAttentionParams : MaskedAttentionParams {
  MaskedAttentionParams local;
};
using GlobalLocalAttentionKernel = int (*)(const GlobalLocalAttentionParams&);

// GateAtt: out = (R A^g + (1 - R) A^l) V with R = sigmoid(A^g gate_global - A^l gate_local). Lq == Lk. Of the base are
// used: sizes, scale, query, key, value, key_mask, patterns (of the local map), out, grad_out, grad_query, grad_key,
// grad_value and the threads.
struct MapGatedAttentionParams : MaskedAttentionParams {
  bool renormalise;
  View gate_global, gate_local;            // [T, T] in the last two axes, any float dtype, any stride
  View grad_gate_global, grad_gate_local;  // contiguous, of the gate's dtype
};
using MapGatedAttentionKernel = int (*)(const MapGatedAttentionParams&);

constexpr int64_t kMaxScoreLayers = 64;

// Cross-attention LAM: the mask is a network of the score row. Of the base are used: sizes with H == Hkv and Lk <= 128,
// scale, query, key, value, key_mask, out, grad_out, grad_query, grad_key, grad_value and the threads.
struct ScoreMaskedAttentionParams : MaskedAttentionParams {
  bool multiply;           // the mask multiplies the scores, else it is added
  bool mean;               // the network reads the mean of the heads' scores, else those of each
  int64_t layers;          // 1 to kMaxScoreLayers
  const int64_t* widths;   // layers + 1: Lk, hidden ..., Lk
  const void* parameters;  // of each layer weight [in, out] and bias [out], fp32, or fp64 for fp64 input
  void* grad_parameters;   // the same; null when not wanted
};
using ScoreMaskedAttentionKernel = int (*)(const ScoreMaskedAttentionParams&);

}  // namespace lam
