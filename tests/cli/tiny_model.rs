//! A small GGUF file: a tokenizer with a token a character, a chat template, the shape of a Llama,
//! and one tensor.

use checkpoint::{GgmlType, GgufWriter};

/// Marks the end of a turn.
const END: &str = "</s>";
/// Longest text that the model reads, in tokens.
pub(crate) const CONTEXT: u32 = 256;
/// Width of the one tensor.
const WIDTH: u32 = 8;

/// A template that renders every role.
pub(crate) const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n\
    {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

/// The file, with that chat template.
pub(crate) fn gguf(template: &str) -> Vec<u8> {
    // Byte-level BPE spells a space and a new line so.
    let mut tokens: Vec<String> = ('!'..='~').chain(['Ġ', 'Ċ']).map(String::from).collect();
    let mut types = vec![1; tokens.len()];
    let end = tokens.len() as u32;
    tokens.push(END.to_owned());
    types.push(3);
    let mut writer = GgufWriter::new();
    writer.str("general.architecture", "llama");
    for (key, value) in [
        ("block_count", 1),
        ("context_length", CONTEXT),
        ("embedding_length", WIDTH),
        ("feed_forward_length", WIDTH),
        ("attention.head_count", 1),
    ] {
        writer.u32(&format!("llama.{key}"), value);
    }
    writer.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
    writer.str("tokenizer.ggml.model", "gpt2");
    writer.strings("tokenizer.ggml.tokens", &tokens);
    writer.i32s("tokenizer.ggml.token_type", &types);
    writer.strings("tokenizer.ggml.merges", &[]);
    writer.u32("tokenizer.ggml.eos_token_id", end);
    writer.str("tokenizer.chat_template", template);
    let shape = [tokens.len(), WIDTH as usize];
    writer.tensor("token_embd.weight", GgmlType::F32, &shape).unwrap();
    let mut file = Vec::new();
    let zeros = vec![0; 4 * shape[0] * shape[1]];
    writer.write(&mut file, |_| Ok::<_, std::io::Error>(zeros.clone())).unwrap();
    file
}
