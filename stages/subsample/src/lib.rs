//! Stage kind `subsample`: shuffles a dataset as Hugging Face does and cuts it into splits.
//!
//! The order is drawn over the rows of the source before any is dropped, so that a split holds the
//! rows that `datasets` would select; malformed ones among them are then counted, listed, dropped.

mod bfcl;
mod chat;
mod glaive;
mod permutation;
mod read;

use std::collections::BTreeMap;

use contract::{
    InputSpec, Outcome, OutputSpec, ParamError, Reporter, Request, Signature, StageError,
    StageKind, parse_params,
};
use data::{Row, write_json, write_jsonl};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::permutation::permutation;
use crate::read::{Source, read};

/// Changes when the same params would select or normalise rows differently.
const VERSION: &str = "2";
/// Dropped rows beyond this many are counted, not listed.
const LISTED: usize = 1000;

/// The stage kind `subsample`.
pub struct Subsample;

/// Layout of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Format {
    /// A JSON array of `{system, chat}`.
    Glaive,
    /// Berkeley rows and their answers.
    Bfcl,
    /// OpenAI-style chats.
    ChatJsonl,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Params {
    pub(crate) format: Format,
    /// Files of the input folder, in order; empty takes its only file.
    #[serde(default)]
    pub(crate) files: Vec<String>,
    /// `bfcl`: file of answers by file of rows.
    #[serde(default)]
    pub(crate) answers: BTreeMap<String, String>,
    /// `bfcl`: the right reply where no function fits.
    #[serde(default = "no_call_answer")]
    pub(crate) no_call_answer: String,
    /// Of the shuffle, as in `Dataset.shuffle(seed)`.
    #[serde(default = "seed")]
    seed: u64,
    /// Rows to train on: `[start, end)` of the shuffled order.
    train: [usize; 2],
    /// Rows to evaluate on.
    test: [usize; 2],
    /// Rows to choose by.
    #[serde(default)]
    dev: Option<[usize; 2]>,
    /// Refuses a source with another number of rows.
    #[serde(default)]
    expected_rows: Option<usize>,
}

fn no_call_answer() -> String {
    "None of the available functions can answer this request.".to_owned()
}

fn seed() -> u64 {
    42
}

impl Params {
    fn splits(&self) -> impl Iterator<Item = (&'static str, [usize; 2])> {
        let dev = self.dev.map(|dev| ("dev", dev));
        [("train", self.train), ("test", self.test)].into_iter().chain(dev)
    }

    fn check(&self) -> Result<(), ParamError> {
        let splits: Vec<_> = self.splits().collect();
        for (i, (name, [start, end])) in splits.iter().enumerate() {
            if start >= end {
                return Err(ParamError::at(name, format!("the range {start}..{end} is empty")));
            }
            for (other, [from, to]) in &splits[..i] {
                if start < to && from < end {
                    let message = format!("{start}..{end} overlaps {other} ({from}..{to})");
                    return Err(ParamError::at(name, message));
                }
            }
        }
        if self.format != Format::Bfcl && !self.answers.is_empty() {
            return Err(ParamError::at("answers", "only the format `bfcl` has answer files"));
        }
        if let Some(file) = self.answers.keys().find(|f| !self.files.contains(f)) {
            let message = format!("`{file}` is not among `files`");
            return Err(ParamError::at("answers", message));
        }
        Ok(())
    }
}

impl StageKind for Subsample {
    fn name(&self) -> &'static str {
        "subsample"
    }

    fn summary(&self) -> &'static str {
        "shuffles a dataset as Hugging Face does and cuts it into train, test and dev"
    }

    fn version(&self) -> String {
        VERSION.to_owned()
    }

    fn resolve(&self, params: &Value) -> Result<Signature, ParamError> {
        let params: Params = parse_params(params)?;
        params.check()?;
        let mut outputs =
            vec![OutputSpec::file("train", "train.jsonl"), OutputSpec::file("test", "test.jsonl")];
        if params.dev.is_some() {
            outputs.push(OutputSpec::file("dev", "dev.jsonl"));
        }
        outputs.push(OutputSpec::file("stats", "split-stats.json"));
        Ok(Signature {
            inputs: vec![InputSpec::required("data", "folder or file with the rows")],
            outputs,
            ..Signature::of(&params)?
        })
    }

    fn params_schema(&self) -> Value {
        contract::schema_of::<Params>()
    }

    fn run(&self, request: &Request, reporter: &mut Reporter) -> Result<Outcome, StageError> {
        let params: Params = request.params()?;
        let source = read(request.input("data")?, &params)?;
        let count = source.rows();
        if count == 0 {
            return Err(StageError::input("the dataset has no rows")
                .help("its files are empty: is `files` of the download what was meant?"));
        }
        if let Some(expected) = params.expected_rows.filter(|e| *e != count) {
            return Err(StageError::input(format!("{count} rows where {expected} are expected"))
                .help("another version of the dataset shuffles differently; fix `expected_rows` if it is meant"));
        }
        for (name, [start, end]) in params.splits() {
            if end > count {
                return Err(StageError::input(format!(
                    "split `{name}` takes rows {start}..{end} and there are {count}"
                )));
            }
        }
        let order = permutation(params.seed, count);
        let (mut splits, mut dropped) = (BTreeMap::new(), Vec::new());
        for (name, [start, end]) in params.splits() {
            let rows = split(&source, &order[start..end], name, &mut dropped);
            reporter.log(format!("{name}: {} of {} rows", rows.len(), end - start));
            if rows.is_empty() {
                return Err(StageError::input(format!("every row of split `{name}` is malformed"))
                    .help(dropped[0]["reason"].as_str().unwrap_or_default().to_owned()));
            }
            write_jsonl(request.output(name)?, &rows)?;
            splits.insert(name, json!({"rows": rows.len(), "selected": end - start}));
        }
        let stats = json!({
            "source_rows": count, "seed": params.seed, "splits": splits,
            "dropped": dropped.len(), "dropped_rows": &dropped[..dropped.len().min(LISTED)],
        });
        write_json(request.output("stats")?, &stats)?;
        let mut outcome = Outcome::default();
        if !dropped.is_empty() {
            let first = dropped[0]["reason"].as_str().unwrap_or_default();
            outcome.warnings.push(format!(
                "{} malformed rows were dropped (listed in split-stats.json); the first: {first}",
                dropped.len()
            ));
        }
        Ok(outcome)
    }
}

fn split(source: &Source, order: &[usize], name: &str, dropped: &mut Vec<Value>) -> Vec<Row> {
    let mut rows = Vec::with_capacity(order.len());
    for index in order {
        match source.row(*index) {
            Ok(row) => rows.push(row),
            Err(reason) => {
                dropped.push(json!({"row": index, "split": name, "reason": reason}));
            }
        }
    }
    rows
}

#[cfg(test)]
mod tests;
