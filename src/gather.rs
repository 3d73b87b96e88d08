//! Gathered inputs: one output of every point of a stage, handed over as a folder.
//!
//! The folder has one entry a point, `<point>/<file name>`, and `index.json`, which lists the
//! points in the order of the matrix: `[{"point", "path", "params"}]`.

use std::path::Path;

use serde_json::{Value, json};

use crate::cache::{Cache, CacheError, LaidOut, TreeEntry};
use crate::digest::Digest;
use crate::fingerprint::canonical;
use crate::pipeline::{Gathered, point_label};
use crate::plan::Records;
use crate::record::{OutputRecord, Record};

/// Name of the listing inside the folder.
pub const INDEX: &str = "index.json";

/// One point and what it made.
struct Entry<'a> {
    point: &'a str,
    params: &'a crate::pipeline::PointParams,
    output: &'a OutputRecord,
}

impl Entry<'_> {
    fn path(&self) -> String {
        format!("{}/{}", self.point, self.output.file_name)
    }

    fn listed(&self) -> Value {
        json!({"point": self.point, "path": self.path(), "params": self.params})
    }
}

/// Digest of a gathered input: of names, params and contents. The first point whose output is
/// missing, if any, is the error.
pub fn digest(gathered: &Gathered, records: &Records) -> Result<Digest, String> {
    if let Some(digest) = records.gathered(gathered) {
        return Ok(digest);
    }
    let listed = entries(gathered, records)?;
    let listed = listed.iter().map(|entry| {
        let mut listed = entry.listed();
        listed["digest"] = json!(entry.output.identity());
        listed["form"] = json!(entry.output.form);
        listed
    });
    let digest = Digest::of(canonical(&listed.collect()).as_bytes());
    records.remember(gathered, digest);
    Ok(digest)
}

/// Makes the folder at `to`; what it holds, by the stages that made it.
///
/// # Errors
/// [`CacheError`] where an object is missing or the disk refuses.
pub(crate) fn materialise<'a>(
    gathered: &'a Gathered,
    records: &Records,
    cache: &Cache,
    to: &Path,
) -> Result<Vec<(&'a str, Vec<LaidOut>)>, CacheError> {
    let entries = entries(gathered, records).map_err(|missing| {
        CacheError::Damaged(format!("stage `{missing}` has no output `{}`", gathered.output))
    })?;
    let mut laid_out = Vec::with_capacity(entries.len());
    for (entry, member) in entries.iter().zip(gathered.members.iter()) {
        let files = cache.materialise(entry.output, &to.join(entry.path()))?;
        laid_out.push((member.stage.as_str(), files));
    }
    let index: Value = entries.iter().map(Entry::listed).collect();
    let text = serde_json::to_vec_pretty(&index).unwrap_or_default();
    cache.write_working_file(&to.join(INDEX), &text)?;
    Ok(laid_out)
}

/// The files of the folder, as far as explanations need them: a point's folder whose listing is
/// gone counts as one file.
pub fn files(gathered: &Gathered, made: Vec<(&str, &Record)>, cache: &Cache) -> Vec<TreeEntry> {
    let mut files = Vec::new();
    for (stage, record) in made {
        let Some(output) = record.outputs.get(&gathered.output) else { continue };
        let path = format!("{}/{}", point_label(stage), output.file_name);
        // A file's digest names no listing, and reading it as one could take long.
        let tree = output.form == contract::OutputForm::Tree;
        if let Some(below) = if tree { cache.listed(output.digest) } else { None } {
            files.extend(below.into_iter().map(|entry| {
                let path = format!("{path}/{}", entry.path);
                TreeEntry { path, ..entry }
            }));
        } else {
            let (bytes, digest) = (output.bytes, output.digest);
            files.push(TreeEntry { path, exec: output.exec, bytes, digest });
        }
    }
    files
}

fn entries<'a>(gathered: &'a Gathered, records: &'a Records) -> Result<Vec<Entry<'a>>, String> {
    let entry = |member: &'a crate::pipeline::Member| {
        let made = records.get(&member.stage).and_then(|r| r.outputs.get(&gathered.output));
        let output = made.ok_or_else(|| member.stage.clone())?;
        Ok(Entry { point: point_label(&member.stage), params: &member.params, output })
    };
    gathered.members.iter().map(entry).collect()
}
