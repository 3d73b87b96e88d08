//! Quantised safetensors: decoding equal to bitsandbytes', and what is refused by name.
#![allow(clippy::unwrap_used, clippy::print_stderr, reason = "tests")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use checkpoint::{
    Absmax, FloatType, LinearWeight, ModelConfig, ModelFolder, NestedRounding, Nf4, Weights, to_f32,
};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Folder of reference outputs, where `PIPE_FIXTURES` names it: the repository's copy holds no
/// quantised checkpoint.
fn fixtures() -> Option<PathBuf> {
    let folder = std::env::var_os("PIPE_FIXTURES").map(PathBuf::from);
    if folder.is_none() {
        eprintln!("skipped: PIPE_FIXTURES is not set");
    }
    folder
}

fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../tests/fixtures")
}

fn tensors(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let owned = |(name, view): (String, TensorView<'_>)| {
        (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    file.tensors().into_iter().map(owned).collect()
}

fn golden() -> Tensors {
    tensors(&repository().join("checkpoint/nf4/model.safetensors"))
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
    assert_eq!(cases.len(), 8);
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
    let Some(fixtures) = fixtures() else { return };
    for family in ["llama", "qwen2"] {
        let dir = fixtures.join(format!("tiny-models/{family}"));
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
    let Some(fixtures) = fixtures() else { return };
    for family in ["llama", "qwen2", "gemma2"] {
        let dir = fixtures.join(format!("tiny-models/{family}"));
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

#[test]
fn models_that_are_not_supported_are_named() {
    let rope = |kind: &str| json!({"rope_type": kind, "factor": 8.0});
    for (key, value, message) in [
        ("model_type", json!("mistral"), "model type `mistral`"),
        ("rope_scaling", rope("llama3"), "rope scaling `llama3`"),
        ("rope_scaling", json!({"type": "linear", "factor": 2.0}), "rope scaling `linear`"),
        ("rope_parameters", rope("yarn"), "rope scaling `yarn`"),
    ] {
        let dir = folder(nf4_config(), &golden());
        let mut config = config(nf4_config());
        config[key] = value;
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let error = linear(dir.path(), "plain.weight", [16, 64]).unwrap_err();
        assert!(error.contains(message), "{error}");
    }
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
