//! What a stage process sees of the caller's environment: declared variables, and a short list
//! that is passed on without being stored or fingerprinted.

use std::collections::BTreeMap;
use std::ffi::OsString;

use crate::pipeline::Stage;

/// Without another one declared, stages sort, compare and write messages as this says, whoever runs
/// them: the locale of a user is no part of a fingerprint.
const LANG: &str = "C.UTF-8";
/// Passed on to every stage; a trailing `*` matches any rest. Programs, homes, temporary files,
/// credentials and caches of the hub, package indexes, proxies and certificates, the GPU.
const PASSED: [&str; 27] = [
    "PATH",
    "HOME",
    "USER",
    "TMPDIR",
    "XDG_CACHE_HOME",
    "XDG_RUNTIME_DIR",
    "HF_*",
    "HUGGINGFACE_HUB_CACHE",
    "HUGGING_FACE_HUB_TOKEN",
    "PIP_*",
    "VIRTUAL_ENV",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "ALL_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "all_proxy",
    "no_proxy",
    "CUDA_*",
    "NVIDIA_*",
    "LD_LIBRARY_PATH",
    "PIPE_ISA",
];

/// The whole environment of a stage process; `gpus` are the only ones it is to see.
pub(super) fn of(stage: &Stage, gpus: Option<&str>) -> BTreeMap<OsString, OsString> {
    let passed = PASSED.iter().copied().chain(stage.pass_env.iter().map(String::as_str));
    let passed: Vec<&str> = passed.collect();
    let mut seen: BTreeMap<OsString, OsString> = std::env::vars_os()
        .filter(|(name, _)| {
            name.to_str().is_some_and(|name| passed.iter().any(|p| matches(p, name)))
        })
        .collect();
    seen.extend(gpus.map(|gpus| ("CUDA_VISIBLE_DEVICES".into(), gpus.into())));
    for (name, value) in &stage.env {
        let value = value.clone().map(OsString::from).or_else(|| std::env::var_os(name));
        match value {
            Some(value) => seen.insert(name.into(), value),
            None => seen.remove(std::ffi::OsStr::new(name)),
        };
    }
    if !stage.env.contains_key("LANG") {
        seen.entry("LANG".into()).or_insert_with(|| LANG.into());
    }
    seen
}

fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => name == pattern,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trailing_star_matches_any_rest_and_nothing_else_does() {
        assert!(matches("HF_*", "HF_TOKEN") && matches("PATH", "PATH"));
        assert!(!matches("PATH", "PATHS") && !matches("HF_*", "MY_HF_TOKEN"));
    }
}
