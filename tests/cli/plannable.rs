//! Every pipeline that ships, or that `pipe init` writes, plans with the real kinds, an empty cache
//! and no network.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::space::{Space, ran};

/// Nobody listens there.
const NOBODY: &str = "http://127.0.0.1:9";

/// How many stages of each decision a plan has: run, maybe, reuse.
fn planned(space: &Space, args: &[&str]) -> [usize; 3] {
    let mut command = space.command(&[&["plan", "--json"][..], args].concat());
    for name in
        ["http_proxy", "https_proxy", "HTTPS_PROXY", "ALL_PROXY", "HF_ENDPOINT", "PIP_INDEX_URL"]
    {
        command.env(name, NOBODY);
    }
    let plan = ran(&command.output().unwrap()).code(0).out;
    let plan: Value = serde_json::from_str(&plan).unwrap();
    let stages = plan["stages"].as_array().unwrap();
    ["run", "maybe", "reuse"].map(|d| stages.iter().filter(|s| s["decision"] == d).count())
}

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

#[test]
fn shipped_pipelines() {
    let space = Space::new("");
    let cache = space.cache();
    let cases: [(&str, &[&str], [usize; 3]); 7] = [
        ("pipeline.yaml", &[], [2, 7, 0]),
        // Two lengths, six trainings, each evaluated; the choice, its evaluation, the report.
        ("pipeline.yaml", &["tuning"], [2, 20, 0]),
        ("pipelines/gemma-2-2b.yaml", &[], [2, 7, 0]),
        ("pipelines/gemma-2-2b.yaml", &["tuning"], [2, 20, 0]),
        ("pipelines/quickstart.yaml", &[], [2, 7, 0]),
        ("pipelines/quickstart-export.yaml", &[], [2, 14, 0]),
        ("pipelines/words.yaml", &[], [1, 3, 0]),
    ];
    for (file, names, expected) in cases {
        let path = repository(file);
        let args = ["--cache", cache.to_str().unwrap(), "-f", path.to_str().unwrap()];
        assert_eq!(planned(&space, &[&args[..], names].concat()), expected, "{file} {names:?}");
    }
    assert!(!cache.exists());
    let shipped = std::fs::read_dir(repository("pipelines")).unwrap().flatten();
    let shipped = shipped.filter(|e| e.path().extension().is_some_and(|e| e == "yaml"));
    assert_eq!(shipped.count(), 4, "plan the new ones here too");
}

#[test]
fn what_init_writes() {
    let space = Space::new("");
    space.pipe(&["init", "plain"]).code(0);
    assert_eq!(planned(&space, &["-f", "plain/pipeline.yaml"]), [2, 7, 0]);
    let row = "{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}, {\"role\": \"assistant\", \"content\": \"a\"}]}\n";
    space.write("own/rows.jsonl", &row.repeat(20));
    space.pipe(&["init", "own", "--from", "own/rows.jsonl"]).code(0);
    assert_eq!(planned(&space, &["-f", "own/pipeline.yaml"]), [2, 7, 0]);
    // A path that is not below the new project.
    space.write("rows.jsonl", &row.repeat(20));
    space.pipe(&["init", "far", "--from", "rows.jsonl"]).code(0);
    assert_eq!(planned(&space, &["-f", "far/pipeline.yaml"]), [2, 7, 0]);
}
