//! The rows of a source, unparsed, each with the place it came from.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use contract::StageError;
use data::Row;
use serde_json::Value;

use crate::bfcl::Answer;
use crate::{Format, Params, bfcl, chat, glaive};

/// A source read into memory.
pub(crate) struct Source {
    format: Format,
    no_call_answer: String,
    rows: Vec<RawRow>,
    answers: BTreeMap<String, BTreeMap<String, Answer>>,
}

struct RawRow {
    /// File, and line where rows are lines.
    place: String,
    file: String,
    value: Result<Value, String>,
}

impl Source {
    pub(crate) fn rows(&self) -> usize {
        self.rows.len()
    }

    /// The row at `index` of the source, normalised.
    ///
    /// # Errors
    /// Place and fault of a malformed row.
    pub(crate) fn row(&self, index: usize) -> Result<Row, String> {
        let raw = &self.rows[index];
        let value = raw.value.clone().map_err(|e| format!("{}: {e}", raw.place))?;
        let at = index as u64;
        let row = match self.format {
            Format::Glaive => glaive::parse(value, at),
            Format::ChatJsonl => chat::parse(value, at),
            Format::Bfcl => {
                let answers = self.answers.get(&raw.file);
                let id = value.get("id").and_then(Value::as_str).unwrap_or_default();
                match answers.map(|a| a.get(id)) {
                    Some(None) => Err(format!("no answer for `{id}`")),
                    answer => bfcl::parse(value, at, answer.flatten(), &self.no_call_answer),
                }
            }
        };
        row.map_err(|e| format!("{}: {e}", raw.place))
    }
}

/// Reads the files of `input`, a folder or a file, that the params name.
///
/// # Errors
/// [`StageError`] for a file that is missing or, as a whole, malformed.
pub(crate) fn read(input: &Path, params: &Params) -> Result<Source, StageError> {
    let mut rows = Vec::new();
    let mut answers = BTreeMap::new();
    for (name, path) in files(input, params)? {
        let text = fs::read_to_string(&path).map_err(|e| StageError::io("read", &path, &e))?;
        if params.format == Format::Glaive {
            rows.extend(array(&name, &text)?);
        } else {
            rows.extend(lines(&name, &text));
        }
        if let Some(file) = params.answers.get(&name) {
            let by_id = data::read_jsonl::<Answer>(&input.join(file))?;
            let by_id = by_id.into_iter().map(|a| (a.id.clone(), a)).collect();
            answers.insert(name, by_id);
        }
    }
    let no_call_answer = params.no_call_answer.clone();
    Ok(Source { format: params.format, no_call_answer, rows, answers })
}

fn files(input: &Path, params: &Params) -> Result<Vec<(String, PathBuf)>, StageError> {
    if input.is_file() {
        let name = input.file_name().unwrap_or_default().to_string_lossy().into_owned();
        return Ok(vec![(name, input.to_owned())]);
    }
    if !params.files.is_empty() {
        return Ok(params.files.iter().map(|f| (f.clone(), input.join(f))).collect());
    }
    let entries = fs::read_dir(input).map_err(|e| StageError::io("list", input, &e))?;
    let mut found: Vec<PathBuf> =
        entries.flatten().map(|e| e.path()).filter(|p| p.is_file()).collect();
    found.sort();
    match found.as_slice() {
        [one] => {
            let name = one.file_name().unwrap_or_default().to_string_lossy().into_owned();
            Ok(vec![(name, one.clone())])
        }
        many => Err(StageError::input(format!("{} files where one is expected", many.len()))
            .help("name the files to read, in order, in `files`")),
    }
}

fn array(name: &str, text: &str) -> Result<Vec<RawRow>, StageError> {
    let values: Vec<Value> = serde_json::from_str(text).map_err(|e| {
        let place = format!("{name}:{}:{}", e.line(), e.column());
        StageError::input(format!("{place}: not a JSON array: {e}"))
    })?;
    let row = |(i, value)| RawRow {
        place: format!("{name}, row {i}"),
        file: name.to_owned(),
        value: Ok(value),
    };
    Ok(values.into_iter().enumerate().map(row).collect())
}

fn lines(name: &str, text: &str) -> Vec<RawRow> {
    let row = |(i, line): (usize, &str)| RawRow {
        place: format!("{name}:{}", i + 1),
        file: name.to_owned(),
        value: serde_json::from_str(line).map_err(|e| format!("column {}: {e}", e.column())),
    };
    text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(row).collect()
}
