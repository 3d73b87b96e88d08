//! Programs, GPU and terminal of this host.

use std::env;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Check;

/// Where the loader finds libraries on common distributions, and where NVIDIA's packages put them.
const LIBRARY_FOLDERS: [&str; 8] = [
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/lib",
    "/usr/local/cuda/lib64",
    "/opt/cuda/lib64",
];

pub(super) fn checks() -> Vec<Check> {
    let mut checks = gpu();
    checks.extend([python(), git(), terminal(), locale()]);
    checks
}

/// The first line that a program prints; none where it is missing or fails.
fn first_line(program: &str, args: &[&str]) -> Option<String> {
    lines(program, args)?.into_iter().next()
}

fn lines(program: &str, args: &[&str]) -> Option<Vec<String>> {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    output.status.success().then(|| text.lines().map(|l| l.trim().to_owned()).collect())
}

/// Devices, and the libraries that the stages open at run time.
fn gpu() -> Vec<Check> {
    let query = "--query-gpu=index,name,driver_version,memory.total,memory.free,compute_cap";
    let devices = lines("nvidia-smi", &[query, "--format=csv,noheader"]).unwrap_or_default();
    let driver = library("libcuda.so");
    if devices.is_empty() && driver.is_none() {
        return vec![Check::ok("GPU", "none found; stages run on the CPU")];
    }
    let mut checks: Vec<Check> = devices.iter().map(|line| device(line)).collect();
    if devices.is_empty() {
        let found = "the driver's library is there and `nvidia-smi` shows no device";
        checks.push(Check::warn("GPU", found, "install or load the driver that fits the kernel"));
    }
    for (name, file, package) in [
        ("NVRTC", "libnvrtc.so", "nvidia-cuda-nvrtc"),
        ("cuBLASLt", "libcublasLt.so", "nvidia-cublas"),
    ] {
        checks.push(match library(file) {
            Some(path) => Check::ok(name, path.display().to_string()),
            None => Check::warn(
                name,
                "not found, so that stages cannot use a GPU",
                format!(
                    "install CUDA 12.4 or newer, or PyPI's `{package}` and name its folder in \
                     LD_LIBRARY_PATH"
                ),
            ),
        });
    }
    checks
}

/// A line of `nvidia-smi`: index, name, driver, memory, free memory, compute capability.
fn device(line: &str) -> Check {
    let cells: Vec<&str> = line.split(',').map(str::trim).collect();
    let [index, name, driver, total, free, capability] = cells.as_slice() else {
        return Check::warn("GPU", line, "`nvidia-smi` says more");
    };
    let found = format!(
        "{index}: {name}, compute capability {capability}, {free} of {total} free, driver {driver}"
    );
    Check::ok("GPU", found)
}

/// Where a shared library is, whatever version its name ends with.
fn library(name: &str) -> Option<PathBuf> {
    let named = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let cuda = ["CUDA_PATH", "CUDA_HOME"].into_iter().filter_map(env::var_os);
    let folders = env::split_paths(&named)
        .chain(cuda.map(|dir| Path::new(&dir).join("lib64")))
        .chain(LIBRARY_FOLDERS.iter().map(PathBuf::from));
    folders.filter(|dir| !dir.as_os_str().is_empty()).find_map(|dir| {
        let entries = std::fs::read_dir(dir).ok()?.flatten();
        let fits = |path: &PathBuf| {
            let file = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            file.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        entries.map(|entry| entry.path()).filter(fits).min()
    })
}

fn python() -> Check {
    let help = "the source `pypi` of the kind `download` needs Python 3 with pip; others do not";
    let Some(version) = first_line("python3", &["--version"]) else {
        return Check::warn("Python", "no `python3`", help);
    };
    match first_line("python3", &["-m", "pip", "--version"]) {
        Some(pip) => {
            let pip = pip.split(" from ").next().unwrap_or_default().to_owned();
            Check::ok("Python", format!("{version}, {pip}"))
        }
        None => Check::warn("Python", format!("{version} without pip"), help),
    }
}

fn git() -> Check {
    let help = "comparisons with git revisions need it; nothing else does";
    let version = first_line("git", &["--version"]);
    version.map_or_else(|| Check::warn("git", "not found", help), |v| Check::ok("git", v))
}

fn terminal() -> Check {
    let term = env::var("TERM").unwrap_or_default();
    let is_terminal = std::io::stderr().is_terminal();
    let found = match (is_terminal, term.as_str()) {
        (false, _) => "standard error is no terminal: progress is shown as plain lines".to_owned(),
        (true, "" | "dumb") => "a terminal without control codes: plain lines".to_owned(),
        (true, term) => format!("{term}, progress bars"),
    };
    Check::ok("terminal", found)
}

fn locale() -> Check {
    let set = |name: &str| env::var(name).ok().filter(|v| !v.is_empty());
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(set).unwrap_or_default();
    let folded = locale.to_lowercase().replace('-', "");
    if folded.contains("utf8") {
        return Check::ok("locale", locale);
    }
    let shown = if locale.is_empty() { "not set".to_owned() } else { locale };
    let help = "if lines and boxes look broken, set LANG=C.UTF-8; files are UTF-8 regardless";
    Check::warn("locale", shown, help)
}
