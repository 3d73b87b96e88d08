//! The hand-written backward pass against Burn's autodiff on random shapes of every family.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;
use std::path::Path;

use model::{Adapter, DropoutKey, LoraConfig, MicroBatch, Model, PROJECTIONS, reference};
use proptest::prelude::*;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

const POSITIONS: usize = 64;

/// A model's sizes.
#[derive(Clone, Debug)]
struct Sizes {
    family: &'static str,
    hidden: usize,
    ffn: usize,
    kv_heads: usize,
    group: usize,
    head_dim: usize,
    vocabulary: usize,
    layers: usize,
    tied: bool,
    window: usize,
    /// Of attention and of the logits.
    softcaps: [Option<f32>; 2],
}

/// What is trained, and on what.
#[derive(Clone, Debug)]
struct Run {
    r: usize,
    alpha: f32,
    /// A bit a projection; at least one is set.
    targets: usize,
    rslora: bool,
    /// None, dropout, DoRA.
    variant: u8,
    segments: Vec<usize>,
    seed: u64,
}

fn sizes() -> impl Strategy<Value = Sizes> {
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

fn runs() -> impl Strategy<Value = Run> {
    let adapter = (1usize..=6, 0.5f32..12.0, 1usize..128, any::<bool>(), 0u8..3);
    let segments = prop::collection::vec(1usize..=20, 1..=4);
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

fn write_model(folder: &Path, s: &Sizes, seed: u64) {
    std::fs::write(folder.join("config.json"), config(s).to_string()).unwrap();
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = tensors(s)
        .into_iter()
        .enumerate()
        .map(|(t, (name, shape))| {
            let offset =
                if name.ends_with("norm.weight") && s.family != "gemma2" { 1.0 } else { 0.0 };
            let spread = if shape.len() == 2 { 1.5 / (shape[1] as f32).sqrt() } else { 0.3 };
            let len: usize = shape.iter().product();
            let value = |i| offset + spread * number(seed ^ ((t as u64) << 32), i);
            (name, shape, (0..len).flat_map(|i| value(i).to_le_bytes()).collect())
        })
        .collect();
    let views = bytes.iter().map(|(name, shape, data)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), data).unwrap())
    });
    let file = safetensors::serialize(views, None::<HashMap<String, String>>).unwrap();
    std::fs::write(folder.join("model.safetensors"), file).unwrap();
}

fn adapter(model: &Model, run: &Run) -> Adapter {
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
        *value += 0.2 * number(run.seed ^ 1, i);
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

fn norm(x: impl Iterator<Item = f32>) -> f64 {
    x.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn gradients_and_losses_are_those_of_autodiff(sizes in sizes(), run in runs()) {
        let dir = tempfile::tempdir().unwrap();
        write_model(dir.path(), &sizes, run.seed);
        let model = Model::load(dir.path()).unwrap();
        let adapter = adapter(&model, &run);
        let n: usize = run.segments.iter().sum();
        let token = |salt: u64, i: usize| {
            (kernels::dropout::mix(run.seed ^ salt ^ ((i as u64) << 8)) % sizes.vocabulary as u64) as i32
        };
        let tokens: Vec<i32> = (0..n).map(|i| token(3, i)).collect();
        // A third of the positions have no target; the first has one.
        let targets: Vec<i32> =
            (0..n).map(|i| if i > 0 && token(4, i) % 3 == 0 { -100 } else { token(5, i) }).collect();
        let mut cu = vec![0];
        for segment in &run.segments {
            cu.push(cu[cu.len() - 1] + *segment as i32);
        }
        let batch = MicroBatch { tokens: &tokens, cu_seqlens: &cu, targets: &targets };
        let key = (run.variant == 1).then_some(DropoutKey { seed: run.seed, micro_step: 7 });
        let mut grad = vec![0.0; adapter.values.len()];
        let loss = model.loss_and_grad(&adapter, batch, 0.5, key, &mut grad).unwrap();
        let (twin_loss, twin) =
            reference::loss_and_grad_with_dropout(&model, &adapter, batch, 0.5, key);
        prop_assert_eq!(loss.targets, twin_loss.targets);
        prop_assert!((loss.sum - twin_loss.sum).abs() < 1e-5 * twin_loss.sum, "{loss:?} {twin_loss:?}");
        let all = norm(twin.iter().copied());
        prop_assert!(all > 0.0);
        for range in adapter.tensors() {
            let (ours, theirs) = (&grad[range.clone()], &twin[range.clone()]);
            let off = norm(ours.iter().zip(theirs).map(|(a, b)| a - b));
            // Some factors have none, such as that of the queries in segments of one token.
            let limit = 1e-4 * norm(theirs.iter().copied()) + 1e-6 * all;
            prop_assert!(off < limit, "{range:?}: {off} of {limit}");
        }
    }
}
