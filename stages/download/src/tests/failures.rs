//! What goes wrong, what the user is told, and that nothing is half-written.

use contract::{Fault as Blame, StageError};
use serde_json::json;

use super::server::{Fault, Hub};
use super::space::{Space, hf, noise, waits};
use crate::digest::hash_bytes;

fn told(error: &StageError) -> String {
    format!("{}\nhelp: {}", error.message, error.help.as_deref().unwrap_or("-"))
}

#[test]
fn missing_token_is_named_with_the_page_to_ask() {
    let hub = Hub::start(Some("hf_right"));
    hub.put("config.json", b"{}", false);
    let mut space = Space::new(&hub.endpoint);
    let error = space.run_hf(&["config.json"]).unwrap_err();
    assert_eq!(error.fault, Blame::Environment);
    let told = told(&error);
    assert!(
        told.starts_with("model `org/tiny` at `main`: the server refused access (401)"),
        "{told}"
    );
    assert!(told.contains("set HF_TOKEN") && told.contains(&format!("{}/org/tiny", hub.endpoint)));
}

#[test]
fn wrong_token_is_refused_and_never_shown() {
    let hub = Hub::start(Some("hf_right"));
    let sha256 = hash_bytes(b"{}");
    hub.put("config.json", b"{}", false);
    let mut space = Space::new(&hub.endpoint).token("hf_wrong_secret");
    for sha256 in [None, Some(sha256)] {
        let mut params = hf(&["config.json"]);
        params["sha256"] = json!(sha256);
        let told = told(&space.run(params, None).unwrap_err());
        assert!(told.contains("(403)") && told.contains("accept the terms"), "{told}");
        assert!(!told.contains("hf_wrong_secret"), "{told}");
    }
    assert!(!space.told().contains("hf_wrong_secret"));
    assert_eq!(format!("{:?}", space.settings.token), "Some(Secret(…))");
}

#[test]
fn unknown_repository_revision_and_file_are_told_apart() {
    let hub = Hub::start(None);
    hub.put("config.json", b"{}", false);
    let mut space = Space::new(&hub.endpoint);
    let mut fail = |source| told(&space.run(json!({ "source": source }), None).unwrap_err());
    let repo = fail(json!({"hf": "org/none"}));
    assert!(repo.contains("model `org/none` at `main` does not exist"), "{repo}");
    assert!(repo.contains("check the name"), "{repo}");
    let revision = fail(json!({"hf": "org/tiny", "revision": "v1.o"}));
    assert!(revision.contains("at `v1.o` does not exist"), "{revision}");
    assert!(revision.contains("did you mean `v1.0`?"), "{revision}");
    let pattern = fail(json!({"hf": "org/tiny", "include": ["*.gguf"]}));
    assert!(pattern.contains("`*.gguf` matches no file of model `org/tiny`"), "{pattern}");
    assert!(pattern.contains("it holds `config.json`"), "{pattern}");
    let file = fail(json!({"hf": "org/tiny", "include": ["confg.json"]}));
    assert!(file.contains("did you mean `config.json`?"), "{file}");
    let everything = fail(json!({"hf": "org/tiny", "exclude": ["*"]}));
    assert!(everything.contains("leave no file"), "{everything}");
}

#[test]
fn pinned_file_that_is_gone_names_those_near() {
    let hub = Hub::start(None);
    hub.put("config.json", b"{}", false);
    let mut space = Space::new(&hub.endpoint);
    let mut params = hf(&["confg.json"]);
    params["sha256"] = json!(hash_bytes(b"{}"));
    let told = told(&space.run(params, None).unwrap_err());
    assert!(
        told.contains("file `confg.json` of model `org/tiny` at `main` does not exist"),
        "{told}"
    );
    assert!(told.contains("did you mean `config.json`?"), "{told}");
}

#[test]
fn endless_rate_limit_ends_with_advice() {
    let hub = Hub::start(None);
    hub.put("config.json", b"{}", false);
    hub.fail_next(std::iter::repeat_n(Fault::Status(429, None), 9));
    let mut space = Space::new(&hub.endpoint);
    let told = told(&space.run_hf(&["config.json"]).unwrap_err());
    assert!(told.contains("gave up on file `config.json`"), "{told}");
    assert!(told.contains("after 4 attempts") && told.contains("wait and run again"), "{told}");
    assert_eq!(waits().len(), 3);
}

