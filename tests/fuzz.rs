//! Bytes that nobody would write, against what reads files of others: pipelines, records, lock files.
//!
//! Seeds are real files. A mutation that is answered in a way not seen before becomes a seed itself. `PIPE_FUZZ_SECONDS`
//! says how long each target is tried; without it a fixed number of inputs is, the same every time.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pipe::display;
use pipe::graph::StageGraph;
use pipe::lockfile::Lockfile;
use pipe::pipeline::{Kinds, Overrides, Pipeline};
use pipe::record::Record;
use pipe::yaml;

/// Inputs of a target where no time is given.
const INPUTS: usize = 6_000;
/// Longer inputs only cost time.
const MAX_BYTES: usize = 6_000;
/// What stands for something in one of the formats.
const TOKENS: [&str; 44] = [
    "&a ",
    "*a",
    "<<: *a",
    "<<: [*a, *a]",
    "${",
    "${a}",
    "$${",
    "}",
    "{",
    "[",
    "[[[[[[[[",
    "{a: {a: {a: ",
    "? ",
    ": ",
    "- ",
    "---\n",
    "...\n",
    "!!binary ",
    "!x ",
    "%YAML 1.1\n",
    "|\n",
    ">-\n",
    "'",
    "\"",
    "\\u0000",
    "\\ud800",
    "#",
    "\t",
    "\r\n",
    "\u{feff}",
    "\u{2028}",
    "\u{85}",
    "é",
    "😀",
    "@",
    ".",
    ",",
    "null",
    "1e999",
    "-0",
    "18446744073709551616",
    "0x",
    "matrix: {single: {a: [1, 2]}}",
    "a@b=c",
];

/// A small generator of numbers; the same seed gives the same inputs.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn range(&mut self, length: usize) -> std::ops::Range<usize> {
        let start = self.below(length + 1);
        let most = if self.below(4) == 0 { length } else { 16 };
        start..(start + self.below(most)).min(length)
    }

    fn mutate(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = seeds[self.below(seeds.len())].clone();
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len() + 1);
            match self.below(8) {
                0 if at < bytes.len() => bytes[at] ^= 1 << self.below(8),
                1 if at < bytes.len() => bytes[at] = self.next() as u8,
                2 => bytes.insert(at, self.next() as u8),
                3 => drop(bytes.drain(self.range(bytes.len()))),
                4 => {
                    let piece = bytes[self.range(bytes.len())].to_vec();
                    bytes.splice(at..at, piece);
                }
                5 => {
                    let other = &seeds[self.below(seeds.len())];
                    let piece = other[self.range(other.len())].to_vec();
                    bytes.splice(at..at, piece);
                }
                6 => bytes.truncate(at),
                _ => drop(bytes.splice(at..at, TOKENS[self.below(TOKENS.len())].bytes())),
            }
        }
        bytes.truncate(MAX_BYTES);
        bytes
    }
}

/// Tries a target; `answer` is what it said.
fn fuzz(mut seeds: Vec<Vec<u8>>, answer: impl Fn(&[u8]) -> String) -> usize {
    let limit = std::env::var("PIPE_FUZZ_SECONDS")
        .ok()
        .map(|s| Duration::from_secs_f64(s.parse().unwrap()));
    let (started, mut dice, mut seen) =
        (Instant::now(), Dice(0x9e37_79b9_7f4a_7c15), BTreeSet::new());
    seen.extend(seeds.iter().map(|seed| kind_of(&answer(seed))));
    let mut tried = 0;
    while limit.map_or(tried < INPUTS, |limit| started.elapsed() < limit) {
        let input = dice.mutate(&seeds);
        tried += 1;
        let answered = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| answer(&input)));
        let Ok(answered) = answered else {
            panic!("panicked for the {} bytes {:?}", input.len(), String::from_utf8_lossy(&input));
        };
        if seen.insert(kind_of(&answered)) {
            seeds.push(input);
        }
    }
    println!("{tried} inputs, {} kinds of answers", seen.len());
    seen.len()
}

/// An answer without what differs from input to input.
fn kind_of(answer: &str) -> String {
    let mut kind = String::new();
    let mut quoted = false;
    for c in answer.chars().take(400) {
        quoted ^= c == '`';
        if !quoted && c.is_ascii_alphabetic() {
            kind.push(c);
        }
    }
    kind
}

