//! Damaged PEFT folders give an adapter or an error that names the file; see checkpoint's `fuzz.rs`.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../../checkpoint/tests/mutate/mod.rs"]
mod mutate;

use std::path::{Path, PathBuf};

use model::{Adapter, Model};
use mutate::{Counting, Random, check, rounds};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../tests/fixtures")
}

/// Reads an adapter of which `damage` changes one file, `times` times over.
fn read_damaged(
    folder: &str,
    file: &str,
    times: u64,
    damage: impl Fn(&mut Random, &[u8]) -> Vec<u8>,
) {
    let source = fixtures().join(folder);
    let model = Model::load(&fixtures().join("tiny-models/qwen2/f32")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for name in [CONFIG, WEIGHTS] {
        std::fs::copy(source.join(name), dir.path().join(name)).unwrap();
    }
    Adapter::load_peft(dir.path(), &model).unwrap();
    let whole = std::fs::read(source.join(file)).unwrap();
    let stored = std::fs::metadata(source.join(WEIGHTS)).unwrap().len() as usize;
    for round in rounds(times) {
        std::fs::write(dir.path().join(file), damage(&mut Random::new(round), &whole)).unwrap();
        check(&format!("{folder}, round {round}"), stored, &[CONFIG, WEIGHTS], || {
            Adapter::load_peft(dir.path(), &model).map(drop).map_err(|e| e.to_string())
        });
    }
}

#[test]
fn damaged_adapter_config() {
    for folder in ["peft/dora", "peft/pissa", "tiny-models/qwen2/adapter"] {
        read_damaged(folder, CONFIG, 300, mutate::json);
    }
}

#[test]
fn damaged_adapter_weights() {
    for folder in ["peft/dora", "peft/rslora"] {
        read_damaged(folder, WEIGHTS, 600, |random, whole| {
            let mut damaged = whole.to_vec();
            let head = 8 + u64::from_le_bytes(*whole.first_chunk().unwrap()) as usize;
            mutate::bytes(random, &mut damaged, head);
            damaged
        });
    }
}
