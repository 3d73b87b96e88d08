//! Bad input to the kinds of machine learning, through the binary: what is said, which exit code,
//! that nothing is left in the cache, and that the run after the mend succeeds.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::Value;

use crate::space::{Space, ran};
use crate::tiny_model::{CONTEXT, TEMPLATE, gguf};

const PIPELINE: &str = r"
stages:
  dataset:
    kind: download
    params: {source: {path: rows.jsonl}}
  subsample:
    kind: subsample
    inputs: {data: dataset.files}
    params: {format: chat-jsonl, train: [0, 4], test: [4, 6]}
  template:
    kind: template
    inputs: {model: {path: model.gguf}, train: subsample.train, test: subsample.test}
  tokenize-pack:
    kind: tokenize-pack
    inputs: {model: {path: words.gguf}, train: template.train}
    params: {max_length: 128, pack: none, truncate: error}
";

/// The stages in order, of which each needs the one before.
const STAGES: [&str; 4] = ["dataset", "subsample", "template", "tokenize-pack"];

fn rows() -> String {
    let row = |i| {
        format!(
            "{{\"messages\": [{{\"role\": \"user\", \"content\": \"question {i}\"}}, \
             {{\"role\": \"assistant\", \"content\": \"answer {i}\"}}]}}\n"
        )
    };
    (0..6).map(row).collect()
}

fn project() -> Space {
    let space = Space::new(PIPELINE);
    space.write("rows.jsonl", &rows());
    for model in ["model.gguf", "words.gguf"] {
        fs::write(space.path(model), gguf(TEMPLATE)).unwrap();
    }
    space
}

/// One thing that is wrong with a project.
struct Case<'a> {
    /// The stage that fails.
    stage: &'a str,
    /// Caller's variables while it is wrong.
    environment: &'a [(&'a str, &'a Path)],
    /// What the report says: what is wrong, and what to do.
    says: &'a [&'a str],
}

impl Case<'_> {
    /// Runs the project as it is, which fails, mends it, and runs it again.
    fn check(&self, space: &Space, mend: impl FnOnce()) {
        let mut command = space.command(&["run"]);
        let environment = self.environment.iter().copied();
        let run = ran(&command.envs(environment).output().unwrap()).code(4);
        let failed = format!("{}: failed: ", self.stage);
        assert_eq!(run.err.matches(": failed: ").count(), 1, "{}", run.err);
        for say in self.says.iter().chain([&failed.as_str()]) {
            assert!(run.err.contains(say), "`{say}`:\n{}", run.err);
        }
        self.left_nothing(space);
        mend();
        space.pipe(&["run"]).code(0);
        space.pipe(&["plan", "--check"]).code(0);
        sound(space);
    }

    /// Stages before the one that failed have records; it and those after it have left nothing.
    fn left_nothing(&self, space: &Space) {
        let log = space.pipe(&["logs", self.stage]).code(0).out;
        assert!(!log.contains("panicked"), "{log}");
        let at = STAGES.iter().position(|stage| *stage == self.stage).unwrap();
        let plan = space.pipe(&["plan", "--json"]).code(0).out;
        let plan: Value = serde_json::from_str(&plan).unwrap();
        let mut known = 0;
        for (i, stage) in plan["stages"].as_array().unwrap().iter().enumerate() {
            assert_eq!(stage["decision"] == "reuse", i < at, "{stage}");
            let kind = stage["kind"].as_str().unwrap();
            known += names(&space.cache().join("records-v1").join(kind)).len();
        }
        assert_eq!(known, at);
        assert!(!space.path("pipeline.lock").exists());
        for folder in ["tmp", "leases", "quarantine"] {
            assert_eq!(names(&space.cache().join(folder)), [""; 0], "{folder}");
        }
        sound(space);
    }
}

/// Names in a folder, which may be missing.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

