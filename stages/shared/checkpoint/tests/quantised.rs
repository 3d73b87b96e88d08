//! Quantised safetensors: decoding equal to bitsandbytes', and what is refused by name.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::path::Path;

use checkpoint::{
    Absmax, FloatType, LinearWeight, ModelConfig, ModelFolder, NestedRounding, Nf4, Weights, to_f32,
};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let owned = |(name, view): (String, TensorView<'_>)| {
        (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    file.tensors().into_iter().map(owned).collect()
}

fn golden() -> Tensors {
    tensors(&fixtures::own("checkpoint/nf4/model.safetensors"))
}

fn floats(tensors: &Tensors, name: &str) -> Vec<f32> {
    let (dtype, _, data) = &tensors[name];
    to_f32(*dtype, data).unwrap()
}

fn write(path: &Path, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, data))| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    std::fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn nf4_config() -> Value {
    json!({
        "quant_method": "bitsandbytes",
        "load_in_4bit": true,
        "bnb_4bit_quant_type": "nf4",
        "llm_int8_skip_modules": null,
    })
}

fn config(quantization: Value) -> Value {
    json!({
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 64,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "tie_word_embeddings": true,
        "quantization_config": quantization,
    })
}

/// A folder with that `quantization_config` and one file of weights.
fn folder(quantization: Value, tensors: &Tensors) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config(quantization).to_string()).unwrap();
    write(&dir.path().join("model.safetensors"), tensors);
    dir
}

