//! Params, identity and lock keys.

use contract::{ParamError, Signature, StageKind};
use serde_json::{Value, json};

use crate::Download;

const HASH: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

fn resolve(params: Value) -> Signature {
    Download.resolve(&params).unwrap()
}

fn refuse(params: Value) -> (String, ParamError) {
    let error = Download.resolve(&params).unwrap_err();
    (error.path.join("."), error)
}

#[test]
fn defaults_are_filled_in_and_stable() {
    let signature = resolve(json!({"source": {"hf": "org/tiny", "include": ["b", "a"]}}));
    let filled = json!({"source": {
        "hf": "org/tiny", "repo_type": "model", "revision": "main",
        "include": ["a", "b"], "exclude": [],
    }});
    assert_eq!(signature.params, filled);
    assert_eq!(resolve(signature.params.clone()), signature);
    let key = "hf:model/org/tiny@main?include=a,b&exclude=";
    assert_eq!(signature.lock_key.as_deref(), Some(key));
}

#[test]
fn pinned_mirrors_are_interchangeable() {
    let sources = [
        json!({"hf": "org/tiny", "include": ["model.gguf"]}),
        json!({"url": "https://mirror.example/a/model.gguf"}),
        json!({"url": "https://other.example/x", "file": "model.gguf"}),
        json!({"pypi": "tiny", "version": "1.0", "file": "tiny/model.gguf"}),
    ];
    for source in sources {
        let signature = resolve(json!({"source": source, "sha256": HASH}));
        assert_eq!(signature.identity, json!({"files": {"model.gguf": HASH}}), "{source}");
        assert_eq!(signature.lock_key, None, "{source}");
    }
}

#[test]
fn files_that_are_not_all_pinned_are_locked() {
    let source = json!({"hf": "org/tiny", "include": ["*.json", "model.gguf"]});
    let signature = resolve(json!({"source": source, "sha256": {"model.gguf": HASH}}));
    assert!(signature.lock_key.is_some());
    assert_eq!(signature.identity["sha256"]["model.gguf"], HASH);
    assert_eq!(signature.identity["source"]["hf"], "org/tiny");
}

#[test]
fn path_is_a_local_input_without_its_folder_in_the_identity() {
    let signature = resolve(json!({"source": {"path": "data/rows.jsonl"}}));
    assert_eq!(signature.local_inputs["path"], "data/rows.jsonl");
    assert_eq!(signature.lock_key, None);
    assert_eq!(signature.identity, json!({"name": "rows.jsonl", "sha256": {}}));
}

#[test]
fn wheel_files_are_renamed_and_may_not_collide() {
    let files = json!({"p/answer/a.json": "gold.json", "p/b.json": null});
    let source = json!({"pypi": "tiny", "version": "1.0", "files": files});
    let signature = resolve(json!({ "source": source }));
    let expected = json!({"p/answer/a.json": "gold.json", "p/b.json": "b.json"});
    assert_eq!(signature.params["source"]["files"], expected);
    let files = json!({"p/x/a.json": null, "p/y/a.json": null});
    let (path, error) = refuse(json!({"source": {"pypi": "t", "version": "1", "files": files}}));
    assert_eq!(path, "source.files");
    assert!(error.message.contains("would both be named `a.json`"), "{error}");
}

#[test]
fn wrong_params_are_located() {
    let cases = [
        (json!({}), "", "missing field `source`"),
        (json!({"source": {}}), "source", "needs one of `hf`, `pypi`, `url` or `path`"),
        (json!({"source": {"hf": "a/b", "path": "c"}}), "source.path", "not several"),
        (json!({"source": {"hff": "a/b"}}), "source.hff", "unknown field"),
        (json!({"source": {"hf": "a/b/c"}}), "source.hf", "not a repository name"),
        (json!({"source": {"hf": "../b"}}), "source.hf", "not a repository name"),
        (json!({"source": {"hf": "a", "revision": "../x"}}), "source.revision", "not a branch"),
        (json!({"source": {"hf": "a", "include": ["[a"]}}), "source.include", "not a pattern"),
        (json!({"source": {"hf": "a", "file": "x"}}), "source.file", "does not go with"),
        (json!({"source": {"pypi": "a", "file": "x"}}), "source", "`version`"),
        (json!({"source": {"pypi": "-r", "version": "1", "file": "x"}}), "source.pypi", "package"),
        (json!({"source": {"pypi": "a", "version": ">1", "file": "x"}}), "source.version", "exact"),
        (json!({"source": {"pypi": "a", "version": "1"}}), "source", "`file` or `files`"),
        (json!({"source": {"url": "ftp://a/b"}}), "source.url", "use https"),
        (json!({"source": {"url": "https://u:p@a/b"}}), "source.url", "password"),
        (json!({"source": {"url": "https://a/b?token=x"}}), "source.url", "credential"),
        (json!({"source": {"url": "https://a/"}}), "source.file", "give one with `file`"),
        (json!({"source": {"url": "https://a/b"}, "sha256": "ab"}), "sha256", "64 hexadecimal"),
        (json!({"source": {"url": "https://a/b"}, "sha256": {"c": HASH}}), "sha256.c", "no file"),
        (json!({"source": {"hf": "a"}, "sha256": HASH}), "sha256", "one hash fits one file"),
    ];
    for (params, at, says) in cases {
        let (path, error) = refuse(params.clone());
        assert_eq!(path, at, "{params}: {error}");
        assert!(error.message.contains(says), "{params}: {error}");
    }
}