fn sound(space: &Space) {
    let verified = space.pipe(&["cache", "verify"]).code(0).out;
    assert!(verified.contains("all sound"), "{verified}");
}

#[test]
fn broken_yaml_runs_and_writes_nothing() {
    let space = project();
    space.write("pipeline.yaml", &PIPELINE.replace("[0, 4]", "[0, 4"));
    let run = space.pipe(&["run"]).code(3);
    assert!(run.err.contains("pipeline.yaml:9:"), "{}", run.err);
    assert!(!space.cache().exists());
    space.write("pipeline.yaml", PIPELINE);
    let run = space.pipe(&["run"]).code(0).err;
    assert!(run.contains("4 run, 0 reused"), "{run}");
}

#[test]
fn truncated_gguf() {
    let whole = gguf(TEMPLATE);
    for (stage, file) in [("template", "model.gguf"), ("tokenize-pack", "words.gguf")] {
        let space = project();
        // Inside the magic number, the metadata and the tensor.
        for len in [0, 2, 200, whole.len() / 2, whole.len() - 1] {
            fs::write(space.path(file), &whole[..len]).unwrap();
            let case = Case {
                stage,
                environment: &[],
                says: &[
                    file,
                    "is not a valid GGUF file",
                    "download it again and compare its sha256",
                ],
            };
            case.check(&space, || fs::write(space.path(file), &whole).unwrap());
            fs::remove_dir_all(space.cache()).unwrap();
        }
    }
}

#[test]
fn wrong_sha256() {
    let space = project();
    let wrong = format!("source: {{path: rows.jsonl}}, sha256: {}", "ab".repeat(32));
    space.replace("source: {path: rows.jsonl}", &wrong);
    let says = [
        "sha256 is ",
        "but param `sha256` says abab",
        "the source has changed or the param is wrong; nothing was written",
    ];
    let case = Case { stage: "dataset", environment: &[], says: &says };
    case.check(&space, || space.write("pipeline.yaml", PIPELINE));
}

#[test]
fn missing_python_and_missing_pip() {
    let space = project();
    let bin = space.outside().join("bin");
    fs::create_dir(&bin).unwrap();
    let pypi = "source: {pypi: rows, version: 1.0.0, file: rows/rows.jsonl}";
    let mended = || space.write("pipeline.yaml", PIPELINE);
    for missing in ["python3", "pip"] {
        space.replace("source: {path: rows.jsonl}", pypi);
        let needs = format!("`rows==1.0.0` needs {missing}, which this machine lacks");
        let says = [needs.as_str(), "install Python 3 with pip", "from a `url` or a `path`"];
        let case = Case { stage: "dataset", environment: &[("PATH", &bin)], says: &says };
        case.check(&space, mended);
        fs::remove_dir_all(space.cache()).unwrap();
        // Next time there is a Python, without pip.
        let python = bin.join("python3");
        fs::write(&python, "#!/bin/sh\necho 'python3: No module named pip' >&2\nexit 1\n").unwrap();
        fs::set_permissions(&python, fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[test]
fn no_network() {
    // Nobody listens there, until the network comes back.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let space = project();
    let url = format!("source: {{url: 'http://{address}/rows.jsonl'}}");
    space.replace("source: {path: rows.jsonl}", &url);
    let url = format!("gave up on `http://{address}/rows.jsonl` after ");
    let says = [url.as_str(), "check the network and the proxy, then run again"];
    let case = Case { stage: "dataset", environment: &[], says: &says };
    case.check(&space, || {
        let listener = TcpListener::bind(address).unwrap();
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut request = [0; 1 << 12];
                let _ = stream.read(&mut request);
                let rows = rows();
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", rows.len());
                let _ = stream.write_all(&[head.as_bytes(), rows.as_bytes()].concat());
            }
        });
    });
}