#[test]
fn pause_of_an_hour_is_reported_not_slept() {
    let hub = Hub::start(None);
    hub.put("config.json", b"{}", false);
    hub.fail_next([Fault::Status(429, Some(3600))]);
    let mut space = Space::new(&hub.endpoint);
    let told = told(&space.run_hf(&["config.json"]).unwrap_err());
    assert!(told.contains("a pause of 3600 s"), "{told}");
    assert!(waits().is_empty());
}

#[test]
fn unreachable_hub_is_the_environments_fault() {
    let mut space = Space::new("http://127.0.0.1:9");
    let error = space.run_hf(&["*.json"]).unwrap_err();
    assert_eq!(error.fault, Blame::Environment);
    let told = told(&error);
    assert!(told.contains("no answer from http://127.0.0.1:9/"), "{told}");
    assert!(told.contains("check the network"), "{told}");
}

#[test]
fn wrong_hash_names_both_digests_and_the_file_and_writes_nothing() {
    let hub = Hub::start(None);
    let weights = noise(1000, 1);
    hub.put("model.gguf", &weights, true);
    let mut space = Space::new(&hub.endpoint);
    let wrong = hash_bytes(b"other");
    let mut params = hf(&["model.gguf"]);
    params["sha256"] = json!(wrong);
    let error = space.run(params, None).unwrap_err();
    assert_eq!(error.fault, Blame::Input);
    for part in ["`model.gguf`", wrong.as_str(), hash_bytes(&weights).as_str(), "param `sha256`"] {
        assert!(error.message.contains(part), "{part}: {error}");
    }
    assert!(!space.output().exists());
}

#[test]
fn changed_bytes_behind_a_lock_are_refused() {
    let hub = Hub::start(None);
    hub.put("config.json", b"{}", false);
    let lock = Space::new(&hub.endpoint).run_hf(&["*.json"]).unwrap().lock;
    hub.put("config.json", b"[]", false);
    let mut space = Space::new(&hub.endpoint);
    let told = told(&space.run(hf(&["*.json"]), lock).unwrap_err());
    for part in [hash_bytes(b"{}"), hash_bytes(b"[]"), "the lock file says".to_owned()] {
        assert!(told.contains(&part), "{part}: {told}");
    }
    assert!(told.contains("remove its entry"), "{told}");
    assert!(!space.output().exists());
}

#[test]
fn signed_address_of_a_redirect_reaches_no_message() {
    let hub = Hub::start(None);
    hub.put("model.gguf", &noise(1000, 2), true);
    hub.fail_next(std::iter::repeat_n(Fault::Cut(0), 9));
    let mut space = Space::new(&hub.endpoint);
    let told = told(&space.run_hf(&["model.gguf"]).unwrap_err());
    assert!(told.contains("gave up"), "{told}");
    assert!(!told.contains("signed-secret") && !space.told().contains("signed-secret"), "{told}");
}

#[test]
fn name_that_leaves_the_tree_is_refused() {
    let hub = Hub::start(None);
    hub.put("../evil.json", b"{}", false);
    let mut space = Space::new(&hub.endpoint);
    let error = space.run_hf(&["*.json"]).unwrap_err();
    assert!(error.message.contains("`../evil.json` is not a name inside"), "{error}");
}

#[test]
fn damaged_lock_entry_is_named() {
    let mut space = Space::new("http://127.0.0.1:9");
    let error = space.run(hf(&["*.json"]), Some(json!({"files": 3}))).unwrap_err();
    assert!(error.message.contains("the lock file's entry"), "{error}");
}

#[test]
fn transport_error_drops_the_address_it_carries() {
    let signed = "http://127.0.0.1:9/blob?X-Amz-Signature=signed-secret";
    let error = reqwest::blocking::get(signed).unwrap_err();
    assert!(error.to_string().contains("signed-secret"));
    let told = crate::error::transport(error);
    assert!(!told.contains("signed-secret") && told.contains("refused"), "{told}");
}
