//! Transfers from a hub: redirects, resume, repeats, tokens, lock.

use std::fs;
use std::time::Duration;

use serde_json::json;

use super::server::{COMMIT, Fault, Hub};
use super::space::{Space, hf, noise, waits};
use crate::digest::hash_bytes;

#[test]
fn files_arrive_and_the_lock_names_commit_sizes_and_hashes() {
    let hub = Hub::start(None);
    let weights = noise(300_000, 1);
    hub.put("config.json", b"{}", false);
    hub.put("data/model.safetensors", &weights, true);
    hub.put("README.md", b"no", false);
    let mut space = Space::new(&hub.endpoint);
    let outcome = space.run_hf(&["*.json", "*.safetensors"]).unwrap();
    assert_eq!(space.read("config.json"), b"{}");
    assert_eq!(space.read("data/model.safetensors"), weights);
    assert!(!space.output().join("README.md").exists());
    let expected = json!({
        "revision": COMMIT,
        "files": {
            "config.json": {"size": 2, "sha256": hash_bytes(b"{}")},
            "data/model.safetensors": {"size": 300_000, "sha256": hash_bytes(&weights)},
        }
    });
    assert_eq!(outcome.lock.unwrap(), expected);
    let last = space.told().lines().last().unwrap().to_owned();
    let last: serde_json::Value = serde_json::from_str(&last).unwrap();
    assert_eq!((&last["done"], &last["total"]), (&json!(300_002), &json!(300_002)));
    assert_eq!(last["unit"], "bytes");
}

#[test]
fn a_dataset_is_found_under_its_own_prefix() {
    let hub = Hub::start(None);
    hub.put("rows.json", b"[1]", false);
    let mut space = Space::new(&hub.endpoint);
    let source = json!({"hf": "org/tiny", "repo_type": "dataset", "include": ["rows.json"]});
    space.run(json!({ "source": source }), None).unwrap();
    assert_eq!(space.read("rows.json"), b"[1]");
    let paths: Vec<String> = hub.take_seen().into_iter().map(|seen| seen.path).collect();
    assert!(paths.iter().all(|path| path.contains("/datasets/")), "{paths:?}");
}

#[test]
fn token_goes_to_the_hub_and_not_to_the_host_it_redirects_to() {
    let hub = Hub::start(Some("hf_right"));
    hub.put("model.gguf", &noise(1000, 2), true);
    let mut space = Space::new(&hub.endpoint).token("hf_right");
    space.run_hf(&["model.gguf"]).unwrap();
    let seen = hub.take_seen();
    let (hub_side, cdn_side): (Vec<_>, Vec<_>) = seen.into_iter().partition(|s| s.host == "hub");
    assert!(hub_side.iter().all(|seen| seen.token.as_deref() == Some("Bearer hf_right")));
    assert_eq!(cdn_side.len(), 1);
    assert!(cdn_side.iter().all(|seen| seen.token.is_none()));
}

#[test]
fn cut_connection_is_resumed_where_it_broke() {
    let hub = Hub::start(None);
    let weights = noise(1_000_000, 3);
    hub.put("model.gguf", &weights, true);
    hub.fail_next([Fault::Cut(400_000)]);
    let mut space = Space::new(&hub.endpoint);
    let outcome = space.run_hf(&["model.gguf"]).unwrap();
    assert_eq!(space.read("model.gguf"), weights);
    let gets: Vec<_> = hub.take_gets().into_iter().filter(|seen| seen.host == "cdn").collect();
    assert_eq!(gets.len(), 2);
    assert_eq!(gets[1].range.as_deref(), Some("bytes=400000-"));
    assert!(gets[1].if_range.is_some());
    assert_eq!(gets[1].served, 600_000);
    assert_eq!(outcome.telemetry["fetched_bytes"], 1_000_000);
}