#[test]
fn offline_by_choice() {
    let space = project();
    space.replace("source: {path: rows.jsonl}", "source: {hf: org/rows, include: ['*.jsonl']}");
    let says = ["offline, and model `org/rows` at `main`", "unset HF_HUB_OFFLINE"];
    let offline: [(&str, &Path); 2] =
        [("HF_HUB_OFFLINE", Path::new("1")), ("HF_HOME", space.outside())];
    let case = Case { stage: "dataset", environment: &offline, says: &says };
    case.check(&space, || space.write("pipeline.yaml", PIPELINE));
}

#[test]
fn empty_dataset() {
    let space = project();
    for (text, says) in [
        ("", ["the dataset has no rows", "its files are empty"]),
        (
            "{\"messages\": []}\n{\"messages\": []}\n{}\n{}\n[]\n1\n",
            ["every row of split `train` is malformed", "rows.jsonl:"],
        ),
    ] {
        space.write("rows.jsonl", text);
        let case = Case { stage: "subsample", environment: &[], says: &says };
        case.check(&space, || space.write("rows.jsonl", &rows()));
        fs::remove_dir_all(space.cache()).unwrap();
    }
}

#[test]
fn sequence_longer_than_the_limit() {
    let space = project();
    let too_long =
        ["row `", "tokens, more than `max_length` (16)", "raise `max_length`, or set `truncate`"];
    let context = CONTEXT.to_string();
    let beyond = [
        "`max_length` is 1000 and the model reads at most ",
        context.as_str(),
        "lower `max_length`",
    ];
    for (limit, says) in [("16", too_long), ("1000", beyond)] {
        space.replace("max_length: 128", &format!("max_length: {limit}"));
        let case = Case { stage: "tokenize-pack", environment: &[], says: &says };
        case.check(&space, || space.write("pipeline.yaml", PIPELINE));
        fs::remove_dir_all(space.cache()).unwrap();
    }
    // Unless it is to be an error, it is cut, and listed.
    space.replace("max_length: 128, pack: none, truncate: error", "max_length: 16, pack: none");
    let run = space.pipe(&["run"]).code(0).err;
    let warning = "train: 4 of 4 rows are longer than 16 tokens and were cut";
    assert!(run.contains(warning), "{run}");
    space.pipe(&["outputs", "tokenize-pack", "--to", "kept"]).code(0);
    let stats = fs::read_to_string(space.path("kept/token-stats.json")).unwrap();
    let stats: Value = serde_json::from_str(&stats).unwrap();
    assert_eq!(stats["train"]["truncated"]["ids"].as_array().unwrap().len(), 4, "{stats}");
}

#[test]
fn template_error() {
    let space = project();
    let raising = format!("{TEMPLATE}{{{{ raise_exception('only cats') }}}}");
    let picky = TEMPLATE.replace(
        "<{{ m.role }}>",
        "{% if 'question' in m.content %}{{ raise_exception('only cats') }}{% endif %}<{{ m.role }}>",
    );
    let endless = format!(
        "{TEMPLATE}{{% for i in range(99999) %}}{{% for j in range(99999) %}}{{% endfor %}}{{% endfor %}}"
    );
    let origin = "chat template tokenizer.chat_template:";
    let own = "`chat_template.jinja` beside the files of the model";
    for (template, says) in [
        (raising, [origin, "only cats", own]),
        (picky, ["row `", "only cats", "cannot take such rows, try `tool_format: hermes`"]),
        ("{% for m in %}".to_owned(), [origin, "unexpected", own]),
        (endless, [origin, "more work than a conversation can need", own]),
        (
            "nothing of the conversation".to_owned(),
            ["tokenizer.chat_template", "marks no end of the assistant's turn", own],
        ),
    ] {
        fs::write(space.path("model.gguf"), gguf(&template)).unwrap();
        let case = Case { stage: "template", environment: &[], says: &says };
        case.check(&space, || fs::write(space.path("model.gguf"), gguf(TEMPLATE)).unwrap());
        fs::remove_dir_all(space.cache()).unwrap();
    }
}
