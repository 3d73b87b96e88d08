#![allow(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;

use super::*;

fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// One metadata text, one array, one F32 tensor `[2, 3]` and one Q8_0 tensor `[1, 32]`.
fn sample() -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3_u32.to_le_bytes());
    out.extend(2_u64.to_le_bytes());
    out.extend(2_u64.to_le_bytes());
    string(&mut out, "general.architecture");
    out.extend(8_u32.to_le_bytes());
    string(&mut out, "llama");
    string(&mut out, "tokenizer.ggml.token_type");
    out.extend(9_u32.to_le_bytes());
    out.extend(5_u32.to_le_bytes());
    out.extend(2_u64.to_le_bytes());
    out.extend(1_i32.to_le_bytes());
    out.extend((-3_i32).to_le_bytes());
    for (name, ne, kind, offset) in [("a", [3_u64, 2], 0_u32, 0_u64), ("b", [32, 1], 8, 32)] {
        string(&mut out, name);
        out.extend(2_u32.to_le_bytes());
        for d in ne {
            out.extend(d.to_le_bytes());
        }
        out.extend(kind.to_le_bytes());
        out.extend(offset.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(32), 0);
    for value in 0..6 {
        out.extend((value as f32).to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(32), 0);
    out.extend([7; 34]);
    out
}

fn open(bytes: &[u8]) -> Result<Gguf, CheckpointError> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    Gguf::open(file.path())
}

#[test]
fn shapes_are_row_major_and_data_is_found() {
    let gguf = open(&sample()).unwrap();
    assert_eq!(gguf.str("general.architecture").unwrap(), "llama");
    assert_eq!(gguf.integers("tokenizer.ggml.token_type").unwrap(), [1, -3]);
    assert_eq!(gguf.tensor("a").unwrap().shape, [2, 3]);
    assert_eq!(gguf.tensor_data("a").unwrap()[20..], 5_f32.to_le_bytes());
    assert_eq!(*gguf.tensor_data("b").unwrap(), [7; 34]);
    assert!(gguf.u64("general.architecture").unwrap_err().to_string().contains("not an uns"));
}

#[test]
fn file_cut_anywhere_is_an_error_with_an_offset() {
    let whole = sample();
    for len in 0..whole.len() {
        let error = open(&whole[..len]).unwrap_err().to_string();
        assert!(error.contains("byte"), "cut at {len}: {error}");
    }
}

#[test]
fn huge_count_does_not_allocate() {
    let mut bytes = sample();
    bytes[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    let error = open(&bytes).unwrap_err().to_string();
    assert!(error.contains("number of tensors") && error.ends_with("at byte 8"), "{error}");
}

proptest! {
    #[test]
    fn any_flipped_bytes_never_panic(
        flips in prop::collection::vec((0_usize..400, any::<u8>()), 1..8)
    ) {
        let mut bytes = sample();
        for (at, value) in flips {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        if let Ok(gguf) = open(&bytes) {
            for tensor in gguf.tensors() {
                let data = gguf.tensor_data(&tensor.name).unwrap();
                prop_assert_eq!(data.len() as u64, tensor.bytes);
            }
        }
    }
}