/// Reads one linear layer of a folder.
fn linear(dir: &Path, name: &str, shape: [usize; 2]) -> Result<LinearWeight, String> {
    let folder = ModelFolder::open(dir).map_err(|e| e.to_string())?;
    let config = ModelConfig::read(&folder).map_err(|e| e.to_string())?;
    let weights = Weights::open(&folder, &config).map_err(|e| e.to_string())?;
    weights.load_linear(name, shape).map_err(|e| e.to_string())
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn matrices_decode_bit_for_bit_as_in_bitsandbytes() {
    let golden = golden();
    let dir = folder(nf4_config(), &golden);
    let cases: Vec<&str> = golden.keys().filter_map(|n| n.strip_suffix(".decoded")).collect();
    assert_eq!(cases.len(), 15);
    for case in cases {
        let shape: [usize; 2] = golden[&format!("{case}.input")].1.clone().try_into().unwrap();
        let weight = linear(dir.path(), &format!("{case}.weight"), shape).unwrap();
        let LinearWeight::Nf4(packed) = weight else { panic!("{case} was decoded") };
        let expected = floats(&golden, &format!("{case}.decoded"));
        assert_eq!(bits(&packed.decode()), bits(&expected), "{case}");
        // Rows one by one: blocks span rows, and rows of an odd length start inside a byte.
        let mut row = vec![0.0; shape[1]];
        for (i, expected) in expected.chunks(shape[1]).enumerate() {
            packed.decode_rows(i..i + 1, &mut row);
            assert_eq!(bits(&row), bits(expected), "{case} row {i}");
        }
    }
}

#[test]
fn fixture_decoded_layers_are_exact() {
    for family in ["llama", "qwen2", "gemma2"] {
        let dir = fixtures::path(&format!("tiny-models/{family}"));
        let expected = tensors(&dir.join("expected.safetensors"));
        let shape = expected["dequant_layer0_gate"].1.clone().try_into().unwrap();
        let name = "model.layers.0.mlp.gate_proj.weight";
        let weight = linear(&dir.join("nf4"), name, shape).unwrap();
        assert!(matches!(weight, LinearWeight::Nf4(_)));
        let expected = floats(&expected, "dequant_layer0_gate");
        assert_eq!(bits(&weight.into_f32()), bits(&expected), "{family}");
    }
}

#[test]
fn fixture_quantised_layers_are_those_of_the_checkpoint() {
    for family in ["llama", "qwen2", "gemma2"] {
        let dir = fixtures::path(&format!("tiny-models/{family}"));
        let full = tensors(&dir.join("f32/model.safetensors"));
        let quantised = tensors(&dir.join("nf4/model.safetensors"));
        let layers: Vec<&str> =
            quantised.keys().filter_map(|n| n.strip_suffix(".nested_absmax")).collect();
        assert_eq!(layers.len(), 14, "{family}");
        for name in layers {
            let shape = full[name].1.clone().try_into().unwrap();
            let rounding = Some(NestedRounding::Table);
            let ours =
                Nf4::quantise(&floats(&full, name), shape, 64, FloatType::F32, rounding).unwrap();
            assert_eq!(ours.packed(), quantised[name].2, "{family} {name}");
            let Absmax::Nested(nested) = ours.absmax() else { panic!("{name} is not nested") };
            // The mean of the scales, and so they, may differ in the last bit.
            let outer = floats(&quantised, &format!("{name}.nested_absmax"));
            let near = |(a, b): (&f32, &f32)| (a - b).abs() <= b * 1e-5;
            assert!(nested.absmax.iter().zip(&outer).all(near), "{family} {name}");
            let codes = &quantised[&format!("{name}.absmax")].2;
            assert_eq!(nested.codes.len(), codes.len());
            let adjacent = |(a, b): (&u8, &u8)| a.abs_diff(*b) <= 1;
            assert!(nested.codes.iter().zip(codes).all(adjacent), "{family} {name}");
        }
    }
}

#[test]
fn quantisations_that_are_not_supported_are_named() {
    let golden = golden();
    let with = |key: &str, value: Value| {
        let mut section = nf4_config();
        section[key] = value;
        section
    };
    for (section, message) in [
        (with("quant_method", json!("gptq")), "method `gptq`"),
        (with("quant_method", json!("awq")), "method `awq`"),
        (with("load_in_8bit", json!(true)), "8-bit"),
        (with("load_in_4bit", json!(false)), "`load_in_4bit` is not true"),
        (with("bnb_4bit_quant_type", json!("fp4")), "`fp4`"),
        (with("bnb_4bit_quant_type", Value::Null), "`fp4`"),
        (with("bnb_4bit_quant_storage", json!("bfloat16")), "`bfloat16`"),
        (with("llm_int8_skip_modules", json!(["layers.(1|2)"])), "not a list of names"),
        (with("llm_int8_skip_modules", json!("lm_head")), "not a list of names"),
        (Value::Null, "no quantization_config"),
        (with("llm_int8_skip_modules", json!(["plain"])), "names it as stored in full"),
    ] {
        let dir = folder(section, &golden);
        let error = linear(dir.path(), "plain.weight", [16, 64]).unwrap_err();
        assert!(error.contains(message), "{error}");
    }
}

/// Reads `config.json` with one field changed.
fn read_with(key: &str, value: Value) -> Result<ModelConfig, String> {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(nf4_config());
    config[key] = value;
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let folder = ModelFolder::open(dir.path()).unwrap();
    ModelConfig::read(&folder).map_err(|e| e.to_string())
}

#[test]
fn models_that_are_not_supported_are_named() {
    let rope = |kind: &str| json!({"rope_type": kind, "factor": 8.0});
    let nested = json!({"full_attention": {"rope_type": "default", "rope_theta": 1e6}});
    for (key, value, message) in [
        ("model_type", json!("mistral"), "model type `mistral`"),
        ("model_type", json!("phi3"), "model type `phi3`"),
        ("model_type", json!("qwen2_moe"), "model type `qwen2_moe`"),
        ("model_type", json!("qwen3"), "choose a model of one of these families"),
        ("model_type", json!("gemma3_text"), "model type `gemma3_text`"),
        ("architectures", json!(["LlamaForSequenceClassification"]), "no model that generates"),
        ("rope_scaling", rope("llama3"), "rope scaling `llama3`"),
        ("rope_scaling", rope("dynamic"), "rope scaling `dynamic`"),
        ("rope_scaling", rope("longrope"), "rope scaling `longrope`"),
        ("rope_scaling", json!({"type": "linear", "factor": 2.0}), "rope scaling `linear`"),
        ("rope_scaling", json!({"factor": 2.0}), "`rope_scaling.factor`"),
        ("rope_parameters", rope("yarn"), "rope scaling `yarn`"),
        ("rope_parameters", nested, "`rope_parameters.full_attention`"),
        ("partial_rotary_factor", json!(0.5), "a part of each head"),
        ("attention_bias", json!(true), "`attention_bias`"),
        ("mlp_bias", json!(true), "`mlp_bias`"),
        ("use_sliding_window", json!(true), "`use_sliding_window`"),
        ("layer_types", json!(["sliding_attention"]), "the type `sliding_attention`"),
        ("hidden_act", json!("gelu"), "the activation `gelu`"),
        ("quantization_config", json!({"quant_method": "fp8"}), "method `fp8`"),
        ("quantization_config", json!({"quant_method": "compressed-tensors"}), "in 16 bits"),
    ] {
        let error = read_with(key, value).unwrap_err();
        assert!(error.contains(message) && error.contains("config.json"), "{error}");
    }
}

#[test]
fn the_base_of_the_rotary_frequencies_is_read_from_either_version() {
    let theta = |key, value| read_with(key, value).unwrap().rope_theta;
    let close = |a: f32, b: f32| a.to_bits() == b.to_bits();
    assert!(close(theta("rope_theta", json!(1_000_000)), 1e6));
    assert!(close(theta("rope_theta", Value::Null), 1e4));
    let own = json!({"rope_type": "default", "rope_theta": 5e5, "factor": null});
    assert!(close(theta("rope_parameters", own), 5e5));
    assert!(close(theta("rope_scaling", json!({"type": "default"})), 1e4));
}

#[test]
fn the_plain_four_bit_checkpoints_of_unsloth_are_read() {
    // As in several copies of unsloth/Qwen2.5-3B-Instruct-bnb-4bit, and with the head listed.
    for skipped in [Value::Null, json!([]), json!(["lm_head"])] {
        let section = json!({"_load_in_4bit": true, "_load_in_8bit": false,
            "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": true,
            "llm_int8_enable_fp32_cpu_offload": false, "llm_int8_has_fp16_weight": false,
            "llm_int8_skip_modules": skipped, "llm_int8_threshold": 6.0, "load_in_4bit": true,
            "load_in_8bit": false, "quant_method": "bitsandbytes"});
        let dir = folder(section, &golden());
        let weight = linear(dir.path(), "double.weight", [24, 96]).unwrap();
        assert!(matches!(weight, LinearWeight::Nf4(_)));
    }
}

#[test]
fn head_that_is_tied_in_the_configuration_alone_is_refused() {
    let read = |tied: bool, head: Option<&str>| {
        let golden = golden();
        let mut tensors = Tensors::new();
        let embedding = "model.embed_tokens.weight".to_owned();
        tensors.insert(embedding, golden["plain.input"].clone());
        if let Some(head) = head {
            tensors.insert("lm_head.weight".to_owned(), golden[head].clone());
        }
        let dir = folder(nf4_config(), &tensors);
        let mut config = config(nf4_config());
        config["tie_word_embeddings"] = json!(tied);
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let folder = ModelFolder::open(dir.path()).unwrap();
        let config = ModelConfig::read(&folder).unwrap();
        Weights::open(&folder, &config).map(drop).map_err(|e| e.to_string())
    };
    read(true, None).unwrap();
    read(true, Some("plain.input")).unwrap();
    read(false, Some("double.input")).unwrap();
    assert!(read(false, None).unwrap_err().contains("`lm_head.weight` is missing"));
    assert!(read(true, Some("double.input")).unwrap_err().contains("another matrix"));
}

#[test]
fn layer_stored_in_full_must_be_on_the_skip_list() {
    let golden = golden();
    let read = |skip: Value| {
        let mut section = nf4_config();
        section["llm_int8_skip_modules"] = skip;
        linear(folder(section, &golden).path(), "double.input", [24, 96])
    };
    let full = LinearWeight::Full(floats(&golden, "double.input"));
    assert_eq!(read(json!(["lm_head", "double"])).unwrap(), full);
    assert_eq!(read(json!(["input"])).unwrap(), full);
    for other in [json!(["lm_head"]), json!(["doub"]), Value::Null] {
        let error = read(other).unwrap_err();
        assert!(error.contains("llm_int8_skip_modules does not name it"), "{error}");
    }
}

#[test]
fn tensors_that_do_not_fit_each_other_are_named() {
    let state = "double.weight.quant_state.bitsandbytes__nf4";
    let edit = |message: &str, edit: &dyn Fn(&mut Tensors)| {
        let mut tensors = golden();
        edit(&mut tensors);
        let dir = folder(nf4_config(), &tensors);
        let error = linear(dir.path(), "double.weight", [24, 96]).unwrap_err();
        assert!(error.contains(message), "{error}");
    };
    let json = |from: &'static str, to: &'static str| {
        move |tensors: &mut Tensors| {
            let (_, shape, data) = tensors.get_mut(state).unwrap();
            *data = String::from_utf8(data.clone()).unwrap().replacen(from, to, 1).into_bytes();
            *shape = vec![data.len()];
        }
    };
    edit("has no `quant_state`", &|t| drop(t.remove(state)));
    edit("is missing", &|t| drop(t.remove("double.weight.absmax")));
    edit("`double.weight.nested_absmax` is missing", &|t| {
        t.remove("double.weight.nested_absmax");
    });
    edit("not the table of NF4", &|t| {
        t.get_mut("double.weight.quant_map").unwrap().2[3] ^= 0x80;
    });
    edit("not a U8 vector", &|t| {
        let plain = t["plain.weight.absmax"].clone();
        t.insert("double.weight.absmax".to_owned(), plain);
    });
    edit("absmax has 8 values, expected 36", &|t| {
        let other = t["zeros_double.weight.absmax"].clone();
        t.insert("double.weight.absmax".to_owned(), other);
    });
    edit("only `bitsandbytes__nf4`", &|t| {
        let moved = t.remove(state).unwrap();
        t.insert(state.replace("nf4", "fp4"), moved);
    });
    edit("quant_type `fp4`", &json("nf4", "fp4"));
    edit("blocksize is 48", &json("64", "48"));
    edit("expected [24, 96]", &json("[24, 96]", "[96, 24]"));
    edit("not that of a matrix", &json("[24, 96]", "[24]"));
    edit("dtype `int8`", &json("float32", "int8"));
    edit("unknown field", &json("quant_type", "quant_kind"));
    edit("go together", &json(", \"nested_blocksize\": 256", ""));
    edit("has no `quant_state`", &|t| {
        let input = t["double.input"].clone();
        t.insert("double.weight.absmax".to_owned(), input.clone());
        t.insert("double.weight".to_owned(), input);
        t.remove(state);
    });
}