fn below(folder: &str, end: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let files = fs::read_dir(folder).unwrap().flatten().map(|e| e.path());
    files.filter(|p| p.to_string_lossy().ends_with(end)).collect()
}

fn pipelines() -> Vec<Vec<u8>> {
    let mut files = below("tests/pipelines/valid", ".yaml");
    files.extend(below("tests/pipelines/invalid", ".yaml"));
    files.extend(below("pipelines", ".yaml"));
    files.push(Path::new(env!("CARGO_MANIFEST_DIR")).join("pipeline.yaml"));
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// Reads a pipeline as the commands do, as far as that needs no cache.
fn load(text: &str) -> String {
    if let Ok(node) = yaml::parse(text, 0) {
        // Places are bytes of the text, whatever is in it.
        assert!(node.place.end <= text.len());
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("pipelines");
    let path = Path::new("pipeline.yaml");
    let kinds = Kinds(&[&stage_command::Command, &stage_select::Select]);
    match Pipeline::parse(path, folder, text, Overrides::default(), kinds) {
        Err(error) => {
            // Reports are drawn with the source beneath; the messages alone tell kinds apart.
            error.problems().iter().for_each(|problem| drop(display::render(problem, false, 80)));
            error.to_string()
        }
        Ok(pipeline) => {
            let graph = StageGraph::new(&pipeline);
            let order: Vec<&str> = graph.order().collect();
            assert_eq!(order.len(), pipeline.stages.len());
            let selected = pipeline.select(&[]).map(|names| graph.with_upstream(&names));
            format!("sound {:?}", selected.map(|s| s.len() > 1).map_err(|e| e.to_string()))
        }
    }
}

#[test]
fn pipelines_are_read_or_refused() {
    let kinds = fuzz(pipelines(), |bytes| match std::str::from_utf8(bytes) {
        Ok(text) => load(text),
        Err(_) => load(&String::from_utf8_lossy(bytes)),
    });
    assert!(kinds > 60, "{kinds}");
}

/// A real record, as `pipe run` writes it.
fn records() -> (tempfile::TempDir, Vec<Vec<u8>>) {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(below("pipelines", "words.yaml").remove(0), dir.path().join("pipeline.yaml")).unwrap();
    fs::create_dir(dir.path().join("words")).unwrap();
    fs::write(dir.path().join("words/a.txt"), "a few words a few").unwrap();
    let ran = std::process::Command::new(env!("CARGO_BIN_EXE_pipe"))
        .args(["run", "--cache"])
        .arg(dir.path().join("cache"))
        .current_dir(dir.path())
        .env("HOME", dir.path())
        .output()
        .unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    let folder = dir.path().join("cache/records-v1/command");
    let records = fs::read_dir(folder).unwrap().flatten().map(|e| fs::read(e.path()).unwrap());
    let records = records.collect();
    (dir, records)
}

#[test]
fn records_are_read_or_refused() {
    let (_dir, seeds) = records();
    let kinds = fuzz(seeds, |bytes| match Record::from_text(bytes) {
        Ok(record) => {
            assert_eq!(record.identity.fingerprint(), record.fingerprint);
            "sound".to_owned()
        }
        Err(what) => what,
    });
    assert!(kinds > 10, "{kinds}");
}

#[test]
fn no_flipped_bit_and_no_cut_of_a_record_goes_unnoticed() {
    let (_dir, seeds) = records();
    let text = &seeds[0];
    let whole = Record::from_text(text).unwrap();
    for bit in 0..text.len() * 8 {
        let mut flipped = text.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        // A flip in the checksum's own line leaves the record what it was.
        assert!(Record::from_text(&flipped).map_or(true, |record| record == whole), "bit {bit}");
    }
    for end in 0..text.len() {
        assert!(Record::from_text(&text[..end]).map_or(true, |record| record == whole), "{end}");
    }
}

#[test]
fn lock_files_are_read_or_refused() {
    let lock = r#"{"version": 1, "sources": {"hf:a/b@main": {"revision": "0123", "files": [{"name": "x", "sha256": "00", "bytes": 12}]}, "url": {}}}"#;
    let kinds = fuzz(vec![lock.as_bytes().to_vec()], |bytes| {
        match Lockfile::parse(PathBuf::from("p.lock"), bytes) {
            Ok(_) => "sound".to_owned(),
            Err(error) => error.to_string(),
        }
    });
    assert!(kinds > 10, "{kinds}");
}
