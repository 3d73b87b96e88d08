//! The merged model as one GGUF file.

use std::path::Path;

use checkpoint::{
    ChatTemplate, Family, GgmlType, GgufWriter, ModelConfig, ModelFolder, gguf_name, gguf_rows,
};
use contract::{Reporter, StageError};

use crate::merged::{Merged, Named, architecture};
use crate::out::{self, Fault, Written};

/// Name of the file.
pub(crate) const FILE: &str = "model.gguf";
/// Version of ggml's quantised layouts.
const QUANTIZATION_VERSION: u32 = 2;

/// Writes `model.gguf` into `folder`; matrices are of the type `kind`, or what
/// [`matrix_type`] says, everything else is F32.
///
/// # Errors
/// What cannot be read, merged, held by GGUF, or written.
pub(crate) fn write(
    merged: &Merged<'_>,
    model: &ModelFolder,
    kind: GgmlType,
    folder: &Path,
    reporter: &mut Reporter,
) -> Result<Written, StageError> {
    let mut head = GgufWriter::new();
    describe(&mut head, merged.config, kind)?;
    model.vocabulary(merged.config.vocab_size)?.write(&mut head);
    if let Ok(ChatTemplate { source, tool_source, .. }) = model.chat_template() {
        head.str("tokenizer.chat_template", &source);
        if let Some(source) = tool_source {
            head.str("tokenizer.chat_template.tool_use", &source);
        }
    } else {
        reporter.warn("the model has no chat template, and so has none as GGUF");
    }
    let tensors = merged.tensors();
    let mut places = Vec::with_capacity(tensors.len());
    for tensor in &tensors {
        let (name, dtype) = place(merged, tensor, kind)?;
        head.tensor(&name, dtype, &tensor.1).map_err(StageError::internal)?;
        places.push((name, dtype));
    }
    let mut written = Written::default();
    written.files.push(FILE.to_owned());
    let total = tensors.len() as u64;
    written.bytes = out::file(folder, FILE, |file| {
        head.write::<Fault>(file, |i| {
            let ((source, shape), (name, dtype)) = (&tensors[i], &places[i]);
            let values = merged.values(source, shape)?;
            let width = shape.last().copied().unwrap_or(1);
            let values = gguf_rows(merged.config, name, values, width);
            let fault = |e: String| StageError::input(format!("`{source}`: {e}"));
            let encoded = dtype.encode(&values).map_err(fault)?;
            let stored = dtype.decode(&encoded, values.len());
            let stored = stored.ok_or_else(|| StageError::internal("blocks cannot be decoded"))?;
            if let Some(at) = stored.iter().position(|v| !v.is_finite()) {
                let large = fault(format!("value {} is too large for {dtype:?}", values[at]));
                return Err(large.help("`format: safetensors` has the range of f32").into());
            }
            written.tensor(&values, stored.into_iter());
            reporter.advance(written.tensors, total, "tensors", source);
            Ok(encoded)
        })
    })?;
    Ok(written)
}

/// Name in GGUF and type of a tensor.
fn place(
    merged: &Merged<'_>,
    (name, shape): &Named,
    kind: GgmlType,
) -> Result<(String, GgmlType), StageError> {
    let gguf = gguf_name(merged.config, name).ok_or_else(|| {
        StageError::input(format!("`{name}` has no name in GGUF that is known here"))
    })?;
    let dtype = match shape[..] {
        [_, width] => matrix_type(name, width, kind),
        _ => GgmlType::F32,
    };
    Ok((gguf, dtype))
}

/// The embedding and the head are the most sensitive: in a four-bit file they have eight bits, as
/// llama.cpp's own four-bit files give them more. Rows that do not fill blocks are F16.
fn matrix_type(name: &str, width: usize, kind: GgmlType) -> GgmlType {
    let outer = !name.contains(".layers.");
    let kind = if outer && kind == GgmlType::Q4_0 { GgmlType::Q8_0 } else { kind };
    if (width as u64).is_multiple_of(kind.block_len()) { kind } else { GgmlType::F16 }
}

/// Adds the metadata of the architecture.
fn describe(head: &mut GgufWriter, c: &ModelConfig, kind: GgmlType) -> Result<(), StageError> {
    let (arch, _) = architecture(c.family);
    head.str("general.architecture", arch);
    head.str("general.type", "model");
    // ggml's `llama_ftype`: mostly F16, mostly Q4_0, mostly Q8_0.
    let file_type = match kind {
        GgmlType::Q4_0 => 2,
        GgmlType::Q8_0 => 7,
        _ => 1,
    };
    head.u32("general.file_type", file_type);
    head.u32("general.quantization_version", QUANTIZATION_VERSION);
    for (key, value) in [
        ("vocab_size", c.vocab_size),
        ("context_length", c.max_position_embeddings),
        ("embedding_length", c.hidden_size),
        ("block_count", c.num_hidden_layers),
        ("feed_forward_length", c.intermediate_size),
        ("attention.head_count", c.num_attention_heads),
        ("attention.head_count_kv", c.num_key_value_heads),
        ("attention.key_length", c.head_dim),
        ("attention.value_length", c.head_dim),
        ("rope.dimension_count", c.head_dim),
    ] {
        let value = u32::try_from(value).map_err(StageError::internal)?;
        head.u32(&format!("{arch}.{key}"), value);
    }
    head.f32(&format!("{arch}.rope.freq_base"), c.rope_theta);
    head.f32(&format!("{arch}.attention.layer_norm_rms_epsilon"), c.rms_norm_eps);
    if c.family == Family::Gemma2 {
        describe_gemma2(head, c)?;
    }
    Ok(())
}

/// Layers of the one Gemma-2 whose scores llama.cpp scales by the model's width.
const LAYERS_OF_27B: usize = 46;

/// Adds what llama.cpp reads of a Gemma-2. What it takes for granted has no key, and a model that
/// differs there would be misread.
fn describe_gemma2(head: &mut GgufWriter, c: &ModelConfig) -> Result<(), StageError> {
    let v = &c.variations;
    let scalar = match c.num_hidden_layers {
        LAYERS_OF_27B => c.hidden_size / c.num_attention_heads,
        _ => c.head_dim,
    };
    let window = v.sliding_windows.first().copied().flatten();
    let alternates = (0..c.num_hidden_layers)
        .all(|layer| c.sliding_window(layer) == window.filter(|_| layer.is_multiple_of(2)));
    let fault = |what: &str| {
        StageError::input(format!("GGUF has no place for a Gemma-2 {what}"))
            .help("`format: safetensors` has")
    };
    let (Some(attention), Some(last)) = (v.attn_logit_softcapping, v.final_logit_softcapping)
    else {
        return Err(fault("without softcaps"));
    };
    let Some(window) = window.filter(|_| alternates) else {
        return Err(fault("whose window is not that of its even layers"));
    };
    if v.query_pre_attn_scalar != Some(scalar as f32) {
        return Err(fault("with a `query_pre_attn_scalar` of its own"));
    }
    if !c.tie_word_embeddings {
        return Err(fault("whose head is not its embedding"));
    }
    head.f32("gemma2.attn_logit_softcapping", attention);
    head.f32("gemma2.final_logit_softcapping", last);
    let window = u32::try_from(window).map_err(StageError::internal)?;
    head.u32("gemma2.attention.sliding_window", window);
    Ok(())
}
