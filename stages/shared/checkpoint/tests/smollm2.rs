//! The tokenizer built from a real GGUF file, against ids that transformers made.
//! `PIPE_SMOLLM2` names the file; without it these tests are skipped, saying so.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::PathBuf;

use checkpoint::ModelFolder;
use serde_json::Value;

fn folder() -> Option<ModelFolder> {
    let Some(path) = std::env::var_os("PIPE_SMOLLM2") else {
        fixtures::skipped("PIPE_SMOLLM2 is not set");
        return None;
    };
    Some(ModelFolder::open(&PathBuf::from(path)).unwrap())
}

#[test]
fn token_ids_of_the_fixture_are_equal_and_decode_to_the_text() {
    // First, so that a missing fixture fails without the model too.
    let path = fixtures::path("smollm2-135m-instruct/expected.json");
    let expected: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let Some(folder) = folder() else { return };
    let tokenizer = folder.tokenizer().unwrap();
    for case in expected["tokenisation"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let encoded = tokenizer.encode(text).unwrap();
        let ids: Vec<u64> =
            case["ids"].as_array().unwrap().iter().map(|i| i.as_u64().unwrap()).collect();
        assert_eq!(encoded.ids.iter().map(|i| u64::from(*i)).collect::<Vec<_>>(), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&encoded.ids).unwrap(), text);
    }
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1), Some(2)));
}

#[test]
fn chat_template_and_its_marks_come_from_the_file() {
    let Some(folder) = folder() else { return };
    let template = folder.chat_template().unwrap();
    assert!(template.source.contains("<|im_start|>"));
    assert_eq!(
        (template.bos_token.as_str(), template.eos_token.as_str()),
        ("<|im_start|>", "<|im_end|>")
    );
}

#[test]
fn endless_blanks_are_refused() {
    let Some(folder) = folder() else { return };
    let text = " ".repeat(200_000);
    assert!(
        folder.tokenizer().unwrap().encode(&text).unwrap_err().to_string().contains("white space")
    );
}

#[test]
fn a_template_beside_the_file_replaces_its_own() {
    let Some(folder) = folder() else { return };
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(folder.path(), dir.path().join("model.gguf")).unwrap();
    std::fs::write(dir.path().join("chat_template.jinja"), "own").unwrap();
    let template = ModelFolder::open(dir.path()).unwrap().chat_template().unwrap();
    assert_eq!((template.source.as_str(), template.bos_token.as_str()), ("own", "<|im_start|>"));
}
