//! Adapters of every kind against PEFT: those that it wrote (`benches/fixtures/peft_variants.py`)
//! with its logits and gradients, and, where `PIPE_PYTHON` names a Python with PEFT, ours in PEFT.
//! Of the repository's reference outputs, never those of `PIPE_FIXTURES`.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use fixtures::own;
use model::{Adapter, GenerateOptions, LoraConfig, MicroBatch, Model, reference};
use safetensors::SafeTensors;
use serde_json::Value;

/// The repository's, whatever the set under test is: PEFT made the adapters from it.
fn base() -> PathBuf {
    own("tiny-models/qwen2/f32")
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let view = file.tensor(name).unwrap();
    checkpoint::to_f32(view.dtype(), view.data()).unwrap()
}

fn ints(file: &SafeTensors<'_>, name: &str) -> Vec<i32> {
    let data = file.tensor(name).unwrap().data().as_chunks::<4>().0;
    data.iter().map(|b| i32::from_le_bytes(*b)).collect()
}

fn norm(values: impl Iterator<Item = f32>) -> f64 {
    values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// An adapter of PEFT's with one field of its configuration changed.
fn edited(variant: &str, field: &str, value: Value) -> tempfile::TempDir {
    let (from, dir) = (own(&format!("peft/{variant}")), tempfile::tempdir().unwrap());
    let config = std::fs::read(from.join("adapter_config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&config).unwrap();
    config[field] = value;
    std::fs::write(dir.path().join("adapter_config.json"), config.to_string()).unwrap();
    let weights = "adapter_model.safetensors";
    std::fs::copy(from.join(weights), dir.path().join(weights)).unwrap();
    dir
}

/// Asserts PEFT's logits at the last positions; returns the stored file's bytes.
fn assert_logits(variant: &str, model: &Model, adapter: &Adapter) -> Vec<u8> {
    let raw = std::fs::read(own(&format!("peft/{variant}/expected.safetensors"))).unwrap();
    let file = SafeTensors::deserialize(&raw).unwrap();
    let ids = ints(&file, "input_ids");
    let logits = model.logits(Some(adapter), &ids, &[0, ids.len() as i32]).unwrap();
    let expected = floats(&file, "logits");
    let off = max_difference(&logits[logits.len() - expected.len()..], &expected);
    assert!(off < 2e-4, "{variant}: {off}");
    let without = model.logits(None, &ids, &[0, ids.len() as i32]).unwrap();
    let apart = max_difference(&without[without.len() - expected.len()..], &expected);
    assert!(apart > 0.05, "{variant}: the adapter changes little: {apart}");
    raw
}

/// Asserts PEFT's gradient of every trained tensor.
fn assert_gradients(variant: &str, model: &Model, adapter: &Adapter, raw: &[u8]) {
    let file = SafeTensors::deserialize(raw).unwrap();
    let ids = ints(&file, "input_ids");
    let mut targets = ids[1..].to_vec();
    targets.push(-100);
    let cu = [0, ids.len() as i32];
    let batch = MicroBatch { tokens: &ids, cu_seqlens: &cu, targets: &targets };
    let mut grad = vec![0.0; adapter.values.len()];
    let scale = 1.0 / (ids.len() - 1) as f32;
    model.loss_and_grad(adapter, batch, scale, None, &mut grad).unwrap();
    let mut seen = 0;
    for f in &adapter.factors {
        let tensors = [
            ("lora_A.weight", &f.a),
            ("lora_B.weight", &f.b),
            ("lora_magnitude_vector", &f.magnitude),
        ];
        for (name, range) in tensors.into_iter().filter(|(_, range)| !range.is_empty()) {
            let expected = floats(&file, &format!("grad.base_model.model.{}.{name}", f.name));
            let ours = &grad[range.clone()];
            let off = norm(ours.iter().zip(&expected).map(|(a, b)| a - b))
                / norm(expected.iter().copied());
            assert!(off < 1e-4, "{variant} {} {name}: {off}", f.name);
            seen += 1;
        }
    }
    let stored = file.names().iter().filter(|n| n.starts_with("grad.")).count();
    assert_eq!(seen, stored, "{variant}");
}

#[test]
fn rslora_gives_pefts_logits_and_gradients() {
    let model = Model::load(&base()).unwrap();
    let adapter = Adapter::load_peft(&own("peft/rslora"), &model).unwrap();
    assert!(adapter.config.use_rslora);
    let raw = assert_logits("rslora", &model, &adapter);
    assert_gradients("rslora", &model, &adapter, &raw);
}

#[test]
fn gaussian_gives_pefts_logits_and_gradients_and_starts_as_wide() {
    let model = Model::load(&base()).unwrap();
    let adapter = Adapter::load_peft(&own("peft/gaussian"), &model).unwrap();
    let raw = assert_logits("gaussian", &model, &adapter);
    assert_gradients("gaussian", &model, &adapter, &raw);
    // Other numbers than torch's, of the same distribution; some 4,600 of them.
    let file = SafeTensors::deserialize(&raw).unwrap();
    let ours = Adapter::gaussian(model.config(), &adapter.config, 3).unwrap();
    let deviation = |values: &[f32]| norm(values.iter().copied()) / (values.len() as f64).sqrt();
    let [mut own, mut theirs] = [(); 2].map(|()| Vec::new());
    for f in &ours.factors {
        own.extend_from_slice(&ours.values[f.a.clone()]);
        theirs.extend(floats(&file, &format!("start.base_model.model.{}.lora_A.weight", f.name)));
        assert!(ours.values[f.b.clone()].iter().all(|b| *b == 0.0), "{}", f.name);
    }
    assert_eq!(own.len(), theirs.len());
    let (own, theirs) = (deviation(&own), deviation(&theirs));
    assert!((own / theirs - 1.0).abs() < 0.06, "{own} instead of {theirs}");
}

#[test]
fn dora_gives_pefts_logits_and_gradients() {
    let model = Model::load(&base()).unwrap();
    let adapter = Adapter::load_peft(&own("peft/dora"), &model).unwrap();
    assert!(adapter.config.use_dora);
    let raw = assert_logits("dora", &model, &adapter);
    assert_gradients("dora", &model, &adapter, &raw);
}

#[test]
fn dora_changes_nothing_at_its_start_and_its_gradient_is_that_of_autodiff() {
    let model = Model::load(&base()).unwrap();
    let ids: Vec<i32> = (0..30).map(|i| i * 37 % 512).collect();
    let config = LoraConfig { r: 4, alpha: 6.0, use_dora: true, ..LoraConfig::default() };
    let mut adapter = Adapter::gaussian(model.config(), &config, 5).unwrap();
    adapter.set_magnitudes(&model).unwrap();
    let logits = |adapter: Option<&Adapter>| model.logits(adapter, &ids, &[0, 12, 30]).unwrap();
    assert!(max_difference(&logits(Some(&adapter)), &logits(None)) < 1e-5);
    disturb(&mut adapter);
    assert!(max_difference(&logits(Some(&adapter)), &logits(None)) > 0.05);
    let batch = MicroBatch { tokens: &ids, cu_seqlens: &[0, 12, 30], targets: &ids };
    let mut grad = vec![0.0; adapter.values.len()];
    let loss = model.loss_and_grad(&adapter, batch, 0.25, None, &mut grad).unwrap();
    let (twin_loss, twin) = reference::loss_and_grad(&model, &adapter, batch, 0.25);
    assert!((loss.sum - twin_loss.sum).abs() < 1e-5 * twin_loss.sum);
    for range in adapter.tensors() {
        let pairs = grad[range.clone()].iter().zip(&twin[range.clone()]);
        let off = norm(pairs.map(|(a, b)| a - b)) / norm(twin[range.clone()].iter().copied());
        assert!(off < 1e-4, "{range:?}: {off}");
    }
}

#[test]
fn dora_and_loftq_decode_what_the_full_forward_gives() {
    for family in ["llama", "qwen2", "gemma2"] {
        for use_dora in [true, false] {
            let mut model = Model::load(&own(&format!("tiny-models/{family}/f32"))).unwrap();
            let config = LoraConfig { r: 4, alpha: 6.0, use_dora, ..LoraConfig::default() };
            let mut adapter = if use_dora {
                Adapter::gaussian(model.config(), &config, 5).unwrap()
            } else {
                model.start_loftq(&config, 1).unwrap()
            };
            if use_dora {
                adapter.set_magnitudes(&model).unwrap();
            }
            disturb(&mut adapter);
            assert_decodes_the_full_forward(&model, &adapter);
        }
    }
}

/// Token by token, past Gemma-2's window of 16.
fn assert_decodes_the_full_forward(model: &Model, adapter: &Adapter) {
    let prompts: Vec<Vec<u32>> = vec![vec![3, 1, 4], (0..21).map(|i| i * 41 % 512).collect()];
    let options = GenerateOptions { max_new_tokens: 8, end_tokens: vec![], batch_size: 2 };
    let mut rows = 0;
    let check = &mut |g: model::Generated| {
        let mut ids: Vec<i32> = prompts[g.prompt].iter().map(|t| *t as i32).collect();
        for token in g.tokens {
            let logits = model.logits(Some(adapter), &ids, &[0, ids.len() as i32]).unwrap();
            let last = &logits[logits.len() - 512..];
            assert_eq!(kernels::elementwise::argmax(last) as u32, token);
            ids.push(token as i32);
        }
        rows += 1;
        true
    };
    model.generate(Some(adapter), &prompts, &options, check).unwrap();
    assert_eq!(rows, 2);
}

#[test]
fn pissa_gives_pefts_logits_and_gradients_and_reads_as_an_adapter_of_the_whole_weights() {
    let model = Model::load(&base()).unwrap();
    let adapter = Adapter::load_peft(&own("peft/pissa"), &model).unwrap();
    assert_eq!((adapter.config.r, adapter.config.alpha), (4, 6.0));
    let raw = assert_logits("pissa", &model, &adapter);
    // Trained, as in PEFT, on the rest of the weights.
    let narrow = edited("pissa", "init_lora_weights", true.into());
    let narrow = Adapter::load_peft(narrow.path(), &model).unwrap();
    assert_eq!(narrow.config.r, 2);
    let mut rest = Model::load(&base()).unwrap();
    rest.subtract(&Adapter::pissa(&model, &narrow.config).unwrap());
    assert_logits("pissa", &rest, &narrow);
    assert_gradients("pissa", &rest, &narrow, &raw);
    let error = Adapter::load_peft_of(&own("peft/pissa"), model.config()).unwrap_err();
    assert!(error.to_string().contains("path_initial_model_for_weight_conversion"), "{error}");
}

#[test]
fn pissa_changes_nothing_at_its_start_and_trains_on_the_rest_of_the_weights() {
    let mut model = Model::load(&base()).unwrap();
    let ids: Vec<i32> = (0..20).map(|i| i * 37 % 512).collect();
    let before = model.logits(None, &ids, &[0, 20]).unwrap();
    let whole = Model::load(&base()).unwrap();
    for use_rslora in [false, true] {
        let config = LoraConfig { r: 4, alpha: 6.0, use_rslora, ..LoraConfig::default() };
        let start = Adapter::pissa(&model, &config).unwrap();
        model.subtract(&start);
        let after = model.logits(Some(&start), &ids, &[0, 20]).unwrap();
        assert!(max_difference(&before, &after) < 2e-4);
        let without = model.logits(None, &ids, &[0, 20]).unwrap();
        assert!(max_difference(&before, &without) > 0.1);
        let mut trained = start.clone();
        disturb(&mut trained);
        let on_rest = model.logits(Some(&trained), &ids, &[0, 20]).unwrap();
        let wide = trained.relative_to(&start, &whole).unwrap();
        let on_whole = whole.logits(Some(&wide), &ids, &[0, 20]).unwrap();
        assert!(max_difference(&on_rest, &on_whole) < 2e-4);
        model = Model::load(&base()).unwrap();
    }
}

#[test]
fn loftq_gives_pefts_logits_and_gradients_from_its_start_on() {
    for (variant, iterations) in [("loftq", 1), ("loftq_3", 3)] {
        let mut model = Model::load(&base()).unwrap();
        let before = Adapter::load_peft(&own(&format!("peft/{variant}")), &model).unwrap_err();
        assert!(before.to_string().contains("LoftQ"), "{before}");
        let adapter = model.load_adapter(&own(&format!("peft/{variant}"))).unwrap();
        assert_eq!(adapter.config.loftq_iter, Some(iterations));
        let raw = assert_logits(variant, &model, &adapter);
        assert_gradients(variant, &model, &adapter, &raw);
        // Our own start is PEFT's.
        let file = SafeTensors::deserialize(&raw).unwrap();
        let (ids, expected) = (ints(&file, "input_ids"), floats(&file, "start_logits"));
        let mut fresh = Model::load(&base()).unwrap();
        let start = fresh.start_loftq(&adapter.config, iterations).unwrap();
        let logits = fresh.logits(Some(&start), &ids, &[0, ids.len() as i32]).unwrap();
        let off = max_difference(&logits[logits.len() - expected.len()..], &expected);
        assert!(off < 2e-4, "{variant}: {off}");
    }
}

#[test]
fn loftq_starts_nearer_to_the_model_than_four_bits_do_and_reads_back() {
    let whole = Model::load(&base()).unwrap();
    let ids: Vec<i32> = (0..20).map(|i| i * 37 % 512).collect();
    let exact = whole.logits(None, &ids, &[0, 20]).unwrap();
    let config = LoraConfig { r: 16, alpha: 24.0, ..LoraConfig::default() };
    let mut apart = Vec::new();
    for iterations in [1, 4] {
        let mut model = Model::load(&base()).unwrap();
        let mut adapter = model.start_loftq(&config, iterations).unwrap();
        let start = model.logits(Some(&adapter), &ids, &[0, 20]).unwrap();
        let quantised = model.logits(None, &ids, &[0, 20]).unwrap();
        let [near, far] =
            [start, quantised].map(|logits| norm(logits.iter().zip(&exact).map(|(a, b)| a - b)));
        assert!(near < 0.9 * far, "{near} {far}");
        apart.push(near);
        disturb(&mut adapter);
        let trained = model.logits(Some(&adapter), &ids, &[0, 20]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        adapter.save_peft(dir.path(), "tiny").unwrap();
        let mut again = Model::load(&base()).unwrap();
        let read = again.load_adapter(dir.path()).unwrap();
        assert_eq!(read, adapter);
        assert_eq!(again.logits(Some(&read), &ids, &[0, 20]).unwrap(), trained);
        // Merged onto the whole weights, it quantises them itself.
        let factor = &read.factors[0];
        let mut merged =
            whole.layers[0].projections[0].tensor().into_data().try_to_vec::<f32>().unwrap();
        read.merge(factor, &mut merged).unwrap();
        let quantised = again.layers[0].projections[0].tensor().into_data().try_to_vec::<f32>();
        let plain = Adapter {
            config: LoraConfig { loftq_iter: None, ..read.config.clone() },
            ..read.clone()
        };
        let mut expected = quantised.unwrap();
        plain.merge(factor, &mut expected).unwrap();
        assert_eq!(merged, expected);
        let error = again.start_loftq(&config, 1).unwrap_err().to_string();
        assert!(error.contains("has four bits already"), "{error}");
    }
    assert!(apart[1] < apart[0], "{apart:?}");
}

#[test]
fn adapters_that_would_be_misread_are_refused() {
    let model = Model::load(&base()).unwrap();
    let refused = |field: &str, value: Value| {
        let dir = edited("rslora", field, value);
        Adapter::load_peft(dir.path(), &model).map_err(|e| e.to_string())
    };
    for (field, value) in [
        ("init_lora_weights", "pissa_niter_4".into()),
        ("init_lora_weights", "loftq_".into()),
        ("init_lora_weights", "olora".into()),
        ("lora_bias", true.into()),
        ("alora_invocation_tokens", vec![1, 2].into()),
        ("bias", "all".into()),
    ] {
        let error = refused(field, value).unwrap_err();
        assert!(error.ends_with("is not supported"), "{field}: {error}");
    }
    refused("init_lora_weights", "gaussian".into()).unwrap();
    refused("layers_to_transform", Value::Null).unwrap();
}

/// Logits that PEFT computes with the adapter in `folder`.
fn logits_of_peft(python: &OsStr, folder: &Path, ids: &[i32]) -> Vec<f32> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../benches/peft_logits.py");
    let ids: Vec<String> = ids.iter().map(i32::to_string).collect();
    let out = folder.join("logits.safetensors");
    let done = std::process::Command::new(python)
        .arg(script)
        .args([&base(), folder, &out])
        .args(&ids)
        .output()
        .unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let raw = std::fs::read(out).unwrap();
    floats(&SafeTensors::deserialize(&raw).unwrap(), "logits")
}

/// Moves every value away from where it starts.
fn disturb(adapter: &mut Adapter) {
    for (i, value) in adapter.values.iter_mut().enumerate() {
        *value += (i as f32 * 12.9898).sin() * 0.05;
    }
}

/// An adapter of each kind that is trained, moved away from its start, as it is saved; and the
/// weights that it was trained on, with it on them.
fn written() -> Vec<(&'static str, Adapter, Model, Adapter)> {
    let plain = LoraConfig { r: 4, alpha: 6.0, ..LoraConfig::default() };
    let rslora = LoraConfig { use_rslora: true, ..plain.clone() };
    let dora = LoraConfig { use_dora: true, ..rslora.clone() };
    let kinds = [
        ("plain", plain.clone()),
        ("rslora", rslora.clone()),
        ("dora", dora),
        ("pissa", plain.clone()),
        ("pissa with rslora", rslora),
        ("loftq", plain),
    ];
    kinds.map(|(kind, config)| written_as(kind, &config)).into()
}

fn written_as(kind: &'static str, config: &LoraConfig) -> (&'static str, Adapter, Model, Adapter) {
    let mut model = Model::load(&base()).unwrap();
    let pissa = kind.starts_with("pissa").then(|| Adapter::pissa(&model, config).unwrap());
    let mut adapter = match &pissa {
        Some(start) => {
            model.subtract(start);
            start.clone()
        }
        None if kind == "loftq" => model.start_loftq(config, 1).unwrap(),
        None => Adapter::gaussian(model.config(), config, 5).unwrap(),
    };
    if config.use_dora {
        adapter.set_magnitudes(&model).unwrap();
    }
    disturb(&mut adapter);
    let saved = match &pissa {
        Some(start) => adapter.relative_to(start, &Model::load(&base()).unwrap()).unwrap(),
        None => adapter.clone(),
    };
    (kind, saved, model, adapter)
}

#[test]
fn written_adapters_read_back() {
    for (kind, saved, ..) in written() {
        let dir = tempfile::tempdir().unwrap();
        saved.save_peft(dir.path(), "tiny").unwrap();
        let read = Model::load(&base()).unwrap().load_adapter(dir.path()).unwrap();
        assert_eq!(read, saved, "{kind}");
    }
}

/// `PIPE_PYTHON` is a Python as the trial `python` of `.ci/full` makes it.
#[test]
fn written_adapters_give_their_logits_in_pythons_peft() {
    let Some(python) = std::env::var_os("PIPE_PYTHON") else {
        fixtures::skipped("PIPE_PYTHON is not set");
        return;
    };
    let ids: Vec<i32> = (0..20).map(|i| i * 37 % 512).collect();
    for (kind, saved, model, adapter) in written() {
        let dir = tempfile::tempdir().unwrap();
        saved.save_peft(dir.path(), "tiny").unwrap();
        let ours = model.logits(Some(&adapter), &ids, &[0, 20]).unwrap();
        let off = max_difference(&ours, &logits_of_peft(&python, dir.path(), &ids));
        assert!(off < 2e-4, "{kind}: {off}");
    }
}
