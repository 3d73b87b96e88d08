//! The whole stage: on a small random Llama written here, and on the real SmolLM2 where
//! `PIPE_SMOLLM2` names its GGUF.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use contract::Fault;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use super::*;

const HIDDEN: usize = 16;
const FFN: usize = 24;
const VOCABULARY: usize = 40;

/// Writes a Llama of two layers with weights that are a function of their index.
fn write_model(folder: &Path) {
    fs::create_dir_all(folder).unwrap();
    let config = json!({
        "model_type": "llama", "hidden_size": HIDDEN, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "intermediate_size": FFN, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 32, "tie_word_embeddings": true,
        "hidden_act": "silu",
    });
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCABULARY, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
    for layer in 0..2 {
        let parts = [
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![8, HIDDEN]),
            ("self_attn.v_proj", vec![8, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
            ("mlp.gate_proj", vec![FFN, HIDDEN]),
            ("mlp.up_proj", vec![FFN, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, FFN]),
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
        ];
        shapes.extend(
            parts.map(|(name, shape)| (format!("model.layers.{layer}.{name}.weight"), shape)),
        );
    }
    let bytes: Vec<Vec<u8>> = shapes
        .iter()
        .enumerate()
        .map(|(t, (_, shape))| {
            let value = |i: usize| match shape.len() {
                1 => 1.0f32,
                _ => ((i * 37 + t * 11) as f32 * 12.9898).sin() * 0.4,
            };
            let len = shape.iter().product();
            (0..len).flat_map(|i| value(i).to_le_bytes()).collect()
        })
        .collect();
    let views = shapes.iter().zip(&bytes).map(|((name, shape), bytes)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    let file = safetensors::serialize(views, None::<HashMap<String, String>>).unwrap();
    fs::write(folder.join("model.safetensors"), file).unwrap();
}

/// Writes ten packed rows of two segments each, with a pattern that can be learned.
fn write_tokens(path: &Path, vocabulary: usize, segment: usize) {
    let mut file = TokenFile { cu_seqlens: vec![0], row_offsets: vec![0], ..TokenFile::default() };
    for row in 0..10 {
        for part in 0..2 {
            let token = |i: usize| ((i * (3 + part) + row) % vocabulary) as i32;
            file.tokens.extend((0..segment).map(token));
            file.label_mask.extend((0..segment).map(|i| u8::from(i > 1)));
            file.cu_seqlens.push(file.tokens.len() as i32);
        }
        file.row_offsets.push(file.tokens.len() as i32);
    }
    file.write(path).unwrap();
}

struct Space {
    dir: tempfile::TempDir,
    attempts: Vec<PathBuf>,
}

impl Space {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_model(&dir.path().join("model"));
        write_tokens(&dir.path().join("tokens"), VOCABULARY, 7);
        Self { dir, attempts: Vec::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A request of its own output folder `name`, adopting the scratch of those before.
    fn request(&mut self, name: &str, params: &Value) -> Request {
        let out = self.path(name);
        fs::create_dir_all(&out).unwrap();
        let scratch = out.join("scratch");
        let earlier_scratch = self.attempts.iter().rev().cloned().collect();
        self.attempts.push(scratch.clone());
        let (model, tokens) = (self.path("model"), self.path("tokens"));
        let inputs = [("model", &*model), ("tokens", &*tokens), ("eval_tokens", &*tokens)];
        let request = fixtures::request(&Train, params, &inputs, &out);
        let outputs = ["adapter", "log"].map(|o| (o.to_owned(), out.join(o))).into();
        Request { outputs, scratch, earlier_scratch, threads: 2, ..request }
    }

    fn run(&mut self, name: &str, params: &Value) -> Result<Outcome, StageError> {
        let request = self.request(name, params);
        Train.run(&request, &mut Reporter::silent())
    }

    fn artifacts(&self, name: &str) -> [Vec<u8>; 3] {
        ["log", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
            .map(|file| fs::read(self.path(name).join(file)).unwrap())
    }

    fn losses(&self, name: &str) -> Vec<f64> {
        let lines: Vec<Value> = data::read_jsonl(&self.path(name).join("log")).unwrap();
        lines.iter().map(|l| l["loss"].as_f64().unwrap()).collect()
    }
}

fn params() -> Value {
    json!({
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1}, "max_steps": 12, "learning_rate": 0.02,
        "warmup_steps": 2, "eval_steps": 5, "checkpoint_steps": 2, "gradient_accumulation": 2,
    })
}

#[test]
fn training_a_small_llama_lowers_its_loss_and_gives_the_same_bytes_twice() {
    let mut space = Space::new();
    let outcome = space.run("a", &params()).unwrap();
    space.attempts.clear();
    space.run("b", &params()).unwrap();
    assert_eq!(space.artifacts("a"), space.artifacts("b"));
    let losses = space.losses("a");
    assert_eq!(losses.len(), 12);
    assert!(losses[11] < losses[0] - 0.5, "{losses:?}");
    assert_eq!(outcome.telemetry["steps"], 12);
    assert!(outcome.provenance["device"].as_str().unwrap().starts_with("cpu"));
}

#[test]
fn a_run_whose_later_checkpoints_are_torn_resumes_from_a_whole_one_to_the_same_bytes() {
    let mut space = Space::new();
    let scheduled = params();
    space.run("whole", &scheduled).unwrap();
    // What is left of the run is its checkpoint of step 10, and a torn one of step 11.
    let scratch = space.path("whole").join("scratch");
    fs::write(scratch.join(format!("checkpoint-{:012}-{}.bin", 11, "0".repeat(64))), b"x").unwrap();
    let outcome = space.run("resumed", &scheduled).unwrap();
    assert_eq!(outcome.telemetry["resumed_from_step"], 10);
    assert_eq!(space.artifacts("whole"), space.artifacts("resumed"));
}

#[test]
fn an_adapter_can_be_the_start_of_another_run() {
    let mut space = Space::new();
    space.run("first", &params()).unwrap();
    space.attempts.clear();
    let mut request = space.request("second", &params());
    request.inputs.insert("init_adapter".to_owned(), space.path("first").join("adapter"));
    Train.run(&request, &mut Reporter::silent()).unwrap();
    let (first, second) = (space.losses("first"), space.losses("second"));
    assert!(second[0] < first[0] - 0.4, "{} {}", first[0], second[0]);
    request.params["lora"]["r"] = json!(8);
    request.scratch = space.path("other");
    request.earlier_scratch.clear();
    let error = Train.run(&request, &mut Reporter::silent()).unwrap_err();
    assert_eq!(error.message, "the adapter of input `init_adapter` has r 4, the params say 8");
}

/// [`params`] with another adapter, and no dropout.
fn exact(lora: Value) -> Value {
    let mut params = params();
    params["lora"] = lora;
    params
}

#[test]
fn pissa_starts_where_the_model_is_and_its_adapter_belongs_to_the_whole_weights() {
    let mut space = Space::new();
    space.run("plain", &exact(json!({"r": 4, "alpha": 8}))).unwrap();
    space.attempts.clear();
    space.run("pissa", &exact(json!({"r": 4, "alpha": 8, "init": "pissa"}))).unwrap();
    let (plain, pissa) = (space.losses("plain"), space.losses("pissa"));
    assert!((plain[0] - pissa[0]).abs() < 1e-5, "{} {}", plain[0], pissa[0]);
    assert!((plain[11] - pissa[11]).abs() > 1e-3 && pissa[11] < pissa[0] - 0.5);
    // A step at the rate 0 from its adapter, of twice the rank, evaluates as the run ended.
    space.attempts.clear();
    let mut params = exact(json!({"r": 8, "alpha": 16}));
    params["max_steps"] = json!(1);
    let mut request = space.request("on", &params);
    request.inputs.insert("init_adapter".to_owned(), space.path("pissa/adapter"));
    Train.run(&request, &mut Reporter::silent()).unwrap();
    let last_evaluation = |name: &str| {
        let lines: Vec<Value> = data::read_jsonl(&space.path(name).join("log")).unwrap();
        lines.iter().rev().find_map(|l| l["eval_loss"].as_f64()).unwrap()
    };
    let (ended, on) = (last_evaluation("pissa"), last_evaluation("on"));
    assert!((ended - on).abs() < 1e-5 * ended, "{ended} {on}");
    request.params["lora"]["init"] = json!("pissa");
    request.scratch = space.path("other");
    request.earlier_scratch.clear();
    let error = Train.run(&request, &mut Reporter::silent()).unwrap_err();
    assert_eq!(error.message, "`lora.init` and the input `init_adapter` exclude each other");
}

#[test]
fn every_kind_of_adapter_gives_the_same_bytes_twice_and_after_a_kill() {
    for lora in [
        json!({"r": 4, "alpha": 8, "use_rslora": true, "init": "gaussian"}),
        json!({"r": 4, "alpha": 8, "init": "pissa"}),
        json!({"r": 4, "alpha": 8, "use_dora": true}),
        json!({"r": 4, "alpha": 8, "init": "loftq", "loftq_iter": 2}),
        json!({"r": 4, "alpha": 8, "init": "loftq", "use_dora": true}),
    ] {
        let mut space = Space::new();
        let params = exact(lora);
        space.run("whole", &params).unwrap();
        // Adopts the whole run's checkpoint of step 10.
        let outcome = space.run("resumed", &params).unwrap();
        assert_eq!(outcome.telemetry["resumed_from_step"], 10);
        space.attempts.clear();
        space.run("again", &params).unwrap();
        let losses = space.losses("whole");
        assert!(losses[11] < losses[0] - 0.5, "{params} {losses:?}");
        assert_eq!(space.artifacts("whole"), space.artifacts("resumed"), "{params}");
        assert_eq!(space.artifacts("whole"), space.artifacts("again"), "{params}");
    }
}

/// Eleven rows of one to four segments that differ in length and in how many of their tokens count.
fn write_unequal_tokens(path: &Path) {
    let mut file = TokenFile { cu_seqlens: vec![0], row_offsets: vec![0], ..TokenFile::default() };
    for row in 0..11usize {
        for part in 0..=(row % 4) {
            let length = 2 + (row * 5 + part * 7) % 11;
            file.tokens.extend((0..length).map(|i| ((i * (3 + part) + row) % VOCABULARY) as i32));
            file.label_mask.extend((0..length).map(|i| u8::from((i + row) % 3 > row % 2)));
            file.cu_seqlens.push(file.tokens.len() as i32);
        }
        file.row_offsets.push(file.tokens.len() as i32);
    }
    file.write(path).unwrap();
}

#[test]
fn four_batches_of_two_are_one_of_eight_whatever_counts_in_each() {
    let mut space = Space::new();
    write_unequal_tokens(&space.path("tokens"));
    let mut run = |name: &str, batch: usize, accumulation: usize| -> Vec<(f64, f64)> {
        let mut params = exact(json!({"r": 4, "alpha": 8}));
        params["batch_size"] = json!(batch);
        params["gradient_accumulation"] = json!(accumulation);
        space.attempts.clear();
        space.run(name, &params).unwrap();
        let lines: Vec<Value> = data::read_jsonl(&space.path(name).join("log")).unwrap();
        let number = |line: &Value, key: &str| line[key].as_f64().unwrap();
        lines.iter().map(|l| (number(l, "loss"), number(l, "grad_norm"))).collect()
    };
    let (split, whole) = (run("split", 2, 4), run("whole", 8, 1));
    // Eleven rows are a step of eight and one of three.
    assert_eq!(split.len(), 12);
    for (step, (split, whole)) in split.iter().zip(&whole).enumerate() {
        for (a, b) in [(split.0, whole.0), (split.1, whole.1)] {
            assert!((a - b).abs() < 1e-5 * b, "step {}: {a} {b}", step + 1);
        }
    }
}

#[test]
fn every_optimizer_gives_the_same_bytes_twice_and_after_a_kill() {
    // Factors of 4,096 elements have their moments in eight bits; half of them have fewer.
    let wide = json!({"r": 256, "alpha": 256, "dropout": 0.1, "targets": ["q_proj", "k_proj"]});
    for (optimizer, schedule) in [("adamw", "cosine"), ("adamw_8bit", "linear")] {
        let mut space = Space::new();
        let mut params = exact(wide.clone());
        params["optimizer"] = json!(optimizer);
        params["schedule"] = json!(schedule);
        params["learning_rate"] = json!(2e-3);
        params["select"] = json!("best");
        space.run("whole", &params).unwrap();
        let outcome = space.run("resumed", &params).unwrap();
        assert_eq!(outcome.telemetry["resumed_from_step"], 10, "{optimizer}");
        space.attempts.clear();
        space.run("again", &params).unwrap();
        let losses = space.losses("whole");
        assert!(losses[11] < losses[0] - 0.1, "{optimizer} {losses:?}");
        assert_eq!(space.artifacts("whole"), space.artifacts("resumed"), "{optimizer}");
        assert_eq!(space.artifacts("whole"), space.artifacts("again"), "{optimizer}");
    }
}

/// The stage on a tiny model in four bits against ten steps of PEFT and torch.
#[test]
fn fixture_ten_steps_of_the_stage_follow_torch() {
    for family in ["llama", "qwen2", "gemma2"] {
        let folder = fixtures::path(&format!("tiny-models/{family}"));
        let raw = fs::read(folder.join("expected.safetensors")).unwrap();
        let expected = SafeTensors::deserialize(&raw).unwrap();
        let mut space = Space::new();
        write_packed_row(&space.path("tokens"), &expected);
        let params = json!({
            "lora": {"r": 8, "alpha": 16}, "max_steps": 10, "learning_rate": 1e-2,
            "warmup_steps": 3, "weight_decay": 0.01, "max_grad_norm": 1.0, "batch_size": 1,
            "gradient_accumulation": 1,
        });
        let mut request = space.request("run", &params);
        request.inputs.remove("eval_tokens");
        request.inputs.insert("model".to_owned(), folder.join("nf4"));
        request.inputs.insert("init_adapter".to_owned(), folder.join("adapter"));
        Train.run(&request, &mut Reporter::silent()).unwrap();
        let lines: Vec<Value> = data::read_jsonl(&space.path("run").join("log")).unwrap();
        for (key, name) in [("loss", "adamw_losses"), ("grad_norm", "adamw_grad_norms")] {
            let wanted = expected.tensor(name).unwrap().data().as_chunks::<8>().0;
            assert_eq!(lines.len(), wanted.len());
            for (line, wanted) in lines.iter().zip(wanted) {
                let (found, wanted) = (line[key].as_f64().unwrap(), f64::from_le_bytes(*wanted));
                let off = (found - wanted).abs() / wanted;
                assert!(off < 1e-4, "{family} {key}: {found} instead of {wanted}");
            }
        }
        let factors = |folder: &Path| fs::read(folder.join("adapter_model.safetensors")).unwrap();
        let (ours, theirs) =
            (factors(&space.path("run/adapter")), factors(&folder.join("adapter_after_10_steps")));
        let (ours, theirs) =
            (SafeTensors::deserialize(&ours).unwrap(), SafeTensors::deserialize(&theirs).unwrap());
        assert_eq!(ours.len(), theirs.len());
        for (name, view) in theirs.tensors() {
            let floats = |bytes: &[u8]| -> Vec<f64> {
                bytes.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect()
            };
            let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
            let (found, wanted) = (floats(ours.tensor(&name).unwrap().data()), floats(view.data()));
            let off = norm(&mut found.iter().zip(&wanted).map(|(a, b)| a - b))
                / norm(&mut wanted.iter().copied());
            assert!(off < 1e-3, "{family} {name}: {off}");
        }
    }
}

/// The packed row of a tiny model, as a token file.
fn write_packed_row(path: &Path, expected: &SafeTensors<'_>) {
    let ints = |name: &str| -> Vec<i32> {
        let view = expected.tensor(name).unwrap();
        let size = view.data().len() / view.shape().iter().product::<usize>();
        view.data()
            .chunks_exact(size)
            .map(|b| i32::from_le_bytes(b[..4].try_into().unwrap()))
            .collect()
    };
    let (positions, labels) = (ints("packed_positions"), ints("packed_labels"));
    let len = labels.len();
    let mut cu_seqlens: Vec<i32> =
        (0..len).filter(|i| positions[*i] == 0).map(|i| i as i32).collect();
    cu_seqlens.push(len as i32);
    let file = TokenFile {
        tokens: ints("input_ids")[..len].to_vec(),
        cu_seqlens,
        row_offsets: vec![0, len as i32],
        label_mask: labels.iter().map(|label| u8::from(*label != -100)).collect(),
    };
    file.write(path).unwrap();
}

#[test]
fn tokens_that_do_not_fit_the_model_are_refused_before_any_step() {
    let mut space = Space::new();
    let mut refused = |vocabulary, segment| {
        write_tokens(&space.path("tokens"), vocabulary, segment);
        let error = space.run("refused", &params()).unwrap_err();
        assert_eq!(error.fault, Fault::Input);
        assert!(error.help.is_some() && !space.path("refused/adapter").exists());
        error.message
    };
    assert_eq!(
        refused(VOCABULARY, 33),
        "packed row 0 of input `tokens` has a segment of 33 tokens; the model takes at most 32"
    );
    assert_eq!(
        refused(VOCABULARY + 1, 30),
        "packed row 0 of input `tokens` has the token id 40; the model's vocabulary ends at 40"
    );
    assert_eq!(refused(VOCABULARY, 2), "no token of input `tokens` counts in the loss");
}

#[test]
fn the_best_adapter_needs_tokens_to_evaluate() {
    let inputs = |select: &str| Train.resolve(&json!({"select": select})).unwrap().inputs;
    let required = |inputs: Vec<InputSpec>| inputs[2].name == "eval_tokens" && inputs[2].required;
    assert!(required(inputs("best")) && !required(inputs("last")));
}

#[test]
fn real_smollm2_learns_a_few_rows() {
    let Some(path) = std::env::var_os("PIPE_SMOLLM2") else {
        fixtures::skipped("PIPE_SMOLLM2 is not set");
        return;
    };
    let mut space = Space::new();
    write_tokens(&space.path("tokens"), 1000, 24);
    let params = json!({
        "max_steps": 4, "learning_rate": 2e-3, "warmup_steps": 1, "optimizer": "adamw_8bit",
        "gradient_accumulation": 2,
    });
    let mut request = space.request("real", &params);
    request.inputs.insert("model".to_owned(), PathBuf::from(path));
    Train.run(&request, &mut Reporter::silent()).unwrap();
    let losses = space.losses("real");
    assert!(losses[3] < losses[0] - 1.0, "{losses:?}");
}