#[test]
fn next_attempt_goes_on_where_a_dead_one_stopped() {
    let hub = Hub::start(None);
    let weights = noise(1_000_000, 4);
    hub.put("model.gguf", &weights, true);
    let mut space = Space::new(&hub.endpoint);
    space.settings.retries.attempts = 1;
    hub.fail_next([Fault::Cut(700_000)]);
    let first = space.run_hf(&["model.gguf"]).unwrap_err();
    assert!(first.message.contains("after 1 attempt:"), "{}", first.message);
    assert!(!space.output().exists());
    let left = fs::read_dir(space.scratch(1).join("parts")).unwrap().count();
    hub.take_seen();

    let outcome = space.run_hf(&["model.gguf"]).unwrap();
    assert_eq!(space.read("model.gguf"), weights);
    assert_eq!(outcome.telemetry["resumed_bytes"], 700_000);
    assert_eq!(hub.take_gets().last().unwrap().served, 300_000);
    assert_eq!(fs::read_dir(space.scratch(1).join("parts")).unwrap().count(), left);
}

#[test]
fn damaged_leftover_of_a_dead_attempt_is_fetched_anew() {
    let hub = Hub::start(None);
    let weights = noise(200_000, 5);
    hub.put("model.gguf", &weights, true);
    let mut space = Space::new(&hub.endpoint);
    space.settings.retries.attempts = 1;
    hub.fail_next([Fault::Cut(100_000)]);
    space.run_hf(&["model.gguf"]).unwrap_err();
    for entry in fs::read_dir(space.scratch(1).join("parts")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().unwrap() == "part" {
            fs::write(path, noise(100_000, 99)).unwrap();
        }
    }
    space.run_hf(&["model.gguf"]).unwrap();
    assert_eq!(space.read("model.gguf"), weights);
}

#[test]
fn changed_file_is_not_glued_to_its_old_beginning() {
    let hub = Hub::start(None);
    hub.put("rows.json", &noise(200_000, 6), false);
    let mut space = Space::new(&hub.endpoint);
    space.settings.retries.attempts = 1;
    let source =
        json!({"source": {"url": format!("{}/org/tiny/resolve/main/rows.json", hub.endpoint)}});
    hub.fail_next([Fault::Cut(100_000)]);
    space.run(source.clone(), None).unwrap_err();
    let changed = noise(200_000, 7);
    hub.put("rows.json", &changed, false);
    space.run(source, None).unwrap();
    assert_eq!(space.read("rows.json"), changed);
}

#[test]
fn rate_limit_is_waited_for_as_long_as_the_server_asks() {
    let hub = Hub::start(None);
    hub.put("config.json", b"{}", false);
    hub.fail_next_api([Fault::Status(429, Some(17))]);
    hub.fail_next([Fault::Status(429, Some(23)), Fault::Status(503, None)]);
    let mut space = Space::new(&hub.endpoint);
    space.run_hf(&["config.json"]).unwrap();
    assert_eq!(waits(), [17, 23, 2].map(Duration::from_secs));
}

#[test]
fn renamed_repository_is_followed() {
    let hub = Hub::start(None);
    let weights = noise(1000, 8);
    hub.put("model.gguf", &weights, true);
    let mut space = Space::new(&hub.endpoint);
    let sha256 = hash_bytes(&weights);
    let source = json!({"hf": "org/old", "include": ["model.gguf"]});
    space.run(json!({"source": source, "sha256": sha256}), None).unwrap();
    assert_eq!(space.read("model.gguf"), weights);
}

#[test]
fn locked_run_asks_for_nothing_but_bytes_of_the_locked_commit() {
    let hub = Hub::start(None);
    hub.put("config.json", b"{}", false);
    hub.put("model.gguf", &noise(1000, 9), true);
    let mut space = Space::new(&hub.endpoint);
    let lock = space.run_hf(&["*.json", "*.gguf"]).unwrap().lock.unwrap();
    hub.take_seen();
    // Another space: no scratch of the first run.
    let mut space = Space::new(&hub.endpoint);
    let outcome = space.run(hf(&["*.json", "*.gguf"]), Some(lock.clone())).unwrap();
    assert_eq!(outcome.lock.unwrap(), lock);
    let seen = hub.take_seen();
    assert!(seen.iter().all(|seen| seen.method == "GET" && !seen.path.starts_with("/api/")));
    let hub_side: Vec<_> = seen.iter().filter(|seen| seen.host == "hub").collect();
    assert_eq!(hub_side.len(), 2);
    assert!(hub_side.iter().all(|seen| seen.path.contains(COMMIT)));
}
