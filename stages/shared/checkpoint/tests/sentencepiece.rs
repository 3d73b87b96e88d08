//! A tokenizer like Gemma's, through GGUF and back, against SentencePiece's own ids and scores
//! (`benches/fixtures/spm_tokenizer.py`).
#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};

use checkpoint::{Gguf, GgufWriter, ModelFolder, Tokenizer, VocabularyKind};
use serde_json::Value;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../tests/fixtures/sentencepiece")
}

fn expected() -> Value {
    serde_json::from_slice(&std::fs::read(folder().join("expected.json")).unwrap()).unwrap()
}

fn assert_encodes(tokenizer: &Tokenizer, whose: &str) {
    for case in expected()["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(text).unwrap().ids, ids, "{whose}: {text:?}");
        assert_eq!(tokenizer.decode(&ids).unwrap(), text, "{whose}");
    }
    let id = |text: &str| tokenizer.id(text);
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (id("<bos>"), id("<eos>")), "{whose}");
    assert!(tokenizer.bos().is_some() && tokenizer.adds_bos(), "{whose}");
}

#[test]
fn pieces_keep_their_ids_through_gguf_and_back() {
    let source = ModelFolder::Safetensors { dir: folder() };
    assert_encodes(&source.tokenizer().unwrap(), "tokenizer.json");
    let scores: Vec<f32> = serde_json::from_value(expected()["scores"].clone()).unwrap();
    let vocabulary = source.vocabulary(scores.len() + 3).unwrap();
    let VocabularyKind::Pieces { scores: found, adds_space } = &vocabulary.kind else {
        panic!("byte-level")
    };
    assert!(!adds_space);
    let merged = |text: &str, kind: i32| kind == 1 && text.chars().count() > 1;
    let mut compared = 0;
    for (id, score) in scores.iter().enumerate() {
        if merged(&vocabulary.tokens[id], vocabulary.types[id]) {
            assert_eq!(found[id].to_bits(), score.to_bits(), "{}", vocabulary.tokens[id]);
            compared += 1;
        }
    }
    assert!(compared > 300, "{compared}");
    let kind =
        |text: &str| vocabulary.types[vocabulary.tokens.iter().position(|t| t == text).unwrap()];
    assert_eq!(
        ["<unk>", "<bos>", "<start_of_turn>", "\n\n", "<0x0A>", "[PAD900]"].map(kind),
        [2, 3, 3, 4, 6, 5]
    );

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let mut writer = GgufWriter::new();
    vocabulary.write(&mut writer);
    let mut file = std::fs::File::create(&path).unwrap();
    writer.write::<std::io::Error>(&mut file, |_| unreachable!()).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    assert_eq!(gguf.str("tokenizer.ggml.model").unwrap(), "llama");
    let made = ModelFolder::Gguf { gguf };
    assert_encodes(&made.tokenizer().unwrap(), "GGUF");
    assert_eq!(made.vocabulary(scores.len() + 3).unwrap(), vocabulary);
}
