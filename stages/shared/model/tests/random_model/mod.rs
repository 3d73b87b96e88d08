//! Random models, adapters and packed rows, the same numbers for the same seed: the tests of a
//! backward pass take them, on the CPU (`shapes.rs`) and on a GPU (the crate `cuda`).
#![allow(clippy::unwrap_used, missing_docs, unreachable_pub, reason = "tests")]

use std::collections::HashMap;
use std::path::Path;

use model::{Adapter, LoraConfig, MicroBatch, Model, PROJECTIONS};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

const POSITIONS: usize = 1024;

/// A model's sizes.
#[derive(Clone, Debug)]
pub struct Sizes {
    pub family: &'static str,
    pub hidden: usize,
    pub ffn: usize,
    pub kv_heads: usize,
    pub group: usize,
    pub head_dim: usize,
    pub vocabulary: usize,
    pub layers: usize,
    pub tied: bool,
    pub window: usize,
    /// Of attention and of the logits.
    pub softcaps: [Option<f32>; 2],
}

/// What is trained, and on what.
#[derive(Clone, Debug)]
pub struct Run {
    pub r: usize,
    pub alpha: f32,
    /// A bit a projection; at least one is set.
    pub targets: usize,
    pub rslora: bool,
    /// None, dropout, DoRA.
    pub variant: u8,
    pub segments: Vec<usize>,
    pub seed: u64,
}

/// Sizes that a CPU takes: no multiples of anything.
pub fn sizes() -> impl Strategy<Value = Sizes> {
    let cap = || prop::option::weighted(0.8, 2.0f32..60.0);
    let family = prop::sample::select(vec!["llama", "qwen2", "gemma2"]);
    let attention = (1usize..=2, 1usize..=3, 2usize..=20, 1usize..=12);
    let outer = (3usize..=70, 3usize..=70, 3usize..=90, 1usize..=3, any::<bool>());
    (family, attention, outer, [cap(), cap()]).prop_map(|(family, attention, outer, softcaps)| {
        let (kv_heads, group, half, window) = attention;
        let (hidden, ffn, vocabulary, layers, tied) = outer;
        let head_dim = 2 * half;
        let tied = tied || family == "gemma2";
        Sizes {
            family,
            hidden,
            ffn,
            kv_heads,
            group,
            head_dim,
            vocabulary,
            layers,
            tied,
            window,
            softcaps,
        }
    })
}

/// Runs over up to four segments of up to `longest` tokens.
pub fn runs(longest: usize) -> impl Strategy<Value = Run> {
    let adapter = (1usize..=6, 0.5f32..12.0, 1usize..128, any::<bool>(), 0u8..3);
    let segments = prop::collection::vec(1..=longest, 1..=4);
    (adapter, segments, any::<u64>()).prop_map(
        |((r, alpha, targets, rslora, variant), segments, seed)| Run {
            r,
            alpha,
            targets,
            rslora,
            variant,
            segments,
            seed,
        },
    )
}

/// Numbers in ±1 that are a function of seed and index.
fn number(seed: u64, i: usize) -> f32 {
    let mixed = kernels::dropout::mix(seed ^ kernels::dropout::mix(i as u64));
    (mixed >> 40) as f32 / 8_388_608.0 - 1.0
}

fn config(s: &Sizes) -> Value {
    let mut config = json!({
        "model_type": s.family, "hidden_size": s.hidden, "intermediate_size": s.ffn,
        "num_hidden_layers": s.layers, "num_attention_heads": s.kv_heads * s.group,
        "num_key_value_heads": s.kv_heads, "head_dim": s.head_dim, "vocab_size": s.vocabulary,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": s.tied, "hidden_act": "silu",
    });
    if s.family == "gemma2" {
        config["hidden_act"] = json!("gelu_pytorch_tanh");
        config["query_pre_attn_scalar"] = json!(s.head_dim as f32 * 1.5);
        config["sliding_window"] = json!(s.window);
        config["attn_logit_softcapping"] = json!(s.softcaps[0]);
        config["final_logit_softcapping"] = json!(s.softcaps[1]);
    }
    config
}

