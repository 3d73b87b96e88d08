//! A GGUF file small enough to write by hand: a tokenizer with a token a character, a chat
//! template, the shape of a Llama, and one tensor.

/// Marks the end of a turn.
const END: &str = "</s>";
/// Longest text that the model reads, in tokens.
pub(crate) const CONTEXT: u32 = 256;
/// Width of the one tensor.
const WIDTH: u32 = 8;
/// Types of GGUF's metadata.
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const TEXT: u32 = 8;
const LIST: u32 = 9;

/// A template that renders every role.
pub(crate) const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n\
    {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

/// The file, with that chat template.
pub(crate) fn gguf(template: &str) -> Vec<u8> {
    // Byte-level BPE spells a space and a new line so.
    let mut tokens: Vec<String> = ('!'..='~').chain(['Ġ', 'Ċ']).map(String::from).collect();
    tokens.push(END.to_owned());
    let rows = tokens.len() as u32;
    let types: Vec<u8> =
        (1..=rows).flat_map(|id| if id == rows { 3_u32 } else { 1 }.to_le_bytes()).collect();
    let mut head = Head::default();
    head.text("general.architecture", "llama");
    for (key, value) in [
        ("block_count", 1),
        ("context_length", CONTEXT),
        ("embedding_length", WIDTH),
        ("feed_forward_length", WIDTH),
        ("attention.head_count", 1),
    ] {
        head.pair(&format!("llama.{key}"), U32, &value.to_le_bytes());
    }
    head.pair("llama.attention.layer_norm_rms_epsilon", F32, &1e-5_f32.to_le_bytes());
    head.text("tokenizer.ggml.model", "gpt2");
    head.list(
        "tokenizer.ggml.tokens",
        TEXT,
        tokens.len(),
        tokens.iter().flat_map(|t| text(t)).collect(),
    );
    head.list("tokenizer.ggml.token_type", I32, tokens.len(), types);
    head.list("tokenizer.ggml.merges", TEXT, 0, Vec::new());
    head.pair("tokenizer.ggml.eos_token_id", U32, &(rows - 1).to_le_bytes());
    head.text("tokenizer.chat_template", template);
    head.file(rows)
}

/// Metadata in the making.
#[derive(Default)]
struct Head {
    pairs: u64,
    bytes: Vec<u8>,
}

impl Head {
    fn pair(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.pairs += 1;
        self.bytes.extend(text(key));
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend(value);
    }

    fn text(&mut self, key: &str, value: &str) {
        self.pair(key, TEXT, &text(value));
    }

    fn list(&mut self, key: &str, kind: u32, len: usize, items: Vec<u8>) {
        let value = [kind.to_le_bytes().to_vec(), (len as u64).to_le_bytes().to_vec(), items];
        self.pair(key, LIST, &value.concat());
    }

    /// Version 3, one tensor of zeros.
    fn file(self, rows: u32) -> Vec<u8> {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend(1_u64.to_le_bytes());
        file.extend(self.pairs.to_le_bytes());
        file.extend(self.bytes);
        file.extend(text("token_embd.weight"));
        file.extend(2_u32.to_le_bytes());
        file.extend(u64::from(WIDTH).to_le_bytes());
        file.extend(u64::from(rows).to_le_bytes());
        // f32, at the beginning of the data.
        file.extend([0; 4 + 8]);
        file.resize(file.len().next_multiple_of(32) + (WIDTH * rows * 4) as usize, 0);
        file
    }
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}
