//! Files that are already in the Hugging Face cache, with and without a network.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::server::{COMMIT, Hub};
use super::space::{Space, hf, noise};
use crate::digest::hash_bytes;

const NOBODY: &str = "http://127.0.0.1:9";

#[test]
fn cached_files_are_linked_and_never_fetched() {
    let hub = Hub::start(None);
    let weights = noise(100_000, 1);
    hub.put("config.json", b"{}", false);
    hub.put("model.gguf", &weights, true);
    let mut space = Space::new(&hub.endpoint);
    let blob = space.cache("model.gguf", &hash_bytes(&weights), &weights);
    space.cache("config.json", &hash_bytes(b"{}")[..40], b"{}");
    let outcome = space.run_hf(&["config.json", "*.gguf"]).unwrap();
    assert_eq!(space.read("model.gguf"), weights);
    assert_eq!(outcome.telemetry["fetched_bytes"], 0);
    assert_eq!(outcome.telemetry["linked_bytes"], 100_002);
    assert!(hub.take_gets().is_empty());
    // A file system with reflinks gives another inode that shares the blocks; else a copy would
    // be one too.
    let linked = fs::metadata(space.output().join("model.gguf")).unwrap();
    let is_same = linked.ino() == fs::metadata(&blob).unwrap().ino();
    assert_eq!(is_same, !has_reflinks(&blob));
}

/// Whether the file system of a file shares blocks between files.
fn has_reflinks(file: &Path) -> bool {
    let probe = fs::File::create(file.with_extension("probe")).unwrap();
    rustix::fs::ioctl_ficlone(&probe, fs::File::open(file).unwrap()).is_ok()
}

#[test]
fn offline_run_takes_the_cached_commit_and_asks_nobody() {
    let mut space = Space::new(NOBODY);
    space.settings.offline = true;
    let weights = noise(1000, 2);
    space.cache("sub/model.gguf", &hash_bytes(&weights), &weights);
    let outcome = space.run_hf(&["*.gguf"]).unwrap();
    assert_eq!(space.read("sub/model.gguf"), weights);
    assert_eq!(outcome.lock.unwrap()["revision"], COMMIT);
}

#[test]
fn locked_files_come_from_the_cache_without_any_network() {
    let hub = Hub::start(None);
    let weights = noise(1000, 3);
    hub.put("model.gguf", &weights, true);
    let lock = Space::new(&hub.endpoint).run_hf(&["*.gguf"]).unwrap().lock;
    let mut space = Space::new(NOBODY);
    space.cache("model.gguf", &hash_bytes(&weights), &weights);
    space.run(hf(&["*.gguf"]), lock).unwrap();
    assert_eq!(space.read("model.gguf"), weights);
}

#[test]
fn damaged_cached_file_is_fetched_anew() {
    let hub = Hub::start(None);
    let weights = noise(1000, 4);
    hub.put("model.gguf", &weights, true);
    let mut space = Space::new(&hub.endpoint);
    space.cache("model.gguf", &hash_bytes(&weights), &noise(1000, 5));
    let outcome = space.run_hf(&["*.gguf"]).unwrap();
    assert_eq!(space.read("model.gguf"), weights);
    assert_eq!(outcome.telemetry["fetched_bytes"], 1000);
}

#[test]
fn offline_and_not_cached_says_so() {
    let mut space = Space::new(NOBODY);
    space.settings.offline = true;
    let error = space.run_hf(&["*.gguf"]).unwrap_err();
    assert!(error.message.contains("offline, and model `org/tiny` at `main`"), "{error}");
    assert!(error.help.unwrap().contains("HF_HUB_OFFLINE"));
}

#[test]
fn offline_half_cached_model_is_refused() {
    let mut space = Space::new(NOBODY);
    space.settings.offline = true;
    let index = br#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;
    space.cache("model.safetensors.index.json", "aa", index);
    let shard = noise(100, 6);
    space.cache("model-1.safetensors", &hash_bytes(&shard), &shard);
    let error = space.run_hf(&["*.json", "*.safetensors"]).unwrap_err();
    assert!(error.message.contains("model-2.safetensors"), "{error}");
    assert!(!space.output().exists());
}

#[test]
fn exec_bit_of_a_cached_file_does_not_reach_the_tree() {
    use std::os::unix::fs::PermissionsExt;
    let mut space = Space::new(NOBODY);
    space.settings.offline = true;
    let weights = noise(100, 7);
    let blob = space.cache("model.gguf", &hash_bytes(&weights), &weights);
    fs::set_permissions(&blob, fs::Permissions::from_mode(0o755)).unwrap();
    space.run_hf(&["*.gguf"]).unwrap();
    let mode = fs::metadata(space.output().join("model.gguf")).unwrap().permissions().mode();
    assert_eq!(mode & 0o111, 0);
    assert_eq!(fs::metadata(blob).unwrap().permissions().mode() & 0o777, 0o755);
}