/// Names and shapes of all tensors.
fn tensors(s: &Sizes) -> Vec<(String, Vec<usize>)> {
    let (q, kv) = (s.kv_heads * s.group * s.head_dim, s.kv_heads * s.head_dim);
    let mut all = vec![("model.embed_tokens.weight".to_owned(), vec![s.vocabulary, s.hidden])];
    let mut push = |name: String, shape: &[usize]| all.push((name, shape.to_vec()));
    for layer in 0..s.layers {
        let at = |name: &str| format!("model.layers.{layer}.{name}");
        for (name, outputs, inputs) in [
            ("self_attn.q_proj", q, s.hidden),
            ("self_attn.k_proj", kv, s.hidden),
            ("self_attn.v_proj", kv, s.hidden),
            ("self_attn.o_proj", s.hidden, q),
            ("mlp.gate_proj", s.ffn, s.hidden),
            ("mlp.up_proj", s.ffn, s.hidden),
            ("mlp.down_proj", s.hidden, s.ffn),
        ] {
            push(at(&format!("{name}.weight")), &[outputs, inputs]);
            if s.family == "qwen2"
                && ["q_proj", "k_proj", "v_proj"].iter().any(|p| name.ends_with(p))
            {
                push(at(&format!("{name}.bias")), &[outputs]);
            }
        }
        let gemma = ["pre_feedforward_layernorm", "post_feedforward_layernorm"];
        let gemma = gemma.into_iter().filter(|_| s.family == "gemma2");
        for name in ["input_layernorm", "post_attention_layernorm"].into_iter().chain(gemma) {
            push(at(&format!("{name}.weight")), &[s.hidden]);
        }
    }
    push("model.norm.weight".to_owned(), &[s.hidden]);
    if !s.tied {
        push("lm_head.weight".to_owned(), &[s.vocabulary, s.hidden]);
    }
    all
}

/// Writes a model folder; `round` is applied to every value.
pub fn write_model(folder: &Path, s: &Sizes, seed: u64, round: fn(f32) -> f32) {
    std::fs::write(folder.join("config.json"), config(s).to_string()).unwrap();
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors(s)
        .into_iter()
        .enumerate()
        .map(|(t, (name, shape))| {
            let offset =
                if name.ends_with("norm.weight") && s.family != "gemma2" { 1.0 } else { 0.0 };
            let spread = if shape.len() == 2 { 1.5 / (shape[1] as f32).sqrt() } else { 0.3 };
            let len: usize = shape.iter().product();
            let value = |i| round(offset + spread * number(seed ^ ((t as u64) << 32), i));
            (name, shape, (0..len).flat_map(|i| value(i).to_le_bytes()).collect())
        })
        .collect();
    let views = bytes.iter().map(|(name, shape, data)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), data).unwrap())
    });
    let file = safetensors::serialize(views, None::<HashMap<String, String>>).unwrap();
    std::fs::write(folder.join("model.safetensors"), file).unwrap();
}

/// An adapter away from where adapters start; `round` is applied to every factor's values.
pub fn adapter(model: &Model, run: &Run, round: fn(f32) -> f32) -> Adapter {
    let chosen = PROJECTIONS.iter().enumerate().filter(|(i, _)| (run.targets >> i) & 1 == 1);
    let config = LoraConfig {
        r: run.r,
        alpha: run.alpha,
        dropout: if run.variant == 1 { 0.3 } else { 0.0 },
        targets: chosen.map(|(_, name)| (*name).to_owned()).collect(),
        use_rslora: run.rslora,
        use_dora: run.variant == 2,
        ..LoraConfig::default()
    };
    let mut adapter = Adapter::fresh(model.config(), &config, run.seed).unwrap();
    for (i, value) in adapter.values.iter_mut().enumerate() {
        *value = round(*value + 0.2 * number(run.seed ^ 1, i));
    }
    if config.use_dora {
        adapter.set_magnitudes(model).unwrap();
        for factor in adapter.factors.clone() {
            for (i, m) in adapter.values[factor.magnitude].iter_mut().enumerate() {
                *m *= 1.0 + 0.2 * number(run.seed ^ 2, i);
            }
        }
    }
    adapter
}

/// Tokens of packed segments.
pub struct Row {
    pub tokens: Vec<i32>,
    pub targets: Vec<i32>,
    pub bounds: Vec<i32>,
}

impl Row {
    pub fn new(sizes: &Sizes, run: &Run) -> Self {
        let n: usize = run.segments.iter().sum();
        let token = |salt: u64, i: usize| {
            let mixed = kernels::dropout::mix(run.seed ^ salt ^ ((i as u64) << 8));
            (mixed % sizes.vocabulary as u64) as i32
        };
        // A third of the positions have no target; the first has one.
        let target = |i: usize| if i > 0 && token(4, i) % 3 == 0 { -100 } else { token(5, i) };
        let mut bounds = vec![0];
        for segment in &run.segments {
            bounds.push(bounds[bounds.len() - 1] + *segment as i32);
        }
        let tokens = (0..n).map(|i| token(3, i)).collect();
        Self { tokens, targets: (0..n).map(target).collect(), bounds }
    }

    pub fn batch(&self) -> MicroBatch<'_> {
        MicroBatch { tokens: &self.tokens, cu_seqlens: &self.bounds, targets: &self.targets }
    }
}

/// Norm of the difference of a factor's gradients, and the most that rounding excuses: `limit` of
/// its norm, and a little of that of `all`, since some factors have none, such as that of the
/// queries in segments of one token.
pub fn off(found: &[f32], wanted: &[f32], limit: f64, all: f64) -> (f64, f64) {
    let off = norm(found.iter().zip(wanted).map(|(a, b)| a - b));
    (off, limit * norm(wanted.iter().copied()) + limit / 100.0 * all)
}

pub fn norm(x: impl Iterator<Item = f32>) -> f64 {
    x.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}
